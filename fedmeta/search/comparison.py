"""The result of a comparison: one row per learner, paired differences with intervals, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.errors import FedmetaError
from fedmeta.problems.metric import Metric, metric_of
from fedmeta.randomness import generator
from fedmeta.runtime import Result
from fedmeta.search.trial import Trial

BASELINE = "fedavg-ft"
RESAMPLES = 2000
LEVEL = 0.95
SCORES = ("global", "personalized", "worst_decile", "local_only", "helped", "harmed")
"""The table's columns that have a standard deviation over seeds."""


@dataclass(frozen=True)
class Comparison:
    """The result of several learners on the same sites.

    Attributes:
        runs: One row per run: learner, seed, run_id, rounds, rounds_allowed, wall_s, bytes_up, bytes_down, and of new
            sites the columns of `SCORES`.
        sites: The final evaluation of every run, one row per site, with learner and seed.
        table: One row per learner: means and standard deviations over seeds, and the paired difference of the
            personalized score of new sites from the baseline's (positive = better), with its interval.
        baseline: The learner that the others are compared with.
        score: What sites are scored by.
        verdict: One or two sentences.
        folder: Where it is kept, and resumed from when it is interrupted.
        trials: Every setting that was tried for each learner, the best one first; empty where nothing was tuned.
        left_out: The learners that failed, and why.
        privacy: What all runs and trials have spent together, where they add noise.
    """

    runs: pd.DataFrame
    sites: pd.DataFrame
    table: pd.DataFrame
    baseline: str
    score: Metric
    verdict: str
    folder: Path
    trials: Mapping[str, Sequence[Trial]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    privacy: str = ""


def build_table(
    results: Sequence[Result],
    learners: Sequence[str],
    folder: Path,
    seed: int,
    trials: Mapping[str, Sequence[Trial]] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Comparison:
    """Returns the comparison of some runs.

    Args:
        results: The runs.
        learners: The learners' names.
        folder: Where the comparison is kept.
        seed: Key of the intervals' resampling.
        trials: The settings that were tried for each learner, the best one first.
        left_out: Further learners, which failed, and why.

    Raises:
        FedmetaError: The runs are scored by different metrics.
    """
    score = metric_of(results[0].summary["score"])
    for other in (result.summary for result in results):
        if other["score"]["name"] != score.name:
            raise FedmetaError(
                f"{results[0].summary['learner']} is scored by {score.name} and {other['learner']} by "
                f"{other['score']['name']}: compare runs with the same evaluation.score"
            )
    runs = pd.DataFrame([_run_row(result.summary) for result in results])
    named = [each.sites.assign(learner=each.summary["learner"], seed=each.summary["seed"]) for each in results]
    sites = pd.concat(named, ignore_index=True)
    baseline = BASELINE if BASELINE in learners else learners[0]
    rows = []
    for learner in learners:
        own = runs[runs["learner"] == learner]
        row: dict[str, Any] = {"learner": learner, "seeds": len(own)}
        for column in SCORES:
            values = own[column].astype(float)
            row |= {column: values.mean(), f"{column}_sd": values.std(ddof=1) if len(own) > 1 else np.nan}
        row |= {column: own[column].mean() for column in ("rounds", "bytes_up", "bytes_down", "wall_s")}
        row["difference"], row["low"], row["high"] = difference(sites, learner, baseline, score, seed)
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("personalized", ascending=not score.higher_is_better, ignore_index=True)
    found = verdict(table, baseline, score)
    return Comparison(runs, sites, table, baseline, score, found, folder, trials or {}, left_out or {})


def compared_group(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a run's summary that is compared: its new sites, or training sites where none is new."""
    group: dict[str, Any] = summary["new_sites"] if summary["new_sites"]["n"] else summary["training_sites"]
    return group


def _run_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    group = compared_group(summary)
    return {
        **{key: summary[key] for key in ("learner", "seed", "run_id", "rounds", "wall_s", "bytes_up", "bytes_down")},
        "rounds_allowed": (summary.get("stopping") or {}).get("rounds_allowed", summary["rounds"]),
        "sites": group["n"],
        "global": group["global"]["mean"],
        "personalized": group["personalized"]["mean"],
        "worst_decile": group["personalized"]["worst_decile"],
        "local_only": group["local_only"]["mean"],
        "helped": group["helped"],
        "harmed": group["harmed"],
    }


def budget(runs: pd.DataFrame) -> str:
    """Returns a sentence on runs that ended before their last round; "" where none did.

    Args:
        runs: As in `Comparison`.
    """
    if "rounds_allowed" not in runs:
        return ""
    early = int((runs["rounds"] < runs["rounds_allowed"]).sum())
    if not early:
        return ""
    allowed = sorted({int(count) for count in runs["rounds_allowed"]})
    most = f"{allowed[0]}" if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"
    return (
        f"Each run might have {most} rounds; {early} of {len(runs)} ended before that, by the scores of validation "
        "sites. The rounds, bytes and seconds are what was used."
    )


def compared_kind(sites: pd.DataFrame) -> str:
    """Returns the kind of sites that learners are compared on: "new", or "training" where no site is new."""
    return "new" if (sites["kind"] == "new").any() else "training"


def difference(
    sites: pd.DataFrame, learner: str, baseline: str, score: Metric, seed: int
) -> tuple[float, float, float]:
    """Returns how much better a learner serves new sites than the baseline, and the 95 % interval of that.

    The difference is paired: site by site, under the same seed. The interval is the percentile bootstrap over sites
    (Efron and Tibshirani 1993, chapter 13), drawn from `seed`: a site is drawn with all the seeds in which it is new,
    for these are one site and not several. It is NaN of one site. Where no site is new, training sites are compared.

    Args:
        sites: As in `Comparison`.
        learner: The learner.
        baseline: The learner that it is compared with.
        score: What sites are scored by; positive differences are better, whatever its direction.
        seed: Key of the resampling.
    """
    own = sites[sites["kind"] == compared_kind(sites)].set_index(["seed", "site"])
    pair = [own[own["learner"] == name][f"personalized_{score.name}"] for name in (learner, baseline)]
    gains = (pair[0] - pair[1]).dropna() * score.sign
    by_site = gains.groupby("site").agg(["sum", "count"])
    return mean_interval(by_site["sum"].to_numpy(), seed, by_site["count"].to_numpy())


def mean_interval(
    sums: NDArray[np.float64], seed: int, counts: NDArray[np.int64] | None = None
) -> tuple[float, float, float]:
    """Returns the mean of values and its 95 % interval, by the bootstrap of `difference`.

    Args:
        sums: The sum of each site's values [sites]; NaN comes of none, and a NaN interval of one.
        seed: Key of the resampling.
        counts: How many values each site has [sites]; None for one.
    """
    many = np.ones(len(sums)) if counts is None else counts
    mean = float(sums.sum() / many.sum()) if len(sums) else np.nan
    if len(sums) < 2:
        return mean, np.nan, np.nan
    draws = generator(seed, "bootstrap").integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / many[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def interval(mean: float, low: float, high: float) -> str:
    """Returns a difference with its interval as text."""
    return f"{mean:+.3f}, one site" if np.isnan(low) else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def significance(low: float, high: float) -> str:
    """Returns what an interval of a difference (positive = better) shows."""
    if low > 0 or high < 0:
        return f"{'better' if low > 0 else 'worse'} (95 % interval excludes 0)"
    return "no difference shown (95 % interval includes 0)" if np.isfinite([low, high]).all() else "no interval"


def verdict(table: pd.DataFrame, baseline: str, score: Metric) -> str:
    """Returns which learner serves new sites best, and whether the interval of its difference excludes 0."""
    best = table.iloc[0]
    unit = f" {score.unit}" if score.unit else ""
    text = f"Best for new sites: {best['learner']} ({score.name} {best['personalized']:.3f}{unit})"
    if best["learner"] == baseline:
        return f"{text}; no other learner does better than this baseline here."
    ends = best["low"], best["high"]
    return f"{text}. Compared with {baseline}: {significance(*ends)}, {interval(best['difference'], *ends)}."


def sites_by_learner(comparison: Comparison) -> pd.DataFrame:
    """Returns the personalized score of each new site under each learner, the mean over the seeds in which it is new.

    Returns:
        Columns site, rows (train rows), seeds (in how many it is new), and one per learner in the table's order; the
        site that the best learner serves worst comes first.
    """
    own = comparison.sites[comparison.sites["kind"] == compared_kind(comparison.sites)]
    order = list(comparison.table["learner"])
    scores = own.pivot_table(index="site", columns="learner", values=f"personalized_{comparison.score.name}")
    frame = scores.reindex(columns=order)
    frame.insert(0, "rows", own.groupby("site")["rows"].first())
    frame.insert(1, "seeds", own.groupby("site")["seed"].nunique())
    worst_first = frame.sort_values(order[0], ascending=comparison.score.higher_is_better)
    return worst_first.rename_axis(columns=None).reset_index().round(4)
