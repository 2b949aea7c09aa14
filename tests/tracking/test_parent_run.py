"""A run about other runs: one however often its command is repeated, and no login is written down."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedmeta.experiment import Experiment
from fedmeta.tracking.mlflow_client import open_client, picture_steps
from fedmeta.tracking.parent_run import KEPT, annotate, parent_run


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


def test_nothing_is_opened_where_nothing_is_tracked(tmp_path):
    with parent_run(experiment("none"), "search", "a name", tmp_path / "search") as run:
        assert run is None
    assert not list(tmp_path.iterdir())
