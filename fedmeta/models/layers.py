"""What models are made of: shapes, activations and norms by name."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from fedmeta import experiment
from fedmeta.errors import FedmetaError, nearest

Shape = tuple[int, ...]

DEFAULTS = experiment.Model()
"""The section [model]: where the default, the range and the help of each model's keys stand."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU}

NORMS: tuple[str, ...] = get_args(experiment.Norm)
"""Norms by name; "auto" is what each model takes by default: "group" for conv4, "none" for the others."""


def normalisation(norm: str, size: int) -> list[nn.Module]:
    """Returns the layers of a norm over `size` units or channels: none, or one GroupNorm.

    Raises:
        FedmetaError: There is no such norm.
    """
    if norm in ("auto", "none"):
        return []
    if norm not in NORMS:
        raise FedmetaError(f'model.norm = "{norm}": no such norm{nearest(norm, NORMS)} (known: {", ".join(NORMS)})')
    groups = 1 if norm == "layer" else next(count for count in range(max(1, size // 16), 0, -1) if size % count == 0)
    return [nn.GroupNorm(groups, size)]


def activation_layer(activation: str) -> nn.Module:
    """Returns an activation as a layer.

    Raises:
        FedmetaError: There is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise FedmetaError(
            f'model.activation = "{activation}": no such activation{nearest(activation, ACTIVATIONS)} '
            f"(known: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[activation]()


def widths(value: Any) -> Any:
    """Returns "64,64" as (64, 64), and anything else as it is."""
    if isinstance(value, str) and value.replace(",", "").replace(" ", "").isdigit():
        return tuple(int(width) for width in value.split(","))
    return () if value == "" else value
