"""A site's model as ONNX, checked against torch before it is exported."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.onnx_columns import Cells, cells_of, take_columns
from fedmeta.errors import FedmetaError

FILE = "model.onnx"
NEEDED = ("onnx", "onnxruntime")
OPSET = 17
LARGEST_DIFFERENCE = 1e-5
"""How far the outputs of the two may be apart: absolutely, or above 1 (a target's deviation) relatively."""


def missing_packages() -> list[str]:
    """Returns which packages that ONNX needs are not there."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def export(model: SiteModel, x: Tensor, path: Path) -> float:
    """Writes a model as ONNX: output `probabilities`, or `prediction` for regression.

    The input is `x`, raw rows; where rows have categories an input for each column (see `onnx_columns`).

    Args:
        model: The model.
        x: Raw rows [n, *shape], on which the two are compared.
        path: Where to.

    Returns:
        The largest difference between the outputs on these rows.

    Raises:
        FedmetaError: The model cannot be exported, or the result is not the same.
    """
    output = "prediction" if model.form.regression else "probabilities"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The exporter by tracing: 0.2 s, where the newer one by torch.export takes several and more packages.
            torch.onnx.export(
                model,
                (x[: min(len(x), 2)],),
                str(path),
                dynamo=False,
                input_names=["x"],
                output_names=[output],
                dynamic_axes={"x": {0: "rows"}, output: {0: "rows"}},
                opset_version=OPSET,
            )
    except Exception as error:  # Whatever an exporter meets in a user's own model.
        raise FedmetaError(f"the model cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    _describe(path, model)
    given: NDArray[Any] | Cells = x.numpy()
    if model.form.categories:
        take_columns(path, model.form, model.experiment.data.missing)
        given = cells_of(model.form, x.numpy())
    difference = _difference(outputs_of(path, given), model(x).detach().numpy(), _unit(model))
    if not difference <= LARGEST_DIFFERENCE:
        path.unlink()
        raise FedmetaError(f"the model's ONNX form gives other outputs than torch, by {difference:.1e}: it is left out")
    return difference


def outputs_of(path: Path, given: NDArray[Any] | Cells) -> NDArray[Any]:
    """Returns what an ONNX model gives for raw rows, or for the cells of columns."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: NDArray[Any] = session.run(None, given if isinstance(given, dict) else {"x": given})[0]
    return outputs


def _describe(path: Path, model: SiteModel) -> None:
    """Writes the names of features and classes into the file, where its reader finds them."""
    import onnx

    form = model.form
    loaded = onnx.load(str(path))
    texts = {"features": form.features, "classes": form.classes}
    onnx.helper.set_model_props(loaded, {name: json.dumps(list(values)) for name, values in texts.items() if values})
    onnx.save(loaded, str(path))


def _unit(model: SiteModel) -> NDArray[Any]:
    """Returns above which size outputs differ relatively: 1 for probabilities, a target's standard deviation."""
    if not model.form.regression:
        return np.ones(1)
    return np.full(1, np.finfo(float).tiny) if model.log else model.target_scale.numpy()


def _difference(one: NDArray[Any], other: NDArray[Any], unit: NDArray[Any]) -> float:
    return float((np.abs(one - other) / np.maximum(unit, np.abs(other))).max(initial=0.0))
