"""Rare events: exact figures against samples, the cross-entropy step, and what a learned start does for new sites."""

import numpy as np
import pytest
import torch

from experiments.gallery import measure
from experiments.gallery.rare_events import rare_events as rare
from fedmeta.learners import build

PROBLEM = rare.RareEvents()


def data_of(site="portfolio-03"):
    return PROBLEM.task(site, "test", 0, 0).support


def test_probabilities_are_those_of_the_issue():
    chances = [rare.probability(data_of(site)) for site in PROBLEM.sites()]
    assert 1e-7 <= min(chances) < 5e-7
    assert 1e-6 < max(chances) <= 3e-6


def test_the_exact_second_moment_is_what_samples_give():
    data = data_of()
    shift = rare.likeliest(data)
    x = rare.draw(shift, 400_000, torch.tensor(5), 0)
    hits = (x @ data["weights"] > data["threshold"]) * rare.log_ratio(x, shift).exp()
    assert float(hits.mean()) == pytest.approx(rare.probability(data), rel=0.02)
    assert float(hits.square().mean()) == pytest.approx(float(PROBLEM.outer({"shift": shift}, data).exp()), rel=0.05)


def test_many_cross_entropy_steps_come_close_to_the_known_best_shift():
    data = data_of()
    own = PROBLEM.solver.solve(PROBLEM, PROBLEM.init(0), data, 15, {"shift": 0.7})[-1]["shift"]
    best = rare.likeliest(data)
    assert float((own - best).norm() / best.norm()) < 0.35
    direction = data["weights"] / data["weights"].norm()
    assert float(own @ direction) == pytest.approx(float(best @ direction), rel=0.1)


@pytest.mark.slow
def test_a_learned_start_makes_estimates_usable_after_one_step():
    result = measure.run("rare_events")
    new = measure.new_sites(result)
    learner = build("reptile", PROBLEM, inner_steps=3, inner_lr=0.7)
    learned = measure.scores(learner, result.meta_state, PROBLEM, new, 1)
    zero = measure.scores(learner, learner.init(0), PROBLEM, new, 1)
    assert len(new) == 30
    assert learned["off_by_a_fifth"][:, 1].mean() <= 0.05
    assert zero["off_by_a_fifth"][:, 1].mean() >= 0.9
    assert learned["log10_variance_cut"][:, 1].mean() >= 4
    assert np.isfinite(learned["log10_variance_cut"]).all()
