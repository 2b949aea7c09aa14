"""What an evaluation asks of the nodes: every site's scores, and at the end of a run what those are held against."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigScalar
from numpy.typing import NDArray

from fedmeta.checkpoint import Evaluation
from fedmeta.learners import Learner
from fedmeta.messages import EvaluateReply
from server.adaptation_schedule import Schedule, tune_adaptation
from server.strategy import MetaGradientStrategy


class Ask(Protocol):
    """Asks all nodes for scores of a meta-state."""

    def __call__(self, arrays: ArrayRecord, **how: ConfigScalar) -> EvaluateReply | None:
        """Returns the scores, asked for as `MetaGradientStrategy.configure_evaluate` says; None where none came."""


def scores(
    ask: Ask, strategy: MetaGradientStrategy, learner: Learner, round_number: int, last: bool
) -> tuple[Evaluation, Schedule | None] | None:
    """Returns the sites' scores and, where that was chosen, how far they adapted; None where nobody answered.

    Args:
        ask: Asks the nodes.
        strategy: Holds the meta-state, and the federation that is asked.
        learner: What the run trains.
        round_number: The last finished round.
        last: Whether the run ends with it: then sites adapt as far as the schedule says, and also train alone.
    """
    settings = strategy.experiment.evaluation
    schedule = _schedule(ask, strategy, learner) if last and settings.schedule == "auto" else None
    steps, rate = schedule[:2] if schedule else (learner.evaluation_steps(settings.steps), 1.0)
    reply = ask(strategy.arrays(), steps=steps, rate=rate, gate=settings.gate)
    if reply is None:
        return None
    # A site on its own trains whatever the learner or the schedule says of adapting, as FedAvg's sites never do.
    own_steps = max(steps, settings.steps or learner.inner_steps)
    alone = ask(_start_arrays(strategy, learner), steps=own_steps, reference=True) if last else None
    reference = np.full(len(reply.names), np.nan)
    if alone and alone.names == reply.names:
        reference = alone.scores[:, -1]
    sites = strategy.federation.indices(reply.names)
    figures = (reply.scores, reply.losses, reply.calibration, reply.chosen, reference)
    return Evaluation(round_number, sites, *figures), schedule


def _schedule(ask: Ask, strategy: MetaGradientStrategy, learner: Learner) -> Schedule | None:
    """Returns how far sites adapt, by the validation sites; None where there are none or nobody answered."""
    if not learner.adapts or not strategy.federation.validation.any():
        return None
    arrays = strategy.arrays()

    def losses_at(rate: float, steps: int) -> NDArray[np.float64] | None:
        reply = ask(arrays, steps=steps, rate=rate, validation=True)
        return reply.losses if reply else None

    return tune_adaptation(losses_at, learner.inner_steps)


def _start_arrays(strategy: MetaGradientStrategy, learner: Learner) -> ArrayRecord:
    """Returns the run's random start, from which sites that are on their own train."""
    start = learner.init(strategy.experiment.runtime.seed)
    return ArrayRecord.from_torch_state_dict({**start, **strategy.constants})
