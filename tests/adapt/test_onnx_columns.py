"""An ONNX file of columns: names and whole numbers in, equal to Python's rows of features."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedmeta.adapt import export
from fedmeta.adapt.initialization import Form, MetaModel
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.onnx_columns import MISSING_NUMBER, cells_of
from fedmeta.adapt.rows import raw_rows
from fedmeta.build import learner_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment

pytest.importorskip("onnxruntime")

CATEGORIES = (("mean", ("F", "M")), ("ward", ("1", "2", "30")), ("grade", ("01", "2")), ("empty", ()))
FEATURES = ("ward=1", "ward=2", "ward=30", "age", "mean=F", "mean=M", "grade=01", "grade=2")


def model(features: tuple[str, ...] = FEATURES) -> SiteModel:
    settings = ["data.source=tables", "data.path=rows", "model.name=mlp", "model.hidden=4", "data.missing=['', '?']"]
    experiment = Experiment().with_overrides(settings)
    form = Form((len(features),), features, ("ill", "well"), False, False, (), CATEGORIES)
    learner = learner_of(experiment, form.shape, form.classes, form.outputs)
    mean, scale = torch.full(form.shape, 0.3).double(), torch.full(form.shape, 0.7).double()
    start = MetaModel(experiment, "run", 3, dict(learner.init(0)), mean, scale, form, 3, 1.0)
    return SiteModel.of(start, learner.theta(start.state))


def test_columns_of_text_and_whole_numbers_give_what_python_gives(tmp_path: Path) -> None:
    """A column may be called as a tensor of the model, a name be unknown or missing, a number be a category."""
    own = model()
    frame = pd.DataFrame(
        {
            "age": [1.0, np.nan, -2.0, 0.5, 0.1],
            "mean": ["F", "M", "X", None, "F"],
            "ward": [30, 1, None, 7, 2],
            "grade": ["01", "2", "1", "01", None],
            "empty": ["a", "b", None, "c", "d"],
        }
    )
    rows = torch.from_numpy(raw_rows(frame, own.form)[0])
    assert export.export(own, rows, tmp_path / "model.onnx") <= 1e-5
    cells = {
        "age": frame["age"].to_numpy(),
        "mean": frame["mean"].fillna("?").to_numpy(str),
        "ward": frame["ward"].fillna(MISSING_NUMBER).astype(np.int64).to_numpy(),
        "grade": frame["grade"].fillna("").to_numpy(str),
        "empty": frame["empty"].fillna("").to_numpy(str),
    }
    found = export.outputs_of(tmp_path / "model.onnx", cells)
    expected = own(rows).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(np.unique(expected.round(6), axis=0)) == len(frame), "rows that all give the same would test nothing"


def test_cells_are_the_inverse_of_features() -> None:
    form = model().form
    frame = pd.DataFrame({"age": [1.0, 2.0], "mean": ["M", None], "ward": [2, 9], "grade": ["2", "x"], "empty": "a"})
    rows, _ = raw_rows(frame, form)
    again, _ = raw_rows(pd.DataFrame(cells_of(form, rows)).replace({"": None, MISSING_NUMBER: None}), form)
    np.testing.assert_array_equal(rows, again)


def test_a_column_called_as_the_output_is_refused(tmp_path: Path) -> None:
    own = model(tuple("probabilities" if name == "age" else name for name in FEATURES))
    with pytest.raises(FedmetaError, match='"probabilities" has the name of the model'):
        export.export(own, torch.zeros(2, len(FEATURES)).double(), tmp_path / "model.onnx")
