"""The alarm's rate of false alarms, its delay, and what forgetting at an alarm is worth."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fedmeta.stream.alarm import capital_of, p_values, watch
from fedmeta.stream.replay import Rows, in_hindsight, regret, replay

Floats = NDArray[np.float64]


def test_p_values_are_uniform_whatever_the_scores_are() -> None:
    random = np.random.default_rng(0)
    for scores in (random.lognormal(size=4000), random.integers(2, size=4000).astype(float), np.zeros(4000)):
        found = np.sort(p_values(scores, random))
        assert np.abs(found - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / np.sqrt(4000)  # Kolmogorov, 1 %


def test_the_capital_is_fair_at_every_row() -> None:
    # The mean over a uniform p, with p = u^10 so that bold bets are smooth in u: at most 1, and little below.
    u = (np.arange(1000) + 0.5) / 1000
    density = 10 * u**9 / len(u)
    for before in ([], [0.5], [0.9, 0.01]):
        now = capital_of(np.array(before))[0][-1] if before else 1.0
        after = np.array([capital_of(np.array([*before, p]))[0][-1] for p in u**10])
        mean = float((density * after).sum())
        assert 0.94 * now < mean < now * (1 + 1e-3)


def alarms_of(streams: int, rows: int, rate: float, kind: str, seed: int) -> float:
    """Returns the share of streams without a change in which there is an alarm, by p-values as `watch` has them."""
    random = np.random.default_rng(seed)
    count = 0
    for number in range(streams):
        scores = {
            "normal": lambda: random.normal(size=rows),
            "right or wrong": lambda: (random.uniform(size=rows) < 0.2).astype(float),
        }[kind]()
        count += watch(scores, rate, number).alarm is not None
    return count / streams


@pytest.mark.parametrize("kind", ["normal", "right or wrong"])
def test_false_alarms_are_within_the_bound_on_a_few_streams(kind: str) -> None:
    assert alarms_of(100, 100, 0.05, kind, 0) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


@pytest.mark.slow
def test_false_alarms_are_within_the_bound_over_ten_thousand_streams() -> None:
    found = alarms_of(10_000, 200, 0.05, "normal", 3)
    assert found <= 0.05


def test_a_change_is_found_and_dated() -> None:
    delays, dates = [], []
    for seed in range(20):
        random = np.random.default_rng(seed)
        scores = np.concatenate([random.exponential(1, 150), random.exponential(4, 150)])
        found = watch(scores, 0.01, seed)
        assert found.alarm is not None
        assert found.change is not None
        delays.append(found.alarm - 150)
        dates.append(found.change - 150)
    assert 0 < np.median(delays) < 50
    assert abs(np.median(dates)) < 10
    assert watch(np.array([]), 0.01).alarm is None


def switch(seed: int, rows: int = 400, change: int = 200) -> tuple[Floats, Floats]:
    """A site whose patients' reaction turns round at a row, as when a shock goes over into another phase."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 4))
    slope = random.normal(size=4)
    y = np.where(np.arange(rows) < change, x @ slope, -(x @ slope)) + 0.7 * random.normal(size=rows)
    return x, y


def test_forgetting_at_an_alarm_beats_forgetting_never_and_always() -> None:
    regrets: dict[str, list[float]] = {"all": [], "window": [], "alarm": []}
    for seed in range(12):
        x, y = switch(seed)

        def losses(here: Rows, following: Rows, x: Floats = x, y: Floats = y) -> Floats:
            weight = np.linalg.solve(x[here].T @ x[here] + 0.5 * np.eye(4), x[here].T @ y[here])
            error: Floats = (y[following] - x[following] @ weight) ** 2
            return error

        best = in_hindsight(losses, 400, [200], 20)
        for memory in ("all", "window", "alarm"):
            found = replay(losses, 400, 20, memory, window=40, seed=seed)
            assert len(found.losses) == 380
            regrets[memory].append(float(regret(found, best)[-1]))
            if memory == "alarm":
                assert found.alarms
                assert found.alarms[0] >= 200
    means = {memory: float(np.mean(values)) for memory, values in regrets.items()}
    assert means["alarm"] < means["window"]
    assert means["alarm"] < means["all"]
    pairs = np.array(regrets["window"]) - np.array(regrets["alarm"])
    assert pairs.mean() > 2 * pairs.std(ddof=1) / np.sqrt(len(pairs))
