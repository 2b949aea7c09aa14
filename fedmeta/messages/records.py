"""Reading typed values out of Flower's records, which check nothing of their own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.text import visible

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)
V = TypeVar("V", bool, int, float, str)

PLAIN = {np.dtype(name): name for name in ("float32", "float64", "int64", "uint8", "bool")}
"""Types of arrays whose headers are kept, and their names, which NumPy makes again each time."""

LARGEST = 2**63 - 1
"""The largest whole number that a message may hold."""


LONGEST_REASON = 300
"""How much is reported of what is wrong with a message, which may hold its sender's text (characters)."""


class MessageError(ValueError):
    """A message that does not hold what the contract requires."""

    def __init__(self, reason: str) -> None:
        super().__init__(visible(reason[:LONGEST_REASON]))


def write_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Returns tensors as a record."""
    record = ArrayRecord()
    for name, value in tensors.items():
        # One by one: of a dictionary of arrays Flower makes each a second time.
        record[name] = _array(value.detach().cpu().contiguous().numpy())
    return record


def read_arrays(content: RecordDict, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a record; raises `MessageError` where there are none or they cannot be read."""
    try:
        return {
            key: torch.from_numpy(_numbers(array)) for key, array in read_record(content, name, ArrayRecord).items()
        }
    except MessageError:
        raise
    except Exception as error:  # whatever NumPy's reader makes of mutated bytes
        raise MessageError(f'the arrays of "{name}" cannot be read') from error


def _array(numbers: NDArray[Any]) -> Array:
    """Returns an array as Flower's `Array(numbers)` does, by a kept header where there was one of its shape."""
    name = PLAIN.get(numbers.dtype)
    if name is None:
        return Array(numbers)
    data = b"".join((_header(numbers.dtype.str, numbers.shape), numbers.data))
    return Array(name, tuple(numbers.shape), "numpy.ndarray", data)


def _numbers(array: Array) -> NDArray[Any]:
    """Returns what Flower's `array.numpy()` does, without parsing a header that is known."""
    plain = array.stype == "numpy.ndarray" and array.dtype in PLAIN.values()
    header = _header(np.dtype(array.dtype).str, array.shape) if plain else b""
    if not plain or not array.data.startswith(header):
        return array.numpy()
    return np.frombuffer(array.data, array.dtype, offset=len(header)).reshape(array.shape).copy()


@lru_cache(maxsize=1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns what NumPy's format puts before an array's numbers, which takes longer than the numbers of small ones."""
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def payload_bytes(content: RecordDict) -> int:
    """Returns a message's size: arrays as they are, numbers as 8 bytes, truths as 1, texts and keys in UTF-8.

    Flower's own count fails at an empty text or list, such as the class list of a regression.
    """
    return sum(
        record.count_bytes()
        if isinstance(record, ArrayRecord)
        else sum(_size(key) + _size(value) for key, value in record.items())
        for record in content.values()
    )


def _size(value: Any) -> int:
    if isinstance(value, list):
        # A record's list holds values of one type, and often one for each site.
        kind = type(value[0]) if value else None
        if kind is str:
            return _size("".join(value))
        return 8 * len(value) if kind in (int, float) else sum(map(_size, value))
    if isinstance(value, str | bytes):
        return len(value.encode(errors="surrogatepass") if isinstance(value, str) else value)
    return 1 if isinstance(value, bool) else 8


def only(keys: Mapping[str, Any], *names: str) -> None:
    """Checks that a message or record holds exactly these keys; raises `MessageError` otherwise."""
    if set(keys) != set(names):
        raise MessageError(f"it holds {sorted(keys)} and not {sorted(names)}")


def read_record(content: RecordDict, name: str, kind: type[R], *keys: str) -> R:
    """Returns a record of one kind, with exactly these keys where any are named."""
    record = content[name]
    if not isinstance(record, kind):
        raise MessageError(f'"{name}" is not a {kind.__name__}')
    if keys:
        only(record, *keys)
    return record


def with_optional(content: RecordDict, name: str, keys: tuple[str, ...], optional: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the keys that a record must have: some, and others as soon as it has one of these."""
    record = content.get(name)
    there = set(record) if isinstance(record, ConfigRecord) else set()
    return (*keys, *optional) if there & set(optional) else keys


def read_scalar(record: ConfigRecord | MetricRecord, key: str, kind: type[V]) -> V:
    """Returns a value of one type (a whole number serves as a float)."""
    value = record.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or type(value) is not kind:
        raise MessageError(f'"{key}" is not of type {kind.__name__}')
    _check_size(key, value)
    return value


def read_list(record: ConfigRecord | MetricRecord, key: str, kind: type[V], length: int | None = None) -> list[V]:
    """Returns a list of values of one type and, where given, of one length."""
    values: Any = record.get(key)
    if not isinstance(values, list) or not set(map(type, values)) <= {kind}:
        raise MessageError(f'"{key}" is not a list of {kind.__name__}')
    if length is not None and len(values) != length:
        raise MessageError(f'"{key}" has {len(values)} values and not {length}')
    if kind is int and values:
        _check_size(key, min(values))
        _check_size(key, max(values))
    return values


def _check_size(key: str, value: Any) -> None:
    """Checks that a whole number fits into an array: Flower carries unsigned numbers of 64 bits, arrays signed ones."""
    if type(value) is int and not -LARGEST <= value <= LARGEST:
        raise MessageError(f'"{key}" has a number that is too large')


def write_names(names: tuple[str, ...]) -> ConfigRecord:
    """Returns the names of sites as a record."""
    return ConfigRecord({"names": list(names)})


def read_names(content: RecordDict) -> tuple[str, ...]:
    """Returns the names of the sites that a message is about."""
    return tuple(read_list(read_record(content, "sites", ConfigRecord, "names"), "names", str))


Categories = tuple[tuple[str, tuple[str, ...]], ...]
"""Columns of categories by name, and the names known of each."""

CATEGORY_KEYS = ("category_columns", "category_counts", "category_names")

MOST_CATEGORIES = 100_000
"""More names of categories are refused in a message."""


def write_categories(categories: Categories) -> dict[str, Any]:
    """Returns columns of categories as entries of a record: the columns, how many names each has, and all names.

    Where there are none, a record has none of these entries.
    """
    if not categories:
        return {}
    return {
        "category_columns": [column for column, _ in categories],
        "category_counts": [len(names) for _, names in categories],
        "category_names": [name for _, names in categories for name in names],
    }


def read_categories(record: ConfigRecord) -> Categories:
    """Returns the columns of categories that a record holds; raises `MessageError` where they are none."""
    if not set(CATEGORY_KEYS) & set(record):
        return ()
    columns, names = read_list(record, "category_columns", str), read_list(record, "category_names", str)
    counts = read_list(record, "category_counts", int, len(columns))
    if len(set(columns)) < len(columns) or min(counts, default=0) < 0 or sum(counts) != len(names):
        raise MessageError("its columns of categories and their names do not fit together")
    if len(names) > MOST_CATEGORIES:
        raise MessageError(f"it has {len(names)} categories, and may have {MOST_CATEGORIES}")
    ends = np.cumsum([0, *counts]).tolist()
    found = tuple(
        (column, tuple(names[start:end])) for column, start, end in zip(columns, ends[:-1], ends[1:], strict=True)
    )
    if any(len(set(own)) < len(own) for _, own in found):
        raise MessageError("two categories of a column have the same name")
    return found
