"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019).

phi = argmin L_S(phi) + lam / 2 * |phi - theta|^2, by K steps of gradient descent from theta (equation 3)
d L_Q(phi) / d theta = (I + d2 L_S(phi) / lam)^-1 d L_Q(phi) / d phi (equation 6), with no graph through the steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp

from fedmeta.errors import FedmetaError
from fedmeta.learners.inner import add_scaled, inner_loop, inner_product, proximal
from fedmeta.learners.learner import Learner, MetaState, Metrics, with_theta
from fedmeta.models import Parameters
from fedmeta.task import Rows, Task


@dataclass(frozen=True)
class ProximalLearner(Learner):
    """A learner whose inner loop solves the proximal problem, in training and at evaluation.

    Attributes:
        lam: lambda, the weight of lam / 2 * |phi - theta|^2 in the inner problem. Its descent is stable where
            `inner_lr` is below 2 / (lambda + the largest curvature of the support loss).
    """

    lam: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lam > 0:
            raise FedmetaError(f"learner.lam = {self.lam}: it must be greater than 0")

    def solve(self, theta: Parameters, meta_state: MetaState, rows: Rows, steps: int) -> list[Parameters]:
        """Returns the path of `steps` descent steps on the proximal problem around theta."""
        objective = proximal(partial(self.loss, rows=rows), theta, self.lam)
        return inner_loop(objective, theta, partial(self.rates, meta_state), steps)

    def adaptation_path(
        self, meta_state: MetaState, support: Rows, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns the parameters after 0, 1, ... `steps` steps on the proximal problem around theta."""
        return self.solve(self.theta(meta_state), meta_state, support, steps)


@dataclass(frozen=True)
class Imaml(ProximalLearner):
    """Sends the implicit meta-gradient; exact where the inner and the linear problem are solved.

    Attributes:
        cg_steps: Conjugate-gradient iterations, each one Hessian-vector product.
    """

    cg_steps: int = 5

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns (I + H / lam)^-1 times the query gradient at phi, and the query loss there."""
        phi = self.adaptation_path(meta_state, task.support, self.inner_steps)[-1]
        query_gradient, query_loss = grad_and_value(partial(self.loss, rows=task.query))(phi)
        # The Hessian is symmetric, so that the gradient's pullback multiplies by it; one graph serves all products.
        hessian_times = vjp(grad(partial(self.loss, rows=task.support)), phi)[1]

        def matrix_times(vector: Parameters) -> Parameters:
            return add_scaled(vector, 1 / self.lam, hessian_times(vector)[0])

        gradient = conjugate_gradients(matrix_times, query_gradient, self.cg_steps)
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
