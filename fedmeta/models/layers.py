"""The models that are named in an experiment: logistic, mlp and cnn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmeta.errors import FedmetaError, nearest

Shape = tuple[int, ...]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU}

NORMS = ("none", "layer", "group")


def logistic(shape: Shape, outputs: int) -> nn.Module:
    """Returns one linear layer on the flattened row: multinomial logistic (or linear) regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))


def mlp(shape: Shape, outputs: int, hidden: Sequence[int], activation: str = "relu", norm: str = "none") -> nn.Module:
    """Returns a multilayer perceptron on the flattened row.

    Args:
        shape: The shape of one row.
        outputs: Classes, or 1 for regression.
        hidden: The widths of the hidden layers.
        activation: A key of `ACTIVATIONS`.
        norm: "none", "layer" or "group" (groups of about 16 units), before each activation.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(width, size), *normalisation(norm, size), activation_layer(activation)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def cnn(
    shape: Shape,
    outputs: int,
    channels: Sequence[int] = (32, 64),
    kernel: int = 5,
    dense: int = 2048,
    activation: str = "relu",
    norm: str = "none",
) -> nn.Module:
    """Returns the two-layer convolutional network of FedMeta (Chen et al. 2018, section 4.1) and LEAF.

    Each convolution keeps the size and is followed by 2 x 2 max pooling; a dense layer and the head follow. The
    paper's sizes are the defaults: 5 x 5 kernels with 32 and 64 channels, a dense layer of 2048 units.

    Args:
        shape: (height, width), (channels, height, width) or (height, width, channels) of one row.
        outputs: Classes, or 1 for regression.
        channels: The channels of each convolution.
        kernel: The odd width of the kernels, in pixels.
        dense: The width of the dense layer.
        activation: A key of `ACTIVATIONS`.
        norm: "none" or "group" (also for "layer": one group), after each convolution.

    Raises:
        FedmetaError: Rows are not images, or too small for that many poolings.
    """
    planes, height, width = image_shape(shape, "cnn")
    if min(height, width) < 2 ** len(channels):
        raise FedmetaError(
            f'[model] name = "cnn" halves an image once per convolution: {height} x {width} pixels are too few for '
            f"{len(channels)} of them; list fewer in model.channels"
        )
    layers: list[nn.Module] = [Planes(shape)]
    for size in channels:
        layers += [nn.Conv2d(planes, size, kernel, padding=kernel // 2), *normalisation(norm, size)]
        layers += [activation_layer(activation), nn.MaxPool2d(2)]
        planes, height, width = size, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(planes * height * width, dense), activation_layer(activation)]
    return nn.Sequential(*layers, nn.Linear(dense, outputs))


def image_shape(shape: Shape, model: str) -> tuple[int, int, int]:
    """Returns (channels, height, width) of a row's shape; an axis of 1, 3 or 4 that comes last holds the channels.

    Raises:
        FedmetaError: A row is not an image.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3:
        return (shape[2], shape[0], shape[1]) if _channels_last(shape) else (shape[0], shape[1], shape[2])
    raise FedmetaError(
        f'[model] name = "{model}" needs images: rows of 2 or 3 dimensions, not of shape {shape}; "mlp" takes any row'
    )


class Planes(nn.Module):
    """Brings image rows of any accepted layout to [n, channels, height, width]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.has_channels = len(shape) == 3
        self.channels_last = len(shape) == 3 and _channels_last(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [n, *shape] as [n, channels, height, width]."""
        if not self.has_channels:
            return x.unsqueeze(-3)
        return torch.movedim(x, -1, -3) if self.channels_last else x


def _channels_last(shape: Shape) -> bool:
    return shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4)


def normalisation(norm: str, size: int) -> list[nn.Module]:
    """Returns the layers of a norm over `size` units or channels: none, or one GroupNorm.

    Raises:
        FedmetaError: There is no such norm.
    """
    if norm == "none":
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
