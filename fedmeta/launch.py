"""How a launcher and the ServerApp that it launched speak: by files in a folder, for Flower's exit codes say nothing.

`flwr run --stream` exits with 0 when the ServerApp raised, and a ServerApp that exits reads `finished:completed`. So
the ServerApp writes its progress and its result into the folder that `FEDMETA_RESULT` names, and the launcher judges
by the result alone. A file `stop` in the folder asks the ServerApp to write a checkpoint and end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmeta.progress import Progress, Report

RESULT_VARIABLE = "FEDMETA_RESULT"
"""Environment variable of the ServerApp: the folder in which its launcher waits."""

RESUME_VARIABLE = "FEDMETA_RESUME"
"""Environment variable of the ServerApp: the folder of the run to go on with."""

_PROCESS, _PROGRESS, _RESULT, _STOP = "server.pid", "progress.jsonl", "result.json", "stop"


def launcher_folder() -> Path | None:
    """Returns the folder in which this process's launcher waits, or None where nobody does."""
    folder = os.environ.get(RESULT_VARIABLE)
    return Path(folder) if folder else None


def announce(folder: Path) -> None:
    """Tells the launcher which process the ServerApp is, for Flower itself takes a minute to miss it."""
    part = folder / f"{_PROCESS}.part"
    part.write_text(str(os.getpid()))
    part.replace(folder / _PROCESS)


def server_process(folder: Path) -> int | None:
    """Returns the id of the ServerApp's process, or None while it has not started."""
    try:
        return int((folder / _PROCESS).read_text())
    except FileNotFoundError:
        return None


def reporter(folder: Path) -> Report:
    """Returns what the ServerApp reports to; it raises `KeyboardInterrupt` once the launcher asked to stop."""

    def report(progress: Progress) -> None:
        with (folder / _PROGRESS).open("a", encoding="utf-8") as file:
            file.write(progress.to_json() + "\n")
        if (folder / _STOP).exists():
            raise KeyboardInterrupt

    return report


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
