"""Flower's processes: an app folder to submit, a SuperLink of our own, and an end to everything that came of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from fedmeta.errors import FedmetaError
from fedmeta.experiment.validation import to_text
from fedmeta.versions import __version__

PACKAGES = ("fedmeta", "clients", "server")
CONNECTION = "fedmeta"
"""What the SuperLink is called in Flower's configuration."""

_START_S, _END_S = 60.0, 20.0
_TRIES = 3

_PYPROJECT = """[project]
name = "fedmeta"
version = "{version}"

[tool.flwr.app]
publisher = "fedmeta"
fab-include = [{include}]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
experiment = ""
resume = ""
"""


def write_app(folder: Path) -> Path:
    """Writes the app that `flwr run` submits: the three packages as they are imported here, and what names them."""
    include = ", ".join(f'"{package}/**/*.py"' for package in PACKAGES)
    for package in PACKAGES:
        source = Path(str(import_module(package).__file__)).parent
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(version=__version__, include=include))
    return folder


def write_run_config(path: Path, experiment: str, resume: str = "") -> Path:
    """Writes the run config: the experiment's TOML under its one key, and which run of the server's to resume."""
    path.write_text(f"experiment = {to_text(experiment)}\nresume = {to_text(resume)}\n", encoding="utf-8")
    return path


def environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of Flower's processes.

    Args:
        home: Flower's own folder, so that neither the user's configuration nor a SuperLink of theirs is touched.
        extra: Further variables.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # What can be imported here, such as a model of the user's own, can be imported there.
        "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


@contextmanager
def keep(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command beside this process; at the end of the block, or of this process, all that came of it ends.

    Args:
        command: A command of Flower's, and its arguments.
        env: Its environment.
        log: The file that takes its output.
    """
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        raise FedmetaError(f'{command[0]} is not installed: pip install "flwr[simulation]"')
    guard = [sys.executable, "-I", str(Path(__file__).with_name("process_guard.py")), program, *command[1:]]
    with log.open("ab") as file:
        # Its own session, so that Ctrl-C comes to this process alone and the run can end in order.
        process = subprocess.Popen(
            guard, stdin=subprocess.PIPE, stdout=file, stderr=file, env=dict(env), start_new_session=True
        )
    try:
        yield process
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def superlink(home: Path, env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a SuperLink for simulations on a free port, and writes Flower's configuration for `flwr run APP fedmeta`.

    Raises:
        FedmetaError: It does not start; the message has its last line.
    """
    for attempt in range(_TRIES):
        port = free_port()
        command = ["flower-superlink", "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        with keep(command, env, log) as process:
            if answers(process, port):
                home.mkdir(parents=True, exist_ok=True)
                (home / "config.toml").write_text(
                    f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
                    f'address = "127.0.0.1:{port}"\ninsecure = true\n'
                )
                yield process
                return
            # Another process may have taken the port since it was found free: then a second one is worth a try.
            if process.poll() is None or attempt == _TRIES - 1:
                raise FedmetaError(f"Flower's SuperLink does not start: {last_log_line(log)}")


def free_port() -> int:
    """Returns a port of this machine that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_log_line(log: Path) -> str:
    """Returns the last informative line of a log, or that there is none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    spoken = [line.strip() for line in lines if any(letter.isalpha() for letter in line)]
    telling = [line for line in spoken if "Error" in line or "rror:" in line]
    return (telling or spoken or ["it printed nothing"])[-1][:300]


def answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Returns whether a SuperLink in plain text gets to answer at a port of this machine, before it ends."""
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False
