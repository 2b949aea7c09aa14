"""Which engine computes a cohort, and running it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmeta.engines import loop, lowrank, program, vmap
from fedmeta.engines.lowrank import ghost_clipping
from fedmeta.engines.lowrank.capture import capture_immediately
from fedmeta.engines.microbatch import BUDGET, chunk_sites, chunks
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.engines.rows import check_labels, check_rows
from fedmeta.engines.weighted_sum import Figures, WeightedSum
from fedmeta.learners import Learner
from fedmeta.models.attention import exact_attention
from fedmeta.task import Batch

TRIAL_SITES = 16
TRIAL_RUNS = 3
MUCH_SLOWER = 2.0
"""An engine that takes so many times as long as the best is not tried again."""

SMALL = 3e7
"""Below so many products of a parameter and a row a cohort takes milliseconds by any engine, and none is timed: that
repeated runs have the same bits is worth more than what the fastest would save."""

LOOPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
"""Layers that use a parameter many times for each row."""


class Engine(Protocol):
    """One way to run a learner for many sites."""

    def meta_gradients(
        self, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
    ) -> WeightedSum:
        """Returns the weighted sum of the batch's meta-gradients."""
        ...

    def evaluate(self, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Figures:
        """Returns the figures [sites, steps + 1] on the batch's query data."""
        ...


ENGINES: dict[str, Engine] = {"loop": loop, "vmap": vmap, "lowrank": lowrank, "program": program}
"""Every engine by its name in an experiment; "auto" chooses among them."""

BY_SITE = {
    "loop": loop.add_sites,
    "vmap": vmap.add_sites,
    "lowrank": ghost_clipping.add_sites,
    "program": program.add_sites,
}
"""What adds each site's own gradient to a contribution; "lowrank" does so for clipped sums alone."""


def choose_engine(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None = None) -> str:
    """Returns the engine that "auto" stands for: the first that fits of "lowrank", "program", "vmap" and "loop".

    Convolutions with weights of their own per site become grouped ones under `vmap`, several times slower than a loop.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state; None for a new one.
    """
    return (
        "lowrank"
        if lowrank.fits(learner, batch, meta_state) is None
        else _other_than_lowrank(learner, batch, meta_state)
    )


def choose_engine_by_site(
    engine: str, learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor], per_site: bool
) -> str:
    """Returns the engine that computes each site's own gradient, or clips them, where `engine` computes their sum.

    The low-rank form has sums alone, clipped ones where it has norms (`fedmeta.engines.lowrank.ghost_clipping`);
    elsewhere one of the
    others stands for it, several times slower.
    """
    if engine != "lowrank" or (not per_site and ghost_clipping.fits(learner, batch, meta_state)):
        return engine
    return _other_than_lowrank(learner, batch, meta_state)


def _other_than_lowrank(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None) -> str:
    if program.fits(learner, batch, meta_state) is None:
        return "program"
    if learner.problem.on_rows and _has_loops(learner):
        return "loop"
    return "vmap" if vmap.fits(learner, batch, meta_state) is None else "loop"


def _has_loops(learner: Learner) -> bool:
    return any(isinstance(layer, LOOPS) for layer in learner.network.module.modules())


def _is_small(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor]) -> bool:
    if not learner.problem.on_rows or _has_loops(learner):
        return False
    rows = batch.support[0].shape[1] * max(learner.inner_steps, 1) + batch.query[0].shape[1]
    parameters = sum(value.numel() for value in learner.theta(meta_state).values())
    return parameters * rows * min(batch.sites, TRIAL_SITES) < SMALL


