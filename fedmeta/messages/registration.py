"""What a node sends when it joins: which sites it hosts, and the feature sums of those that train."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmeta.messages.records import (
    CATEGORY_KEYS,
    LARGEST,
    Categories,
    MessageError,
    only,
    read_arrays,
    read_categories,
    read_list,
    read_names,
    read_record,
    read_scalar,
    with_optional,
    write_arrays,
    write_categories,
    write_names,
)
from fedmeta.text import first_bad_name

Floats = NDArray[np.float64]

MOST_VALUES = 1 << 28
"""The most values that one row may have."""

LONGEST_FORM = 200
"""The longest digest of the form of an own source's tasks (characters)."""

SLACK = 1e-9
"""How far rounding may carry a sum of many values beyond what is possible (share of it)."""

PLURALS = {"site": "sites", "class": "classes", "feature": "features", "target": "targets", "category": "categories"}

SUMS = ("count", "total", "square", "target_count", "target_total", "target_square")


def _nothing() -> Floats:
    return np.zeros(0)


SCHEMA = ("classes", "features", "shape", "regression", "targets", "tokens", "form", "held_out")


@dataclass(frozen=True)
class SitesReply:
    """Which sites a node hosts.

    Attributes:
        names: The sites' names.
        train_rows: Train rows per site.
        test_rows: Test rows per site.
        classes: The labels that occur at them, as text; empty for regression.
        features: Feature names, where rows have them.
        shape: The shape of one row.
        regression: Whether labels are numbers.
        tokens: Whether features are integer codes that must not be scaled.
        weights: What each site weighs in the mean with server.weighting = "examples"; fixed here for the run.
        form: A digest of the form of a task of an own source, which must be equal at all sites; empty for rows.
        held_out: Whether support and query are different data at these sites.
        targets: What each target of a regression is called; empty for classes and for data that are no rows.
        categorical: Which features are columns of categories there; their names are asked for later.
    """

    names: tuple[str, ...]
    train_rows: tuple[int, ...]
    test_rows: tuple[int, ...]
    classes: tuple[str, ...]
    features: tuple[str, ...]
    shape: tuple[int, ...]
    regression: bool
    tokens: bool
    weights: tuple[float, ...] = ()
    form: str = ""
    held_out: bool = True
    targets: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        schema: dict[str, Any] = {
            "classes": list(self.classes),
            "features": list(self.features),
            "shape": list(self.shape),
            "regression": self.regression,
            "tokens": self.tokens,
            "form": self.form,
            "held_out": self.held_out,
            "targets": list(self.targets),
        }
        if self.categorical:
            schema["categorical"] = list(self.categorical)
        sizes: dict[str, Any] = {
            "train_rows": list(self.train_rows),
            "test_rows": list(self.test_rows),
            "weights": list(self.weights or map(float, self.train_rows)),
        }
        return RecordDict(
            {"sites": write_names(self.names), "schema": ConfigRecord(schema), "sizes": MetricRecord(sizes)},
        )

    @classmethod
    def unpack(cls, content: RecordDict) -> SitesReply:
        """Reads a reply; raises `MessageError` where it is not one.

        Names of sites, classes and features must be names (`fedmeta.text.name_problem`). With `tokens` a class of one
        character stands for that character, whichever it is.
        """
        only(content, "sites", "schema", "sizes")
        names = read_names(content)
        sizes = read_record(content, "sizes", MetricRecord, "train_rows", "test_rows", "weights")
        schema = read_record(
            content, "schema", ConfigRecord, *with_optional(content, "schema", SCHEMA, ("categorical",))
        )
        rows = {key: tuple(read_list(sizes, key, int, len(names))) for key in ("train_rows", "test_rows")}
        if min((*rows["train_rows"], *rows["test_rows"]), default=0) < 0:
            raise MessageError("a number of rows is negative")
        weights = tuple(read_list(sizes, "weights", float, len(names)))
        if not all(0 <= weight < float("inf") for weight in weights):
            raise MessageError("a weight is not a finite number of at least 0")
        if sum(rows["train_rows"]) + sum(rows["test_rows"]) > LARGEST or sum(weights) == float("inf"):
            raise MessageError("its rows or weights add up to more than there can be")
        shape = tuple(read_list(schema, "shape", int))
        if min(shape, default=1) < 1 or prod(shape) > MOST_VALUES:
            raise MessageError(f"the shape of a row is not positive, or has more than {MOST_VALUES} values")
        classes, features = (tuple(read_list(schema, key, str)) for key in ("classes", "features"))
        targets = tuple(read_list(schema, "targets", str))
        tokens, form = read_scalar(schema, "tokens", bool), read_scalar(schema, "form", str)
        regression = read_scalar(schema, "regression", bool)
        if regression is bool(classes) and (regression or any((*rows["train_rows"], *rows["test_rows"]))):
            raise MessageError("its labels are numbers and it has classes, or they are classes and it has none")
        symbols = {name for name in classes if tokens and len(name) == 1}
        for what, texts in {"site": names, "class": classes, "feature": features, "target": targets}.items():
            # The rows of some real files (UCI HAR) have names twice: such features are known by their place.
            if what != "feature" and len(set(texts)) < len(texts):
                raise MessageError(f"two {PLURALS[what]} have the same name")
            if bad := first_bad_name(text for text in texts if text not in symbols):
                raise MessageError(f"the {what} {bad}")
        categorical = tuple(read_list(schema, "categorical", str)) if "categorical" in schema else ()
        if len(set(categorical)) < len(categorical) or not set(categorical) <= set(features):
            raise MessageError("its columns of categories are not among its features")
        if features and shape != (len(features),):
            raise MessageError("its rows have another length than its list of features")
        if len(form) > LONGEST_FORM or not (form.isascii() and form.isprintable()):
            raise MessageError("the form of its tasks is no digest")
        return cls(
            names=names,
            train_rows=rows["train_rows"],
            test_rows=rows["test_rows"],
            classes=classes,
            features=features,
            shape=shape,
            regression=regression,
            tokens=tokens,
            weights=weights,
            form=form,
            held_out=read_scalar(schema, "held_out", bool),
            targets=targets,
            categorical=categorical,
        )


