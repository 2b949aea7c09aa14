"""An ONNX model of columns: cells of a table in, an input for each column, and categories encoded inside the file.

A column of numbers is an input of float64 [rows], NaN where one is missing. A category is an input of text [rows], or
of int64 where the run knows whole numbers alone as its names. A name that the run does not know is "other", 0 in all of
the category's features; a missing one is NaN in all of them, as `fedmeta.data.columns.Columns.encode` has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.adapt.initialization import Form
from fedmeta.errors import FedmetaError

Cells = dict[str, NDArray[Any]]
"""By column: float64, int64 or text [rows]."""

MISSING_NUMBER = -(2**63)
"""What stands for a missing cell in an input of whole numbers."""

MISSING_TEXT = ""
"""What stands for a missing cell in an input of text, beside the texts of `data.missing`."""

_OTHER_TEXT = "\x00"
"""A text that is no name of a category, for it cannot be printed."""

_OTHER_NUMBER = -(2**63) + 1


def is_whole(names: Collection[str]) -> bool:
    """Returns whether the names of a category are whole numbers alone, so that its input is int64."""
    return bool(names) and all(re.fullmatch(r"-?[1-9]\d{0,17}|0", name) for name in names)


def cells_of(form: Form, rows: NDArray[np.float64]) -> Cells:
    """Returns cells that give rows of features [rows, features]: the inverse of `Columns.encode`."""
    known, cells = dict(form.categories), Cells()
    places = {feature: place for place, feature in enumerate(form.features)}
    for column in form.columns.names:
        if column not in known:
            cells[column] = rows[:, places[column]].astype(np.float64)
            continue
        names = known[column]
        whole = is_whole(names)
        other, missing = (_OTHER_NUMBER, MISSING_NUMBER) if whole else (_OTHER_TEXT, MISSING_TEXT)
        values = np.array([*map(int, names), other] if whole else [*names, other], dtype=np.int64 if whole else object)
        own = rows[:, [places[f"{column}={name}"] for name in names]]
        found = values[np.where((own == 1).any(1), own.argmax(1) if names else 0, len(names))]
        found[np.isnan(own).any(1)] = missing
        cells[column] = found
    return cells


def take_columns(path: Path, form: Form, missing: Collection[str]) -> None:
    """Puts the encoding of columns before a model's input `x`, in place.

    Args:
        path: The ONNX model, whose input is rows of features [rows, features] in float64.
        form: What rows look like.
        missing: Texts that mean a missing value.

    Raises:
        FedmetaError: A column has the name of the model's output.
    """
    import onnx
    from onnx import TensorProto, compose, helper

    model = onnx.load(str(path))
    outputs = {output.name for output in model.graph.output}
    if both := sorted(outputs & set(form.columns.names)):
        raise FedmetaError(f'the column "{both[0]}" has the name of the model\'s output: rename it')
    # A column may be called as any tensor inside is.
    model = compose.add_prefix(model, "model/", rename_outputs=False)
    known, nodes, inputs, parts = dict(form.categories), [], [], []
    for number, column in enumerate(form.columns.names):
        if column not in known:
            inputs.append(helper.make_tensor_value_info(column, TensorProto.DOUBLE, ["rows"]))
            nodes.append(_node("Unsqueeze", [column, "columns/axis"], f"columns/{number}"))
        else:
            names = known[column]
            whole = is_whole(names)
            kind = TensorProto.INT64 if whole else TensorProto.STRING
            inputs.append(helper.make_tensor_value_info(column, kind, ["rows"]))
            if not names:
                continue
            nodes += _category(column, names, f"columns/{number}", missing, whole=whole)
        parts.append(f"columns/{number}")
    nodes.append(_node("Concat", parts, "model/x", axis=1))
    widest = max((len(names) for _, names in form.categories), default=0)
    constants: dict[str, NDArray[Any]] = {
        "columns/axis": np.array([1], dtype=np.int64),
        "columns/codes": np.arange(widest, dtype=np.float32)[None, :],
        "columns/nan": np.array(np.nan),
        "columns/start": np.array([0], dtype=np.int64),
    }
    constants |= {
        f"columns/{number}/count": np.array([len(known[column])], dtype=np.int64)
        for number, column in enumerate(form.columns.names)
        if known.get(column)
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    own = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *own])
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    helper.set_model_props(model, {"categories": json.dumps(dict(form.categories))})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _category(column: str, names: tuple[str, ...], out: str, missing: Collection[str], *, whole: bool) -> list[Any]:
    """Returns the nodes that make of a category's cells its features [rows, names], as `out`."""
    codes: dict[int | str, float] = {int(name) if whole else name: float(code) for code, name in enumerate(names)}
    absent: list[int | str] = [MISSING_NUMBER] if whole else [MISSING_TEXT, *missing]
    codes = {**dict.fromkeys(absent, float("nan")), **codes}
    keys = {"keys_int64s" if whole else "keys_strings": list(codes)}
    values = {"values_floats": list(codes.values()), "default_float": -1.0}
    return [
        _node("LabelEncoder", [column], f"{out}/code", domain="ai.onnx.ml", **keys, **values),
        _node("Unsqueeze", [f"{out}/code", "columns/axis"], f"{out}/column"),
        _node("Slice", ["columns/codes", "columns/start", f"{out}/count", "columns/axis"], f"{out}/codes"),
        _node("Equal", [f"{out}/column", f"{out}/codes"], f"{out}/equal"),
        _node("Cast", [f"{out}/equal"], f"{out}/one", to=11),  # TensorProto.DOUBLE
        _node("IsNaN", [f"{out}/column"], f"{out}/absent"),
        _node("Where", [f"{out}/absent", "columns/nan", f"{out}/one"], out),
    ]


def _node(kind: str, inputs: list[str], output: str, **settings: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **settings)
