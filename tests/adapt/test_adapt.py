"""A site that joins after the run: from the command line to the model in its folder."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedmeta.adapt import adaptation, export, writing
from fedmeta.adapt.initialization import FILE as START
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.locate import find_start
from fedmeta.adapt.model import FILE, SiteModel
from fedmeta.adapt.rows import raw_rows, read_inputs, read_rows
from fedmeta.adapt.serving import _load_pyfunc
from fedmeta.cli.main import app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS
from tests.adapt.finished import COLUMNS, hospitals, labels_of, rows, run, write_csv

NEAR = 1e-5


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a finished run over hospitals leaves."""
    tmp = tmp_path_factory.mktemp("tables")
    run(tmp, hospitals(tmp / "hospitals", missing=0.1))
    return tmp


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("numbers")
    run(tmp, hospitals(tmp / "hospitals", regression=True))
    return tmp


def site(tmp: Path, count: int = 40, seed: int = 100, tilt: float = 3.0, missing: float = 0.1) -> Path:
    x, score = rows(seed, count, tilt, missing)
    return write_csv(tmp / f"mine-{seed}.csv", x, labels_of(score))


def call(*arguments: Any) -> tuple[int, dict[str, Any] | None, str]:
    """Runs the command as a person would; returns its code, its JSON, and its message when it refuses."""
    found = CliRunner().invoke(app, ["adapt", *map(str, arguments), "--json"])
    if isinstance(found.exception, FedmetaError):
        return 2, None, str(found.exception)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, json.loads(found.stdout.strip().splitlines()[-1]), ""


def test_a_site_gets_its_model_an_estimate_and_advice(tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, found, _ = call(
        tables / START, "--data", site(tmp_path, 300), "--test", site(tmp_path, 400, seed=101), "--out", out
    )
    assert code == 0
    assert found is not None
    assert found["advice"] == "personal"
    assert found["steps"] > 0
    assert found["personalized"]["estimate"] > found["global"]["estimate"]
    assert found["personalized"]["test"] > found["global"]["test"]
    for who in ("global", "personalized"):
        assert found[who]["low"] <= found[who]["estimate"] <= found[who]["high"]
    assert sorted(path.name for path in out.iterdir()) == sorted(found["files"])
    assert set(found["files"]) >= {"card.md", "mlflow-model", "model.onnx", "model.safetensors"}
    assert found["onnx_difference"] <= NEAR
    text = (out / "card.md").read_text()
    for fact in (found["run_id"], "maml", found["digest"], "300 (mine-100.csv)", "Use the personal model"):
        assert fact in text


def test_every_form_of_the_model_gives_the_same(tables: Path, tmp_path: Path) -> None:
    """Torch, ONNX, MLflow's loader and the learner itself, on raw rows with missing values."""
    import mlflow.pyfunc
    import pandas as pd

    start = MetaModel.read(tables / START)
    adapted = adaptation.adapt(start, str(site(tmp_path)))
    folder = writing.write(adapted, tmp_path / "out").folder
    raw = read_rows(start, str(site(tmp_path, 50, seed=7, missing=0.3))).x
    assert bool(raw.isnan().any())
    with torch.no_grad():
        model = SiteModel.read(folder / FILE)
        probabilities = model(raw)
        # By hand: standardise, impute by the mean, and ask the learner.
        x = ((raw - start.mean) / start.scale).nan_to_num(nan=0.0).float()
        expected = start.learner.predict(adapted.judgement.parameters, x).softmax(-1)
    assert torch.allclose(probabilities, expected, atol=1e-6)
    assert np.abs(export.outputs_of(folder / "model.onnx", raw.numpy()) - probabilities.numpy()).max() <= NEAR
    names = [start.form.classes[code] for code in expected.argmax(-1).tolist()]
    frame = pd.DataFrame(raw.numpy(), columns=list(start.form.features))
    loaded = mlflow.pyfunc.load_model(str(folder / "mlflow-model"))
    assert list(loaded.predict(frame)) == names
    assert list(loaded.predict(frame[list(reversed(frame.columns))])) == names
    state = load_file(folder / FILE)
    assert {name for name in state if name.startswith("network.")} == {
        f"network.{name}" for name in start.learner.network.names
    }


def test_columns_may_come_in_any_order(tables: Path, tmp_path: Path) -> None:
    x, score = rows(3, 30, 3.0)
    start = MetaModel.read(tables / START)
    one = read_rows(start, str(write_csv(tmp_path / "a.csv", x, labels_of(score))))
    turned = write_csv(tmp_path / "b.csv", x[:, ::-1], labels_of(score), COLUMNS[::-1])
    assert torch.equal(one.x, read_rows(start, str(turned)).x)


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (("age", "dosis", "weight"), ["ill", "well"], 'lacks "dose" and has "dosis" besides'),
        (("age", "dose", "patient"), ["ill", "well"], 'lacks "weight" and has "patient" besides'),
        (COLUMNS, ["ill", "healthy"], '"healthy" is no class of the run, whose classes are "ill", "well"'),
    ],
)
def test_another_form_is_refused_by_name(
    tables: Path, tmp_path: Path, columns: tuple[str, ...], labels: list[str], message: str
) -> None:
    x = np.random.default_rng(0).normal(size=(10, len(columns)))
    path = write_csv(tmp_path / "mine.csv", x, labels * 5, columns)
    code, _, said_ = call(tables / START, "--data", path, "--out", tmp_path / "out")
    assert code == 2
    assert message in said_
    assert str(path) in said_
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    _, start = run(tmp_path, None, "server.rounds=1")
    np.savez(tmp_path / "mine.npz", x=np.zeros((9, 9, 9), dtype=np.uint8), y=np.arange(9))
    with pytest.raises(FedmetaError, match=r"shape \(9, 9\), the run's \(8, 8\)"):
        read_rows(start, str(tmp_path / "mine.npz"))