@dataclass(frozen=True)
class CategoriesRequest:
    """Asks a node for the names that occur in columns of categories at some of its sites, which are training sites.

    Attributes:
        names: The sites.
        columns: The columns.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        columns = ConfigRecord({"columns": list(self.columns)})
        return RecordDict({"sites": write_names(self.names), "categories": columns})

    @classmethod
    def unpack(cls, content: RecordDict) -> CategoriesRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites", "categories")
        own = read_record(content, "categories", ConfigRecord, "columns")
        return cls(read_names(content), tuple(read_list(own, "columns", str)))


@dataclass(frozen=True)
class CategoriesReply:
    """The names in columns of categories that enough train rows of a site have; others are "other" and stay there.

    Attributes:
        categories: By column the names, of all sites asked together; no counts.
    """

    categories: Categories

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        return RecordDict({"categories": ConfigRecord(write_categories(self.categories))})

    @classmethod
    def unpack(cls, content: RecordDict) -> CategoriesReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "categories")
        own = read_record(content, "categories", ConfigRecord, *CATEGORY_KEYS)
        found = read_categories(own)
        for _, names in found:
            if bad := first_bad_name(names):
                raise MessageError(f"the category {bad}")
        return cls(found)


@dataclass(frozen=True)
class SumsRequest:
    """Asks a node for the feature sums of some of its sites, which are training sites.

    Attributes:
        names: The sites.
        per_site: Whether each site's own sums are wanted in place of their sum.
        categories: The columns of categories, and the names that the run knows of each.
    """

    names: tuple[str, ...]
    per_site: bool = False
    categories: Categories = ()

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        own = ConfigRecord({"per_site": self.per_site, **write_categories(self.categories)})
        return RecordDict({"sites": write_names(self.names), "sums": own})

    @classmethod
    def unpack(cls, content: RecordDict) -> SumsRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites", "sums")
        keys = with_optional(content, "sums", ("per_site",), CATEGORY_KEYS)
        own = read_record(content, "sums", ConfigRecord, *keys)
        return cls(read_names(content), read_scalar(own, "per_site", bool), read_categories(own))


@dataclass(frozen=True)
class SumsReply:
    """Sums over the train rows of the sites asked for, missing values left out; float64.

    Attributes:
        count: How many values of each feature were observed.
        total: Their sum.
        square: The sum of their squares.
        target_count: The same of each target of a regression [targets], or of its logarithm; empty for classes.
        target_total: Their sum.
        target_square: The sum of their squares.

    Where the request asked so (`per_site`), each array has a leading axis [sites, ...], with each site's own.
    """

    count: Floats
    total: Floats
    square: Floats
    target_count: Floats = field(default_factory=_nothing)
    target_total: Floats = field(default_factory=_nothing)
    target_square: Floats = field(default_factory=_nothing)

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        sums = {name: getattr(self, name) for name in SUMS}
        return RecordDict({"sums": write_arrays({name: torch.from_numpy(value) for name, value in sums.items()})})

    @classmethod
    def unpack(cls, content: RecordDict) -> SumsReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sums")
        sums = {name: value.numpy() for name, value in read_arrays(content, "sums").items()}
        only(sums, *SUMS)
        for prefix in ("", "target_"):
            count, total, square = (sums[f"{prefix}{name}"] for name in ("count", "total", "square"))
            _check_possible(count, total, square)
        return cls(**sums)


def _check_possible(count: Floats, total: Floats, square: Floats) -> None:
    """Checks that there can be finite float32 values with these sums; raises `MessageError` otherwise.

    Of n values the sum is at most n times the largest number, and the sum of squares lies between total^2 / n (Cauchy
    and Schwarz) and n times its square.
    """
    every = (count, total, square)
    if len({value.shape for value in every}) != 1:
        raise MessageError("the sums are not of one shape")
    if not all(value.dtype == np.float64 and np.isfinite(value).all() for value in every):
        raise MessageError("the sums are not finite float64 numbers")
    if (count < 0).any() or (square < 0).any():
        raise MessageError("a count or a sum of squares is negative")
    largest = float(np.finfo(np.float32).max)
    # The slack is for the rounding of sums of many values.
    if (np.abs(total) > count * largest * (1 + SLACK)).any() or (square > count * largest**2 * (1 + SLACK)).any():
        raise MessageError("a sum is of larger numbers than sites may have")
    if (square * (1 + SLACK) + np.finfo(np.float64).tiny < total**2 / np.maximum(count, 1.0)).any():
        raise MessageError("a sum of squares is smaller than the sum allows")
    if (count != np.floor(count)).any():
        raise MessageError("a count is not a whole number")
