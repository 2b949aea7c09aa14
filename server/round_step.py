"""A round's step: what its replies are bounded to, what the aggregator makes of them, and whether the step stands."""

from __future__ import annotations

import logging

import numpy as np
from flwr.app import MetricRecord

from fedmeta.learners.learner import key_of
from fedmeta.messages import TrainReply
from fedmeta.problems.problem import has_outer_step
from server import influence
from server.aggregation import Gradient, aggregate_replies
from server.cohorts import by_site
from server.probes import compared
from server.round_log import UNDONE
from server.run_state import RunState

LOSS_EXCESS = 1e3
"""How many times the usual a site's query loss may be to be in a round's mean."""


def step_along(state: RunState, usable: list[TrainReply], probed: Gradient | None = None) -> MetricRecord | None:
    """Steps the meta-state along what the aggregator makes of the replies' meta-gradients.

    Args:
        state: The run.
        usable: The replies that count.
        probed: The round's gradient in another order, to be compared with.

    Returns:
        The round's query loss and the number of its sites; None where fewer than `server.min_sites` sites gave a usable
        gradient, or fewer than the aggregator needs, or the step would make the meta-state infinite, which then stays
        as it is. A private round always steps, and has no loss where no site was drawn.
    """
    server = state.experiment.server
    if not state.cohorts.plain:
        usable = by_site(usable, state.experiment, state.federation)
    norms = state.norms
    if server.aggregator == "mean" and not state.privacy:
        usable, norms = _bounded(state, usable)
    num_ok = sum(int(reply.finite.sum()) for reply in usable)
    gradient: Gradient | None = None
    if state.privacy:
        gradient = state.privacy.release(usable, state.template)
    elif num_ok >= max(1, server.min_sites) and not state.cohorts.plain:
        gradient = state.cohorts.aggregate(usable, state.federation)
    elif num_ok >= max(1, server.min_sites):
        gradient = aggregate_replies(usable, server)
    if gradient is None:
        return None
    if probed is not None:
        state.compared = compared(state, gradient, probed)
    if not step(state, gradient, sum(reply.weight for reply in usable)):
        state.log.undone = True
        state.log.fail((name for reply in usable for name in reply.names), UNDONE)
        return None
    state.norms = norms
    state.log.took_part = tuple(
        name for reply in usable for name, finite in zip(reply.names, reply.finite, strict=True) if finite
    )
    return MetricRecord({**_mean_loss(state, usable), "sites": num_ok})


def step(state: RunState, mean: Gradient, weight: float) -> bool:
    """Steps the meta-state along the sites' mean, or by the problem's own step where it has one.

    Returns:
        Whether the step stands; one that is not finite, or a step of the problem's that fails, is undone.
    """
    problem = state.learner.problem
    if not has_outer_step(problem):
        stands = state.optimizer.step_if_finite(mean, state.share(weight) if state.learner.averaged else 1.0)
        state.stepped()
        return stands
    before = state.meta_state
    whole = state.learner.theta(before)
    total = {name: value * weight for name, value in mean.items()}
    try:
        stepped = problem.outer_step(whole, total, weight)
    except Exception as error:  # whatever a user's own code makes of what sites sent
        logging.getLogger("fedmeta.server").warning("outer_step failed: %s: %s", type(error).__name__, error)
        return False
    changed = {key_of(before, name): value.to(whole[name].dtype) for name, value in stepped.items()}
    if not all(bool(value.isfinite().all()) for value in changed.values()):
        return False
    state.replace({name: changed.get(name, value) for name, value in state.optimizer.meta_state.items()})
    return True


def _mean_loss(state: RunState, replies: list[TrainReply]) -> dict[str, float]:
    """Returns the mean query loss of the sites that count, without those that are far out of the ordinary."""
    names = [name for reply in replies for name, finite in zip(reply.names, reply.finite, strict=True) if finite]
    if not names:
        return {}
    losses = np.concatenate([reply.query_loss[reply.finite] for reply in replies])
    far = influence.outlying(losses, LOSS_EXCESS)
    why = f"its query loss is more than {LOSS_EXCESS:g} times the usual, and is not in the mean"
    state.log.outlying = dict.fromkeys([names[place] for place in np.flatnonzero(far).tolist()], why)
    return {"query_loss": float(np.mean(losses[~far]))}


def _bounded(state: RunState, replies: list[TrainReply]) -> tuple[list[TrainReply], tuple[float, ...]]:
    """Bounds what each reply does (`server.influence`); returns those that count, and the norms to remember.

    Statistics that a problem makes its own step of cannot be shortened: beyond the square of the bound, for they
    grow with a site's rows, they are refused.
    """
    cap = state.experiment.server.norm_cap
    own_step = has_outer_step(state.learner.problem)
    found = influence.bound(replies, state.norms, cap**2 if own_step else cap, shorten=not own_step)
    for place, times in found.excess.items():
        what = f"its reply was {times:.3g} times as long as server.norm_cap = {cap:g} allows, and was"
        names = replies[place].names
        if own_step:
            state.log.fail(names, f"{what} refused")
        else:
            state.log.shortened.update(dict.fromkeys(names, f"{what} shortened"))
    return found.replies, found.norms
