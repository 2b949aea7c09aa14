"""Finds what a report is about: a run's files, a comparison's, or several runs to be set beside one another."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from fedmeta import checkpoint
from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.problems.metric import metric_of
from fedmeta.runtime import result_of
from fedmeta.search.comparison import Comparison, build_table
from fedmeta.search.trial import Trial
from fedmeta.tracking import mlflow_client
from fedmeta.tracking.mlflow_client import SITES, SUMMARY, sqlite_file
from fedmeta.tracking.parent_run import KEPT
from fedmeta.tracking.plots import FOLDER, own_pictures

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        summary: The JSON object of the command line.
        history: Every evaluation, one row per site and evaluation.
        experiment: Its description.
        checkpoint: Its last state.
        folder: Where its files are; None where they came from a store.
        pictures: PNG files that its problem drew, by name.
    """

    summary: dict[str, Any]
    history: pd.DataFrame
    experiment: Experiment
    checkpoint: Checkpoint
    folder: Path | None
    pictures: Mapping[str, bytes]


@dataclass(frozen=True)
class Compared:
    """A comparison and those of its runs whose files were found, by their ids.

    Attributes:
        found: The comparison.
        runs: Its runs.
        command: Whether `fedmeta compare` made it; otherwise the runs were named for this report.
        folder: Where its files are; None where they came from a store, or where there are none.
    """

    found: Comparison
    runs: dict[str, Run]
    command: bool
    folder: Path | None


def read(names: Sequence[str], root: Path, uri: str) -> Run | Compared:
    """Returns what a report is about.

    Args:
        names: A run's folder or that folder's name, its checkpoint, or its MLflow id; a comparison's folder or MLflow
            id; or several runs.
        root: The folder of all runs.
        uri: The MLflow store that is asked for what is not found there.

    Raises:
        FedmetaError: There is no such run or comparison, it has not ended, or they are on different data.
    """
    folders = _folders(root)
    found = [_one(name, root, uri, folders) for name in names]
    if len(found) == 1:
        return found[0]
    runs = [one for one in found if isinstance(one, Run)]
    if len(runs) < len(found):
        raise FedmetaError("a report is about one comparison or about runs; make one for each")
    return _beside(runs)


def _one(name: str, root: Path, uri: str, folders: dict[str, Path]) -> Run | Compared:
    path = Path(name)
    places = [path.parent if path.is_file() else path, root / name]
    if name in folders:
        places.append(folders[name])
    for place in places:
        if (place / COMPARISON).is_file():
            return _comparison(place, folders, place)
        if (place / SUMMARY).is_file():
            return _run(place, place)
        if next(place.glob("round-*.safetensors"), None):
            again = f"fedmeta run FILE.toml --resume {shlex.quote(str(name))}"
            raise FedmetaError(f"{place}: the run has not ended; resume it: {again}")
    file = sqlite_file(uri)
    if path.exists() or (file is not None and not file.exists()):
        raise FedmetaError(f"{name}: neither a finished run nor a comparison: it has no {SUMMARY} and no {COMPARISON}")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if mlflow_client.fetch_files(uri, name, (COMPARISON, SITES), folder):
            return _comparison(folder, folders, None)
        mlflow_client.fetch_run(uri, name, folder)
        return _run(folder, None)


def _folders(root: Path) -> dict[str, Path]:
    """Returns the folders of finished runs and of comparisons by their MLflow ids."""
    found = {}
    for path in [*sorted(root.glob(f"**/{SUMMARY}")), *sorted(root.glob(f"*/{KEPT}"))]:
        try:
            found[str(json.loads(path.read_text())["run_id"])] = path.parent
        except (OSError, ValueError, KeyError):
            continue  # half a file is no reason to show none of the others
    return found


def _run(folder: Path, known: Path | None) -> Run:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        history = pd.read_parquet(folder / SITES)
        toml = (folder / "experiment.toml").read_text(encoding="utf-8")
        pictures = {path.stem: path.read_bytes() for path in own_pictures(folder / FOLDER)}
    except (OSError, ValueError) as error:
        raise FedmetaError(f"{folder}: not the files of a finished run: {error}") from error
    experiment = Experiment.from_toml(toml, str(folder / "experiment.toml"))
    return Run(summary, history, experiment, checkpoint.newest(folder)[0], known, pictures)


def _comparison(folder: Path, folders: dict[str, Path], known: Path | None) -> Compared:
    try:
        content = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
        sites = pd.read_parquet(folder / SITES)
        tables = [pd.DataFrame(content[name]) for name in ("runs", "table")]
        trials = {name: [Trial(**trial) for trial in tried] for name, tried in content.get("trials", {}).items()}
        table, left_out = _numbers(tables[1]), content.get("left_out", {})
        fixed = (content["baseline"], metric_of(content["score"]), content["verdict"])
        found = Comparison(tables[0], sites, table, *fixed, folder, trials, left_out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmetaError(f"{folder}: not the files of a comparison: {error}") from error
    runs = {name: _run(folders[name], folders[name]) for name in found.runs["run_id"] if name in folders}
    return Compared(found, runs, command=True, folder=known)


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a table with NaN for JSON's null."""
    columns = [column for column in table.columns if column != "learner"]
    return table.assign(**{column: pd.to_numeric(table[column]).astype(np.float64) for column in columns})


def _beside(runs: Sequence[Run]) -> Compared:
    """Returns several runs as a comparison; runs of one learner are distinguished by the settings that differ."""
    data = {(run.experiment.problem, run.experiment.data, run.checkpoint.classes) for run in runs}
    scores = {run.summary["score"]["name"] for run in runs}
    if len({repr(each) for each in data}) > 1 or len(scores) > 1:
        raise FedmetaError("these runs are on different data; a report compares runs on the same data")
    labels = labelled([run.experiment for run in runs])
    named = [replace(run, summary={**run.summary, "learner": label}) for run, label in zip(runs, labels, strict=True)]
    results = [result_of(run.summary, run.history, dict(run.checkpoint.meta_state), Path()) for run in named]
    found = build_table(results, list(dict.fromkeys(labels)), Path(), min(run.summary["seed"] for run in runs))
    return Compared(found, {run.summary["run_id"]: run for run in named}, command=False, folder=None)


def labelled(experiments: Sequence[Experiment]) -> list[str]:
    """Returns what to call each run: its learner, and where learners repeat under one seed, what differs."""
    params = [experiment.params() for experiment in experiments]
    seeded = [(each["learner.name"], each["runtime.seed"]) for each in params]
    names = [str(each["learner.name"]) for each in params]
    if len(set(seeded)) == len(seeded):
        return names
    usual = ("learner.name", "runtime.", "tracking.")
    keys = [key for key in params[0] if not key.startswith(usual) and len({each.get(key) for each in params}) > 1]
    names = [", ".join([name, *(f"{key.partition('.')[2]} {each.get(key)}" for key in keys)])
             for name, each in zip(names, params, strict=True)]  # fmt: skip
    seen: dict[tuple[str, Any], int] = {}
    for place, (name, each) in enumerate(zip(names, params, strict=True)):
        key = (name, each["runtime.seed"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            names[place] = f"{name} ({seen[key]})"
    return names
