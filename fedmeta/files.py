"""Files on disk: atomic writes, and tensors read without executing anything."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from fedmeta.errors import FedmetaError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

PART = ".part"
"""How the name of a file ends that is still being written; what a killed process left of one means nothing."""


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file atomically: under a name that no other process uses, to the disk, then renamed.

    The folder is created; the folder's entry, and that of each folder created, are on the disk too when this returns.

    Raises:
        OSError: The folder or the disk does not take it; what was there before is still there.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:  # also where Ctrl-C comes between
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder. Only where no other process writes into it.

    Raises:
        OSError: The folder does not allow it.
    """
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates a folder with those above it, and has their entries written to the disk.

    Raises:
        OSError: It cannot be created.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    if folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock on a file, which is created, until the end of the block or of the process, however that dies.

    Args:
        path: The file.
        wait: Whether to wait for another process that holds it.

    Raises:
        FedmetaError: Another process holds it, or the folder does not take the file.
    """
    try:
        make_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FedmetaError(f"{path}: cannot be created: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise FedmetaError(f"{path.parent}: another process writes there; wait for it, or stop it") from None
        except OSError as error:
            raise FedmetaError(f"{path}: cannot be locked: {error.strerror or error}") from error
        yield
    finally:
        os.close(handle)


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


def sync_folder(folder: Path) -> None:
    """Has a folder's entries written to the disk; raises `OSError` where that fails."""
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
