"""SCAFFOLD (Karimireddy et al., ICML 2020): local steps corrected for how a site's gradients differ from the mean's.

y <- y - eta * (d L_B(y) - c_i + c), K local steps from y = theta (algorithm 1, step 10)
c_i+ = c_i - c + (theta - y) / (K * eta)  (step 12, option II: the mean of the gradients on the way)
A site sends theta - y and c_i - c_i+. The server averages: c is the mean of c_i over all training sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.learners.fedavg import displacement
from fedmeta.learners.inner import Objective, inner_product
from fedmeta.learners.learner import MetaState, Metrics
from fedmeta.learners.local_epochs import LocalEpochs
from fedmeta.learners.local_steps import count_steps, descend
from fedmeta.models import Parameters
from fedmeta.problems.solvers import descent
from fedmeta.task import Task

CONTROL = "control."
"""The prefix of the server's control variate c in the meta-state."""


@dataclass(frozen=True)
class Scaffold(LocalEpochs):
    """Sends the displacement of E corrected epochs and the change of the site's control variate, which stays."""

    differentiates: ClassVar[str] = ""
    averaged: ClassVar[str] = CONTROL

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem.solver != descent:
            raise FedmetaError(
                f"learner Scaffold corrects plain gradient steps, and the solver {type(self.problem.solver).__name__} "
                "takes others: take fedavg-ft"
            )

    def init(self, seed: int) -> dict[str, Tensor]:
        """Returns theta, and c = 0 for each trained parameter."""
        state = super().init(seed)
        start = self.theta(state)
        return {**state, **{CONTROL + name: torch.zeros_like(start[name]) for name in self.problem.trained}}

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns c_i = 0, with which every site begins."""
        theta = self.theta(meta_state)
        return {name: torch.zeros_like(theta[name]) for name in self.problem.trained}

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns theta - y and c_i - c_i+, the query loss at y, and c_i+; a site that took no step keeps its c_i."""
        theta = self.theta(meta_state)
        drift = {name: meta_state[CONTROL + name] - own for name, own in personal.items()}

        def corrected(objective: Objective) -> Objective:
            return lambda own: objective(own) + inner_product(drift, own)

        y = descend(self, theta, task, dict.fromkeys(personal, self.inner_lr), corrected)
        steps = count_steps(self, task)
        change = {}
        for name in personal:
            moved = theta[name] - y[name]
            mean = moved / (self.inner_lr * steps.clamp(min=1).to(moved.dtype))
            change[name] = torch.where(steps > 0, mean - meta_state[CONTROL + name], 0.0)
        sent = displacement(meta_state, y) | {CONTROL + name: -value for name, value in change.items()}
        kept = {name: own + change[name] for name, own in personal.items()}
        return sent, {"query_loss": self.outer(y, task.query)}, kept

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns what a site sends in its first round."""
        gradient, metrics, _ = self.train(meta_state, task, self.personal(meta_state))
        return gradient, metrics
