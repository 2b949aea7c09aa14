"""Labels as they are in a file to what a model learns: codes into a list of classes, or numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.columns import name_of
from fedmeta.data.population import order_classes
from fedmeta.errors import FedmetaError, nearest

Place = Callable[[int], str]
"""Describes where the label of a row is: file, line or index, column."""


class Labels(NamedTuple):
    """Labels of rows.

    Attributes:
        y: int64 codes into `class_names`, or float64 targets [rows] or, of several, [rows, targets].
        class_names: The label of each code; empty for regression.
        target_names: What each target is called; empty for classes.
    """

    y: NDArray[Any]
    class_names: tuple[str, ...]
    target_names: tuple[str, ...] = ()


def encode_labels(
    values: NDArray[Any],
    place: Place,
    task: str = "auto",
    binarise: float | None = None,
    class_names: Sequence[str] | None = None,
    target: str = "auto",
    names: Sequence[str] = ("y",),
) -> Labels:
    """Returns labels as codes or targets.

    Args:
        values: The labels as read [rows]: integers, floating point or text; of several targets [rows, targets].
        place: Returns where a label is, for errors.
        task: "classification", "regression", or "auto": regression where `values` are floating point and no class names
            are given.
        binarise: Where given, labels above it are class "1", others class "0".
        class_names: Where given, the class that each integer label stands for, or all that text labels may be.
        target: How targets of a regression are standardized (`data.target`).
        names: What targets are called.

    Raises:
        FedmetaError: A label is missing, or is not what the task or the class names ask for.
    """
    if values.ndim > 1:
        if task == "classification" or binarise is not None or class_names is not None:
            raise FedmetaError(f"{place(0)} is {values.shape[1]} labels: rows of classes have one label each")
        columns = [_targets(values[:, column], place, target) for column in range(values.shape[1])]
        return Labels(np.stack(columns, 1), (), tuple(names))
    if values.dtype.kind == "U":
        values = _by_one_rule(values)
    class_names = None if class_names is None else tuple(name.strip() for name in class_names)
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    if values.dtype.kind == "f":
        _refuse(~np.isfinite(values), values, place, "every row needs a label")
    if binarise is not None:
        if task == "regression":
            raise FedmetaError("data.binarise makes two classes, but data.task is regression: leave one of them out")
        return Labels((_numbers(values, place, "data.binarise") > binarise).astype(np.int64), ("0", "1"))
    if task == "regression" or (task == "auto" and values.dtype.kind == "f" and class_names is None):
        return Labels(_targets(values, place, target), (), tuple(names))
    if target in ("standardise", "log"):
        raise FedmetaError(
            f'data.target = "{target}" is for labels that are numbers, and these are classes: set data.task = '
            '"regression", or leave data.target out'
        )
    if values.dtype.kind == "f":
        _refuse(values != np.round(values), values, place, "classes are whole numbers or text")
        values = values.astype(np.int64)
    if class_names is not None:
        return _named(values, place, tuple(class_names))
    distinct, codes = np.unique(values, return_inverse=True)
    found = [str(label) for label in distinct]
    names = order_classes(found)
    order = np.array([names.index(name) for name in found], dtype=np.int64)
    return Labels(order[codes.reshape(-1)], names)


def _by_one_rule(values: NDArray[Any]) -> NDArray[Any]:
    """Returns labels that are text as the names of their classes: stripped; 1.0 and 1 are one, 01 and 1 are two."""
    distinct, inverse = np.unique(values, return_inverse=True)
    found: NDArray[Any] = np.array([name_of(str(each)) for each in distinct])[inverse.reshape(-1)]
    return found


def _named(values: NDArray[Any], place: Place, names: tuple[str, ...]) -> Labels:
    """Returns labels that count or name the classes of a given list."""
    if values.dtype.kind in "iu":
        outside = (values < 0) | (values >= len(names))
        _refuse(outside, values, place, f"class_names has {len(names)} names, so labels are 0 to {len(names) - 1}")
        return Labels(values.astype(np.int64), names)
    known = {name: code for code, name in enumerate(names)}
    distinct, inverse = np.unique(values, return_inverse=True)
    codes = np.array([known.get(str(label), -1) for label in distinct], dtype=np.int64)[inverse.reshape(-1)]
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise FedmetaError(f'{place(row)} is "{values[row]}", not in class_names{nearest(str(values[row]), names)}')
    return Labels(codes, names)


def _targets(values: NDArray[Any], place: Place, target: str) -> NDArray[np.float64]:
    """Returns labels as targets; refuses what has no logarithm where that is to be learned."""
    numbers = _numbers(values, place, 'data.task = "regression"')
    if target == "log":
        _refuse(numbers <= 0, values, place, 'data.target = "log" needs numbers above 0')
    return numbers


def _numbers(values: NDArray[Any], place: Place, needed_by: str) -> NDArray[np.float64]:
    """Returns labels as numbers; text is read as numbers."""
    try:
        numbers = values.astype(np.float64)
    except ValueError:
        row = next(row for row, value in enumerate(values) if not _is_number(value))
        raise FedmetaError(f'{place(row)} is "{values[row]}", but {needed_by} needs numbers as labels') from None
    _refuse(~np.isfinite(numbers), values, place, "every row needs a label")
    return numbers


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _refuse(wrong: NDArray[np.bool_], values: NDArray[Any], place: Place, rule: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FedmetaError(f"{place(row)} is {values[row]}, but {rule}")
