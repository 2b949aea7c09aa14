"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019).

phi = argmin L_S(phi) + lam / 2 * |phi - theta|^2, by K steps of gradient descent from theta (equation 3)
d L_Q(phi) / d theta = (I + d2 L_S(phi) / lam)^-1 d L_Q(phi) / d phi (equation 6), with no graph through the steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp

from fedmeta.errors import FedmetaError
from fedmeta.learners.inner import Objective, add_scaled, inner_product, proximal
from fedmeta.learners.learner import DEFAULTS, Learner, MetaState, Metrics, by, with_theta
from fedmeta.models import Parameters
from fedmeta.problems.problem import Data
from fedmeta.problems.solvers import run_solver
from fedmeta.task import Task


@dataclass(frozen=True)
class ProximalLearner(Learner):
    """A learner whose inner loop solves the proximal problem, in training and at evaluation.

    Attributes:
        lam: lambda, the weight of lam / 2 * |phi - theta|^2 in the inner problem. Its descent is stable where
            `inner_lr` is below 2 / (lambda + the largest curvature of the support loss).
    """

    lam: float = DEFAULTS.lam

    differentiates: ClassVar[str] = "by proximal steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lam > 0:
            raise FedmetaError(f"learner.lam = {self.lam}: it must be greater than 0")

    def proximal_path(
        self, theta: Parameters, meta_state: MetaState, objective: Objective, steps: int
    ) -> list[Parameters]:
        """Returns the path of `steps` steps of the problem's solver on the proximal problem around theta."""
        pulled = proximal(objective, theta, self.lam)
        rates = partial(self.rates, meta_state)
        return run_solver(self.problem, lambda own, _: pulled(own), theta, None, rates, steps)

    def adaptation_path(
        self, meta_state: MetaState, support: Data, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns the parameters after 0, 1, ... `steps` steps on the proximal problem around theta."""
        return self.proximal_path(self.theta(meta_state), meta_state, partial(self.inner, data=support), steps)


@dataclass(frozen=True)
class Imaml(ProximalLearner):
    """Sends the implicit meta-gradient; exact where the inner and the linear problem are solved.

    Attributes:
        cg_steps: Conjugate-gradient iterations, each one Hessian-vector product.
    """

    cg_steps: int = DEFAULTS.cg_steps

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns (I + H / lam)^-1 times the query gradient at phi, and the query loss there."""
        phi = self.adaptation_path(meta_state, task.support, self.inner_steps)[-1]
        shared = tuple(self.problem.shared)
        query, own = by(partial(self.outer, data=task.query), phi, (*self.problem.moved, *shared))
        found, query_loss = grad_and_value(query)(own)
        query_gradient = {name: found[name] for name in self.problem.moved}
        # The Hessian is symmetric, so that the gradient's pullback multiplies by it; one graph serves all products.
        support, moving = by(partial(self.inner, data=task.support), phi, self.problem.moved)
        hessian_times = vjp(grad(support), moving)[1]

        def matrix_times(vector: Parameters) -> Parameters:
            return add_scaled(vector, 1 / self.lam, hessian_times(vector)[0])

        gradient = conjugate_gradients(matrix_times, query_gradient, self.cg_steps)
        if shared:
            # The solution depends on shared parameters too: d L_Q / d s - (d2 L_S / d s d phi) (H + lam)^-1 d L_Q / d
            # phi.
            def along(values: Parameters) -> Tensor:
                inner, at = by(partial(self.inner, data=task.support), {**phi, **values}, self.problem.moved)
                return inner_product(grad(inner)(at), gradient) / self.lam

            cross = grad(along)({name: phi[name] for name in shared})
            gradient |= {name: found[name] - cross[name] for name in shared}
        return with_theta(meta_state, gradient), {"query_loss": query_loss}


def conjugate_gradients(matrix_times: Callable[[Parameters], Parameters], target: Parameters, steps: int) -> Parameters:
    """Returns the solution of A x = target after `steps` iterations of conjugate gradients from zero.

    It stays where it is from the first direction without positive curvature on, and once the residual is zero
    (without branching, so that many sites can be solved at once).
    """
    solution = {name: torch.zeros_like(value) for name, value in target.items()}
    residual = direction = target
    square = inner_product(residual, residual)
    going = torch.ones_like(square)
    for _ in range(steps):
        product = matrix_times(direction)
        curvature = inner_product(direction, product)
        going = going * (curvature > 0)
        length = going * square / torch.where(going > 0, curvature, 1.0)
        solution = add_scaled(solution, length, direction)
        residual = add_scaled(residual, -length, product)
        square, previous = inner_product(residual, residual), square
        direction = add_scaled(residual, square / torch.where(previous > 0, previous, 1.0), direction)
    return solution
