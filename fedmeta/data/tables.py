"""Sites from tables: a folder with a file per site, or files whose column names each row's site."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.data.arrays import build_population, feature_order
from fedmeta.data.columns import (
    CATEGORY,
    DATE,
    FREE,
    MOST_NAMES,
    NUMBER,
    Columns,
    column_values,
    kind_of,
    names_of,
)
from fedmeta.data.labels import Labels, encode_labels
from fedmeta.data.population import ArrayPopulation, left_out
from fedmeta.data.refusals import grouped, listed, refuse
from fedmeta.data.table_file import (
    HEADERLESS_SUFFIXES,
    PARQUET_SUFFIXES,
    SHEETS,
    TEXT_SUFFIXES,
    RawTable,
    format_of,
    read_raw,
    site_name,
)
from fedmeta.data.table_labels import table_labels
from fedmeta.data.table_times import table_times
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import ROW_ORDER, Data


class SiteTable(NamedTuple):
    """The rows of one site.

    Attributes:
        name: The site's name.
        table: Its cells: a file, or some rows of one.
    """

    name: str
    table: RawTable


def load_tables(data: Data) -> ArrayPopulation:
    """Returns the population of the folder or file `data.path`.

    In a folder a site per `NAME.csv`, `.tsv`, `.parquet` or `.pq` (text files also packed, `.csv.gz`); what else lies
    there is named as left out. With `data.site_column` that column names each row's site, in one file or several. With
    `data.columns` the files have no header line, these are the names of their columns in order, and `.data` and `.txt`
    files are read too. All files have the same columns, in any order: `data.label` is the label (or several columns,
    the targets of a regression), `data.features` or all others are features. A column is a number, a category (text, or
    named in `data.categorical`) or with `data.dates` a date; a cell is missing where it is one of `data.missing`. A
    single file without `data.site_column` is one site's own. `data.time` orders a site's rows, and is no feature.

    Raises:
        FedmetaError: Files, columns or cells are not as they should be; the error names all that are wrong.
    """
    path = _existing(data.path)
    notes: list[str] = []
    files = _files(path, data, notes) if path.is_dir() else [path]
    if data.without and not data.site_column:
        names, unknown = left_out([site_name(file) for file in files], data.without)
        files, notes = [file for file in files if site_name(file) not in names], [*notes, *unknown]
    tables = [_read(file, data) for file in files]
    if data.site_column:
        sites = _by_column(tables, data.site_column)
        names, unknown = left_out([site.name for site in sites], data.without)
        sites, notes = [site for site in sites if site.name not in names], [*notes, *unknown]
    else:
        sites = [SiteTable(site_name(file), table) for file, table in zip(files, tables, strict=True)]
        if len(sites) == 1:
            hint = _site_hint(sites[0].table, data)
            notes.append(
                f"{data.path} is one site, and there is nothing to learn across sites: with several, a file each, or "
                f"one file whose column names the site (data.site_column{hint})"
            )
    return _population(data.path, sites, data, notes, many=path.is_dir() or bool(data.site_column))


def load_table_site(
    data: Data, path: str, name: str, only: Sequence[str] | None = None, categorical: Collection[str] | None = None
) -> ArrayPopulation:
    """Returns the population whose one site holds all rows of a file, called `name`, or as the file where empty.

    Args:
        data: What a file's columns mean.
        path: The file.
        name: The site's name.
        only: The columns that are features; None for all but the label.
        categorical: Which of them are categories, where the run has fixed that; None = found by their cells.

    Raises:
        FedmetaError: As for `load_tables`; or the file's `data.site_column` names several sites.
    """
    file = _existing(path)
    table = _read(file, data, categorical or ())
    column = data.site_column
    if column and column in table.frame.columns:
        there = names_of(table.frame[column]).dropna().unique()
        if len(there) > 1:
            raise FedmetaError(
                f'{path}: column "{column}" names {len(there)} sites, but a site\'s own file holds its rows alone'
            )
    sites = [SiteTable(name or site_name(file), table)]
    return _population(path, sites, data, [], many=False, only=only, categorical=categorical)


def read_columns(path: str, data: Data, columns: Columns) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Returns the rows of features of a file by a run's description of its columns, which needs no label, and notes.

    Columns go by their names: their order does not matter, others are left out. A missing cell is NaN, and so are all
    features of a missing category; a name that the run does not know is "other", 0 in all of its column's features.

    Args:
        path: The file: a table as for `load_tables`.
        data: What texts mean.
        columns: What rows are made of.

    Returns:
        Rows [rows, features], float64 and not standardized, and a sentence on each name that the run does not know.

    Raises:
        FedmetaError: The file cannot be read, a column is missing or a cell is no number; names all that is wrong.
    """
    known = {name for name, _ in columns.categories}
    table = _read(_existing(path), data, sorted(known))
    problems = list(table.problems)
    there = [str(name) for name in table.frame.columns]
    lacking = [name for name in columns.names if name not in there]
    if lacking and there:
        problems.append(
            f"{path} lacks {listed([repr(name) for name in lacking])}: it needs the columns that the run was trained on"
            f"{nearest(lacking[0], [name for name in there if name not in columns.names])}"
        )
    cells: dict[str, pd.Series[Any]] = {}
    for name in columns.names:
        if name in known and name in there:
            cells[name] = table.frame[name]
        elif name in there:
            values, wrong, _ = column_values(table, name, _fixed_kind([table.frame[name]], name, data, known), data)
            problems += wrong
            cells[name] = values
    refuse(problems)
    rows, notes = columns.read(cells)
    return rows, (*table.notes, *(f"{path}: {note}" for note in notes))


