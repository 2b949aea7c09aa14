"""Prediction sets: their coverage on made-up sites, where the threshold comes from, and what the folder holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmeta.adapt.conformal import FILE, Sets, deal, make_sets
from fedmeta.adapt.initialization import Form, MetaModel, Record
from fedmeta.adapt.model import SiteModel
from fedmeta.build import learner_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment

CLASSES = ("a", "b", "c")


def start(regression: bool = False, *overrides: str) -> MetaModel:
    settings = ["data.source=tables", "data.path=rows", "model.name=logistic", "learner.inner_lr=0.3", *overrides]
    experiment = Experiment().with_overrides(settings)
    form = Form((2,), ("p", "q"), () if regression else CLASSES, regression, False, ("y",) if regression else ())
    learner = learner_of(experiment, form.shape, form.classes, form.outputs)
    mean, scale = torch.zeros(2).double(), torch.ones(2).double()
    return MetaModel(experiment, "run", 3, dict(learner.init(0)), mean, scale, form, 3, 1.0)


def site(seed: int, rows: int, regression: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a made-up site with an own direction, with labels that noise makes uncertain."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=draw, dtype=torch.float64)
    outputs = x @ torch.randn(2, 3, generator=draw, dtype=torch.float64) * 2
    noise = torch.randn(rows, 3, generator=draw, dtype=torch.float64)
    return x, (outputs + noise)[:, 0] if regression else (outputs + noise).argmax(-1)


def sets_of(own: MetaModel, x: torch.Tensor, y: torch.Tensor) -> Sets:
    model = SiteModel.of(own, own.learner.adapt(own.state, (x.float(), y if not own.form.regression else y.float()), 3))
    found = make_sets(own, model, x, y)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("rows", [10, 25])
def test_they_cover_nine_in_ten_further_rows(rows: int, regression: bool) -> None:
    own = start(regression)
    covered, sizes = [], []
    for seed in range(60):
        x, y = site(seed, rows + 200, regression)
        share, size = sets_of(own, x[:rows], y[:rows]).covered(x[rows:], y[rows:])
        covered.append(share)
        sizes.append(size)
    assert np.mean(covered) >= 0.9 - 2 * np.std(covered) / np.sqrt(len(covered))
    assert np.mean(sizes) < 3 or regression, "not the whole of three classes at each row"


def test_with_too_few_rows_everything_is_in_the_set() -> None:
    for regression in (False, True):
        own = start(regression)
        x, y = site(1, 8, regression)
        found = sets_of(own, x, y)
        assert found.facts.threshold is None
        assert "too few" in found.facts.guarantee
        assert found.covered(x, y)[0] == 1.0
    assert sets_of(start(), *site(1, 9)).facts.threshold is not None


def test_where_adapting_did_not_help_others_the_score_adapts_to_no_row() -> None:
    own = replace(start(), record=Record(9, -0.1, -0.2, -0.05, 0.8))
    x, y = site(3, 19)
    found = sets_of(own, x, y)
    assert (found.facts.folds, found.facts.steps, found.facts.rank) == (1, 0, 18)
    bare = SiteModel.of(own, own.learner.theta(own.state))
    scores = 1 - bare(x).detach().double().numpy()[np.arange(19), y.numpy()]
    assert found.facts.threshold == pytest.approx(np.sort(scores)[17])
    assert "split-conformal by all rows" in found.facts.guarantee


def test_folds_are_equal_and_take_no_label() -> None:
    own = start()
    for rows, folds, size in ((10, 10, 1), (40, 40, 1), (41, 20, 2), (60, 30, 2), (95, 31, 3)):
        parts = deal(rows, 3, 10, own)
        assert np.bincount(parts[parts >= 0]).tolist() == [size] * folds
    assert deal(95, 3, 1 << 30, own).max() == 8
    x, y = site(5, 95)
    found = sets_of(own, x, y)
    assert (found.facts.rank, found.facts.left_out) == (87, 3)


def test_blocks_have_no_guarantee() -> None:
    assert "without a guarantee" in sets_of(start(False, "data.split=blocks"), *site(4, 30)).facts.guarantee


def test_a_file_is_of_one_model_alone(tmp_path: Path) -> None:
    own = start()
    x, y = site(6, 30)
    found = sets_of(own, x, y)
    found.write(tmp_path / FILE)
    read = Sets.read(tmp_path / FILE, found.model)
    assert read.facts == found.facts
    np.testing.assert_array_equal(read.classes(x), found.classes(x))
    assert read.classes(x)[np.arange(30), found.model(x).argmax(-1)].all(), "the predicted class is in every set"
    other = sets_of(own, *site(7, 30))
    with pytest.raises(FedmetaError, match="another model"):
        Sets.read(tmp_path / FILE, other.model)
