"""The score of a run's last meta-state at sites that the run may not have had, whose data are readable here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clients.app import app
from clients.node import learner_for, node_of
from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import EVALUATE, FAILURES, EvaluateReply, RoundRequest, failure
from fedmeta.problems import Metric
from fedmeta.runtime.local import NODE_ID, LocalGrid


class Scored(NamedTuple):
    """The personalized score at some sites.

    Attributes:
        metric: The score.
        values: By site; NaN where it is undefined.
    """

    metric: Metric
    values: dict[str, float]

    def mean(self, names: set[str]) -> float:
        """Returns the mean over those of some sites where the score is defined; NaN where there are none."""
        values = np.array([value for name, value in self.values.items() if name in names])
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def score_at(state: Checkpoint, experiment: Experiment, names: tuple[str, ...]) -> Scored:
    """Scores a run's last meta-state, personalized as the run has it, at some sites.

    Args:
        state: The run's last checkpoint.
        experiment: An experiment whose data hold the sites.
        names: The sites, sorted.

    Raises:
        FedmetaError: The sites cannot be scored.
    """
    grid = LocalGrid(app, experiment)
    learner = learner_for(node_of(grid.context).with_categories(state.categories), state.classes)
    settings = experiment.evaluation
    request = RoundRequest(
        meta_state=state.meta_state,
        round_number=state.round_number,
        classes=state.classes,
        names=names,
        run="values",
        steps=int(state.schedule.get("steps", learner.evaluation_steps(settings.steps))),
        rate=float(state.schedule.get("rate", 1.0)),
        gate=settings.gate,
        engine=state.engine,
        budget=state.budget,
        categories=state.categories,
    )
    (answer,) = grid.send_and_receive([grid.create_message(request.pack(), EVALUATE, NODE_ID, "0")])
    if code := failure(answer.content):
        raise FedmetaError(f"the sites cannot be scored: {FAILURES[code]}")
    metrics = learner.problem.metrics
    reply = EvaluateReply.unpack(answer.content, metrics)
    chosen = reply.figures[metrics[0].name][np.arange(len(names)), reply.chosen]
    return Scored(metrics[0], dict(zip(reply.names, chosen.tolist(), strict=True)))
