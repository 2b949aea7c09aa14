"""Rows that a model is given, in a file, a frame or an array, held against the form that the run's rows had.

Columns go by their names: their order does not matter, a missing one is refused, others are left out with a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.adapt.initialization import Form
from fedmeta.data import class_codes, load_site
from fedmeta.data.arrays import plain
from fedmeta.data.npz_file import npz_path, read_arrays
from fedmeta.data.population import Population
from fedmeta.data.table_file import clean_name
from fedmeta.data.tables import read_columns, table_columns
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import ROW_ORDER, Data, Experiment

NAMED = 5
"""How many columns or classes an error names."""


class Described(Protocol):
    """What knows the form of a run's rows: what a run leaves, or a site's own model."""

    @property
    def form(self) -> Form:
        """What rows and labels look like."""

    @property
    def experiment(self) -> Experiment:
        """The run's description."""


class SiteRows(NamedTuple):
    """A site's rows.

    Attributes:
        x: Raw features [n, *shape] in the order of the run's, NaN where one is missing.
        y: Codes into the run's classes [n], or targets in their own units [n] or, of several, [n, targets].
        classes: The classes that the codes stand for; a few-shot site's own.
        notes: What of the file was left out, a sentence each.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.y)


def read_rows(
    start: Described, path: str, classes: tuple[str, ...] | None = None, missing: Sequence[str] = ()
) -> SiteRows:
    """Reads a site's file, of any form that a deployed node's may have.

    Args:
        start: What the run leaves, or a model made of it.
        path: A `.csv`, `.parquet` or `.npz` file.
        classes: What the codes stand for, where other rows of the site fixed that; None = the run's classes, or those
            of a few-shot site's file.
        missing: Texts that mean a missing value in the file, besides the run's.

    Raises:
        FedmetaError: The file cannot be read, or its columns, shape, labels or classes are not the
            run's; the message names it.
    """
    form, data = start.form, start.experiment.data
    task = "regression" if form.regression else "classification"
    # A file of one site has no tasks drawn from it, and integers may be numbers to be approached.
    plainly = data.model_copy(update={"task": task, "ways": None, "missing": (*data.missing, *missing)})
    notes = _check_table(path, plainly, form)
    table = form.named and Path(path).suffix.lower() != ".npz"
    columns = form.columns
    if table and data.time and data.time not in (ROW_ORDER, *table_columns(path, data)):
        plainly = plainly.model_copy(update={"time": ROW_ORDER})
        notes = (*notes, f'{path}: no column "{data.time}" (data.time): its rows count as in time as they come.')
    categorical = [name for name, _ in form.categories]
    population = load_site(plainly, path, only=columns.names if table else None, categorical=categorical)
    rows = population.rows(population.all_sites).rows
    if table:
        given, others = read_columns(path, plainly, columns)
        x, order = torch.from_numpy(given[rows]), None
        notes = (*notes, *others)
    else:
        order, others = _column_order(path, population, form)
        notes = notes or others
        x = population.features(rows)
    if form.tokens and x.is_floating_point():
        raise FedmetaError(f"{path}: its features are numbers with fractions; the run's are codes of symbols")
    x = x.to(form.dtype)
    if order is not None:
        x = x[:, torch.from_numpy(order)]
    labels = population.labels(rows)
    if form.regression:
        if population.targets != form.outputs:
            raise FedmetaError(f"{path}: its rows have {population.targets} targets, the run's {form.outputs}")
        return SiteRows(x, torch.from_numpy(labels).to(torch.float64), (), notes)
    known = classes or (_own_classes(path, population, form) if data.ways else form.classes)
    codes = class_codes(population.class_names, known)
    unknown = [population.class_names[code] for code in np.unique(labels) if codes[code] < 0]
    if unknown:
        raise FedmetaError(
            f"{path}: {_listed(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the run, whose "
            f"classes are {_listed(known, 20)}: write the labels as the run has them{nearest(unknown[0], known)}"
        )
    return SiteRows(x, torch.from_numpy(codes[labels]), known, notes)


def read_inputs(form: Form, data: Data, path: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Reads rows to predict for: a file as for `read_rows`, which needs no labels.

    Args:
        form: What rows look like.
        data: The run's description of its data.
        path: A `.csv`, `.parquet` or `.npz` file.

    Returns:
        Raw rows [n, *shape], and notes on what was left out.

    Raises:
        FedmetaError: The file cannot be read, or its columns or shape are not the run's; the message names it.
    """
    if Path(path).suffix.lower() != ".npz":
        notes = _check_table(path, data, form)
        rows, others = read_columns(path, data, form.columns)
        return raw_rows(rows, form, path)[0], (*notes, *others)
    arrays = read_arrays(npz_path(path), ("x",), ())
    x, names = plain(arrays["x"]), arrays.get("feature_names")
    if form.named and names is not None and x.ndim == 2 and x.shape[1] == names.size:
        columns = [clean_name(str(name)) for name in names.reshape(-1)]
        return raw_rows(pd.DataFrame(x, columns=columns), form, path)
    return raw_rows(x, form, path)


