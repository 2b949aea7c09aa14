"""What nodes send in an evaluation, checked against what is possible, and put together in site order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedmeta.messages import LOSS, EvaluateReply, MessageError
from fedmeta.problems import Problem, Supervised
from fedmeta.problems.pooled import impossible as pooled_impossible
from server import influence
from server.exchange import Shares, answers, check_names
from server.run_state import RunState

STATES = ("global", "personalized")
"""Before and after adaptation, as pooled sums name it."""

FIGURE_EXCESS = 1e6
"""How many times the usual a site's figure may be in an evaluation of several nodes."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation asked.

    Attributes:
        shares: The sites that each node was asked about.
        columns: How many values of each figure a site sends: after 0, 1, ... steps.
        states: Of which states sites send pooled sums.
        groups: The group of sites whose rows a site's are pooled with; empty where no sums are asked for.
        subgroups: How many subgroups of test rows sites are asked for, too.
    """

    shares: Shares = field(default_factory=dict)
    columns: int = 1
    states: tuple[str, ...] = STATES
    groups: Mapping[str, int] = field(default_factory=dict)
    subgroups: int = 0


def evaluation_replies(state: RunState, replies: Iterable[Message], asked: Asked) -> EvaluateReply | None:
    """Returns the sites' figures of all replies that are possible, in site order; None where there are none.

    Args:
        state: The run; its log names the sites of the other replies.
        replies: The replies as they came.
        asked: What was asked.
    """
    usable: list[EvaluateReply] = []
    for node, content in answers(replies, asked.shares, state.log):
        try:
            reply = EvaluateReply.unpack(content, state.learner.problem.metrics)
            check_names(reply.names, asked.shares[node])
            if reply.columns != asked.columns:
                raise MessageError("it has scores of other steps than asked")
            _check_pooled(state, reply, asked)
            _check_subgroups(state, reply, asked)
        except MessageError as error:
            state.log.fail(asked.shares[node], f"bad reply: {error}")
            continue
        refused = reply.impossible(_ranges(state.learner.problem))
        state.log.failed.update({name: f"bad reply: {what}" for name, what in refused.items()})
        if len(refused) < len(reply.names):
            usable.append(reply.without(refused) if refused else reply)
    usable = _without_outliers(state, usable, asked.columns)
    return _together(usable) if usable else None


def _together(replies: Sequence[EvaluateReply]) -> EvaluateReply:
    """Returns the replies of several nodes as one, in site order."""
    names = [name for reply in replies for name in reply.names]
    order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
    pooled: dict[str, NDArray[np.float64]] = {}
    for reply in replies:
        for name, value in reply.pooled.items():
            pooled[name] = pooled[name] + value if name in pooled else value
    counts = np.zeros(max(len(reply.pooled_sites) for reply in replies), dtype=np.int64)
    for reply in replies:
        counts[: len(reply.pooled_sites)] += np.array(reply.pooled_sites, dtype=np.int64)
    return EvaluateReply(
        names=tuple(names[index] for index in order),
        figures={
            name: np.concatenate([reply.figures[name] for reply in replies])[order] for name in replies[0].figures
        },
        chosen=np.concatenate([reply.chosen for reply in replies])[order],
        pooled=pooled,
        pooled_sites=tuple(counts.tolist()),
        evaluations=_in_order([reply.evaluations for reply in replies], order),
        alarms=_in_order([reply.alarms for reply in replies], order),
        subgroups=_subgroups(replies, order),
    )


def _subgroups(replies: Sequence[EvaluateReply], order: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Returns the figures of sites' subgroups in site order; 0 rows and NaN for sites that sent none."""
    found = {}
    for name, own in next((reply.subgroups for reply in replies if reply.subgroups), {}).items():
        empty = 0.0 if name == "rows" else np.nan
        parts = [reply.subgroups.get(name, np.full((len(reply.names), own.shape[1]), empty)) for reply in replies]
        found[name] = np.concatenate(parts)[order]
    return found


