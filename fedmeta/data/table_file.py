"""One table of a site: read, its label set apart, its cells checked."""

import csv
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedmeta.data.arrays import feature_order
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Data
from fedmeta.files import free_memory

MOST_COLUMNS = 50_000
"""A wider table is refused: pandas takes some tenths of a millisecond for each column."""

LONGEST_LABEL = 1_000
"""A longer label is refused: all labels take as much memory as the longest (characters)."""

_INDEX = r"__index_level_\d+__"
"""What pandas writes of an index without a name: row numbers, which are no feature."""

NAMED = 20
"""How many names an error lists."""


class Table(NamedTuple):
    """One file's content.

    Attributes:
        path: The file.
        header: Whether its first line names the columns.
        columns: The names of its features.
        x: Features [rows, columns], NaN = missing.
        labels: Labels [rows]: numbers, or text where not every one is a number; of several targets [rows, targets].
    """

    path: Path
    header: bool
    columns: list[str]
    x: NDArray[Any]
    labels: NDArray[Any]


def column_names(path: Path, data: Data) -> list[str]:
    """Returns the names of a file's columns, the label's among them; raises `FedmetaError` where it cannot be read."""
    if not _is_parquet(path):
        return list(data.columns) or _named(path)
    try:
        names = [str(name) for name in pq.read_schema(path).names]
    except (pa.ArrowException, OSError) as error:
        raise FedmetaError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from None
    return [name for name in names if not re.fullmatch(_INDEX, name)]


def read_features(path: Path, data: Data, names: Sequence[str]) -> pd.DataFrame:
    """Returns columns of a CSV or Parquet file that needs no label, as numbers; raises `FedmetaError` at what is none.

    Args:
        path: The file.
        data: What its texts mean.
        names: The columns.
    """
    parquet = _is_parquet(path)
    frame = _read_parquet(path) if parquet else _read_csv(path, data)
    table = Table(path, not data.columns and not parquet, list(names), np.empty(0), np.empty(0))
    return pd.DataFrame({name: _feature(table, frame[name], name) for name in names})


def read_table(path: Path, data: Data, only: Sequence[str] | None = None) -> Table:
    """Returns the content of a CSV or Parquet file; raises `FedmetaError` naming file, line, column and value.

    Args:
        path: The file.
        data: What its columns mean.
        only: The columns that are features; None for all but the label.
    """
    parquet = _is_parquet(path)
    frame = _read_parquet(path) if parquet else _read_csv(path, data)
    names = [str(name) for name in frame.columns]
    absent = [name for name in data.label_names if name not in names]
    if absent and len(names) == 1 and not parquet:
        raise FedmetaError(f"{path}: its first line is one cell, {names[0]!r}: cells must have commas between them")
    if absent:
        raise FedmetaError(
            f'{path}: no label column "{absent[0]}" (data.label); its columns are {listed(names)}'
            f"{nearest(absent[0], names)}"
        )
    if len(names) <= len(data.label_names):
        raise FedmetaError(f"{path}: there is no feature column beside the label")
    if not len(frame):
        raise FedmetaError(f"{path}: there are no rows")
    features = [name for name in names if name not in data.label_names and (only is None or name in set(only))]
    columns = [features[place] for place in feature_order(features, data.columns)]
    table = Table(path, not data.columns and not parquet, columns, np.empty(0), np.empty(0))
    arrays = [_feature(table, frame[name], name) for name in columns]
    found = [_labels(table, frame[name], name) for name in data.label_names]
    if len(found) > 1:
        _check_numbers(table, found, data.label_names)
    labels = found[0] if len(found) == 1 else np.stack([each.astype(np.float64) for each in found], 1)
    return table._replace(x=np.stack(arrays, axis=1), labels=labels)


def place(table: Table, row: int, column: str) -> str:
    """Returns where a cell is, for people: file, line (for Parquet the row, from 1), column."""
    line = None if _is_parquet(table.path) else _line(table, row)
    return f'{table.path}: {f"row {row + 1}" if line is None else f"line {line}"}, column "{column[:80]}"'


