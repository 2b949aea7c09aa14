"""Learners that keep a personal part at the site between rounds; it is no part of what a site sends.

ditto:  the site's own model v, pulled to theta; theta by fedavg (Li, Hu, Beirami and Smith, ICML 2021, algorithm 1)
fedrep: the head h, trained before the body in each round (Collins et al., ICML 2021, algorithm 1)
fedper: the head h, trained together with the body (Arivazhagan et al. 2019, algorithms 1 and 2)

A site without a personal part, as every new site, fits one on its support rows, from theta. The global model, which
such a site has before it adapts, is theta; under fedrep and fedper its head is the untrained one of the start.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.fedavg import FedAvgFinetuned, displacement
from fedmeta.learners.inner import Objective, proximal
from fedmeta.learners.learner import DEFAULTS, Learner, MetaState, Metrics
from fedmeta.models import Parameters
from fedmeta.problems.problem import Data
from fedmeta.problems.solvers import run_solver
from fedmeta.task import Task


@dataclass(frozen=True)
class PersonalLearner(Learner):
    """A learner whose sites keep a personal part."""

    update: ClassVar[str] = "delta"
    differentiates: ClassVar[str] = "by proximal steps"

    @abstractmethod
    def personal_adaptation_path(
        self, meta_state: MetaState, data: Objective, steps: int, personal: Parameters
    ) -> list[Parameters]:
        """Returns the site's whole model after 0, 1, ... `steps` steps of its personal part on an objective."""

    @abstractmethod
    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns the global part's displacement, the query loss of the site's model, and its personal part."""

    def adaptation_path(
        self, meta_state: MetaState, support: Data, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns theta, and the site's model after 1, ... `steps` steps of its personal part on support."""
        start = self.personal(meta_state) if personal is None else personal
        return [
            self.theta(meta_state),
            *self.personal_adaptation_path(meta_state, partial(self.inner, data=support), steps, start)[1:],
        ]

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns what a site sends in its first round."""
        gradient, metrics, _ = self.train(meta_state, task, self.personal(meta_state))
        return gradient, metrics


@dataclass(frozen=True)
class Ditto(PersonalLearner):
    """Ditto: theta - theta_i as fedavg; K personal steps on all the task's data, pulled to the theta that arrived.

    Attributes:
        lam: lambda, the weight of lam / 2 * |v - theta|^2 in the personal objective.
    """

    lam: float = DEFAULTS.lam

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns theta: the site's own model at its start."""
        return self.theta(meta_state)

    def personal_adaptation_path(
        self, meta_state: MetaState, data: Objective, steps: int, personal: Parameters
    ) -> list[Parameters]:
        """Returns v after 0, 1, ... `steps` steps on the pulled objective."""
        pulled = proximal(data, self.theta(meta_state), self.lam)
        rates = partial(self.rates, meta_state)
        return run_solver(self.problem, lambda own, _: pulled(own), personal, None, rates, steps)

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns fedavg's displacement, the query loss of v, and v."""
        fedavg = FedAvgFinetuned(self.problem, self.inner_steps, self.inner_lr)
        theta_i = fedavg.local_model(meta_state, task)
        own = self.personal_adaptation_path(meta_state, partial(self.all_data, task=task), self.inner_steps, personal)[
            -1
        ]
        return displacement(meta_state, theta_i), {"query_loss": self.outer(own, task.query)}, own


@dataclass(frozen=True)
class FedRep(PersonalLearner):
    """FedRep: K steps of the head on theta's body, then `body_steps` of the body; sends the body's displacement.

    Attributes:
        head: The layer that stays at the site, by its name; empty for the last one with parameters.
        body_steps: The number of steps of the body in each round.
    """

    head: str = DEFAULTS.head
    body_steps: int = DEFAULTS.body_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problem.layer(self.head)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The parameters that stay at the site."""
        return self.problem.layer(self.head)

    @property
    def body_names(self) -> tuple[str, ...]:
        """The parameters that the federation shares; none where the model is all head."""
        return tuple(name for name in self.problem.trained if name not in self.head_names)

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns theta's head."""
        theta = self.theta(meta_state)
        return {name: theta[name] for name in self.head_names}

    def descend(self, start: Parameters, data: Objective, names: tuple[str, ...], steps: int) -> list[Parameters]:
        """Returns the path of `steps` steps of the parameters `names` on an objective."""
        rates: Mapping[str, Tensor | float] = dict.fromkeys(names, self.inner_lr)
        return run_solver(self.problem, lambda own, _: data(own), start, None, lambda _: rates, steps)

    def personal_adaptation_path(
        self, meta_state: MetaState, data: Objective, steps: int, personal: Parameters
    ) -> list[Parameters]:
        """Returns theta's body with the head after 0, 1, ... `steps` steps."""
        return self.descend({**self.theta(meta_state), **personal}, data, self.head_names, steps)

    def local_model(self, meta_state: MetaState, data: Objective, personal: Parameters) -> Parameters:
        """Returns the site's model after its head's steps and then its body's."""
        own = self.personal_adaptation_path(meta_state, data, self.inner_steps, personal)[-1]
        return self.descend(own, data, self.body_names, self.body_steps)[-1]

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns the body's displacement (zeros for the head), the query loss of the site's model, and its head."""
        own = self.local_model(meta_state, partial(self.all_data, task=task), personal)
        body = {name: own[name] for name in self.body_names}
        head = {name: own[name] for name in self.head_names}
        return displacement(meta_state, body), {"query_loss": self.outer(own, task.query)}, head


@dataclass(frozen=True)
class FedPer(FedRep):
    """FedPer: K steps of body and head together; sends the body's displacement (`body_steps` is unused)."""

    def local_model(self, meta_state: MetaState, data: Objective, personal: Parameters) -> Parameters:
        """Returns the site's model after K steps of all its parameters, from theta's body and its own head."""
        start = {**self.theta(meta_state), **personal}
        return self.descend(start, data, self.problem.trained, self.inner_steps)[-1]
