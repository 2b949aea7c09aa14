"""Which rows lie far from what a model has seen: by the mean and deviation of each feature over the training sites.

A model has no way to be right about a row that is unlike all it was fitted to, and shows no sign of it: it is often
surest there. The rule needs nothing but what travels with the start, so that no site's row is kept for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmeta.adapt.model import SiteModel

FAR = 5.0
"""A value is far from this many standard deviations of the training sites on; normal values are so 6 times in 10^7."""

FAR_ROW = 3.0
"""A row is far where the root mean square of its standardized values, 1 on average, is above this."""

MOST_MISSING = 0.5
"""A row of which a larger share of columns is missing is named (share)."""

NAMED = 3
"""How many columns the warning of a row names."""


def far_rows(model: SiteModel, x: NDArray[np.generic]) -> list[str]:
    """Returns a warning for each row [n]: why it lies far from what the model has seen, "" where it does not.

    Args:
        model: The model.
        x: Raw rows [n, *shape], NaN where a value is missing.
    """
    form = model.form
    if form.tokens or not len(x):
        return [""] * len(x)
    mean, scale = model.mean.double().numpy(), model.scale.double().numpy()
    z = ((np.asarray(x, dtype=np.float64) - mean) / scale).reshape(len(x), -1)
    present = ~np.isnan(z)
    if not form.named:
        return _whole(np.nan_to_num(z), present)
    column = {f"{name}={each}": name for name, names in form.categories for each in names}
    number = np.array([feature not in column for feature in form.features], dtype=bool)
    found: list[list[str]] = [[] for _ in x]
    far = number & present & (np.abs(np.nan_to_num(z)) > FAR)
    for row in np.flatnonzero(far.any(axis=1)).tolist():
        places = sorted(np.flatnonzero(far[row]).tolist(), key=lambda place: -abs(z[row, place]))
        found[row] += [
            f"{form.features[place]} is {float(x[row, place]):.6g}, {abs(z[row, place]):.1f} standard deviations "
            "from the training sites' mean"
            for place in places[:NAMED]
        ]
        if len(places) > NAMED:
            found[row].append(f"{len(places) - NAMED} more columns are as far")
    for row, text in enumerate(_whole(np.nan_to_num(z[:, number]), present[:, number])):
        if text and not found[row]:
            found[row].append(text)
    for name, names in form.categories:
        own = [form.features.index(f"{name}={each}") for each in names]
        other = (
            present[:, own].all(axis=1) & (np.asarray(x)[:, own] == 0).all(axis=1) if own else np.zeros(len(x), bool)
        )
        for row in np.flatnonzero(other).tolist():
            found[row].append(f"{name} is a category that the run does not know")
    absent = np.stack([_absent(present, form.features, name, dict(form.categories)) for name in form.columns.names], 1)
    for row in np.flatnonzero(absent.mean(axis=1) > MOST_MISSING).tolist():
        found[row].append(f"{int(absent[row].sum())} of {absent.shape[1]} columns are missing")
    return ["; ".join(texts) for texts in found]


def _whole(z: NDArray[np.float64], present: NDArray[np.bool_]) -> list[str]:
    """Returns a warning for each row whose standardized values [n, values] are large on the whole."""
    size = np.sqrt((z**2).sum(axis=1) / np.maximum(present.sum(axis=1), 1))
    return [
        f"its values are {own:.1f} standard deviations from the training sites' on average" if own > FAR_ROW else ""
        for own in size.tolist()
    ]


def _absent(
    present: NDArray[np.bool_], features: tuple[str, ...], name: str, categories: dict[str, tuple[str, ...]]
) -> NDArray[np.bool_]:
    """Returns in which rows a column is missing."""
    own = [f"{name}={each}" for each in categories[name]] if name in categories else [name]
    places = [features.index(feature) for feature in own]
    found: NDArray[np.bool_] = np.logical_not(present[:, places].all(axis=1))
    return found
