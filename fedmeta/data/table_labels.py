"""Labels of tables by one rule: text is stripped; 1, 1.0 and "1" are one class, "01" and "1" are two."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.data.columns import looks_like_dates, name_of
from fedmeta.data.refusals import listed
from fedmeta.data.table_file import RawTable
from fedmeta.experiment import Data

LONGEST_LABEL = 1_000
"""A longer label is refused: all labels take as much memory as the longest (characters)."""

_COMMA_NUMBER = re.compile(r"[+-]?\d+,\d+")
_ZEROS = re.compile(r"[+-]?0\d+")


def table_labels(tables: Sequence[RawTable], data: Data, problems: list[str], notes: list[str]) -> NDArray[Any] | None:
    """Returns the labels of all files: numbers where those of every file are, else text; None where one is wrong.

    Whole numbers are classes, also where one file writes 1.0 and the others 1. Where every file writes a decimal point
    they are the targets of a regression, unless there are two at most; `data.task` decides it otherwise.

    Args:
        tables: The files.
        data: The experiment's description of labels.
        problems: Takes what is wrong.
        notes: Takes what was decided.
    """
    before = len(problems)
    columns = [[_texts(table, name, problems) for table in tables] for name in data.label_names]
    if len(problems) > before:
        return None
    numeric = data.task == "regression" or data.binarise is not None or len(columns) > 1
    if len(columns) > 1:
        _check_targets(tables, columns, data.label_names, problems)
        if len(problems) > before:
            return None
        return np.stack([pd.to_numeric(pd.concat(own)).to_numpy(dtype=np.float64) for own in columns], axis=1)
    own = columns[0]
    if numeric:
        _check_numbers(tables, own, data, problems)
        if len(problems) > before:
            return None
        found: NDArray[Any] = pd.to_numeric(pd.concat(own)).to_numpy(dtype=np.float64)
        return found
    if not all(_is_numeric(part) for part in own):
        return np.concatenate([np.array([name_of(value) for value in part], dtype=str) for part in own])
    parts = [pd.to_numeric(part).to_numpy() for part in own]
    floats = [part.dtype.kind == "f" for part in parts]
    whole = all(bool((part == np.round(part)).all()) for part in parts)
    if data.task == "classification" or not any(floats) or not whole:
        return np.concatenate(parts)
    distinct = len(np.unique(np.concatenate(parts)))
    if not all(floats):
        pointed = [str(table.path) for table, is_float in zip(tables, floats, strict=True) if is_float]
        notes.append(
            f'label "{data.label_names[0]}": {listed(pointed, 3)} writes 1.0 where other files write 1: '
            "one class each, and classification (data.task decides otherwise)"
        )
    elif distinct <= 2:
        notes.append(
            f'label "{data.label_names[0]}" has {distinct} different numbers, written with a decimal point: classes '
            '(data.task = "regression" for numbers)'
        )
    else:
        return np.concatenate(parts)
    return np.concatenate(parts).astype(np.int64)


def _is_numeric(part: "pd.Series[Any]") -> bool:
    if part.dtype.kind in "iuf":
        return True
    return bool(pd.to_numeric(part, errors="coerce").notna().all()) and not part.str.fullmatch(_ZEROS).any()


def _texts(table: RawTable, name: str, problems: list[str]) -> "pd.Series[Any]":
    """Returns the labels of one file: text without spaces at its ends, or numbers of a Parquet file."""
    column = table.frame[name]
    absent = column.isna()
    if column.dtype.kind == "O":
        absent |= column.astype(str).str.strip() == ""
    if absent.any():
        rows = np.flatnonzero(absent.to_numpy()).tolist()
        problems.append(f"{table.place(rows, name)} is missing: every row needs a label")
        return column
    if column.dtype.kind == "b":
        return column.astype(str)
    if column.dtype.kind in "iuf":
        return column
    strange = [row for row, value in enumerate(column) if not isinstance(value, str | bool | int | float)]
    if column.dtype.kind in "mM" or strange or looks_like_dates(column):
        row = strange[0] if strange else 0
        kind = "a list" if isinstance(column.iloc[row], list | tuple | np.ndarray | dict | set) else "a date"
        problems.append(
            f'{table.place([row], name)} is "{str(column.iloc[row])[:40]}", {kind}, and no label: name the column of '
            "classes or numbers in data.label"
        )
        return column
    texts = column.astype(str).str.strip()
    lengths = texts.str.len().to_numpy()
    if lengths.max(initial=0) > LONGEST_LABEL:
        row = int(np.argmax(lengths > LONGEST_LABEL))
        problems.append(f"{table.place([row], name)} is a text of {lengths[row]:,} characters, and no label")
    if table.decimal_comma:
        texts = texts.where(~texts.str.fullmatch(_COMMA_NUMBER), texts.str.replace(",", "."))
    return texts


def _check_targets(
    tables: Sequence[RawTable], columns: "Sequence[Sequence[pd.Series[Any]]]", names: Sequence[str], problems: list[str]
) -> None:
    """Adds the first cell of each file's targets that is no number."""
    for own, name in zip(columns, names, strict=True):
        for table, part in zip(tables, own, strict=True):
            wrong = pd.to_numeric(part, errors="coerce").isna().to_numpy()
            if wrong.any():
                rows = np.flatnonzero(wrong).tolist()
                problems.append(f'{table.place(rows, name)} is "{part.iloc[rows[0]]!s:.40}": targets must be numbers')


def _check_numbers(
    tables: Sequence[RawTable], own: "Sequence[pd.Series[Any]]", data: Data, problems: list[str]
) -> None:
    """Adds the labels of each file that are no numbers where numbers are asked for."""
    asked = "data.binarise" if data.binarise is not None else 'data.task = "regression"'
    for table, part in zip(tables, own, strict=True):
        wrong = pd.to_numeric(part, errors="coerce").isna().to_numpy()
        if wrong.any():
            rows = np.flatnonzero(wrong).tolist()
            problems.append(
                f'{table.place(rows, data.label_names[0])} is "{part.iloc[rows[0]]!s:.40}", but {asked} needs numbers '
                "as labels"
            )
