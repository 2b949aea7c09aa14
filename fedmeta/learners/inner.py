"""Objectives that sites descend, as functions of parameters alone, and arithmetic on parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmeta.models import Parameters

Objective = Callable[[Parameters], Tensor]
"""A scalar function of a model's parameters."""


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
