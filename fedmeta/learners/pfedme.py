"""pFedMe (Dinh, Tran and Nguyen, NeurIPS 2020): federated descent on the Moreau envelopes of the sites' losses.

F_i(w) = min over phi of L_i(phi) + lam / 2 * |phi - w|^2;   d F_i(w) / d w = lam * (w - phi_i(w))
A site takes R local steps w <- w - eta * lam * (w - phi_i(w)) from theta (algorithm 1) and sends theta - w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.fedavg import all_rows, displacement
from fedmeta.learners.imaml import ProximalLearner
from fedmeta.learners.learner import MetaState, Metrics
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

    local_steps: int = 5
    local_lr: float = 0.3

    sends: ClassVar[str] = "displacement"

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - w after the local steps, and the query loss of the last proximal solution."""
        rows, w = all_rows(task), self.theta(meta_state)
        phi = w
        for _ in range(self.local_steps):
            phi = self.solve(w, meta_state, rows, self.inner_steps)[-1]
            w = {name: value - self.local_lr * self.lam * (value - phi[name]) for name, value in w.items()}
        return displacement(meta_state, w), {"query_loss": self.loss(phi, task.query)}
