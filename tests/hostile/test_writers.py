"""One writer, and a disk or a process that fails at any moment: the ledger counts all, and nothing finished is lost."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.app import app
from fedmeta import checkpoint, files
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress, ignore_progress
from fedmeta.runtime.local import LocalGrid
from server import run_parts, training_loop
from server.privacy import BUDGET_FILE, SiteLevelDP
from server.run_log import RunLogger
from tests.server.digits import digits

NOISY = ("privacy.clip_norm=0.5", "privacy.noise_multiplier=2.0", "privacy.delta=1e-5")
EACH_ROUND = ("runtime.checkpoint_every=1", "evaluation.every=0", "server.rounds=3", "server.sites_per_round=4")
FORK = multiprocessing.get_context("fork")


def private(folder: Path) -> Experiment:
    return digits(folder, *NOISY, *EACH_ROUND)


def train(experiment: Experiment, resume: Path | None = None, report: Any = ignore_progress) -> training_loop.Outcome:
    return training_loop.run(LocalGrid(app, experiment), experiment, report, resume)


def only_folder(experiment: Experiment) -> Path:
    (folder,) = Path(experiment.tracking.folder).iterdir()
    return folder


def stopped(experiment: Experiment) -> Path:
    """Runs one round and stops; returns the run's folder."""

    def stop(progress: Progress) -> None:
        if progress.round_number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, report=stop)
    return only_folder(experiment)


def in_child(work: Callable[[], object]) -> int | None:
    """Runs something in a forked process; returns its exit code, negative for a signal."""
    process = FORK.Process(target=work)
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


# Two processes


