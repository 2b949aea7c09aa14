"""Files that are there whole or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PART = ".part"
"""How the name of a file ends that is still being written; what a killed process left of one means nothing."""


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically: under another name, to the disk, then renamed; the folder is created.

    Raises:
        OSError: The folder or the disk does not take it; what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(PART)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
