"""What a look at the sites' rows shows before anything runs: columns one by one, and what is probably not meant.

A finding is a sentence for a person: what was seen, where, and what to do about it. Nothing is changed by it.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.data.columns import is_number_text
from fedmeta.data.population import ArrayPopulation, Population
from fedmeta.data.refusals import listed
from fedmeta.experiment import Data

LOOKED_AT = ("tables", "npz")
"""Sources that hold a user's own rows."""

MOST_COLUMNS = 400
"""Of wider rows no columns are looked at one by one: these are no table that a person made."""

MOST_VALUES = 50_000_000
"""Larger populations are not looked at (values)."""

MOST_COMPARED = 500
"""How many sites are compared with the others."""

FAR = 5.0
"""A site's mean is far off from this many standard deviations within sites."""

TIMES = 6.0
"""... or its median, from so many times that of the others."""

FEW_NUMBERS = 8
"""A column of so few different whole numbers may hold categories."""

SENTINELS = (-1.0, -9.0, -99.0, -999.0, -9999.0, 99.0, 999.0, 9999.0)
"""Numbers that people write for a missing value."""

UNLABELLED = ("-1", "-9", "99", "255", "999", "-99", "-999", "9999")
"""Labels that mean "unlabelled" where the others count from 0 or 1."""


def findings(population: Population, data: Data) -> list[str]:
    """Returns what is probably not meant in the sites' rows, a sentence each, the gravest first.

    Args:
        population: The sites.
        data: The experiment's description of them.
    """
    if not isinstance(population, ArrayPopulation) or population.tokens or data.ways or data.source not in LOOKED_AT:
        return []
    found = list(_labels(population, data))
    columns = _columns(population)
    unnamed = population.feature_names == tuple(f"x{place}" for place in range(len(population.feature_names)))
    if columns is not None and not unnamed:
        for place, name in enumerate(population.feature_names):
            found += _column(population, columns, place, name)
    return found


def _looked_at(population: ArrayPopulation) -> bool:
    flat = population.x.ndim == 2 and population.x.shape[1] <= MOST_COLUMNS and population.x.size <= MOST_VALUES
    return flat and len(population.feature_names) == population.x.shape[1]


def _columns(population: ArrayPopulation) -> NDArray[np.float64] | None:
    return np.asarray(population.x, dtype=np.float64) if _looked_at(population) else None


def _sites(population: ArrayPopulation) -> list[tuple[str, NDArray[np.int64]]]:
    """Returns the sites with their rows; of very many, evenly chosen ones."""
    chosen = np.unique(np.linspace(0, len(population) - 1, MOST_COMPARED).astype(np.int64))
    return [(population.names[site], population.sites.of(int(site))) for site in chosen]


# ---------------------------------------------------------------- labels


def _labels(population: ArrayPopulation, data: Data) -> Iterator[str]:
    name = ", ".join(data.label_names) if data.source != "npz" else "y"
    if population.regression:
        yield from _targets(population, name)
        return
    classes = population.class_names
    counts = np.bincount(population.y, minlength=len(classes))
    for same in _alike(classes):
        yield (
            f'label "{name}": {_quoted(same)} differ by case or spaces alone, and are {len(same)} classes: '
            "write them alike if they are one"
        )
    per_site = [(site, set(np.unique(population.y[rows]).tolist())) for site, rows in _sites(population)]
    if len(per_site) > 1:
        for place, (site, own) in enumerate(per_site):
            others = set().union(*(each for other, (_, each) in enumerate(per_site) if other != place))
            if own and not own & others:
                yield (
                    f"site {site} shares no class with the others: it has {_quoted([classes[code] for code in own])}, "
                    f"they have {_quoted([classes[code] for code in sorted(others)])}: write them alike if they are "
                    "the same"
                )
    odd = [each for each in classes if each in UNLABELLED]
    rest = [float(each) for each in classes if each not in UNLABELLED and is_number_text(each)]
    numeric = bool(odd) and 0 < len(rest) == len(classes) - len(odd)
    if numeric and all(abs(float(each)) > max(rest) + 1 or float(each) < 0 <= min(rest) for each in odd):
        where = ", ".join(f'"{each}" ({counts[classes.index(each)]} rows)' for each in odd)
        yield (
            f'label "{name}": {where} beside {_quoted([each for each in classes if each not in odd])} looks like '
            '"unlabelled": it is a class here; leave these rows out if it is none'
        )
    if len(classes) > 20 and all(map(is_number_text, classes)):
        yield (
            f'label "{name}" has {len(classes)} different whole numbers, read as classes: set data.task = '
            '"regression" if they are numbers'
        )
    rare = [f'"{each}" ({count})' for each, count in zip(classes, counts.tolist(), strict=True) if count < 5]
    if rare and len(classes) <= 50:
        yield f'label "{name}": fewer than 5 rows in all of class {listed(rare, 8)}'