def listed(names: Sequence[str]) -> str:
    """Returns names as one text; of many, the first and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name[:80] for name in names[:NAMED]) + more


def _check_width(path: Path, width: int) -> None:
    if width > MOST_COLUMNS:
        raise FedmetaError(f"{path}: {width:,} columns, and a table may have {MOST_COLUMNS:,}: save it as an npz file")


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _read_csv(path: Path, data: Data) -> pd.DataFrame:
    try:
        names = list(data.columns) or _header(path)
        _check_width(path, len(names))
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                header=None if data.columns else 0,
                names=names,
                index_col=False,
                dtype=dict.fromkeys(data.label_names, str),
                keep_default_na=False,
                na_values=list(data.missing),
                skipinitialspace=True,
                encoding="utf-8-sig",
                low_memory=False,
            )
    except pd.errors.EmptyDataError:
        raise FedmetaError(f"{path}: the file is empty") from None
    except UnicodeDecodeError as error:
        raise FedmetaError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as error:
        given = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        if "field larger" in given:
            raise FedmetaError(f"{path}: a cell of its first line is longer than any name") from None
        raise FedmetaError(f"{path}: lines have different numbers of cells ({given})") from None
    except OSError as error:
        raise FedmetaError(f"{path} cannot be read: {error.strerror}") from None
    if data.columns and len(frame) and list(frame.iloc[0].astype(str).str.strip()) == names:
        raise FedmetaError(f"{path}: its first line names the columns: leave data.columns empty")
    return frame


def _named(path: Path) -> list[str]:
    """Returns the names in the first line of a CSV file; raises `FedmetaError` where it has none."""
    try:
        return _header(path)
    except pd.errors.EmptyDataError:
        raise FedmetaError(f"{path}: the file is empty") from None
    except UnicodeDecodeError as error:
        raise FedmetaError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error:
        raise FedmetaError(f"{path}: a cell of its first line is longer than any name") from None
    except OSError as error:
        raise FedmetaError(f"{path} cannot be read: {error.strerror}") from None


def _header(path: Path) -> list[str]:
    """Returns the names in the first line; raises `FedmetaError` where one is missing or there twice."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next((record for record in csv.reader(file, skipinitialspace=True) if record), None)
    if names is None:
        raise pd.errors.EmptyDataError
    _check_width(path, len(names))
    names = [name.strip() for name in names]
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise FedmetaError(f"{path}: column {number} has no name (was it written with an index?): leave it out")
        if first.setdefault(name, number) < number:
            raise FedmetaError(f'{path}: columns {first[name]} and {number} are both called "{name[:80]}"')
    return names


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        facts = pq.read_metadata(path)
        _check_width(path, facts.num_columns)
        size, free = facts.num_rows * facts.num_columns * 8, free_memory()
        if size > free // 2:
            raise FedmetaError(f"{path}: {size / 1e9:.1f} GB of numbers, more than half of the free memory: save fewer")
        whole = pq.read_table(path)
        index = [name for name in whole.column_names if re.fullmatch(_INDEX, name)]
        frame: pd.DataFrame = whole.drop_columns(index).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError) as error:
        raise FedmetaError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from None
    return frame


def _feature(table: Table, column: "pd.Series[Any]", name: str) -> NDArray[Any]:
    """Returns a column as numbers; raises `FedmetaError` at the first cell that is none."""
    if column.dtype.kind in "biuf":
        return _numpy(column)
    numbers = pd.to_numeric(column, errors="coerce") if column.dtype.kind not in "mM" else column.isna()
    wrong = (numbers.isna() & column.notna()).to_numpy() if column.dtype.kind not in "mM" else column.notna().to_numpy()
    if wrong.any():
        row = int(np.argmax(wrong))
        value = str(column.iloc[row])
        advice = (
            "encode the column as numbers"
            if wrong.mean() > 0.5
            else "correct it, or list it in data.missing if it means a missing value"
        )
        raise FedmetaError(f'{place(table, row, name)} is "{value[:40]}", not a number: {advice}')
    return _numpy(numbers)


def _labels(table: Table, column: "pd.Series[Any]", name: str) -> NDArray[Any]:
    """Returns the labels as numbers where all are, else as text; raises `FedmetaError` where one is missing."""
    absent = column.isna().to_numpy()
    if absent.any():
        raise FedmetaError(f"{place(table, int(np.argmax(absent)), name)} is missing: every row needs a label")
    if column.dtype.kind in "biuf":
        return _numpy(column)
    lengths = column.astype(str).str.len().to_numpy()
    if lengths.max(initial=0) > LONGEST_LABEL:
        row = int(np.argmax(lengths > LONGEST_LABEL))
        raise FedmetaError(f"{place(table, row, name)} is a text of {lengths[row]:,} characters, and no label")
    try:
        return _numpy(pd.to_numeric(column))
    except (ValueError, TypeError):
        return column.astype(str).str.strip().to_numpy(dtype=str)


def _check_numbers(table: Table, found: Sequence[NDArray[Any]], names: Sequence[str]) -> None:
    """Checks that several targets are numbers; raises `FedmetaError` at the first that is none."""
    for values, name in zip(found, names, strict=True):
        if values.dtype.kind not in "biuf":
            wrong = pd.to_numeric(pd.Series(values), errors="coerce").isna().to_numpy()
            row = int(np.argmax(wrong))
            raise FedmetaError(f'{place(table, row, name)} is "{values[row]!s:.40}": targets must be numbers')


def _numpy(column: "pd.Series[Any]") -> NDArray[Any]:
    """Returns a column of numbers as an array of NumPy's own type: nulls as NaN, truth values as 0 and 1."""
    if column.isna().any() or column.dtype.kind == "f":
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return column.to_numpy(dtype=np.int64 if column.dtype.kind in "biu" else np.float64)


def _line(table: Table, row: int) -> int | None:
    """Returns the line of a file, from 1, that a row of its table ends on; None beyond a cell too long to be read.

    Blank lines are no rows.
    """
    with open(table.path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        records = -1 if table.header else 0
        try:
            for record in reader:
                records += bool(record)
                if records > row:
                    break
        except csv.Error:
            return None
        return reader.line_num
