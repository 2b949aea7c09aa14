"""What is checked of rows, labels, models and derivatives before any engine computes with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from fedmeta.engines.gradcheck import cut
from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner
from fedmeta.learners.check import needs_verification, verify_derivative
from fedmeta.problems.function_of_rows import ROWS, check_model
from fedmeta.problems.problem import Problem
from fedmeta.problems.rows import beyond
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Batch, Task

SITES = 4
"""How many sites are tried for one whose gradient can be verified."""


def check_tasks(tasks: Sequence[Task]) -> None:
    """Checks that tasks hold rows (x, y) or (x, y, mask) of tensors, of one form at all sites.

    Raises:
        FedmetaError: One does not; names it.
    """
    first: dict[str, tuple[tuple[int, ...], bool]] = {}
    for number, task in enumerate(tasks):
        if not isinstance(task, tuple) or len(task) != 2:
            raise FedmetaError(f"task {number} is {type(task).__name__}: make it fedmeta.Task(support, query)")
        for what, rows in zip(("support", "query"), task, strict=True):
            place = f"task {number}: its {what}"
            if not isinstance(rows, tuple | list) or len(rows) not in (2, 3):
                raise FedmetaError(f"{place} is {type(rows).__name__}: make it (x, y) or (x, y, mask)")
            for name, value in zip(("x", "y", "mask"), rows, strict=False):
                if not isinstance(value, Tensor):
                    raise FedmetaError(
                        f"{place} has {name} of type {type(value).__name__}: make it a tensor, as torch.as_tensor does"
                    )
                if not value.dim() or len(value) != len(rows[0]):
                    sizes = f"{tuple(rows[0].shape)} and {tuple(value.shape)}"
                    raise FedmetaError(f"{place} has x and {name} of shapes {sizes}: give each row one {name}")
                form = (tuple(value.shape[1:]), value.is_floating_point())
                if name != "mask" and first.setdefault(name, form) != form:
                    raise FedmetaError(
                        f"{place} has rows of {name} with shape {list(form[0])} and type {value.dtype}, and the first "
                        f"task others, with shape {list(first[name][0])}: all sites need rows of one form"
                    )


def check_rows(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> None:
    """Checks once per form of the data that a model on rows is a function of each row.

    Raises:
        FedmetaError: It is not.
    """
    problem = learner.problem
    if not isinstance(problem, Supervised) or _key(batch) in problem.known:
        return
    rows = torch.cat([part[0][part[2] > 0][:ROWS] for part in batch])
    if len(rows):
        problem.known[_key(batch)] = check_model(problem, learner.theta(meta_state), rows[:ROWS])


def check_derivatives(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> None:
    """Checks once the derivatives of what fedmeta's own tests do not cover, on a few rows of a few sites.

    Raises:
        FedmetaError: One is wrong: all engines would agree with one another, and not with it.
    """
    if needs_verification(learner):
        verify_derivative(learner, meta_state, [cut(batch).task(site) for site in range(min(batch.sites, SITES))])


def check_labels(learner: Learner, batch: Batch) -> None:
    """Checks that a model has an output for every class among the labels.

    Raises:
        FedmetaError: It has not; names the site's place and the label.
    """
    problem, y = learner.problem, batch.support[1] if learner.problem.on_rows else None
    if not isinstance(problem, Supervised) or y is None or y.is_floating_point() or not _usual_loss(learner):
        return
    outputs = problem.known.get(_key(batch))
    if not isinstance(outputs, tuple) or len(outputs) != 1 or outputs[0] < 2 or y.dim() != 2:
        return  # what does not fit in shape is refused where the loss is computed
    for what, (_, labels, mask) in zip(("support", "query"), batch, strict=True):
        largest = torch.where(mask > 0, labels.long(), -1).amax(1) if labels.shape[1] else labels.new_zeros(0)
        if largest.numel() and int(largest.max()) >= outputs[0]:
            site = int(largest.argmax())
            raise FedmetaError(f"task {site}, {what}: {beyond(int(largest[site]), outputs[0])}")


def _usual_loss(learner: Learner) -> bool:
    """Whether labels are classes by their numbers: neither learner nor problem has its own loss."""
    kind, problem = type(learner), type(learner.problem)
    own = any(getattr(kind, name) is not getattr(Learner, name) for name in ("inner", "outer", "all_data"))
    return not own and problem.inner is Supervised.inner and problem.outer is Problem.outer


def _key(batch: Batch) -> Hashable:
    x = batch.support[0]
    return ("rows", x.shape[2:], x.is_floating_point())
