"""Whether a way to a cohort's gradient is right for a model: compared once with the reference loop, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedmeta.engines import loop
from fedmeta.engines.lowrank.ops import UnsupportedModelError
from fedmeta.learners import Learner
from fedmeta.minibatches import draw_order
from fedmeta.task import Batch

CHECKED_ROWS = 4
"""How many rows a site's are cut to when a model is run to see what it does."""

CHECKED_SIZE = 3
"""The rows of a mini-batch of them, where a learner takes such: several a pass, the last one short."""

WeightedSum = Callable[[Learner, Mapping[str, Tensor], Batch, Tensor], Mapping[str, Tensor]]


def probe_batch(batch: Batch) -> Batch:
    """Returns two sites with a few rows each."""
    return batch.map(lambda rows: tuple(tensor[[0, -1], :CHECKED_ROWS] for tensor in rows))


def check(learner: Learner, state: Mapping[str, Tensor], few: Batch, weighted_sum: WeightedSum) -> None:
    """Checks a way to the gradient of two sites, in float64, against the reference loop.

    Raises:
        UnsupportedModelError: They differ: the model does something that was not seen.
    """
    state = double(state)
    few = few.map(lambda rows: (rows[0].double().nan_to_num() if rows[0].is_floating_point() else rows[0], *rows[1:]))
    if learner.minibatches is not None and not learner.minibatches.halved:
        minibatches = learner.minibatches._replace(size=CHECKED_SIZE)
        mask = torch.cat([few.support[2], few.query[2]], 1) > 0
        few = replace(few, order=torch.from_numpy(draw_order(minibatches, mask.cpu().numpy())).to(few.device))
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64, device=few.device)
    expected = loop.meta_gradients(learner, state, few, weights).total
    gradient = weighted_sum(learner, state, few, weights)
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    wrong = torch.stack([(value - gradient[name]).norm() for name, value in expected.items()]).norm()
    if bool(wrong > 1e-8 * size + 1e-12):
        raise UnsupportedModelError(
            "the model does something with its parameters that cannot be seen: its gradient is another"
        )


def double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a meta-state in float64, with nothing to differentiate by."""
    return {name: value.detach().double() if value.is_floating_point() else value for name, value in state.items()}
