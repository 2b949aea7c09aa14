"""Models on text: the next symbol from those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmeta.errors import FedmetaError
from fedmeta.models.layers import DEFAULTS, Shape, widths


def char_lstm(
    shape: Shape,
    outputs: int,
    hidden: Sequence[int] = widths(DEFAULTS.hidden),
    embedding: int = DEFAULTS.embedding,
    symbols: int = DEFAULTS.symbols,
) -> nn.Module:
    """Returns the stacked LSTM of LEAF's Shakespeare task (Caldas et al. 2018).

    Args:
        shape: (length,) of a row of integer symbol codes.
        outputs: The number of symbols that may come next.
        hidden: The width of each LSTM layer.
        embedding: The width of the symbols' embedding.
        symbols: The number of symbols that rows are made of; 0 for `outputs`.

    Raises:
        FedmetaError: Rows are not sequences.
    """
    if len(shape) != 1:
        raise FedmetaError(
            f'[model] name = "char_lstm" needs rows of symbol codes, one after another, not shape {shape}'
        )
    layers: list[nn.Module] = [nn.Embedding(symbols or outputs, embedding)]
    width = embedding
    for size in hidden:
        layers.append(Lstm(width, size))
        width = size
    return nn.Sequential(*layers, Last(), nn.Linear(width, outputs))


class Lstm(nn.Module):
    """One LSTM layer (Hochreiter and Schmidhuber 1997; forget bias of Gers et al. 2000) made of two linear layers.

    Torch's own cannot be differentiated twice on every device and fails under `vmap` in float64.
    """

    FORGET_BIAS = 1.0

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.inputs = nn.Linear(width, 4 * size)
        self.recurrent = nn.Linear(size, 4 * size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the states [n, length, size] for x [n, length, width]; gates in the order in, forget, cell, out."""
        state = cell = x.new_zeros(x.shape[0], self.size)
        states = []
        for gates in self.inputs(x).unbind(-2):
            enter, forget, candidate, leave = (gates + self.recurrent(state)).chunk(4, -1)
            kept = torch.sigmoid(forget + self.FORGET_BIAS) * cell
            cell = kept + torch.sigmoid(enter) * torch.tanh(candidate)
            state = torch.sigmoid(leave) * torch.tanh(cell)
            states.append(state)
        return torch.stack(states, -2)


class Last(nn.Module):
    """The state after the last symbol."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [n, length, size] at its last place, [n, size]."""
        return x[..., -1, :]
