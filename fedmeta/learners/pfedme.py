"""pFedMe (Dinh, Tran and Nguyen, NeurIPS 2020): federated descent on the Moreau envelopes of the sites' losses.

F_i(w) = min over phi of L_i(phi) + lam / 2 * |phi - w|^2;   d F_i(w) / d w = lam * (w - phi_i(w))
A site takes R local steps w <- w - eta * lam * (w - phi_i(w)) from theta (algorithm 1) and sends theta - w.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.fedavg import displacement
from fedmeta.learners.imaml import ProximalLearner
from fedmeta.learners.learner import DEFAULTS, MetaState, Metrics
from fedmeta.noise import at_step
from fedmeta.task import Task


@dataclass(frozen=True)
class PFedMe(ProximalLearner):
    """Sends the displacement of R local steps on the Moreau envelope of all the task's rows.

    Each proximal problem is solved by `inner_steps` steps of rate `inner_lr` from its own w. A site's model is the
    solution around theta on its support rows.

    Attributes:
        local_steps: R, the number of local steps.
        local_lr: eta, their rate.
    """

    local_steps: int = DEFAULTS.local_steps
    local_lr: float = DEFAULTS.local_lr

    update: ClassVar[str] = "delta"

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - w after the local steps, and the query loss of the last proximal solution."""
        w = phi = self.theta(meta_state)
        for step in range(self.local_steps):
            with at_step(step):
                phi = self.proximal_path(w, meta_state, partial(self.all_data, task=task), self.inner_steps)[-1]
            moved = {name: w[name] - self.local_lr * self.lam * (w[name] - phi[name]) for name in self.problem.moved}
            w = {**w, **moved}
        return displacement(meta_state, w), {"query_loss": self.outer(phi, task.query)}
