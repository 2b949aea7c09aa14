"""Federated averaging (McMahan et al., AISTATS 2017), with and without fine-tuning, and the local baseline.

In training a site takes K full-batch steps from theta on all the rows of its task, support and query alike (nothing
here needs a split), and sends its displacement theta - theta_i. A server step of sgd with lr = 1 is then the weighted
average of the sites' models; any other server optimizer makes it FedOpt (Reddi et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.learner import Learner, MetaState, Metrics, with_theta, zeros_like
from fedmeta.learners.loss import concatenate
from fedmeta.task import Rows, Task, rows_mask


@dataclass(frozen=True)
class FedAvgFinetuned(Learner):
    """FedAvg whose sites take K steps on their support rows at evaluation ("FedAvg(Meta)", Chen et al. 2018)."""

    sends: ClassVar[str] = "displacement"

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - theta_i after K local steps on all the task's rows, and the query loss at theta_i."""
        theta = self.theta(meta_state)
        own = self.trajectory(meta_state, all_rows(task), self.inner_steps)[-1]
        displacement = {name: value - own[name] for name, value in theta.items()}
        return with_theta(meta_state, displacement), {"query_loss": self.loss(own, task.query)}


@dataclass(frozen=True)
class FedAvg(FedAvgFinetuned):
    """FedAvg: every site is served by the global model itself."""

    adapts: ClassVar[bool] = False


@dataclass(frozen=True)
class Local(Learner):
    """No federation: a site trains from a fixed random start on its own support rows, and sends nothing."""

    sends: ClassVar[str] = "nothing"

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns zeros, and the query loss after K steps on support."""
        return zeros_like(meta_state), {"query_loss": self.loss(self.adapt(meta_state, task.support), task.query)}


def all_rows(task: Task) -> Rows:
    """Returns a task's support and query rows as one (x, y, mask)."""
    support, query = ((rows[0], rows[1], rows_mask(rows)) for rows in task)
    return concatenate(support, query)
