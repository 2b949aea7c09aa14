"""`fedmeta predict`: a file's rows through a model in a folder, by the names of columns."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from fedmeta.adapt import conformal, export
from fedmeta.adapt.conformal import make_sets
from fedmeta.adapt.initialization import Form, MetaModel
from fedmeta.adapt.model import FILE, SiteModel
from fedmeta.adapt.rows import raw_rows
from fedmeta.build import learner_of
from fedmeta.cli.main import app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment

pytestmark = pytest.mark.quick("classes")

FEATURES = ("age", "smoker", "ward=A", "ward=B", "dose")
CLASSES = ("ill", "well")


def start(regression: bool = False) -> MetaModel:
    """What a run of mixed columns leaves, with parameters drawn at random."""
    experiment = Experiment().with_overrides(
        ["data.source=tables", "data.path=rows", "model.name=mlp", "model.hidden=4"]
    )
    targets = ("days",) if regression else ()
    form = Form((5,), FEATURES, () if regression else CLASSES, regression, False, targets, (("ward", ("A", "B")),))
    learner = learner_of(experiment, form.shape, form.classes, form.outputs)
    mean, scale = torch.tensor([50.0, 0.5, 0.3, 0.3, 0.2]).double(), torch.tensor([10.0, 0.5, 0.5, 0.5, 0.05]).double()
    return MetaModel(experiment, "run", 3, dict(learner.init(0)), mean, scale, form, 3, 1.0)


def frame(rows: int = 9) -> pd.DataFrame:
    draw = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "age": draw.integers(40, 60, rows),
            "smoker": draw.random(rows) < 0.5,
            "ward": draw.choice(["A", "B"], rows),
            "dose": draw.normal(0.2, 0.05, rows).round(4),
        }
    )


@pytest.fixture(scope="module", params=[False, True], ids=["classes", "numbers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a site's model."""
    own = start(request.param)
    out = tmp_path_factory.mktemp("model")
    SiteModel.of(own, own.learner.theta(own.state)).write(out / FILE, own, {})
    return out


def call(*arguments: Any, given: bytes = b"") -> tuple[pd.DataFrame, str]:
    found = CliRunner().invoke(app, ["predict", *map(str, arguments)], input=given)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    table = pd.read_csv(io.StringIO(found.stdout), keep_default_na=False) if found.stdout else pd.DataFrame()
    return table, found.stderr


def figures(table: pd.DataFrame) -> np.ndarray:
    columns = [name for name in table if name.startswith("probability_")] or ["prediction"]
    return table[columns].to_numpy(dtype=float)


def expected(folder: Path, rows: pd.DataFrame) -> np.ndarray:
    model = SiteModel.read(folder / FILE)
    return model.predict(rows)[:, None] if model.form.regression else model.predict_proba(rows)


def test_a_file_of_any_form_gives_what_python_gives(folder: Path, tmp_path: Path) -> None:
    rows = frame()
    shuffled = rows[["dose", "ward", "age", "smoker"]].assign(note="x")
    shuffled.to_csv(tmp_path / "rows.csv", index=False)
    shuffled.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    rows.to_parquet(tmp_path / "rows.parquet")
    encoded, _ = raw_rows(rows, SiteModel.read(folder / FILE).form)
    np.savez(tmp_path / "rows.npz", x=encoded[:, ::-1], feature_names=np.array(FEATURES[::-1]))
    for name in ("rows.csv", "rows.tsv", "rows.parquet", "rows.npz"):
        table, notes = call(folder, "--data", tmp_path / name)
        np.testing.assert_allclose(figures(table), expected(folder, rows), atol=1e-5)
        assert ('"note" had no part' in notes) == (name in ("rows.csv", "rows.tsv")), name
        assert (table["warning"] == "").all()
    for name in ("rows.csv", "rows.parquet"):
        table, _ = call(folder, "--data", "-", given=(tmp_path / name).read_bytes())
        np.testing.assert_allclose(figures(table), expected(folder, rows), atol=1e-5)
    call(folder, "--data", tmp_path / "rows.csv", "--out", tmp_path / "out.parquet")
    np.testing.assert_allclose(figures(pd.read_parquet(tmp_path / "out.parquet")), expected(folder, rows), atol=1e-5)


def test_many_rows_are_those_of_each_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame(10).to_csv(tmp_path / "rows.csv", index=False)
    whole, _ = call(folder, "--data", tmp_path / "rows.csv")
    monkeypatch.setattr("fedmeta.adapt.prediction.BATCH", 3)
    parts, _ = call(folder, "--data", tmp_path / "rows.csv")
    np.testing.assert_allclose(figures(whole), figures(parts), atol=1e-7)


