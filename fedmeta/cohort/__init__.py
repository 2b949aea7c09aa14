"""Runs a learner for many sites at once: the reference loop, and the fast ways, equal to it.

An engine is a module with two functions: `meta_gradients(learner, meta_state, batch, weights)`, which returns a
`Contribution`, and `evaluate(learner, meta_state, batch, steps)`, which returns `Scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmeta.cohort import loop, vmap
from fedmeta.cohort.accumulate import Contribution, Scores
from fedmeta.errors import FedmetaError, nearest
from fedmeta.learners import Learner
from fedmeta.task import Batch, Task, stack

__all__ = ["ENGINES", "choose_engine", "evaluate", "meta_gradients"]

CHUNK_BYTES = 1 << 29
"""How much memory the sites that are computed together may take, by prediction (512 MiB)."""


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


ENGINES: dict[str, Engine] = {"loop": loop, "vmap": vmap}
"""Every engine by its name in an experiment; "auto" chooses among them."""


def meta_gradients(
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    tasks: Sequence[Task] | Batch,
    engine: str = "auto",
    *,
    weights: Sequence[float] | Tensor | None = None,
    chunk: int | None = None,
) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Computes the weighted sum of many sites' meta-gradients.

    Args:
        learner: The learner.
        meta_state: The meta-state.
        tasks: One task per site, in site order; or the same as one padded `Batch`.
        engine: "auto" or a key of `ENGINES`. All give the same up to the last bits.
        weights: The weight of each site [sites]; None for 1 each.
        chunk: The number of sites that are computed together; None for as many as 512 MiB hold.

    Returns:
        The weighted sum (the meta-state's keys, summed in float64 in site order and returned in its types), the total
        weight, and per-site figures [sites], among them "query_loss" and "finite". A site whose gradient is not finite
        has neither a share in the sum nor in the weight.

    Raises:
        FedmetaError: There is no such engine.
    """
    batch = tasks if isinstance(tasks, Batch) else stack(tasks)
    own = torch.ones(batch.sites, dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    run = _engine(engine, learner)
    size = chunk or _chunk(learner, batch, learner.inner_steps)
    total = Contribution.empty(meta_state)
    for start in range(0, batch.sites, size):
        part = batch.chunk(start, start + size)
        total.merge(run.meta_gradients(learner, meta_state, part, own[start : start + size]))
    gradient = {name: value.to(meta_state[name].dtype) for name, value in total.total.items()}
    return gradient, total.weight, {name: torch.cat(values) for name, values in total.metrics.items()}


def evaluate(
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    tasks: Sequence[Task] | Batch,
    engine: str = "auto",
    *,
    steps: int | None = None,
    chunk: int | None = None,
) -> Scores:
    """Scores every site on its query rows before, during and after adaptation on its support rows.

    Args:
        learner: The learner.
        meta_state: The meta-state.
        tasks: One task per site (support: the rows to adapt on; query: the rows that judge), or one padded `Batch`.
        engine: As for `meta_gradients`.
        steps: Inner steps; None for the learner's own number. A learner that does not adapt takes none.
        chunk: As for `meta_gradients`.

    Returns:
        Accuracy (RMSE for regression) and loss, each [sites, steps + 1], after 0, 1, ... steps.
    """
    batch = tasks if isinstance(tasks, Batch) else stack(tasks)
    taken = learner.evaluation_steps(steps)
    run = _engine(engine, learner)
    size = chunk or _chunk(learner, batch, 1)
    parts = [
        run.evaluate(learner, meta_state, batch.chunk(start, start + size), taken)
        for start in range(0, batch.sites, size)
    ]
    scores, losses = (torch.cat(column) for column in zip(*parts, strict=True))
    return scores, losses


def choose_engine(learner: Learner) -> str:
    """Returns the engine that "auto" stands for: "loop" for convolutional and recurrent models, else "vmap".

    Convolutions with weights of their own per site become grouped ones under `vmap`, several times slower than a loop.
    """
    loops = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
    return "loop" if any(isinstance(layer, loops) for layer in learner.network.module.modules()) else "vmap"


def _engine(name: str, learner: Learner) -> Engine:
    chosen = choose_engine(learner) if name == "auto" else name
    if chosen not in ENGINES:
        raise FedmetaError(f'no engine "{name}"{nearest(name, ENGINES)} (known: auto, {", ".join(ENGINES)})')
    return ENGINES[chosen]


def _chunk(learner: Learner, batch: Batch, steps: int) -> int:
    """Returns how many sites fit `CHUNK_BYTES`: each keeps its weights and gradients of every step, and its rows."""
    parameters = sum(value.numel() for value in learner.network.module.parameters())
    rows = batch.support[0][0].numel() + batch.query[0][0].numel()
    return max(1, CHUNK_BYTES // (8 * (parameters * (2 + 3 * steps) + 4 * rows)))
