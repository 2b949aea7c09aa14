"""Models on flattened rows: logistic regression and the multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from fedmeta.models.layers import DEFAULTS, Shape, activation_layer, normalisation, widths


def logistic(shape: Shape, outputs: int) -> nn.Module:
    """Returns one linear layer on the flattened row: multinomial logistic (or linear) regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))


def mlp(
    shape: Shape,
    outputs: int,
    hidden: Sequence[int] = widths(DEFAULTS.hidden),
    activation: str = DEFAULTS.activation,
    norm: str = DEFAULTS.norm,
) -> nn.Module:
    """Returns a multilayer perceptron on the flattened row.

    Args:
        shape: The shape of one row.
        outputs: Classes, or 1 for regression.
        hidden: The widths of the hidden layers.
        activation: A key of `ACTIVATIONS`.
        norm: "layer" or "group" (groups of about 16 units) before each activation; "none" or "auto" for none.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(width, size), *normalisation(norm, size), activation_layer(activation)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))
