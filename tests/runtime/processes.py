"""What is left of processes that a test started, by a mark in their environment that they inherit."""

import os
import time
from collections.abc import Callable
from pathlib import Path

MARK = "FEDMETA_TEST_MARK"


def marked(value: str) -> list[int]:
    """Returns the living processes whose environment has the mark, this one left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{MARK}={value}".encode() in environment and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Returns whether something came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
