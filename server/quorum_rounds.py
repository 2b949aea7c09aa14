"""A round that closes before every site has answered: whom it asks, and what it makes of replies, late ones too."""

from __future__ import annotations

import numpy as np
from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from fedmeta.messages import TRAIN, TrainReply
from server.exchange import messages
from server.federation import NO_NODE, SITE_UNAVAILABLE
from server.lateness import Answer, Lateness, Outstanding, Received, scaled
from server.round_cohort import round_cohort
from server.round_log import RoundLog
from server.round_step import step_along
from server.run_state import RunState
from server.train_replies import train_replies


def quorum_round(state: RunState, number: int, grid: Grid, lateness: Lateness) -> Received:
    """Asks a round's cohort, without the sites that are busy; returns what came before the round closed."""
    state.log = RoundLog()
    cohort = round_cohort(state, number, grid)
    busy = lateness.busy
    free = cohort[np.array([state.federation.names[site] not in busy for site in cohort.tolist()], dtype=bool)]
    # A simulation's one node answers for each site by itself, so that each has its own time.
    parts = [free[place : place + 1] for place in range(len(free))] if getattr(grid, "splits_sites", False) else [free]
    asked: list[tuple[Message, int, tuple[str, ...]]] = []
    for sites in parts:
        shares = state.federation.by_node(sites)
        sent = messages(
            grid,
            TRAIN,
            number,
            shares,
            lambda node, names: state.training_content(number, node, names, per_site=state.per_site),
            state.log,
        )
        for message in sent:
            node = message.metadata.dst_node_id
            asked.append((message, node, shares[node]))
        state.log.fail(shares.get(NO_NODE, ()), SITE_UNAVAILABLE)
    return lateness.receive(grid, asked, number)


def step_by_quorum(state: RunState, number: int, received: Received, lateness: Lateness) -> MetricRecord | None:
    """Steps along what came before the round closed; returns what `server.round_step.step_along` does."""
    state.log.late = {**received.missing, **received.dropped}
    usable = [reply for each, answer in received.on_time for reply in _usable(state, each, answer)]
    for each, answer in received.late:
        factor = lateness.staleness(each, number)
        usable += [scaled(reply, factor) for reply in _usable(state, each, answer)]
    return step_along(state, usable)


def _usable(state: RunState, each: Outstanding, answer: Answer) -> list[TrainReply]:
    """Returns a reply where it is what it should be; one that a checkpoint kept was checked before."""
    if isinstance(answer, TrainReply):
        return [answer]
    return train_replies(state, [answer], {each.node: each.names})
