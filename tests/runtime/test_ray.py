import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pandas as pd
import pytest

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress
from fedmeta.runtime import Result, run
from fedmeta.runtime import ray as module
from fedmeta.runtime.superlink import free_port
from tests.deciding import DECIDED, DECIDING
from tests.runtime.processes import MARK, marked, wait_until
from tests.server import digits as quick

REPOSITORY = Path(__file__).parents[2]


def digits(folder: Path, *overrides: str) -> Experiment:
    """Returns the experiment of a quick run, with the patience that Ray's first answer takes."""
    return quick.digits(folder, "server.round_timeout=300", *overrides)


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mark on every process of a test, none of which may outlive it."""
    value = uuid4().hex
    monkeypatch.setenv(MARK, value)
    yield value
    left = marked(value)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a run works, which must be empty again afterwards. The name is short: sockets have short names."""
    with tempfile.TemporaryDirectory(prefix="f-", dir="/tmp") as folder:
        monkeypatch.setattr(module, "_work_folder", lambda: Path(tempfile.mkdtemp(dir=folder)))
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


def assert_agree(local: Result, ray: Result, bound: float = 1e-6) -> None:
    """Checks that meta-states and every figure of every site agree."""
    assert local.meta_state.keys() == ray.meta_state.keys()
    for key, value in local.meta_state.items():
        assert value.dtype == ray.meta_state[key].dtype
        assert float((value - ray.meta_state[key]).abs().max()) <= bound, key
    flat = [_flat(result.history) for result in (local, ray)]
    pd.testing.assert_frame_equal(flat[0], flat[1], rtol=0, atol=bound)


def _flat(history: pd.DataFrame) -> pd.DataFrame:
    """Returns a history with a column for each entry of its lists."""
    lists = [name for name in history.columns if isinstance(history[name].iloc[0], list | np.ndarray)]
    plain = history.drop(columns=lists)
    wide = [pd.DataFrame([list(row) for row in history[name]]).add_prefix(f"{name}_") for name in lists]
    return pd.concat([plain, *wide], axis=1)


@pytest.mark.slow
def test_ray_and_local_agree_on_an_own_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    experiment = Experiment.from_toml(
        (REPOSITORY / "examples" / "own_problem.toml").read_text(),
        overrides=[
            "server.rounds=3",
            "server.round_timeout=300",
            "runtime.nodes=2",
            "tracking.uri=none",
            f"tracking.folder={tmp_path}",
        ],
    )
    local, ray = run(experiment), run(experiment, runtime="ray")
    assert_agree(local, ray)
    assert ray.summary["score"] == {"name": "coherence", "higher_is_better": True, "unit": "dB"}
    assert ray.summary["new_sites"]["personalized"]["mean"] < 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DECIDING)
def test_ray_and_local_decide_alike(tmp_path: Path, name: str) -> None:
    experiment = digits(tmp_path, "runtime.nodes=2", *DECIDING[name])
    local, ray = run(experiment), run(experiment, runtime="ray")
    assert_agree(local, ray)
    decisions = [
        [(each["round"], each["what"]) for each in result.summary.get("ledger", [])] for result in (local, ray)
    ]
    assert decisions[0] == decisions[1]
    if name in DECIDED:
        assert DECIDED[name] in [what for _, what in decisions[0]]


@pytest.mark.slow
def test_ray_and_local_agree_on_digits(tmp_path: Path) -> None:
    reported: list[Progress] = []
    experiment = digits(tmp_path, "runtime.nodes=2")
    local, ray = run(experiment), run(experiment, runtime="ray", report=reported.append)
    assert_agree(local, ray)
    assert {progress.round_number for progress in reported} == {0, 1, 2, 3, 4}
    assert reported[-1].personalized_score == ray.summary["new_sites"]["personalized"]["mean"]
    own = ("run_id", "checkpoint", "wall_s", "bytes_down", "bytes_up")
    for key in local.summary.keys() - set(own):
        assert json.dumps(local.summary[key])[:9] == json.dumps(ray.summary[key])[:9], key
    assert ray.folder.parent == Path(experiment.tracking.folder)
    assert {path.name for path in ray.folder.iterdir()} == {path.name for path in local.folder.iterdir()} - {"x"}


def test_bad_data_are_reported_in_full_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Path
) -> None:
    monkeypatch.setattr(module, "_launch", lambda *_: pytest.fail("something was started"))
    (tmp_path / "abbey.csv").write_text("age,label\n63,ill\nold,healthy\n")
    experiment = digits(tmp_path, "data.source=tables", f"data.path={tmp_path}")
    with pytest.raises(FedmetaError, match=r"abbey\.csv"):
        run(experiment, runtime="ray")


