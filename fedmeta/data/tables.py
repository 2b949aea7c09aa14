"""Sites from a folder of tables, one CSV or Parquet file each: the file's name is the site's."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.arrays import build_population
from fedmeta.data.labels import encode_labels
from fedmeta.data.population import ArrayPopulation
from fedmeta.data.table_file import Table, listed, place, read_table
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Data

_SUFFIXES = (".csv", ".parquet")
_HEADERLESS = (".data", ".txt")


def load_tables(data: Data) -> ArrayPopulation:
    """Returns the population of the folder `data.path`: a site per `NAME.csv` or `NAME.parquet`.

    With `data.columns` the files have no header line, these are the names of their columns in order, and `.data` and
    `.txt` files with commas are read too. All files have the same columns, in any order. Column `data.label` is the
    label (or several columns, the targets of a regression), every other column a feature: a number, or missing
    (empty, or one of `data.missing`). A single file in place of the folder is one site's own.

    Raises:
        FedmetaError: A file, column or cell is not as it should be; the error names it.
    """
    folder = _existing(data.path)
    if folder.is_file():
        return load_table_site(data, data.path, "")
    files = _files(folder, data)
    return _population(str(folder), [read_table(file, data) for file in files], [file.stem for file in files], data)


def load_table_site(data: Data, path: str, name: str, only: Sequence[str] | None = None) -> ArrayPopulation:
    """Returns the population whose one site holds all rows of a file, called `name`, or as the file where empty.

    Args:
        data: What a file's columns mean.
        path: The file.
        name: The site's name.
        only: The columns that are features; None for all but the label.
    """
    file = _existing(path)
    return _population(path, [read_table(file, data, only)], [name or file.stem], data)


def _existing(path: str) -> Path:
    if not path:
        raise FedmetaError("data.path is not set: name the folder with one file per site")
    file = Path(path).expanduser()
    if not file.exists():
        beside = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise FedmetaError(f"data.path: {path}: no such file or folder{nearest(file.name, beside)}")
    return file


def _files(folder: Path, data: Data) -> list[Path]:
    """Returns the folder's tables in the order of the sites' names; raises `FedmetaError` where there is none."""
    suffixes = _SUFFIXES + (_HEADERLESS if data.columns else ())
    there = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    files = sorted(
        (file for file in there if file.suffix.lower() in suffixes), key=lambda file: (file.stem, file.suffix)
    )
    if not files:
        raw = sorted(file.name for file in there if file.suffix.lower() in _HEADERLESS)
        hint = f"; {raw[0]} has no header: name its columns in data.columns" if raw else ""
        raise FedmetaError(f"data.path: {folder} has no file {' or '.join('*' + suffix for suffix in suffixes)}{hint}")
    for before, file in pairwise(files):
        if before.stem == file.stem:
            raise FedmetaError(f'{folder}: {before.name} and {file.name} would both be site "{file.stem}"')
    return files


def _population(origin: str, tables: Sequence[Table], names: list[str], data: Data) -> ArrayPopulation:
    columns = tables[0].columns
    for table in tables[1:]:
        _same_columns(tables[0], table)
    starts = np.cumsum([0, *(len(table.x) for table in tables)])

    def cell(row: int, column: str) -> str:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return place(tables[number], row - int(starts[number]), column)

    labels = encode_labels(
        _joined_labels([table.labels for table in tables]),
        lambda row: cell(row, ", ".join(data.label_names)),
        data.task,
        data.binarise,
        target=data.target,
        names=data.label_names,
    )
    return build_population(
        origin,
        np.concatenate([_in_order(table, columns) for table in tables]),
        labels,
        np.repeat(np.arange(len(tables)), np.diff(starts)),
        names,
        lambda row, column: cell(row, columns[column]),
        feature_names=tuple(columns),
        min_rows=data.min_rows if len(tables) > 1 else 0,
    )


def _in_order(table: Table, columns: list[str]) -> NDArray[Any]:
    """Returns a table's features in the order of these columns."""
    places = {name: place for place, name in enumerate(table.columns)}
    return table.x if table.columns == columns else table.x[:, [places[name] for name in columns]]


def _same_columns(first: Table, other: Table) -> None:
    here, there = set(first.columns), set(other.columns)
    absent = [name for name in first.columns if name not in there]
    foreign = [name for name in other.columns if name not in here]
    if absent or foreign:
        given = [f"lacks {listed([repr(name) for name in absent])}"] if absent else []
        given += [f"has {listed([repr(name) for name in foreign])} besides"] if foreign else []
        raise FedmetaError(
            f"{other.path} {' and '.join(given)}: every file needs the columns of {first.path}"
            + (nearest(absent[0], foreign) if absent else "")
        )


def _joined_labels(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Returns the labels of all files: numbers where those of every file are, else text."""
    if all(part.dtype.kind in "biuf" for part in parts):
        return np.concatenate(parts)
    return np.concatenate([part.astype(str) for part in parts])