def table_columns(path: str, data: Data) -> list[str]:
    """Returns the names of a table's columns; raises `FedmetaError` where it cannot be read."""
    table = _read(_existing(path), data)
    if table.frame.columns.empty:
        refuse(table.problems)
    return [str(name) for name in table.frame.columns]


def _fixed_kind(parts: "Sequence[pd.Series[Any]]", name: str, data: Data, categorical: Collection[str]) -> str:
    """Returns the kind of a column where a run has fixed which ones are categories."""
    if name in categorical:
        return CATEGORY
    return DATE if data.dates == "days" and kind_of(parts, name, data) == DATE else NUMBER


def _read(file: Path, data: Data, categorical: Collection[str] = ()) -> RawTable:
    return read_raw(file, data, (*data.label_names, *data.categorical, *categorical, data.site_column))


def table_files(path: Path, data: Data) -> list[Path]:
    """Returns the tables that a folder holds, or the file itself; raises `FedmetaError` where there is none."""
    path = _existing(str(path))
    return _files(path, data, []) if path.is_dir() else [path]


def _existing(path: str) -> Path:
    if not path:
        raise FedmetaError("data.path is not set: name the folder with one file per site")
    file = Path(path).expanduser()
    if not file.exists():
        beside = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise FedmetaError(f"data.path: {path}: no such file or folder{nearest(file.name, beside)}")
    return file


def _files(folder: Path, data: Data, notes: list[str]) -> list[Path]:
    """Returns the folder's tables in the order of the sites' names; raises `FedmetaError` where there is none."""
    suffixes = TEXT_SUFFIXES + PARQUET_SUFFIXES + (HEADERLESS_SUFFIXES if data.columns else ())
    there = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    files = sorted(
        (file for file in there if file.is_file() and format_of(file) in suffixes),
        key=lambda file: (site_name(file), file.name),
    )
    others = [file for file in there if file not in set(files)]
    if not files:
        raise FedmetaError(f"data.path: {folder} has no file *.csv or *.parquet (or .tsv, .csv.gz){_hint(others)}")
    if others:
        names = [file.name + ("/" if file.is_dir() else "") for file in others]
        sheets = any(format_of(file) in SHEETS for file in others)
        advice = "; a spreadsheet is read once its sheet is saved as CSV" if sheets else ""
        advice += (
            f"; files {', '.join(HEADERLESS_SUFFIXES)} are read with data.columns, or as .csv"
            if _headerless(others)
            else ""
        )
        notes.append(f"{folder}: left out {listed(names, 8)}: no table that is read here{advice}")
    problems = [
        f'{folder}: {before.name} and {file.name} would both be site "{site_name(file)}"'
        for before, file in pairwise(files)
        if site_name(before) == site_name(file) and not data.site_column
    ]
    refuse(problems)
    return files


