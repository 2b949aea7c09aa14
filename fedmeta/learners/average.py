"""The average of the sites' own solutions: what a federation gets in one round, without learning to adapt.

Every site descends its own objective from the same start until it has settled, and the server averages the solutions.
It is the plain rival of a learned start: where sites have much in common it serves as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmeta.learners.fedavg import displacement
from fedmeta.learners.learner import DEFAULTS, Learner, MetaState, Metrics
from fedmeta.problems.solvers import DIFFERENTIABLE, run_solver
from fedmeta.task import Task


@dataclass(frozen=True)
class Average(Learner):
    """One round: theta = mean of phi_i, where phi_i is site i's own solution from the run's start on all its data.

    The server's default, sgd with lr = 1, makes theta - mean (theta - phi_i) of what sites send.

    Attributes:
        solve_steps: The steps of the problem's solver to a site's own solution; at least `inner_steps`.
    """

    solve_steps: int = DEFAULTS.solve_steps

    update: ClassVar[str] = "delta"
    differentiates: ClassVar[str] = ""

    def solution(self, meta_state: MetaState, task: Task) -> dict[str, Tensor]:
        """Returns phi_i: the solver's result on all the task's data; shared parameters stay at the start."""
        problem, theta = self.problem, self.theta(meta_state)
        rates = dict.fromkeys(problem.moved, self.inner_lr)
        steps = self.solve_steps if problem.solver.kind == DIFFERENTIABLE else self.inner_steps
        return run_solver(
            problem, lambda own, _: self.all_data(own, task), theta, task.support, lambda _: rates, steps
        )[-1]

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns theta - phi_i, and the query loss at phi_i."""
        own = self.solution(meta_state, task)
        return displacement(meta_state, own), {"query_loss": self.outer(own, task.query)}
