"""A new site's rows, read from its own file and held against the form that the run's rows had."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmeta.adapt.initialization import Form, MetaModel
from fedmeta.data import class_codes, load_site
from fedmeta.data.population import Population
from fedmeta.errors import FedmetaError, nearest

NAMED = 5
"""How many columns or classes an error names."""


class SiteRows(NamedTuple):
    """A site's rows.

    Attributes:
        x: Raw features [n, *shape] in the order of the run's, NaN where one is missing.
        y: Codes into the run's classes [n], or targets in their own units [n] or, of several, [n, targets].
        classes: The classes that the codes stand for; a few-shot site's own.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.y)


def read_rows(start: MetaModel, path: str, classes: tuple[str, ...] | None = None) -> SiteRows:
    """Reads a site's file, of any form that a deployed node's may have.

    Args:
        start: What the run hands on.
        path: A `.csv`, `.parquet` or `.npz` file.
        classes: What the codes stand for, where other rows of the site fixed that; None = the run's classes, or those
            of a few-shot site's file.

    Raises:
        FedmetaError: The file cannot be read, or its columns, shape, labels or classes are not the run's; says which.
    """
    form, data = start.form, start.experiment.data
    task = "regression" if form.regression else "classification"
    # A file of one site has no tasks drawn from it, and integers may be numbers to be approached.
    population = load_site(data.model_copy(update={"task": task, "ways": None}), path)
    order = _column_order(path, population, form)
    rows = population.rows(population.all_sites).rows
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
        return SiteRows(x, torch.from_numpy(labels).to(torch.float64), ())
    known = classes or (_own_classes(path, population, form) if data.ways else form.classes)
    codes = class_codes(population.class_names, known)
    unknown = [population.class_names[code] for code in np.unique(labels) if codes[code] < 0]
    if unknown:
        raise FedmetaError(
            f"{path}: {_listed(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the run, whose "
            f"classes are {_listed(known, 20)}{nearest(unknown[0], known)}"
        )
    return SiteRows(x, torch.from_numpy(codes[labels]), known)


def _column_order(path: str, population: Population, form: Form) -> np.ndarray | None:
    """Returns where in the file each of the run's features is; None where rows are no vectors.

    Raises:
        FedmetaError: The file has other features.
    """
    if len(form.shape) != 1 or len(population.shape) != 1:
        if tuple(population.shape) != form.shape:
            raise FedmetaError(f"{path}: its rows have shape {tuple(population.shape)}, the run's {form.shape}")
        return None
    own, wanted = list(population.feature_names), list(form.features)
    if sorted(own) == sorted(wanted):
        # Of columns that share a name, the order among them is the file's.
        order = np.empty(len(wanted), dtype=np.int64)
        order[np.argsort(np.array(wanted), kind="stable")] = np.argsort(np.array(own), kind="stable")
        return order
    lacking = [name for name in wanted if name not in set(own)]
    foreign = [name for name in own if name not in set(wanted)]
    told = [f"lacks {_listed(lacking)}"] if lacking else []
    told += [f"has {_listed(foreign)} besides"] if foreign else []
    if not told:
        told = [f"has {len(own)} columns, of which some share a name; the run's rows have {len(wanted)}"]
    hint = nearest(lacking[0], foreign) if lacking else ""
    raise FedmetaError(f"{path} {' and '.join(told)}: it needs the columns that the run was trained on{hint}")


def _own_classes(path: str, population: Population, form: Form) -> tuple[str, ...]:
    """Returns a few-shot site's own classes, filled up to as many as the run's tasks had."""
    own, ways = population.class_names, len(form.classes)
    if len(own) > ways:
        raise FedmetaError(f"{path}: it has {len(own)} classes, but the run learned to tell {ways} apart")
    return (*own, *(f"(no class {number})" for number in range(len(own) + 1, ways + 1)))


def _listed(names: tuple[str, ...] | list[str], most: int = NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f'"{name}"' for name in names[:most]) + more
