"""A federation in time: when a block of rows joins, what a run in time is refused with, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.data.stream_split import step_of
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import GROUPS
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.problems import Metric
from server.federation import Federation

Ints = NDArray[np.int64]


def steps_of(experiment: Experiment) -> int:
    """Returns how many blocks a run scores; 0 where its rows do not come in time."""
    if not experiment.stream.block or not experiment.evaluation.every:
        return 0
    return step_of(experiment.server.rounds, experiment.evaluation.every) + 1


def rows_at(experiment: Experiment, federation: Federation, sites: Ints, round_number: int) -> tuple[Ints, Ints]:
    """Returns how many train and test rows some sites have at a round's evaluation."""
    train, test = federation.train_rows[sites], federation.test_rows[sites]
    if not steps_of(experiment):
        return train, test
    joined = step_of(round_number, experiment.evaluation.every) * experiment.stream.block
    so_far = train + np.minimum(test, joined)
    return so_far, np.minimum(train + test - so_far, experiment.stream.block)


def holds(experiment: Experiment, round_number: int) -> bool:
    """Returns whether the meta-state stays as it is in a round, because it has learned from enough blocks."""
    learn = experiment.stream.learn if experiment.stream.block else 0
    return bool(learn) and step_of(round_number, experiment.evaluation.every) >= learn


def check(experiment: Experiment, learner: Learner, federation: Federation) -> list[str]:
    """Returns notes on what a stream leaves out.

    Raises:
        FedmetaError: The run cannot be one in time; the message has the reason.
    """
    stream, evaluation = experiment.stream, experiment.evaluation
    if not stream.block:
        return []
    rules = (
        (not learner.problem.on_rows or experiment.data.ways, "rows come in blocks, and tasks of a source do not"),
        (experiment.data.split != "time", 'needs data.split = "time": the rows of a site are in time'),
        (not evaluation.every, "needs evaluation.every above 0: after so many rounds the next block scores and joins"),
        (not experiment.server.rounds, "needs server.rounds above 0"),
        (
            experiment.steered or evaluation.schedule == "auto",
            "patience, until, order and schedule compare evaluations, and each one of a stream is of other rows",
        ),
        (
            experiment.privacy.secure_aggregation,
            "with privacy.secure_aggregation: the server does not know how many rows a site has",
        ),
        (
            stream.memory == "discount" and learner.minibatches is not None,
            f'memory = "discount": {experiment.learner.name} takes all rows of a site in epochs: take "window"',
        ),
    )
    for broken, reason in rules:
        if broken:
            raise FedmetaError(f"[stream] block = {stream.block}: {reason}")
    blocks = np.ceil(federation.test_rows / stream.block).astype(np.int64)
    steps, most = steps_of(experiment), int(blocks.max(initial=0))
    if most < steps:
        least = f"at most {most * evaluation.every}" if most else "fewer, with smaller first and block"
        raise FedmetaError(
            f"[stream] block = {stream.block}: {experiment.server.rounds} rounds, with a block after every "
            f"{evaluation.every}, need {steps} blocks, and the longest site has {most} after its first "
            f"{stream.first_rows} rows: set server.rounds to {least}"
        )
    notes = []
    if most > steps:
        notes.append(f"the stream ends after {steps} blocks of {stream.block} rows: the longest site has {most}")
    short = int((blocks < steps).sum())
    if short:
        notes.append(f"{short} of {len(blocks)} sites have fewer than {steps} blocks, and are scored until they end")
    return notes


def summarize_stream(
    experiment: Experiment,
    frames: Sequence[pd.DataFrame],
    hindsight: Mapping[int, pd.DataFrame],
    score: Metric,
    alarms: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns what a run in time came to.

    Args:
        experiment: The run's description.
        frames: The evaluation of each step.
        hindsight: By step the same by the last meta-state; empty where that was not asked for.
        score: The headline metric.
        alarms: Each alarm: site, step and row.

    Returns:
        By group of sites the mean over sites of each block, "global", "personalized" and "loss", the mean over blocks
        and sites ("mean"), and where there is hindsight its loss by block and the regret: the sum over blocks of the
        mean loss beyond it.
    """
    found: dict[str, Any] = {
        "block": experiment.stream.block,
        "blocks": len(frames),
        "memory": experiment.stream.memory,
        "alarms": [dict(alarm) for alarm in alarms],
    }
    columns = {"global": f"global_{score.name}", "personalized": f"personalized_{score.name}"}
    columns |= {"global_loss": "global_loss", "loss": "personalized_loss"}
    for kind, group in GROUPS.items():
        own = [_of(frame, kind) for frame in frames]
        curves = {name: [_mean(part[column]) for part in own] for name, column in columns.items()}
        entry: dict[str, Any] = {"sites": [len(part) for part in own], **curves}
        entry["mean"] = {
            name: _mean(pd.concat([part[column] for part in own])) if own else None for name, column in columns.items()
        }
        if hindsight:
            later = [hindsight.get(step) for step in range(len(frames))]
            entry["hindsight_loss"] = [
                None if frame is None else _mean(_of(frame, kind)["personalized_loss"]) for frame in later
            ]
            entry["regret"] = regret(entry["loss"], entry["hindsight_loss"])
        found[group] = entry
    return found


def regret(losses: Sequence[float | None], hindsight: Sequence[float | None]) -> float | None:
    """Returns the sum over blocks of the loss beyond that in hindsight, of those that have both; None for none."""
    beyond = [
        own - other for own, other in zip(losses, hindsight, strict=True) if own is not None and other is not None
    ]
    return float(sum(beyond)) if beyond else None


def _of(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Returns the sites of a kind that have rows in a block."""
    return frame[(frame["kind"] == kind) & (frame["test_rows"] > 0)]


def _mean(values: pd.Series) -> float | None:
    mean = float(values.mean()) if len(values) else math.nan
    return mean if math.isfinite(mean) else None
