"""The fault table: each fault for real, in processes, and what the run makes of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import fedmeta
from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.progress import Progress
from fedmeta.runtime import deployment, process_guard, superlink
from fedmeta.runtime.superlink import environment, free_port, keep
from fedmeta.tracking.mlflow_client import open_client
from fedmeta.tracking.ui import serving
from tests.deployment.processes import FAST, HERE, write_sites

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 600.0
POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
DEADLINE_S = 150.0
"""Far more than a round takes on a busy machine."""

EXPERIMENT = """
[data]
source = "tables"
path = "{data}"
new_sites = 1
support = 6
query = 6

[model]
hidden = "8"

[learner]
name = "{learner}"
inner_steps = 2

[server]
rounds = {rounds}
sites_per_round = 0
wait_for = {sites}
round_timeout = {timeout}

[evaluation]
every = 0

[runtime]
engine = "vmap"
threads = 1
memory = 0.25
checkpoint_every = 1

[tracking]
uri = "{store}"
folder = "{folder}"
"""


class Federation:
    """A SuperLink and SuperNodes in plain text on this machine, each of which can be killed and started again."""

    def __init__(self, work: Path, stack: ExitStack, poll_s: str = "0.1") -> None:
        self.work, self.stack = work, stack
        self.marks = work / "marks"
        self.marks.mkdir()
        self.env = environment(work / "home", {**FAST, POLL: poll_s, "FEDMETA_TEST_MARKS": str(self.marks)})
        self.port = free_port()
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.link = self.start_link()

    def start_link(self, *options: str) -> subprocess.Popen[bytes]:
        command = ["flower-superlink", "--insecure", "--database", str(self.work / "state.db"), "--host", HERE]
        command += ["--port", str(self.port), "--disable-runtime-dependency-installation", *options]
        link = self.stack.enter_context(keep(command, self.env, self.work / "superlink.log"))
        assert superlink.answers(link, self.port), (self.work / "superlink.log").read_text()
        return link

    def start_node(self, site: str, file: Path, fault: str = "") -> None:
        config = f'site="{site}" data="{file}" state="{self.work}/state-{site}"'
        command = ["flower-supernode", "--insecure", "--superlink", f"{HERE}:{self.port}", "--port", str(free_port())]
        env = {**self.env, "FEDMETA_TEST_FAULT": fault}
        log = self.work / f"{site}.log"
        self.nodes[site] = self.stack.enter_context(keep([*command, "--node-config", config], env, log))

    def start_node_and_app(self, site: str, file: Path, way: int = 0) -> subprocess.Popen[bytes]:
        """Starts a node that runs no code of a run's, and the SuperExec beside it that does; returns the latter.

        Args:
            site: The site.
            file: Its rows.
            way: The port by which it reaches the SuperLink; 0 for the SuperLink's own.
        """
        api = free_port()
        command = ["flower-supernode", "--insecure", "--superlink", f"{HERE}:{way or self.port}"]
        command += ["--isolation", "process"]
        command += ["--host", HERE, "--port", str(api)]
        command += ["--node-config", f'site="{site}" data="{file}" state="{self.work}/state-{site}"']
        self.nodes[site] = self.stack.enter_context(keep(command, self.env, self.work / f"{site}.log"))
        command = [sys.executable, "-P", "-m", "fedmeta.prefork_superexec", "--insecure"]
        command += ["--runtime-api-address", f"{HERE}:{api}"]
        return self.stack.enter_context(keep(command, self.env, self.work / f"{site}-app.log"))

    def send(self, process: subprocess.Popen[bytes], number: int) -> None:
        """Sends a signal to all that came of a command."""
        for child in list(process_guard.descendants(process.pid)):
            os.kill(child, number)

    def await_mark(self, name: str) -> None:
        await_true(lambda: (self.marks / name).exists(), name)


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)


@contextmanager
def faulty_federation(work: Path, poll_s: str = "0.1") -> Iterator[Federation]:
    """Gives a federation without nodes whose submitted app has `faulty_app` around its ClientApp.

    Args:
        work: The folder of logs and state.
        poll_s: How often its processes look for work (seconds); often, they take a processor of several nodes alone.
    """

    def write_faulty_app(folder: Path) -> Path:
        superlink.write_app(folder)
        (folder / "faulty").mkdir()
        (folder / "faulty" / "__init__.py").touch()
        shutil.copyfile(Path(__file__).with_name("faulty_app.py"), folder / "faulty" / "app.py")
        project = (folder / "pyproject.toml").read_text()
        project = project.replace('clientapp = "clients.app:app"', 'clientapp = "faulty.app:app"')
        (folder / "pyproject.toml").write_text(project.replace("fab-include = [", 'fab-include = ["faulty/**/*.py", '))
        return folder

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "write_app", write_faulty_app)
        running = Federation(work, stack, poll_s)
        patch.setenv(deployment.SUPERLINK, f"{HERE}:{running.port}")
        patch.setenv(deployment.ROOT_CERTIFICATES, deployment.PLAIN_TEXT)
        yield running


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with faulty_federation(tmp_path) as running:
        yield running


def experiment_of(work: Path, sites: list[str], **settings: object) -> fedmeta.Experiment:
    names = str(sites).replace("'", '"')
    values = {"learner": "maml", "rounds": 2, "timeout": 600.0, "folder": work / "runs"} | settings
    (work / "run.toml").write_text(EXPERIMENT.format(data=work / "data", sites=names, **values))
    return fedmeta.load_experiment(work / "run.toml")


def missed(run: fedmeta.runtime.Result, work: Path) -> list[dict[str, object]]:
    """Returns what the server wrote down of who missed what."""
    (path,) = (work / "runs").glob("*/failures.json")
    entries: list[dict[str, object]] = json.loads(path.read_text())
    there = {file.path for file in open_client(store_of(work)).list_artifacts(run.summary["run_id"])}
    assert "failures.json" in there
    return entries


def store_of(work: Path) -> str:
    return f"sqlite:///{work}/mlflow.db"


def rounds_of(store: str, run_id: str, key: str) -> dict[int, float]:
    history = open_client(store).get_metric_history(run_id, key)
    found = {metric.step: metric.value for metric in history}
    assert len(found) == len(history), f"{key} is there twice"
    return found


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Does something beside a run; what fails there fails the test."""
    failures: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join(WAIT_S)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


