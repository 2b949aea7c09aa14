"""A module as a chain of known layers, where it is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fedmeta.engines.program.derivatives import Chain
from fedmeta.engines.program.layers import (
    Convolution,
    Flatten,
    GroupNorm,
    Layer,
    Linear,
    MaxPool,
    Relu,
    Reshaped,
    Tanh,
    channels_last,
)
from fedmeta.engines.program.pooled import FirstPool, NormReluPool, ReluPool
from fedmeta.models import FunctionalModel
from fedmeta.models.convolutional import Planes

PASSED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
"""Layers that a model in evaluation mode, as all are here, has for nothing."""


class Changed(Reshaped):
    """A module without parameters that only reshapes data."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def apply(self, x: Tensor) -> Tensor:
        """See `Reshaped`."""
        y: Tensor = self.module(x)
        return channels_last(y)


def chain_of(network: FunctionalModel) -> Chain | None:
    """Returns a model as a chain, or None where it is not one, or has a layer that is not known here."""
    layers: list[Layer] = []
    for name, module in _leaves(network.module):
        layer = _layer(name, module)
        if layer is None:
            return None
        layers.extend(layer)
    known = {*network.names, *network.frozen}
    named = [name for layer in layers for name in layer.names]
    if len(set(named)) != len(named) or not set(network.names) <= set(named) <= known:
        return None  # a parameter of two layers, or of none
    return Chain(_fused(layers), network.names)


def _fused(layers: Sequence[Layer]) -> list[Layer]:
    """Returns the same chain with each norm, ReLU and 2 x 2 pool as one layer, and with the first convolution too."""
    left, fused = list(layers), []
    data = True
    while left:
        norms = isinstance(left[0], GroupNorm)
        convolves = data and isinstance(left[0], Convolution) and left[0].plain
        place = int(norms or convolves)
        if convolves and isinstance(left[1], GroupNorm):
            place += 1
        norm = left[place - 1] if place and isinstance(left[place - 1], GroupNorm) else None
        pools = len(left) > place + 1 and {type(each) for each in left[place : place + 2]} == {Relu, MaxPool}
        if pools and all(each.halves for each in left[place : place + 2] if isinstance(each, MaxPool)):
            fused.append(_pooled(left[0] if convolves else None, norm))
            left = left[place + 2 :]
            data = False
            continue
        data = data and isinstance(left[0], Reshaped)
        fused.append(left.pop(0))
    return fused


def _pooled(first: Layer | None, norm: Layer | None) -> Layer:
    """Returns the one layer that stands for these, ReLU and a 2 x 2 pool."""
    groups, eps, names = (norm.groups, norm.eps, norm.names) if isinstance(norm, GroupNorm) else (0, 0.0, ())
    if isinstance(first, Convolution):
        return FirstPool((*first.names, *names), first.kernel, first.geometry[1], first.channels, groups, eps)
    return NormReluPool(names, groups, eps) if groups else ReluPool()


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{prefix}{name}." if type(child) is nn.Sequential else f"{prefix}{name}")


def _layer(name: str, module: nn.Module) -> Sequence[Layer] | None:
    """Returns a module as a layer, nothing for one that does nothing, or None for one that is not known."""
    kind = type(module)
    names = tuple(f"{name}.{each}" if name else each for each, _ in module.named_parameters())
    if kind in PASSED:
        return []
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return [Linear(names)]
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        sizes = module.kernel_size, module.out_channels
        return [Convolution(names, *sizes, module.stride, module.padding, module.dilation, module.groups)]
    if isinstance(module, nn.GroupNorm) and kind is nn.GroupNorm and module.affine:
        return [GroupNorm(names, module.num_groups, module.eps)]
    if isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d and not module.return_indices:
        return [_pool(module)]
    if isinstance(module, nn.Flatten) and kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return [Flatten()]
    if kind in (Planes, nn.Unflatten):
        return [Changed(module)]
    return [Relu()] if kind is nn.ReLU else [Tanh()] if kind is nn.Tanh else None


def _pool(module: nn.MaxPool2d) -> MaxPool:
    kernel, stride, padding, dilation = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return MaxPool(kernel, stride, padding, dilation, module.ceil_mode)
