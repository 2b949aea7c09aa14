"""What every engine adds to: the streaming weighted sum, in site order and in float64, or each site's own gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """How well each site's model does after 0, 1, ... inner steps; each [sites, steps + 1].

    Attributes:
        score: Accuracy, or RMSE for regression.
        loss: The mean loss.
        calibration: The expected calibration error; NaN for regression.
    """

    score: Tensor
    loss: Tensor
    calibration: Tensor

    @classmethod
    def of(cls, path: Iterable[tuple[Tensor, Tensor, Tensor]], dim: int = 0) -> Scores:
        """Returns the figures of a path of models, stacked along `dim`."""
        return cls(*(torch.stack(column, dim) for column in zip(*path, strict=True)))

    @classmethod
    def join(cls, parts: Iterable[Scores]) -> Scores:
        """Returns the scores of several parts of a cohort as one."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass
class WeightedSum:
    """What a cohort, or a part of it, adds to the weighted sum of meta-gradients.

    Attributes:
        total: The weighted sum over finite sites, with the meta-state's keys: float64 where parts were added up, else
            the type in which the one part was computed.
        weight: The sum of their weights.
        metrics: Per-site figures [sites]; "finite" is 0 where a site's gradient was not, and it counts for nothing.
        clip_norm: The longest gradient of one site, over all its entries; a longer one is shortened; 0 = any length.
        kept: Each site's own gradient, not weighted, in parts [sites, ...], where that is wanted and not the sum.
    """

    total: dict[str, Tensor]
    weight: float = 0.0
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    clip_norm: float = 0.0
    kept: list[dict[str, Tensor]] | None = None

    @classmethod
    def empty(cls, meta_state: Mapping[str, Tensor], clip_norm: float = 0.0, per_site: bool = False) -> WeightedSum:
        """Returns a sum of nothing for this meta-state."""
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in meta_state.items()}
        return cls(total, clip_norm=clip_norm, kept=[] if per_site else None)

    def add(self, gradients: Mapping[str, Tensor], weights: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Adds the gradients [sites, ...] of some sites under their weights [sites]."""
        figures = [*gradients.values(), *(metrics[name].unsqueeze(1) for name in ("query_loss",) if name in metrics)]
        finite = torch.stack([values.flatten(1).isfinite().all(1) for values in figures]).all(0)
        own = torch.where(finite, weights, 0.0).double()
        clean = gradients
        if not bool(finite.all()):
            clean = {name: torch.where(_like(finite, value), value, 0.0) for name, value in gradients.items()}
        factors = clip_factors(clean, self.clip_norm) if self.clip_norm else torch.ones_like(own)
        if self.kept is None:
            for name, value in clean.items():
                self.total[name] += torch.tensordot(own * factors, value.double(), dims=1)
        else:
            self.kept.append({name: value.mul(_like(factors, value)).to(value) for name, value in clean.items()})
        self._note(float(own.sum()), {**metrics, "finite": finite})

    def stacked(self) -> dict[str, Tensor]:
        """Returns the gradients of the sites so far [sites, ...], 0 where one was not finite, where they were kept."""
        parts = self.kept or [{name: value[None][:0] for name, value in self.total.items()}]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def merge(self, other: WeightedSum) -> None:
        """Adds the contribution of the sites that come next."""
        self.total = {name: value.double() + other.total[name] for name, value in self.total.items()}
        self.weight += other.weight
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)

    def _note(self, weight: float, metrics: Mapping[str, Tensor]) -> None:
        self.weight += weight
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).append(values.detach().double())


def clip_factors(gradients: Mapping[str, Tensor], clip_norm: float) -> Tensor:
    """Returns what shortens each site's gradient [sites, ...] to `clip_norm`: min(1, clip_norm / norm), [sites].

    The norm is that of all entries together, in float64; a gradient of zeros stays one.
    """
    squares = [value.flatten(1).double().square().sum(1) for value in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    return clip_norm / norms.clamp(min=clip_norm)


def _like(sites: Tensor, values: Tensor) -> Tensor:
    return sites.reshape(-1, *[1] * (values.dim() - 1))
