"""A run about other runs: one however often its command is repeated, and no login is written down."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedmeta.experiment import Experiment
from fedmeta.in_force import params_in_force
from fedmeta.tracking.experiment_view import VIEW_TAG, VIEWS, view_of
from fedmeta.tracking.mlflow_client import open_client, picture_steps
from fedmeta.tracking.parent_run import KEPT, annotate, parent_run
from fedmeta.tracking.run_logger import Tracker
from tests.tracking.made_up_run import ACCURACY


def experiment(uri):
    return Experiment.from_toml(f'[tracking]\nuri = "{uri}"\n', "a test")


@pytest.mark.slow
def test_a_repeated_command_finds_its_run_and_replaces_its_results(tmp_path):
    uri, folder = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "comparison"
    picture = tmp_path / "differences.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    ids = []
    for verdict, best in (("first", 0.5), ("first", 0.5), ("second", 0.75)):
        with parent_run(experiment(uri), "comparison", "a name", folder) as run:
            table = {"table.json": pd.DataFrame({"learner": ["maml"], "score": [best]})}
            curves = {"search/best_so_far": [0.1, best]}
            run.publish(verdict, {"best": best, "none": None}, table, [], {"comparison/differences": picture}, curves)
            ids.append(run.run_id)
    assert len(set(ids)) == 1
    client = open_client(uri)
    found = client.get_run(ids[0])
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"best": 0.75, "search/best_so_far": 0.75}
    assert len(client.get_metric_history(ids[0], "best")) == 2, "the same results are logged once"
    assert picture_steps(client, ids[0], "comparison/differences") == {0, 1}
    table = json.loads(Path(client.download_artifacts(ids[0], "table.json")).read_text())
    assert table["data"] == [["maml", 0.75]]
    assert json.loads((folder / KEPT).read_text()) == {"run_id": ids[0], "uri": uri}
    annotate(uri, ids[0], {"fedmeta.note": "x"}, killed=True)
    assert client.get_run(ids[0]).info.status == "KILLED"


@pytest.mark.slow
def test_a_view_shows_a_data_sets_runs_without_trials_and_the_verdict_is_described(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def track(data, folder, *overrides):
        described = experiment(uri).with_overrides([f"data.path={data}", "data.source=npz", *overrides])
        tracker = Tracker.start(described.tracking, params_in_force(described), tmp_path / folder, score=ACCURACY)
        assert tracker.stop("FINISHED") == []
        return tracker.run_id

    described = experiment(uri).with_overrides(["data.path=a/heart.npz", "data.source=npz"])
    with parent_run(described, "comparison", "compared", tmp_path / "comparison") as above:
        ours = [track("a/heart.npz", f"heart{seed}") for seed in range(2)]
        track("a/lung's.npz", "lung")
        track("a/heart.npz", "trial", "evaluation.judge=validation_sites", f"tracking.parent={above.run_id}")
        above.adopt(ours)
        above.announce("maml is best.", "heart")
    client = open_client(uri)
    found = client.get_experiment_by_name("fedmeta")
    states = {key: json.loads(json.loads(found.tags[f"{VIEWS}{view_of(key)}"])["state"]) for key in ("heart", "lung's")}
    states["all"] = json.loads(json.loads(found.tags[VIEW_TAG])["state"])
    assert found.tags["mlflow.note.content"].startswith("heart: [maml is best.](#/experiments/1/runs/")

    def shown(key):
        filtered = client.search_runs([found.experiment_id], states[key]["searchFilter"])
        return {run.info.run_id for run in filtered}

    assert shown("heart") == {*ours, above.run_id}
    assert len(shown("lung's")) == 1
    assert shown("all") == shown("heart") | shown("lung's")
    above.announce("anil is best.", "heart")
    above.announce("fomaml is best.", "lung's")
    lines = client.get_experiment_by_name("fedmeta").tags["mlflow.note.content"].split("\n\n")
    assert [line.partition("]")[0] for line in lines] == ["heart: [anil is best.", "lung's: [fomaml is best."]
    client.set_experiment_tag(found.experiment_id, "mlflow.note.content", "my own")
    above.announce("maml is best.", "heart")
    assert client.get_experiment_by_name("fedmeta").tags["mlflow.note.content"] == "my own"
    assert {client.get_run(run_id).data.tags["mlflow.parentRunId"] for run_id in ours} == {above.run_id}


def test_nothing_is_opened_where_nothing_is_tracked(tmp_path):
    with parent_run(experiment("none"), "search", "a name", tmp_path / "search") as run:
        assert run is None
    assert not list(tmp_path.iterdir())
