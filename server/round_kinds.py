"""A round of any kind in two parts: what nodes are asked, which a user may interrupt, and the step, which is whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from server.lateness import Lateness, Received
from server.quorum_rounds import quorum_round, step_by_quorum
from server.secure_rounds import secure_round
from server.strategy import MetaGradientStrategy


@dataclass(frozen=True)
class Gathered:
    """A round that waits for its step.

    Attributes:
        step: Makes the step; returns the round's query loss and number of sites, None where nothing was changed.
        late: With a quorum, what came before the round closed.
        seconds: How long the cohort took.
        probe_seconds: How long it took in the other order; None where there was no probe.
    """

    step: Callable[[], MetricRecord | None]
    late: Received | None = None
    seconds: float = 0.0
    probe_seconds: float | None = None


def gather(strategy: MetaGradientStrategy, number: int, grid: Grid, lateness: Lateness | None, other: str) -> Gathered:
    """Asks a round's cohort, as the experiment has it.

    Args:
        strategy: Holds the meta-state.
        number: The round.
        grid: Flower's grid.
        lateness: Where rounds close before every site has answered: whose answers are outstanding.
        other: In which other order the cohort is computed too; "" for none.
    """
    if strategy.experiment.privacy.secure_aggregation:
        return Gathered(lambda: secure_round(strategy, number, grid))
    if lateness:
        received = quorum_round(strategy, number, grid, lateness)
        return Gathered(lambda: step_by_quorum(strategy, number, received, lateness), received)
    asked = time.perf_counter()
    messages = strategy.configure_train(number, strategy.arrays(), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages, timeout=strategy.experiment.server.round_timeout))
    answered = time.perf_counter()
    if other:
        strategy.probe(number, other, grid)
    probed = time.perf_counter()
    return Gathered(
        lambda: strategy.aggregate_train(number, replies)[1],
        seconds=answered - asked,
        probe_seconds=probed - answered if other else None,
    )
