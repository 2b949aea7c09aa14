"""What the columns of tables mean: numbers, categories or days; and a row of features by that description.

A population of tables holds a column each: numbers as they are, categories as codes into the names that occur in its
files. What a model is fed is `encoded`: a category becomes as many columns as the run has names for it, 1 where a row
has that name. A row of another name has 0 in all of them: "other", as names do that too few rows of a site have. A
missing one is missing in all of them, and becomes their mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.population import ArrayPopulation
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from fedmeta.text import LONGEST_NAME

# What reads cells imports pandas when it is first used: a site encodes rows for every message, and most have no tables.
if TYPE_CHECKING:
    import pandas as pd

    from fedmeta.data.table_file import RawTable

Categories = tuple[tuple[str, tuple[str, ...]], ...]
"""The columns of categories, by name, and the names that a run knows of each."""

MOST_CATEGORIES = 50
"""A column of text with more different values is no category by itself, unless `data.categorical` names it."""

MOST_NAMES = 1_000
"""More names of one column are refused."""

NUMBER, CATEGORY, DATE, FREE = "number", "category", "date", "text"

_ISO = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?")
_POINTS = re.compile(r"\d{1,2}\.\d{1,2}\.\d{4}")
_SLASHES = re.compile(r"\d{1,2}/\d{1,2}/\d{4}")
_WITH_UNIT = re.compile(r"[<>~]?\s*[+-]?\d+(?:[.,]\d+)?\s*(%|[^\W\d][\w/%]{0,11})?")


def is_number_text(name: str) -> bool:
    """Returns whether a text is a number."""
    try:
        float(name)
    except ValueError:
        return False
    return True


def name_of(value: object) -> str:
    """Returns the name of a class or category that a cell holds: text stripped; 1, 1.0 and "1" are one, "01" another.

    Of text a number counts as one only without leading zeros or exponent.
    """
    if isinstance(value, str):
        text = value.strip()
        if len(text) > LONGEST_NAME:
            return text
        found = re.fullmatch(r"([+-]?)(0|[1-9]\d*)(?:\.(\d*))?", text)
        if not found:
            return text
        sign = "-" if found[1] == "-" else ""
        fraction = (found[3] or "").rstrip("0")
        return f"{sign if fraction or found[2] != '0' else ''}{found[2]}{'.' if fraction else ''}{fraction}"
    if isinstance(value, float | np.floating):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**63 else repr(number)
    return str(value)


def names_of(column: pd.Series[Any]) -> pd.Series[Any]:
    """Returns the names that a column's cells hold, NaN where one is missing."""
    import pandas as pd

    present = column[column.notna()]
    codes, distinct = pd.factorize(present)
    named = np.array([name_of(value) for value in distinct], dtype=object)
    found = pd.Series(np.nan, index=column.index, dtype=object)
    if len(present):
        found.loc[present.index] = named[codes]
    return found.where(found != "", np.nan)


