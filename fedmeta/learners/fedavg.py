"""Federated averaging (McMahan et al., AISTATS 2017), its relatives that send a displacement, and the local baseline.

In training a site takes K full-batch steps from theta on all the rows of its task, support and query alike (nothing
here needs a split), and sends its displacement theta - theta_i. A server step of sgd with lr = 1 is then the weighted
average of the sites' models; any other server optimizer makes it FedOpt (Reddi et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.gradient_kind import gradient_kind
from fedmeta.learners.inner import Objective, inner_loop, proximal
from fedmeta.learners.learner import THETA, Learner, MetaState, Metrics, with_theta, zeros_like
from fedmeta.models import Parameters
from fedmeta.problems.rows import concatenate
from fedmeta.task import Rows, Task, rows_mask


@dataclass(frozen=True)
class FedAvgFinetuned(Learner):
    """FedAvg whose sites take K steps on their support rows at evaluation ("FedAvg(Meta)", Chen et al. 2018)."""

    sends: ClassVar[str] = "displacement"

    def local_objective(self, theta: Parameters, rows: Rows) -> Objective:
        """Returns what a site descends in training, from theta: its mean loss on these rows."""
        return partial(self.loss, rows=rows)

    def local_model(self, meta_state: MetaState, task: Task) -> Parameters:
        """Returns theta_i: K steps from theta on all the task's rows."""
        theta = self.theta(meta_state)
        objective = self.local_objective(theta, all_rows(task))
        return inner_loop(objective, theta, partial(self.rates, meta_state), self.inner_steps)[-1]

    @gradient_kind("displacement")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - theta_i after K local steps on all the task's rows, and the query loss at theta_i."""
        own = self.local_model(meta_state, task)
        return displacement(meta_state, own), {"query_loss": self.loss(own, task.query)}


@dataclass(frozen=True)
class Reptile(FedAvgFinetuned):
    """Reptile (Nichol, Achiam and Schulman 2018, algorithm 2): the server steps along theta - phi_i.

    With every row of a task in each of its K steps this is what fedavg sends, and its own at evaluation; what sets it
    apart is the server's optimizer (the paper: sgd with lr below 1, or adam).
    """


@dataclass(frozen=True)
class FedProx(FedAvgFinetuned):
    """FedProx (Li et al., MLSys 2020): local training is pulled back to theta; adaptation at evaluation is not.

    Attributes:
        mu: The weight of mu / 2 * |theta_i - theta|^2 in the local objective (equation 2).
    """

    mu: float = 0.1

    def local_objective(self, theta: Parameters, rows: Rows) -> Objective:
        """Returns the mean loss on these rows plus mu / 2 * |theta_i - theta|^2."""
        return proximal(super().local_objective(theta, rows), theta, self.mu)


@dataclass(frozen=True)
class FedAvg(FedAvgFinetuned):
    """FedAvg: every site is served by the global model itself."""

    adapts: ClassVar[bool] = False


@dataclass(frozen=True)
class Local(Learner):
    """No federation: a site trains from a fixed random start on its own support rows, and sends nothing."""

    sends: ClassVar[str] = "nothing"

    @gradient_kind("nothing")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns zeros, and the query loss after K steps on support."""
        return zeros_like(meta_state), {"query_loss": self.loss(self.adapt(meta_state, task.support), task.query)}


def displacement(meta_state: MetaState, own: Parameters) -> dict[str, Tensor]:
    """Returns theta - own for the parameters in `own`, and zeros for the meta-state's other keys."""
    return with_theta(meta_state, {name: meta_state[THETA + name] - value for name, value in own.items()})


def all_rows(task: Task) -> Rows:
    """Returns a task's support and query rows as one (x, y, mask)."""
    support, query = ((rows[0], rows[1], rows_mask(rows)) for rows in task)
    return concatenate(support, query)
