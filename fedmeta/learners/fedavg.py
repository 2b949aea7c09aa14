"""Federated averaging (McMahan et al., AISTATS 2017), its relatives that send a displacement, and the local baseline.

In training a site descends from theta over mini-batches of all its train rows, `local_epochs` times through them
(algorithm 1, ClientUpdate; nothing here needs a split), and sends its displacement theta - theta_i. A server step of
sgd with lr = 1 is then the average of the sites' models, weighted by their rows; any other server optimizer makes it
FedOpt (Reddi et al. 2021). On an own problem, which has no rows, a site takes K full-batch steps on all its data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.gradient_kind import gradient_kind
from fedmeta.learners.inner import Objective, proximal
from fedmeta.learners.learner import (
    DEFAULTS,
    Learner,
    MetaState,
    Metrics,
    key_of,
    trained,
    with_theta,
    zeros_like,
)
from fedmeta.learners.local_epochs import LocalEpochs
from fedmeta.learners.local_steps import descend
from fedmeta.models import Parameters
from fedmeta.problems.solvers import BLACK_BOX
from fedmeta.task import Task


@dataclass(frozen=True)
class FedAvgFinetuned(LocalEpochs):
    """FedAvg whose sites take K steps on their support rows at evaluation ("FedAvg(Meta)", Chen et al. 2018)."""

    differentiates: ClassVar[str] = ""

    def local_objective(self, objective: Objective, theta: Parameters) -> Objective:
        """Returns what a local step descends, from the loss on its rows: the loss, with the pull to theta."""
        return proximal(objective, theta, self.pull) if self.pull else objective

    def local_model(self, meta_state: MetaState, task: Task) -> Parameters:
        """Returns theta_i, what the site's local steps make of theta; shared parameters move too."""
        theta, problem = self.theta(meta_state), self.problem
        moving = problem.moved if problem.solver.kind == BLACK_BOX else problem.trained
        rates = dict.fromkeys(moving, self.inner_lr)
        return descend(self, theta, task, rates, partial(self.local_objective, theta=theta))

    @gradient_kind("delta")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - theta_i after the local steps, and the query loss at theta_i."""
        own = self.local_model(meta_state, task)
        return displacement(meta_state, own), {"query_loss": self.outer(own, task.query)}


@dataclass(frozen=True)
class Reptile(FedAvgFinetuned):
    """Reptile (Nichol, Achiam and Schulman 2018, algorithm 2): the server steps along theta - phi_i.

    With mini-batches of all of a site's rows this is what fedavg sends, and its own at evaluation; what sets it apart
    is the server's optimizer (the paper: sgd with lr below 1, or adam).
    """


@dataclass(frozen=True)
class FedProx(FedAvgFinetuned):
    """FedProx (Li et al., MLSys 2020): local training is pulled back to theta; adaptation at evaluation is not.

    Attributes:
        mu: The weight of mu / 2 * |theta_i - theta|^2 in the local objective (equation 2).
    """

    mu: float = DEFAULTS.mu

    @property
    def pull(self) -> float:
        """The weight of 1 / 2 * |theta_i - theta|^2 in what a local step descends: mu."""
        return self.mu


@dataclass(frozen=True)
class FedAvg(FedAvgFinetuned):
    """FedAvg: every site is served by the global model itself."""

    adapts: ClassVar[bool] = False


@dataclass(frozen=True)
class Local(Learner):
    """No federation: a site trains from a fixed random start on its own support rows, and sends nothing."""

    differentiates: ClassVar[str] = ""

    update: ClassVar[str] = "nothing"

    @gradient_kind("nothing")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns zeros, and the query loss after K steps on support."""
        return zeros_like(meta_state), {"query_loss": self.outer(self.adapt(meta_state, task.support), task.query)}


def displacement(meta_state: MetaState, own: Parameters) -> dict[str, Tensor]:
    """Returns theta - own for the parameters in `own`, and zeros for the meta-state's other keys."""
    start = trained(meta_state)
    moved = {name: start[key_of(start, name)] - value for name, value in own.items() if key_of(start, name) in start}
    return with_theta(meta_state, moved)