def test_where_adapting_does_not_help_the_global_model_is_advised(tables: Path, tmp_path: Path) -> None:
    """At a hundred times the rate that the run learned with, every step is one too many."""
    start = replace(MetaModel.read(tables / START), rate=100.0)
    adapted = adaptation.adapt(start, str(site(tmp_path)))
    assert adapted.summary()["advice"] == "global"
    theta = start.learner.theta(start.state)
    assert all(torch.equal(value, theta[name]) for name, value in adapted.judgement.parameters.items())
    assert "Use the global model" in adapted.advice


def test_few_rows_and_one_class_are_warned_of(tables: Path, tmp_path: Path) -> None:
    x, _ = rows(5, 12, 3.0)
    path = write_csv(tmp_path / "mine.csv", x, ["ill"] * 12)
    code, found, _ = call(tables / START, "--data", path, "--out", tmp_path / "out")
    assert code == 0
    assert found is not None
    assert any("12 rows" in warning for warning in found["warnings"])
    assert any('of class "ill"' in warning for warning in found["warnings"])
    assert found["warnings"][0] in (tmp_path / "out" / "card.md").read_text()


@pytest.mark.slow
def test_a_single_row_is_enough_to_get_an_answer(tables: Path, tmp_path: Path) -> None:
    x, _ = rows(5, 1, 3.0)
    path = write_csv(tmp_path / "mine.csv", x, ["ill"])
    code, found, _ = call(tables / START, "--data", path, "--out", tmp_path / "out")
    assert code == 0
    assert found is not None
    assert found["advice"] == "global"


@pytest.mark.slow
def test_regression(numbers: Path, tmp_path: Path) -> None:
    files = []
    for seed, count in ((50, 60), (51, 500)):
        x, score = rows(seed, count, 3.0)
        files.append(write_csv(tmp_path / f"mine-{seed}.csv", x, [round(value) for value in score.tolist()]))
    out = tmp_path / "out"
    code, found, _ = call(numbers / START, "--data", files[0], "--test", files[1], "--out", out)
    assert code == 0
    assert found is not None
    assert found["metric"] == "rmse"
    assert found["advice"] == "personal"
    assert found["personalized"]["test"] < found["global"]["test"]
    assert found["onnx_difference"] <= NEAR
    x, _ = rows(52, 5, 3.0)
    predicted = _load_pyfunc(str(out)).predict(x)
    assert predicted.dtype == np.float64
    assert np.abs(export.outputs_of(out / "model.onnx", x) - predicted).max() <= NEAR * np.abs(predicted).max()


@pytest.mark.slow
def test_images(tmp_path: Path) -> None:
    _, start = run(tmp_path, None, "model.name=cnn", "model.channels=4,4", "model.kernel=3", "server.rounds=1")
    draw = np.random.default_rng(0)
    x = draw.uniform(0, 16, size=(12, 8, 8))
    np.savez(tmp_path / "mine.npz", x=x, y=draw.integers(0, 3, 12))
    written = writing.write(adaptation.adapt(start, str(tmp_path / "mine.npz")), tmp_path / "out")
    assert written.onnx_difference is not None
    assert written.onnx_difference <= NEAR
    predicted = _load_pyfunc(str(tmp_path / "out")).predict(x)
    assert set(predicted) <= set(start.form.classes)


@pytest.mark.quick("maml")
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_serves_a_site_that_joins(learner: str, tmp_path: Path) -> None:
    _, start = run(tmp_path, hospitals(tmp_path / "hospitals"), f"learner.name={learner}", "server.rounds=2")
    adapted = adaptation.adapt(start, str(site(tmp_path, 20)))
    assert adapted.judgement.steps == 0 or start.learner.adapts
    if learner == "fedavg":
        assert "serves every site with the global model" in adapted.advice