def _targets(population: ArrayPopulation, name: str) -> Iterator[str]:
    y = population.y.reshape(len(population.y), -1)
    for column, target in enumerate(population.target_names or (name,)):
        own = y[:, column] if column < y.shape[1] else y[:, 0]
        distinct = np.unique(own)
        if len(distinct) <= 10 and bool((distinct == np.round(distinct)).all()):
            yield (
                f'label "{target}" has {len(distinct)} different numbers, all whole, and is read as numbers '
                '(regression), as its type is floating point: set data.task = "classification" for classes'
            )


def task_reason(population: Population, data: Data) -> str:
    """Returns what the labels are, and why, in one sentence."""
    if data.ways:
        return f"few-shot tasks of {data.ways} classes (data.ways)"
    if population.regression:
        names = population.target_names or ("the label",)
        why = "data.task" if data.task == "regression" else "labels are numbers with fractions or of floating point"
        return (
            f"regression of {listed(list(names), 5)}, as {why} {'asks' if data.task == 'regression' else ''}".rstrip()
        )
    why = {
        "classification": "data.task asks",
        "auto": "labels are whole numbers or text",
        "regression": "",
    }[data.task]
    if data.binarise is not None:
        why = f"data.binarise = {data.binarise:g} asks"
    return f"classification into {len(population.class_names)} classes, as {why}"


def class_counts(population: Population) -> list[tuple[str, int]]:
    """Returns the classes and how many rows each has; of a population that is not stored none."""
    if not isinstance(population, ArrayPopulation) or population.regression:
        return []
    counts = np.bincount(population.y.reshape(-1), minlength=len(population.class_names)).tolist()
    return list(zip(population.class_names, counts, strict=True))


# ---------------------------------------------------------------- columns


def _column(population: ArrayPopulation, x: NDArray[np.float64], place: int, name: str) -> list[str]:
    values = x[:, place]
    there = values[~np.isnan(values)]
    names = dict(population.categories).get(name)
    if not len(there):
        return [f'column "{name}" is missing in every row: leave it out (data.ignore)']
    distinct = np.unique(there)
    found: list[str] = []
    if len(distinct) == 1 and len(values) > 1:
        only = names[int(distinct[0])] if names else f"{distinct[0]:g}"
        found.append(f'column "{name}" is constant ({only}): it holds no information; data.ignore leaves it out')
        return found
    found += _copy_of_label(population, values, name)
    if names is not None:
        return found + _categories(population, values, name, names)
    whole = bool((there == np.round(there)).all())
    unnamed = re.fullmatch(r"Unnamed: \d+|index|", name, re.IGNORECASE) is not None
    named = re.search(r"(?:^|[_\W])(?:id|ids|mrn|nr|no|number|patient|pid|key|uuid)$|^id", name, re.IGNORECASE)
    unique = len(distinct) == len(there) and len(there) >= 20 and whole
    steady = unique and bool(np.ptp(np.diff(np.sort(there))) == 0)
    large = bool(np.abs(there).max() >= 2**53)
    if unnamed or large or (unique and (named or steady or len(there) >= 100)) or (named and unique):
        why = "a different whole number in every row" if unique else "its name" if unnamed else "numbers beyond 2^53"
        found.append(
            f'column "{name}" looks like an id or a row number ({why}), and is a feature: '
            f'leave it out with data.ignore = ["{name}"]'
        )
        return found
    found += _sentinel(there, distinct, name)
    found += _scale(population, x, place, name)
    if whole and 3 <= len(distinct) <= FEW_NUMBERS and len(there) >= 10 * len(distinct):
        found.append(
            f'column "{name}" has {len(distinct)} different whole numbers, {listed([f"{each:g}" for each in distinct])}'
            f': they count as numbers; if they are categories, data.categorical = ["{name}"]'
        )
    return found


