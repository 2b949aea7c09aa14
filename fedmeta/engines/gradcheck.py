"""Whether a fast way to a cohort's gradient is right: compared once with the reference loop, in float64.

Only what passed is remembered. A site whose gradient is zero or not finite proves nothing; others are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from fedmeta.engines import loop
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.engines.weighted_sum import Figures, WeightedSum
from fedmeta.importing import first_line
from fedmeta.learners import Learner
from fedmeta.minibatches import draw_order
from fedmeta.models.attention import exact_attention
from fedmeta.problems.source import as_dtype
from fedmeta.task import Batch, Task, TreeBatch

CHECKED_ROWS = 4
"""How many rows a site's are cut to when a model is run to see what it does."""

CHECKED_SIZE = 3
"""The rows of a mini-batch of them, where a learner takes such: several a pass, the last one short."""

TRIED_SITES = 16
"""How many sites are tried for two that prove something."""

TOLERANCE = 1e-8

Sums = Callable[[Learner, Mapping[str, Tensor], Batch, Tensor], WeightedSum]
Evaluation = Callable[[Learner, Mapping[str, Tensor], Batch, int], Figures]


class UnprovenError(UnsupportedModelError):
    """No site at hand could show whether a way is right: another batch may."""


def cut(batch: Batch, rows: int | None = CHECKED_ROWS) -> Batch:
    """Returns the sites with their first few rows; all that they have for None, and of data that are no rows."""
    if rows is None or isinstance(batch, TreeBatch):
        return batch.map(lambda part: part)
    return batch.map(lambda part: tuple(tensor[:, :rows] for tensor in part))


def check(
    learner: Learner, state: Mapping[str, Tensor], batch: Batch, sums: Sums, evaluation: Evaluation | None = None
) -> None:
    """Checks a way to the gradients of two sites, and to their figures, in float64, against the reference loop.

    Args:
        learner: The learner.
        state: The meta-state.
        batch: Some sites' tasks.
        sums: The way to the weighted sum of meta-gradients.
        evaluation: The way to figures; None where there is none.

    Raises:
        UnsupportedModelError: They differ, or the way fails.
        UnprovenError: No site has a gradient that could prove anything.
        FedmetaError: The learner or the model itself fails.
    """
    state = double(state)
    with exact_attention():
        few, expected = _reference(learner, state, batch)
        weights = _weights(few)
        try:
            found = sums(learner, state, few, weights)
            _compare(expected.total, found.total, "its gradient is another")
            losses = {"query_loss": torch.cat(expected.metrics["query_loss"])}
            _compare(losses, {"query_loss": torch.cat(found.metrics["query_loss"])}, "its query loss is another")
            if evaluation is not None:
                steps = learner.evaluation_steps(1)
                true = loop.evaluate(learner, state, few, steps)
                _compare({"loss": true["loss"]}, evaluation(learner, state, few, steps), "it is scored otherwise")
        except (UnsupportedModelError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an operation that has no batched form raises
            raise UnsupportedModelError(f"it does not run there ({first_line(error)})") from error


def double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a meta-state in float64, with nothing to differentiate by."""
    return {name: value.detach().double() if value.is_floating_point() else value for name, value in state.items()}


def _reference(learner: Learner, state: Mapping[str, Tensor], batch: Batch) -> tuple[Batch, WeightedSum]:
    """Returns two sites whose gradients are finite and not zero, or one of them twice, with the loop's sum."""
    spread = torch.linspace(0, batch.sites - 1, min(batch.sites, TRIED_SITES)).round().long().tolist()
    # From both ends: sites are often sorted, and the first and the last differ most.
    order = dict.fromkeys(site for pair in zip(spread, spread[::-1], strict=True) for site in pair)
    for rows in (CHECKED_ROWS, None):
        proving = (site for site in order if _proves(learner, state, cut(batch.take(slice(site, site + 1)), rows)))
        useful = list(islice(proving, 2))
        if useful:
            chosen = torch.tensor([useful[0], useful[-1]], device=batch.device)
            few = _ordered(learner, _double(cut(batch.take(chosen), rows)))
            return few, loop.meta_gradients(learner, state, few, _weights(few))
    raise UnprovenError("no site's gradient could show that the batched one is right: all are zero or not finite")


def _proves(learner: Learner, state: Mapping[str, Tensor], one: Batch) -> bool:
    """Whether a site's gradient is finite and, of a learner that sends something, not zero."""
    found = loop.meta_gradients(learner, state, _ordered(learner, _double(one)), _weights(one))
    finite = bool(torch.cat(found.metrics["finite"]).all())
    return finite and (learner.update == "nothing" or any(bool(value.any()) for value in found.total.values()))


def _ordered(learner: Learner, batch: Batch) -> Batch:
    """Returns a batch in small mini-batches where a learner takes such."""
    if learner.minibatches is None or learner.minibatches.halved:
        return batch
    mask = torch.cat([batch.support[2], batch.query[2]], 1) > 0
    order = draw_order(learner.minibatches._replace(size=CHECKED_SIZE), mask.cpu().numpy())
    return replace(batch, order=torch.from_numpy(order).to(batch.device))


def _weights(batch: Batch) -> Tensor:
    return torch.tensor([1.0, 0.5], dtype=torch.float64, device=batch.device)[: batch.sites]


def _double(batch: Batch) -> Batch:
    if isinstance(batch, TreeBatch):
        return batch.map(lambda part: as_dtype(Task(part, part), torch.float64).support)
    return batch.map(lambda rows: (_as_double(rows[0]).nan_to_num(), *rows[1:]))


def _as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], otherwise: str) -> None:
    size = torch.stack([value.double().norm() for value in expected.values()]).norm()
    wrong = torch.stack([(value.double() - found[name].double()).norm() for name, value in expected.items()]).norm()
    if not bool(wrong <= TOLERANCE * size + 1e-12):
        raise UnsupportedModelError(f"the model does something with its parameters that cannot be seen: {otherwise}")
