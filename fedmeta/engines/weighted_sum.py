"""What every engine adds to: the streaming weighted sum, in site order and in float64, or each site's own gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedmeta.learners.learner import FROZEN, Learner
from fedmeta.task import Batch

Figures = dict[str, Tensor]
"""How good sites' parameters are after 0, 1, ... inner steps: "loss" and each metric [sites, steps + 1]; a model's
"outputs" [sites, steps + 1, rows, outputs] where metrics are computed from them."""


def stack_path(path: Iterable[Mapping[str, Tensor]], dim: int = 0) -> Figures:
    """Returns the figures of a path of parameters, stacked along `dim`."""
    every = list(path)
    return {name: torch.stack([step[name] for step in every], dim) for name in every[0]}


def join_figures(parts: Iterable[Figures]) -> Figures:
    """Returns the figures of several parts of a cohort as one; outputs of fewer rows are padded with zeros."""
    every = list(parts)
    return {name: torch.cat(_one_length([part[name] for part in every])) for name in every[0]}


def _one_length(values: list[Tensor]) -> list[Tensor]:
    if values[0].dim() < 3:
        return values
    longest = max(value.shape[2] for value in values)
    return [torch.cat([v, v.new_zeros(*v.shape[:2], longest - v.shape[2], *v.shape[3:])], 2) for v in values]


NORM = "norm"
"""The figure of a site that is the norm of its gradient before it is shortened, where gradients are."""

Part = tuple[Any, dict[str, Tensor], float, dict[str, Tensor]]
"""The places of some of a cohort's sites, and what `fedmeta.engines.meta_gradients` returns of them."""


def join_parts(parts: Sequence[Part], per_site: bool) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Returns what `fedmeta.engines.meta_gradients` returns of all of a cohort's sites, from parts of it."""
    if len(parts) == 1:
        return parts[0][1:]
    groups = [group for group, *_ in parts]
    gradients, figures = [part[1] for part in parts], in_site_order(groups, [part[3] for part in parts])
    if per_site:
        return in_site_order(groups, gradients), sum(part[2] for part in parts), figures
    total = {name: torch.stack([each[name].double() for each in gradients]).sum(0) for name in gradients[0]}
    return total, sum(part[2] for part in parts), figures


def in_site_order(groups: Sequence[Any], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns tensors [sites, ...] of several groups of sites as one, in the order of the sites' places."""
    order = torch.as_tensor(np.concatenate(groups)).argsort()
    return {name: torch.cat([part[name] for part in parts])[order.to(parts[0][name].device)] for name in parts[0]}


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
        total = {
            name: torch.zeros_like(value, dtype=torch.float64)
            for name, value in meta_state.items()
            if not name.startswith(FROZEN)
        }
        return cls(total, clip_norm=clip_norm, kept=[] if per_site else None)

    def add(self, gradients: Mapping[str, Tensor], weights: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Adds the gradients [sites, ...] of some sites under their weights [sites]."""
        figures = [*gradients.values(), *(metrics[name] for name in ("query_loss",) if name in metrics)]
        finite = torch.stack([by_site(values).isfinite().all(1) for values in figures]).all(0)
        own = torch.where(finite, weights, 0.0).double()
        clean = gradients
        if not bool(finite.all()):
            clean = {name: torch.where(_like(finite, value), value, 0.0) for name, value in gradients.items()}
        if self.clip_norm:
            norms = norms_of(clean)
            factors = self.clip_norm / norms.clamp(min=self.clip_norm)
            metrics = {**metrics, NORM: norms}
        else:
            factors = torch.ones_like(own)
        if self.kept is None:
            for name, value in clean.items():
                self.total[name] += torch.tensordot(own * factors, value.double(), dims=1)
        else:
            self.kept.append({name: value.mul(_like(factors, value)).to(value) for name, value in clean.items()})
        self.note(float(own.sum()), {**metrics, "finite": finite})

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

    def absorb(self, other: WeightedSum) -> None:
        """Adds the contribution of the sites that come next, in place: to a sum in float64 and to gradients kept."""
        for name, value in other.total.items():
            self.total[name].add_(value)
        if self.kept is not None and other.kept is not None:
            self.kept.extend(other.kept)
        self.weight += other.weight
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)

    def note(self, weight: float, metrics: Mapping[str, Tensor]) -> None:
        """Notes a weight and per-site figures of sites whose gradients were added."""
        self.weight += weight
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).append(values.detach().double())


class AddSites(Protocol):
    """What adds each site's gradient to a contribution; how sites are computed is an engine's own."""

    def __call__(
        self, total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
    ) -> None:
        """Adds the batch's sites under their weights [sites]."""
        ...


class MetaGradients(Protocol):
    """An engine's `meta_gradients`."""

    def __call__(
        self, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
    ) -> WeightedSum:
        """Returns the weighted sum of the batch's meta-gradients."""
        ...


def summed(add_sites: AddSites) -> MetaGradients:
    """Returns the `meta_gradients` of an engine that adds one site's gradient after the other's."""

    def meta_gradients(
        learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
    ) -> WeightedSum:
        total = WeightedSum.empty(learner.message_template(meta_state))
        add_sites(total, learner, meta_state, batch, weights)
        return total

    return meta_gradients


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """Returns the norm of each site's gradient [sites, ...] over all entries together, in float64 [sites]."""
    squares = [by_site(value).double().square().sum(1) for value in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def by_site(values: Tensor) -> Tensor:
    """Returns values [sites, ...] as [sites, numbers]; a scalar of each site is one number."""
    return values.unsqueeze(-1).flatten(1)


def _like(sites: Tensor, values: Tensor) -> Tensor:
    return sites.reshape(-1, *[1] * (values.dim() - 1))