def _headerless(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files if file.is_file() and format_of(file) in HEADERLESS_SUFFIXES]


def _hint(others: Sequence[Path]) -> str:
    """Returns what to do where a folder has no table but other things."""
    raw = _headerless(others)
    sheets = [file.name for file in others if format_of(file) in SHEETS]
    folders = [file.name for file in others if file.is_dir()]
    if raw:
        return f"; {raw[0]} has no header: name its columns in data.columns, or rename it to .csv if it has one"
    if sheets:
        return f"; {sheets[0]} is a spreadsheet: save its sheet as CSV (in Excel: CSV UTF-8)"
    if folders:
        return f"; it has folders, such as {folders[0]}/: put one file per site into the folder itself"
    return ""


def _by_column(tables: Sequence[RawTable], column: str) -> list[SiteTable]:
    """Returns the sites that a column names, each with its rows of one file; problems stay with the tables."""
    sites: list[SiteTable] = []
    for table in tables:
        if table.problems and table.frame.empty:
            sites.append(SiteTable(site_name(table.path), table))
            continue
        names = [str(name) for name in table.frame.columns]
        if column not in names:
            table.problems.append(
                f'{table.path}: no column "{column}" (data.site_column); its columns are {listed(names)}'
                f"{nearest(column, names)}"
            )
            sites.append(SiteTable(site_name(table.path), table))
            continue
        named = names_of(table.frame[column])
        absent = np.flatnonzero(named.isna().to_numpy())
        if len(absent):
            table.problems.append(f"{table.place(absent.tolist(), column)} is missing: every row needs its site")
        for name in sorted(named.dropna().unique()):
            part = table.part(np.flatnonzero((named == name).to_numpy()))
            sites.append(SiteTable(str(name), part))
        if not len(named.dropna()):
            sites.append(SiteTable(site_name(table.path), table))
        elif sites:
            # What is wrong with a file or was left out of it is named once.
            first = next(site.table for site in sites if site.table.path == table.path)
            first.problems += table.problems
            first.notes += table.notes
    return sites


