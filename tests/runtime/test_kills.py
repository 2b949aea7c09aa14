"""A run that is killed thirty times, anywhere, and resumed each time is the run that was never interrupted."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from fedmeta import checkpoint

REPOSITORY = Path(__file__).parents[2]
STARTS_S = 600.0

EXPERIMENT = """
[model]
hidden = "8"

[learner]
name = "{learner}"
inner_steps = 2

[server]
rounds = {rounds}
sites_per_round = 8

[evaluation]
every = 10
schedule = "{schedule}"

[runtime]
engine = "{engine}"
memory = 0.25
threads = 1
checkpoint_every = 3

[tracking]
uri = "sqlite:///{folder}/mlflow.db"
folder = "{folder}/runs"
site_curves = 3
"""


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "fedmeta", "run", str(file), "--json", *options]


def stand(folder: Path) -> tuple[int, bool]:
    """Returns the last round of which there is a checkpoint, -1 where there is none, and whether training is over."""
    files = sorted((folder / "runs").glob("*/round-*.safetensors"))
    try:
        with safe_open(files[-1], framework="pt") as file:
            header = file.metadata()
    except (IndexError, OSError):  # a file that is removed between the two gives way to a newer one
        return (-1, False) if not files else stand(folder)
    return json.loads(header["round_number"]), json.loads(header["finished"])


def live_and_die(folder: Path, aim: str, draws: random.Random) -> int:
    """Starts or resumes the run, kills it at a random moment, and returns its last finished checkpoint's round.

    Args:
        folder: Where the experiment file, the store and the runs are.
        aim: "start" = while it starts; "rounds" = once it has written an own checkpoint; "end" = while it writes
            its results.
        draws: Says when.
    """
    before = stand(folder)
    resume = ("--resume", "auto") if before[0] >= 0 else ()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command(folder / "run.toml", *resume), cwd=REPOSITORY, stdout=log, stderr=log)
    deadline = time.monotonic() + STARTS_S
    while process.poll() is None and time.monotonic() < deadline and aim != "start":
        now = stand(folder)
        if now[1] or (aim == "rounds" and now[0] > before[0]):
            break
        time.sleep(0.02)
    time.sleep(draws.uniform(0.0, {"start": 6.0, "rounds": 0.5, "end": 2.5}[aim]))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"{aim}: it ended before it was killed\n{(folder / 'log').read_text()}"
    return stand(folder)[0]


def finish(folder: Path, *options: str) -> dict[str, object]:
    done = subprocess.run(
        command(folder / "run.toml", *options), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return summary


def logged(folder: Path) -> list[tuple[str, int, float]]:
    """Returns every row of the store's table of metrics; of times only that they are there."""
    with sqlite3.connect(folder / "mlflow.db") as store:
        rows = store.execute("SELECT key, step, value FROM metrics").fetchall()
    return sorted((key, step, 0.0 if key.startswith(("time/", "system/")) else value) for key, step, value in rows)


def tracked_runs(folder: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(folder / "mlflow.db") as store:
        return store.execute("SELECT run_uuid, status FROM runs").fetchall()


def parameters(folder: Path) -> list[tuple[str, str]]:
    own = ("tracking.uri", "tracking.folder")
    with sqlite3.connect(folder / "mlflow.db") as store:
        return sorted(row for row in store.execute("SELECT key, value FROM params") if row[0] not in own)


def kill_and_compare(tmp_path: Path, aims: Sequence[str], **settings: object) -> None:
    folders = unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
        (folder / "run.toml").write_text(EXPERIMENT.format(folder=folder, **settings))
    expected = finish(unbroken)
    draws = random.Random(len(aims))
    deaths = [(aim, live_and_die(killed, aim, draws)) for aim in aims]
    print(f"killed at (aim, round of the last checkpoint): {deaths}")
    summary = finish(killed, "--resume", "auto")

    own = ("wall_s", "run_id", "checkpoint")
    assert {key: value for key, value in summary.items() if key not in own} == {
        key: value for key, value in expected.items() if key not in own
    }
    one, other = (Path(str(run["checkpoint"])) for run in (expected, summary))
    states = [checkpoint.read(path) for path in (one, other)]
    assert states[0].meta_state.keys() == states[1].meta_state.keys()
    assert all(torch.equal(value, states[1].meta_state[key]) for key, value in states[0].meta_state.items())
    assert all(torch.equal(value, states[1].optimizer[key]) for key, value in states[0].optimizer.items())
    history = [pd.read_parquet(path.parent / "sites.parquet") for path in (one, other)]
    pd.testing.assert_frame_equal(history[0], history[1], check_exact=True)

    metrics = logged(killed)
    assert len(metrics) == len({(key, step) for key, step, _ in metrics}), "a metric is there twice"
    assert metrics == logged(unbroken)
    assert parameters(killed) == parameters(unbroken)
    assert tracked_runs(killed) == [(summary["run_id"], "FINISHED")]
    # One folder, nothing half-written in it, and nothing left to resume.
    (folder,) = (killed / "runs").iterdir()
    assert folder == other.parent
    assert {path.name for path in folder.iterdir()} - {"personal"} == {path.name for path in one.parent.iterdir()} - {
        "personal"
    }
    assert list(tmp_path.rglob("*.part")) == []
    again = subprocess.run(
        command(killed / "run.toml", "--resume", "auto"), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "no unfinished run of this experiment" in again.stderr


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(tmp_path: Path) -> None:
    aims = ["start"] * 4 + ["rounds", "rounds", "rounds", "start"] * 5 + ["end"] * 6
    assert len(aims) == 30
    kill_and_compare(tmp_path, aims, learner="maml", rounds=300, schedule="fixed", engine="auto")


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "schedule"), [("ditto", "fixed"), ("meta-sgd", "auto")])
def test_what_sites_keep_and_what_validation_sites_choose_outlive_kills(
    tmp_path: Path, learner: str, schedule: str
) -> None:
    aims = ["rounds"] * 4 + ["end"] * 2
    kill_and_compare(tmp_path, aims, learner=learner, rounds=120, schedule=schedule, engine="vmap")
