"""What a site's steps need of a model: the gradient of its loss at phi, and the Hessian's product with a vector there.

A chain of known layers has both by hand, forward over reverse, with what the forward pass kept used twice
(`fedmeta.engines.program.layers`). Any other model has them by automatic differentiation, twice in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedmeta.engines.program.layers import Layer, Reshaped
from fedmeta.models import FunctionalModel, Parameters
from fedmeta.problems.rows import row_errors, row_losses

PIECE = 25
"""How many rows without second derivatives go through a chain of images at a time, for the cache."""


class Prepared(NamedTuple):
    """A site's rows: x as the model takes it, labels y [n, ...], and each row's share of the loss [n]."""

    x: Any
    y: Tensor
    shares: Tensor


class Derivatives(Protocol):
    """A model's loss on rows, as a function of its parameters."""

    def prepare(self, x: Tensor, y: Tensor, shares: Tensor) -> Prepared:
        """Returns rows, ready to be computed with more than once."""
        ...

    def pieces(self, x: Tensor, y: Tensor, shares: Tensor) -> list[Prepared]:
        """Returns rows in pieces whose losses add up, ready to be computed with once."""
        ...

    def gradient(self, phi: Parameters, rows: Prepared, twice: bool) -> tuple[Tensor, Parameters, Any]:
        """Returns the loss, its derivative by each trained parameter, and with `twice` what `curvature` needs."""
        ...

    def curvature(self, kept: Any, phi: Parameters, v: Parameters) -> Parameters:
        """Returns the derivative of <gradient, v> by each trained parameter; v has those that adapt."""
        ...


class Chain:
    """A model that is one layer after the other.

    Args:
        layers: The layers.
        trained: The parameters whose derivatives are wanted.
    """

    def __init__(self, layers: Sequence[Layer], trained: Sequence[str]) -> None:
        first = next((place for place, layer in enumerate(layers) if not isinstance(layer, Reshaped)), 0)
        self.shaping, self.layers, self.trained = tuple(layers[:first]), tuple(layers[first:]), frozenset(trained)

    def prepare(self, x: Tensor, y: Tensor, shares: Tensor) -> Prepared:
        """See `Derivatives`."""
        for layer in self.shaping:
            x, _ = layer.forward(x, ())
        return Prepared(self.layers[0].prepare(x), y, shares)

    def pieces(self, x: Tensor, y: Tensor, shares: Tensor) -> list[Prepared]:
        """See `Derivatives`."""
        size = PIECE if x.dim() > 2 else len(x)
        parts = max(1, -(-len(x) // max(1, size)))
        columns = (each.tensor_split(parts) for each in (x, y, shares))
        return [self.prepare(*part) for part in zip(*columns, strict=True)]

    def gradient(self, phi: Parameters, rows: Prepared, twice: bool) -> tuple[Tensor, Parameters, Any]:
        """See `Derivatives`."""
        theta = [[phi[name] for name in layer.names] for layer in self.layers]
        x, caches = rows.x, []
        for layer, own in zip(self.layers, theta, strict=True):
            x, kept = layer.forward(x, own)
            caches.append(kept)
        loss = (row_losses(x, rows.y) * rows.shares).sum()
        dy: Tensor | None = row_errors(x, rows.y) * rows.shares.unsqueeze(-1)
        found: Parameters = {}
        errors: list[tuple[Tensor, Any]] = []
        first = self._first()
        for place in range(len(self.layers) - 1, first - 1, -1):
            layer, before = self.layers[place], dy
            assert before is not None
            dy, own, more = layer.backward(caches[place], theta[place], before, place > first)
            errors.append((before, more))
            self._add(found, layer, own)
        return loss, found, (caches, errors[::-1], x, rows) if twice else None

    def curvature(self, kept: Any, phi: Parameters, v: Parameters) -> Parameters:
        """See `Derivatives`."""
        caches, errors, outputs, rows = kept
        first = self._first()
        theta, along, notes = [], [], []
        x1: Tensor | None = None
        for layer, cache in zip(self.layers[first:], caches[first:], strict=True):
            theta.append([phi[name] for name in layer.names])
            along.append([v[name] if name in v else torch.zeros_like(phi[name]) for name in layer.names])
            x1, note = layer.tangent(cache, theta[-1], x1, along[-1])
            notes.append(note)
        assert x1 is not None, "a chain has a layer with parameters"
        dy1: Tensor | None = errors_along(outputs, x1, rows)
        found: Parameters = {}
        for place in range(len(theta) - 1, -1, -1):
            layer, (dy, more) = self.layers[first + place], errors[place]
            assert dy1 is not None
            dy1, own = layer.tangent_backward(
                caches[first + place], more, notes[place], theta[place], along[place], dy, dy1, place > 0
            )
            self._add(found, layer, own)
        return found

    def _first(self) -> int:
        """Returns the place of the first layer with parameters: nothing before it is differentiated."""
        return next(place for place, layer in enumerate(self.layers) if layer.names)

    def _add(self, found: Parameters, layer: Layer, own: Sequence[Tensor]) -> None:
        found.update({name: value for name, value in zip(layer.names, own, strict=True) if name in self.trained})


def errors_along(outputs: Tensor, outputs1: Tensor, rows: Prepared) -> Tensor:
    """Returns the derivative of each row's errors along a change of its outputs [n, outputs]."""
    shares = rows.shares.unsqueeze(-1)
    if rows.y.is_floating_point():
        return row_errors(outputs1, torch.zeros_like(rows.y)) * shares
    moved = outputs.softmax(-1) * outputs1
    return (moved - outputs.softmax(-1) * moved.sum(-1, keepdim=True)) * shares


class Reverse:
    """Any model, by automatic differentiation.

    Args:
        network: The model.
    """

    def __init__(self, network: FunctionalModel) -> None:
        self.network = network

    def prepare(self, x: Tensor, y: Tensor, shares: Tensor) -> Prepared:
        """See `Derivatives`."""
        return Prepared(x, y, shares)

    def pieces(self, x: Tensor, y: Tensor, shares: Tensor) -> list[Prepared]:
        """See `Derivatives`."""
        return [Prepared(x, y, shares)]

    def gradient(self, phi: Parameters, rows: Prepared, twice: bool) -> tuple[Tensor, Parameters, Any]:
        """See `Derivatives`."""
        with torch.enable_grad():
            own = {name: phi[name].detach().requires_grad_() for name in self.network.names}
            outputs = self.network({**phi, **own}, rows.x)
            errors = row_errors(outputs, rows.y)
            errors = errors * rows.shares.view(-1, *[1] * (errors.dim() - 1))
            leaves = list(own.values())
            found = torch.autograd.grad(
                outputs, leaves, errors, create_graph=twice, allow_unused=True, materialize_grads=True
            )
        loss = (row_losses(outputs.detach(), rows.y) * rows.shares).sum()
        gradient = dict(zip(own, (value.detach() for value in found), strict=True))
        return loss, gradient, (dict(zip(own, found, strict=True)), leaves) if twice else None

    def curvature(self, kept: Any, phi: Parameters, v: Parameters) -> Parameters:
        """See `Derivatives`."""
        gradient, leaves = kept
        names = [name for name in v if gradient[name].requires_grad]
        if not names:
            return {name: torch.zeros_like(phi[name]) for name in self.network.names}
        found = torch.autograd.grad(
            [gradient[name] for name in names],
            leaves,
            [v[name] for name in names],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self.network.names, found, strict=True))