def raw_rows(given: Any, form: Form, origin: str = "the input") -> tuple[NDArray[Any], tuple[str, ...]]:
    """Returns raw rows [n, *shape] in the run's type, NaN where a value is missing, and notes on what was left out.

    Args:
        given: A frame or a mapping with the run's columns in any order, of numbers, truth values or, of categories,
            their names; or an array of features [n, *shape] in the run's order.
        form: What rows look like.
        origin: What it is, for messages.

    Raises:
        FedmetaError: A column is missing or there twice, a value is not a number, or rows have another shape.
    """
    notes: tuple[str, ...] = ()
    if isinstance(given, Mapping) or getattr(getattr(given, "dtype", None), "names", None):
        given = pd.DataFrame(given)
    if isinstance(given, pd.DataFrame) and form.categories and set(form.features) <= set(map(str, given.columns)):
        given = given.set_axis(list(map(str, given.columns)), axis=1)[list(form.features)].to_numpy(dtype=np.float64)
    if isinstance(given, pd.DataFrame) and form.named:
        frame = given.set_axis([clean_name(str(name)) for name in given.columns], axis=1)
        notes = _check_names(origin, list(frame.columns), form)
        known = {name for name, _ in form.categories}
        cells = {
            name: frame[name]
            if name in known
            else pd.Series(_numbers(frame[name], f'{origin}: column "{name}"'), index=frame.index)
            for name in form.columns.names
        }
        rows, others = form.columns.read(cells)
        notes = (*notes, *(f"{origin}: {note}" for note in others))
    else:
        rows = np.asarray(given.to_numpy() if isinstance(given, pd.DataFrame) else given)
        if rows.dtype.kind not in "biuf":
            flat = pd.Series(rows.reshape(-1), dtype=object)
            rows = _numbers(flat, f"{origin}: its values, counted through all rows,").reshape(rows.shape)
    if tuple(rows.shape[1:]) != form.shape or not rows.ndim:
        raise FedmetaError(f"{origin}: its rows have shape {tuple(rows.shape[1:])}, the run's {form.shape}")
    if form.tokens and rows.dtype.kind == "f" and not (rows == np.round(rows)).all():
        raise FedmetaError(f"{origin}: its features are numbers with fractions; the run's are codes of symbols")
    if np.isinf(rows).any():
        where = np.argwhere(np.isinf(rows))[0]
        name = f'column "{form.features[where[1]]}"' if form.named else f"value {tuple(where[1:].tolist())}"
        raise FedmetaError(f"{origin}: row {where[0]} (from 0), {name} is infinite: correct it, or leave it missing")
    return rows.astype(torch.empty(0, dtype=form.dtype).numpy().dtype), notes


