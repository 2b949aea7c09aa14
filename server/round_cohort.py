"""Which sites a round asks: by privacy's own draw, uniformly, or by what they send."""

from __future__ import annotations

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmeta.messages import QUERY_NORMS, MessageError, NormsReply
from server.exchange import answers, check_names, messages
from server.round_log import DIVERGED
from server.run_state import RunState
from server.sampling import draw_cohort


def round_cohort(state: RunState, number: int, grid: Grid) -> NDArray[np.int64]:
    """Returns the sites of a round, ascending."""
    if state.privacy:
        return state.privacy.sample(state.federation.training)
    if state.cohorts.plain:
        return draw_cohort(state.federation, state.experiment.server, state.experiment.runtime.seed, number)
    return state.cohorts.draw(state.federation, number, lambda sites: _norms(state, number, sites, grid))


def _norms(state: RunState, number: int, sites: NDArray[np.int64], grid: Grid) -> dict[str, float]:
    """Asks training sites how long their updates are; those whose update is not finite or that fail are absent."""
    shares = state.federation.by_node(sites)
    asked = messages(
        grid, QUERY_NORMS, number, shares, lambda node, names: state.training_content(number, node, names), state.log
    )
    found: dict[str, float] = {}
    replies = grid.send_and_receive(asked, timeout=state.experiment.server.round_timeout)
    for node, content in answers(replies, shares, state.log):
        state.answered(node)
        try:
            reply = NormsReply.unpack(content)
            check_names(reply.names, shares[node])
        except MessageError as error:
            state.log.fail(shares[node], f"bad reply: {error}")
            continue
        for name, norm in zip(reply.names, reply.norms.tolist(), strict=True):
            if np.isfinite(norm):
                found[name] = norm
            else:
                state.log.failed[name] = DIVERGED
    return found
