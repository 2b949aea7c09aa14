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

from fedmeta.messages import TrainReply

WINDOW = 64
"""How many accepted replies are remembered."""

FIRST = 10
"""From which reply on there is a bound."""


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
    squares = [value.double().square().sum() for value in reply.gradient.values()]
    return float(torch.stack(squares).sum().sqrt()) / reply.weight


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