def _in_order(counts: Sequence[tuple[int, ...]], order: NDArray[np.int64]) -> tuple[int, ...]:
    """Returns the count that each reply has of each of its sites in site order; nothing where one reply has none."""
    if not all(counts):
        return ()
    every = np.concatenate([np.array(own, dtype=np.int64) for own in counts])
    return tuple(every[order].tolist())


def _ranges(problem: Problem) -> dict[str, tuple[float, float]]:
    """Returns the range of each figure of a site; the loss on rows, where it is the usual one, is at least 0."""
    low = 0.0 if isinstance(problem, Supervised) and problem.plain else -np.inf
    return {LOSS: (low, np.inf), **{metric.name: (metric.low, metric.high) for metric in problem.metrics}}


def _without_outliers(state: RunState, replies: list[EvaluateReply], columns: int) -> list[EvaluateReply]:
    """Returns the replies of several nodes without sites whose figures are far out of the ordinary; names these."""
    if len(replies) < influence.FEWEST_TO_COMPARE:
        return replies
    refused: dict[str, str] = {}
    names = [name for reply in replies for name in reply.names]
    for figure in replies[0].figures:
        for column in range(columns):
            values = np.concatenate([reply.figures[figure][:, column] for reply in replies])
            for place in np.flatnonzero(influence.outlying(values, FIGURE_EXCESS)).tolist():
                why = f"bad reply: its {figure} is more than {FIGURE_EXCESS:g} times the usual"
                refused.setdefault(names[place], why)
    state.log.failed.update(refused)
    kept = (reply.without(refused) if refused.keys() & set(reply.names) else reply for reply in replies)
    return [reply for reply in kept if reply.names]


def _check_pooled(state: RunState, reply: EvaluateReply, asked: Asked) -> None:
    """Checks that the pooled sums are of the groups asked for, and possible for their rows."""
    of_group: dict[int, list[str]] = {}
    for name in reply.names:
        of_group.setdefault(asked.groups.get(name, -1), []).append(name)
    sums: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    for key, value in reply.pooled.items():
        group, _, rest = key.partition("/")
        which, _, name = rest.partition("/")
        whole, part = which.partition("@")[::2]
        known = whole in asked.states and ("@" not in which or part in map(str, range(asked.subgroups)))
        if group not in {str(place) for place in of_group if place >= 0} or not known:
            raise MessageError("its pooled sums are of groups that were not asked for")
        sums.setdefault((group, which), {})[name] = value
    for place, count in enumerate(reply.pooled_sites):
        if count > len(of_group.get(place, ())):
            raise MessageError("more sites are pooled than there are")
    federation = state.federation
    for (group, _), found in sums.items():
        rows = float(federation.test_rows[federation.indices(of_group[int(group)])].sum())
        rows = np.inf if state.experiment.data.ways else rows  # few-shot tasks draw rows more than once
        classes, targets = len(federation.classes), len(federation.targets)
        if problem := pooled_impossible(found, state.learner.problem.metrics, classes, targets, rows):
            raise MessageError(f"its pooled sums are not possible: {problem}")


def _check_subgroups(state: RunState, reply: EvaluateReply, asked: Asked) -> None:
    """Checks that the figures of subgroups are of those asked for, and possible for the sites' test rows."""
    if not reply.subgroups:
        return
    rows = reply.subgroups["rows"]
    if rows.shape[1] != asked.subgroups:
        raise MessageError("its subgroups are not those that were asked for")
    most = state.federation.test_rows[state.federation.indices(reply.names)][:, None]
    if ((rows > 0) & (rows < state.experiment.evaluation.smallest_subgroup)).any() or (rows > most).any():
        raise MessageError("a subgroup has fewer rows than may be shown, or more than its site")
    score = state.learner.problem.metrics[0]
    for which in STATES:
        scores = reply.subgroups[which]
        outside = (scores < score.low - 1e-6) | (scores > score.high + 1e-6)
        if outside.any() or np.isfinite(scores[rows == 0]).any():
            raise MessageError(f"the {score.name} of a subgroup cannot be")
