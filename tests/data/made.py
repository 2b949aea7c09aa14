"""Small populations and files that the tests of data share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.data import ArrayPopulation
from fedmeta.data.arrays import build_population
from fedmeta.data.labels import Labels


def population(
    sizes: Sequence[int], labels: Sequence[int] | None = None, names: Sequence[str] | None = None, classes: int = 3
) -> ArrayPopulation:
    """Sites of the given sizes whose rows lie shuffled in the array; feature 0 is the row's place at its site."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    places = np.concatenate([np.arange(size) for size in sizes])
    y = (places * 7 + owners) % classes if labels is None else np.array(labels)
    x = np.stack([places, owners], axis=1).astype(np.float32)
    shuffled = np.random.default_rng(len(owners)).permutation(len(owners))
    return build_population(
        "made",
        x[shuffled],
        Labels(y[shuffled].astype(np.int64), tuple(str(label) for label in range(classes))),
        owners[shuffled],
        list(names or [f"site-{site:03d}" for site in range(len(sizes))]),
        lambda row, column: f"made: row {row}, column {column}",
        order=places[shuffled],
    )


def arrays(**changes: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a good npz file of three sites with 4, 3 and 5 rows, some of them changed; None leaves one out."""
    good: dict[str, Any] = {
        "x": np.arange(36, dtype=np.float32).reshape(12, 3),
        "y": np.array([0, 1, 0, 1, 1, 0, 2, 0, 1, 2, 0, 1]),
        "site": np.array([5, 5, 5, 5, 9, 9, 9, 12, 12, 12, 12, 12]),
    }
    return {name: np.asarray(value) for name, value in (good | changes).items() if value is not None}


def npz(folder: Path, **changes: Any) -> str:
    """Writes such a file and returns its path."""
    path = folder / "sites.npz"
    np.savez(path, **arrays(**changes))
    return str(path)
