"""One file of rows as a table of raw cells: CSV and TSV as people have them, and Parquet. What is wrong is collected.

A text file is read where its form is certain: commas, semicolons or tabs between cells; UTF-8 or UTF-16 with a byte
order mark; packed by gzip; Excel's line `sep=;`; lines of comment that begin with #; decimal commas between semicolons
or tabs; thousands separators that can be nothing else. What is not certain is a problem, reported with its cause and
what to do.
"""

import csv
import gzip
import io
import re
import unicodedata
import warnings
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedmeta.data.refusals import numbered
from fedmeta.data.written_numbers import DECIMAL_COMMA, odd_texts, read_numbers
from fedmeta.experiment import Data
from fedmeta.files import free_memory

MOST_COLUMNS = 50_000
"""A wider table is refused: pandas takes some tenths of a millisecond for each column."""

LONGEST_HEADING = 1 << 17
"""A longer cell of the first line is refused (characters)."""

LONGEST_CELL = 1 << 30
"""The longest cell that is looked at (characters)."""

TEXT_SUFFIXES = (".csv", ".tsv")
PARQUET_SUFFIXES = (".parquet", ".pq")
HEADERLESS_SUFFIXES = (".data", ".txt")
PACKED = ".gz"

SHEETS = (".xlsx", ".xls", ".xlsm", ".ods")
"""Spreadsheets, which are not read: their cells have a form of their own."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

_INDEX = r"__index_level_\d+__"
"""What pandas writes of an index without a name: row numbers, which are no feature."""

_SEP_LINE = re.compile(r'"?sep=(.)"?\s*')


@dataclass
class RawTable:
    """One file's cells as they are written.

    Attributes:
        path: The file.
        frame: Its cells, a column each, missing ones as NaN: numbers where all cells of a column are, else text.
        lines: The line that each row ends on, from 1; of Parquet the row's number, from 1.
        parquet: Whether it is a Parquet file.
        decimal_comma: Whether its numbers have decimal commas.
        problems: What is wrong with it.
        notes: What was left out of it or read in another way than it is written.
    """

    path: Path
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    lines: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    parquet: bool = False
    decimal_comma: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def place(self, rows: Sequence[int], column: str) -> str:
        """Returns where cells are, for people: file, lines (for Parquet rows, from 1), column."""
        what = "row" if self.parquet else "line"
        return f'{self.path}: {numbered(what, [int(self.lines[row]) for row in rows])}, column "{column[:80]}"'

    def part(self, rows: NDArray[Any]) -> "RawTable":
        """Returns the table of some of its rows."""
        frame = self.frame.iloc[rows].reset_index(drop=True)
        return RawTable(self.path, frame, self.lines[rows], self.parquet, self.decimal_comma)


def site_name(file: Path) -> str:
    """Returns the name of a site whose file this is: the file's without suffixes of formats."""
    name = file.name
    while Path(name).suffix.lower() in (PACKED, *TEXT_SUFFIXES, *PARQUET_SUFFIXES, *HEADERLESS_SUFFIXES, ".npz"):
        name = Path(name).stem
    return name


def format_of(file: Path) -> str:
    """Returns the suffix that decides how a file is read, in small letters and without that of gzip."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix == PACKED else suffix


def read_raw(path: Path, data: Data, texts: Sequence[str] = ()) -> RawTable:
    """Returns the cells of a CSV, TSV or Parquet file, with what is wrong with it; raises nothing for its content.

    Args:
        path: The file.
        data: What its texts mean.
        texts: Columns that are text whatever they look like, so that "01" stays as it is.
    """
    table = RawTable(path, parquet=format_of(path) in PARQUET_SUFFIXES)
    try:
        if format_of(path) in SHEETS:
            raise UnreadableError(f"{path} is a spreadsheet: save its sheet as CSV (in Excel: CSV UTF-8)")
        if table.parquet:
            _read_parquet(table, data.label_names)
        else:
            _read_text(table, data, texts)
    except UnreadableError as error:
        table.problems.append(str(error))
    return table


class UnreadableError(Exception):
    """A file of which no cell can be read."""


def clean_name(name: str) -> str:
    """Returns a column's name as all files are compared by it: stripped, its accents composed."""
    return unicodedata.normalize("NFC", str(name).strip())


def _check_width(path: Path, width: int) -> None:
    if width > MOST_COLUMNS:
        raise UnreadableError(
            f"{path}: {width:,} columns, and a table may have {MOST_COLUMNS:,}: save it as an npz file"
        )


def _check_names(path: Path, names: Sequence[str]) -> list[str]:
    """Returns what is wrong with the names of columns: one that is missing, or there twice."""
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            problems.append(f"{path}: column {number} has no name (was it written with an index?): leave it out")
        elif first.setdefault(name, number) < number:
            problems.append(f'{path}: columns {first[name]} and {number} are both called "{name[:80]}"')
    return problems


