"""Draws other than uniform: unbiased, with less variance where norms have heavy tails; and rounds of them."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.progress import Progress
from server import clustered_sampling, fedvarp, optimal_sampling
from server.sampling import sample_cohort
from tests.server.digits import digits

Floats = NDArray[np.float64]
SITES, SIZE, DRAWS = 40, 8, 2000


def updates_of(tail: str, seed: int = 0) -> Floats:
    """Returns updates [sites, values] in four directions, with norms of a tail."""
    random = np.random.default_rng(seed)
    directions = np.eye(6)[np.arange(SITES) % 4] + 0.1 * random.normal(size=(SITES, 6))
    norms = {
        "equal": np.ones(SITES),
        "light": random.uniform(0.5, 1.5, SITES),
        "lognormal": random.lognormal(0, 1.5, SITES),
        "pareto": random.pareto(1.2, SITES) + 0.05,
    }[tail]
    return norms[:, None] * directions


def estimates(rule: str, updates: Floats, weights: Floats, draws: int = DRAWS) -> Floats:
    """Returns a rule's estimates of the weighted mean [draws, values]."""
    random, total = np.random.default_rng(1), weights.sum()
    weighed = updates * weights[:, None]
    found = []
    if rule == "optimal":
        chances = optimal_sampling.probabilities(np.linalg.norm(weighed, axis=1), SIZE)
    if rule == "approximate":
        chances = optimal_sampling.approximate_probabilities(np.linalg.norm(weighed, axis=1), SIZE)
    if rule == "clustered":
        sketches = np.array([clustered_sampling.sketch(update, 0) for update in updates])
        rows = clustered_sampling.distributions(sketches, weights, SIZE)
    for number in range(draws):
        if rule == "uniform":
            drawn = sample_cohort(np.arange(SITES), SIZE, 1, number)
            found.append(weighed[drawn].sum(0) * SITES / SIZE / total)
        elif rule == "clustered":
            times = clustered_sampling.draw(rows, random)
            found.append((times[:, None] * updates).sum(0) / SIZE)
        else:
            drawn = optimal_sampling.systematic(chances, random)
            found.append((weighed[drawn] / chances[drawn, None]).sum(0) / total)
    return np.array(found)


@pytest.mark.quick("rows-pareto-*")
@pytest.mark.parametrize("rule", ["uniform", "optimal", "approximate", "clustered"])
@pytest.mark.parametrize("tail", ["equal", "pareto"])
@pytest.mark.parametrize("weighing", ["alike", "rows"])
def test_the_mean_over_draws_is_the_mean_over_all_sites(rule: str, tail: str, weighing: str) -> None:
    updates = updates_of(tail)
    weights = np.ones(SITES) if weighing == "alike" else np.random.default_rng(2).integers(5, 60, SITES).astype(float)
    found = estimates(rule, updates, weights)
    error = found.mean(0) - (updates * weights[:, None]).sum(0) / weights.sum()
    deviation = found.std(0) / np.sqrt(DRAWS)
    assert (np.abs(error) <= 4.5 * deviation + 1e-12).all(), error / deviation


@cache
def ratio(rule: str, tail: str) -> float:
    """Returns the variance of a rule's estimates over that of uniform draws."""
    updates = updates_of(tail)
    own, uniform = (estimates(name, updates, np.ones(SITES)).var(0).sum() for name in (rule, "uniform"))
    return float(own / uniform)


@pytest.mark.quick("*-pareto")
@pytest.mark.parametrize("tail", ["equal", "light", "lognormal", "pareto"])
@pytest.mark.parametrize("rule", ["optimal", "clustered"])
def test_no_rule_has_more_variance_than_uniform_draws(rule: str, tail: str) -> None:
    assert ratio(rule, tail) < 1.05


@pytest.mark.parametrize("tail", ["lognormal", "pareto"])
def test_heavy_tails_are_worth_asking_for_norms(tail: str) -> None:
    assert ratio("optimal", tail) < 0.6


def test_sites_that_send_alike_are_worth_putting_together() -> None:
    assert ratio("clustered", "equal") < 0.3


@example([2.0, 2.0, 2.0, 2.225073858507203e-309, 2.225073858507203e-309], 4, 0)
@example([0.0, 1.0, 2.225073858507203e-309], 2, 0)
@example([5e-324, 5e-324, 1e-323], 1, 0)
@example([1e-12, 1.0, 1.0], 2, 0)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60), st.integers(1, 20), st.integers(0, 10))
def test_chances_are_chances_and_the_cohort_has_its_size(norms: list[float], size: int, seed: int) -> None:
    values = np.array(norms)
    for rule in (optimal_sampling.probabilities, optimal_sampling.approximate_probabilities):
        found = rule(values, size)
        assert ((found >= 0) & (found <= 1)).all()
        assert found.sum() <= min(size, len(values)) + 1e-6
    exact = optimal_sampling.probabilities(values, size)
    drawn = optimal_sampling.systematic(exact, np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn.tolist())) == round(float(exact.sum()))
    assert (exact[drawn] > 0).all()
    if values.any() and size < len(values):
        counted = np.count_nonzero(optimal_sampling.significant(values))
        assert exact.sum() == pytest.approx(min(size, counted))
        assert ((np.diff(exact[np.argsort(values, kind="stable")])) >= -1e-9).all()


