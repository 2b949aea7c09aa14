"""What a node says when it joins: which sites it hosts, and the feature sums of those that train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmeta.messages.records import (
    MessageError,
    only,
    read_arrays,
    read_list,
    read_names,
    read_record,
    read_scalar,
    write_arrays,
    write_names,
)

Floats = NDArray[np.float64]

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
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sites", "schema", "sizes")
        names = read_names(content)
        sizes = read_record(content, "sizes", MetricRecord, "train_rows", "test_rows", "weights")
        schema = read_record(content, "schema", ConfigRecord, *SCHEMA)
        rows = {key: tuple(read_list(sizes, key, int, len(names))) for key in ("train_rows", "test_rows")}
        if min((*rows["train_rows"], *rows["test_rows"]), default=0) < 0:
            raise MessageError("a number of rows is negative")
        weights = tuple(read_list(sizes, "weights", float, len(names)))
        if not all(0 <= weight < float("inf") for weight in weights):
            raise MessageError("a weight is not a finite number of at least 0")
        if len(set(names)) < len(names):
            raise MessageError("two sites have the same name")
        shape = tuple(read_list(schema, "shape", int))
        if min(shape, default=1) < 1:
            raise MessageError("the shape of a row is not positive")
        return cls(
            names=names,
            train_rows=rows["train_rows"],
            test_rows=rows["test_rows"],
            classes=tuple(read_list(schema, "classes", str)),
            features=tuple(read_list(schema, "features", str)),
            shape=shape,
            regression=read_scalar(schema, "regression", bool),
            tokens=read_scalar(schema, "tokens", bool),
            weights=weights,
            form=read_scalar(schema, "form", str),
            held_out=read_scalar(schema, "held_out", bool),
            targets=tuple(read_list(schema, "targets", str)),
        )


@dataclass(frozen=True)
class SumsRequest:
    """Asks a node for the feature sums of some of its sites, which are training sites."""

    names: tuple[str, ...]

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        return RecordDict({"sites": write_names(self.names)})

    @classmethod
    def unpack(cls, content: RecordDict) -> SumsRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites")
        return cls(read_names(content))


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
            _check_sums(count, total, square)
        if sums["target_count"].ndim != 1:
            raise MessageError("the sums of targets are not a list")
        return cls(**sums)


def _check_sums(count: Floats, total: Floats, square: Floats) -> None:
    """Checks that sums can be those of numbers; raises `MessageError` otherwise."""
    every = (count, total, square)
    if len({value.shape for value in every}) != 1:
        raise MessageError("the sums are not of one shape")
    if not all(value.dtype == np.float64 and np.isfinite(value).all() for value in every):
        raise MessageError("the sums are not finite float64 numbers")
    if (count < 0).any() or (square < 0).any():
        raise MessageError("a count or a sum of squares is negative")
    if (np.abs(total) > np.maximum(count, 1.0) * np.finfo(np.float32).max).any():
        raise MessageError("a sum is of larger numbers than sites may have")
