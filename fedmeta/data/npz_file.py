"""Arrays out of an npz file: read, or mapped where they are large and lie uncompressed in it."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.errors import FedmetaError, nearest
from fedmeta.files import free_memory

MAP_FROM = 1 << 26
"""Bytes from which an array that lies uncompressed in its file is mapped rather than read."""

NAMES = ("class_names", "feature_names", "target_names")
"""Arrays that are read wherever a file has them."""

_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    TokenError,
)


def npz_path(path: str) -> Path:
    """Returns the path of an npz file that exists; raises `FedmetaError` where it does not."""
    if not path:
        raise FedmetaError("data.path is not set: name the .npz file")
    file = Path(path).expanduser()
    if not file.exists():
        beside = [other.name for other in file.parent.glob("*.npz")] if file.parent.is_dir() else []
        raise FedmetaError(f"data.path: {path}: no such file{nearest(file.name, beside)}")
    if file.is_dir():
        raise FedmetaError(f'data.path: {path} is a folder: name the .npz file, or set data.source = "tables"')
    return file


def read_arrays(path: Path, needed: Sequence[str], wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Returns the arrays of an npz file that make a population.

    Args:
        path: The file.
        needed: Arrays with one entry per row; `time` is another where the file has it.
        wanted: Arrays that are read where the file has them, besides `NAMES`.

    Raises:
        FedmetaError: The file is no npz, lacks a needed array, holds a pickled one, or their lengths differ.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise FedmetaError(f"{path} is not an npz file (made by numpy.savez); its content is something else")
        with zipfile.ZipFile(path) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
    except _BROKEN as error:
        if isinstance(error, FedmetaError):
            raise
        raise FedmetaError(f"{path} cannot be read: {error}") from None
    for name in needed:
        if name not in there:
            raise FedmetaError(f'{path}: no array "{name}"; it holds {", ".join(there)}{nearest(name, there)}')
    by_row = [*needed, *(name for name in ("time",) if name in there and name not in needed)]
    names = [name for name in (*wanted, *NAMES) if name in there]
    arrays = {name: _read(path, name) for name in [*by_row, *names]}
    for name in by_row:
        if not arrays[name].ndim:
            raise FedmetaError(f'{path}: array "{name}" is a single value, and needs one entry per row')
    lengths = {name: len(arrays[name]) for name in by_row}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f'"{name}" {length}' for name, length in lengths.items())
        raise FedmetaError(f"{path}: the arrays have different lengths, and each needs one entry per row: {given}")
    return arrays


def _read(path: Path, name: str) -> NDArray[Any]:
    """Returns one array: mapped where it is large and lies uncompressed in the file, else read."""
    try:
        mapped = _mapped(path, f"{name}.npy")
        if mapped is not None:
            return mapped
        _check_size(path, f"{name}.npy")
        with np.load(path, allow_pickle=False) as arrays:
            array: NDArray[Any] = arrays[name]
        if not isinstance(array, np.ndarray):
            raise ValueError("it is not an array")
        return array
    except _BROKEN as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "Object arrays" in reason:
            raise FedmetaError(
                f'{path}: array "{name}" is pickled Python objects, which could run code: save numbers or text'
            ) from None
        raise FedmetaError(f'{path}: array "{name}" cannot be read ({reason}): is the file whole?') from None


def _check_size(path: Path, member: str) -> None:
    """Checks that an array may be unpacked: a small file may announce, or unpack to, more than the memory holds.

    Raises:
        ValueError: It is larger than half of the free memory, or than what the file holds of it.
    """
    with zipfile.ZipFile(path) as archive:
        size, free = archive.getinfo(member).file_size, free_memory()
        with archive.open(member) as file:
            found = _header(file)
    needed = math.prod(found[0]) * found[1].itemsize if found else size
    if needed > size:
        raise ValueError(f"it announces {needed:,} bytes and has {size:,}")
    if size > free // 2:
        raise ValueError(f"it takes {size / 1e9:.1f} GB unpacked, more than half of the free memory: save fewer rows")


def _mapped(path: Path, member: str) -> NDArray[Any] | None:
    """Returns a large array stored uncompressed in C order as a map of its place in the file; None for any other."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < MAP_FROM:
            return None
        # The local header repeats the name and has extra fields of another length, so that the offset of the
        # content is known from it alone (PKWARE's APPNOTE, 4.3.7).
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), dtype="<u2").tolist()
        file.seek(info.header_offset + 30 + name_length + extra_length)
        header = _header(file)
        if header is None:
            return None
        shape, dtype = header
        # Copy-on-write: torch warns about arrays that it may not write to; nothing is ever written to this one.
        return np.memmap(path, dtype=dtype, mode="c", offset=file.tell(), shape=shape)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Returns shape and type of the array whose `.npy` header comes next; None where it cannot be mapped as it is."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        return None
    return None if fortran or dtype.hasobject else (shape, dtype)
