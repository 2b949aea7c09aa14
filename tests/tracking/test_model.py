"""The model that a run leaves in MLflow: logged, registered, and a site's own with a labelled support."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient, MlflowException
from mlflow.exceptions import get_error_code

import fedmeta
from fedmeta import checkpoint
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.locate import find_start
from fedmeta.tracking import model as module
from fedmeta.tracking.mlflow_client import MLFLOW_DEFAULTS
from tests.adapt.finished import experiment, hospitals, labels_of, rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, fedmeta.Result, MetaModel]:
    """A store with a run over hospitals whose model is registered as "heart"."""
    tmp = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{tmp}/mlflow.db"
    overrides = (f"tracking.uri={uri}", "tracking.model=heart")
    result = fedmeta.run(experiment(tmp, hospitals(tmp / "hospitals"), *overrides))
    return uri, result, MetaModel.of(checkpoint.newest(result.folder)[0])


@pytest.fixture
def loaded(finished: tuple[str, fedmeta.Result, MetaModel], monkeypatch: pytest.MonkeyPatch) -> Any:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished[0])
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", finished[0])
    return mlflow.pyfunc.load_model("models:/heart/1")


def frame(start: MetaModel, x: Any) -> pd.DataFrame:
    return pd.DataFrame(x, columns=list(start.form.features))


@pytest.mark.slow
def test_a_run_logs_its_model_and_registers_it(finished: tuple[str, fedmeta.Result, MetaModel]) -> None:
    uri, result, _ = finished
    client = MlflowClient(uri)
    run = client.get_run(result.summary["run_id"])
    logged = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert str(logged.status) == "READY"
    results = {metric.key: metric.value for metric in logged.metrics}
    assert results["final/new_sites_personalized"] == pytest.approx(result.summary["new_sites"]["personalized"]["mean"])
    version = client.get_model_version("heart", "1")
    assert version.run_id == result.summary["run_id"]
    assert version.status == "READY"


def test_it_predicts_class_names_for_raw_rows(finished: tuple[str, fedmeta.Result, MetaModel], loaded: Any) -> None:
    _, _, start = finished
    x, _ = rows(30, 50, 3.0, missing=0.2)
    prepared = ((torch.from_numpy(x) - start.mean) / start.scale).nan_to_num(nan=0.0).float()
    codes = start.learner.predict(start.learner.theta(start.state), prepared).argmax(-1)
    assert list(loaded.predict(frame(start, x))) == [start.form.classes[code] for code in codes.tolist()]
    assert loaded.metadata.signature.params is not None
    example = loaded.input_example
    assert next(iter(loaded.predict(example))) in start.form.classes


def test_with_a_support_it_becomes_a_sites_own(finished: tuple[str, fedmeta.Result, MetaModel], loaded: Any) -> None:
    _, _, start = finished
    x, score = rows(31, 540, 3.0)
    labels = np.array(labels_of(score))
    support = [[None if value != value else value for value in row] for row in x[:40].tolist()]
    params = {"support_x": json.dumps(support), "support_y": json.dumps(labels[:40].tolist())}
    test = frame(start, x[40:])
    alike = {
        steps: (loaded.predict(test, params={**params, "steps": steps}) == labels[40:]).mean() for steps in (-1, 0, 5)
    }
    assert alike[0] == (loaded.predict(test) == labels[40:]).mean()
    assert min(alike[5], alike[-1]) > alike[0]
    named = {**params, "support_x": json.dumps([dict(zip(start.form.features, row, strict=True)) for row in support])}
    assert list(loaded.predict(test, params=named)) == list(loaded.predict(test, params=params))


def test_the_model_holds_no_row_and_the_run_continues_from_the_registry(
    finished: tuple[str, fedmeta.Result, MetaModel], tmp_path: Path
) -> None:
    uri, result, start = finished
    for name in ("models:/heart/1", result.summary["run_id"]):
        found = find_start(name, tmp_path, uri)
        assert found.digest == start.digest
    example = json.loads((result.folder / "model" / "input_example.json").read_text())
    assert example["data"] == [pytest.approx(start.mean.tolist(), rel=1e-5)]


def test_a_second_sending_makes_no_second_model(finished: tuple[str, fedmeta.Result, MetaModel]) -> None:
    uri, result, _ = finished
    client = MlflowClient(uri)
    assert module.log(client, result.summary["run_id"], result.folder / "model", "heart") == ""
    assert len(client.search_model_versions("name = 'heart'")) == 1
    assert len(client.get_run(result.summary["run_id"]).outputs.model_outputs) == 1


@pytest.mark.slow
def test_the_champion_is_the_best_on_new_sites_of_the_same_data(
    finished: tuple[str, fedmeta.Result, MetaModel], tmp_path: Path
) -> None:
    uri, result, _ = finished
    client = MlflowClient(uri)
    first = client.get_model_version_by_alias("heart", module.CHAMPION)
    assert (str(first.version), first.tags["fedmeta.learner"]) == ("1", result.summary["learner"])
    assert first.description.startswith(f"**{result.summary['learner']}: ")
    assert "|" not in first.description, "the verdict, and no table"
    run = client.get_run(result.summary["run_id"])
    score, higher = run.data.metrics[module.PRIMARY_METRIC], result.summary["score"]["higher_is_better"]

    def register(change: float, **changed: str) -> str:
        other = client.create_run(run.info.experiment_id, tags={**run.data.tags, **changed}).info.run_id
        client.log_metric(other, module.PRIMARY_METRIC, score + (change if higher else -change))
        folder = tmp_path / other
        shutil.copytree(result.folder / "model", folder)
        return module.log(client, other, folder, "champions")

    def champion() -> str:
        return str(client.get_model_version_by_alias("champions", module.CHAMPION).version)

    assert (register(0.0), champion()) == ("", "1")
    assert (register(-0.1), champion()) == ("", "1")
    assert (register(0.1), champion()) == ("", "3")
    refused = register(0.2, **{"fedmeta.data": "lungs"})
    assert "stays at version 3" in refused
    assert "lungs" in refused
    assert champion() == "3"


def test_a_store_without_models_keeps_them_as_artifacts(finished: tuple[str, fedmeta.Result, MetaModel]) -> None:
    uri, result, _ = finished

    refused = MlflowException("API request failed", error_code=get_error_code(404))
    assert refused.get_http_status_code() == 404

    class WithoutModels(MlflowClient):
        def create_logged_model(self, *arguments: Any, **named: Any) -> Any:
            raise refused

    client = WithoutModels(uri)
    other = client.create_run(client.get_run(result.summary["run_id"]).info.experiment_id)
    assert "keeps no models" in module.log(client, other.info.run_id, result.folder / "model", "heart")
    assert "model/MLmodel" in [file.path for file in client.list_artifacts(other.info.run_id, "model")]


def test_any_numbers_are_taken_by_name(finished: tuple[str, fedmeta.Result, MetaModel], loaded: Any) -> None:
    """Whole numbers and truth values, in any order, with columns besides; a missing column is refused by name."""
    _, _, start = finished
    whole = pd.DataFrame({"weight": [70000, 65000], "dose": [True, False], "age": [50, 61]})
    assert whole.dtypes.map(str).tolist() == ["int64", "bool", "int64"]
    wanted = loaded.predict(whole.astype(float)[list(start.form.features)]).tolist()
    assert loaded.predict(whole).tolist() == wanted
    assert loaded.predict(whole.assign(ward="north")).tolist() == wanted
    probabilities = loaded.predict(whole, params={"probabilities": True})
    assert [probabilities.columns[code] for code in probabilities.to_numpy().argmax(1)] == wanted
    with pytest.raises(MlflowException, match=r"missing inputs .*dose"):
        loaded.predict(whole.drop(columns="dose"))
    assert [column.name for column in loaded.metadata.signature.inputs.inputs] == list(start.form.features)


@pytest.mark.slow
def test_mlflow_serves_it(finished: tuple[str, fedmeta.Result, MetaModel], tmp_path: Path) -> None:
    _, result, start = finished
    x, _ = rows(30, 6, 3.0)
    given = {"dataframe_split": {"columns": list(start.form.features), "data": x.tolist()}}
    (tmp_path / "rows.json").write_text(json.dumps(given))
    out = tmp_path / "predictions.json"
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", str(result.folder / "model")]
    command += ["-i", str(tmp_path / "rows.json"), "-o", str(out), "--env-manager", "local"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**MLFLOW_DEFAULTS, **os.environ})
    predictions = json.loads(out.read_text())["predictions"]
    assert len(predictions) == 6
    assert set(predictions) <= set(start.form.classes)
