"""First order or exact: when the server climbs to the exact meta-gradient, comes down again, and undoes a climb.

Every so many rounds a probe computes both gradients for the round's cohort, at the same meta-state and on the same
rows, and compares them. The rules:

- climb where the judging sites have not improved for `climb_patience` evaluations, from the state that they scored best
  at, or, if `climb_below` is above -1, where the cosine is below it (by default it is not: a low cosine does not mean
  that first order reaches less);
- come down where it was above `descend_above`, which is higher, in `descend_probes` probes in a row;
- undo a climb where they get worse after it: the meta-state and the optimizer's memory from before it are put back, and
  the next climb waits for twice as many evaluations.

The judging sites are validation sites where the run has some, and else training sites, on their test rows
(`server.federation.judges`).

What decides is deterministic; the seconds that each order takes are measured in this run and are for the ledger alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.experiment import Server
from fedmeta.learners.order import EXACT, FIRST

GUARDED = 3
"""How many evaluations after a climb may undo it."""

SIGNIFICANT = 2.0
"""How many standard errors over the judging sites their loss must rise to undo a climb."""

FEW, MUCH_WORSE = 3, 1.1
"""Of fewer judging sites than the first, none is averaged: their loss must rise by this factor."""

WARM_UP = 1
"""How many first times of an order are no measure of it: it is checked and traced then."""

TIMES = 9
"""How many of an order's last times are kept."""


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        cosine: Between the first-order and the exact gradient of the cohort.
        ratio: The norm of the first over that of the exact one.
    """

    cosine: float
    ratio: float


@dataclass(frozen=True)
class Order:
    """Which gradient a run takes, and what it has seen of both.

    Attributes:
        now: "first" or "exact".
        calm: Probes in a row above `descend_above`.
        waits: Evaluations that must pass before the next climb.
        penalty: How many the next undone climb will wait.
        stalled: Evaluations without a better score of the judging sites since the order changed.
        best: The best score so far since then, and what decides between equal ones; higher is better.
        best_losses: The loss of each judging site at that score.
        guarded: Evaluations that may still undo the last climb; 0 where there is none to undo.
        guard: The loss of each judging site at that climb; empty until they are scored, which a climb has done.
        rounds: Rounds in each order.
        probes: How many probes there were.
        seconds: The last times of each order, the first ones left out.
        seen: How often each order was timed.
    """

    now: str = FIRST
    calm: int = 0
    waits: int = 0
    penalty: int = 2
    stalled: int = 0
    best: tuple[float, ...] | None = None
    best_losses: tuple[float, ...] = ()
    guarded: int = 0
    guard: tuple[float, ...] = ()
    rounds: Mapping[str, int] = field(default_factory=dict)
    probes: int = 0
    seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON holds it."""
        return {
            name: {key: list(times) for key, times in value.items()} if name == "seconds" else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> Order:
        """Returns what `to_json` returned."""
        seconds = {name: tuple(times) for name, times in known["seconds"].items()}
        lists = {name: tuple(known[name]) for name in ("best_losses", "guard")}
        best = None if known["best"] is None else tuple(known["best"])
        return cls(**{**known, **lists, "best": best, "seconds": seconds})

    def timed(self, order: str, seconds: float, *, stepped: bool) -> Order:
        """Returns it after a cohort was computed in an order.

        Args:
            order: The order.
            seconds: How long it took, from asking the nodes to their answers.
            stepped: Whether the round stepped along it; else it was a probe's other gradient.
        """
        seen = {**self.seen, order: self.seen.get(order, 0) + 1}
        times = self.seconds.get(order, ())
        times = (*times, seconds)[-TIMES:] if seen[order] > WARM_UP else times
        rounds = {**self.rounds, order: self.rounds.get(order, 0) + stepped}
        return replace(self, seen=seen, seconds={**self.seconds, order: times}, rounds=rounds)

    def cost(self, order: str) -> float | None:
        """Returns the seconds that a cohort takes in an order, the median; None where that was not measured."""
        times = self.seconds.get(order)
        return median(times) if times else None


def compare(first: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Probe:
    """Returns how two gradients with the same keys compare; the cosine is 1 where both are 0."""
    one, other = (torch.cat([part[name].double().reshape(-1) for name in sorted(part)]) for part in (first, exact))
    norms = float(one.norm()), float(other.norm())
    if not norms[0] or not norms[1]:
        return Probe(float(norms[0] == norms[1]), 1.0 if norms[0] == norms[1] else 0.0)
    return Probe(float(one @ other) / (norms[0] * norms[1]), norms[0] / norms[1])


def after_probe(order: Order, probe: Probe, settings: Server) -> tuple[Order, str]:
    """Returns the order after a probe, and what was decided: "climb", "descend" or ""."""
    calm = order.calm + 1 if probe.cosine > settings.descend_above else 0
    order = replace(order, probes=order.probes + 1, calm=calm)
    if order.now == FIRST and probe.cosine < settings.climb_below and not order.waits:
        return order, "climb"
    if order.now == EXACT and calm >= settings.descend_probes:
        return replace(order, now=FIRST, calm=0, stalled=0, best=None, guarded=0, guard=()), "descend"
    return order, ""


def after_evaluation(
    order: Order, score: tuple[float, ...], losses: NDArray[np.float64], settings: Server
) -> tuple[Order, str]:
    """Returns the order after an evaluation of the judging sites, and what was decided: "climb", "undo" or "".

    Args:
        order: The order before.
        score: Their score, and what decides between equal ones: higher is better.
        losses: The loss of each of them [sites].
        settings: The experiment's section.
    """
    if order.now == EXACT and order.guarded and not order.guard:
        order = replace(order, guard=_finite(losses))
    elif order.now == EXACT and order.guarded:
        if is_worse(losses, np.array(order.guard)):
            penalty = 2 * order.penalty
            fallen = replace(order, now=FIRST, waits=order.penalty, penalty=penalty, guarded=0, guard=(), calm=0)
            return replace(fallen, stalled=0, best=None), "undo"
        left = order.guarded - 1
        order = replace(order, guarded=left, guard=order.guard if left else ())
    order = replace(order, waits=max(0, order.waits - 1))
    if order.best is None or score > order.best:
        return replace(order, best=score, best_losses=_finite(losses), stalled=0), ""
    order = replace(order, stalled=order.stalled + 1)
    stalls = order.now == FIRST and order.stalled >= settings.climb_patience and not order.waits
    return order, "climb" if stalls else ""


def probes(order: Order, settings: Server) -> bool:
    """Returns whether a probe may decide anything: in first order it does by `climb_below` alone."""
    return order.now == EXACT or settings.climb_below > -1


def climbed(order: Order, losses: NDArray[np.float64] | None = None) -> Order:
    """Returns the order after a climb.

    Args:
        order: The order before.
        losses: The loss of each judging site [sites] at the state that it climbs from; None where they are not
            scored yet: the next evaluation is of that state.
    """
    guard = () if losses is None else _finite(losses)
    return replace(order, now=EXACT, calm=0, stalled=0, best=None, guarded=GUARDED, guard=guard)


def _finite(losses: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.where(np.isfinite(losses), losses, np.finfo(np.float32).max).tolist())


def is_worse(losses: NDArray[np.float64], before: NDArray[np.float64]) -> bool:
    """Returns whether the judging sites' losses [sites] are significantly higher than before, paired by site.

    A loss that is not finite is worse. Where sites came or went since, the means are compared.
    """
    if not np.isfinite(losses).all():
        return True
    if len(losses) != len(before) or len(losses) < FEW:
        low = float(before.mean())
        return float(losses.mean()) > low + (MUCH_WORSE - 1) * abs(low)
    rise = losses - before
    error = float(rise.std(ddof=1)) / np.sqrt(len(rise))
    return float(rise.mean()) > SIGNIFICANT * error and float(rise.mean()) > 0


def summary(order: Order) -> dict[str, Any]:
    """Returns a run's entries on its order: rounds in each, what a cohort cost, and what first order saved.

    `saved_s` is what the rounds in first order would have cost more as exact ones, less what probes cost; None where a
    cost was not measured.
    """
    first, exact = order.cost(FIRST), order.cost(EXACT)
    taken = {name: order.rounds.get(name, 0) for name in (FIRST, EXACT)}
    saved = None
    if first is not None and exact is not None:
        # A probe's other gradient is an exact one in a round of first order and the other way round.
        probed = {name: order.seen.get(name, 0) - taken[name] for name in (FIRST, EXACT)}
        saved = taken[FIRST] * (exact - first) - probed[FIRST] * first - probed[EXACT] * exact
    return {
        "now": order.now,
        "rounds_first": taken[FIRST],
        "rounds_exact": taken[EXACT],
        "probes": order.probes,
        "first_s": first,
        "exact_s": exact,
        "saved_s": saved,
    }
