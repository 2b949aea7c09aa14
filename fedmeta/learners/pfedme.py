"""pFedMe (Dinh, Tran and Nguyen, NeurIPS 2020): federated descent on the Moreau envelopes of the sites' losses.

F_i(w) = min over phi of L_i(phi) + lam / 2 * |phi - w|^2;   d F_i(w) / d w = lam * (w - phi_i(w))
A site takes R local steps w <- w - eta * lam * (w - phi_i(w)) from theta, each on the loss L_i of a mini-batch of its
rows (algorithm 1), and sends theta - w.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.fedavg import displacement
from fedmeta.learners.imaml import ProximalLearner
from fedmeta.learners.inner import Objective
from fedmeta.learners.learner import DEFAULTS, MetaState, Metrics, check_counts
from fedmeta.learners.local_steps import in_batches, order_of, row_batches, where
from fedmeta.minibatches import Minibatches
from fedmeta.models import Parameters
from fedmeta.noise import at_step
from fedmeta.task import Task


@dataclass(frozen=True)
class PFedMe(ProximalLearner):
    """Sends the displacement of R local steps on the Moreau envelopes of mini-batches of all the site's rows.

    Each proximal problem is solved by `inner_steps` steps of rate `inner_lr` from its own w. A site's model is the
    solution around theta on its support rows.

    Attributes:
        local_steps: R, the number of local steps.
        local_lr: eta, their rate.
        batch_size: |D|, the rows of a local step, and of all steps that solve its proximal problem; 0 for all.
    """

    local_steps: int = DEFAULTS.local_steps
    local_lr: float = DEFAULTS.local_lr
    batch_size: int = DEFAULTS.batch_size

    update: ClassVar[str] = "delta"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, batch_size=0)

    @property
    def minibatches(self) -> Minibatches | None:
        """R mini-batches of all the site's rows; None on an own problem."""
        return Minibatches(self.batch_size, steps=self.local_steps) if in_batches(self.problem) else None

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - w after the local steps, and the query loss of the last proximal solution."""
        w = phi = self.theta(meta_state)
        if self.minibatches is None:
            for step in range(self.local_steps):
                with at_step(step):
                    phi, w = self._local_step(meta_state, w, partial(self.all_data, task=task))
        else:
            for rows, there in row_batches(task, order_of(task, self.minibatches)):
                solved, after = self._local_step(meta_state, w, partial(self.inner, data=rows))
                phi, w = where(there, solved, phi), where(there, after, w)
        return displacement(meta_state, w), {"query_loss": self.outer(phi, task.query)}

    def _local_step(self, meta_state: MetaState, w: Parameters, objective: Objective) -> tuple[Parameters, Parameters]:
        """Returns the proximal solution around w, and w after a step to it."""
        phi = self.proximal_path(w, meta_state, objective, self.inner_steps)[-1]
        moved = {name: w[name] - self.local_lr * self.lam * (w[name] - phi[name]) for name in self.problem.moved}
        return phi, {**w, **moved}