# ---------------------------------------------------------------- wrong answers


@pytest.mark.slow
def test_sites_that_answer_wrongly_are_named_and_the_others_continue(tmp_path: Path, federation: Federation) -> None:
    files = write_sites(tmp_path / "data", sites=6)
    faults = dict(zip(files, ("", "", "nan", "zeros", "shape", "error"), strict=True))
    for site, fault in faults.items():
        federation.start_node(site, files[site], fault)
    notes: list[str] = []
    experiment = experiment_of(tmp_path, [*files], store=store_of(tmp_path)).with_overrides(["data.new_sites=0"])
    result = fedmeta.run(
        experiment, runtime="deployment", report=lambda progress: notes.append(progress.note) if progress.note else None
    )

    entries = [entry for entry in missed(result, tmp_path) if entry["what"] == "training"]
    reasons = {(entry["round"], entry["site"]): str(entry["reason"]) for entry in entries}
    assert set(reasons) == {(number, f"site-{site}") for number in (1, 2) for site in (2, 4, 5)}
    for number in (1, 2):
        assert "is not finite" in reasons[number, "site-2"]
        assert "another shape or type" in reasons[number, "site-4"]
        assert "Flower error code" in reasons[number, "site-5"]
        assert "4711" not in str(reasons)
    assert rounds_of(store_of(tmp_path), result.summary["run_id"], "failures/replies") == {1: 3.0, 2: 3.0}
    assert result.summary["failures"] == 6
    assert [note for note in notes if note.startswith("round 1 without site-2 (and 2 more): ")]
    # Zeros are a gradient like any other; all sites are scored_rows, for what was wrong was in training alone.
    assert result.sites["site"].tolist() == [*files]
    assert all(torch.isfinite(value).all() for value in result.meta_state.values())


# ---------------------------------------------------------------- death, and what comes after it