def days(column: pd.Series[Any]) -> tuple[pd.Series[Any], pd.Series[Any]]:
    """Returns a column of dates as days since 1970-01-01, and where it holds no date; NaN where one is missing.

    Dates are written 2024-03-09, with or without a time, or 9.3.2024; or 9/3/2024 where the column shows by a number
    above 12 which of the two is the day.
    """
    import pandas as pd

    absent = column.isna()
    if column.dtype.kind == "M":
        when = pd.to_datetime(column, utc=True)
        return ((when - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).astype(float), pd.Series(
            False, index=column.index
        )
    texts = column.astype(str).str.strip()
    when = pd.Series(pd.NaT, index=column.index, dtype="datetime64[ns, UTC]")
    iso, points, slashes = (texts.str.fullmatch(form) & ~absent for form in (_ISO, _POINTS, _SLASHES))
    if iso.any():
        when = when.where(~iso, pd.to_datetime(texts.where(iso), format="ISO8601", errors="coerce", utc=True))
    if points.any():
        when = when.where(~points, pd.to_datetime(texts.where(points), format="%d.%m.%Y", errors="coerce", utc=True))
    if slashes.any():
        parts = texts[slashes].str.split("/", expand=True).astype(int)
        day_first, month_first = bool((parts[0] > 12).any()), bool((parts[1] > 12).any())
        if day_first != month_first:
            form = "%d/%m/%Y" if day_first else "%m/%d/%Y"
            when = when.where(~slashes, pd.to_datetime(texts.where(slashes), format=form, errors="coerce", utc=True))
    found = ((when - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).astype(float)
    return found, found.isna() & ~absent


def looks_like_dates(column: pd.Series[Any]) -> bool:
    """Returns whether nearly all cells of a column are dates."""
    if column.dtype.kind == "M":
        return True
    texts = column.dropna().head(1_000).astype(str).str.slice(0, LONGEST_NAME).str.strip()
    forms = (texts.str.fullmatch(form) for form in (_ISO, _POINTS, _SLASHES))
    return bool(len(texts)) and float(np.logical_or.reduce([np.asarray(form) for form in forms]).mean()) > 0.9


def numbers(column: pd.Series[Any]) -> tuple[pd.Series[Any], NDArray[np.bool_]]:
    """Returns a column as numbers, NaN where there is none, and which of its cells are there and no numbers."""
    import pandas as pd

    if column.dtype.kind in "biuf":
        return column, np.zeros(len(column), dtype=bool)
    if column.dtype.kind in "mM":
        return pd.Series(np.nan, index=column.index), column.notna().to_numpy()
    found = pd.to_numeric(column, errors="coerce")
    return found, (found.isna() & column.notna()).to_numpy()


def kind_of(parts: Sequence[pd.Series[Any]], name: str, data: Data) -> str:
    """Returns what a column is over all files: NUMBER, CATEGORY, DATE, or FREE: text that is no category.

    A column is text where more than half of its cells are no numbers.

    Args:
        parts: Its cells in each file.
        name: Its name.
        data: The experiment's description of its columns.
    """
    if name in data.categorical:
        return CATEGORY
    present = sum(int(part.notna().sum()) for part in parts)
    wrong = sum(int(numbers(part)[1].sum()) for part in parts)
    if not present or wrong <= present / 2:
        return NUMBER
    if all(looks_like_dates(part) for part in parts if part.notna().any()):
        return DATE
    distinct = set().union(*(set(names_of(part).dropna()) for part in parts))
    with_unit = [found for each in distinct if (found := _WITH_UNIT.fullmatch(each))]
    if len(distinct) > 8 and len(with_unit) > len(distinct) / 2 and len({found[1] for found in with_unit}) <= 2:
        return FREE
    return FREE if len(distinct) > MOST_CATEGORIES or (len(distinct) > 12 and len(distinct) > present / 2) else CATEGORY


@dataclass(frozen=True)
class Columns:
    """What a run's rows are made of: enough to make a row of features of a file or a frame.

    Attributes:
        features: The names of its features, as the model has them: those of a category are "COLUMN=NAME".
        categories: The columns of categories and the names that the run knows of each.
    """

    features: tuple[str, ...]
    categories: Categories = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that a file needs."""
        return raw_names(self.features, self.categories)

    def encode(self, codes: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Returns rows of features [rows, features] from columns of numbers and of codes into `categories`.

        Args:
            codes: By column: numbers, or of a category codes [rows], -1 for other; NaN where one is missing.
        """
        known = dict(self.categories)
        parts = []
        for name in self.names:
            own = np.asarray(codes[name], dtype=np.float64)
            if name not in known:
                parts.append(own[:, None])
                continue
            one = (own[:, None] == np.arange(len(known[name]))).astype(np.float64)
            one[np.isnan(own)] = np.nan
            parts.append(one)
        return np.concatenate(parts, axis=1) if parts else np.empty((0, 0))

    def read(self, columns: Mapping[str, pd.Series[Any]]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Returns rows of features [rows, features] from columns of cells, and notes on names that the run lacks.

        Numbers must be numbers, NaN where one is missing; a category's cells are names, numbers or truth values.
        """
        import pandas as pd

        from fedmeta.data.refusals import listed

        known, notes = dict(self.categories), []
        codes: dict[str, NDArray[Any]] = {}
        for name in self.names:
            if name not in known:
                codes[name] = columns[name].to_numpy(dtype=np.float64, na_value=np.nan)
                continue
            named = names_of(columns[name])
            places = {each: code for code, each in enumerate(known[name])}
            codes[name] = np.array([np.nan if pd.isna(each) else places.get(each, -1) for each in named], dtype=float)
            foreign = named[codes[name] == -1]
            if len(foreign):
                found, own = (
                    listed([f'"{each}"' for each in names], 5) for names in (dict.fromkeys(foreign), known[name])
                )
                notes.append(
                    f'column "{name}": {found} in {len(foreign)} rows count as "other": '
                    f"the run knows {own or 'no name'}"
                )
        return self.encode(codes), tuple(notes)


def feature_names(columns: Sequence[str], categories: Categories) -> tuple[str, ...]:
    """Returns the names of a run's features: columns of numbers, and "COLUMN=NAME" for each name of a category."""
    known = dict(categories)
    return tuple(
        feature
        for name in columns
        for feature in ((name,) if name not in known else [f"{name}={each}" for each in known[name]])
    )


def raw_names(features: Sequence[str], categories: Categories) -> tuple[str, ...]:
    """Returns the columns that features are made of, sorted by the place of their first feature, or by name."""
    owner = {f"{name}={each}": name for name, names in categories for each in names}
    found = dict.fromkeys(owner.get(feature, feature) for feature in features)
    return (*found, *(name for name, names in categories if not names))


def text_categories(population: ArrayPopulation, column: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Returns the names in a column of a population, and each row's code into them (NaN = missing).

    Of a column of numbers the names are the numbers' texts: the run may know it as one of categories.
    """
    place = population.feature_names.index(column)
    codes = population.x[:, place].astype(np.float64)
    own = dict(population.categories)
    if column in own:
        return own[column], codes
    distinct, inverse = np.unique(codes[~np.isnan(codes)], return_inverse=True)
    found = np.full(len(codes), np.nan)
    found[~np.isnan(codes)] = inverse
    return tuple(name_of(float(value)) for value in distinct), found


def frequent_names(
    population: ArrayPopulation, column: str, rows: Sequence[NDArray[np.int64]], fewest: int
) -> tuple[str, ...]:
    """Returns the names of a category that at least `fewest` rows of some site have, sorted.

    Args:
        population: The sites' rows.
        column: The column.
        rows: The train rows of each site.
        fewest: The count below which a name stays at a site.
    """
    names, codes = text_categories(population, column)
    found: set[int] = set()
    for own in rows:
        seen = codes[own]
        counts = np.bincount(seen[~np.isnan(seen)].astype(np.int64), minlength=len(names))
        found |= set(np.flatnonzero(counts >= fewest).tolist())
    return tuple(sorted(names[code] for code in found))


@lru_cache(maxsize=16)
def encoded(population: ArrayPopulation, categories: Categories) -> ArrayPopulation:
    """Returns a population with the features that a run has (see `Columns`); the same where it has no categories.

    Raises:
        FedmetaError: A column is text at this site and numbers in the run.
    """
    own, known = dict(population.categories), dict(categories)
    if not own and not known:
        return population
    foreign = [name for name in own if name not in known]
    if foreign:
        raise FedmetaError(f'column "{foreign[0]}" is text here and numbers in the run')
    codes: dict[str, NDArray[Any]] = {}
    for place, name in enumerate(population.feature_names):
        if name not in known:
            codes[name] = population.x[:, place]
            continue
        names, found = text_categories(population, name)
        places = {each: code for code, each in enumerate(known[name])}
        table = np.array([places.get(each, -1) for each in names] + [-1], dtype=np.float64)
        absent = np.isnan(found)
        codes[name] = np.where(absent, np.nan, table[np.where(absent, 0, found).astype(np.int64)])
    features = feature_names(population.feature_names, categories)
    x = Columns(features, categories).encode(codes)
    missing = bool(np.isnan(x).any())
    return replace(population, x=x, feature_names=features, missing=missing, categories=())


def column_values(
    table: RawTable, name: str, kind: str, data: Data
) -> tuple[pd.Series[Any], list[str], tuple[str, ...]]:
    """Returns a column of one file as numbers, or as codes with the names they stand for; and what is wrong with it.

    Args:
        table: The file.
        name: The column.
        kind: What it is over all files.
        data: What texts mean.
    """
    column = table.frame[name]
    if kind == CATEGORY:
        named = names_of(column)
        distinct = sorted(set(named.dropna()))
        places = {each: float(code) for code, each in enumerate(distinct)}
        return named.map(places).astype(float), [], tuple(distinct)
    if kind == DATE and data.dates == "days":
        when, no_date = days(column)
        advice = "no date that can be read: write it as 2024-03-09"
        return when, _wrong_cells(table, name, column, no_date.to_numpy(), advice), ()
    found, wrong = numbers(column)
    problems: list[str] = []
    if wrong.any():
        row = int(np.argmax(wrong))
        first = f'{table.place([row], name)} is "{str(column.iloc[row])[:40]}"'
        if kind == DATE:
            problems = [
                f"{first}, not a number: the column holds dates: encode the column as numbers, "
                'with data.dates = "days", or leave it out with data.ignore'
            ]
        elif kind == FREE and _WITH_UNIT.fullmatch(str(column.iloc[row]).strip()):
            problems = [
                f"{first}, a number with a unit or a sign: write the numbers alone, or list it in data.categorical"
            ]
        elif kind == FREE:
            count = len(set(names_of(column).dropna()))
            problems = [
                f"{first}, not a number: {count} different texts in {len(column)} rows are no categories (an id?): "
                "leave the column out with data.ignore, or list it in data.categorical"
            ]
        else:
            advice = "correct it, or list it in data.missing if it means a missing value (fedmeta adapt: --missing)"
            problems = _wrong_cells(table, name, column, wrong, f"not a number: {advice}")
    values = found.to_numpy(dtype=np.float64, na_value=np.nan) if found.dtype.kind not in "biu" else None
    if values is not None:
        huge = np.abs(np.nan_to_num(values, nan=0.0)) > np.finfo(np.float32).max
        if huge.any():
            row = int(np.argmax(huge))
            problems.append(
                f"{table.place(np.flatnonzero(huge).tolist(), name)} is {values[row]}, beyond what float32 holds: "
                "correct it, or leave it missing (NaN)"
            )
    return found, problems, ()


def _wrong_cells(
    table: RawTable, name: str, column: pd.Series[Any], wrong: NDArray[np.bool_], advice: str
) -> list[str]:
    """Returns one problem for the wrong cells of a column, with the texts they hold."""
    rows = np.flatnonzero(wrong).tolist()
    if not rows:
        return []
    texts = list(dict.fromkeys(str(column.iloc[row])[:40] for row in rows[:1_000]))
    shown = ", ".join(f'"{text}"' for text in texts[:5]) + (" ..." if len(texts) > 5 else "")
    return [f"{table.place(rows, name)} is {shown}, {advice}"]
