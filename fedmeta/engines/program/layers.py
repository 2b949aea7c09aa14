"""Layers of a chain, each with its derivative, and the derivative of that along a direction.

A site's step needs the gradient g of its loss at phi. Differentiating through the step needs the Hessian's product with
a vector v, which is the derivative of g along v: forward over reverse. Each layer y = f(x, theta) therefore has

    forward             y                                        and what it keeps
    backward            dx, dtheta of dy
    tangent             y' = f_x x' + f_theta v                  along (x', v)
    tangent_backward    dx', dtheta': what `backward` returns, differentiated along (x', v, dy')

Images are [n, channels, height, width] with the channels last in memory, as the library's convolutions take them best.
Data have no tangent: x' is None at the first layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Values = Sequence[Tensor]
"""A layer's own parameters, or what belongs to each of them."""

aten: Any = torch.ops.aten


class Layer(ABC):
    """One layer; it holds no numbers of a site.

    Attributes:
        names: The parameters' names, in the order in which its functions take them.
    """

    names: tuple[str, ...] = ()

    def prepare(self, x: Tensor) -> Any:
        """Returns what `forward` takes in place of data x, where this is the first layer."""
        return x

    @abstractmethod
    def forward(self, x: Any, theta: Values) -> tuple[Tensor, Any]:
        """Returns y, and what the other functions need."""

    @abstractmethod
    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """Returns dx (None unless `by_x`), the derivative by each parameter, and what `tangent_backward` needs."""

    @abstractmethod
    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor | None, Any]:
        """Returns y' along (x', v), and what `tangent_backward` needs."""

    @abstractmethod
    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Returns dx' (None unless `by_x`) and the derivative by each parameter, both along (x', v, dy')."""


