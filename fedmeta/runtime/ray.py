"""The ray runtime: the same ServerApp and ClientApp through `flwr run`, on Flower's simulation.

Every simulated node hosts a share of the sites. Nodes run in parallel as far as there are processors, each with its
part of them: torch takes as many threads as `runtime.threads`, or else as many as a node's part has. More than
one thread changes the last bits of a float; so may the batches, since a node computes its own sites only. Across
runtimes results therefore agree to 1e-6 and not to the bit.

With RAY_ADDRESS set, nodes run on that cluster, whose machines must find the data under the same path.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from fedmeta.build import source_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.launch import (
    RESULT_VARIABLE,
    RESUME_VARIABLE,
    ProgressTail,
    ask_to_stop,
    read_result,
    server_process,
)
from fedmeta.problems import TaskSource
from fedmeta.progress import ProgressCallback
from fedmeta.runtime.process_guard import is_alive
from fedmeta.runtime.superlink import (
    CONNECTION,
    environment,
    keep,
    last_log_line,
    superlink,
    write_app,
    write_run_config,
)

_QUIET_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(1 << 29),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_POLL_S = 0.1
_LOOK_S = 2.0
"""How often to look whether the ServerApp's process is still there (seconds)."""
_START_S = 300.0
"""How long a run may take to report for the first time, beyond its own timeouts (seconds)."""
_GRACE_S = 5.0
"""How long a result may come after a process that it takes has ended (seconds)."""
_STOP_S = 60.0
"""How long a stopped run may take for its checkpoint (seconds)."""


def run(experiment: Experiment, resume: Path | None, report: ProgressCallback) -> tuple[dict[str, Any], Path]:
    """Runs an experiment on Flower's simulation, with its own SuperLink that is gone afterwards.

    Args:
        experiment: The run's description, with absolute paths.
        resume: The folder of an unfinished run to resume.
        report: Takes progress.

    Returns:
        The summary and the run's folder.

    Raises:
        FedmetaError: The data or the experiment is not usable, or the run failed; the message has the path of its log.
        KeyboardInterrupt: The user stopped it; a checkpoint has been written where training had begun.
    """
    # Errors in the data are reported in full here, since they are the user's own.
    source = source_of(experiment)
    sites = len(source.sites()) if isinstance(source, TaskSource) else len(source)
    nodes = min(experiment.runtime.nodes, sites)
    work = _work_folder()
    log = work / "log.txt"
    try:
        with _terminable():
            return _launch(experiment, nodes, resume, report, work, log)
    except FedmetaError as error:
        raise FedmetaError(f"{error}; its log: {_kept(log, Path(experiment.tracking.folder))}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _launch(
    experiment: Experiment, nodes: int, resume: Path | None, report: ProgressCallback, work: Path, log: Path
) -> tuple[dict[str, Any], Path]:
    folder, home = work / "run", work / "flwr"
    folder.mkdir()
    (work / "ray").mkdir()
    extra = {**_QUIET_RAY, "RAY_TMPDIR": str(work / "ray"), RESULT_VARIABLE: str(folder)}
    env = environment(home, extra | ({RESUME_VARIABLE: str(resume.absolute())} if resume else {}))
    app, config = write_app(work / "app"), write_run_config(work / "run.toml", experiment.to_toml())
    command = ["flwr", "run", str(app), CONNECTION, "--stream", "--run-config", str(config)]
    command += ["--federation-config", _federation(experiment, nodes)]
    with superlink(home, env, log) as link, keep(command, env, log) as client:
        try:
            result = _wait(experiment, folder, report, (link, client), log)
        except KeyboardInterrupt:
            _stop(folder, client)
            raise
    if "error" in result:
        raise FedmetaError(result["error"])
    if "failure" in result:
        raise FedmetaError(f"the server failed: {result['failure']}")
    return result["summary"], Path(result["folder"])


def _wait(
    experiment: Experiment,
    folder: Path,
    report: ProgressCallback,
    processes: Sequence[subprocess.Popen[bytes]],
    log: Path,
) -> dict[str, Any]:
    """Passes on progress until there is a result; raises where there will be none."""
    tail = ProgressTail(folder)
    # Between two reports lie at most a refresh, a round and an evaluation, of which each has its own timeout.
    patience = _START_S + 3 * experiment.server.round_timeout
    heard, looked, ended = time.monotonic(), 0.0, None
    while True:
        result = read_result(folder)
        for progress in tail.fresh():
            heard = time.monotonic()
            report(progress)
        if result is not None:
            return result
        now = time.monotonic()
        if ended is None and any(process.poll() is not None for process in processes):
            ended = now
        if ended is None and now - looked > _LOOK_S:
            server, looked = server_process(folder), now
            ended = now if server is not None and not is_alive(server) else None
        if ended is not None and now - ended > _GRACE_S:
            raise FedmetaError(f"Flower's run ended without a result: {last_log_line(log)}")
        if now - heard > patience:
            raise FedmetaError(f"Flower's run has not reported for {patience:.0f} s: {last_log_line(log)}")
        time.sleep(_POLL_S)


def _stop(folder: Path, client: subprocess.Popen[bytes]) -> None:
    """Has the run write its checkpoint and end, if it has begun; a second Ctrl-C does not wait for that."""
    ask_to_stop(folder)
    deadline = time.monotonic() + _STOP_S
    begun = any(True for _ in ProgressTail(folder).fresh())
    while begun and read_result(folder) is None and client.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _federation(experiment: Experiment, nodes: int) -> str:
    """Returns Flower's description of the simulation: how many nodes, and which part of the machine one takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(cores, experiment.runtime.threads) or max(1, cores // nodes)
    at_once = min(nodes, cores // threads)
    settings = {"num-supernodes": nodes, "client-resources-num-cpus": threads}
    if "RAY_ADDRESS" not in os.environ:
        settings |= {"init-args-num-cpus": at_once * threads}
    parts = [f"{key}={value}" for key, value in settings.items()]
    gpus = 1.0 / at_once if experiment.runtime.device == "cuda" else 0.0
    return " ".join([*parts, f"client-resources-num-gpus={gpus}", 'init-args-logging-level="ERROR"'])


def _work_folder() -> Path:
    """Returns a new folder whose path is short, as those of sockets have to be."""
    return Path(tempfile.mkdtemp(prefix="fedmeta-", dir="/tmp" if os.path.isdir("/tmp") else None))


def _kept(log: Path, folder: Path) -> str:
    """Moves a failed run's log to where runs are; returns its path."""
    name = datetime.now(UTC).strftime("ray-%Y%m%d-%H%M%S.log")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, folder / name)
    except OSError:
        return f"none, for {folder} cannot be written"
    return str(folder / name)


@contextmanager
def _terminable() -> Iterator[None]:
    """Has SIGTERM do what Ctrl-C does, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
