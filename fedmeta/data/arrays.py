"""From arrays with each row's features, label and site to a population; with checks on the features."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.labels import Labels
from fedmeta.data.population import ArrayPopulation, chunks
from fedmeta.data.ragged import IntArray, group_rows
from fedmeta.errors import FedmetaError

CellPlace = Callable[[int, int], str]
"""Describes where a cell is, given its row and its feature (counted through a row's array in C order)."""


class FeatureFacts(NamedTuple):
    """What a pass over the features found.

    Attributes:
        missing: Whether any is NaN.
        observed: Which features are not NaN in every row [features].
    """

    missing: bool
    observed: NDArray[np.bool_]


def build_population(
    origin: str,
    x: NDArray[Any],
    labels: Labels,
    owners: IntArray,
    names: list[str],
    place: CellPlace,
    order: NDArray[Any] | None = None,
    feature_names: tuple[str, ...] = (),
    min_rows: int = 0,
) -> ArrayPopulation:
    """Returns the population of some rows.

    Args:
        origin: The file or folder, for errors.
        x: Features [rows, *shape].
        labels: Labels of the rows.
        owners: The site of each row [rows], as a number into `names`.
        names: The sites' names, all different, in any order.
        place: Returns where a cell is, for errors.
        order: What a site's rows are ordered by [rows]; None = as they come.
        feature_names: The features' names where a row is a vector.
        min_rows: Sites with fewer rows are left out.

    Raises:
        FedmetaError: There are no rows, a feature is infinite, a feature is missing in every row of several sites,
            or no site has enough rows.
    """
    if not len(x):
        raise FedmetaError(f"{origin}: there are no rows")
    x = plain(x)
    facts = check_features(x, place)
    if len(names) > 1 and not facts.observed.all():
        column = int(np.argmin(facts.observed))
        name = f'column "{feature_names[column]}"' if feature_names else f"pixel {column}"
        raise FedmetaError(f"{origin}: {name} is missing (NaN) in every row of every site: leave it out")
    by_name = np.argsort(np.array(names, dtype=object), kind="stable")
    number = np.empty(len(names), dtype=np.int64)
    number[by_name] = np.arange(len(names))
    sites = group_rows(number[owners], len(names), order)
    enough = np.flatnonzero(sites.sizes >= max(1, min_rows))
    if not len(enough):
        raise FedmetaError(
            f"{origin}: no site has data.min_rows = {min_rows} rows; the largest has {sites.sizes.max()}"
        )
    return ArrayPopulation(
        x=x,
        y=labels.y,
        names=tuple(names[by_name[site]] for site in enough),
        sites=sites if len(enough) == len(names) else sites.take(enough),
        class_names=labels.class_names,
        feature_names=feature_names,
        missing=facts.missing,
        target_names=labels.target_names,
    )


def feature_order(names: Sequence[str], listed: Sequence[str] = ()) -> list[int]:
    """Returns the places of features in the order that all sites share: as `data.columns` lists them, others by name.

    The files of two sites may have the same columns in different orders, and neither site sees the other's file.
    """
    places = {name: place for place, name in enumerate(listed)}
    return sorted(range(len(names)), key=lambda place: (places.get(names[place], len(places)), names[place]))


def plain(x: NDArray[Any]) -> NDArray[Any]:
    """Returns features in a type and layout that torch can index: the array itself wherever it already is."""
    if x.ndim == 1:
        x = x.reshape(-1, 1)
    if x.dtype == np.bool_:
        x = x.view(np.uint8)
    own = np.dtype(np.float64) if x.dtype.kind == "f" and x.dtype.itemsize > 8 else x.dtype.newbyteorder("=")
    return np.require(x, dtype=own, requirements=["C", "W"])


def check_features(x: NDArray[Any], place: CellPlace) -> FeatureFacts:
    """Returns which features are ever missing, in one pass; raises `FedmetaError` where one is beyond float32."""
    width = int(np.prod(x.shape[1:]))
    observed = np.ones(width, dtype=np.bool_)
    if x.dtype.kind != "f":
        return FeatureFacts(False, observed)
    missing, start = False, 0
    largest = x.dtype.type(min(np.finfo(x.dtype).max, np.finfo(np.float32).max))
    observed[:] = False
    for chunk in chunks(x):
        flat = chunk.reshape(len(chunk), width)
        ordinary = np.abs(flat) <= largest
        if ordinary.all():
            observed[:] = True
        else:
            absent = np.isnan(flat)
            infinite = ~(ordinary | absent)
            if infinite.any():
                row, column = (int(index) for index in np.argwhere(infinite)[0])
                raise FedmetaError(
                    f"{place(start + row, column)} is {flat[row, column]}, beyond what float32 holds: "
                    "correct it, or leave it missing (NaN)"
                )
            missing = missing or bool(absent.any())
            observed |= ~absent.all(axis=0)
        start += len(chunk)
    return FeatureFacts(missing, observed)