# ---------------------------------------------------------------- Parquet


def _read_parquet(table: RawTable, labels: Sequence[str]) -> None:
    path = table.path
    try:
        facts = pq.read_metadata(path)
        _check_width(path, facts.num_columns)
        size, free = facts.num_rows * facts.num_columns * 8, free_memory()
        if size > free // 2:
            raise UnreadableError(
                f"{path}: {size / 1e9:.1f} GB of numbers, more than half of the free memory: save fewer"
            )
        names = [clean_name(name) for name in pq.read_schema(path).names]
        twice = _check_names(path, names)
        if twice:
            raise UnreadableError("; ".join(twice))
        whole = pq.read_table(path)
        index = [name for name in whole.column_names if re.fullmatch(_INDEX, name)]
        frame: pd.DataFrame = whole.drop_columns(index).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnreadableError(f"{path} is not a Parquet file that can be read: {reason}") from None
    table.frame = frame.set_axis([clean_name(name) for name in frame.columns], axis=1)
    for name, kind in zip(names, whole.schema.types, strict=True):
        if pa.types.is_nested(kind) and name in table.frame and name not in labels:
            table.frame[name] = table.frame[name].map(str, na_action="ignore")
    table.lines = np.arange(1, len(frame) + 1)


# ---------------------------------------------------------------- text


def _read_text(table: RawTable, data: Data, texts: Sequence[str]) -> None:
    path = table.path
    text = _decoded(path)
    separator, skipped = _separator_line(table, text)
    try:
        separator = separator or _separator(path, text, data)
        names, good, dropped = _survey(table, text, data, separator, skipped)
        if dropped:
            text = _without(text, separator, good)
        frame = _parsed(text, separator, names, data, [name for name in names if name in set(texts)])
    except csv.Error as error:
        raise UnreadableError(f"{path} is no text table: {error}") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        given = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise UnreadableError(f"{path}: lines have different numbers of cells ({given})") from None
    table.frame = _trimmed(frame, data)
    fixed = set(texts)
    if separator != "," and any(
        bool(own.str.fullmatch(DECIMAL_COMMA).any()) for own in odd_texts(table.frame, fixed).values()
    ):
        # Where commas are decimal, a point is none: 1.544 is 1544, and what pandas made of it is to be read again.
        table.decimal_comma = True
        table.frame = _trimmed(_parsed(text, separator, names, data, names), data)
    read_numbers(table, separator, fixed)
    for name, column in table.frame.items():
        if table.decimal_comma and name not in fixed:
            numbers = pd.to_numeric(column, errors="coerce")
            table.frame[name] = column if (numbers.isna() & column.notna()).any() else numbers