def test_the_sums_alone_give_nearly_the_same_chances() -> None:
    norms = np.linalg.norm(updates_of("pareto"), axis=1)
    exact = optimal_sampling.probabilities(norms, SIZE)
    assert np.abs(optimal_sampling.approximate_probabilities(norms, SIZE) - exact).max() < 0.02


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 20))
def test_distributions_cover_each_site_by_its_weight(sites: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights, size = random.integers(1, 50, sites).astype(float), min(size, sites)
    found = clustered_sampling.distributions(random.normal(size=(sites, clustered_sampling.SKETCH)), weights, size)
    assert (found >= 0).all()
    assert np.allclose(found.sum(1), 1)
    assert np.allclose(found.sum(0), size * weights / weights.sum())


@pytest.mark.slow
def test_what_is_remembered_takes_the_variance_away_where_updates_stay() -> None:
    updates = {f"s{place}": torch.from_numpy(row) for place, row in enumerate(updates_of("pareto"))}
    sites = dict.fromkeys(updates, 1.0)
    mean = torch.stack(list(updates.values())).mean(0)
    memory: fedvarp.Memory = {}
    random, first, late = np.random.default_rng(0), [], []
    for number in range(200):
        drawn = random.choice(sorted(updates), SIZE, replace=False).tolist()
        own = {name: updates[name] for name in drawn}
        found = fedvarp.estimate(memory, sites, own, dict.fromkeys(drawn, SITES / SIZE))
        memory = fedvarp.remember(memory, own)
        (first if number < 10 else late).append(float((found - mean).norm()))
    assert len(memory) == SITES
    assert max(late[90:]) < 1e-5 < np.mean(first)
    # With a memory from elsewhere the mean over all draws is still the mean over all sites.
    wrong = {name: value.flip(0).float() for name, value in updates.items()}
    draws = [random.choice(sorted(updates), SIZE, replace=False).tolist() for _ in range(2000)]
    found = torch.stack([
        fedvarp.estimate(wrong, sites, {name: updates[name] for name in drawn}, dict.fromkeys(drawn, SITES / SIZE))
        for drawn in draws
    ])  # fmt: skip
    assert bool(((found.mean(0) - mean).abs() <= 4.5 * found.std(0) / len(draws) ** 0.5).all())


RULES: dict[str, tuple[str, ...]] = {
    "optimal": ("server.sampling=optimal",),
    "clustered": ("server.sampling=clustered",),
    "fedvarp": ("server.variance_reduction=fedvarp",),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_cohort_of_all_sites_is_the_plain_mean(tmp_path: Path, rule: str) -> None:
    everyone = ("server.sites_per_round=0", "server.rounds=2", "server.optimizer=sgd", "server.lr=0.1")
    plain = fedmeta.run(digits(tmp_path / "plain", *everyone))
    own = fedmeta.run(digits(tmp_path / "own", *everyone, *RULES[rule]))
    for name, value in plain.meta_state.items():
        assert torch.allclose(value, own.meta_state[name], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*RULES, "worst"])
def test_a_run_resumes_to_the_same_bits(tmp_path: Path, rule: str) -> None:
    keys = RULES.get(rule, ("server.objective=worst",))
    settings = (*keys, "runtime.checkpoint_every=1", "server.rounds=3", "evaluation.every=0")
    unbroken = fedmeta.run(digits(tmp_path / "unbroken", *settings))

    def stop(progress: Progress) -> None:
        if progress.round_number == 2 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(digits(tmp_path / "stopped", *settings), report=stop)
    resumed = fedmeta.run(digits(tmp_path / "stopped", *settings), resume="auto")
    assert all(torch.equal(value, resumed.meta_state[name]) for name, value in unbroken.meta_state.items())
    plain = fedmeta.run(digits(tmp_path / "plain", *settings[len(keys) :]))
    assert not all(torch.equal(value, plain.meta_state[name]) for name, value in unbroken.meta_state.items())


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "robust": (("server.sampling=optimal", "server.aggregator=median"), 'sampling .*: needs aggregator = "mean"'),
    "own draw": (
        ("server.sampling=tests.server.test_cohorts:updates_of", "server.variance_reduction=fedvarp"),
        "variance_reduction .*: of an own one no chances are known",
    ),
    "both": (("server.objective=q", "server.variance_reduction=fedvarp"), 'needs objective = "mean"'),
    "kept": (("server.sampling=optimal", "learner.name=ditto"), "keeps something at the sites"),
    "nothing": (("server.sampling=clustered", "learner.name=local"), "sends nothing"),
    "delta": (("server.objective=cvar", "learner.name=fedavg-ft"), "weights by loss are made for meta-gradients"),
    "private": (
        ("server.sampling=optimal", "privacy.clip_norm=1.0", "privacy.noise_multiplier=1.0"),
        "the accountant counts on a draw that is independent for each site",
    ),
    "private memory": (
        ("server.variance_reduction=fedvarp", "privacy.clip_norm=1.0", "privacy.noise_multiplier=1.0"),
        "a remembered update would count in rounds",
    ),
    "private losses": (
        ("server.objective=q", "privacy.clip_norm=1.0", "privacy.noise_multiplier=1.0"),
        "losses have no noise",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    keys, reason = REFUSED[case]
    with pytest.raises(FedmetaError, match=reason):
        fedmeta.run(digits(tmp_path, *keys))
