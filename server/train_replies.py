"""What nodes send in a round, checked: replies that are what they should be count, the others are named."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import Message

from fedmeta.messages import MessageError, TrainReply
from fedmeta.messages.compressed import unpack_reply
from server.exchange import Shares, answers, check_names
from server.round_log import DIVERGED, WEIGHTLESS
from server.run_state import RunState


def train_replies(state: RunState, replies: Iterable[Message], shares: Shares) -> list[TrainReply]:
    """Returns the replies that are what they should be; names the sites of the others, and those left out.

    Args:
        state: The run.
        replies: The replies as they came.
        shares: The sites that each node was asked about.
    """
    server, log = state.experiment.server, state.log
    usable: list[TrainReply] = []
    for node, content in answers(replies, shares, log):
        state.answered(node)
        try:
            if server.compression != "none":
                reply = unpack_reply(content, state.template, server.compression, server.compression_keep)
                reply = reply if state.per_site else _summed(state, reply)
            else:
                reply = TrainReply.unpack(content, state.template, state.per_site)
            check_names(reply.names, shares[node])
            _check_weight(state, reply)
            if state.privacy:
                state.privacy.check(reply)
        except MessageError as error:
            log.fail(shares[node], f"bad reply: {error}")
            continue
        log.fail((name for name, finite in zip(reply.names, reply.finite, strict=True) if not finite), DIVERGED)
        # What a reply holds beside sites that count for nothing must have no effect.
        if not reply.finite.any():
            continue
        if reply.weight == 0:
            log.fail(shares[node], WEIGHTLESS)
            continue
        usable.append(reply)
    return usable


def _check_weight(state: RunState, reply: TrainReply) -> None:
    """Checks a reply's weight: one for each site in the sum, or the weight that it announced when it joined."""
    finite = [name for name, whole in zip(reply.names, reply.finite, strict=True) if whole]
    announced = float(state.weights(finite).sum())
    if abs(reply.weight - announced) > 1e-9 * max(1.0, announced):
        raise MessageError("its weight is not that of its sites as they announced it")


def _summed(state: RunState, reply: TrainReply) -> TrainReply:
    """Returns sites' own gradients as the weighted sum that a node sends where nothing is packed."""
    weights = torch.from_numpy(state.weights(reply.names) * reply.finite)
    gradient = {name: torch.tensordot(weights, value.double(), dims=1) for name, value in reply.gradient.items()}
    return TrainReply(gradient, reply.weight, reply.names, reply.query_loss, reply.finite)
