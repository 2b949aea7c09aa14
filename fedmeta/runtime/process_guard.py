"""Runs a command and, when stdin closes, ends whatever came of it: `python -I process_guard.py COMMAND [ARGUMENT]...`.

Flower's SuperLink and Ray start processes in sessions of their own, which outlive their launcher. This process
holds the read end of a pipe to the launcher: however that ends, by Ctrl-C or killed, the pipe closes, and everything
that descends from the command is ended, by process id. On Linux orphans come back to this process as their reaper, so
that none is overlooked. It runs by its path and needs the standard library alone, and so starts at once.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PATIENCE = {signal.SIGTERM: 2.0, signal.SIGKILL: 5.0}
"""Signals in the order in which they are sent, and how long each may take (seconds)."""


def main(command: list[str]) -> int:
    """Runs a command until it ends or stdin closes; returns its exit code, or 1 where it was ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Ctrl-C and a closed terminal are the launcher's to see; it closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL).pid
    code = None
    while code is None and not _closed():
        code = _reap().get(child)
    end_descendants()
    return 1 if code is None else code


def end_descendants() -> None:
    """Ends every descendant of this process: asks, waits, then kills."""
    for number, seconds in PATIENCE.items():
        deadline = time.monotonic() + seconds
        asked: set[int] = set()
        while time.monotonic() < deadline:
            _reap()
            alive = set(descendants(os.getpid()))
            if not alive:
                return
            for process in alive - asked:
                _send(process, number)
            asked |= alive
            time.sleep(0.05)


def descendants(ancestor: int) -> Iterator[int]:
    """Yields the ids of all processes that descend from one."""
    children: dict[int, list[int]] = {}
    for process, parent in _processes():
        children.setdefault(parent, []).append(process)
    waiting = list(children.get(ancestor, []))
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        yield process


def is_alive(process: int) -> bool:
    """Returns whether there is a process of this id that has not ended, reaped or not."""
    return any(process == other for other, _ in _processes())


def _processes() -> Iterator[tuple[int, int]]:
    """Yields the id and the parent's id of every process that is no zombie."""
    if Path("/proc/self/stat").exists():
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The name, in brackets, may itself hold brackets and spaces.
                state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                yield int(entry.parent.name), int(parent)
        return
    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,stat=,comm="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        process, parent, state, name = line.split(maxsplit=3)
        if not state.startswith("Z") and Path(name).name != "ps":
            yield int(process), int(parent)


def _closed() -> bool:
    """Returns whether the launcher's end of the pipe is closed, after waiting a tenth of a second for it."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], 0.1)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


def _reap() -> dict[int, int]:
    """Takes note of ended children, adopted ones too; returns their exit codes."""
    ended: dict[int, int] = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process == 0:
            return ended
        ended[process] = os.waitstatus_to_exitcode(status)


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
