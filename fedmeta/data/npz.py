"""Sites from one NumPy `.npz` file: arrays `x`, `y`, `site`, and optionally names and the order of time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.arrays import build_population, feature_order
from fedmeta.data.labels import encode_labels
from fedmeta.data.npz_file import npz_path, read_arrays
from fedmeta.data.population import ArrayPopulation, left_out
from fedmeta.data.ragged import IntArray
from fedmeta.data.table_file import clean_name
from fedmeta.errors import FedmetaError
from fedmeta.experiment import ROW_ORDER, Data


def load_npz(data: Data) -> ArrayPopulation:
    """Returns the population of the file `data.path`.

    Arrays: `x` [rows, ...] numbers, NaN = missing; `y` [rows] integers, text or (regression) floating point;
    of several targets [rows, targets]; `data.site_key` [rows] integers or text; optionally `site_names`
    (for integer sites), `class_names` (for integer or text labels), `target_names` [targets], `feature_names`
    [features] and `time` [rows], the order within a site, or another array that `data.time` names.

    Raises:
        FedmetaError: The file, an array, a label or a feature is not as it should be.
    """
    path = npz_path(data.path)
    arrays = read_arrays(path, ("x", "y", data.site_key, *_time_array(data)), (f"{data.site_key}_names",))
    sites = _site_names(path, data.site_key, arrays)
    notes: list[str] = []
    if data.without:
        arrays, sites, notes = _without(arrays, sites, data.without, ("x", "y", "time", *_time_array(data)))
    return replace(_population(path, arrays, data, sites, data.min_rows), notes=tuple(notes))


def _without(
    arrays: dict[str, NDArray[Any]], sites: "_Sites", names: Sequence[str], by_row: Sequence[str]
) -> tuple[dict[str, NDArray[Any]], "_Sites", list[str]]:
    """Returns a file's arrays and sites as if it did not hold the rows of some sites, and notes on names not there."""
    gone, notes = left_out(sites.names, names)
    kept = ~np.isin(sites.owners, [place for place, name in enumerate(sites.names) if name in gone])
    arrays = {name: value[kept] if name in by_row else value for name, value in arrays.items()}
    there, owners = np.unique(sites.owners[kept], return_inverse=True)
    return arrays, _Sites([sites.names[site] for site in there], owners.reshape(-1).astype(np.int64)), notes


def load_npz_site(data: Data, path: str, name: str) -> ArrayPopulation:
    """Returns the population whose one site holds all rows of a file, called `name`, or as the file where empty.

    The file needs no array that names sites; raises `FedmetaError` where it has one and that names several.
    """
    file = npz_path(path)
    arrays = _in_shared_order(read_arrays(file, ("x", "y", *_time_array(data)), (data.site_key,)), data)
    there = len(np.unique(arrays.get(data.site_key, np.zeros(1))))
    if there > 1:
        raise FedmetaError(
            f"{path}: array \"{data.site_key}\" names {there} sites, but a node's own file is one site's"
        )
    sites = _Sites([name or file.stem], np.zeros(len(arrays["x"]), dtype=np.int64))
    return _population(file, arrays, data, sites, 0)


def _in_shared_order(arrays: dict[str, NDArray[Any]], data: Data) -> dict[str, NDArray[Any]]:
    """Returns arrays with named features in the order that all sites share; others as they are."""
    x, names = arrays["x"], _decoded(arrays.get("feature_names", np.array([]))).reshape(-1).astype(str)
    names = np.array([clean_name(name) for name in names.tolist()], dtype=str)
    if x.ndim != 2 or x.shape[1] != len(names):
        return arrays
    order = feature_order(names.tolist(), data.columns)
    return arrays if order == sorted(order) else {**arrays, "x": x[:, order], "feature_names": names[order]}


def _time_array(data: Data) -> tuple[str, ...]:
    """Returns the array that orders a site's rows where the experiment names one."""
    return (data.time,) if data.time and data.time != ROW_ORDER else ()


class _Sites(NamedTuple):
    names: list[str]
    owners: IntArray


