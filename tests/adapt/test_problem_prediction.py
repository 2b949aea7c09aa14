"""Survival and counts on tables: a run on hospitals' files, a site that joins, predictions for its next file."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fedmeta
from fedmeta import checkpoint
from fedmeta.adapt.initialization import FILE as START_FILE
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.own_problem import FILE
from fedmeta.cli.main import app
from fedmeta.experiment import Experiment
from fedmeta.problems import counts, survival

FEATURES = ("age", "bmi", "crp")
KEYS = {
    "survival": ["problem.name=fedmeta.problems.survival:Survival", "problem.time=days", "problem.cuts=[1, 2, 3, 4]"],
    "counts": ["problem.name=fedmeta.problems.counts:Counts", "problem.count=falls", "problem.exposure=days"],
}


def tables(kind: str) -> dict[str, pd.DataFrame]:
    """Simulated hospitals with features in units of their own, and columns that are none."""
    found = counts.simulated(5, 40) if kind == "counts" else survival.simulated(np.array([1.0, 2.0, 3.0, 4.0]), 5, 40)
    names = {"a": "age", "b": "bmi", "c": "crp", "count": "falls", "time": "days"}
    frames = {site: pd.DataFrame(table).rename(columns=names).assign(note="x") for site, table in found.items()}
    return {site: frame.assign(age=60 + 10 * frame["age"]) for site, frame in frames.items()}


@pytest.fixture(scope="module", params=["survival", "counts"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A run on four hospitals, and the folder that `fedmeta adapt` makes for the fifth; with its file."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "data").mkdir()
    for number, (site, frame) in enumerate(tables(kind).items()):
        frame.to_csv(folder / ("late.csv" if number == 4 else f"data/{site}.csv"), index=False)
    settings = [*KEYS[kind], 'problem.features=["age", "bmi", "crp"]', f"problem.path={folder / 'data'}"]
    settings += ["problem.center=[60, 0, 0]", "problem.scale=[10, 1, 1]", "data.new_sites=1", "server.rounds=3"]
    settings += ["problem.support=15", "problem.query=10", "learner.inner_lr=0.02", "learner.inner_steps=3"]
    settings += ["server.sites_per_round=0", "tracking.uri=none", f"tracking.folder={folder / 'runs'}"]
    run = fedmeta.run(Experiment().with_overrides([*settings, "evaluation.every=0"]))
    for file in (folder / "data").iterdir():
        file.unlink()
    found = CliRunner().invoke(
        app, ["adapt", str(run.folder), "--data", str(folder / "late.csv"), "--out", str(folder / "late"), "--json"]
    )
    assert not found.exit_code, found.output
    return kind, folder, run.folder


@pytest.mark.slow
def test_a_site_that_joins_predicts_from_columns_by_name(finished: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Without --code, though the run's own folder of tables is gone; equal to the problem's equations."""
    kind, folder, _ = finished
    assert str(folder) not in (folder / "late" / FILE).read_bytes().decode("latin-1")
    rows = tables(kind)["site-01"].drop(columns=["falls"] if kind == "counts" else ["days", "event"]).head(7)
    rows.loc[2, "age"] = 600.0
    rows[rows.columns[::-1]].to_csv(tmp_path / "rows.csv", index=False)
    found = CliRunner().invoke(app, ["predict", str(folder / "late"), "--data", str(tmp_path / "rows.csv"), "--json"])
    assert not found.exit_code, found.output
    summary = json.loads(found.stdout.splitlines()[-1])
    assert (summary["rows"], summary["far"]) == (7, 1)
    (tmp_path / "out.csv").write_text("\n".join(found.stdout.splitlines()[:-1]) + "\n")
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    own = load_file(folder / "late" / FILE)
    x = torch.tensor(((rows[list(FEATURES)] - [60, 0, 0]) / [10, 1, 1]).to_numpy(), dtype=torch.float32)
    if kind == "counts":
        expected = (own["bias"] + x @ own["weight"]).exp().numpy() * rows["days"].to_numpy()
        np.testing.assert_allclose(table["prediction"], expected, rtol=1e-5)
        return
    hazard = ((x @ own["weight"])[:, None] + own["baseline"]).sigmoid().numpy()
    np.testing.assert_allclose(table["risk"], hazard.sum(1), rtol=1e-5)
    np.testing.assert_allclose(table["survival_at_2"], (1 - hazard[:, 0]) * (1 - hazard[:, 1]), rtol=1e-5)


@pytest.mark.slow
def test_a_runs_folder_predicts_by_its_global_parameters(finished: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, _, run = finished
    MetaModel.of(checkpoint.newest(run)[0]).write(run / START_FILE)  # as a tracked run does
    rows = tables(kind)["site-00"]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    found = CliRunner().invoke(app, ["predict", str(run), "--data", str(tmp_path / "rows.csv")])
    assert not found.exit_code, found.output
    assert "adapted to no site" in found.output
    rows.drop(columns="bmi").to_csv(tmp_path / "rows.csv", index=False)
    found = CliRunner().invoke(app, ["predict", str(run), "--data", str(tmp_path / "rows.csv")])
    assert "lacks bmi" in str(found.exception)


@pytest.mark.slow
def test_sites_of_different_sizes_have_one_form_at_their_own_nodes(tmp_path: Path) -> None:
    from fedmeta.problems.source import form_of

    forms = set()
    for site, frame in zip(("a", "b"), tables("counts").values(), strict=False):
        frame.head(40 if site == "a" else 20).to_csv(tmp_path / f"{site}.csv", index=False)
        problem = counts.Counts(str(tmp_path / f"{site}.csv"), site, "falls", "days", FEATURES, 10, 5, most_test=12)
        forms.add(form_of(problem.task(site, "test", 0, 0)))
    assert len(forms) == 1
