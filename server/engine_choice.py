"""Which engine a run's nodes compute with: some are asked before the first round, and most decide."""

from __future__ import annotations

import numpy as np
from flwr.serverapp import Grid

from fedmeta.errors import FedmetaError
from fedmeta.messages import FAILURES, QUERY_ENGINE, EngineReply, MessageError
from server.exchange import answers, messages
from server.federation import NO_NODE
from server.round_log import RoundLog
from server.run_state import RunState
from server.sampling import draw_cohort

ASKED_FOR_ENGINE = 3
"""How many nodes are asked which engine is fastest: of three, one cannot choose for all."""


def choose_engine(state: RunState, grid: Grid) -> EngineReply | None:
    """Asks up to three nodes which engine is fastest for the first cohort, and takes the choice of most.

    The budget is the median of those who chose so, and of an even number the lower one of the two in the middle.

    Returns:
        The choice and its figures; None where the experiment names an engine and a budget, or where most do not
        agree: every node then follows its own rule.

    Raises:
        FedmetaError: Every node of the cohort reports that it cannot compute it.
    """
    experiment = state.experiment
    if (state.engine != "auto" and state.budget) or experiment.privacy.secure_aggregation:
        return None  # with secure aggregation every node follows its own rule: its times and memory are its own
    cohort = draw_cohort(state.federation, experiment.server, experiment.runtime.seed, 1)
    homes = state.federation.node_ids[cohort]
    nodes = [node for node in dict.fromkeys(homes.tolist()) if node != NO_NODE]
    arrays = state.arrays()
    for first in range(0, len(nodes), ASKED_FOR_ENGINE):
        asked = nodes[first : first + ASKED_FOR_ENGINE]
        state.log = RoundLog()
        shares = state.federation.by_node(cohort[np.isin(homes, np.array(asked, dtype=np.uint64))])
        sent = messages(grid, QUERY_ENGINE, 1, shares, lambda _, names: state.request(1, names).pack(arrays), state.log)
        found: list[EngineReply] = []
        replies = grid.send_and_receive(sent, timeout=experiment.server.round_timeout)
        for node, content in answers(replies, shares, state.log):
            try:
                found.append(EngineReply.unpack(content))
            except MessageError as error:
                state.log.fail(shares[node], f"bad reply: {error}")
        for answer in found:
            alike = sorted((each for each in found if each.engine == answer.engine), key=lambda each: each.budget)
            if 2 * len(alike) > len(asked):
                state.engine = answer.engine if state.engine == "auto" else state.engine
                state.budget = state.budget or alike[(len(alike) - 1) // 2].budget
                return EngineReply(state.engine, state.budget, answer.seconds)
        codes = {reason.partition(":")[0] for reason in state.log.failed.values()}
        if found or not codes or not codes <= FAILURES.keys():
            return None
    raise FedmetaError(f"no node can compute the first cohort: {state.log.reasons()}; the nodes' logs have the cause")
