"""Ways of searching beside one another: the same budget and start, and what their curves say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmeta.errors import FedmetaError
from fedmeta.tuning import strategies
from fedmeta.tuning.results import Attempt, Search
from tests.search.searches import plan

TRIALS = 4


def made(name: str, scores: list[list[float]], metric: str = "accuracy") -> list[Search]:
    asked = plan(Path("nowhere"), TRIALS, name)
    return [
        Search(
            replace(asked, seed=seed),
            [Attempt(place, {}, "done", score, 0, 1.0, "", "") for place, score in enumerate(own)],
            metric,
            {},
            1.0,
        )
        for seed, own in enumerate(scores)
    ]


def compared(**scores: list[list[float]]) -> strategies.Strategies:
    searches = {name: made(name, own) for name, own in scores.items()}
    return strategies.Strategies(plan(Path("nowhere"), TRIALS), searches, Path("nowhere"))


def test_curves_only_rise_and_short_searches_keep_their_last_value() -> None:
    found = compared(gp=[[0.5, 0.7, 0.6, 0.8]], grid=[[0.5, 0.6]])
    assert found.curves("gp").tolist() == [[0.5, 0.7, 0.7, 0.8]]
    assert found.curves("grid").tolist() == [[0.5, 0.6, 0.6, 0.6]]


def test_curves_of_errors_only_fall() -> None:
    searches = {"gp": made("gp", [[0.5, 0.7, 0.4, 0.8]], "rmse")}
    found = strategies.Strategies(plan(Path("nowhere"), TRIALS), searches, Path("nowhere"))
    assert found.curves("gp").tolist() == [[0.5, 0.5, 0.4, 0.4]]


def test_the_verdict_counts_seeds() -> None:
    found = compared(
        random=[[0.5, 0.6, 0.6, 0.6], [0.5, 0.5, 0.7, 0.7]],
        gp=[[0.5, 0.7, 0.8, 0.8], [0.5, 0.7, 0.7, 0.9]],
        grid=[[0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 0.5, 0.5]],
    )
    table = found.table()
    assert list(table["strategy"]) == ["gp", "grid", "random"]
    assert table["after_2"].tolist() == pytest.approx([0.7, 0.5, 0.55])
    assert found.verdict().endswith("with every seed it did better than random.")
    assert "gp (accuracy 0.850 after 4 trials, mean of 2 seeds)" in strategies.markdown(found)


def test_every_way_begins_alike_and_gets_the_same_trials(tmp_path: Path) -> None:
    titles: list[str] = []

    def report(title: str):
        titles.append(title)
        return lambda found: None

    asked = plan(tmp_path, 3, "tpe", "server.rounds=1")
    found = strategies.compare_strategies(asked, ["grid", "random"], 1, report)
    assert titles == ["grid, seed 0", "random, seed 0"]
    starts = {name: found.curves(name)[:, 0] for name in found.searches}
    np.testing.assert_array_equal(starts["grid"], starts["random"])
    assert {name: len(searches[0].attempts) for name, searches in found.searches.items()} == {"grid": 3, "random": 3}
    said = json.loads((found.folder / "strategies.json").read_text())
    assert len(said["curves"]["random"][0]) == 3
    assert (found.folder / "strategies.png").stat().st_size > 10_000
    runs = len(list(tmp_path.glob("tune-*/trials/*/summary.json")))
    strategies.compare_strategies(asked, ["grid", "random"], 1, report)
    assert len(list(tmp_path.glob("tune-*/trials/*/summary.json"))) == runs == 6


def test_a_way_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match="twice"):
        strategies.compare_strategies(plan(tmp_path, 3), ["grid", "grid"], 1, lambda title: lambda found: None)
