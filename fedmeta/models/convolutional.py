"""Models on images: FedMeta's two-layer network, and the four blocks of few-shot learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmeta.errors import FedmetaError
from fedmeta.models.layers import DEFAULTS, Shape, activation_layer, normalisation, widths


def cnn(
    shape: Shape,
    outputs: int,
    channels: Sequence[int] = widths(DEFAULTS.channels),
    kernel: int = DEFAULTS.kernel,
    dense: int = DEFAULTS.dense,
    activation: str = DEFAULTS.activation,
    norm: str = DEFAULTS.norm,
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
        norm: "group" (or "layer": one group) after each convolution; "none" or "auto" for none.

    Raises:
        FedmetaError: Rows are not images, or too small for that many poolings.
    """
    planes, height, width = _poolable(shape, "cnn", len(channels), "list fewer in model.channels")
    layers: list[nn.Module] = [Planes(shape)]
    for size in channels:
        layers += [nn.Conv2d(planes, size, kernel, padding=kernel // 2), *normalisation(norm, size)]
        layers += [activation_layer(activation), nn.MaxPool2d(2)]
        planes, height, width = size, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(planes * height * width, dense), activation_layer(activation)]
    return nn.Sequential(*layers, nn.Linear(dense, outputs))


def conv4(
    shape: Shape,
    outputs: int,
    filters: int = DEFAULTS.filters,
    activation: str = DEFAULTS.activation,
    norm: str = DEFAULTS.norm,
) -> nn.Module:
    """Returns the four-block convolutional network of few-shot learning (Vinyals et al. 2016; MAML's on Omniglot).

    Each block is a 3 x 3 convolution that keeps the size, a norm, an activation and 2 x 2 max pooling; the head is
    linear. The papers normalise by the batch, which would leak test rows: groups of channels take its place.

    Args:
        shape: As for `cnn`; Omniglot's 28 x 28 pixels end as 1 x 1.
        outputs: Classes, or 1 for regression.
        filters: The channels of each block.
        activation: A key of `ACTIVATIONS`.
        norm: "group" or "auto" (groups of about 16 channels), "layer" or "none".

    Raises:
        FedmetaError: Rows are not images, or smaller than 16 x 16 pixels.
    """
    planes, height, width = _poolable(shape, "conv4", 4, 'take "cnn"')
    layers: list[nn.Module] = [Planes(shape)]
    for block in range(4):
        layers += [nn.Conv2d(filters if block else planes, filters, 3, padding=1)]
        layers += [*normalisation("group" if norm == "auto" else norm, filters), activation_layer(activation)]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * (height // 16) * (width // 16), outputs))


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


def _poolable(shape: Shape, model: str, poolings: int, advice: str) -> tuple[int, int, int]:
    planes, height, width = image_shape(shape, model)
    if min(height, width) < 2**poolings:
        raise FedmetaError(
            f'[model] name = "{model}" halves an image once per convolution: {height} x {width} pixels are too few for '
            f"{poolings} of them; {advice}"
        )
    return planes, height, width


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
