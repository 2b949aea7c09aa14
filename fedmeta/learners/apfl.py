"""APFL, adaptive personalized federated learning (Deng, Kamani and Mahdavi 2020): a mixture of two models.

w <- w - eta * d L_B(w);   v <- v - eta * d L_B(a v + (1 - a) w) / d v   over the same mini-batches (algorithm 1)
a <- a - eta * <v - w, d L_B at a v + (1 - a) w>, once a round at its first step, within [0, 1] (equation 10)
A site sends theta - w, as fedavg. Its model is a v + (1 - a) theta; v and a stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad

from fedmeta.errors import FedmetaError
from fedmeta.learners.fedavg import displacement
from fedmeta.learners.inner import Objective
from fedmeta.learners.learner import DEFAULTS, MetaState, Metrics
from fedmeta.learners.local_steps import order_of, row_batches, where
from fedmeta.learners.personal import PersonalLearner
from fedmeta.models import Parameters
from fedmeta.noise import at_step
from fedmeta.problems.solvers import descent, run_solver
from fedmeta.task import Task

MIXTURE = "mixture"
"""The key of a in a site's personal part, beside v's parameters under "own.NAME"."""

OWN, SHARED = "own.", "shared."


@dataclass(frozen=True)
class Apfl(PersonalLearner):
    """Sends fedavg's displacement; a site's own model and the share at which it counts stay.

    Attributes:
        mixture: a at the start, and at a site that took part in no round: the share of the site's own model.
    """

    mixture: float = DEFAULTS.mixture

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mixture <= 1:
            raise FedmetaError(f"learner.mixture = {self.mixture}: it must be above 0 and at most 1")
        if self.problem.solver != descent:
            raise FedmetaError(
                f"learner Apfl takes plain gradient steps of two models, and the solver "
                f"{type(self.problem.solver).__name__} takes others: take ditto"
            )

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns v = theta, and a."""
        theta = self.theta(meta_state)
        moving = {OWN + name: theta[name] for name in self.problem.trained}
        return {**moving, MIXTURE: next(iter(moving.values())).new_tensor(self.mixture)}

    def mixed(self, share: Tensor, own: Parameters, other: Parameters) -> Parameters:
        """Returns a v + (1 - a) w for the trained parameters, and w's for the rest."""
        return {**other, **{name: share * own[name] + (1 - share) * other[name] for name in self.problem.trained}}

    def personal_adaptation_path(
        self, meta_state: MetaState, data: Objective, steps: int, personal: Parameters
    ) -> list[Parameters]:
        """Returns the mixture with theta after 0, 1, ... `steps` steps of v on an objective; a stays."""
        theta, share = self.theta(meta_state), personal[MIXTURE]
        v = {**theta, **{name: personal[OWN + name] for name in self.problem.trained}}
        rates = dict.fromkeys(self.problem.trained, self.inner_lr)
        path = run_solver(
            self.problem, lambda own, _: data(self.mixed(share, own, theta)), v, None, lambda _: rates, steps
        )
        return [self.mixed(share, own, theta) for own in path]

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns theta - w, the query loss of the mixture, and v and a."""
        theta = self.theta(meta_state)
        both = dict(personal) | {SHARED + name: theta[name] for name in self.problem.trained}
        begun = torch.tensor(False)
        for objective, there in self._steps(task):
            slopes = grad(self._joint)(both, theta, objective)
            after = {name: value - self.inner_lr * slopes[name] for name, value in both.items()}
            after[MIXTURE] = torch.where(begun, both[MIXTURE], after[MIXTURE].clamp(0, 1))
            both, begun = where(there, after, both), begun | there
        w = {**theta, **{name: both[SHARED + name] for name in self.problem.trained}}
        kept = {name: both[name] for name in personal}
        own = self.mixed(kept[MIXTURE], {name: kept[OWN + name] for name in self.problem.trained}, w)
        return displacement(meta_state, w), {"query_loss": self.outer(own, task.query)}, kept

    def _joint(self, both: Parameters, theta: Parameters, objective: Objective) -> Tensor:
        """Returns L(w) + L(a v + (1 - a) w), whose second term does not move w: the slopes are those of algorithm 1."""
        w = {**theta, **{name: both[SHARED + name] for name in self.problem.trained}}
        fixed = {name: value.detach() for name, value in w.items()}
        own = {name: both[OWN + name] for name in self.problem.trained}
        return objective(w) + objective(self.mixed(both[MIXTURE], own, fixed))

    def _steps(self, task: Task) -> Iterator[tuple[Objective, Tensor]]:
        """Yields what each local step descends, and whether it has a row."""
        if self.minibatches is None:
            for step in range(self.inner_steps):
                with at_step(step):
                    yield partial(self.all_data, task=task), torch.tensor(True)
            return
        for rows, there in row_batches(task, order_of(task, self.minibatches)):
            yield partial(self.inner, data=rows), there