@pytest.mark.parametrize(
    ("cores", "nodes", "threads", "expected"),
    [
        (2, 2, 0, (2, 1, 2)),
        (2, 3, 0, (3, 1, 2)),
        (2, 1, 0, (1, 2, 2)),
        (2, 3, 2, (3, 2, 2)),
        (2, 3, 16, (3, 2, 2)),
        (16, 3, 0, (3, 5, 15)),
        (16, 3, 1, (3, 1, 3)),
        (16, 40, 4, (40, 4, 16)),
    ],
)
def test_nodes_share_the_processors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, nodes: int, threads: int, expected: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = module._federation(digits(tmp_path, f"runtime.threads={threads}"), nodes).split()
    settings = dict(word.split("=") for word in words)
    keys = ("num-supernodes", "client-resources-num-cpus", "init-args-num-cpus")
    assert tuple(int(settings[key]) for key in keys) == expected
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "init-args-num-cpus" not in module._federation(digits(tmp_path), nodes)


# ---------------------------------------------------------------- the long ones


def har(folder: Path, data: Path, *overrides: str) -> Experiment:
    path = data / "har" / "har.npz"
    if not path.is_file():
        pytest.skip(f"no real data: {path} is absent")
    settings = ("data.source=npz", f"data.path={path}", "data.split=blocks", "data.support=20", "server.rounds=5")
    more = ("runtime.nodes=3", "evaluation.every=5", "model.hidden=64", *overrides)
    return digits(folder, *settings, *more)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("runtime.engine=vmap",), ("model.dtype=float64",)])
def test_ray_and_local_agree_on_har(tmp_path: Path, shared_data: Path, overrides: tuple[str, ...]) -> None:
    experiment = har(tmp_path, shared_data, *overrides)
    assert_agree(run(experiment), run(experiment, runtime="ray"))


@pytest.mark.slow
def test_a_run_that_was_stopped_under_ray_continues_there(tmp_path: Path, mark: str) -> None:
    unbroken = run(digits(tmp_path / "unbroken", "server.rounds=12"))
    experiment = digits(tmp_path / "stopped", "server.rounds=12", "runtime.nodes=2")

    def stop(progress: Progress) -> None:
        if progress.round_number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(experiment, runtime="ray", report=stop)
    assert marked(mark) == []
    resumed = run(experiment, runtime="ray", resume="auto")
    assert_agree(unbroken, resumed)
    (folder,) = Path(experiment.tracking.folder).iterdir()
    assert folder.absolute() == resumed.folder


@pytest.mark.slow
def test_a_server_that_dies_is_noticed(tmp_path: Path, mark: str) -> None:
    experiment = digits(tmp_path, "server.rounds=10000", "evaluation.every=0", "runtime.nodes=2")

    def kill(progress: Progress) -> None:
        for process in marked(mark):
            if b"flwr-simulation" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)

    with pytest.raises(FedmetaError, match=r"^Flower's run ended without a result: .*; its log: (.*)$") as refusal:
        run(experiment, runtime="ray", report=kill)
    assert "\n" not in str(refusal.value)
    log = Path(str(refusal.value).rpartition("its log: ")[2])
    assert "Starting Flower SuperLink" in log.read_text()


@pytest.mark.slow
def test_what_the_server_refuses_is_reported_as_it_is(tmp_path: Path) -> None:
    uri = f"tracking.uri=http://127.0.0.1:{free_port()}"
    messages = []
    for runtime in ("local", "ray"):
        with pytest.raises(FedmetaError) as refusal:
            run(digits(tmp_path, uri), runtime=runtime)
        messages.append(str(refusal.value))
    assert messages[1].startswith(messages[0])


MODEL = """
import torch
def net(shape, outputs, width):
    first, second = torch.nn.Linear(64, width), torch.nn.Linear(width, outputs)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.Tanh(), second)
"""


@pytest.mark.slow
def test_a_model_of_the_users_own_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models_of_mine.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    toml = '[model]\nname = "models_of_mine:net"\nwidth = 4\n[server]\nrounds = 2\n[tracking]\nuri = "none"\n'
    overrides = [f"tracking.folder={tmp_path / 'runs'}", "runtime.nodes=2", "runtime.engine=vmap"]
    experiment = Experiment.from_toml(toml, overrides=overrides)
    assert_agree(run(experiment), run(experiment, runtime="ray"))


COMMAND = """
import sys
from fedmeta.experiment import Experiment
from fedmeta.runtime import run
run(Experiment.from_toml(open(sys.argv[1]).read()), runtime="ray", report=lambda p: print(p.round_number, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_launcher_that_is_ended(tmp_path: Path, mark: str, number: int) -> None:
    (tmp_path / "run.toml").write_text(
        digits(tmp_path, "server.rounds=10000", "evaluation.every=0", "runtime.checkpoint_every=0").to_toml()
    )
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "run.toml")]
    launcher = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    while launcher.stdout.readline().strip() not in ("2", ""):
        pass
    assert len(marked(mark)) > 5
    os.kill(launcher.pid, number)
    launcher.communicate(timeout=60)
    assert wait_until(lambda: marked(mark) == [])
    left = [path.parent for path in Path("/tmp").glob("fedmeta-*/run.toml") if str(tmp_path) in path.read_text()]
    # Only a killed launcher leaves the folder that it worked in.
    assert len(left) == (number == signal.SIGKILL)
    for folder in left:
        shutil.rmtree(folder)
    (folder,) = (tmp_path / "runs").iterdir()
    # Asked to stop, the run has written down where it was; killed, it could not.
    assert any(folder.glob("round-*.safetensors")) == (number != signal.SIGKILL)
