"""Whole runs in this process, over every kind of rows and labels that a file may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedmeta import run
from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS, Experiment
from fedmeta.progress import Progress
from tests.deployment.processes import write_sites

ROWS = 160
RNG = np.random.default_rng(0)
SITE = RNG.integers(0, 6, ROWS)
X = RNG.normal(size=(ROWS, 5)).astype(np.float32)
X[RNG.random(X.shape) < 0.1] = np.nan
X[:, 3] = 2.0
TARGET = (np.nan_to_num(X[:, 0]) + 0.3 * SITE + 0.1 * RNG.normal(size=ROWS)).astype(np.float32)
LABEL = (TARGET > 1).astype(np.int64)
NAMES = np.array(["Zürich/Ost", "a b", "c:d", "//", "x" * 64, "plain"])
ODD = np.where(np.arange(ROWS) == 0, 9, LABEL)

FILES: dict[str, dict[str, Any]] = {
    "regression": {"x": X, "y": TARGET, "site": SITE},
    "regression in float64": {"x": X.astype(np.float64), "y": TARGET.astype(np.float64), "site": SITE},
    "odd names": {"x": X, "y": LABEL, "site": SITE, "site_names": NAMES, "class_names": np.array(["no", "yes"])},
    "sites and labels as texts": {"x": X, "y": np.array(["u", "v"])[LABEL], "site": NAMES[SITE]},
    "truths": {"x": RNG.integers(0, 5, (ROWS, 5)), "y": LABEL > 0, "site": SITE},
    "float16, a label and a row of a site alone": {
        "x": X.astype(np.float16),
        "y": ODD,
        "site": np.where(np.arange(ROWS) == 1, 7, SITE),
    },
    "images": {"x": RNG.integers(0, 255, (ROWS, 6, 6)).astype(np.uint8), "y": LABEL, "site": SITE},
}


def experiment(folder: Path, columns: dict[str, Any], *overrides: str) -> Experiment:
    np.savez(folder / "sites.npz", **columns)
    settings = ("data.source=npz", f"data.path={folder / 'sites.npz'}", "server.rounds=2", "evaluation.every=1")
    own = ("model.hidden=8", "tracking.uri=none", f"tracking.folder={folder / 'runs'}", "data.support=6")
    return Experiment().with_overrides([*settings, *own, *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_is_trained_on_and_judged(tmp_path: Path, kind: str) -> None:
    result = run(experiment(tmp_path, FILES[kind], "evaluation.gate=true", "evaluation.schedule=auto"))
    score = "rmse" if kind.startswith("regression") else "accuracy"
    assert result.summary["score"]["name"] == score
    assert result.summary["failures"] == 0
    sites = set(FILES[kind]["site"].tolist())
    assert len(result.sites) == len(sites)
    scored_rows = result.sites[result.sites["test_rows"] > 0]
    assert len(scored_rows) >= len(sites) - 1
    assert scored_rows[f"personalized_{score}"].notna().all()
    assert np.isfinite([result.summary["new_sites"][when]["mean"] for when in ("global", "personalized")]).all()
    assert result.summary["bytes_up"] > 0


@pytest.mark.quick("maml", "fedrep")
@pytest.mark.parametrize("learner", [name for name in LEARNERS if name != "protonet"])
def test_every_learner_takes_regression(tmp_path: Path, learner: str) -> None:
    columns = FILES["regression"]
    result = run(experiment(tmp_path, columns, f"learner.name={learner}", "learner.inner_lr=0.05"))
    assert result.summary["failures"] == 0
    assert np.isfinite(result.sites["personalized_rmse"]).all()


@pytest.mark.slow
def test_the_control_variate_of_scaffold_is_the_mean_of_what_its_sites_keep(tmp_path: Path) -> None:
    """Two of the training sites a round, of which each keeps the c_i of its last round."""
    settings = ("learner.name=scaffold", "server.sites_per_round=2", "server.rounds=5", "learner.local_epochs=1")
    result = run(experiment(tmp_path, FILES["regression"], *settings, "learner.inner_lr=0.05"))
    found = [sorted(site.glob("*.safetensors"))[-1] for site in (result.folder / "personal").iterdir()]
    training = int((result.sites["kind"] == "training").sum())
    assert 2 < len(found) <= training
    for name, value in result.meta_state.items():
        if name.startswith("control."):
            total = sum(load_file(path)[name.removeprefix("control.")].double() for path in found)
            assert torch.allclose(value.double(), total / training, atol=1e-6)
            assert float(value.abs().max()) > 1e-4


def test_a_learner_of_classes_refuses_numbers_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r'name = "protonet" needs classes, and the labels here are numbers'):
        run(experiment(tmp_path, FILES["regression"], "learner.name=protonet"))


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_its_own_experiment_alone(tmp_path: Path) -> None:
    own = experiment(tmp_path, FILES["regression"])
    name = run(own).folder.name
    with pytest.raises(FedmetaError, match=r"a run of another experiment, with server.rounds = 2 and not 5.*toml"):
        run(own.with_overrides(["server.rounds=5"]), resume=name)
    with pytest.raises(FedmetaError, match="names no run"):
        run(own, resume="")
    assert run(own.with_overrides(["tracking.site_curves=3"]), resume=name).folder.name == name


@pytest.mark.slow
def test_data_that_changed_between_two_runs_are_read_again(tmp_path: Path) -> None:
    first = run(experiment(tmp_path, FILES["regression"]))
    same = run(experiment(tmp_path, FILES["regression"]))
    assert same.summary["training_sites"] == first.summary["training_sites"]
    other = run(experiment(tmp_path, {**FILES["regression"], "y": TARGET + 1}))
    assert other.summary["training_sites"] != first.summary["training_sites"]


@pytest.mark.slow
def test_nobody_is_waited_for_who_cannot_come(tmp_path: Path) -> None:
    files = write_sites(tmp_path / "data")
    settings = ("data.source=tables", f"data.path={tmp_path / 'data'}", "server.rounds=4", "runtime.checkpoint_every=1")
    own = Experiment().with_overrides([*settings, "tracking.uri=none", f"tracking.folder={tmp_path / 'runs'}"])
    # The deadline is its default, ten minutes.
    with pytest.raises(FedmetaError, match=r"^server.wait_for is not met, still missing: site-9$"):
        run(own.with_overrides(['server.wait_for=["site-0", "site-9"]']))

    def stop(progress: Progress) -> None:
        if progress.round_number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(own, report=stop)
    files["site-1"].unlink()
    resumed = run(own, resume="auto")
    assert resumed.summary["rounds"] == 4
    assert "site-1" in (resumed.folder / "failures.json").read_text()


@pytest.mark.slow
def test_features_that_share_a_name_are_known_by_their_place(tmp_path: Path) -> None:
    """UCI's activity data name 84 of their 561 features twice or more."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 3)).astype(np.float32), np.arange(60) % 2
    x[:, 2] += 4 * y
    names = np.array(["energy", "mean", "energy"])
    np.savez(tmp_path / "twice.npz", x=x, y=y, site=np.arange(60) // 15, feature_names=names)
    settings = ["data.source=npz", f"data.path={tmp_path / 'twice.npz'}", "data.new_sites=1", "server.rounds=5"]
    settings += ["model.name=logistic", "learner.inner_lr=0.5", "tracking.uri=none", f"tracking.folder={tmp_path}"]
    result = run(Experiment.from_toml("", overrides=settings))
    assert result.summary["new_sites"]["personalized"]["mean"] > 0.9
