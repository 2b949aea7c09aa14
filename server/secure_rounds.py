"""Rounds and evaluations with secure aggregation: the server learns the sum over sites, and steps by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmeta.messages import MASKED_EVALUATE, MASKED_TRAIN
from fedmeta.messages.secure import SCORE_GROUPS, TAIL, scores_size
from fedmeta.secure.graph import FEWEST
from fedmeta.secure.ring import decode, decode_wide
from server.aggregation import Gradient
from server.round_cohort import round_cohort
from server.round_log import DIVERGED, UNDONE, RoundLog
from server.round_step import step
from server.run_state import RunState
from server.sampling import sites_to_evaluate
from server.secure_sum import SecureSum, secure_sum


def secure_round(state: RunState, number: int, grid: Grid) -> MetricRecord | None:
    """Runs a round whose replies the server sees as their sum alone.

    Returns:
        The round's query loss and the number of its sites; None where there is no sum, or the step along it was undone.
    """
    state.log = log = RoundLog()
    shares = state.federation.by_node(round_cohort(state, number, grid))
    template = {name: state.template[name] for name in sorted(state.template)}
    sizes = [*(value.numel() for value in template.values()), *[1] * len(TAIL)]
    home = {name: node for node, names in shares.items() for name in names}
    found = secure_sum(
        grid,
        shares,
        state.experiment,
        f"{state.run} train {number}",
        MASKED_TRAIN,
        lambda names: state.training_content(number, home[names[0]], names),
        sum(sizes),
    )
    _note(log, found)
    if found.total is None:
        return None
    sums = torch.from_numpy(decode(found.total, state.experiment.privacy.quantum))
    *flat, weight, count, loss, counted = torch.split(sums, sizes)
    gradient = {name: own.reshape(template[name].shape) for name, own in zip(template, flat, strict=True)}
    total, num_ok = float(weight), round(float(count))
    log.took_part = found.left
    for node in {home[name] for name in found.left}:
        state.answered(node)
    if num_ok < len(found.left):
        log.failed["of the sum"] = f"{len(found.left) - num_ok} of {len(found.left)} sites: {DIVERGED}"
    mean: Gradient | None = None
    if state.privacy:
        mean = state.privacy.release_noised(gradient)
    elif num_ok >= max(1, state.experiment.server.min_sites) and total > 0:
        mean = {name: value / total for name, value in gradient.items()}
    if mean is None:
        return None
    if not step(state, mean, total):
        log.undone = True
        log.took_part = ()
        log.fail(found.left, UNDONE)
        return None
    metrics = {"query_loss": float(loss) / round(float(counted))} if round(float(counted)) else {}
    return MetricRecord({**metrics, "sites": num_ok})


def secure_scores(state: RunState, number: int, grid: Grid, **how: Any) -> NDArray[np.float64] | None:
    """Returns the sums of an evaluation by group of sites [groups, numbers]; None where too few were left.

    A group of fewer than three sites is left out: its sums would be those of one or two.

    Args:
        state: The run.
        number: The last finished round.
        grid: Flower's grid.
        how: Steps, rate and gate as in `RoundRequest`.
    """
    state.log = log = RoundLog()
    sites = sites_to_evaluate(state.federation, state.experiment.evaluation.sites, state.experiment.runtime.seed)
    group_of = state.federation.groups(sites)
    small = {group for group, count in Counter(group_of.values()).items() if count < FEWEST}
    arrays, size = state.arrays(), scores_size(len(state.learner.problem.metrics))

    def request(names: tuple[str, ...]) -> RecordDict:
        groups = tuple(-1 if group_of[name] in small else group_of[name] for name in names)
        return state.request(number, names, groups=groups, **how).pack(arrays)

    context = f"{state.run} evaluate {number}"
    shares = state.federation.by_node(sites)
    found = secure_sum(grid, shares, state.experiment, context, MASKED_EVALUATE, request, 2 * size)
    _note(log, found)
    if found.total is None:
        return None
    return decode_wide(found.total, state.experiment.privacy.quantum).reshape(SCORE_GROUPS, -1)


def _note(log: RoundLog, found: SecureSum) -> None:
    log.bytes_down, log.bytes_up, log.failed = found.bytes_down, found.bytes_up, found.failed
    log.skipped = found.why