@pytest.mark.slow
def test_a_run_outlives_a_killed_site_a_hung_one_and_its_store(tmp_path: Path, federation: Federation) -> None:
    files = write_sites(tmp_path / "data", sites=3)
    for site, file in files.items():
        federation.start_node(site, file)
    open_client(store_of(tmp_path)).search_experiments()
    port = free_port()
    experiment = experiment_of(
        tmp_path,
        [*files],
        learner="ditto",
        rounds=5,
        timeout=DEADLINE_S,
        store=f"http://{HERE}:{port}",
    ).with_overrides(["data.new_sites=0"])
    over: dict[int, float] = {}

    def report(progress: Progress) -> None:
        over.setdefault(progress.round_number, time.monotonic())

    holds = [federation.marks / f"hold-{site}-train-2" for site in ("site-1", "site-2")]
    for hold in holds:
        hold.touch()
    with ExitStack() as store:
        server = store.enter_context(serving(store_of(tmp_path), port))

        def strike() -> None:
            for site in ("site-1", "site-2"):
                federation.await_mark(f"{site}-train-2")
            federation.send(federation.nodes["site-1"], signal.SIGKILL)
            # Its app alone: the node keeps telling the server that it is there.
            hung = int((federation.marks / "site-2-train-2").read_text())
            os.kill(hung, signal.SIGSTOP)
            os.killpg(server.process.pid, signal.SIGKILL)
            await_true(lambda: 2 in over, "the end of round 2")
            for hold in holds:
                hold.unlink()
            federation.start_node("site-1", files["site-1"])
            os.kill(hung, signal.SIGCONT)
            await_true(lambda: 3 in over, "the end of round 3")
            store.enter_context(serving(store_of(tmp_path), port))

        with meanwhile(strike):
            result = fedmeta.run(experiment, runtime="deployment", report=report)

    run_id = result.summary["run_id"]
    # The run's artifacts are the store's server's, which is gone; the run's own folder has the same record.
    (path,) = (tmp_path / "runs").glob("ditto-*/failures.json")
    record = json.loads(path.read_text())
    reasons = {(entry["round"], entry["site"]): str(entry["reason"]) for entry in record}
    assert {site for number, site in reasons if number == 2} == {"site-1", "site-2"}
    # Flower's own heartbeat, of a node or of its app, may tell before the deadline does.
    assert all(reasons[2, site].startswith(("no reply in time", "Flower error code")) for site in ("site-1", "site-2"))
    assert not {1, 4, 5} & {number for number, _ in reasons}, reasons
    # The round ended by its deadline at the latest, and the time that it takes to ask.
    assert over[2] - over[1] < DEADLINE_S + 60.0
    assert sorted(rounds_of(store_of(tmp_path), run_id, "train/query_loss")) == [1, 2, 3, 4, 5]
    assert rounds_of(store_of(tmp_path), run_id, "failures/replies")[2] == 2.0
    assert open_client(store_of(tmp_path)).get_run(run_id).info.status == "FINISHED"
    assert result.sites["site"].tolist() == [*files]
    # The site that came back under another id has resumed what it kept, and keeps it where it did.
    (state,) = (tmp_path / "state-site-1").glob("*/site-1-*")
    kept = {path.stem for path in state.iterdir()}
    assert {"round-000004", "round-000005"} <= kept