def _numbers(column: pd.Series, place: str) -> NDArray[np.float64]:
    """Returns a column as numbers, NaN where one is missing; raises `FedmetaError` at the first that is none."""
    if column.dtype.kind in "biuf":
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    numbers = pd.to_numeric(column, errors="coerce") if column.dtype.kind not in "mM" else column.isna()
    wrong = column.notna() if column.dtype.kind in "mM" else numbers.isna() & column.notna()
    if wrong.any():
        row = int(np.argmax(wrong.to_numpy()))
        raise FedmetaError(f'{place} row {row} (from 0) is "{str(column.iloc[row])[:40]}", not a number')
    return np.asarray(numbers.to_numpy(dtype=np.float64, na_value=np.nan), dtype=np.float64)


def _check_table(path: str, data: Data, form: Form) -> tuple[str, ...]:
    """Returns a note on the columns that a table has besides the run's; raises `FedmetaError` where one is missing."""
    if Path(path).suffix.lower() == ".npz" or not form.named or not Path(path).expanduser().is_file():
        return ()
    apart = {*data.label_names, data.site_column, data.time, *data.ignore}
    return _check_names(path, [name for name in table_columns(path, data) if name not in apart], form)


def _check_names(origin: str, names: list[str], form: Form) -> tuple[str, ...]:
    """Returns a note on columns that are not the run's; raises `FedmetaError` where one is missing or there twice."""
    own, wanted = set(names), set(form.columns.names)
    lacking = [name for name in form.columns.names if name not in own]
    foreign = [name for name in names if name not in wanted]
    if lacking:
        given = f" and has {_listed(foreign)} besides" if foreign else ""
        raise FedmetaError(
            f"{origin} lacks {_listed(lacking)}{given}: it needs the columns that the run was trained on"
            f"{nearest(lacking[0], foreign)}"
        )
    twice = [name for name in form.columns.names if names.count(name) > 1] if len(own) < len(names) else []
    if twice:
        raise FedmetaError(f"{origin} has {_listed(twice)} more than once: leave one of them out")
    return (f"{origin}: {_listed(foreign)} had no part in the run, and was left out.",) if foreign else ()


def _column_order(path: str, population: Population, form: Form) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns where in the file each of the run's features is, None where rows are no vectors; and notes.

    Raises:
        FedmetaError: The file lacks a feature, or its rows have another shape.
    """
    if len(form.shape) != 1 or len(population.shape) != 1:
        if tuple(population.shape) != form.shape:
            raise FedmetaError(f"{path}: its rows have shape {tuple(population.shape)}, the run's {form.shape}")
        return None, ()
    own, wanted = list(population.feature_names), list(form.features)
    if form.named:
        if own == [f"x{place}" for place in range(len(own))] and not set(own) & set(wanted):
            raise FedmetaError(
                f'{path}: its columns have no names: add an array "feature_names" with those of the run in the order '
                f"that the file has them; the run's are {_listed(wanted, 20)}"
            )
        notes = _check_names(path, own, form)
        return np.array([own.index(name) for name in wanted], dtype=np.int64), notes
    if sorted(own) != sorted(wanted):
        raise FedmetaError(f"{path}: its columns are not those of the run, of which some share a name")
    # Of columns that share a name, the order among them is the file's.
    order = np.empty(len(wanted), dtype=np.int64)
    order[np.argsort(np.array(wanted), kind="stable")] = np.argsort(np.array(own), kind="stable")
    return order, ()


def _own_classes(path: str, population: Population, form: Form) -> tuple[str, ...]:
    """Returns a few-shot site's own classes, filled up to as many as the run's tasks had."""
    own, ways = population.class_names, len(form.classes)
    if len(own) > ways:
        raise FedmetaError(f"{path}: it has {len(own)} classes, but the run learned to distinguish {ways}")
    return (*own, *(f"(no class {number})" for number in range(len(own) + 1, ways + 1)))


def _listed(names: tuple[str, ...] | list[str], most: int = NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f'"{name}"' for name in names[:most]) + more