def _decoded(path: Path) -> str:
    """Returns a file's text; names the byte and the line of what is no text."""
    try:
        size, free = path.stat().st_size, free_memory()
        if size > free // 4:
            raise UnreadableError(f"{path}: {size / 1e9:.1f} GB of text, and a quarter of the free memory is less")
        content = path.read_bytes()
        if path.suffix.lower() == PACKED or content[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(content)) as packed:
                content = packed.read(free // 4 + 1)
            if len(content) > free // 4:
                raise UnreadableError(f"{path} unpacks to more than a quarter of the free memory: save fewer rows")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() == ".npz":
        raise UnreadableError(f'{path} is an npz file: set data.source = "npz"')
    if content[:4] == b"PK\x03\x04":
        raise UnreadableError(f"{path} is a zip archive, such as an Excel sheet: save the sheet as CSV")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") and len(content) % 2 == 0 else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        start = error.start + (3 if encoding == "utf-8-sig" and content[:3] == b"\xef\xbb\xbf" else 0)
        line = content[:start].count(b"\n") + 1
        raise UnreadableError(
            f"{path} is not UTF-8 text ({error.reason} at byte {start}, in line {line}: 0x{content[start]:02x}, "
            f'in Latin-1 "{chr(content[start])}"): save it as UTF-8'
        ) from None


def _separator_line(table: RawTable, text: str) -> tuple[str, int]:
    """Returns the separator that Excel's first line `sep=;` names, "" for none, and how many lines that takes."""
    first = text[:32].lstrip("\ufeff").split("\n", 1)[0].rstrip("\r")
    found = _SEP_LINE.fullmatch(first)
    if not found:
        return "", 0
    table.notes.append(f'{table.path}: line 1, "{first.strip()}", is Excel\'s and no row')
    return found[1], 1


def _records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the records of a text with the line that each ends on; a record without a cell is a blank line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")
    while True:
        limit = csv.field_size_limit(LONGEST_CELL)
        try:
            record = next(reader)
        except StopIteration:
            return
        finally:
            csv.field_size_limit(limit)
        yield reader.line_num, record


def _is_comment(record: Sequence[str]) -> bool:
    return bool(record) and record[0].startswith("#")


def _separator(path: Path, text: str, data: Data) -> str:
    """Returns what stands between the cells of a file: that which makes its first line the columns' names."""
    if format_of(path) == ".tsv" and "\t" in text[: 1 << 20]:
        return "\t"
    found: dict[str, list[str]] = {}
    for separator in SEPARATORS:
        try:
            first = next((record for _, record in _records(text, separator) if record and not _is_comment(record)), [])
        except csv.Error:
            continue
        found[separator] = [clean_name(cell) for cell in first]
    wanted = set(data.label_names)
    if data.columns:
        fitting = [each for each, cells in found.items() if len(cells) == len(data.columns)]
    else:
        fitting = [each for each, cells in found.items() if len(cells) > 1 and wanted <= set(cells)]
        several = [each for each, cells in found.items() if len(cells) > 1]
        fitting = fitting or (several if len(several) == 1 else [])
    return fitting[0] if fitting else ","


def _survey(
    table: RawTable, text: str, data: Data, separator: str, skipped: int
) -> tuple[list[str], NDArray[np.bool_], bool]:
    """Goes once through the records of a text: names, which records are rows, and whether any was left out.

    Lines that are too short or too long are problems; comments and lines without content are left out with a note.
    """
    path, names = table.path, list(data.columns)
    good, lines = bytearray(), array("q")
    wrong: dict[int, list[int]] = {}
    comments: list[int] = []
    empty: list[int] = []
    header = bool(names)
    last, open_quote = 0, False
    for line, record in _records(text, separator):
        if not record:
            continue
        last, keep, open_quote = line, False, "\n" in record[-1]
        if line <= skipped:
            pass
        elif _is_comment(record) and (header or not set(data.label_names) <= _names(record)):
            comments.append(line)
        elif not header:
            _check_width(path, len(record))
            if max(map(len, record)) > LONGEST_HEADING:
                raise UnreadableError(f"{path}: a cell of its first line is longer than any name")
            names = [clean_name(cell) for cell in record]
            table.problems += _check_names(path, names)
            header = keep = True
        elif not any(cell.strip() for cell in record):
            empty.append(line)
        elif len(record) != len(names):
            wrong.setdefault(len(record), []).append(line)
        else:
            lines.append(line)
            keep = True
        good.append(keep)
    if not header:
        raise UnreadableError(f"{path}: the file is empty")
    _check_width(path, len(names))
    if table.problems:
        raise UnreadableError(table.problems.pop())
    for width, where in sorted(wrong.items()):
        kind = "fewer" if width < len(names) else "more"
        cut = ""
        if where[-1] == last and width < len(names):
            cut = " (is a quote left open: EOF inside string?)" if open_quote else " (is the file broken off?)"
        table.problems.append(
            f"{path}: lines have different numbers of cells: expected {len(names)} in {numbered('line', where)}, "
            f"saw {width}, {kind} than {'data.columns' if data.columns else 'the header'} has{cut}: complete or remove "
            f"{'it' if len(where) == 1 else 'them'}"
        )
    for what, found in (("a comment", comments), ("empty", empty)):
        if found:
            table.notes.append(f"{path}: {numbered('line', found)}, {what}, left out")
    table.lines = np.frombuffer(lines, dtype=np.int64).copy() if lines else np.empty(0, dtype=np.int64)
    kept = np.frombuffer(bytes(good), dtype=np.uint8).astype(bool)
    return names, kept, not kept.all()


def _names(record: Sequence[str]) -> set[str]:
    return {clean_name(cell) for cell in record}


def _without(text: str, separator: str, good: NDArray[np.bool_]) -> str:
    """Returns a text with the good records alone."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    rows = (record for _, record in _records(text, separator) if record)
    writer.writerows(record for record, keep in zip(rows, good, strict=True) if keep)
    return out.getvalue()


def _parsed(text: str, separator: str, names: list[str], data: Data, texts: Sequence[str]) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None if data.columns else 0,
            names=names,
            index_col=False,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values=list(data.missing),
            skipinitialspace=separator != "\t",
            low_memory=False,
        )


def _trimmed(frame: pd.DataFrame, data: Data) -> pd.DataFrame:
    """Returns a frame whose texts mean a missing value with spaces around them too, which pandas does not know."""
    for name, column in frame.items():
        if column.dtype.kind == "O":
            absent = column.notna() & column.astype(str).str.strip().isin(data.missing)
            if absent.any():
                frame[name] = column.mask(absent)
    return frame