# ---------------------------------------------------------------- the server


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_and_a_deployed_run_that_is_gone_on_with(
    tmp_path: Path, federation: Federation
) -> None:
    files = write_sites(tmp_path / "data", sites=2)
    for site, file in files.items():
        federation.start_node(site, file)
    settings = {"rounds": 4, "store": store_of(tmp_path)}
    experiment = experiment_of(tmp_path, [*files], **settings)
    over: list[int] = []

    def strike() -> None:
        await_true(lambda: 1 in over, "round 1")
        federation.send(federation.link, signal.SIGKILL)
        federation.link.wait(WAIT_S)
        federation.start_link()

    with meanwhile(strike), pytest.raises(FedmetaError) as refusal:
        fedmeta.run(experiment, runtime="deployment", report=lambda progress: over.append(progress.round_number))
    assert re.fullmatch(
        r"run \d+ failed \(in MLflow \w+\): its server ended without output; see: fedmeta flower log \d+; "
        r"to resume: --resume \w+",
        str(refusal.value),
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert checkpoint.newest(folder)[0].round_number in (1, 2)

    resumed = fedmeta.run(experiment, runtime="deployment", resume="auto")
    assert resumed.summary["run_id"] == checkpoint.newest(folder)[0].run_id
    local = fedmeta.run(experiment_of(tmp_path, [*files], **settings, folder=tmp_path / "local"))
    for name, value in local.meta_state.items():
        torch.testing.assert_close(resumed.meta_state[name], value, rtol=0, atol=1e-5)
    assert rounds_of(store_of(tmp_path), resumed.summary["run_id"], "train/query_loss").keys() == {1, 2, 3, 4}
    with pytest.raises(FedmetaError, match="no unfinished run of this experiment"):
        fedmeta.run(experiment_of(tmp_path, [*files], **settings), runtime="deployment", resume="auto")


@pytest.mark.slow
def test_a_superlink_that_is_killed_and_restarted_beside_its_server_app(tmp_path: Path, federation: Federation) -> None:
    """As in the compose file, where the server's part of a run is a separate container."""
    federation.send(federation.link, signal.SIGKILL)
    federation.link.wait(WAIT_S)
    link = federation.start_link("--isolation", "process")
    command = ["flower-superexec", "--insecure", "--runtime-api-address", f"{HERE}:{federation.port}"]
    federation.stack.enter_context(keep(command, federation.env, tmp_path / "superexec.log"))
    files = write_sites(tmp_path / "data", sites=2)
    for site, file in files.items():
        federation.start_node(site, file)
    experiment = experiment_of(tmp_path, [*files], rounds=4, store=store_of(tmp_path), timeout=DEADLINE_S)
    over: list[int] = []

    def strike() -> None:
        await_true(lambda: 1 in over, "round 1")
        federation.send(link, signal.SIGKILL)
        link.wait(WAIT_S)
        time.sleep(5.0)
        federation.start_link("--isolation", "process")

    with meanwhile(strike):
        result = fedmeta.run(
            experiment, runtime="deployment", report=lambda progress: over.append(progress.round_number)
        )
    assert rounds_of(store_of(tmp_path), result.summary["run_id"], "train/query_loss").keys() == {1, 2, 3, 4}
    assert result.summary["failures"] == 0
    local = fedmeta.run(
        experiment_of(tmp_path, [*files], rounds=4, store=store_of(tmp_path), folder=tmp_path / "local")
    )
    for name, value in local.meta_state.items():
        torch.testing.assert_close(result.meta_state[name], value, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedmeta", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def fedmeta_run(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return command("run", str(file), *options)


def digits(work: Path, folder: Path, store: str) -> Path:
    (work / "run.toml").write_text(
        '[model]\nhidden = "8"\n[server]\nrounds = 80\n[evaluation]\nevery = 0\n'
        '[runtime]\nengine = "vmap"\nthreads = 1\nmemory = 0.25\ncheckpoint_every = 2\n'
        f'[tracking]\nuri = "{store}"\nfolder = "{folder}"\nsite_curves = 40\n'
    )
    return work / "run.toml"


@pytest.mark.slow
def test_a_run_whose_disk_is_full_reports_it_and_continues_later(tmp_path: Path, small_disk: Path) -> None:
    file = digits(tmp_path, small_disk / "runs", store_of(tmp_path))
    full = fedmeta_run(file)
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1].startswith("fedmeta: ")
    assert "No space left on device" in full.stderr
    (folder,) = (small_disk / "runs").iterdir()
    before = checkpoint.newest(folder)[0]
    assert before.round_number < 80
    again = fedmeta_run(file, "--resume", "auto")
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = fedmeta_run(file, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    unbroken = fedmeta.run(fedmeta.load_experiment(file, [f"tracking.folder={tmp_path}/unbroken"]))
    state = checkpoint.newest(folder)[0].meta_state
    assert all(torch.equal(value, state[name]) for name, value in unbroken.meta_state.items())
    assert sorted(rounds_of(store_of(tmp_path), before.run_id, "train/query_loss")) == [*range(1, 81)]


@pytest.mark.slow
def test_a_store_whose_disk_is_full_costs_no_round_and_gets_it_all_later(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    store = store_of(small_disk)
    file = digits(tmp_path, tmp_path / "runs", store)
    open_client(store).search_experiments()
    fill(small_disk)
    first = fedmeta_run(file)
    assert first.returncode == 2, first.stderr
    assert "Traceback" not in first.stderr
    (small_disk / "ballast").unlink()
    experiment = fedmeta.load_experiment(file)
    notes: list[Progress] = []

    def report(progress: Progress) -> None:
        notes.append(progress)
        if progress.round_number == 3 and not (small_disk / "ballast").exists():
            fill(small_disk)

    result = fedmeta.run(experiment, report=report)
    assert result.summary["rounds"] == 80
    assert (result.folder / "unsent.jsonl").is_file()
    assert "does not take events (database or disk is full); training continues" in capsys.readouterr().err
    (small_disk / "ballast").unlink()
    sent = command("sync", str(result.folder))
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.rstrip().endswith(", 0 left")
    run_id = result.summary["run_id"]
    assert sorted(rounds_of(store, run_id, "train/query_loss")) == [*range(1, 81)]
    assert open_client(store).get_run(run_id).info.status == "FINISHED"


def fill(disk: Path) -> None:
    """Leaves no byte free on a disk."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