def _categories(population: ArrayPopulation, values: NDArray[np.float64], name: str, names: Sequence[str]) -> list[str]:
    found = [
        f'column "{name}": {_quoted(same)} differ by case or spaces alone: write them alike' for same in _alike(names)
    ]
    per_site = [
        (site, set(np.unique(values[rows][~np.isnan(values[rows])]).astype(int).tolist()))
        for site, rows in _sites(population)
    ]
    if len(per_site) > 1:
        for place, (site, own) in enumerate(per_site):
            others = set().union(*(each for other, (_, each) in enumerate(per_site) if other != place))
            if own and others and not own & others:
                found.append(
                    f'site {site} shares no category of column "{name}" with the others: '
                    f"{_quoted([names[code] for code in sorted(own)])} where they have "
                    f"{_quoted([names[code] for code in sorted(others)])}: write them alike"
                )
    return found


def _copy_of_label(population: ArrayPopulation, values: NDArray[np.float64], name: str) -> list[str]:
    """Returns whether a column gives the label away: equal to it but for names, or a rank that splits two classes."""
    there = ~np.isnan(values)
    if there.sum() < 20:
        return []
    own = values[there]
    advice = f': if it is known only with the label, leave it out with data.ignore = ["{name}"]'
    if population.regression:
        y = population.y[there].reshape(int(there.sum()), -1)[:, 0]
        if np.ptp(own) > 0 and np.ptp(y) > 0 and abs(float(np.corrcoef(own, y)[0, 1])) > 0.9995:
            return [f'column "{name}" is nearly a copy of the label (correlation above 0.9995){advice}']
        return []
    y = population.y[there]
    classes = np.unique(y)
    if len(classes) < 2:
        return []
    _, codes = np.unique(own, return_inverse=True)
    width = int(codes.max()) + 1
    if width <= max(2 * len(population.class_names), 10):
        table = np.zeros((width, len(population.class_names)))
        np.add.at(table, (codes, y), 1)
        if table.max(axis=1).sum() >= 0.995 * len(y):
            return [f'column "{name}" gives the class away in {table.max(axis=1).sum() / len(y):.1%} of rows{advice}']
        return []
    if len(classes) == 2 and min(np.bincount(y)[classes]) >= 10:
        ranks = pd.Series(own).rank().to_numpy()
        positive = y == classes[1]
        n = int(positive.sum())
        area = (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(y) - n))
        if max(area, 1 - area) > 0.998:
            return [f'column "{name}" alone separates the two classes (AUROC {max(area, 1 - area):.3f}){advice}']
    return []


def _sentinel(there: NDArray[np.float64], distinct: NDArray[np.float64], name: str) -> list[str]:
    """Returns whether a number far from all others stands for a missing value."""
    for value in SENTINELS:
        count = int((there == value).sum())
        rest = distinct[distinct != value]
        if not count or len(rest) < 3 or count < 2:
            continue
        low, high = float(rest.min()), float(rest.max())
        spread = max(high - low, 1e-12)
        negative = value < 0 <= low
        above = value > high + 0.5 * spread
        if negative or above or (value < low - 0.5 * spread):
            return [
                f'column "{name}": {value:g} in {count} rows, while all others lie from {low:g} to {high:g}: if it '
                f'means "missing", list "{value:g}" in data.missing'
            ]
    return []


