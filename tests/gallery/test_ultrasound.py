"""Adaptive ultrasound: the theory's coherence, and a learned start where bodies share something or nothing."""

import numpy as np
import pytest
import torch

from experiments.gallery import measure
from experiments.gallery.ultrasound import ultrasound as us
from fedmeta.errors import FedmetaError
from fedmeta.learners import build


def test_ideal_speckle_in_focus_has_two_thirds_of_full_coherence():
    found = []
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        delays = us.screen(random, 21.3e-9) + us.fat(30e-3)
        found.append(float(us.coherence(us.capture(delays, 4, random, float("inf")), delays)))
    assert np.mean(found) == pytest.approx(2 / 3, abs=0.02)


def test_a_point_target_without_noise_is_fully_coherent():
    echoes = torch.ones(1, 5, us.ELEMENTS, us.ELEMENTS, dtype=torch.complex64)
    assert float(us.coherence(echoes, torch.zeros(us.ELEMENTS))) == pytest.approx(1)


def test_screens_and_fat_are_the_published_ones():
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([us.screen(random, 21.3e-9) for _ in range(400)])
    assert float(drawn.square().mean().sqrt()) == pytest.approx(21.3e-9, rel=0.15)
    assert float(drawn.mean(0).abs().max()) < 5e-9
    layer = us.fat(30e-3)
    assert float(layer[0] - layer[us.ELEMENTS // 2]) == pytest.approx(30e-3 * (1 / 1450 - 1 / 1540) * 0.107, rel=0.05)


def test_an_unknown_tissue_is_refused():
    with pytest.raises(FedmetaError, match=r'problem\.tissue = "bone"'):
        us.Ultrasound("bone")


@pytest.mark.slow
def test_true_delays_leave_no_residual_and_a_sharp_picture():
    problem = us.Ultrasound("fat", 1)
    data = problem.task("body-00", "test", 0, 0).query
    own = us.MODES.T @ data["delays"] / us.ELEMENTS / us.UNIT
    figures = [problem.evaluate({"modes": start}, data) for start in (own, torch.zeros(32))]
    assert figures[0]["residual"] < 0.25 * figures[1]["residual"]
    sharp, blurred = (problem.picture({"modes": start}, data) for start in (own, torch.zeros(32)))
    assert sharp.max() > blurred.max() + 0.02
    row, column = np.unravel_index(sharp.argmax(), sharp.shape)
    assert abs(row - 35.5) <= 1
    assert min(abs(column - target) for target in (17.8, 47.5, 77.2)) <= 1


def trained(tissue):
    result, problem = measure.run("ultrasound", f"problem.tissue={tissue}"), us.Ultrasound(tissue)
    learner, new = build("maml", problem, inner_steps=5, inner_lr=14.0), measure.new_sites(result)
    both = [measure.scores(learner, state, problem, new, 5) for state in (result.meta_state, learner.init(0))]
    return tuple(scores["of_true_delays"][:, -1].mean() for scores in both)


@pytest.mark.slow
def test_where_bodies_share_a_layer_a_learned_start_comes_close_to_true_delays_in_five_steps():
    learned, zero = trained("fat")
    assert learned >= 0.9
    assert zero <= 0.88


@pytest.mark.slow
def test_where_they_share_nothing_it_does_not_help():
    learned, zero = trained("chest")
    assert abs(learned - zero) < 0.03


def test_foci_of_a_test_are_never_trained_on_and_support_and_query_are_apart():
    problem = us.Ultrasound("chest", 1)
    test = problem.task("body-00", "test", 0, 0)
    assert [len(part["echoes"]) for part in test] == [3, 4]
    scored = [focus for part in test for focus in part["echoes"]]
    for number in range(1, 8):
        support, query = problem.task("body-00", "train", number, 0)
        assert [len(support["echoes"]), len(query["echoes"])] == [3, 4]
        for focus in support["echoes"]:
            assert not any(torch.equal(focus, other) for other in [*query["echoes"], *scored])
        assert not any(torch.equal(focus, other) for focus in query["echoes"] for other in scored)
