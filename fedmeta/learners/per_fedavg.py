"""Per-FedAvg (Fallah, Mokhtari and Ozdaglar, NeurIPS 2020): federated averaging of one-step MAML.

A site takes tau local meta-steps from w = theta and sends theta - w (algorithm 1):
w <- w - beta * g,   g = (I - alpha * d2 L_S(w)) d L_Q(w - alpha * d L_S(w))
with S and Q two mini-batches of the site's rows, others in each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from fedmeta import experiment
from fedmeta.errors import FedmetaError, nearest
from fedmeta.learners.fedavg import displacement
from fedmeta.learners.inner import add_scaled, inner_product
from fedmeta.learners.learner import DEFAULTS, Learner, MetaState, Metrics, by, check_counts
from fedmeta.learners.local_steps import in_batches, row_batches, where
from fedmeta.minibatches import Minibatches
from fedmeta.models import Parameters
from fedmeta.noise import at_step
from fedmeta.task import OrderedTask, Task

HESSIANS: tuple[str, ...] = get_args(experiment.Hessian)


@dataclass(frozen=True)
class PerFedAvg(Learner):
    """Sends the displacement of tau local meta-steps; at evaluation a site takes one step (`inner_steps` is unused).

    A local step adapts on one mini-batch and is scored by another, of `batch_size` rows each or half of what an epoch
    has left; the Hessian is that of the first (the paper draws a third). A task that comes without an order of its
    rows, and that of an own problem, is used as it is in each local step: adapt on support, score on query.

    Attributes:
        local_steps: tau, the number of local meta-steps.
        local_lr: beta, their rate; alpha is `inner_lr`.
        hessian: "exact"; "free" for the central difference of two support gradients (section 5, Per-FedAvg (HF));
            "first-order" without it (Per-FedAvg (FO)).
        batch_size: The rows of each of a local step's two mini-batches; 0 for half of all rows.
    """

    local_steps: int = DEFAULTS.local_steps
    local_lr: float = DEFAULTS.local_lr
    hessian: str = DEFAULTS.hessian
    batch_size: int = DEFAULTS.batch_size

    update: ClassVar[str] = "delta"
    differentiates: ClassVar[str] = "by proximal steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, batch_size=0)
        if self.hessian not in HESSIANS:
            raise FedmetaError(
                f'learner.hessian = "{self.hessian}": no such form{nearest(self.hessian, HESSIANS)} '
                f"(known: {', '.join(HESSIANS)})"
            )

    @property
    def minibatches(self) -> Minibatches | None:
        """Tau pairs of mini-batches of all the site's rows; None on an own problem."""
        if not in_batches(self.problem):
            return None
        return Minibatches(2 * self.batch_size, steps=self.local_steps, halved=True)

    def evaluation_steps(self, steps: int | None = None) -> int:
        """Returns `steps`, or the one step that the start is trained for."""
        return 1 if steps is None else steps

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - w after the local meta-steps, and the query loss after the first one's inner step."""
        theta = self.theta(meta_state)
        own = {name: theta[name] for name in self.problem.trained}
        fixed = {name: value for name, value in theta.items() if name not in own}
        loss, seen = torch.zeros((), dtype=next(iter(own.values())).dtype), torch.tensor(False)
        for part, there in self._parts(task):
            gradient, query_loss = self.local_gradient(own, fixed, part)
            own = where(there, add_scaled(own, -self.local_lr, gradient), own)
            loss, seen = torch.where(there & ~seen, query_loss, loss), seen | there
        return displacement(meta_state, own), {"query_loss": loss}

    def _parts(self, task: Task) -> Iterator[tuple[Task, Tensor]]:
        """Yields what each local step adapts on and is scored by, and whether there is anything."""
        if not isinstance(task, OrderedTask):
            for step in range(self.local_steps):
                with at_step(step):
                    yield task, torch.tensor(True)
            return
        for (x, y, mask), there in row_batches(task, task.order):
            first = (mask.cumsum(0) <= mask.sum() // 2).to(mask)
            yield Task((x, y, mask * first), (x, y, mask * (1 - first))), there

    def local_gradient(self, w: Parameters, fixed: Parameters, task: Task) -> tuple[Parameters, Tensor]:
        """Returns g, the gradient of the one-step query loss at w, and that loss.

        Args:
            w: The trained parameters.
            fixed: The frozen ones.
            task: The site's task.
        """

        def query_loss(own: Parameters) -> Tensor:
            return self.outer({**fixed, **own}, task.query)

        def support_gradient(own: Parameters) -> Parameters:
            inner, moving = by(lambda p: self.inner({**fixed, **p}, task.support), own, self.problem.moved)
            found = grad(inner)(moving)
            return {name: found[name] if name in found else torch.zeros_like(value) for name, value in own.items()}

        def after_one_step(own: Parameters) -> Tensor:
            return query_loss(add_scaled(own, -self.inner_lr, support_gradient(own)))

        if self.hessian == "exact":
            return grad_and_value(after_one_step)(w)
        adapted = add_scaled(w, -self.inner_lr, support_gradient(w))
        gradient, value = grad_and_value(query_loss)(adapted)
        if self.hessian == "free":
            # The step that balances truncation and rounding, along the gradient's direction.
            length = inner_product(gradient, gradient).sqrt().clamp(min=1e-12)
            delta = torch.finfo(length.dtype).eps ** (1 / 3) / length
            ahead, behind = (support_gradient(add_scaled(w, side * delta, gradient)) for side in (1, -1))
            curvature = {name: (value - behind[name]) / (2 * delta) for name, value in ahead.items()}
            gradient = add_scaled(gradient, -self.inner_lr, curvature)
        return gradient, value