def _scale(population: ArrayPopulation, x: NDArray[np.float64], place: int, name: str) -> list[str]:
    """Returns sites whose numbers lie far from those of the others, as where units or separators differ."""
    parts = [(site, x[rows, place]) for site, rows in _sites(population)]
    parts = [(site, own[~np.isnan(own)]) for site, own in parts]
    parts = [(site, own) for site, own in parts if len(own) >= 5]
    if len(parts) < 3:
        return []
    found = []
    mixed = [site for site, own in parts if _thousandths(own)]
    plain = [own for site, own in parts if site not in mixed and bool((own == np.round(own)).all())]
    if mixed and len(plain) >= len(mixed) and max(float(np.abs(own).max()) for own in plain) >= 1000:
        found.append(
            f'site {listed(mixed, 5)}: column "{name}" has whole numbers below 1000 beside numbers with exactly three '
            "decimals, other sites whole numbers of thousands: its points separate thousands, write 1544 for 1.544"
        )
        parts = [(site, own) for site, own in parts if site not in mixed]
        if len(parts) < 3:
            return found
    means = np.array([own.mean() for _, own in parts])
    medians = np.array([np.median(own) for _, own in parts])
    spreads = np.array([own.std() for _, own in parts])
    for number, (site, own) in enumerate(parts):
        others = np.arange(len(parts)) != number
        if len(np.unique(own)) < 3 and len(np.unique(np.concatenate([each for _, each in parts]))) <= 3:
            continue
        middle, within = float(np.median(means[others])), float(np.median(spreads[others]))
        between = 1.4826 * float(np.median(np.abs(means[others] - middle)))
        far = abs(means[number] - middle) > FAR * max(within, between, 1e-12 * abs(middle)) and within > 0
        usual = float(np.median(medians[others]))
        times = float(medians[number]) / usual if usual * medians[number] > 0 else 1.0
        ranges = medians[others] / usual if usual else np.ones(1)
        apart = max(times, 1 / times) >= TIMES and max(float(ranges.max()), 1 / max(float(ranges.min()), 1e-9)) < 3
        if far or apart:
            ratio = (
                f", {max(times, 1 / times):.3g} times {'as large' if times > 1 else 'smaller'}" if times != 1 else ""
            )
            found.append(
                f'site {site}: column "{name}" has median {medians[number]:.4g}, the others {usual:.4g}{ratio}: other '
                "units, a decimal or thousands separator, or a number for missing? Convert it, or leave it if it is so"
            )
    return found


def _thousandths(own: NDArray[np.float64]) -> bool:
    """Returns whether numbers are whole below 1000 or have exactly three decimals, as 1544 does that is read as 1.544.

    Of ten numbers with three true decimals one ends in 0; with thousands read wrong there are whole numbers beside.
    """
    fractions = own[own != np.round(own)]
    if len(fractions) < 5 or float(np.abs(fractions).max()) >= 1000:
        return False
    thousandths = np.abs(fractions * 1000 - np.round(fractions * 1000)) < 1e-6
    whole = own[own == np.round(own)]
    return (
        bool(thousandths.all())
        and len(whole) >= 3
        and float(np.median(np.abs(whole))) > 20 * float(np.median(np.abs(fractions)))
    )


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Returns the names that differ by case, spaces or the form of their characters alone, group by group."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    return [same for same in folded.values() if len(same) > 1]


def _quoted(names: Sequence[str]) -> str:
    return listed([f'"{name}"' for name in names], 6)


# ---------------------------------------------------------------- a table of columns


def summarize_columns(population: Population) -> pd.DataFrame:
    """Returns one row per feature: what it is, how much of it is missing, and its values over all rows and by site.

    Returns:
        Columns column, type ("number" or "category"), missing (share of rows), mean and sd of numbers over all rows,
        low and high (the smallest and largest value), site_means (the lowest and the highest mean of a site, with the
        sites) and values (of categories and few numbers: each with its count). Empty where rows are no named vectors.
    """
    if not isinstance(population, ArrayPopulation) or not _looked_at(population):
        return pd.DataFrame()
    x, known = np.asarray(population.x, dtype=np.float64), dict(population.categories)
    rows: list[dict[str, Any]] = []
    sites = _sites(population)
    for place, name in enumerate(population.feature_names):
        values = x[:, place]
        there = values[~np.isnan(values)]
        row: dict[str, Any] = {"column": name, "type": "category" if name in known else "number"}
        row["missing"] = float(np.isnan(values).mean())
        distinct, counts = np.unique(there, return_counts=True)
        if name in known:
            order = np.argsort(-counts, kind="stable")
            row["values"] = listed([f"{known[name][int(distinct[at])]} ({counts[at]})" for at in order], 6)
        elif len(there):
            row |= {"mean": there.mean(), "sd": there.std(), "low": there.min(), "high": there.max()}
            if len(distinct) <= 3:
                row["values"] = ", ".join(f"{at:g} ({count})" for at, count in zip(distinct, counts, strict=True))
            means = [
                (float(np.nanmean(x[own, place])), site) for site, own in sites if not np.isnan(x[own, place]).all()
            ]
            if len(means) > 1:
                (low, first), (high, last) = min(means), max(means)
                row["site_means"] = f"{low:.4g} ({first}) to {high:.4g} ({last})"
        rows.append(row)
    columns = ["column", "type", "missing", "mean", "sd", "low", "high", "site_means", "values"]
    return pd.DataFrame(rows, columns=columns)
