"""Which engine computes a cohort, and running it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedmeta.engines import loop, lowrank, vmap
from fedmeta.engines.lowrank import ghost_clipping
from fedmeta.engines.lowrank.capture import capture_immediately
from fedmeta.engines.lowrank.ops import UnsupportedModelError
from fedmeta.engines.lowrank.trace import ROWS_MIX
from fedmeta.engines.microbatch import BUDGET, chunk_sites, chunks
from fedmeta.engines.weighted_sum import Figures, WeightedSum
from fedmeta.learners import Learner
from fedmeta.problems.solvers import DIFFERENTIABLE
from fedmeta.task import Batch

TRIAL_SITES = 16
TRIAL_RUNS = 3
HOPELESS = 2.0
"""An engine that takes so many times as long as the best is not tried again."""


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


ENGINES: dict[str, Engine] = {"loop": loop, "vmap": vmap, "lowrank": lowrank}
"""Every engine by its name in an experiment; "auto" chooses among them."""

BY_SITE = {"loop": loop.add_sites, "vmap": vmap.add_sites, "lowrank": ghost_clipping.add_sites}
"""What adds each site's own gradient to a contribution; "lowrank" does so for clipped sums alone."""


def choose_engine(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None = None) -> str:
    """Returns the engine that "auto" stands for: "lowrank" where it fits, else "loop" or "vmap".

    Convolutions with weights of their own per site become grouped ones under `vmap`, several times slower than a loop;
    and where rows mix, as in normalisation over a batch, only the loop leaves padding out.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state; None for a new one.
    """
    reason = lowrank.fits(learner, batch, meta_state)
    return "lowrank" if reason is None else _without_span(learner, reason)


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
    return _without_span(learner, lowrank.fits(learner, batch, meta_state))


def _without_span(learner: Learner, reason: str | None) -> str:
    if not learner.problem.on_rows:
        return "vmap" if learner.problem.solver.kind == DIFFERENTIABLE else "loop"
    loops = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
    looped = any(isinstance(layer, loops) for layer in learner.network.module.modules())
    return "loop" if looped or reason == ROWS_MIX else "vmap"


def unsure(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor]) -> bool:
    """Returns whether the rule of `choose_engine` is weak: most parameters take one value per site anyway."""
    try:
        forms = lowrank.plan_of(learner, batch, meta_state)
    except UnsupportedModelError:
        return True
    sizes = {name: value.numel() for name, value in learner.theta(meta_state).items()}
    return sum(sizes[name] for name in forms.dense) > sum(sizes[name] for name in forms.spans)


def trial(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> tuple[str, dict[str, float]]:
    """Times the engines on a few sites and returns the fastest, with the seconds that each took.

    Where the rule is sure, its choice is returned untimed and without figures. A choice that was timed may come out
    otherwise the next time, and another engine changes the last bits: call this before round 1, and keep its choice.
    """
    if not unsure(learner, batch, meta_state):
        return choose_engine(learner, batch, meta_state), {}
    few = batch.chunk(0, TRIAL_SITES)
    reason = lowrank.fits(learner, batch, meta_state)
    refused = set() if reason is None else {"lowrank", "vmap"} if reason == ROWS_MIX else {"lowrank"}
    if learner.problem.solver.kind != DIFFERENTIABLE:
        refused = {"lowrank", "vmap"}
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES if name not in refused}
    running = list(seconds)
    for _ in range(TRIAL_RUNS):
        for name in running:
            try:
                if not seconds[name]:
                    _evaluate_once(name, learner, meta_state, few)
                    if name == "lowrank":
                        # All rounds of a run but its first few are replays, a third quicker for some models.
                        with capture_immediately():
                            _seconds(name, learner, meta_state, few)
                seconds[name].append(_seconds(name, learner, meta_state, few))
            except RuntimeError:
                # Operations without a batching rule make vmap raise, some only where nothing is differentiated;
                # what the loop raises is an error of the model.
                if name == "loop":
                    raise
                del seconds[name]
        # What took long once need not be waited for again.
        best = min(min(times) for times in seconds.values())
        running = [name for name, times in seconds.items() if min(times) < HOPELESS * best]
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
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
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


def _evaluate_once(engine: str, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> None:
    """Evaluates one site: some models can be trained by an engine and not be evaluated."""
    with sdpa_kernel(SDPBackend.MATH):
        ENGINES[engine].evaluate(learner, meta_state, batch.chunk(0, 1), learner.evaluation_steps())


def _seconds(engine: str, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> float:
    ones = torch.ones(batch.sites, dtype=torch.float64, device=batch.device)
    started = time.perf_counter()
    run(engine, learner, meta_state, batch, ones)
    return time.perf_counter() - started