class Linear(Layer):
    """y = x W^T + b."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        weight, *bias = theta
        return (torch.addmm(bias[0], x, weight.T) if bias else x @ weight.T), x

    def backward(self, kept: Tensor, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        own = [dy.T @ kept, dy.sum(0)]
        return (dy @ theta[0] if by_x else None), own[: len(theta)], None

    def tangent(self, kept: Tensor, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        y1, _ = self.forward(kept, v)
        return (y1 if x1 is None else torch.addmm(y1, x1, theta[0].T)), x1

    def tangent_backward(
        self, kept: Tensor, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        weight = dy1.T @ kept
        if along is not None:
            weight = torch.addmm(weight, dy.T, along)
        dx = torch.addmm(dy @ v[0], dy1, theta[0]) if by_x else None
        return dx, [weight, dy1.sum(0)][: len(theta)]


class Convolution(Layer):
    """A convolution of images, as `torch.convolution` takes it."""

    def __init__(
        self,
        names: tuple[str, ...],
        kernel: Sequence[int],
        channels: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.names, self.kernel, self.channels = names, tuple(kernel), channels
        self.geometry = (list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)

    @property
    def plain(self) -> bool:
        """Whether it moves by one pixel, over neighbours, and joins all channels."""
        stride, _, dilation, _, _, groups = self.geometry
        return groups == 1 and set(stride) == set(dilation) == {1}

    def prepare(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        return channels_last(x)

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        weight, *bias = theta
        y: Tensor = aten.convolution(x, channels_last(weight), bias[0] if bias else None, *self.geometry)
        return y, x

    def _derivatives(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: bool, by_x: bool, by_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        own: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            dy,
            x,
            channels_last(weight),
            [weight.shape[0]] if bias else None,
            *self.geometry,
            [by_x, by_weight, bias],
        )
        return own

    def backward(self, kept: Tensor, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        dx, *own = self._derivatives(dy, kept, theta[0], len(theta) == 2, by_x, True)
        return dx, own[: len(theta)], None

    def tangent(self, kept: Tensor, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor, Any]:
        """See `Layer`. Both terms are one convolution, of the channels of (x', x) by those of (W, V)."""
        if x1 is None:
            return self.forward(kept, v)[0], None
        if self.geometry[-1] > 1:
            return self.forward(kept, v)[0] + self.forward(x1, theta[:1])[0], x1
        return self.forward(torch.cat([x1, kept], 1), [torch.cat([theta[0], v[0]], 1), *v[1:]])[0], x1

    def tangent_backward(
        self, kept: Tensor, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`. Both terms of either derivative are one, over channels by x and over rows by W."""
        errors, rows = (dy1, kept) if along is None else (torch.cat([dy, dy1]), torch.cat([along, kept]))
        weight = self._derivatives(errors, rows, theta[0], False, False, True)[1]
        found = [weight, *(dy1.sum((0, 2, 3)) for _ in theta[1:])]
        if not by_x:
            return None, found
        if self.geometry[-1] > 1:
            dx = self._derivatives(dy1, kept, theta[0], False, True, False)[0]
            return dx + self._derivatives(dy, kept, v[0], False, True, False)[0], found
        both = torch.cat([dy1, dy], 1), torch.cat([theta[0], v[0]])
        return self._derivatives(both[0], kept, both[1], False, True, False)[0], found


class GroupNorm(Layer):
    """y = gamma * yhat + beta with yhat = (x - mean) * r, r = 1 / sqrt(variance + eps), of each row's groups."""

    def __init__(self, names: tuple[str, ...], groups: int, eps: float) -> None:
        self.names, self.groups, self.eps = names, groups, eps

    def _mean(self, x: Tensor) -> Tensor:
        """Returns each group's mean, spread to its members [n, channels, 1, ...]."""
        n, channels = x.shape[:2]
        own = x.reshape(n, self.groups, -1).mean(2, keepdim=True).expand(-1, -1, channels // self.groups)
        return own.reshape(n, channels, *[1] * (x.dim() - 2))

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        centred = x - self._mean(x)
        r = (self._mean(centred.square()) + self.eps).rsqrt()
        hat = centred * r
        return _spread(theta[1], x) + _spread(theta[0], x) * hat, (hat, r)

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        hat, r = kept
        own = [_over_rows(dy * hat), _over_rows(dy)]
        e = dy * _spread(theta[0], dy)
        slope = self._mean(e * hat)
        dx = r * (e - self._mean(e) - hat * slope)
        return dx, own, (e, slope, dx)

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        hat, r = kept
        y1 = _spread(v[1], hat) + _spread(v[0], hat) * hat
        if x1 is None:
            return y1, None
        change = self._mean(hat * x1)
        hat1 = r * (x1 - self._mean(x1) - hat * change)
        return y1 + _spread(theta[0], hat) * hat1, (hat1, -r * change)

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        (hat, r), (e, slope, dx) = kept, more
        e1 = dy * _spread(v[0], dy) + dy1 * _spread(theta[0], dy)
        own = [_over_rows(dy1 * hat), _over_rows(dy1)]
        dx1 = e1 - self._mean(e1) - hat * self._mean(e1 * hat)
        if along is None:
            return (r * dx1 if by_x else None), own
        hat1, relative = along
        own[0] = own[0] + _over_rows(dy * hat1)
        dx1 = dx1 - hat1 * slope - hat * self._mean(e * hat1)
        return (torch.addcmul(r * dx1, dx, relative) if by_x else None), own


class Relu(Layer):
    """y = max(x, 0); its derivative at 0 is 0, as torch has it."""

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        y = x.relu()
        return y, y

    def backward(self, kept: Tensor, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        return aten.threshold_backward(dy, kept, 0), [], None

    def tangent(self, kept: Tensor, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor | None, Any]:
        """See `Layer`."""
        return (None if x1 is None else aten.threshold_backward(x1, kept, 0)), None

    def tangent_backward(
        self, kept: Tensor, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        return aten.threshold_backward(dy1, kept, 0), []


class Tanh(Layer):
    """y = tanh x, y_x = 1 - y^2, y_xx = -2 y y_x."""

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        y = x.tanh()
        return y, (y, 1 - y.square())

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        return dy * kept[1], [], None

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor | None, Any]:
        """See `Layer`."""
        y1 = None if x1 is None else x1 * kept[1]
        return y1, y1

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        y, slope = kept
        dx1 = dy1 * slope
        return (dx1 if along is None else dx1 - 2 * dy * y * along), []


class Reshaped(Layer):
    """Another shape of the same numbers; linear, so that tangents go the same way."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Returns y."""

    def prepare(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        return x

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        return self.apply(x), x.shape

    def undo(self, dy: Tensor, shape: torch.Size) -> Tensor:
        """Returns dx, in the layout in which images are."""
        return channels_last(dy.reshape(shape))

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        return self.undo(dy, kept), [], None

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor | None, Any]:
        """See `Layer`."""
        return (None if x1 is None else self.apply(x1)), None

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        return self.undo(dy1, kept), []


class Flatten(Reshaped):
    """[n, ...] as [n, numbers], in torch's order."""

    def apply(self, x: Tensor) -> Tensor:
        """See `Reshaped`."""
        return x.reshape(x.shape[0], -1)


class MaxPool(Layer):
    """Max pooling of images; where several are largest the first one counts, as in torch."""

    def __init__(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil: bool
    ) -> None:
        self.geometry = (list(kernel), list(stride), list(padding), list(dilation), ceil)

    @property
    def halves(self) -> bool:
        """Whether it takes the largest of 2 x 2 pixels, none of them twice."""
        kernel, stride, padding, dilation, ceil = self.geometry
        return kernel == stride == [2, 2] and padding == [0, 0] and dilation == [1, 1] and not ceil

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        y, places = aten.max_pool2d_with_indices(x, *self.geometry)
        return y, (x, places)

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        x, places = kept
        return aten.max_pool2d_with_indices_backward(dy, x, *self.geometry, places), [], None

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor | None, Any]:
        """See `Layer`."""
        if x1 is None:
            return None, None
        _, places = kept
        return channels_last(x1.flatten(2).gather(2, places.flatten(2)).view(places.shape)), None

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        return self.backward(kept, theta, dy1, by_x)[0], []


def channels_last(x: Tensor) -> Tensor:
    """Returns images with their channels last in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """Returns a value of each channel, ready to meet [n, channels, ...]."""
    return value.view(-1, *[1] * (like.dim() - 2))


def _over_rows(x: Tensor) -> Tensor:
    """Returns the sum of [n, channels, ...] for each channel."""
    return x.sum([place for place in range(x.dim()) if place != 1])
