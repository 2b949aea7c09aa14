"""Products of each site's rows with each site's own weights, and their derivatives of any order.

Both are bilinear, so that their derivatives are products of the same kinds. Written as functions of whole cohorts, they
keep one node per layer in the graph, and not one per site; derivatives come out in the layout of what they belong to.
Weights that are the same at all sites, an expanded view before the first step, take one product for all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

NARROW = 4
"""How many times as wide as its outputs a layer's inputs are for it to count as narrow."""


def products(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x [sites, rows, width] times weight [sites, outputs, width], transposed: [sites, rows, outputs]."""
    z: Tensor = _apply(_Product, x, weight)
    return z


def traced_linear(x: Tensor, weight: Tensor, note: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
    """Returns x [rows, width] times weight [outputs, width], transposed, and has every use of the weight noted.

    The derivative with respect to x uses the weight too, and is differentiated in turn where an inner step is.

    Args:
        x: The rows.
        weight: The weight; no derivative with respect to it is computed.
        note: Called with (x, x W^T, false), and in a derivative that stays differentiable with (errors, errors W,
            true); returns the product, in a shape of its choice.
    """
    z: Tensor = _apply(_TracedLinear, x, weight, note)
    return note(x, z, False)


def fused_linear(x: Tensor, first: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns x W^T + b of each site's `first` rows and of its others, with one derivative by W, which may be large.

    Args:
        x: Rows [sites, rows, width], data.
        first: How many of each site's rows come first.
        weight: W [outputs, width].
        bias: b [outputs], or None.
    """
    z: tuple[Tensor, Tensor] = _apply(_FusedLinear, x, first, weight, bias)
    return z


def summed_outer(rows: Tensor, errors: Tensor) -> Tensor:
    """Returns errors^T rows [outputs, width] of rows [n, width] and errors [n, outputs].

    The wider of the two comes first where the other is much narrower, which a matrix product takes better: a sixth
    quicker for 128 outputs of 784 inputs.
    """
    if NARROW * errors.shape[1] <= rows.shape[1]:
        return (rows.T @ errors).T.contiguous()
    return errors.T @ rows


class Geometry(NamedTuple):
    """How a convolution moves over its input; a number for each of its dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolutions(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Returns x [sites, n, channels, *] convolved with weight [sites, outputs, channels / groups, *], plus the bias.

    One site after the other: a grouped convolution over the sites is several times slower on a CPU.
    """
    z: Tensor = _apply(_Convolution, x, weight, bias, geometry)
    return z


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Returns function(*arguments), differentiable; torch has no types for it."""
    apply: Callable[..., Any] = function.apply
    return apply(*arguments)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        if shared(weight):
            return (x.flatten(0, 1) @ weight[0].T).view(*x.shape[:2], -1)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    def backward(context: Any, *errors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = context.saved_tensors
        by_x, by_weight = context.needs_input_grad
        return (
            products(errors[0], weight.transpose(1, 2)) if by_x else None,
            _outer(errors[0], x, weight) if by_weight else None,
        )


class _Outer(torch.autograd.Function):
    """A^T B of every site, whose derivatives are laid out by rows, as A and B are."""

    @staticmethod
    def forward(context: Any, one: Tensor, other: Tensor) -> Tensor:
        context.save_for_backward(one, other)
        return torch.bmm(one.transpose(1, 2), other)

    @staticmethod
    def backward(context: Any, *errors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        one, other = context.saved_tensors
        by_one, by_other = context.needs_input_grad
        return (
            products(other, errors[0]) if by_one else None,
            products(one, errors[0].transpose(1, 2)) if by_other else None,
        )


class _TracedLinear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, note: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
        context.save_for_backward(weight)
        context.note = note
        return x @ weight.T

    @staticmethod
    def backward(context: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        if not context.needs_input_grad[0]:
            return None, None, None
        (weight,) = context.saved_tensors
        product = errors[0] @ weight
        if product.requires_grad:
            product = context.note(errors[0], product, True).reshape(product.shape)
        return product, None, None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, first: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        context.save_for_backward(x)
        context.first = first
        context.set_materialize_grads(False)
        z = functional.linear(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)
        return z[:, :first].contiguous(), z[:, first:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(context: Any, *errors: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = context.saved_tensors
        _, _, by_weight, by_bias = context.needs_input_grad
        parts = (x[:, : context.first], x[:, context.first :])
        known = [(rows, own) for rows, own in zip(parts, errors, strict=True) if own is not None]
        if not known:
            return None, None, None, None
        rows = x if len(known) == 2 else known[0][0]
        both = torch.cat([own for _, own in known], 1).flatten(0, 1)
        weight = summed_outer(rows.flatten(0, 1), both) if by_weight else None
        return None, None, weight, both.sum(0) if by_bias else None


class _Convolution(torch.autograd.Function):
    """C(x, W) + b."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        context.save_for_backward(x, weight)
        context.geometry = geometry
        stride, padding, dilation, groups = geometry
        none = (0,) * len(stride)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            z: Tensor = torch.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)
            return z

        return _by_site(convolve, x, weight, bias)

    @staticmethod
    def backward(context: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = context.saved_tensors
        by_x, by_weight, by_bias, _ = context.needs_input_grad
        return (
            _apply(_ByInput, errors[0], weight, x.shape, context.geometry) if by_x else None,
            _apply(_ByWeight, x, errors[0], weight.shape, context.geometry) if by_weight else None,
            errors[0].flatten(3).sum((1, 3)) if by_bias else None,
            None,
        )


class _ByInput(torch.autograd.Function):
    """I(D, W), the derivative of <D, C(x, W)> by x."""

    @staticmethod
    def forward(context: Any, errors: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        context.save_for_backward(errors, weight)
        context.geometry = geometry

        def by_input(errors: Tensor, weight: Tensor, _: None) -> Tensor:
            x = errors.new_empty(1).expand(errors.shape[0], *shape[2:])
            return _derivatives(errors, x, weight, geometry, (True, False))[0]

        return _by_site(by_input, errors, weight, None)

    @staticmethod
    def backward(context: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        own, weight = context.saved_tensors
        by_errors, by_weight, _, _ = context.needs_input_grad
        return (
            _apply(_Convolution, errors[0], weight, None, context.geometry) if by_errors else None,
            _apply(_ByWeight, errors[0], own, weight.shape, context.geometry) if by_weight else None,
            None,
            None,
        )


class _ByWeight(torch.autograd.Function):
    """G(x, D), the derivative of <D, C(x, W)> by W."""

    @staticmethod
    def forward(context: Any, x: Tensor, errors: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        context.save_for_backward(x, errors)
        context.geometry = geometry
        weight = errors.new_empty(1).expand(shape[1:])
        sites = zip(x.unbind(), errors.unbind(), strict=True)
        return torch.stack([_derivatives(own, rows, weight, geometry, (False, True))[1] for rows, own in sites])

    @staticmethod
    def backward(context: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        x, own = context.saved_tensors
        by_x, by_errors, _, _ = context.needs_input_grad
        return (
            _apply(_ByInput, own, errors[0], x.shape, context.geometry) if by_x else None,
            _apply(_Convolution, x, errors[0], None, context.geometry) if by_errors else None,
            None,
            None,
        )


def _outer(errors: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Returns errors^T x of every site [sites, outputs, width], in the weight's layout.

    A weight that is a transposed view belongs to a product that was differentiated. A product of few rows by many
    columns is up to five times quicker than its transpose.
    """
    turned = weight.stride(1) < weight.stride(2)
    outer: Tensor = _apply(_Outer, x, errors) if turned else _apply(_Outer, errors, x)
    return outer.transpose(1, 2) if turned else outer


def shared(weight: Tensor) -> bool:
    """Whether all sites have the same weight: an expanded view."""
    return weight.stride(0) == 0 or weight.shape[0] == 1


def _by_site(function: Callable[..., Tensor], rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns function(rows, weight, bias) of every site [sites, n, *]."""
    own = [None] * len(rows) if bias is None else bias.unbind()
    if shared(weight) and (bias is None or shared(bias)):
        together = function(rows.flatten(0, 1), weight[0], own[0])
        return together.view(*rows.shape[:2], *together.shape[1:])
    return torch.stack([function(*site) for site in zip(rows.unbind(), weight.unbind(), own, strict=True)])


def _derivatives(
    errors: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    none = (0,) * len(stride)
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        errors, x, weight, None, stride, padding, dilation, False, none, groups, (*wanted, False)
    )
    return by_x, by_weight