def _site_hint(table: RawTable, data: Data) -> str:
    """Returns which column looks as if it named sites, as ` = "hospital"`; "" where none does."""
    found = []
    for name, column in table.frame.items():
        wordy = any(part in str(name).lower() for part in SITE_WORDS)
        if str(name) not in data.label_names and wordy and 2 <= column.nunique() <= max(2, len(column) // 5):
            found.append(str(name))
    return f' = "{found[0]}"' if found else ""


SITE_WORDS = ("hospital", "site", "center", "centre", "clinic", "institution", "ward", "klinik", "hopital")
"""Parts of the names of columns that may name sites."""


def _population(
    origin: str,
    sites: Sequence[SiteTable],
    data: Data,
    notes: list[str],
    *,
    many: bool,
    only: Sequence[str] | None = None,
    categorical: Collection[str] | None = None,
) -> ArrayPopulation:
    problems = [problem for site in sites for problem in site.table.problems]
    notes = [*notes, *(note for site in sites for note in site.table.notes)]
    readable = [site for site in sites if not site.table.frame.columns.empty]
    for site in readable:
        problems += _check_table(site.table, data)
    usable = [site for site in readable if set(data.label_names) <= set(site.table.frame.columns)]
    columns = _shared_columns(usable, data, only, problems, notes) if usable else []
    if many and usable:
        problems += _unknown_columns(usable, data)
    own = [site for site in usable if len(site.table.frame)]
    arrays: list[NDArray[Any]] = []
    categories: list[tuple[str, tuple[str, ...]]] = []
    for name in columns:
        holders = [site for site in own if name in site.table.frame.columns]
        values, known = _column(holders, name, data, categorical, problems, notes, alone=not many)
        arrays.append(values)
        categories += [(name, known)] if known is not None else []
    labels = table_labels([site.table for site in own], data, problems, notes) if own else None
    time = table_times([site.table for site in own], data, problems) if own else None
    refuse(problems)
    if labels is None or not own:
        raise FedmetaError(f"{origin}: there are no rows")
    names = [site.name for site in own]
    starts = np.cumsum([0, *(len(site.table.frame) for site in own)])

    def cell(row: int, column: str) -> str:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return own[number].table.place([row - int(starts[number])], column)

    encoded: Labels = encode_labels(
        labels,
        lambda row: cell(row, ", ".join(data.label_names)),
        data.task,
        data.binarise,
        target=data.target,
        names=data.label_names,
    )
    distinct = sorted(set(names))
    numbers = {name: number for number, name in enumerate(distinct)}
    owners = np.repeat([numbers[name] for name in names], np.diff(starts))
    few = [name for name in distinct if int((owners == numbers[name]).sum()) < data.min_rows] if many else []
    if few and len(few) < len(distinct):
        notes.append(f"left out {listed(few, 8)}: fewer rows than data.min_rows = {data.min_rows}")
    population = build_population(
        origin,
        np.stack(arrays, axis=1),
        encoded,
        owners,
        distinct,
        lambda row, column: cell(row, columns[column]),
        time,
        feature_names=tuple(columns),
        min_rows=data.min_rows if many else 0,
    )
    return replace(
        population,
        categories=tuple(categories),
        notes=tuple(grouped(list(dict.fromkeys(notes)))),
        in_time=time is not None or data.time == ROW_ORDER,
    )


def _check_table(table: RawTable, data: Data) -> list[str]:
    """Returns what a file lacks altogether: its label, features, rows."""
    names = [str(name) for name in table.frame.columns]
    absent = [name for name in data.label_names if name not in names]
    if absent and len(names) == 1 and not table.parquet:
        return [f"{table.path}: its first line is one cell, {names[0]!r}: cells must have commas between them"]
    if absent:
        return [
            f'{table.path}: no label column "{absent[0]}" (data.label); its columns are {listed(names)}'
            f"{nearest(absent[0], names)}"
        ]
    if len(names) <= len(data.label_names):
        return [f"{table.path}: there is no feature column beside the label"]
    if not len(table.frame) and not table.problems:
        return [f"{table.path}: there are no rows"]
    if data.columns and list(table.frame.iloc[0].astype(str).str.strip()) == names:
        return [f"{table.path}: its first line names the columns: leave data.columns empty"]
    return []


def _shared_columns(
    sites: Sequence[SiteTable], data: Data, only: Sequence[str] | None, problems: list[str], notes: list[str]
) -> list[str]:
    """Returns the columns that are features, in the order that all sites share; adds what is wrong and left out."""
    tables = list({site.table.path: site.table for site in sites}.values())
    asked = tuple(only) if only is not None else data.chosen_features
    apart = {*data.label_names, data.site_column, data.time}
    everywhere = {str(name) for table in tables for name in table.frame.columns}
    problems += [
        f'data.{key}: "{name}" is the {"label" if name in data.label_names else "site"}\'s column'
        for key, names in (("features", data.chosen_features), ("categorical", data.categorical))
        for name in names
        if name in apart
    ]
    own = [
        [str(name) for name in table.frame.columns if str(name) not in apart and str(name) not in data.ignore]
        for table in tables
    ]
    if asked:
        chosen = [name for name in asked if name not in apart]
        dropped = sorted({name for names in own for name in names} - set(chosen))
        if dropped and only is None:
            notes.append(f"left out {listed(dropped, 8)}: not in data.features")
        own = [[name for name in names if name in set(chosen)] for names in own]
        reference, wanted = None, set(chosen)
    else:
        usual = Counter(frozenset(names) for names in own).most_common(1)[0][0]
        reference = next(place for place, names in enumerate(own) if frozenset(names) == usual)
        wanted = set(usual)
    if data.ignore and only is None:
        notes.append(f"left out {listed(sorted(set(data.ignore) & everywhere), 8)}: data.ignore")
    for table, names in zip(tables, own, strict=True):
        problems += _column_differences(table, names, wanted, tables[reference] if reference is not None else None)
    return _in_order(sorted(wanted), own[reference] if reference is not None else list(asked), data)


def _unknown_columns(sites: Sequence[SiteTable], data: Data) -> list[str]:
    """Returns which columns the experiment names and no file has; one site alone may lack what others have."""
    everywhere = {str(name) for site in sites for name in site.table.frame.columns}
    return [
        f'data.{key}: no file has a column "{name}"{nearest(name, everywhere)}'
        for key, names in (("ignore", data.ignore), ("categorical", data.categorical))
        for name in names
        if name not in everywhere
    ]


def _in_order(columns: list[str], given: list[str], data: Data) -> list[str]:
    names = [name for name in given if name in set(columns)]
    return [names[place] for place in feature_order(names, data.columns)]


def _column_differences(
    table: RawTable, names: Sequence[str], wanted: Collection[str], reference: RawTable | None
) -> list[str]:
    there = set(names)
    absent = [name for name in sorted(wanted) if name not in there]
    foreign = [name for name in names if name not in set(wanted)]
    if not absent and not foreign:
        return []
    given = [f"lacks {listed([repr(name) for name in absent])}"] if absent else []
    given += [f"has {listed([repr(name) for name in foreign])} besides"] if foreign else []
    if reference is None:
        return [
            f"{table.path} {' and '.join(given)}: data.features names it"
            + nearest(absent[0], [str(name) for name in table.frame.columns])
        ]
    advice = "; data.ignore leaves columns out" if foreign and not absent else ""
    return [
        f"{table.path} {' and '.join(given)}: every file needs the columns of {reference.path}"
        + (nearest(absent[0], foreign) if absent else "")
        + advice
    ]


def _column(
    sites: Sequence[SiteTable],
    name: str,
    data: Data,
    categorical: Collection[str] | None,
    problems: list[str],
    notes: list[str],
    *,
    alone: bool,
) -> tuple[NDArray[Any], tuple[str, ...] | None]:
    """Returns a column over all files: numbers and None, or codes and the names they stand for."""
    parts = [site.table.frame[name] for site in sites]
    kind = kind_of(parts, name, data) if categorical is None else _fixed_kind(parts, name, data, categorical)
    read = [column_values(site.table, name, kind, data) for site in sites]
    found = [wrong for _, own, _ in read for wrong in own]
    # A column that is no feature in any file is one problem and not one for each file.
    problems += found[:1] if kind in (DATE, FREE) and data.dates != "days" else found
    if kind == DATE and data.dates == "days":
        notes.append(f'column "{name}" holds dates: days since 1970-01-01 (data.dates)')
    if kind != CATEGORY:
        if not alone and parts and not any(part.notna().any() for part in parts):
            problems.append(
                f'column "{name}" is missing (NaN) in every row of every site: leave it out (data.ignore = ["{name}"])'
            )
        return np.concatenate([_numpy(values) for values, _, _ in read]) if read else np.empty(0), None
    names = tuple(sorted({each for _, _, own in read for each in own}))
    if len(names) > MOST_NAMES:
        problems.append(f'column "{name}" has {len(names):,} categories, and may have {MOST_NAMES:,}: leave it out')
    places = {each: code for code, each in enumerate(names)}
    codes = []
    for values, _, own in read:
        table = np.array([places[each] for each in own] + [-1], dtype=np.float64)
        absent = values.isna().to_numpy()
        codes.append(np.where(absent, np.nan, table[np.where(absent, 0, values.fillna(0)).astype(np.int64)]))
    if categorical is None and name not in data.categorical:
        notes.append(f'column "{name}" is text: {len(names)} categories, {listed(list(names), 8)}')
    return np.concatenate(codes) if codes else np.empty(0), names


def _numpy(column: "pd.Series[Any]") -> NDArray[Any]:
    """Returns a column of numbers as an array of NumPy's own type: nulls as NaN, truth values as 0 and 1."""
    if column.isna().any() or column.dtype.kind == "f":
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return column.to_numpy(dtype=np.int64 if column.dtype.kind in "biu" else np.float64)