def test_what_cannot_be_meant_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = frame()
    rows.drop(columns="dose").rename(columns={"ward": "Ward"}).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(FedmetaError, match='lacks "ward", "dose"'):
        call(folder, "--data", tmp_path / "rows.csv")
    rows.assign(dose="high").to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(FedmetaError, match='column "dose" is "high"'):
        call(folder, "--data", tmp_path / "rows.csv")
    with pytest.raises(FedmetaError, match=r"^stdin"):
        call(folder, "--data", "-", given=(tmp_path / "rows.csv").read_bytes())
    call(folder, "--data", tmp_path / "rows.csv", "--missing", "high")
    for arguments, message in (
        ((folder / "none", "--data", "x.csv"), "no such folder"),
        ((tmp_path, "--data", "x.csv"), "holds no model.safetensors"),
        ((folder, "--data", tmp_path / "none.csv"), "no such file"),
        ((folder, "--data", "-"), "the standard input is empty"),
        ((folder, "--data", tmp_path / "rows.csv", "--out", "rows.txt"), r"ends in \.csv or \.parquet"),
    ):
        with pytest.raises(FedmetaError, match=message):
            call(*arguments)


def test_rows_far_from_what_the_model_has_seen_are_named(folder: Path, tmp_path: Path) -> None:
    rows = frame(5).astype({"age": float, "ward": object, "smoker": object})
    rows.loc[1, "age"] = 570.0
    rows.loc[2, "ward"] = "Z"
    rows.loc[3, ["age", "ward", "smoker"]] = np.nan
    rows.to_csv(tmp_path / "rows.csv", index=False)
    found = CliRunner().invoke(app, ["predict", str(folder), "--data", str(tmp_path / "rows.csv"), "--json"])
    assert json.loads(found.stdout.splitlines()[-1])["far"] == 3
    table, notes = call(folder, "--data", tmp_path / "rows.csv")
    warned = table["warning"].tolist()
    assert warned[0] == warned[4] == ""
    assert warned[1] == "age is 570, 52.0 standard deviations from the training sites' mean"
    assert warned[2] == "ward is a category that the run does not know"
    assert warned[3] == "3 of 4 columns are missing"
    assert "3 of 5 rows lie far" in notes


@pytest.mark.slow
def test_onnx_and_mlflow_give_the_same(folder: Path, tmp_path: Path) -> None:
    import mlflow

    from fedmeta.tracking import model as tracked

    rows = frame(40)
    rows[["ward", "dose", "smoker", "age"]].to_csv(tmp_path / "rows.csv", index=False)
    table, _ = call(folder, "--data", tmp_path / "rows.csv")
    model = SiteModel.read(folder / FILE)
    encoded, _ = raw_rows(rows, model.form)
    export.export(model, torch.from_numpy(encoded), tmp_path / "model.onnx")
    cells = {name: rows[name].to_numpy(str if name == "ward" else float) for name in rows}
    onnx = export.outputs_of(tmp_path / "model.onnx", cells).reshape(len(rows), -1)
    np.testing.assert_allclose(figures(table), onnx, atol=1e-5)
    example, columns = start(model.form.regression).example_input()
    regression = model.form.regression
    tracked.save(tmp_path / "mlflow", folder / FILE, example, columns, regression=regression, adapts=False)
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "mlflow"))
    params = {} if regression else {"params": {"probabilities": True}}
    served = np.asarray(loaded.predict(rows[["dose", "age", "ward", "smoker"]], **params), dtype=float)
    np.testing.assert_allclose(figures(table), served.reshape(len(rows), -1), atol=1e-5)
    in_folder, _ = call(tmp_path / "mlflow", "--data", tmp_path / "rows.csv")
    assert in_folder.equals(table)


def test_sets_are_in_the_table(tmp_path: Path, folder: Path) -> None:
    own = start(SiteModel.read(folder / FILE).form.regression)
    model = SiteModel.read(folder / FILE)
    x = torch.from_numpy(raw_rows(frame(30), model.form)[0])
    y = torch.arange(30) % 2
    sets = make_sets(own, model, x, y.double() if model.form.regression else y)
    assert sets is not None
    model.write(tmp_path / FILE, own, {})
    sets.write(tmp_path / conformal.FILE)
    frame(9).to_csv(tmp_path / "rows.csv", index=False)
    table, notes = call(tmp_path, "--data", tmp_path / "rows.csv")
    assert "at least 90%" in notes
    rows = torch.from_numpy(raw_rows(frame(9), model.form)[0])
    if model.form.regression:
        np.testing.assert_allclose(table[["low", "high"]], sets.interval(rows), rtol=1e-6)
    else:
        inside = sets.classes(rows)
        assert table["set"].tolist() == ["|".join(np.array(CLASSES)[row]) for row in inside]
