"""ReLU and 2 x 2 max pooling as one layer, with a norm before it or not, and the first convolution in front of both.

Only one of four numbers passes a pool, and none where all are below 0. So a mask for each of the four places, of
numbers 0 and 1, is all that is kept of either: derivatives are products with masks. Of several largest numbers the
first one passes, as in torch, and at 0 nothing does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmeta.engines.program.layers import Layer, Values, channels_last


def quarters(x: Tensor) -> list[Tensor]:
    """Returns the numbers at each place of all pools [n, h // 2, w // 2, channels], of x [n, h, w, channels].

    The places are in the order in which torch looks at them.
    """
    n, height, width, channels = x.shape
    h, w = height // 2, width // 2
    pools = x[:, : 2 * h, : 2 * w].view(n, h, 2, w, 2, channels)
    return [line[:, :, :, b] for line in pools.unbind(2) for b in (0, 1)]


def passing(places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns what passes ReLU and pool, and the masks' sum; each mask is written over its place's numbers."""
    largest = torch.maximum(torch.maximum(places[0], places[1]), torch.maximum(places[2], places[3]))
    # Equal to no number where nothing passes.
    wanted = functional.threshold(largest, 0.0, float("inf"))
    seen = None
    for mask in places:
        mask.eq_(wanted)
        if seen is None:
            seen = mask
        else:
            mask.gt_(seen)
            seen = seen + mask
    assert seen is not None
    return largest.relu(), seen


def gathered(masks: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Returns the numbers that pass: the sum over places of mask times number."""
    found = masks[0] * places[0]
    for mask, place in zip(masks[1:], places[1:], strict=True):
        found = torch.addcmul(found, mask, place)
    return found


def spread(mask: Tensor, values: Tensor) -> Tensor:
    """Returns values [n, h // 2, w // 2, channels] where they passed [n, h, w, channels], else 0.

    Args:
        mask: The masks of the four places, in their places; what no pool covers does not count.
        values: What passed.
    """
    (n, h, w, channels), size = values.shape, mask.shape[1:3]
    pools = mask[:, : 2 * h, : 2 * w].view(n, h, 2, w, 2, channels)
    out = (pools * values.view(n, h, 1, w, 1, channels)).view(n, 2 * h, 2 * w, channels)
    return functional.pad(out, (0, 0, 0, size[1] - 2 * w, 0, size[0] - 2 * h)) if (2 * h, 2 * w) != tuple(size) else out


class ReluPool(Layer):
    """y = the largest of four of max(x, 0)."""

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        mask = _inward(x).clone(memory_format=torch.contiguous_format)
        y, _ = passing(quarters(mask))
        return _outward(y), mask

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        return _outward(spread(kept, _inward(dy).contiguous())), [], None

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor | None, Any]:
        """See `Layer`."""
        return (None if x1 is None else _outward(gathered(quarters(kept), quarters(_inward(x1))))), None

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        return self.backward(kept, theta, dy1, by_x)[0], []


class NormReluPool(Layer):
    """A group norm, ReLU and pool, whose derivatives need yhat only where something passed.

    As in `GroupNorm`, dx = r (e - mean(e) - yhat mean(e yhat)) with e = gamma dy; e is 0 but where something passed, so
    that both means are sums over pools. In terms of x that is dx = up(r e) + c1 x + c0, with numbers c of each row and
    channel; along (x', v, dy') it is up((r e)') + c1' x + c1 x' + c0'.
    """

    def __init__(self, names: tuple[str, ...], groups: int, eps: float) -> None:
        self.names, self.groups, self.eps = names, groups, eps

    def _summed(self, x: Tensor) -> Tensor:
        """Returns each group's sum of x [n, channels], spread to its members [n, 1, 1, channels]."""
        n, channels = x.shape
        own = x.view(n, self.groups, -1).sum(2, keepdim=True).expand(-1, -1, channels // self.groups)
        return own.reshape(n, 1, 1, channels)

    def forward(self, x: Tensor, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        _, channels, height, width = x.shape
        size = height * width * (channels // self.groups)
        own = _inward(x)
        mean = self._summed(own.sum((1, 2))) / size
        centred = own - mean
        r = (self._summed(centred.square().sum((1, 2))) / size + self.eps).rsqrt()
        mask = torch.addcmul(theta[1], centred, r * theta[0])
        y, alive = passing(quarters(mask))
        hat = (gathered(quarters(mask), quarters(own)) - mean * alive) * r
        return _outward(y), (own, mask, alive, mean, r, hat, size)

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        own, mask, alive, mean, r, hat, size = kept
        passed = _inward(dy) * alive
        by_beta, by_gamma = passed.sum((1, 2)), (passed * hat).sum((1, 2))
        e, slope = self._summed(by_beta * theta[0]) / size, self._summed(by_gamma * theta[0]) / size
        c1 = -r * r * slope
        dx = torch.addcmul(-r * e - c1 * mean, own, c1) + spread(mask, passed * (theta[0] * r))
        return _outward(dx), [by_gamma.sum(0), by_beta.sum(0)], (passed, e, slope, by_beta, by_gamma)

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        own, mask, alive, mean, r, hat, size = kept
        y1 = torch.addcmul(alive * v[1], hat, v[0])
        if x1 is None:
            return _outward(y1), None
        own1 = _inward(x1)
        mean1 = self._summed(own1.sum((1, 2))) / size
        both = self._summed((own1 * own).sum((1, 2))) / size
        r1 = -r * r * r * (both - mean * mean1)
        hat1 = torch.addcmul(hat * (r1 / r), gathered(quarters(mask), quarters(own1)) - mean1 * alive, r)
        return _outward(torch.addcmul(y1, hat1, theta[0])), (own1, mean1, r1, hat1)

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        own, mask, alive, mean, r, hat, size = kept
        passed, e, slope, by_beta, by_gamma = more
        passed1 = _inward(dy1) * alive
        by_beta1, by_gamma1 = passed1.sum((1, 2)), passed1 * hat
        if along is not None:
            by_gamma1 = torch.addcmul(by_gamma1, passed, along[3])
        by_gamma1 = by_gamma1.sum((1, 2))
        found = [by_gamma1.sum(0), by_beta1.sum(0)]
        if not by_x:
            return None, found
        e1 = self._summed(by_beta * v[0] + by_beta1 * theta[0]) / size
        slope1 = self._summed(by_gamma * v[0] + by_gamma1 * theta[0]) / size
        lifted = torch.addcmul(passed * (v[0] * r), passed1, theta[0] * r)
        if along is None:
            c1 = -r * r * slope1
            dx = torch.addcmul(-r * e1 - c1 * mean, own, c1)
        else:
            own1, mean1, r1, _ = along
            c2 = -r * r * slope
            c1 = -2 * r * r1 * slope - r * r * slope1
            dx = torch.addcmul(-r1 * e - r * e1 - c1 * mean - c2 * mean1, own, c1)
            dx = torch.addcmul(dx, own1, c2)
            lifted = torch.addcmul(lifted, passed, theta[0] * r1)
        return _outward(dx + spread(mask, lifted)), found


class FirstPool(Layer):
    """A convolution of stride 1 of data, a group norm or none, ReLU and a 2 x 2 pool.

    Data have no derivative: patches under the kernel are laid out once, by their place under a pool, and the
    convolution is a matrix product for each place. The norm's mean and variance follow from the patches' mean S and
    Gram matrix G of each row, without the convolution's outputs:

        mean of z = S w + b;  variance = w G w + (S w + b - mean)^2, averaged over a group's channels
        gamma (z - mean) r + beta = (a w) P + c  with a = gamma r, c = a (b - mean) + beta

    Args:
        names: weight, bias, and the norm's two.
        kernel: The kernel's height and width.
        padding: The padding's.
        channels: The outputs' channels.
        groups: The norm's groups, 0 for no norm.
        eps: The norm's.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        kernel: Sequence[int],
        padding: Sequence[int],
        channels: int,
        groups: int,
        eps: float,
    ) -> None:
        self.names, self.kernel, self.padding = names, tuple(kernel), tuple(padding)
        self.channels, self.groups, self.eps = channels, groups, eps

    def prepare(self, x: Tensor) -> Any:
        """See `Layer`. Returns patches [4, n, numbers, pools], S and G where there is a norm, and the pools' shape."""
        (high, wide), (above, beside) = self.kernel, self.padding
        x = functional.pad(x, (beside, beside, above, above)).contiguous()
        n, depth, rows, columns = x.shape
        rows, columns = rows - high + 1, columns - wide + 1
        per_row, per_channel, per_line, per_column = x.stride()
        h, w = rows // 2, columns // 2
        patches = x.as_strided(
            (2, 2, n, depth, high, wide, h, w),
            (per_line, per_column, per_row, per_channel, per_line, per_column, 2 * per_line, 2 * per_column),
        ).reshape(4, n, depth * high * wide, h * w)
        if not self.groups:
            return patches, None, None, (h, w)
        whole = x.as_strided(
            (n, depth, high, wide, rows, columns), (per_row, per_channel, per_line, per_column, per_line, per_column)
        ).reshape(n, depth * high * wide, rows * columns)
        mean = whole.mean(2)
        centred = whole - mean.unsqueeze(2)
        return patches, mean, centred @ centred.transpose(1, 2) / (rows * columns), (h, w)

    def _affine(self, mean: Tensor, gram: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        """Returns a w [n, channels, numbers] and c [n, channels] as a function of w (a matrix), b, gamma, beta."""
        n, groups, eps = len(mean), self.groups, self.eps
        members = self.channels // groups

        def affine(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
            centre = (mean @ weight.T + bias).view(n, groups, members)
            square = ((weight @ gram) * weight).sum(2).view(n, groups, members)
            middle = centre.mean(2, keepdim=True)
            variance = (square + (centre - middle).square()).mean(2, keepdim=True)
            a = gamma * (variance + eps).rsqrt().expand(n, groups, members).reshape(n, -1)
            return a.unsqueeze(2) * weight, a * (bias - middle.expand(n, groups, members).reshape(n, -1)) + beta

        return affine

    def _differentiable(self, x: Any, theta: Values) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Returns the parameters as leaves, and a w and c of them."""
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in self._flat(theta)]
            return leaves, self._affine(x[1], x[2])(*leaves)

    def _flat(self, values: Values) -> tuple[Tensor, ...]:
        """Returns the parameters with the kernel as a matrix [channels, numbers], and a bias of zeros for none."""
        weight, *rest = values
        if len(rest) in (0, 2):
            rest = [weight.new_zeros(self.channels), *rest]
        return weight.reshape(self.channels, -1), *rest

    def _unflat(self, values: Sequence[Tensor], theta: Values) -> list[Tensor]:
        weight, bias, *rest = values
        own = [weight.view(theta[0].shape), bias, *rest]
        return own if len(theta) % 2 == 0 else [own[0], *rest]

    def _products(self, x: Any, weight: Tensor, offset: Tensor) -> list[Tensor]:
        """Returns w P + c at each place [n, channels, pools]."""
        return [torch.baddbmm(offset.view(-1, self.channels, 1), weight, patches) for patches in x[0].unbind()]

    def _combined(self, x: Any, theta: Values) -> tuple[Tensor, Tensor]:
        flat = self._flat(theta)
        if self.groups:
            return self._affine(x[1], x[2])(*flat)
        return flat[0].expand(x[0].shape[1], -1, -1), flat[1]

    def _image(self, x: Any, y: Tensor) -> Tensor:
        return channels_last(y.view(-1, self.channels, *x[3]))

    def _outer(self, kept: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the derivatives by a w [n, channels, numbers] and by c [n, channels]."""
        x, masks, alive = kept
        found = None
        for mask, patches in zip(masks, x[0].unbind(), strict=True):
            own = torch.bmm(mask * dy, patches.transpose(1, 2))
            found = own if found is None else found + own
        assert found is not None
        return found, (dy * alive).sum(2)

    def forward(self, x: Any, theta: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        masks = self._products(x, *self._combined(x, theta))
        y, alive = passing(masks)
        return self._image(x, y), (x, masks, alive)

    def backward(self, kept: Any, theta: Values, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor], Any]:
        """See `Layer`."""
        x, own = kept[0], self._outer(kept, _rows(dy, self.channels))
        if not self.groups:
            return None, self._unflat((own[0].sum(0), own[1].sum(0)), theta), None
        leaves, outputs = self._differentiable(x, theta)
        return None, self._unflat(torch.autograd.grad(outputs, leaves, own), theta), own

    def tangent(self, kept: Any, theta: Values, x1: Tensor | None, v: Values) -> tuple[Tensor, Any]:
        """See `Layer`."""
        x, masks, _ = kept
        along: Sequence[Tensor] = self._combined(x, v) if not self.groups else ()
        if self.groups:
            leaves, outputs = self._differentiable(x, theta)
            # What the derivative J^T d is along d, for any d: J v.
            with torch.enable_grad():
                some = [torch.zeros_like(value).requires_grad_() for value in outputs]
                turned = torch.autograd.grad(outputs, leaves, some, create_graph=True)
            along = torch.autograd.grad(turned, some, self._flat(v))
        return self._image(x, gathered(masks, self._products(x, *along))), None

    def tangent_backward(
        self, kept: Any, more: Any, along: Any, theta: Values, v: Values, dy: Tensor, dy1: Tensor, by_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """See `Layer`."""
        x, own1 = kept[0], self._outer(kept, _rows(dy1, self.channels))
        if not self.groups:
            return None, self._unflat((own1[0].sum(0), own1[1].sum(0)), theta)
        leaves, outputs = self._differentiable(x, theta)
        with torch.enable_grad():
            gradient = torch.autograd.grad(outputs, leaves, more, create_graph=True)
        # By c the derivative with respect to beta is a sum, and bends no more.
        bends = [(own, along) for own, along in zip(gradient, self._flat(v), strict=True) if own.requires_grad]
        bent = torch.autograd.grad(
            [own for own, _ in bends],
            leaves,
            [along for _, along in bends],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        pulled = torch.autograd.grad(outputs, leaves, own1)
        return None, self._unflat([one + other for one, other in zip(bent, pulled, strict=True)], theta)


def _inward(x: Tensor) -> Tensor:
    """Returns images [n, channels, h, w] as [n, h, w, channels]."""
    return x.permute(0, 2, 3, 1)


def _outward(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _rows(dy: Tensor, channels: int) -> Tensor:
    return dy.reshape(len(dy), channels, -1)