def test_nothing_half_written_is_left(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adaptation.adapt(MetaModel.read(tables / START), str(site(tmp_path)))
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "card", full)
    with pytest.raises(FedmetaError, match="No space left"):
        writing.write(adapted, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_kept(tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    code, _, said_ = call(tables / START, "--data", site(tmp_path), "--out", out)
    assert code == 2
    assert "not empty" in said_
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_without_the_packages_all_but_onnx_is_written(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "NEEDED", ("onnx", "no_such_package"))
    written = writing.write(adaptation.adapt(MetaModel.read(tables / START), str(site(tmp_path))), tmp_path / "out")
    assert written.onnx_difference is None
    assert "no_such_package" in written.note
    assert "model.safetensors" in written.files
    assert "onnx" not in (tmp_path / "out" / "card.md").read_text()


@pytest.mark.slow
def test_a_run_is_found_by_whatever_names_it(tmp_path: Path) -> None:
    result, start = run(tmp_path, None, "server.rounds=1")
    root = result.folder.parent
    for name in (str(result.folder), result.folder.name, result.summary["run_id"], result.summary["checkpoint"]):
        found = find_start(name, root, "none")
        assert found.digest == start.digest
        assert found.run_id == result.summary["run_id"]
    with pytest.raises(FedmetaError, match='no run "nothing"'):
        find_start("nothing", root, f"sqlite:///{tmp_path}/absent.db")


@pytest.mark.slow
def test_what_a_run_hands_on_holds_nothing_of_where_it_was(tmp_path: Path) -> None:
    data = hospitals(tmp_path / "hospitals")
    run(tmp_path, data, "server.rounds=1", 'data.new_sites=["hospital-3"]', "tracking.experiment=secret-place")
    content = (tmp_path / START).read_bytes().decode("latin-1")
    for secret in (str(tmp_path), "secret-place", "hospital-"):
        assert secret not in content
    assert MetaModel.read(tmp_path / START).form.features == COLUMNS


@pytest.mark.slow
def test_a_run_that_chose_how_far_to_adapt_hands_that_on(tmp_path: Path) -> None:
    result, start = run(tmp_path, None, "server.rounds=3", "evaluation.schedule=auto", "learner.name=meta-sgd")
    chosen = result.summary["schedule"]
    assert (start.steps, start.rate) == (chosen["steps"], chosen["rate"])
    plain = {name: value for name, value in start.meta_state.items() if name.startswith("alpha.")}
    assert plain
    assert all(torch.equal(start.state[name], value * chosen["rate"]) for name, value in plain.items())


def inputs(start: MetaModel, x: Any) -> dict[str, Any]:
    """Ways to give the same rows."""
    import pandas as pd

    frame = pd.DataFrame(x, columns=list(start.form.features))
    return {
        "array": x,
        "frame": frame,
        "another order": frame[list(reversed(frame.columns))],
        "columns besides": frame.assign(ward="north", **{"admission date": pd.Timestamp("2020-01-01")}),
        "names with spaces": frame.rename(columns={"age": " age "}),
        "objects": frame.astype(object).where(frame.notna(), None),
        "mapping": {name: frame[name].to_numpy() for name in frame},
    }


def test_rows_are_taken_by_the_names_of_their_columns(tables: Path, tmp_path: Path) -> None:
    """Every way to give rows, to torch, the served model and the served start, gives the same predictions."""
    start = MetaModel.read(tables / START)
    folder = writing.write(adaptation.adapt(start, str(site(tmp_path))), tmp_path / "out").folder
    model, servers = SiteModel.read(folder / FILE), (_load_pyfunc(str(folder)), _load_pyfunc(str(tables)))
    x = rows(9, 30, 3.0, missing=0.2)[0]
    # Whole numbers and truth values are numbers.
    x_there = np.nan_to_num(x)
    plain = np.stack([x_there[:, 0].round().astype(int), x[:, 1] > 0.2, x_there[:, 2].round().astype(int)], 1)
    for numbers_ in (x, plain):
        wanted, probabilities = model.predict(numbers_.astype(float)), model.predict_proba(numbers_.astype(float))
        assert np.allclose(probabilities.sum(1), 1)
        assert [start.form.classes[code] for code in probabilities.argmax(1)] == wanted.tolist()
        global_ = servers[1].predict(numbers_.astype(float)).tolist()
        for name, given in inputs(start, numbers_).items():
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                assert model.predict(given).tolist() == wanted.tolist(), name
                assert servers[0].predict(given).tolist() == wanted.tolist(), name
                assert servers[1].predict(given).tolist() == global_, name
            assert len(noted) == (3 if name == "columns besides" else 0), name
            assert all('"ward", "admission date"' in str(each.message) for each in noted)
        served = servers[0].predict(numbers_.astype(float), {"probabilities": True})
        assert list(served.columns) == list(start.form.classes)
        assert np.allclose(served.to_numpy(), probabilities)
        assert servers[0].get_raw_model().predict(numbers_.astype(float)).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="dose").assign(dosis=1.0), 'lacks "dose" and has "dosis" besides.*did you'),
        (lambda frame: frame.assign(dose="high"), r'column "dose" row 0 \(from 0\) is "high", not a number'),
        (lambda frame: frame.assign(dose=np.inf), r'row 0 \(from 0\), column "dose" is infinite'),
        (lambda frame: frame.set_axis(["age", "dose", "age"], axis=1), 'lacks "weight"'),
        (lambda frame: frame.assign(more=1.0).set_axis(["age", "dose", "weight", "age"], axis=1), "more than once"),
        (lambda frame: frame.to_numpy()[:, :2], r"rows have shape \(2,\), the run's \(3,\)"),
        (lambda frame: frame["age"].to_numpy(), r"rows have shape \(\), the run's \(3,\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(tables: Path, change: Any, message: str) -> None:
    import pandas as pd

    start = MetaModel.read(tables / START)
    frame = pd.DataFrame(rows(9, 5, 3.0)[0], columns=list(start.form.features))
    model = SiteModel.of(start, start.learner.theta(start.state))
    for predict in (model.predict, model.predict_proba, _load_pyfunc(str(tables)).predict):
        with pytest.raises(FedmetaError, match=message):
            predict(change(frame))


def test_other_columns_of_a_file_are_left_out_with_a_note(tables: Path, tmp_path: Path) -> None:
    """Texts and dates too, which could not be features."""
    x, score = rows(3, 30, 3.0)
    start = MetaModel.read(tables / START)
    bare = read_rows(start, str(write_csv(tmp_path / "a.csv", x, labels_of(score))))
    wide = np.concatenate([np.full((30, 1), "P. Smith"), x.astype(object)], 1)
    path = write_csv(tmp_path / "b.csv", wide, labels_of(score), ("name", *COLUMNS))
    found = read_rows(start, str(path))
    assert torch.equal(found.x, bare.x)
    assert len(found.notes) == 1
    assert '"name" had no part in the run' in found.notes[0]
    assert found.notes[0] in adaptation.adapt(start, str(path)).warnings
    assert bare.notes == ()


def test_rows_to_predict_need_no_label(tables: Path, tmp_path: Path) -> None:
    import pandas as pd

    start = MetaModel.read(tables / START)
    x = rows(4, 12, 3.0, missing=0.1)[0]
    frame = pd.DataFrame(x, columns=list(COLUMNS))
    frame[["weight", "age", "dose"]].assign(note="x").to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    np.savez(tmp_path / "rows.npz", x=x[:, ::-1], feature_names=np.array(COLUMNS[::-1]))
    for name in ("rows.csv", "rows.parquet", "rows.npz"):
        found, notes = read_inputs(start.form, start.experiment.data, str(tmp_path / name))
        assert np.array_equal(found, raw_rows(x, start.form)[0], equal_nan=True), name
        assert bool(notes) == (name == "rows.csv")
    frame.drop(columns="dose").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(FedmetaError, match=r'less\.csv lacks "dose"'):
        read_inputs(start.form, start.experiment.data, str(tmp_path / "less.csv"))


def test_a_file_s_rows_come_in_time(tables: Path, tmp_path: Path) -> None:
    start = replace_time(MetaModel.read(tables / START), "visit")
    (tmp_path / "later.csv").write_text(
        "visit,age,dose,weight,label\n3,50,0.2,3,ill\n1,50,0.2,1,well\n2,50,0.2,2,ill\n"
    )
    rows = read_rows(start, str(tmp_path / "later.csv"))
    assert rows.x[:, 2].tolist() == [1, 2, 3]
    assert [rows.classes[code] for code in rows.y.tolist()] == ["well", "ill", "ill"]
    assert not rows.notes
    (tmp_path / "plain.csv").write_text("age,dose,weight,label\n50,0.2,3,ill\n50,0.2,1,well\n")
    rows = read_rows(start, str(tmp_path / "plain.csv"))
    assert rows.x[:, 2].tolist() == [3, 1]
    assert 'no column "visit"' in rows.notes[0]


def replace_time(start: MetaModel, time: str) -> MetaModel:
    data = start.experiment.data.model_copy(update={"time": time})
    return replace(start, experiment=start.experiment.model_copy(update={"data": data}))
