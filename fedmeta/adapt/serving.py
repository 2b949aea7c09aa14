"""What MLflow loads: a run's meta-learned model, which a labelled support in `params` makes a site's own, or a site's.

Named as `loader_module` in the model's `MLmodel`; nothing is unpickled, and MLflow itself is not imported.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedmeta.adapt.estimate import choose
from fedmeta.adapt.initialization import FILE as START_FILE
from fedmeta.adapt.initialization import Form, MetaModel
from fedmeta.adapt.model import FILE as MODEL_FILE
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.rows import raw_rows
from fedmeta.data import class_codes
from fedmeta.errors import FedmetaError
from fedmeta.trust import BY_VARIABLE, code_allowed_here

CHOOSE = -1
"""The value of the parameter `steps` that leaves the number of inner steps to cross-validation."""


def _load_pyfunc(path: str) -> StartServer | ModelServer:
    """Returns the model in a folder or file, as MLflow's pyfunc flavour wants it.

    Code that the model names beyond fedmeta's must be allowed by the environment variable FEDMETA_CODE.
    """
    place, code = Path(path), code_allowed_here()
    folder = place if place.is_dir() else place.parent
    if (folder / START_FILE).is_file():
        return StartServer(MetaModel.read(folder / START_FILE, code, remedy=BY_VARIABLE))
    return ModelServer(SiteModel.read(folder / MODEL_FILE, code, remedy=BY_VARIABLE))


class ModelServer:
    """A site's own model."""

    def __init__(self, model: SiteModel) -> None:
        self.model = model

    def get_raw_model(self) -> SiteModel:
        """Returns the model itself, for `mlflow.pyfunc.load_model(...).get_raw_model().predict_proba(rows)`."""
        return self.model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Returns class names or numbers [n] for raw rows; with the parameter `probabilities` a frame of these."""
        return _predicted(self.model, _noted(model_input, self.model.form), params)


class StartServer:
    """A run's meta-learned model.

    Without a support it predicts as the global model. With one it adapts first, for this call alone.
    """

    def __init__(self, start: MetaModel) -> None:
        self.start = start
        self.model = SiteModel.of(start, start.learner.theta(start.state))

    def get_raw_model(self) -> SiteModel:
        """Returns the global model."""
        return self.model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Returns class names or numbers [n] for raw rows.

        Args:
            model_input: A frame with the run's columns, in any order, or an array [n, *shape].
            params: `support_x`, the JSON of a list of labelled rows, each a list of values or an object by column,
                null where one is missing; `support_y`, the JSON of their labels; `steps`, inner steps, -1 to have them
                chosen by cross-validation; `probabilities`, true for a frame of the classes' probabilities.

        Raises:
            FedmetaError: The input or the support is not of the run's form.
        """
        own = params or {}
        x = _noted(model_input, self.start.form)
        if not own.get("support_x") and not own.get("support_y"):
            return _predicted(self.model, x, own)
        support_x, support_y = self._support(str(own.get("support_x", "")), str(own.get("support_y", "")))
        steps = int(own.get("steps", CHOOSE))
        if steps < 0:
            steps = choose(self.start, support_x, support_y)
        parameters = self.start.learner.adapt(self.start.state, (support_x, support_y), steps)
        return _predicted(SiteModel.of(self.start, parameters), x, own)

    def _support(self, x: str, y: str) -> tuple[torch.Tensor, torch.Tensor]:
        form = self.start.form
        rows, labels = _listed("support_x", x), _listed("support_y", y)
        if len(rows) != len(labels):
            raise FedmetaError(f"support_x has {len(rows)} rows, support_y {len(labels)} labels: give each row one")
        named = all(isinstance(row, dict) for row in rows)
        raw = _noted(pd.DataFrame(rows) if named else _array(rows), form)
        prepared = self.model.prepare(torch.from_numpy(raw).to(form.dtype))
        if form.regression:
            return prepared, self.start.target.standardize(_targets(labels, form)).to(prepared.dtype)
        codes = class_codes([str(label) for label in labels], form.classes)
        if (codes < 0).any():
            wrong = labels[int(np.argmax(codes < 0))]
            raise FedmetaError(f'support_y: "{wrong}" is no class of the run; they are {", ".join(form.classes)}')
        return prepared, torch.from_numpy(codes)


def _predicted(model: SiteModel, x: NDArray[Any], params: Mapping[str, Any] | None) -> Any:
    """Returns predictions for raw rows: class names or numbers, or with `probabilities` a frame with a class each."""
    if not (params or {}).get("probabilities"):
        return model.predict(x)
    return pd.DataFrame(model.predict_proba(x), columns=list(model.form.classes))


def _array(rows: list[Any]) -> NDArray[Any]:
    """Returns rows of numbers as an array; raises `FedmetaError` where they are not of one shape."""
    try:
        return np.array(rows, dtype=float)
    except (TypeError, ValueError):
        raise FedmetaError("support_x: each row must be a list of as many numbers, null where one is missing") from None


def _targets(labels: list[Any], form: Form) -> torch.Tensor:
    """Returns targets [n] or [n, targets] in float64; raises `FedmetaError` where they are not what the run's are."""
    try:
        y = torch.tensor(labels, dtype=torch.float64)
    except (TypeError, ValueError):
        y = torch.full((1,), torch.nan)
    wanted = (len(labels),) if form.outputs == 1 else (len(labels), form.outputs)
    if y.shape != wanted or not y.isfinite().all():
        what = "a finite number" if form.outputs == 1 else f"a list of {form.outputs} finite numbers"
        raise FedmetaError(f"support_y: each entry must be {what}")
    return y


def _noted(model_input: Any, form: Form) -> NDArray[Any]:
    """Returns raw rows (`rows.raw_rows`), with a warning of what was left out."""
    rows, notes = raw_rows(model_input, form)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return rows


def _listed(name: str, text: str) -> list[Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FedmetaError(f"{name} is no JSON ({error}): give a list") from None
    if not isinstance(values, list) or not values:
        raise FedmetaError(f"{name} must be a list of at least one entry")
    return values
