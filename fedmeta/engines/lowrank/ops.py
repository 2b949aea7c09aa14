"""The operations whose parameters may differ between the sites of a flattened cohort.

Each knows three things: which of its arguments are parameters, what its call requires, and what it computes on rows
[sites * n, ...] when its parameters have a leading site axis [sites, *shape].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmeta.engines.lowrank.matmul import Geometry, convolutions, products
from fedmeta.engines.misfit import UnsupportedModelError


@dataclass(frozen=True)
class Operands:
    """One call, taken apart.

    Attributes:
        x: The input, rows first.
        weight: The weight, or None.
        bias: The bias, or None.
        per_site: The result from (x [sites * n, ...], weight [sites, *], bias [sites, *]).
        kind: "linear", "convolution", "lookup" (of rows of the weight by number) or "other".
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    per_site: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    kind: str = "other"


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operands:
    def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        rows = x.reshape(weight.shape[0], -1, x.shape[-1])
        z = products(rows, weight)
        z = z if bias is None else z + bias.unsqueeze(1)
        return z.reshape(*x.shape[:-1], z.shape[-1])

    return Operands(input, weight, bias, per_site, "linear")


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Operands:
    shape = list(normalized_shape)

    def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _affine(functional.layer_norm(x, shape, None, None, eps), weight, bias, x.dim() - len(shape))

    return Operands(input, weight, bias, per_site)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Operands:
    shape = list(normalized_shape)

    def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _affine(functional.rms_norm(x, shape, None, eps), weight, bias, x.dim() - len(shape))

    return Operands(input, weight, None, per_site)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Operands:
    def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _affine(functional.group_norm(x, num_groups, None, None, eps), weight, bias, 1)

    return Operands(input, weight, bias, per_site)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int) -> Tensor:
    """Returns weight * x + bias, with each site's [*shape] along the axes of x that start at `axis`."""
    if weight is not None:
        x = broadcast_over_rows(torch.mul, x, weight, axis)
    return x if bias is None else broadcast_over_rows(torch.add, x, bias, axis)


def broadcast_over_rows(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, value: Tensor, axis: int) -> Tensor:
    """Returns x [sites * n, ...] combined with value [sites, *shape], whose shape begins at axis `axis` of x."""
    sites, *shape = value.shape
    spread = value.reshape(sites, 1, *[1] * (axis - 1), *shape, *[1] * (x.dim() - axis - len(shape)))
    return combine(x.reshape(sites, -1, *x.shape[1:]), spread).flatten(0, 1)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Operands:
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
        raise UnsupportedModelError("an embedding with padding_idx, max_norm, scale_grad_by_freq or sparse gradients")

    def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        sites, size, _ = weight.shape
        first = torch.arange(sites, device=x.device).mul(size).reshape(-1, *[1] * x.dim())
        return functional.embedding((x.reshape(sites, -1, *x.shape[1:]) + first).flatten(0, 1), weight.flatten(0, 1))

    return Operands(input, weight, None, per_site, "lookup")


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Operands:
    if input.dim() != weight.dim():
        raise UnsupportedModelError("a convolution of a single row")
    if isinstance(padding, str):
        raise UnsupportedModelError("a convolution whose padding is given by name")
    dimensions = weight.dim() - 2
    geometry = Geometry(_each(stride, dimensions), _each(padding, dimensions), _each(dilation, dimensions), groups)

    def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return convolutions(x.reshape(weight.shape[0], -1, *x.shape[1:]), weight, bias, geometry).flatten(0, 1)

    return Operands(input, weight, bias, per_site, "convolution")


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _fit(shape: Sequence[int], into: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be broadcast to another without changing that."""
    pairs = zip(reversed(shape), reversed(into), strict=False)
    return len(shape) <= len(into) and all(own in (1, other) for own, other in pairs)


def _elementwise(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Operands]:
    """Returns x + parameter and the like, such as learned positions [1, length, width] on x [n, length, width]."""

    def operands(one: Tensor, other: Tensor) -> Operands:
        x, value = (one, other) if one.dim() > other.dim() or other.shape[:1] == (1,) else (other, one)
        shape = value.shape[1:] if value.dim() == x.dim() else value.shape
        if value.dim() > x.dim() or value.numel() != shape.numel() or not _fit(shape, x.shape):
            raise UnsupportedModelError("arithmetic on parameters other than with one row of the data")

        def per_site(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert weight is not None
            return broadcast_over_rows(combine, x, weight.reshape(-1, *shape), x.dim() - len(shape))

        return Operands(x, value, None, per_site)

    return operands


OPERATIONS: dict[Any, Callable[..., Operands]] = {
    functional.linear: _linear,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.embedding: _embedding,
    **dict.fromkeys((torch.add, Tensor.add), _elementwise(torch.add)),
    **dict.fromkeys((torch.mul, Tensor.mul), _elementwise(torch.mul)),
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
}
"""Every operation by the torch function that a module calls."""
