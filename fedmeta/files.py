"""Files on disk: atomic writes, and tensors read without executing anything."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmeta.errors import FedmetaError

Value = TypeVar("Value")

PART = ".part"
"""How the name of a file ends that is still being written; what a killed process left of one means nothing."""


def write_atomic(path: Path, content: bytes) -> None:
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


def read_json(text: str, kind: type[Value], what: str) -> Value:
    """Reads a value of a type, such as a dataclass, from JSON that others may have written.

    Args:
        text: The JSON.
        kind: The type; nothing is converted, and nothing may be missing.
        what: What it is, for the message.

    Raises:
        FedmetaError: It is no JSON, or not of this type; names the first part that is wrong.
    """
    adapter: TypeAdapter[Value] = TypeAdapter(kind)
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        raise FedmetaError(f"{what}{f': {place}' if place else ''}: {first['msg'][:100]}") from None


def free_memory() -> int:
    """Returns how much memory a process may still take on this machine or in its container (bytes)."""
    free = _number("/proc/meminfo", "MemAvailable:", 1024) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number("/sys/fs/cgroup/memory.max", "", 1)
    return min(free, max(limit - (_number("/sys/fs/cgroup/memory.current", "", 1) or 0), 0)) if limit else free


def _number(path: str, start: str, unit: int) -> int | None:
    """Returns the number on the line of a system file that starts so; None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
        return next(int(line.removeprefix(start).split()[0]) * unit for line in lines if line.startswith(start))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: Path, what: str, format_name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads a safetensors file.

    Args:
        path: The file.
        what: What it should be, for the message.
        format_name: The format that its header must name.

    Returns:
        The header's texts, and the tensors by name.

    Raises:
        FedmetaError: The file cannot be read, or is of another format or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = dict(file.metadata() or {})
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise FedmetaError(f"{path}: not a readable {what} ({error})") from error
    if header.get("format") != format_name:
        raise FedmetaError(f"{path}: not a {what} of this version of fedmeta")
    return header, tensors
