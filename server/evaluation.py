"""What an evaluation asks of the nodes: every site's figures, and at the end of a run what those are compared with."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigScalar
from numpy.typing import NDArray

from fedmeta.checkpoint import Evaluation
from fedmeta.learners import Learner
from fedmeta.messages import LOSS, EvaluateReply, write_arrays
from fedmeta.problems.problem import own_baselines
from server.adaptation_schedule import AdaptationSchedule, tune_adaptation
from server.strategy import MetaGradientStrategy


class EvaluateFn(Protocol):
    """Asks all nodes for figures of a meta-state."""

    def __call__(self, arrays: ArrayRecord, **how: ConfigScalar) -> EvaluateReply | None:
        """Returns the figures, asked for as `MetaGradientStrategy.configure_evaluate` has it; None where none came."""


def evaluate_all_sites(
    ask: EvaluateFn, strategy: MetaGradientStrategy, learner: Learner, round_number: int, last: bool
) -> tuple[Evaluation, AdaptationSchedule | None] | None:
    """Returns the sites' figures and, where that was chosen, how far they adapted; None where no node answered.

    Args:
        ask: Asks the nodes.
        strategy: Holds the meta-state, and the federation that is asked.
        learner: What the run trains.
        round_number: The last finished round.
        last: Whether the run ends with it: then sites adapt as far as the schedule has it, also solve alone and by the
            problem's own baselines, and send
            sums for pooled figures.
    """
    settings = strategy.experiment.evaluation
    schedule = _schedule(ask, strategy, learner) if last and settings.schedule == "auto" else None
    steps, rate = schedule[:2] if schedule else (learner.evaluation_steps(settings.steps), 1.0)
    # Sums over rows cannot be checked against numbers of rows that the server does not know.
    pooling = learner.problem.on_rows and not strategy.experiment.privacy.secure_aggregation
    reply = ask(strategy.arrays(), steps=steps, rate=rate, gate=settings.gate, pool=last and pooling)
    if reply is None:
        return None
    local: dict[str, NDArray[np.float64]] = {}
    baselines: dict[str, NDArray[np.float64]] = {}
    pooled = reply.pooled
    if last and settings.local_baseline != "none":
        alone = ask(_start_arrays(strategy, learner), baseline="local_only", pool=pooling)
        pooled = {**reply.pooled, **(alone.pooled if alone else {})}
        if alone:
            local = _aligned(alone, reply.names, "method")
        for name in own_baselines(learner.problem):
            other = ask(_start_arrays(strategy, learner), baseline=name)
            if other:
                found = _aligned(other, reply.names)
                baselines |= {f"{name}_{key}": value for key, value in found.items()}
    sites = strategy.federation.indices(reply.names)
    evaluation = Evaluation(
        round_number,
        sites,
        reply.figures,
        reply.chosen,
        local,
        pooled,
        reply.pooled_sites,
        baselines,
        reply.subgroups,
    )
    return evaluation, schedule


def _aligned(
    alone: EvaluateReply, names: tuple[str, ...], counted: str = "evaluations"
) -> dict[str, NDArray[np.float64]]:
    """Returns the figures of sites on their own in the order of `names`; NaN for one that did not answer.

    Args:
        alone: The reply.
        names: The sites.
        counted: What the whole number beside a site's figures is.
    """
    places = {name: place for place, name in enumerate(alone.names)}
    order = np.array([places.get(name, -1) for name in names], dtype=np.int64)
    figures = {key: values[:, -1] for key, values in alone.figures.items()}
    if alone.evaluations:
        figures[counted] = np.array(alone.evaluations, dtype=np.float64)
    return {key: np.where(order >= 0, values[order], np.nan) for key, values in figures.items()}


def _schedule(ask: EvaluateFn, strategy: MetaGradientStrategy, learner: Learner) -> AdaptationSchedule | None:
    """Returns how far sites adapt, by the validation sites; None where there are none or no node answered."""
    if not learner.adapts or not strategy.federation.validation.any():
        return None
    arrays = strategy.arrays()

    def losses_at(rate: float, steps: int) -> NDArray[np.float64] | None:
        reply = ask(arrays, steps=steps, rate=rate, validation=True)
        return reply.figures[LOSS] if reply else None

    return tune_adaptation(losses_at, learner.inner_steps)


def _start_arrays(strategy: MetaGradientStrategy, learner: Learner) -> ArrayRecord:
    """Returns the run's random start, from which sites that are on their own begin."""
    return write_arrays({**learner.init(strategy.experiment.runtime.seed), **strategy.constants})
