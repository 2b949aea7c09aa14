"""The genetic code: published figures, the search by sums of swaps, and that there is nothing to personalize."""

import numpy as np
import pytest
import torch

pytest.importorskip("python_codon_tables", reason="the package python-codon-tables has the organisms' codon usage")

from experiments.gallery import measure
from experiments.gallery.genetic_code import genetic_code as code

STANDARD = torch.arange(20.0)


def standard_error(weight, organism=""):
    return float(code.errors(STANDARD[None], torch.from_numpy(code.mistakes(weight, organism))))


def test_the_error_of_the_standard_code_is_the_published_one():
    assert standard_error("equal") == pytest.approx(5.194, abs=5e-4)


def test_errors_are_what_the_definition_gives_codon_by_codon():
    order = code.random_code(3)
    acid = {letter: code.ACIDS[int(order[code.ACIDS.index(letter)])] for letter in code.ACIDS}
    pairs = code.single_letter(code.freeland_hurst)
    squares = [(code.POLAR[acid[code.STANDARD[a]]] - code.POLAR[acid[code.STANDARD[b]]]) ** 2 for a, b, _ in pairs]
    expected = np.average(squares, weights=[share for *_, share in pairs])
    found = code.errors(order[None], torch.from_numpy(code.mistakes("freeland-hurst")))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_a_random_code_is_rarely_better():
    draw = code.random_errors(code.mistakes("equal"), 1_000_000, seed=0)
    assert draw.mean() == pytest.approx(9.41, abs=0.02)
    assert (draw < standard_error("equal")).mean() == pytest.approx(1.1e-4, abs=0.2e-4)


@pytest.mark.slow
def test_with_freeland_and_hursts_weights_about_one_in_a_million_is_better():
    draw = code.random_errors(code.mistakes("freeland-hurst"), 2_000_000, seed=0)
    assert 0 < (draw < standard_error("freeland-hurst")).sum() <= 8


def test_blocks_explain_part_and_the_assignment_the_rest():
    shuffled = code.shuffled_errors("equal", 500, seed=0).mean()
    blocks = code.random_errors(code.mistakes("equal"), 20_000, seed=0).mean()
    assert shuffled > blocks + 2
    assert blocks > standard_error("equal") + 4


@pytest.mark.slow
def test_the_search_by_sums_finds_the_best_known_code():
    settings = ("problem.weight=equal", "problem.usage=false", "data.new_sites=0", "server.rounds=800")
    state = measure.run("genetic_code", *settings).meta_state
    shares = torch.from_numpy(code.mistakes("equal"))
    best = float(code.errors(code.ranks(state["theta.order"])[None], shares))
    assert best == pytest.approx(3.489, abs=5e-4)
    neighbors = code.errors(code.swapped(code.ranks(state["theta.order"])), shares)
    assert float(neighbors.min()) >= best - 1e-9


@pytest.mark.slow
def test_organisms_have_nothing_to_personalize():
    summary = measure.run("genetic_code", "server.rounds=300").summary
    new = summary["new_sites"]
    assert new["n"] == 3
    assert new["personalized"]["mean"] == pytest.approx(new["global"]["mean"], rel=0.01)
    standard = np.mean([standard_error("freeland-hurst", site) for site in code.GeneticCode().sites()])
    assert new["global"]["mean"] < standard