def needs_autotuning(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor]) -> bool:
    """Returns whether the rule of `choose_engine` is weak where it matters.

    That is where most parameters take one value per site anyway, or a low-rank weight meets several rows for each row
    of the data, as in attention: corrections grow with the square of those. Where a cohort takes milliseconds
    (`SMALL`) the rule decides: a choice that is timed may come out otherwise the next time.
    """
    if _is_small(learner, batch, meta_state):
        return False
    try:
        forms = lowrank.plan_of(learner, batch, meta_state)
    except UnsupportedModelError:
        return True
    if any(call.rows > 1 and call.weight in forms.lowrank for call in forms.calls):
        return True
    sizes = {name: value.numel() for name, value in learner.theta(meta_state).items()}
    return sum(sizes[name] for name in forms.dense) > sum(sizes[name] for name in forms.lowrank)


def trial(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> tuple[str, dict[str, float]]:
    """Times the engines on a few sites and returns the fastest, with the seconds that each took.

    Where the rule is sure, its choice is returned untimed and without figures. A choice that was timed may come out
    otherwise the next time, and another engine changes the last bits: call this before round 1, and keep its choice.
    """
    check_rows(learner, meta_state, batch)
    check_labels(learner, batch)
    if not needs_autotuning(learner, batch, meta_state):
        return choose_engine(learner, batch, meta_state), {}
    few = batch.chunk(0, TRIAL_SITES)
    fitting = {"lowrank": lowrank.fits, "vmap": vmap.fits, "program": program.fits}
    running = [name for name in ENGINES if name not in fitting or fitting[name](learner, batch, meta_state) is None]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(TRIAL_RUNS):
        for name in running:
            if not seconds[name] and name in ("lowrank", "program"):
                # All rounds of a run but its first few are replays, a third quicker for some models.
                with capture_immediately():
                    _seconds(name, learner, meta_state, few)
            seconds[name].append(_seconds(name, learner, meta_state, few))
        # What took long once need not be waited for again.
        best = min(min(times) for times in seconds.values())
        running = [name for name, times in seconds.items() if min(times) < MUCH_SLOWER * best]
    figures = {name: min(times) for name, times in seconds.items()}
    return min(figures, key=figures.__getitem__), figures


def run(
    engine: str,
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    batch: Batch,
    weights: Tensor,
    chunk: int | None = None,
    budget: int = BUDGET,
    clip_norm: float = 0.0,
    per_site: bool = False,
) -> WeightedSum:
    """Returns a cohort's contribution by one engine, chunk by chunk, with the figures in site order.

    With a `clip_norm` it is the sum of clipped gradients; with `per_site` all of them, which "lowrank" does not have.
    """
    total: WeightedSum | None = None  # large weights take long to fill with zeros
    places: list[Tensor] = []
    size = chunk or chunk_sites(learner, meta_state, batch, engine, budget)
    with exact_attention():
        for sites, part in chunks(batch, size):
            if clip_norm or per_site:
                total = total or WeightedSum.empty(learner.message_template(meta_state), clip_norm, per_site)
                BY_SITE[engine](total, learner, meta_state, part, weights[sites])
            elif total is None:
                total = ENGINES[engine].meta_gradients(learner, meta_state, part, weights[sites])
            else:
                total.merge(ENGINES[engine].meta_gradients(learner, meta_state, part, weights[sites]))
            places.append(sites)
    total = total or WeightedSum.empty(learner.message_template(meta_state), clip_norm, per_site)
    order = _in_site_order(total, places)
    if per_site:
        total.kept = [{name: values[order] for name, values in total.stacked().items()}]
    return total


def _in_site_order(total: WeightedSum, places: Sequence[Tensor]) -> Tensor:
    """Puts the figures of chunks with the sites at these places in order; returns the order."""
    figures = {name: torch.cat(values) for name, values in total.metrics.items()}
    if len(places) == 1:
        # All sites, which within a chunk are in order.
        order = places[0]
    else:
        order = torch.cat(list(places)).argsort() if places else torch.arange(0)
        figures = {name: values[order] for name, values in figures.items()}
    total.metrics = {name: [values] for name, values in figures.items()}
    return order


def _seconds(engine: str, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> float:
    ones = torch.ones(batch.sites, dtype=torch.float64, device=batch.device)
    started = time.perf_counter()
    run(engine, learner, meta_state, batch, ones)
    return time.perf_counter() - started
