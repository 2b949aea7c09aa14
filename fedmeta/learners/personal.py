"""Learners that keep a personal part at the site between rounds; it is no part of what a site sends.

ditto:  the site's own model v, pulled to theta; theta by fedavg (Li, Hu, Beirami and Smith, ICML 2021, algorithm 1)
fedrep: the head h, trained before the body in each round (Collins et al., ICML 2021, algorithm 1)
fedper: the head h, trained together with the body (Arivazhagan et al. 2019, algorithms 1 and 2)

In training a site goes through mini-batches of all its train rows, as under fedavg; on an own problem it takes K
full-batch steps on all its data. A site without a personal part, as every new site, fits one on its support rows, from
theta. The global model, which such a site has before it adapts, is theta; under fedrep and fedper its head is the
untrained one of the start.
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
from fedmeta.learners.learner import DEFAULTS, MetaState, Metrics
from fedmeta.learners.local_epochs import LocalEpochs
from fedmeta.learners.local_steps import descend, minibatches_of
from fedmeta.minibatches import Minibatches
from fedmeta.models import Parameters
from fedmeta.problems.problem import Data
from fedmeta.problems.solvers import run_solver
from fedmeta.task import Task


@dataclass(frozen=True)
class PersonalLearner(LocalEpochs):
    """A learner whose sites keep a personal part."""

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
    """Ditto: theta - theta_i as fedavg; as many personal steps, pulled to the theta that arrived.

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
        fedavg = FedAvgFinetuned(self.problem, self.inner_steps, self.inner_lr, self.local_epochs, self.batch_size)
        theta_i = fedavg.local_model(meta_state, task)
        pull = partial(proximal, anchor=self.theta(meta_state), weight=self.lam)
        own = descend(self, personal, task, self.rates(meta_state, 0), pull)
        return displacement(meta_state, theta_i), {"query_loss": self.outer(own, task.query)}, own


@dataclass(frozen=True)
class FedRep(PersonalLearner):
    """FedRep: E epochs of the head on theta's body, then `body_steps` of the body; sends the body's displacement.

    Attributes:
        head: The layer that stays at the site, by its name; empty for the last one with parameters.
        body_steps: How often the body then goes through all the site's rows (on an own problem, its full-batch steps).
    """

    head: str = DEFAULTS.head
    body_steps: int = DEFAULTS.body_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problem.layer(self.head)

    @property
    def minibatches(self) -> Minibatches | None:
        """E epochs for the head, and then those for the body."""
        return minibatches_of(self.problem, self.batch_size, self.local_epochs + self.body_steps)

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

    def rates_of(self, names: tuple[str, ...]) -> Mapping[str, Tensor | float]:
        """Returns inner_lr for each of the parameters."""
        return dict.fromkeys(names, self.inner_lr)

    def personal_adaptation_path(
        self, meta_state: MetaState, data: Objective, steps: int, personal: Parameters
    ) -> list[Parameters]:
        """Returns theta's body with the head after 0, 1, ... `steps` steps."""
        start, rates = {**self.theta(meta_state), **personal}, self.rates_of(self.head_names)
        return run_solver(self.problem, lambda own, _: data(own), start, None, lambda _: rates, steps)

    def local_model(self, meta_state: MetaState, task: Task, personal: Parameters) -> Parameters:
        """Returns the site's model after its head's epochs and then its body's."""
        start, epochs = {**self.theta(meta_state), **personal}, self.local_epochs
        own = descend(self, start, task, self.rates_of(self.head_names), epochs=slice(epochs))
        rates = self.rates_of(self.body_names)
        return descend(self, own, task, rates, epochs=slice(epochs, None), steps=self.body_steps)

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns the body's displacement (zeros for the head), the query loss of the site's model, and its head."""
        own = self.local_model(meta_state, task, personal)
        body = {name: own[name] for name in self.body_names}
        head = {name: own[name] for name in self.head_names}
        return displacement(meta_state, body), {"query_loss": self.outer(own, task.query)}, head


@dataclass(frozen=True)
class FedPer(FedRep):
    """FedPer: E epochs of body and head together; sends the body's displacement (`body_steps` is unused)."""

    @property
    def minibatches(self) -> Minibatches | None:
        """E epochs over all the site's rows."""
        return minibatches_of(self.problem, self.batch_size, self.local_epochs)

    def local_model(self, meta_state: MetaState, task: Task, personal: Parameters) -> Parameters:
        """Returns the site's model after E epochs of all its parameters, from theta's body and its own head."""
        return descend(self, {**self.theta(meta_state), **personal}, task, self.rates_of(self.problem.trained))
