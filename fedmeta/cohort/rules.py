"""Which engine computes a cohort, and how many of its sites at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmeta.cohort import loop, span, vmap
from fedmeta.cohort.accumulate import Contribution, Scores
from fedmeta.cohort.operations import MisfitError
from fedmeta.cohort.survey import ROWS_MIX
from fedmeta.learners import Learner
from fedmeta.task import Batch

BUDGET = 1 << 29
"""How much memory the sites that are computed together may take, by prediction (512 MiB)."""

CACHE = 1 << 20
"""How much the outputs of a convolution may take: it loops over sites, and gains from many only what stays in cache."""

TRIAL_SITES = 16
TRIAL_RUNS = 3


class Engine(Protocol):
    """One way to run a learner for many sites."""

    def meta_gradients(
        self, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
    ) -> Contribution:
        """Returns the weighted sum of the batch's meta-gradients."""
        ...

    def evaluate(self, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Scores:
        """Returns scores and losses [sites, steps + 1] on the batch's query rows."""
        ...


ENGINES: dict[str, Engine] = {"loop": loop, "vmap": vmap, "span": span}
"""Every engine by its name in an experiment; "auto" chooses among them."""


def choose_engine(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None = None) -> str:
    """Returns the engine that "auto" stands for: "span" where it fits, else "loop" or "vmap".

    Convolutions with weights of their own per site become grouped ones under `vmap`, several times slower than a loop;
    and where rows mix, as in normalisation over a batch, only the loop leaves padding out.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state; None for a new one.
    """
    reason = span.fits(learner, batch, meta_state)
    if reason is None:
        return "span"
    loops = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
    looped = any(isinstance(layer, loops) for layer in learner.network.module.modules())
    return "loop" if looped or reason == ROWS_MIX else "vmap"


def unsure(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor]) -> bool:
    """Whether the rule of `choose_engine` is weak: most parameters take one value per site even in the span form."""
    try:
        forms = span.forms_of(learner, batch, meta_state)
    except MisfitError:
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
    spans = span.fits(learner, batch, meta_state) is None
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES if spans or name != "span"}
    for _ in range(TRIAL_RUNS):
        for name in list(seconds):
            try:
                seconds[name].append(_seconds(ENGINES[name], learner, meta_state, few))
            except RuntimeError:
                # Operations without a batching rule make vmap raise; what the loop raises is an error of the model.
                if name == "loop":
                    raise
                del seconds[name]
    figures = {name: min(times) for name, times in seconds.items()}
    return min(figures, key=figures.__getitem__), figures


def chunk_sites(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, engine: str, budget: int) -> int:
    """Returns how many sites can be computed together in `budget` bytes, by prediction; at least 1.

    A site keeps its rows and, for every step and in each of about four passes (forward, derivative, and backward
    through both), its activations, and its weights where it has its own.
    """
    if engine == "loop":
        return max(1, batch.sites)
    theta = learner.theta(meta_state)
    item = next(iter(theta.values())).element_size()
    steps = learner.inner_steps + 1
    support, query = (part[0].shape[1] for part in batch)
    own, activations, largest = sum(value.numel() for value in theta.values()), 0, 0
    if engine == "span":
        forms = span.forms_of(learner, batch, meta_state)
        own = sum(theta[name].numel() for name in forms.dense)
        activations = sum(call.rows * call.width + call.size for call in forms.calls)
        largest = max((call.size for call in forms.calls if call.adapts and call.kind == "convolution"), default=0)
    numbers = 4 * steps * (own + (support + query) * activations)
    numbers += 4 * (support + query) * batch.support[0][0, 0].numel()
    fits_budget, fits_cache = budget // (numbers * item), CACHE // max(1, largest * max(support, query) * item)
    return max(1, min(fits_budget, fits_cache if largest else fits_budget))


def _seconds(engine: Engine, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> float:
    started = time.perf_counter()
    ones = torch.ones(batch.sites, dtype=torch.float64, device=batch.support[2].device)
    engine.meta_gradients(learner, meta_state, batch, ones)
    return time.perf_counter() - started
