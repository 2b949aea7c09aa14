"""How much one reply may move the meta-state under the mean: what is much longer than usual is shortened.

One reply of a thousand times the usual length stays for hundreds of rounds in the memory of an optimizer that keeps
squares. So the norm of each reply's sum, divided by its weight, is compared with what is usual: the median over the
replies accepted lately and those of the round. The bound is generous. It is no robust aggregator: it bounds what one
reply does, and leaves honest replies as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedmeta.messages import TrainReply

WINDOW = 64
"""How many accepted replies are remembered."""

FIRST = 10
"""From which reply on there is a bound."""

FEWEST_TO_COMPARE = 3
"""From how many figures on they are compared: of two, nothing shows which one is usual."""


@dataclass(frozen=True)
class Bounded:
    """A round's replies after the bound.

    Attributes:
        replies: Those that count, each no longer than the bound.
        norms: The norms to remember for the next round, the newest last.
        excess: By place among the replies given: how many times longer than the bound a reply was.
    """

    replies: list[TrainReply]
    norms: tuple[float, ...]
    excess: dict[int, float]


def norm_of(reply: TrainReply) -> float:
    """Returns the norm of a reply's mean, its sum divided by its weight, over all entries in float64."""
    norms = [torch.linalg.vector_norm(value, dtype=torch.float64) for value in reply.gradient.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) / reply.weight


def bound(replies: Sequence[TrainReply], norms: Sequence[float], factor: float, *, shorten: bool = True) -> Bounded:
    """Bounds the norm of each reply's mean by a multiple of what is usual.

    Args:
        replies: A round's replies, each with a weight above 0.
        norms: The norms of replies accepted before, the newest last; zeros are not among them.
        factor: The bound, in multiples of the median of `norms` and this round's norms; 0 = none.
        shorten: Whether a longer reply is shortened to the bound; else it is left out.
    """
    found = [norm_of(reply) for reply in replies]
    usual = [*norms, *(norm for norm in found if norm > 0)]
    if not factor or len(usual) < FIRST:
        return Bounded(list(replies), tuple(usual[-WINDOW:]) if factor else (), {})
    longest = factor * float(np.median(usual))
    excess = {place: norm / longest for place, norm in enumerate(found) if norm > longest}
    kept = [
        _scaled(reply, 1 / excess[place]) if place in excess else reply
        for place, reply in enumerate(replies)
        if shorten or place not in excess
    ]
    accepted = [min(norm, longest) for norm in found if norm > 0 and (shorten or norm <= longest)]
    return Bounded(kept, tuple([*norms, *accepted][-WINDOW:]), excess)


def _scaled(reply: TrainReply, factor: float) -> TrainReply:
    return replace(reply, gradient={name: value.double() * factor for name, value in reply.gradient.items()})


def outlying(values: NDArray[np.float64], factor: float) -> NDArray[np.bool_]:
    """Returns which of some figures [sites] are larger than `factor` times the median size, which is 1 at least.

    Args:
        values: A figure of each site; NaN, for undefined, is not large.
        factor: How many times.
    """
    sizes = np.abs(values)
    known = sizes[~np.isnan(sizes)]
    if len(known) < FEWEST_TO_COMPARE:
        return np.zeros(len(values), dtype=bool)
    large: NDArray[np.bool_] = sizes > factor * max(1.0, float(np.median(known)))
    return large
