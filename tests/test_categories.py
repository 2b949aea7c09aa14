"""Columns of categories: agreed across sites by what training sites send, and the same at a site that joins."""

import json
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch

import fedmeta
from clients.app import app
from fedmeta import checkpoint
from fedmeta.adapt.adaptation import adapt
from fedmeta.adapt.export import outputs_of
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.rows import raw_rows, read_inputs
from fedmeta.adapt.writing import write
from fedmeta.data import load_site
from fedmeta.data.columns import Columns, encoded
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data, Experiment
from fedmeta.progress import ignore_progress
from fedmeta.runtime.dry_run import dry_run, format_messages
from server import training_loop
from tests.several_nodes import SeveralNodes

RARE = "Unknown-42"


def frame(number: int, rows: int = 60) -> pd.DataFrame:
    draw = np.random.default_rng(number)
    found = pd.DataFrame({"age": draw.integers(20, 90, rows), "ward": draw.choice(["A", "B", "C"], rows)})
    found["sex"] = draw.choice(["F", "M"], rows)
    risk = (found["age"] - 55) / 20 + (found["ward"] == "B") * 1.5 - (found["sex"] == "F")
    found["label"] = np.where(risk + draw.normal(0, 0.5, rows) > 0, "ill", "well")
    found.loc[3, "sex"] = None
    found.loc[4, "ward"] = RARE
    return found


def hospitals(folder: Path) -> Path:
    folder.mkdir()
    for number in range(5):
        frame(number).to_csv(folder / f"h{number}.csv", index=False)
    return folder


