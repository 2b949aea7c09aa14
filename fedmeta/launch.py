"""The contract between a launcher and the ServerApp that it starts: files in a folder, or lines of Flower's log.

Flower's exit codes do not report success: `flwr run --stream` exits with 0 when the ServerApp raised, and a ServerApp
that exits reads `finished:completed`. On one machine the ServerApp therefore writes its progress and its result into
the folder that `FEDMETA_RESULT` names, and the launcher goes by the result alone; a file `stop` in the folder asks the
ServerApp to write a checkpoint and end. Over a deployment progress is printed to the log, and MLflow has the result.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmeta.experiment import Experiment
from fedmeta.progress import Progress, ProgressCallback
from fedmeta.text import visible

RESULT_VARIABLE = "FEDMETA_RESULT"
"""Environment variable of the ServerApp: the folder in which its launcher waits."""

RESUME_VARIABLE = "FEDMETA_RESUME"
"""Environment variable of the ServerApp: the folder of the run to resume."""

TRACKING_URI = "FEDMETA_TRACKING_URI"
"""Environment variable: the MLflow store as this process reaches it, in place of the experiment's `tracking.uri`."""

LOG = "fedmeta log: "
"""How the first line of the ServerApp begins, which holds the key that its later lines for the submitter begin with."""

_PROCESS, _PROGRESS, _RESULT, _STOP = "server.pid", "progress.jsonl", "result.json", "stop"


def launcher_folder() -> Path | None:
    """Returns the folder in which this process's launcher waits, or None where none does."""
    folder = os.environ.get(RESULT_VARIABLE)
    return Path(folder) if folder else None


def announce(folder: Path) -> None:
    """Reports the ServerApp's process to the launcher, since Flower takes a minute to notice that it died."""
    part = folder / f"{_PROCESS}.part"
    part.write_text(str(os.getpid()))
    part.replace(folder / _PROCESS)


def server_process(folder: Path) -> int | None:
    """Returns the id of the ServerApp's process, or None while it has not started."""
    try:
        return int((folder / _PROCESS).read_text())
    except FileNotFoundError:
        return None


def reporter(folder: Path) -> ProgressCallback:
    """Returns what the ServerApp reports to; it raises `KeyboardInterrupt` once the launcher asked to stop."""

    def report(progress: Progress) -> None:
        with (folder / _PROGRESS).open("a", encoding="utf-8") as file:
            file.write(progress.to_json() + "\n")
        if (folder / _STOP).exists():
            raise KeyboardInterrupt

    return report


def tracked(experiment: Experiment) -> Experiment:
    """Returns the experiment with the store that the environment names for this process, if it names one."""
    uri = os.environ.get(TRACKING_URI)
    return experiment.with_overrides([f"tracking.uri={json.dumps(uri)}"]).with_user_info_kept() if uri else experiment


class LogWriter:
    """Writes lines into the ServerApp's log that the submitter believes.

    They begin with a random key, which the first line holds, before any text that came from a site: no name of a site,
    and no text of an error, can look like such a line.
    """

    def __init__(self) -> None:
        self._key = secrets.token_hex(8)
        print(f"{LOG}{self._key}", flush=True)

    def progress(self, progress: Progress) -> None:
        """Prints progress."""
        print(f"fedmeta {self._key} progress: {progress.to_json()}", flush=True)

    def error(self, why: str) -> None:
        """Prints why the run failed."""
        print(f"fedmeta {self._key} error: {visible(why)}", flush=True)


class LogReader:
    """Reads what a `LogWriter` wrote, in a log that holds other lines too."""

    def __init__(self) -> None:
        self._key = ""

    def read(self, line: str) -> Progress | str | None:
        """Returns the progress or the error that a line holds; None where it holds neither."""
        if not self._key:
            found = re.fullmatch(rf"{LOG}([0-9a-f]{{16}})", line.rstrip())
            self._key = found[1] if found else ""
            return None
        start = f"fedmeta {self._key} "
        if line.startswith(f"{start}progress: "):
            return Progress.from_json(line.removeprefix(f"{start}progress: "))
        return line.removeprefix(f"{start}error: ").strip() if line.startswith(f"{start}error: ") else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes the ServerApp's result, atomically."""
    part = folder / f"{_RESULT}.part"
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(folder / _RESULT)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Returns the ServerApp's result, or None while there is none."""
    try:
        result: dict[str, Any] = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result


def ask_to_stop(folder: Path) -> None:
    """Asks the ServerApp to end at its next report."""
    (folder / _STOP).touch()


class ProgressTail:
    """Reads progress as it is written.

    Args:
        folder: The launcher's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _PROGRESS
        self._read = 0

    def fresh(self) -> Iterator[Progress]:
        """Yields what was reported since the last call; a line that is still being written comes next time."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            yield Progress.from_json(line)
