"""The streaming weighted sum that every engine adds to: in site order, in float64."""

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
class Contribution:
    """What a cohort, or a part of it, adds to the weighted sum of meta-gradients.

    Attributes:
        total: The weighted sum over finite sites, float64, with the meta-state's keys.
        weight: The sum of their weights.
        metrics: Per-site figures [sites]; "finite" is 0 where a site's gradient was not, and it counts for nothing.
    """

    total: dict[str, Tensor]
    weight: float = 0.0
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def empty(cls, meta_state: Mapping[str, Tensor]) -> Contribution:
        """Returns a sum of nothing for this meta-state."""
        return cls({name: torch.zeros_like(value, dtype=torch.float64) for name, value in meta_state.items()})

    def add(self, gradients: Mapping[str, Tensor], weights: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Adds the gradients [sites, ...] of some sites under their weights [sites]."""
        figures = [*gradients.values(), *(metrics[name].unsqueeze(1) for name in ("query_loss",) if name in metrics)]
        finite = torch.stack([values.flatten(1).isfinite().all(1) for values in figures]).all(0)
        own = torch.where(finite, weights, 0.0).double()
        all_finite = bool(finite.all())
        for name, gradient in gradients.items():
            clean = gradient if all_finite else torch.where(_like(finite, gradient), gradient, 0.0)
            self.total[name] += torch.tensordot(own, clean.double(), dims=1)
        self._note(float(own.sum()), {**metrics, "finite": finite})

    def add_sum(self, total: Mapping[str, Tensor], weight: float, metrics: Mapping[str, Tensor]) -> None:
        """Adds what is a weighted sum over some sites already, with their figures [sites]."""
        for name, value in total.items():
            self.total[name] += value
        self._note(weight, metrics)

    def merge(self, other: Contribution) -> None:
        """Adds the contribution of the sites that come next."""
        for name, value in other.total.items():
            self.total[name] += value
        self.weight += other.weight
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)

    def _note(self, weight: float, metrics: Mapping[str, Tensor]) -> None:
        self.weight += weight
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).append(values.detach().double())


def _like(sites: Tensor, values: Tensor) -> Tensor:
    return sites.reshape(-1, *[1] * (values.dim() - 1))
