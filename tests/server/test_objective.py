"""Weights by loss: the worst site, the worst share, a leaning; each against what it stands for."""

from pathlib import Path

import numpy as np
import pytest

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Server
from server.objective import cvar_weights, q_weights, site_weights, worst_weights
from tests.server.digits import digits


def test_the_worst_share_is_the_mean_over_it() -> None:
    losses = np.array([1.0, 4.0, 2.0, 3.0])
    assert cvar_weights(losses, 0.5).tolist() == [0, 2, 0, 2]
    assert cvar_weights(losses, 1.0).tolist() == [1, 1, 1, 1]
    # A share of a site and a half: the site at the edge counts by half.
    weights = cvar_weights(losses, 0.375)
    assert weights.tolist() == pytest.approx([0, 1 / 0.375, 0, 0.5 / 0.375])
    assert weights.mean() == pytest.approx(1)


def test_a_leaning_of_nothing_is_the_mean_and_of_much_is_the_worst() -> None:
    losses = np.array([1.0, 2.0, 4.0])
    assert q_weights(losses, 0.0).tolist() == [1, 1, 1]
    assert q_weights(losses, 1.0).tolist() == pytest.approx((losses / losses.mean()).tolist())
    assert q_weights(losses, 50.0).tolist() == pytest.approx([0, 0, 3], abs=1e-9)
    with pytest.raises(FedmetaError, match="a query loss of -1 is below 0"):
        q_weights(np.array([-1.0, 1.0]), 1.0)


def test_the_ascent_finds_the_worst_site() -> None:
    shares = dict.fromkeys("abcd", 0.25)
    for _ in range(200):
        shares = worst_weights(shares, {"a": 1.0, "b": 1.2, "c": 0.5, "d": 1.1}, 1.0)
        assert sum(shares.values()) == pytest.approx(1)
    assert shares["b"] > 0.99
    # A round of others alone leaves a site's share where it is, up to the sum; equal losses move nothing.
    moved = worst_weights(dict.fromkeys("abcd", 0.25), {"a": 1.0, "b": 1.0}, 1.0)
    assert moved == pytest.approx(dict.fromkeys("abcd", 0.25))


def test_a_game_with_a_known_value_is_solved() -> None:
    """Sites pull theta to 0 and, twice as hard, to 3: the worst loss is least at 3 sqrt(2) / (1 + sqrt(2))."""
    theta, tail, settings = 0.0, [], Server(objective="worst", worst_lr=0.5)
    shares = {"a": 0.5, "b": 0.5}
    for number in range(4000):
        losses = {"a": theta**2, "b": 2 * (theta - 3) ** 2}
        weights, shares = site_weights(settings, losses, shares)
        step = 0.02
        theta -= step * (weights["a"] * 2 * theta + weights["b"] * 4 * (theta - 3)) / 2
        if number >= 2000:
            tail.append(theta)
    assert float(np.mean(tail)) == pytest.approx(3 * 2**0.5 / (1 + 2**0.5), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["worst", "cvar", "q"])
def test_a_leaning_of_nothing_changes_next_to_nothing(tmp_path: Path, objective: str) -> None:
    none = {"worst": "server.worst_lr=1e-12", "cvar": "server.cvar_share=1.0", "q": "server.q=0.0"}[objective]
    settings = ("server.rounds=2", "server.optimizer=sgd", "server.lr=0.1", "evaluation.every=0")
    plain = fedmeta.run(digits(tmp_path / "plain", *settings))
    own = fedmeta.run(digits(tmp_path / "own", *settings, f"server.objective={objective}", none))
    for name, value in plain.meta_state.items():
        assert np.allclose(value.numpy(), own.meta_state[name].numpy(), atol=1e-6)
