"""Comparisons: the same sites for all, paired differences, and runs that are found again."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedmeta import comparison
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.problems import Metric
from fedmeta.progress import Report, ignore_progress

LEARNERS = ["fedavg-ft", "maml", "local"]

ACCURACY = Metric("accuracy", True)


def sites(gain: float, spread: float = 0.0) -> pd.DataFrame:
    random = np.random.default_rng(0)
    base = random.uniform(0.5, 0.8, 20)
    rows = []
    for learner, shift in (("fedavg-ft", 0.0), ("maml", gain)):
        scores = base + shift + (spread * random.normal(size=20) if shift else 0)
        frame = pd.DataFrame({"site": [f"s{n}" for n in range(20)], "kind": "new", "seed": 0})
        rows.append(frame.assign(learner=learner, personalized_accuracy=scores, personalized_rmse=scores))
    return pd.concat(rows)


def test_a_constant_gain_is_found_exactly_though_sites_differ() -> None:
    assert comparison.difference(sites(0.05), "maml", "fedavg-ft", ACCURACY, 0) == pytest.approx((0.05,) * 3)


def test_lower_errors_are_better() -> None:
    assert comparison.difference(sites(0.05), "maml", "fedavg-ft", Metric("rmse", False), 0) == pytest.approx(
        (-0.05,) * 3
    )


def test_the_interval_holds_the_mean_and_says_when_it_may_be_chance() -> None:
    mean, low, high = comparison.difference(sites(0.001, spread=0.1), "maml", "fedavg-ft", ACCURACY, 0)
    assert low < 0 < high
    assert low < mean < high


def test_a_site_that_is_new_in_several_seeds_is_one_site() -> None:
    once = sites(0.001, spread=0.1)
    often = pd.concat([once.assign(seed=seed) for seed in range(5)])
    one, same = (comparison.difference(frame, "maml", "fedavg-ft", ACCURACY, 0) for frame in (once, often))
    assert same == pytest.approx(one)
    scores = once.pivot_table(index="site", columns="learner", values="personalized_accuracy")
    se = (scores["maml"] - scores["fedavg-ft"]).std(ddof=0) / np.sqrt(20)
    assert (same[2] - same[1]) / 2 == pytest.approx(1.96 * se, rel=0.1)


def test_one_site_is_no_evidence() -> None:
    own = sites(0.05)
    own = pd.concat([own[own["site"] == "s0"].assign(seed=seed) for seed in range(3)])
    mean, low, high = comparison.difference(own, "maml", "fedavg-ft", ACCURACY, 0)
    assert mean == pytest.approx(0.05)
    assert np.isnan([low, high]).all()
    row = {"learner": "maml", "personalized": 0.7, "difference": mean, "low": low, "high": high}
    said = comparison.verdict(pd.DataFrame([row]), "fedavg-ft", ACCURACY)
    assert said.endswith("; against fedavg-ft +0.050, one site.")


def test_sites_without_a_score_are_left_out() -> None:
    frame = sites(0.05)
    frame.loc[frame["site"] == "s3", "personalized_accuracy"] = np.nan
    assert comparison.difference(frame, "maml", "fedavg-ft", ACCURACY, 0)[0] == pytest.approx(0.05)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("compare")
    settings = ["server.rounds=2", "evaluation.every=0", "learner.inner_steps=2", "tracking.uri=none"]
    return Experiment().with_overrides([*settings, f"tracking.folder={folder}"])


def run(experiment: Experiment, learners: list[str], seeds: int) -> tuple[comparison.Comparison, list[str]]:
    started: list[str] = []

    def report(title: str, number: int, count: int) -> Report:
        def take(progress: object) -> None:
            if title not in started:
                started.append(title)

        return take

    return comparison.compare(experiment, learners, seeds, report=report), started


def test_compares_on_the_same_sites_and_finds_its_runs_again(experiment: Experiment) -> None:
    found, started = run(experiment, LEARNERS, 2)
    assert len(started) == 6
    assert found.baseline == "fedavg-ft"
    assert set(found.table["learner"]) == set(LEARNERS)
    assert found.table["personalized"].is_monotonic_decreasing
    for seed in (0, 1):
        of_seed = found.sites[found.sites["seed"] == seed]
        kinds = [set(own.loc[own["kind"] == "new", "site"]) for _, own in of_seed.groupby("learner")]
        assert all(kind == kinds[0] for kind in kinds)
    again, started = run(experiment, [*LEARNERS, "fedavg"], 2)
    assert started == ["fedavg, seed 0", "fedavg, seed 1"]
    own = ["learner", "seed", "run_id"]
    known = again.runs[again.runs["learner"] != "fedavg"][own].sort_values(own, ignore_index=True)
    pd.testing.assert_frame_equal(found.runs[own].sort_values(own, ignore_index=True), known)


def test_says_it_in_markdown_and_json(experiment: Experiment, tmp_path: Path) -> None:
    found, _ = run(experiment, LEARNERS, 2)
    comparison.write(found, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("Best for new sites: ")
    assert all(f"| {learner} | 2 |" in text for learner in LEARNERS)
    said = json.loads((tmp_path / "comparison.json").read_text())
    assert said["verdict"] in text
    assert len(said["runs"]) == 6
    assert len(pd.read_parquet(tmp_path / "sites.parquet")) == 6 * 40


@pytest.mark.parametrize(
    ("learners", "settings", "problem"),
    [
        (["maml", "maml"], [], "twice"),
        ([], [], "names none"),
        (["maml", "mammal"], [], 'no learner "mammal"; did you mean "maml"'),
        (["maml"], ["data.source=npz", "data.path=nowhere.npz"], "nowhere.npz: no such file"),
        (["maml"], ["data.new_sites=400"], "leaves no site to train on"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, learners: list[str], settings: list[str], problem: str
) -> None:
    places = [f"tracking.folder={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    with pytest.raises(FedmetaError, match=problem):
        comparison.compare(
            Experiment().with_overrides([*places, *settings]), learners, 1, report=lambda *words: ignore_progress
        )
    assert not list(tmp_path.iterdir())
