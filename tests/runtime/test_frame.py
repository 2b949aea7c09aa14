"""A run on a frame: the same as on its file, and resumed from what was kept of it."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from tests.data.hospitals import frames


def rows() -> pd.DataFrame:
    parts = [frame.assign(hospital=name) for name, frame in frames(40).items()]
    return pd.concat(parts).drop(columns="admitted")


def experiment(folder: Path, *overrides: str) -> Experiment:
    usual = ["server.rounds=2", "evaluation.every=0", "model.name=logistic", "tracking.uri=none", "data.new_sites=1"]
    return Experiment().with_overrides([*usual, f"tracking.folder={folder / 'runs'}", *overrides])


def test_a_frame_is_as_its_file(tmp_path: Path) -> None:
    rows().to_csv(tmp_path / "all.csv", index=False)
    keys = ["data.source=tables", f"data.path={tmp_path / 'all.csv'}", "data.label=readmitted"]
    of_file = fedmeta.run(experiment(tmp_path, *keys, "data.site_column=hospital"))
    of_frame = fedmeta.run(experiment(tmp_path), frame=rows(), label="readmitted", site="hospital")
    assert list(of_frame.sites["site"]) == ["abbey", "bridge", "castle", "dean", "elm"]
    for name, value in of_file.meta_state.items():
        assert torch.equal(value, of_frame.meta_state[name]), name
    again = fedmeta.run(
        experiment(tmp_path), frame=rows(), label="readmitted", site="hospital", resume=of_frame.folder.name
    )
    assert again.summary["new_sites"] == of_frame.summary["new_sites"]


def test_a_frame_needs_a_column_of_sites(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match="name the column that holds each row's site"):
        fedmeta.run(experiment(tmp_path), frame=rows(), label="readmitted")
    with pytest.raises(FedmetaError, match=r'no column "clinic" \(data.site_column\)'):
        fedmeta.run(experiment(tmp_path), frame=rows(), label="readmitted", site="clinic")
    with pytest.raises(FedmetaError, match="there is none"):
        fedmeta.run(experiment(tmp_path), label="readmitted")
    with pytest.raises(FedmetaError, match="in a deployment each site has its own file"):
        fedmeta.run(experiment(tmp_path), runtime="deployment", frame=rows(), site="hospital")
