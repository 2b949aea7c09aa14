"""A search that is killed: it is resumed, loses no trial, and stays one run in MLflow with its trials under it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from fedmeta.tracking.mlflow_client import open_client
from tests.search.searches import OVER, SETTINGS

pytestmark = pytest.mark.slow
TRIALS, ROUNDS = 8, 10


def command(folder: Path, *further: str) -> list[str]:
    (folder / "digits.toml").write_text("")
    options = [f"--set={each}" for each in [*SETTINGS, f"server.rounds={ROUNDS}", "tracking.folder=runs"]]
    options += [f"--over={each}" for each in OVER]
    call = [sys.executable, "-m", "fedmeta", "tune", "digits.toml", f"--trials={TRIALS}", "--sampler=random"]
    return [*call, *options, *further]


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder / 'tuning.db'}"
    try:
        # Optuna makes the tables of a store that lacks them, and the search would trip over ours.
        with closing(sqlite3.connect(f"file:{folder / 'tuning.db'}?mode=ro", uri=True)) as store:
            if not store.execute("SELECT count(*) FROM trials").fetchone()[0]:
                return []
        (name,) = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=name, storage=storage).trials
    except Exception:
        return []  # the file is being made


def kill_in_trial(folder: Path, number: int) -> None:
    """Starts the search and kills it, with all that came of it, while that trial runs."""
    process = subprocess.Popen(command(folder), cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        found = trials(folder)
        if len(found) > number and found[number].state.name == "RUNNING" and "run_id" in found[number].user_attrs:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    assert process.returncode == -signal.SIGKILL, "the search ended before it was killed"


def test_a_killed_search_is_resumed_and_loses_no_trial(tmp_path: Path) -> None:
    kill_in_trial(tmp_path, 2)
    before = trials(tmp_path)
    assert [each.state.name for each in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    done = subprocess.run(command(tmp_path, "--json", "--final-seeds=1"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout.splitlines()[-1])
    assert len(output["trials"]) == TRIALS
    assert {each["state"] for each in output["trials"]} <= {"done", "pruned"}
    assert [each.params for each in trials(tmp_path)[:3]] == [each.params for each in before]
    assert [each.value for each in trials(tmp_path)[:2]] == [each.value for each in before[:2]]
    assert output["new_sites"]["seeds"] == 1
    _check_mlflow(tmp_path, output)


def _check_mlflow(folder: Path, output: dict) -> None:
    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedmeta")
    runs = client.search_runs([experiment.experiment_id])
    (search,) = [run for run in runs if run.data.tags.get("fedmeta.kind") == "search"]
    assert search.info.status == "FINISHED"
    assert search.info.run_name == "tune · digits · maml · random · 8 trials"
    assert search.data.tags["mlflow.note.content"].startswith("**Best of 8 trials by random: ")
    assert search.data.metrics["search/best"] == pytest.approx(output["best"]["score"])
    assert "search/new_sites_difference" in search.data.metrics
    there = {file.path for file in client.list_artifacts(search.info.run_id)}
    assert {"trials.json", "best.toml", "tuning.md", "pictures", "images"} <= there
    assert not [run for run in runs if run.info.status == "RUNNING"], "the killed trial's run has ended too"
    nested = {run.info.run_id: run for run in runs if run.data.tags.get("mlflow.parentRunId") == search.info.run_id}
    assert {each["run_id"] for each in output["trials"]} <= set(nested)
    for each in output["trials"]:
        run = nested[each["run_id"]]
        assert run.data.params["evaluation.judge"] == "validation_sites"
        assert "pictures" not in {file.path for file in client.list_artifacts(each["run_id"])}
        if each["state"] == "pruned":
            assert run.info.status == "KILLED"
            assert run.data.tags["fedmeta.pruned"] == str(each["rounds"])
    assert len([run for run in runs if run.info.run_id not in nested]) == 3, "the search, and two runs on new sites"
