"""Paired differences with intervals, and tables that rank any metric in its own direction."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedmeta.errors import FedmetaError
from fedmeta.problems.metric import Metric
from fedmeta.runtime import Result
from fedmeta.search.comparison import Comparison, budget, build_table, difference, verdict
from fedmeta.search.comparison_report import left_behind, markdown

ACCURACY, RMSE = Metric("accuracy", True), Metric("rmse", False)
SNR = Metric("snr", True, "dB")


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
    assert difference(sites(0.05), "maml", "fedavg-ft", ACCURACY, 0) == pytest.approx((0.05,) * 3)


def test_lower_errors_are_better() -> None:
    assert difference(sites(0.05), "maml", "fedavg-ft", RMSE, 0) == pytest.approx((-0.05,) * 3)


def test_the_interval_holds_the_mean_and_reports_when_it_may_be_chance() -> None:
    mean, low, high = difference(sites(0.001, spread=0.1), "maml", "fedavg-ft", ACCURACY, 0)
    assert low < 0 < high
    assert low < mean < high


def test_a_site_that_is_new_in_several_seeds_is_one_site() -> None:
    once = sites(0.001, spread=0.1)
    often = pd.concat([once.assign(seed=seed) for seed in range(5)])
    one, same = (difference(frame, "maml", "fedavg-ft", ACCURACY, 0) for frame in (once, often))
    assert same == pytest.approx(one)
    scores = once.pivot_table(index="site", columns="learner", values="personalized_accuracy")
    se = (scores["maml"] - scores["fedavg-ft"]).std(ddof=0) / np.sqrt(20)
    assert (same[2] - same[1]) / 2 == pytest.approx(1.96 * se, rel=0.1)


def test_one_site_is_no_evidence() -> None:
    own = sites(0.05)
    own = pd.concat([own[own["site"] == "s0"].assign(seed=seed) for seed in range(3)])
    mean, low, high = difference(own, "maml", "fedavg-ft", ACCURACY, 0)
    assert mean == pytest.approx(0.05)
    assert np.isnan([low, high]).all()
    row = {"learner": "maml", "personalized": 0.7, "difference": mean, "low": low, "high": high}
    text = verdict(pd.DataFrame([row]), "fedavg-ft", ACCURACY)
    assert text.endswith("Compared with fedavg-ft: no interval, +0.050, one site.")


def test_sites_without_a_score_are_left_out() -> None:
    frame = sites(0.05)
    frame.loc[frame["site"] == "s3", "personalized_accuracy"] = np.nan
    assert difference(frame, "maml", "fedavg-ft", ACCURACY, 0)[0] == pytest.approx(0.05)


def result(learner: str, scores: list[float], score: Metric) -> Result:
    """Returns a run of one seed whose sites, all new, have these personalized scores."""
    values = np.array(scores)
    sites = pd.DataFrame({"site": [f"s{n}" for n in range(len(scores))], "kind": "new", "rows": 10})
    sites = sites.assign(**{f"personalized_{score.name}": values, f"global_{score.name}": values - 1})
    worst = values.min() if score.higher_is_better else values.max()
    group: dict[str, Any] = {
        "n": len(scores),
        "global": {"mean": values.mean() - 1},
        "personalized": {"mean": values.mean(), "worst_decile": worst},
        "local_only": {"mean": None},
        "helped": 0.75,
        "harmed": 0.25,
    }
    summary = {"learner": learner, "seed": 0, "run_id": learner, "score": score.to_json(), "new_sites": group}
    summary |= dict.fromkeys(("rounds", "wall_s", "bytes_up", "bytes_down"), 1)
    return Result(summary, sites, {}, sites, Path())


def compared(score: Metric, **scores: list[float]) -> Comparison:
    learners = [name.replace("_", "-") for name in scores]
    results = [result(name, own, score) for name, own in zip(learners, scores.values(), strict=True)]
    return build_table(results, learners, Path(), 0)


@pytest.mark.parametrize(("score", "best", "worst"), [(SNR, "maml", -9.0), (RMSE, "fedavg-ft", -7.0)])
def test_learners_are_ranked_in_the_direction_of_the_score(score: Metric, best: str, worst: float) -> None:
    found = compared(score, fedavg_ft=[-9.0, -10.0, -11.0], maml=[-7.0, -8.0, -9.0])
    table = found.table.set_index("learner")
    assert found.table["learner"].iloc[0] == best
    assert table.loc["maml", "worst_decile"] == worst
    assert table.loc["maml", "difference"] == pytest.approx(2.0 * score.sign)


def test_the_page_has_name_unit_and_direction_of_the_score() -> None:
    found = compared(SNR, fedavg_ft=[-9.0, -10.0, -11.0], maml=[-7.0, -8.0, -9.0])
    assert found.verdict == (
        "Best for new sites: maml (snr -8.000 dB). Compared with fedavg-ft: better (95 % interval excludes 0), "
        "+2.000 [+2.000, +2.000]."
    )
    page = markdown(found)
    assert "| learner | seeds | global | personalized | worst 10 % | local-only | helped | harmed |" in page
    assert "| maml | 1 | -9.000 | -8.000 | -9.000 | - | 75% | 25% | +2.000 [+2.000, +2.000] |" in page
    assert "Mean snr (dB) of new sites, higher is better" in page


def test_who_is_left_behind_under_the_best_learner_is_named() -> None:
    found = compared(ACCURACY, maml=[0.9, 0.8, 0.7], anil=[0.5, 0.5, 0.5])
    own = found.sites["learner"] == "maml"
    names = list(found.sites.loc[own, "site"])
    found.sites.loc[own, "gain"] = [0.1, -0.2, -0.3]
    assert left_behind(found) == f"maml leaves 2 of 3 new sites behind: {names[2]}, {names[1]}."
    found.sites.loc[own, "gain"] = 0.1
    assert left_behind(found) == "maml leaves none of 3 new sites behind."


def test_a_difference_whose_interval_includes_0_is_no_difference_shown() -> None:
    found = compared(RMSE, fedavg_ft=[1.0, 2.0, 3.0, 4.0], maml=[1.5, 1.5, 2.5, 4.4])
    assert "no difference shown (95 % interval includes 0)" in found.verdict


def test_runs_with_different_scores_are_refused() -> None:
    runs = [result("maml", [0.5, 0.6], ACCURACY), result("anil", [0.5, 0.6], replace(ACCURACY, name="auroc"))]
    with pytest.raises(FedmetaError, match="maml is scored by accuracy and anil by auroc"):
        build_table(runs, ["maml", "anil"], Path(), 0)


def test_runs_that_ended_early_are_counted_beside_what_they_might_have_had() -> None:
    def stopped(rounds: int, allowed: int | None) -> Result:
        found = result("maml", [0.5, 0.6], ACCURACY)
        own = {} if allowed is None else {"stopping": {"rounds_allowed": allowed}}
        return replace(found, summary={**found.summary, "rounds": rounds, **own})

    early = build_table([stopped(20, 50), stopped(50, 50)], ["maml"], Path(), 0)
    assert budget(early.runs).startswith("Each run might have 50 rounds; 1 of 2 ended before that")
    assert budget(early.runs) in markdown(early)
    assert budget(build_table([stopped(50, 50), stopped(50, None)], ["maml"], Path(), 0).runs) == ""
