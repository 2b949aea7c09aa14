"""Noise, draws, the accountant, the budget and its ledger; what makes no sense together is refused."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from clients.app import app
from fedmeta import run
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import TrainReply
from fedmeta.progress import Progress
from fedmeta.runtime.local import LocalGrid
from server import privacy as module
from server import training_loop
from server.accountant import INTERVAL, Accountant, _loss_of_a_round
from server.privacy import BUDGET_FILE, SiteLevelDP, noise
from tests.server.digits import digits
from tests.server.test_strategy import strategy_over, train
from tests.several_nodes import SeveralNodes, silence

NOISY = ("privacy.clip_norm=0.5", "privacy.noise_multiplier=2.0")


def private(folder: Path, *overrides: str, sites: int = 32) -> SiteLevelDP:
    return SiteLevelDP(digits(folder, *NOISY, *overrides), sites, folder)


# ---------------------------------------------------------------- noise and draws


def test_noise_is_standard_normal_and_never_the_same() -> None:
    values = noise((200, 500))
    assert values.shape == (200, 500)
    assert values.dtype == torch.float64
    assert kstest(values.flatten().numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(values, noise((200, 500)))
    assert noise(()).shape == ()


@pytest.mark.slow
def test_noise_has_the_scale_that_was_asked_for(tmp_path: Path) -> None:
    privacy = private(tmp_path, "privacy.clip_norm=0.7")
    like = {"theta": torch.zeros(100_000)}
    total = torch.full((100_000,), 16.0, dtype=torch.float64)
    reply = TrainReply({"theta": total}, 3.0, ("a", "b", "c"), np.zeros(3), np.ones(3, dtype=bool))
    found = privacy.release([reply], like)["theta"]
    # The denominator is the expected cohort of 8 who came; the deviation is 2.0 * 0.7 / 8 = 0.175.
    assert float(found.mean()) == pytest.approx(2.0, abs=5 * 0.175 / math.sqrt(100_000))
    assert float(found.std()) == pytest.approx(0.175, rel=0.02)
    alone = privacy.release([], like)["theta"]
    assert float(alone.std()) == pytest.approx(0.175, rel=0.02)


def test_each_site_is_drawn_by_itself_with_the_same_chance(tmp_path: Path) -> None:
    privacy = private(tmp_path)
    cohorts = [privacy.sample(np.arange(32)) for _ in range(2000)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    counts = np.bincount(np.concatenate(cohorts), minlength=32)
    # Binomial: 32 draws of chance 1/4 a round, 2000 draws of chance 1/4 a site.
    assert sizes.mean() == pytest.approx(8, abs=0.3)
    assert sizes.var() == pytest.approx(6, rel=0.2)
    assert (abs(counts - 500) < 6 * math.sqrt(375)).all()
    assert all((np.diff(cohort) > 0).all() for cohort in cohorts)
    whole = private(tmp_path, "server.sites_per_round=0")
    assert len(whole.sample(np.arange(32))) == 32


# ---------------------------------------------------------------- the accountant


def test_epsilon_without_sampling_is_that_of_the_gaussian_mechanism() -> None:
    # n rounds of noise sigma are one of sigma / sqrt(n); its delta is Balle and Wang 2018, theorem 8.
    sigma, delta = 4.0, 1e-5
    for count in (1, 20):
        noise = sigma / math.sqrt(count)

        def excess(epsilon: float, noise: float = noise) -> float:
            lower, upper = (sign / (2 * noise) - epsilon * noise for sign in (1, -1))
            return float(norm.cdf(lower) - math.exp(epsilon) * norm.cdf(upper)) - delta

        exact = brentq(excess, 0.0, 50.0)
        found = Accountant(50, 50, sigma, delta).epsilon(count)
        assert exact - 1e-6 <= found <= exact + 0.002


def test_epsilon_of_a_known_setting() -> None:
    # MNIST in the tutorial of TensorFlow Privacy: 60 000 rows, batches of 256, noise 1.1, 60 epochs: epsilon 2.92 there
    # by Renyi divergences; privacy loss distributions are tighter.
    found = Accountant(60_000, 256, 1.1, 1e-5).epsilon(14_063)
    assert 2.3 < found <= 2.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "count"),
    [
        (Accountant(100, 20, 2.0, 1e-5), 1000),
        (Accountant(1000, 50, 1.0, 1e-5), 100),
        (Accountant(200, 40, 5.0, 1e-6), 9),
    ],
)
def test_the_grid_makes_epsilon_a_little_larger_and_never_smaller(terms: Accountant, count: int) -> None:
    fine = _loss_of_a_round(terms.expected / terms.sites, terms.noise_multiplier, INTERVAL / 20)
    exact = fine.self_compose(count).get_epsilon_for_delta(terms.delta)
    assert exact - 1e-6 <= terms.epsilon(count) <= exact + 0.002


def test_sampling_lowers_epsilon_and_rounds_raise_it() -> None:
    few, all_ = Accountant(400, 20, 1.0, 1e-5), Accountant(400, 400, 1.0, 1e-5)
    assert few.epsilon(10) < all_.epsilon(10)
    assert few.epsilon(0) == 0
    assert few.epsilon(10) < few.epsilon(11)
    allowed = few.rounds_within(2.0, 1000)
    assert few.epsilon(allowed) <= 2.0 < few.epsilon(allowed + 1)
    assert few.rounds_within(2.0, 3) == 3
    assert few.rounds_within(1e-3, 1000) == 0


# ---------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_budget_ends_the_run_with_an_evaluation_and_a_checkpoint(tmp_path: Path) -> None:
    notes: list[Progress] = []
    allowed = Accountant(32, 8, 2.0, 1e-5)
    budget = allowed.epsilon(3) + 0.01
    result = run(digits(tmp_path, *NOISY, f"privacy.epsilon={budget}", "server.rounds=9"), report=notes.append)
    assert result.summary["rounds"] == 3
    assert result.summary["privacy"] == {"epsilon": allowed.epsilon(3), "delta": 1e-5, "rounds": 3}
    assert any("ends the run after 3 of 9 rounds" in note.note for note in notes)
    assert notes[-1].rounds == 3
    assert set(result.history["round"]) == {0, 2, 3}
    assert Path(result.summary["checkpoint"]).name == "round-000003.safetensors"


@pytest.mark.slow
def test_two_private_runs_of_one_seed_differ(tmp_path: Path) -> None:
    states = [run(digits(tmp_path, *NOISY, "server.rounds=1", "evaluation.every=0")).meta_state for _ in range(2)]
    assert not torch.equal(states[0]["theta.1.weight"], states[1]["theta.1.weight"])


def test_rounds_that_a_resumed_run_repeats_are_paid_for_twice(tmp_path: Path) -> None:
    experiment = digits(tmp_path, *NOISY, "server.rounds=6", "runtime.checkpoint_every=2", "evaluation.every=0")

    def stop(progress: Progress) -> None:
        if progress.round_number == 3:
            raise RuntimeError("the machine dies")

    with pytest.raises(RuntimeError):
        run(experiment, report=stop)
    folder = next((tmp_path / "runs").iterdir())
    assert json.loads((folder / BUDGET_FILE).read_text()) == {"rounds": 3, "sites": 32}
    summary = run(experiment, resume="auto").summary
    assert summary["rounds"] == 6
    assert summary["privacy"]["rounds"] == 7
    assert summary["privacy"]["epsilon"] == Accountant(32, 8, 2.0, 1e-5).epsilon(7)


def test_a_disk_that_does_not_take_the_ledger_ends_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(FedmetaError, match=r"privacy\.json: cannot be written: No space left on device$"):
        run(digits(tmp_path, *NOISY))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "privacy the run has spent, and cannot be read"),
        ("{}", "privacy the run has spent, and cannot be read"),
        ('{"rounds": 2, "sites": 9}', "the run had 9 training sites and now has 32"),
    ],
)
def test_a_run_does_not_continue_without_its_ledger(tmp_path: Path, content: str | None, line: str) -> None:
    if content is not None:
        (tmp_path / BUDGET_FILE).write_text(content)
    with pytest.raises(FedmetaError, match=line):
        SiteLevelDP(digits(tmp_path, *NOISY), 32, tmp_path, done=2)


def test_a_private_round_steps_also_where_nobody_answers(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path, *NOISY), 2)
    strategy = strategy_over(grid)
    strategy.privacy = private(tmp_path)
    grid.faults = dict.fromkeys(grid.get_node_ids(), silence)
    gradient, metrics = train(grid, strategy)
    assert metrics is not None
    assert metrics["sites"] == 0
    assert "query_loss" not in metrics
    assert all(value.any() for value in gradient.values())


def test_a_sum_longer_than_clipping_allows_is_a_bad_reply(tmp_path: Path) -> None:
    # These sites clip at 50 and not at 0.5.
    grid = SeveralNodes(app, digits(tmp_path, "privacy.clip_norm=50.0", "model.activation=tanh"), 2)
    strategy = strategy_over(grid)
    strategy.privacy = private(tmp_path, "privacy.clip_norm=0.001", "server.sites_per_round=0")
    train(grid, strategy)
    assert len(strategy.log.failed) == 32
    assert set(strategy.log.failed.values()) == {"bad reply: its gradient is longer than privacy.clip_norm allows"}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("server.weighting=examples", r'\[server\] weighting = "examples": must be "uniform" with privacy'),
        ("server.aggregator=median", r'\[server\] aggregator = "median": must be "mean" with privacy'),
        ("server.admit=true", r"\[server\] admit = true: must be false"),
        ("server.min_sites=2", r"\[server\] min_sites = 2: must be 1"),
        ("learner.name=local", "there is nothing to protect"),
        ("learner.name=ditto", "keeps nothing at the sites"),
        ("privacy.delta=0.1", "must be below 1/32"),
        ("privacy.epsilon=0.01", "the first round already takes"),
    ],
)
def test_what_makes_no_sense_with_noise_is_refused_in_one_line(tmp_path: Path, override: str, line: str) -> None:
    experiment = digits(tmp_path, *NOISY, override)
    with pytest.raises(FedmetaError, match=line) as refused:
        training_loop.run(LocalGrid(app, experiment), experiment, lambda progress: None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["noise_multiplier = 1.0", "epsilon = 1.0"])
def test_noise_needs_a_bound_and_a_budget_needs_noise(text: str) -> None:
    with pytest.raises(FedmetaError, match="above 0"):
        Experiment.from_toml(f"[privacy]\n{text}\n")