def _population(
    path: Path, arrays: dict[str, NDArray[Any]], data: Data, sites: _Sites, min_rows: int
) -> ArrayPopulation:
    x, names = arrays["x"], _texts(path, arrays, "feature_names")
    if x.dtype.kind not in "biuf":
        raise FedmetaError(f'{path}: array "x" has type {x.dtype}: features must be numbers')
    if x.ndim > 1 and 0 in x.shape[1:]:
        raise FedmetaError(f'{path}: array "x" has shape {x.shape}: its rows are empty')
    width = 1 if x.ndim == 1 else x.shape[1]
    if x.ndim > 2:
        names = None
    elif names is not None and len(names) != width:
        raise FedmetaError(f'{path}: array "feature_names" has {len(names)} names, but "x" has {width} features')
    feature_names = tuple(names or [f"x{column}" for column in range(width if x.ndim < 3 else 0)])

    def place(array: str, row: int, cell: str = "") -> str:
        return f'{path}: array "{array}", row {row} (from 0), {cell}site "{sites.names[sites.owners[row]]}"'

    def cell(row: int, column: int) -> str:
        index = tuple(int(part) for part in np.unravel_index(column, x.shape[1:])) if x.ndim > 2 else ()
        return place("x", row, f"pixel {index}, " if index else f'column "{feature_names[column]}", ')

    labels = encode_labels(
        _labels(path, arrays["y"]),
        lambda row: place("y", row),
        data.task,
        data.binarise,
        _texts(path, arrays, "class_names"),
        data.target,
        _target_names(path, arrays),
    )
    named = next(iter(_time_array(data)), "time")
    time = None if data.time == ROW_ORDER else arrays.get(named)
    if time is not None and (time.ndim != 1 or time.dtype.kind not in "iufM" or bool((time != time).any())):
        raise FedmetaError(f'{path}: array "{named}" must hold one number per row, and none missing')
    found = build_population(str(path), x, labels, sites.owners, sites.names, cell, time, feature_names, min_rows)
    return replace(found, in_time=time is not None or data.time == ROW_ORDER)


def _labels(path: Path, y: NDArray[Any]) -> NDArray[Any]:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    several = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind == "f"
    if not several and (y.ndim != 1 or y.dtype.kind not in "biufUS"):
        raise FedmetaError(
            f'{path}: array "y" has shape {y.shape} and type {y.dtype}: it must hold one number or text per row, or '
            "of several targets one floating-point number each"
        )
    return _decoded(y)


def _target_names(path: Path, arrays: dict[str, NDArray[Any]]) -> list[str]:
    """Returns what targets are called; raises `FedmetaError` where the file names fewer or more than there are."""
    y, names = arrays["y"], _texts(path, arrays, "target_names")
    count = y.shape[1] if y.ndim == 2 else 1
    if names is None:
        return [f"y{number}" for number in range(count)] if count > 1 else ["y"]
    if len(names) != count:
        raise FedmetaError(f'{path}: array "target_names" has {len(names)} names, but "y" has {count} targets')
    return names


def _site_names(path: Path, key: str, arrays: dict[str, NDArray[Any]]) -> _Sites:
    """Returns the sites' names and each row's site as a number into them."""
    site = arrays[key]
    if site.ndim != 1 or site.dtype.kind not in "biuUS":
        raise FedmetaError(
            f'{path}: array "{key}" has shape {site.shape} and type {site.dtype}: '
            "it must hold one integer or text per row"
        )
    given = _decoded(site)
    ids, owners = np.unique(np.char.strip(given) if given.dtype.kind == "U" else given, return_inverse=True)
    listed = _texts(path, arrays, f"{key}_names")
    if site.dtype.kind in "US":
        names = [str(name) for name in ids]
    elif listed is None:
        width = len(str(max(abs(int(ids[0])), abs(int(ids[-1]))))) if len(ids) else 1
        names = [f"site-{'-' if number < 0 else ''}{abs(int(number)):0{width}d}" for number in ids]
    else:
        outside = (ids < 0) | (ids >= len(listed))
        if outside.any():
            number = int(ids[np.argmax(outside)])
            row = int(np.argmax(site == number))
            raise FedmetaError(f'{path}: {key}[{row}] is {number}, but "{key}_names" has {len(listed)} names')
        names = [listed[number] for number in ids]
    for number, name in enumerate(names):
        if not name.strip():
            raise FedmetaError(f"{path}: {key}[{int(np.argmax(owners == number))}]: the site has an empty name")
    return _Sites(names, owners.reshape(-1).astype(np.int64))


def _texts(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> list[str] | None:
    """Returns an array of names (all different, but for features) as a list; None where the file has none."""
    if name not in arrays:
        return None
    texts = [clean_name(str(text)) for text in _decoded(arrays[name]).reshape(-1)]
    if name == "feature_names":
        return texts
    seen: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text in seen:
            raise FedmetaError(f'{path}: "{name}" has "{text}" twice, at {seen[text]} and {index}')
        seen[text] = index
    return texts


def _decoded(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array with bytes, as NumPy's type S holds them, decoded as UTF-8."""
    return np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array
