"""Runs that a repeated command finds again instead of running them a second time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import write_atomic
from fedmeta.progress import ProgressCallback
from fedmeta.runtime import Result, result_of, run

ProgressOf = Callable[[str, int, int], ProgressCallback]
"""Returns what takes a run's progress, given the run's title, its number (from 1) and the number of runs."""


def run_or_load(experiment: Experiment, folder: Path, runtime: str, report: ProgressCallback) -> Result:
    """Returns a run's result: from an earlier command, finished or interrupted, or from a new run.

    Args:
        experiment: What to run.
        folder: Where finished runs are listed, by learner and seed.
        runtime: As for `fedmeta.runtime.run`.
        report: Takes progress.
    """
    name = experiment.learner.name.replace(":", ".").replace("/", ".")
    done = folder / f"{name}-{experiment.runtime.seed}.json"
    if done.exists():
        kept = json.loads(done.read_text())
        run_folder = Path(kept["folder"])
        # A longer search may have found other settings since.
        if kept["experiment"] == experiment.identity() and (run_folder / "sites.parquet").exists():
            state, _ = checkpoint.newest(run_folder)
            history = pd.read_parquet(run_folder / "sites.parquet")
            return result_of(kept["summary"], history, dict(state.meta_state), run_folder)
    result = run(experiment, runtime=runtime, resume=resumable(experiment), report=report)
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"summary": result.summary, "folder": str(result.folder), "experiment": experiment.identity()}
    write_atomic(done, json.dumps(entry).encode())
    return result


def resumable(experiment: Experiment) -> str | None:
    """Returns "auto" where an interrupted run of this experiment can be resumed."""
    try:
        checkpoint.find(Path(experiment.tracking.folder), "auto", experiment.to_toml())
    except FedmetaError:
        return None
    return "auto"
