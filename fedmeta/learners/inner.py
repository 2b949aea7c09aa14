"""The inner loop and the objectives that it descends, as functions of parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad

from fedmeta.models import Parameters

Objective = Callable[[Parameters], Tensor]
"""A scalar function of a model's parameters."""

Rates = Callable[[int], Mapping[str, Tensor | float]]
"""The rate of inner step `step` (from 0) for each parameter that adapts."""


def inner_loop(objective: Objective, start: Parameters, rates: Rates, steps: int) -> list[Parameters]:
    """Returns the parameters after 0, 1, ... `steps` steps: phi <- phi - rate * d objective(phi) / d phi.

    Parameters without a rate stay where they are. Differentiable through every step.
    """
    parameters = start
    path = [parameters]
    for step in range(steps):
        own = rates(step)
        fixed = {name: value for name, value in parameters.items() if name not in own}
        adapting = {name: value for name, value in parameters.items() if name in own}
        gradient = grad(lambda moving, fixed=fixed: objective({**fixed, **moving}))(adapting)
        parameters = {
            name: value - own[name] * gradient[name] if name in own else value for name, value in parameters.items()
        }
        path.append(parameters)
    return path


def proximal(objective: Objective, anchor: Parameters, weight: float) -> Objective:
    """Returns the objective with a pull to the anchor: objective(phi) + weight / 2 * |phi - anchor|^2."""

    def pulled(parameters: Parameters) -> Tensor:
        moved = [value - anchor[name] for name, value in parameters.items() if value.is_floating_point()]
        distance = torch.stack([value.square().sum() for value in moved]).sum()
        return objective(parameters) + weight / 2 * distance

    return pulled


def inner_product(one: Parameters, other: Parameters) -> Tensor:
    """Returns the sum over all parameters of the elementwise products."""
    return torch.stack([(value * other[name]).sum() for name, value in one.items()]).sum()


def add_scaled(one: Parameters, scale: Tensor | float, other: Parameters) -> Parameters:
    """Returns one + scale * other, parameter by parameter."""
    return {name: value + scale * other[name] for name, value in one.items()}