def experiment(folder: Path, data: Path, *overrides: str) -> Experiment:
    usual = ["data.source=tables", f"data.path={data}", "model.name=logistic", "server.rounds=6", "data.new_sites=1"]
    usual += ["server.sites_per_round=0", "evaluation.every=0", "tracking.uri=none", "runtime.engine=loop"]
    return Experiment().with_overrides([*usual, f"tracking.folder={folder / 'runs'}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fedmeta.Result]:
    folder = tmp_path_factory.mktemp("categories")
    data = hospitals(folder / "data")
    return folder, fedmeta.run(experiment(folder, data))


def start_of(result: fedmeta.Result) -> MetaModel:
    return MetaModel.of(checkpoint.newest(result.folder)[0])


@pytest.mark.slow
def test_text_is_learned_as_columns_of_zeros_and_ones_written_by_hand_are(
    finished: tuple[Path, fedmeta.Result], tmp_path: Path
) -> None:
    _, result = finished
    (tmp_path / "data").mkdir()
    for number in range(5):
        own = frame(number)
        for name, values in (("sex", "FM"), ("ward", "ABC")):
            for value in values:
                own[f"{name}={value}"] = (own[name] == value).astype(float).where(own[name].notna())
        own.drop(columns=["sex", "ward"]).to_csv(tmp_path / "data" / f"h{number}.csv", index=False)
    by_hand = fedmeta.run(experiment(tmp_path, tmp_path / "data"))
    assert start_of(by_hand).form.features == start_of(result).form.features
    assert start_of(result).form.features == ("age", "sex=F", "sex=M", "ward=A", "ward=B", "ward=C")
    for name, value in by_hand.meta_state.items():
        assert torch.equal(value, result.meta_state[name]), name
    assert by_hand.summary["new_sites"] == result.summary["new_sites"]


def test_sites_with_a_file_each_agree_on_the_same(finished: tuple[Path, fedmeta.Result], tmp_path: Path) -> None:
    folder, result = finished
    described = experiment(tmp_path, folder / "data")
    nodes = [{"site": f"h{number}", "data": str(folder / "data" / f"h{number}.csv")} for number in range(5)]
    grid = SeveralNodes(app, described, node_configs=nodes)
    outcome = training_loop.run(grid, described, ignore_progress)
    for name, value in outcome.meta_state.items():
        torch.testing.assert_close(value, result.meta_state[name], rtol=0, atol=1e-6)
    replies = [message for message in grid.sent if message.metadata.message_type == "query.categories"]
    assert replies, "training sites are asked"


@pytest.mark.slow
def test_a_rare_name_stays_at_its_site(finished: tuple[Path, fedmeta.Result]) -> None:
    folder, _ = finished
    described = experiment(folder, folder / "data")
    messages = dry_run(described, f'site="h1" data="{folder / "data" / "h1.csv"}"')
    text = format_messages(messages, as_json=True)
    sent = [json.loads(line) for line in text.splitlines()]
    named = next(each for each in sent if each["message"] == "query.categories")["categories"]
    assert named["category_names"] == ["F", "M", "A", "B", "C"]
    assert RARE not in text


@pytest.mark.slow
def test_text_where_the_others_have_numbers_is_refused_by_name(tmp_path: Path) -> None:
    data = hospitals(tmp_path / "data")
    for number in range(4):
        (data / f"h{number}.csv").write_text(frame(number).assign(sex=number).to_csv(index=False))
    described = experiment(tmp_path, data, "server.rounds=1")
    nodes = [{"site": f"h{number}", "data": str(data / f"h{number}.csv")} for number in range(5)]
    grid = SeveralNodes(app, described, node_configs=nodes)
    notes: list[str] = []
    training_loop.run(grid, described, lambda stand: notes.append(stand.note))
    assert any("h4" in note and "sex holds categories, and numbers at most sites" in note for note in notes), notes


def test_numbers_where_the_others_have_text_count_by_their_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sex,label\n1,x\n2,y\n,x\n")
    alone = load_site(Data(), str(tmp_path / "a.csv"))
    found = encoded(alone, (("sex", ("1", "F")),))
    np.testing.assert_array_equal(found.x, [[1, 0], [0, 0], [np.nan, np.nan]])


def test_a_new_site_is_read_by_the_runs_names(finished: tuple[Path, fedmeta.Result], tmp_path: Path) -> None:
    _, result = finished
    start = start_of(result)
    own = frame(77, 40)
    own.loc[7, "ward"] = "Z"
    own[["label", "ward", "sex", "age"]].to_csv(tmp_path / "mine.csv", index=False)
    adapted = adapt(start, str(tmp_path / "mine.csv"))
    note = " ".join(adapted.warnings)
    assert 'column "ward": "Unknown-42", "Z" in 2 rows count as "other": the run knows "A", "B", "C"' in note
    expected = np.array([own["age"], own["sex"] == "F", own["sex"] == "M", *(own["ward"] == name for name in "ABC")]).T
    expected = expected.astype(float)
    expected[3, 1:3] = np.nan
    np.testing.assert_array_equal(adapted.rows.x.numpy(), expected)
    bare, _ = read_inputs(start.form, start.experiment.data, str(tmp_path / "mine.csv"))
    np.testing.assert_array_equal(bare, expected)
    np.testing.assert_array_equal(raw_rows(own, start.form)[0], expected)
    assert adapted.model.predict(own).tolist() == adapted.model.predict(expected).tolist()
    own.drop(columns="ward").to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(FedmetaError, match='lacks "ward"'):
        adapt(start, str(tmp_path / "mine.csv"))


@pytest.mark.slow
def test_columns_of_other_units_or_without_values_are_named(
    finished: tuple[Path, fedmeta.Result], tmp_path: Path
) -> None:
    start = start_of(finished[1])
    own = frame(77, 40).assign(age=lambda each: each["age"] * 365.25, sex="")
    own.to_csv(tmp_path / "mine.csv", index=False)
    note = " ".join(adapt(start, str(tmp_path / "mine.csv")).warnings)
    assert 'Column "age" has mean' in note
    assert "standard deviations apart: convert it" in note
    assert 'Column "sex" is missing in every row' in note
    own.assign(age="-").to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(FedmetaError, match="--missing"):
        adapt(start, str(tmp_path / "mine.csv"))
    assert 'Column "age" is missing' in " ".join(adapt(start, str(tmp_path / "mine.csv"), missing=["-"]).warnings)


@pytest.mark.slow
def test_resumed_it_is_the_unbroken_run(finished: tuple[Path, fedmeta.Result], tmp_path: Path) -> None:
    folder, result = finished
    described = experiment(tmp_path, folder / "data")

    def stop(stand: object) -> None:
        if getattr(stand, "round_number", 0) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(described, report=stop)
    resumed = fedmeta.run(described, resume="auto")
    for name, value in resumed.meta_state.items():
        assert torch.equal(value, result.meta_state[name]), name


def test_models_in_mlflow_and_onnx_give_the_same(finished: tuple[Path, fedmeta.Result], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    start, own = start_of(finished[1]), frame(78, 40)
    own.to_csv(tmp_path / "mine.csv", index=False)
    adapted = adapt(start, str(tmp_path / "mine.csv"), use="personal")
    written = write(adapted, tmp_path / "out")
    shuffled = own[["label", "sex", "age", "ward"]]
    expected = adapted.model.predict_proba(shuffled)
    x = raw_rows(shuffled, start.form)[0]
    cells = {"age": own["age"].to_numpy(float)}
    cells |= {name: own[name].fillna("").to_numpy(str) for name in ("ward", "sex")}
    np.testing.assert_allclose(outputs_of(written.folder / "model.onnx", cells), expected, atol=1e-5)
    server = mlflow.pyfunc.load_model(str(written.folder / "mlflow-model"))
    served = server.predict(shuffled.drop(columns="label"), params={"probabilities": True})
    np.testing.assert_allclose(served.to_numpy(), expected, atol=1e-5)
    as_features = pd.DataFrame(x, columns=list(start.form.features))
    np.testing.assert_array_equal(adapted.model.predict_proba(as_features), expected)


def test_columns_turn_cells_into_features() -> None:
    columns = Columns(("a", "b=x", "b=y"), (("b", ("x", "y")), ("c", ())))
    assert columns.names == ("a", "b", "c")
    cells = {"a": pd.Series([1.5, None]), "b": pd.Series(["y", None]), "c": pd.Series(["q", "r"])}
    rows, notes = columns.read(cells)
    np.testing.assert_array_equal(rows, [[1.5, 0, 1], [np.nan, np.nan, np.nan]])
    assert len(notes) == 1
    assert '"q", "r" in 2 rows count as "other"' in notes[0]


@pytest.mark.slow
def test_a_site_of_other_units_is_named_by_the_sums_that_it_sends(tmp_path: Path) -> None:
    data = hospitals(tmp_path / "data")
    far = frame(2).assign(age=lambda each: each["age"] * 365.25)
    (data / "h2.csv").write_text(far.to_csv(index=False))
    described = experiment(tmp_path, data, "server.rounds=1", "data.new_sites=0")
    nodes = [{"site": f"h{number}", "data": str(data / f"h{number}.csv")} for number in range(5)]
    notes: list[str] = []
    training_loop.run(SeveralNodes(app, described, node_configs=nodes), described, lambda at: notes.append(at.note))
    assert any(note.startswith('h2: column "age" has mean ') for note in notes), notes
    assert sum("other units" in note for note in notes) == 1