@pytest.mark.slow
def test_a_run_has_one_writer(tmp_path: Path) -> None:
    experiment = private(tmp_path)
    folder = stopped(experiment)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with files.locked(folder / training_loop.LOCK):
        with pytest.raises(FedmetaError, match="another process writes there"):
            train(experiment, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert train(experiment, folder).summary["privacy"]["rounds"] == 3


@pytest.mark.slow
def test_two_processes_cannot_share_a_ledgers_round(tmp_path: Path) -> None:
    experiment = private(tmp_path)
    like = {"theta": torch.zeros(2)}

    def release() -> None:
        privacy = SiteLevelDP(experiment, 32, tmp_path)
        for _ in range(20):
            privacy.release([], like)

    children = [FORK.Process(target=release) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert json.loads((tmp_path / BUDGET_FILE).read_text()) == {"rounds": 60, "sites": 32}


# A process that dies between any two writes


def counting(monkeypatch: pytest.MonkeyPatch, journal: Path) -> None:
    """Has each release and each finished checkpoint noted in a separate file, by appending a line."""
    release, write = SiteLevelDP.release, checkpoint.write

    def noted(line: str) -> None:
        with journal.open("a") as file:
            file.write(line + "\n")

    def counted(self: SiteLevelDP, *arguments: Any) -> Any:
        found = release(self, *arguments)
        noted("released")
        return found

    def kept(state: checkpoint.Checkpoint, folder: Path) -> Path:
        path = write(state, folder)
        noted(f"saved {state.round_number}")
        return path

    monkeypatch.setattr(SiteLevelDP, "release", counted)
    monkeypatch.setattr(checkpoint, "write", kept)


def fails_at(monkeypatch: pytest.MonkeyPatch, number: int, fail: Callable[[], None]) -> None:
    """Has something happen in place of the `number`-th synchronization of a file or folder, and of all later ones."""
    sync, calls = os.fsync, [0]

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] >= number:
            fail()
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def check(experiment: Experiment, journal: Path) -> None:
    """Checks what stands on the disk against what the journal says has happened."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    saved = [int(line.split()[1]) for line in lines if line.startswith("saved")]
    if not saved:
        return
    folder = only_folder(experiment)
    assert checkpoint.newest(folder)[0].round_number >= max(saved)
    released = lines.count("released")
    if released:
        assert json.loads((folder / BUDGET_FILE).read_text())["rounds"] >= released


@pytest.mark.slow
def test_a_kill_between_any_two_writes_loses_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = 0
    for number in range(1, 60, 4):
        folder = tmp_path / str(number)
        experiment, journal = private(folder), folder / "journal"
        folder.mkdir()

        def die(experiment: Experiment = experiment, journal: Path = journal, number: int = number) -> None:
            counting(monkeypatch, journal)
            fails_at(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            train(experiment)

        died = in_child(die) == -signal.SIGKILL
        deaths += died
        check(experiment, journal)
        if not died:
            break
        with monkeypatch.context() as patch:
            counting(patch, journal)
            saved = "saved" in _text(journal)
            resume = checkpoint.find(folder / "runs", "auto", experiment.to_toml()) if saved else None
            outcome = train(experiment, resume)
        assert outcome.summary["rounds"] == 3
        assert list(outcome.folder.rglob("*.part")) == []
        lines = journal.read_text().splitlines()
        if resume:
            assert outcome.summary["privacy"]["rounds"] >= lines.count("released")
    assert deaths > 3


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# A disk that takes no more


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_loses_nothing_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 0
    for number in range(1, 60, 4):
        folder = tmp_path / str(number)
        experiment, journal = private(folder), folder / "journal"
        folder.mkdir()

        def no_space() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            counting(patch, journal)
            fails_at(patch, number, no_space)
            try:
                train(experiment)
            except FedmetaError as refusal:
                shown = str(refusal)
            else:
                break
        full += 1
        assert shown.isprintable()
        assert os.strerror(errno.ENOSPC) in shown
        check(experiment, journal)
        if "saved" in _text(journal):
            assert train(experiment, only_folder(experiment)).summary["rounds"] == 3
    assert full > 3


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(FedmetaError, match=r"^\[tracking\] folder: cannot write .*") as refusal:
        train(private(tmp_path))
    assert str(refusal.value).isprintable()


# A clock that jumps back


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path) -> None:
    plain = ("runtime.checkpoint_every=1", "evaluation.every=0")
    unbroken = train(digits(tmp_path / "unbroken", *plain))
    experiment = digits(tmp_path / "broken", *plain)

    def stop(progress: Progress) -> None:
        if progress.round_number == 2 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, report=stop)
    folder = only_folder(experiment)
    newest = folder / "round-000002.safetensors"
    os.utime(newest, (0, 0))
    assert checkpoint.newest(folder)[1] == newest
    found = checkpoint.find(folder.parent, "auto", experiment.to_toml())
    resumed = train(experiment, found)
    for name, value in unbroken.meta_state.items():
        assert torch.equal(value, resumed.meta_state[name])


# Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize("held", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_results_are_written_comes_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    experiment = digits(tmp_path, "evaluation.every=0")
    finish = RunLogger.finish

    def interrupted(self: Any, *arguments: Any) -> Any:
        signal.raise_signal(held)
        return finish(self, *arguments)

    def ends(number: int, frame: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(RunLogger, "finish", interrupted)
    before = signal.signal(signal.SIGTERM, ends)
    try:
        outcome = train(experiment)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outcome.summary["rounds"] == 4
    assert not (outcome.folder / checkpoint.UNFINISHED).exists()


def test_ctrl_c_before_sites_are_there_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = digits(tmp_path)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_parts, "Membership", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(experiment)
    assert not Path(experiment.tracking.folder).exists()


@pytest.mark.slow
def test_ctrl_c_at_any_write_ends_with_a_checkpoint_that_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train(digits(tmp_path / "unbroken", *EACH_ROUND))
    stops = 0
    for number in range(2, 40, 5):
        experiment = digits(tmp_path / str(number), *EACH_ROUND)
        pressed = []

        def press(pressed: list[int] = pressed) -> None:
            if not pressed:
                pressed.append(1)
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            fails_at(patch, number, press)
            try:
                outcome = train(experiment)
            except KeyboardInterrupt:
                outcome = None
        if outcome is None:
            stops += 1
            runs = Path(experiment.tracking.folder)
            if not runs.exists() or not any(runs.iterdir()):
                continue  # before anything was there to lose
            outcome = train(experiment, only_folder(experiment))
        assert all(torch.equal(value, unbroken.meta_state[name]) for name, value in outcome.meta_state.items())
    assert stops > 3
