"""The how-tos show the files of examples/, these are short, and they run."""

import json

import numpy as np
import pytest
import torch

import fedmeta
from examples.own_aggregator import geometric_median
from examples.own_forecast import write_recordings
from examples.own_sampling import in_turn
from examples.own_source import Recordings
from tests.pages import ROOT, read, run

HOWTOS = sorted((ROOT / "docs" / "howto").glob("*.md"))
PAGES = [*HOWTOS, *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
MOST_LINES = 40


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_its_files_as_they_are(path):
    for name, text in read(path).files.items():
        assert (ROOT / name).read_text() == text, f"{path.name} shows another {name}"


@pytest.mark.parametrize("path", HOWTOS, ids=lambda path: path.stem)
def test_a_howto_needs_few_lines(path):
    files = read(path).files
    assert {name.rsplit(".", 1)[1] for name in files} == {"py", "toml"}
    for name, text in files.items():
        assert len(text.splitlines()) < MOST_LINES, name


@pytest.mark.slow
@pytest.mark.parametrize("path", HOWTOS, ids=lambda path: path.stem)
def test_a_howto_works_line_by_line(path, tmp_path):
    assert "personalized" in run(read(path), tmp_path)[-1]


def result_of(name, tmp_path, monkeypatch, *overrides):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    few = ["server.rounds=3", "evaluation.every=0", "evaluation.local_baseline=none", "tracking.uri=none", *overrides]
    return fedmeta.run(fedmeta.load_experiment(ROOT / "examples" / f"{name}.toml", few))


@pytest.mark.slow
def test_the_example_model_is_the_one_that_learns(tmp_path, monkeypatch):
    result = result_of("own_model", tmp_path, monkeypatch)
    layers = [name for name in result.meta_state if name.endswith("layers.1.weight")]
    assert len(layers) == 2
    assert all(result.meta_state[name].shape == (48, 48) for name in layers)


@pytest.mark.slow
def test_the_example_learner_differs_from_maml_by_its_decay(tmp_path, monkeypatch):
    maml = result_of("own_learner", tmp_path, monkeypatch, "learner.name=maml").summary["new_sites"]["personalized"]
    for decay, same in ((1.0, True), (0.6, False)):
        own = result_of("own_learner", tmp_path, monkeypatch, f"learner.decay={decay}").summary["new_sites"]
        assert (own["personalized"]["loss"] == pytest.approx(maml["loss"], abs=1e-5)) == same


def test_the_example_data_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile((ROOT / "examples" / "own_data.py").read_text(), "own_data.py", "exec"), {})
    with np.load("data/diabetes.npz") as arrays:
        assert len(arrays["x"]) == len(arrays["y"]) == len(arrays["site"]) == 442
    summary = result_of("own_data", tmp_path, monkeypatch, f"data.path={tmp_path}/data/diabetes.npz").summary
    assert summary["score"]["name"] == "rmse"
    assert summary["new_sites"]["n"] + summary["training_sites"]["n"] == 13
    assert json.dumps(summary["new_sites"]["personalized"]["mean"]) != "null"


def test_the_example_metric_is_the_score_and_counts_two_classes(tmp_path, monkeypatch):
    found = result_of("own_metric", tmp_path, monkeypatch).summary
    assert found["score"] == {"name": "top2", "higher_is_better": True, "unit": ""}
    metrics = found["new_sites"]["personalized"]["metrics"]
    assert metrics["top2"]["mean"] >= metrics["accuracy"]["mean"]


@pytest.mark.slow
def test_the_example_solver_is_what_sites_adapt_by(tmp_path, monkeypatch):
    result = result_of("own_solver", tmp_path, monkeypatch)
    assert result.summary["new_sites"]["personalized"]["loss"] < result.summary["new_sites"]["global"]["loss"]


@pytest.mark.slow
def test_the_example_loss_passes_its_check_and_changes_what_is_learned(tmp_path, monkeypatch):
    losses = {
        growth: result_of("own_loss", tmp_path, monkeypatch, f"problem.growth={growth}").summary["new_sites"]
        for growth in (1.0, 1.5)
    }
    plain = result_of("own_aggregator", tmp_path, monkeypatch, "server.aggregator=mean").summary["new_sites"]
    assert losses[1.0]["global"]["loss"] == pytest.approx(plain["global"]["loss"], abs=1e-5)
    assert losses[1.5]["global"]["loss"] != pytest.approx(plain["global"]["loss"], abs=1e-3)


def test_the_example_source_keeps_test_windows_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recordings"
    folder.mkdir()
    write_recordings(str(folder))
    summary = result_of("own_source", tmp_path, monkeypatch).summary
    assert summary["score"]["name"] == "r2"
    assert summary["new_sites"]["personalized"]["mean"] > summary["new_sites"]["global"]["mean"]
    source = Recordings(str(folder))
    train, test = (source.task("probe-00", purpose, 0, 0) for purpose in ("train", "test"))
    assert not set(map(tuple, train.support.tolist())) & set(map(tuple, test.query.tolist()))


@pytest.mark.slow
def test_the_example_cohorts_take_turns(tmp_path, monkeypatch):
    sites = [f"site-{number}" for number in range(5)]
    drawn = [in_turn(sites, [1] * 5, 2, number, np.random.default_rng(0)) for number in range(1, 6)]
    assert sorted(site for cohort in drawn for site in cohort) == sorted(sites * 2)
    plain = result_of("own_sampling", tmp_path, monkeypatch, "server.sampling=uniform", "server.sites_per_round=3")
    own = result_of("own_sampling", tmp_path, monkeypatch, "server.sites_per_round=3")
    assert own.summary["new_sites"]["global"]["loss"] != plain.summary["new_sites"]["global"]["loss"]


@pytest.mark.slow
def test_the_example_aggregator_withstands_a_false_gradient(tmp_path, monkeypatch):
    gradients = torch.cat([torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4), 1e4)])
    assert geometric_median(gradients).norm() < 2
    assert result_of("own_aggregator", tmp_path, monkeypatch).summary["failures"] == 0
