"""Numbers as people write them: decimal commas and separators of thousands, read where they can be nothing else.

A column of texts is looked at as a whole, for one cell may decide what the others mean: beside 4,76 the cell 1.544 is
1544. Where a cell could be either, such as 42,850, it is a problem, reported with what to do.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedmeta.data.refusals import listed

if TYPE_CHECKING:
    from fedmeta.data.table_file import RawTable

LONGEST_NUMBER = 1_000
"""A longer text is no number with decimal commas or thousands separators (characters)."""

DECIMAL_COMMA = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:\.\d{3})+),(?:\d{1,2}|\d{4,})(?:[eE][+-]?\d+)?|[+-]?0,\d+")
_COMMA_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:\.\d{3})+),\d+(?:[eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CERTAIN_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3}){2,}(?:\.\d+)?|(?:,\d{3})+\.\d+)")
_POINT_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|[+-]?\d{1,3}(?:\.\d{3})+,\d+")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:\.\d{3})*|[+-]?\d+")
_MARK_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:['\u2019\u00a0\u202f ]\d{3})+(?:[.,]\d+)?")


def odd_texts(frame: pd.DataFrame, texts: set[str]) -> "dict[str, pd.Series[Any]]":
    """Returns the texts of columns that are no numbers yet, without missing and without very long ones."""
    found = {}
    for name, column in frame.items():
        if name not in texts and column.dtype.kind not in "biuf" and column.notna().any():
            own = column.dropna().astype(str).str.strip()
            if own.str.len().max() <= LONGEST_NUMBER:
                found[str(name)] = own
    return found


def read_numbers(table: "RawTable", separator: str, texts: set[str]) -> None:
    """Reads numbers with decimal commas or thousands separators, where they can be nothing else, in place."""
    replaced: dict[str, list[str]] = {}
    for name, own in odd_texts(table.frame, texts).items():
        column = table.frame[name]
        certain = table.decimal_comma or bool(own.str.fullmatch(DECIMAL_COMMA).any())
        read, how = _plain_numbers(own, comma=separator != "," or certain, decimal_comma=certain)
        if how == "ambiguous":
            row = int(own.index[int(np.argmax(own.str.fullmatch(_THOUSANDS).to_numpy()))])
            cell = own.loc[row]
            table.problems.append(
                f'{table.place([row], name)} is "{cell[:40]}", not a number: remove thousands separators'
                f" (or write a decimal point, if it means {cell.replace(',', '.')[:40]})"
            )
            # Reported once; what is left of the column is no further problem.
            table.frame[name] = pd.to_numeric(column.astype(str).str.replace(",", ""), errors="coerce").fillna(0.0)
        elif how:
            filled = column.copy()
            filled.loc[own.index] = read
            table.frame[name] = filled
            replaced.setdefault(how, []).append(name)
    for how, named in replaced.items():
        table.notes.append(f"{table.path}: {how} in {listed(named, 5)}")


def _plain_numbers(cells: "pd.Series[Any]", *, comma: bool, decimal_comma: bool) -> "tuple[pd.Series[Any], str]":
    """Returns numbers as Python writes them, and how they were written: "" where nothing was to be done.

    Args:
        cells: The texts of a column, without missing ones.
        comma: Whether a comma in a number may be a decimal one.
        decimal_comma: Whether it must be one, by some number of the file or column.
    """
    rest = pd.to_numeric(cells, errors="coerce").isna()
    if not rest.any():
        if decimal_comma and cells.str.fullmatch(_GROUPED).all() and cells.str.contains(".", regex=False).any():
            return cells.str.replace(".", ""), "points between thousands"
        return cells, ""
    odd = cells[rest]
    if comma and odd.str.fullmatch(_COMMA_NUMBER).mean() > 0.5 and odd.str.fullmatch(_COMMA_NUMBER).any():
        if decimal_comma:
            changed = cells.where(~cells.str.fullmatch(_COMMA_NUMBER), cells.str.replace(".", "").str.replace(",", "."))
            return changed, "decimal commas"
        if odd.str.fullmatch(_THOUSANDS).any():
            certain = odd.str.fullmatch(_CERTAIN_THOUSANDS).any()
            return (cells.str.replace(",", ""), "commas between thousands") if certain else (cells, "ambiguous")
    if odd.str.fullmatch(_THOUSANDS).mean() > 0.5:
        certain = odd.str.fullmatch(_CERTAIN_THOUSANDS).any()
        return (cells.str.replace(",", ""), "commas between thousands") if certain else (cells, "ambiguous")
    if odd.str.fullmatch(_POINT_THOUSANDS).mean() > 0.5:
        return cells.str.replace(".", "").str.replace(",", "."), "points between thousands"
    if odd.str.fullmatch(_MARK_THOUSANDS).mean() > 0.5:
        plain = cells.str.replace(r"['\u2019\u00a0\u202f ]", "", regex=True)
        return plain.str.replace(",", ".") if comma else plain, "marks between thousands"
    return cells, ""
