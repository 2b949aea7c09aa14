"""The how-tos show the files of examples/, these are short, and they run."""

import json

import numpy as np
import pytest

import fedmeta
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
    few = ["server.rounds=3", "evaluation.every=0", "tracking.uri=none", *overrides]
    return fedmeta.run(fedmeta.load_experiment(ROOT / "examples" / f"{name}.toml", few))


def test_the_example_model_is_the_one_that_learns(tmp_path, monkeypatch):
    result = result_of("own_model", tmp_path, monkeypatch)
    layers = [name for name in result.meta_state if name.endswith("layers.1.weight")]
    assert len(layers) == 2
    assert all(result.meta_state[name].shape == (48, 48) for name in layers)


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
