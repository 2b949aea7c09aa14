"""Before and after adaptation: one row per site, and summaries over sites, for any metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.checkpoint import Evaluation
from fedmeta.messages import LOCAL_METHODS
from fedmeta.problems.metric import DIVERGED, Metric, score_of
from fedmeta.problems.pooled import auroc_bound
from fedmeta.problems.pooled import pooled as pooled_figures

NEW, TRAINING, VALIDATION = "new", "training", "validation"
GROUPS = {NEW: "new_sites", TRAINING: "training_sites"}
"""The two kinds of sites, and what summaries call them."""

RESAMPLES = 2000
"""How many bootstrap samples of sites an interval comes from."""


def sites_frame(
    names: Sequence[str],
    kinds: Sequence[str],
    train_rows: Sequence[int],
    test_rows: Sequence[int],
    evaluation: Evaluation,
    metrics: Sequence[Metric],
    subgroups: Sequence[str] = (),
) -> pd.DataFrame:
    """Returns one evaluation as a frame with one row per site.

    Args:
        names: The sites.
        kinds: "new", "training" or "validation", per site.
        train_rows: Train rows per site.
        test_rows: Test rows per site; a site without any has no figures (NaN).
        evaluation: Their figures.
        metrics: The run's metrics, the score first.
        subgroups: The names of the run's subgroups.

    Returns:
        Columns site, kind, rows (train rows), test_rows, round, higher_is_better (of the score); of the score S
        global_S, personalized_S (after the
        steps that the site takes), ungated_S (after all steps), local_S (what the site does alone; NaN where that was
        not asked for) and gain (how much better the personalized score is than the global one, in its unit); of each
        other metric M global_M, personalized_M and local_M; local_method (which of `LOCAL_METHODS`, "" for none);
        global_loss, personalized_loss; steps_taken; steps (the
        list of scores by inner step). Where the problem has such baselines also classical_M, classical_evaluations and
        optimum_M. Where sites showed subgroups N also "rows N" (test rows, 0 where a site shows none), "global N" and
        "personalized N", of the score.
    """
    score, figures = metrics[0], evaluation.figures
    empty = np.asarray(test_rows) == 0
    last = np.arange(len(evaluation.chosen)), evaluation.chosen
    nothing = np.full(len(evaluation.chosen), np.nan)
    columns: dict[str, NDArray[np.float64]] = {}
    for metric in metrics:
        values = figures[metric.name]
        columns[f"global_{metric.name}"] = values[:, 0]
        columns[f"personalized_{metric.name}"] = values[last]
        if metric is score:
            columns[f"ungated_{metric.name}"] = values[:, -1]
        columns[f"local_{metric.name}"] = evaluation.local.get(metric.name, nothing)
        for kind in ("classical", "optimum"):
            if f"{kind}_{metric.name}" in evaluation.baselines:
                columns[f"{kind}_{metric.name}"] = evaluation.baselines[f"{kind}_{metric.name}"]
        if metric is score:
            columns["gain"] = (values[last] - values[:, 0]) * score.sign
    methods = np.nan_to_num(evaluation.local.get("method", nothing), nan=-1.0).astype(np.int64)
    if "classical_evaluations" in evaluation.baselines:
        columns["classical_evaluations"] = evaluation.baselines["classical_evaluations"]
    for place, name in enumerate(subgroups if evaluation.subgroups else ()):
        columns |= {f"{kind} {name}": values[:, place] for kind, values in evaluation.subgroups.items()}
    columns["global_loss"] = figures["loss"][:, 0]
    columns["personalized_loss"] = figures["loss"][last]
    return pd.DataFrame(
        {
            "site": list(names),
            "kind": list(kinds),
            "rows": np.asarray(train_rows, dtype=np.int64),
            "test_rows": np.asarray(test_rows, dtype=np.int64),
            "round": evaluation.round_number,
            "higher_is_better": score.higher_is_better,
            **{column: np.where(empty, np.nan, values) for column, values in columns.items()},
            "local_method": [dict(enumerate(LOCAL_METHODS)).get(place, "") for place in methods.tolist()],
            "steps_taken": evaluation.chosen,
            "steps": list(np.where(empty[:, None], np.nan, figures[score.name]).tolist()),
        }
    )


def summarize(
    frame: pd.DataFrame,
    metrics: Sequence[Metric],
    pooled: Mapping[str, NDArray[np.float64]] | None = None,
    pooled_sites: Sequence[int] = (),
    positive: int = 1,
    subgroups: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Returns the summaries of new and of training sites in a frame of one evaluation.

    Args:
        frame: As `sites_frame` returns it.
        metrics: The run's metrics, the score first.
        pooled: Sums over the test rows of each group, by "GROUP/STATE/NAME" (0: new sites, 1: training sites).
        pooled_sites: How many sites each group's sums hold.
        positive: The code of the positive class.
        subgroups: The names of the run's subgroups; their sums are those of "GROUP/STATE@PLACE/NAME".

    Returns:
        Per group: n (sites that have a score), diverged (see `diverged`), global, personalized and local_only (see
        `summarize_scores`), helped and harmed (the shares of sites whose personalized score is strictly better, or
        worse, than the global one; a diverged site is harmed), beats_local (the share strictly better than what the
        site does alone), classical and optimum where the problem has them (as scores, classical with the mean number of
        evaluations), local_methods (how many sites solve alone by which of `LOCAL_METHODS`), the mean gain,
        personalized_with_diverged
        (the mean score over diverged sites too), the mean score "ungated" (all sites take all steps), and undefined:
        how many sites a metric is undefined at. Where sites showed subgroups: subgroups, a list with name, sites (that
        show it), rows (of those), and of the score global and personalized, each with mean (over sites) and pooled.
    """
    sums: dict[int, dict[str, dict[str, NDArray[np.float64]]]] = {}
    for key, value in (pooled or {}).items():
        group, state, name = key.split("/", 2)
        sums.setdefault(int(group), {}).setdefault(state, {})[name] = value
    found = {}
    for number, (kind, group_name) in enumerate(GROUPS.items()):
        own = frame[frame["kind"] == kind]
        found[group_name] = _summarize_group(own, metrics, sums.get(number, {}), positive)
        if number < len(pooled_sites) and pooled_sites[number]:
            found[group_name]["pooled_sites"] = int(pooled_sites[number])
        if subgroups and f"rows {subgroups[0]}" in frame:
            shown = _summarize_subgroups(own, metrics, sums.get(number, {}), positive, subgroups)
            found[group_name]["subgroups"] = shown
    return found


def _summarize_subgroups(
    frame: pd.DataFrame,
    metrics: Sequence[Metric],
    sums: Mapping[str, Mapping[str, NDArray[np.float64]]],
    positive: int,
    subgroups: Sequence[str],
) -> list[dict[str, Any]]:
    found = []
    for place, name in enumerate(subgroups):
        rows = frame[f"rows {name}"].fillna(0)
        entry: dict[str, Any] = {"name": name, "sites": int((rows > 0).sum()), "rows": int(rows.sum())}
        for state in ("global", "personalized"):
            own = dict(sums.get(f"{state}@{place}", {}))
            values = pooled_figures(own, metrics, positive) if own else {}
            pooled_score = _finite(values.get(metrics[0].name))
            entry[state] = {"mean": _mean(frame[f"{state} {name}"]), "pooled": pooled_score}
        found.append(entry)
    return found


def _summarize_group(
    frame: pd.DataFrame,
    metrics: Sequence[Metric],
    sums: Mapping[str, Mapping[str, NDArray[np.float64]]],
    positive: int,
) -> dict[str, Any]:
    score = metrics[0]
    lost = diverged(frame)
    scored = frame[frame[f"global_{score.name}"].notna() & frame[f"personalized_{score.name}"].notna() & ~lost]
    summary: dict[str, Any] = {"n": len(scored), "diverged": int(lost.sum())}
    for state in ("global", "personalized", "local"):
        own = dict(sums.get(state, {}))
        values = pooled_figures(own, metrics, positive) if own else {}
        entry = summarize_scores(scored[f"{state}_{score.name}"], score)
        entry["loss"] = _mean(scored[f"{state}_loss"]) if f"{state}_loss" in scored else None
        entry["pooled"] = _finite(values.get(score.name))
        entry["metrics"] = {}
        for metric in metrics:
            part = summarize_scores(frame[f"{state}_{metric.name}"][~lost], metric)
            kept = {key: part[key] for key in ("mean", "std", "worst_decile", "n")}
            entry["metrics"][metric.name] = {**kept, "pooled": _finite(values.get(metric.name))}
        if "histogram" in own and "auroc" in entry["metrics"]:
            entry["metrics"]["auroc"]["pooled_bound"] = auroc_bound(own["histogram"])
        summary["local_only" if state == "local" else state] = entry
    if "local_method" in scored:  # of earlier versions' runs it is not known
        counts = scored["local_method"][scored["local_method"] != ""].value_counts()
        summary["local_methods"] = {str(name): int(count) for name, count in sorted(counts.items())}
    for kind in ("classical", "optimum"):
        if f"{kind}_{score.name}" in frame:
            summary[kind] = summarize_scores(frame[f"{kind}_{score.name}"], score)
            if kind == "classical":
                summary[kind]["evaluations"] = _mean(frame["classical_evaluations"])
    everyone = frame[lost | frame.index.isin(scored.index)]
    gone = lost[everyone.index]
    summary["helped"] = _mean((everyone["gain"] > 0) & ~gone)
    summary["harmed"] = _mean((everyone["gain"] < 0) | gone)
    alone = everyone[everyone[f"local_{score.name}"].notna()]
    lead = (alone[f"personalized_{score.name}"] - alone[f"local_{score.name}"]) * score.sign
    summary["beats_local"] = _mean((lead > 0) & ~gone[alone.index])
    summary["gain"] = _mean(scored["gain"])
    # The means above leave diverged sites out; with them this is the personalized one, None where it is not finite.
    summary["personalized_with_diverged"] = _mean(everyone[f"personalized_{score.name}"].fillna(np.inf))
    summary["ungated"] = _mean(scored[f"ungated_{score.name}"])
    tested = frame[frame["test_rows"] > 0]
    undefined = {m.name: int(tested[f"personalized_{m.name}"].isna().sum()) for m in metrics}
    summary["undefined"] = {name: count for name, count in undefined.items() if count}
    return summary


def _mean(values: pd.Series) -> float | None:
    """Returns the mean; None where there is nothing, or nothing finite."""
    return _finite(float(values.mean())) if len(values) else None


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def summarize_scores(scores: pd.Series, metric: Metric) -> dict[str, Any]:
    """Returns a summary of per-site values where they are defined.

    Returns:
        mean, std (over sites, population form), worst_decile (the mean of the worst ceil(n / 10) sites), min, n, and
        low and high: the 95 % bootstrap interval of the mean over sites. None where no site has a value.
    """
    values = scores.to_numpy(dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {**dict.fromkeys(("mean", "std", "worst_decile", "min", "low", "high")), "n": 0}
    worst = np.sort(values)[:: 1 if metric.higher_is_better else -1][: math.ceil(len(values) / 10)]
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the largest; such a figure is None
        low, high = bootstrap_interval(values)
        figures = {
            "mean": values.mean(),
            "std": values.std(),
            "worst_decile": worst.mean(),
            "min": values.min(),
            "low": low,
            "high": high,
        }
    return {**{name: _finite(value) for name, value in figures.items()}, "n": len(values)}


def bootstrap_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float | None, float | None]:
    """Returns the percentile bootstrap interval of the mean of values (Efron 1979), from a fixed seed; None for one."""
    if len(values) < 2:
        return None, None
    # Of many sites the mean is normal: resampling would cost seconds and change nothing.
    if len(values) > 5000:
        half = 1.959963984540054 * float(values.std(ddof=1)) / math.sqrt(len(values))
        return float(values.mean()) - half, float(values.mean()) + half
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def diverged(frame: pd.DataFrame) -> pd.Series[bool]:
    """Returns per site whether its adaptation diverged: no finite loss on its test data, or an infinite score.

    A finite loss counts as diverged too where it is more than `DIVERGED` times the global one (or 1, if that is less:
    losses of classes are in nats, those of targets in standard deviations squared). A metric that is undefined at a
    site, such as AUROC with one class, is no divergence.
    """
    loss = frame["personalized_loss"].to_numpy(dtype=np.float64)
    score = frame[f"personalized_{score_of(frame).name}"].to_numpy(dtype=np.float64)
    before = np.abs(np.nan_to_num(frame["global_loss"].to_numpy(dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0))
    ran_away = ~np.isfinite(loss) | np.isinf(score) | (loss > DIVERGED * np.maximum(before, 1.0))
    return pd.Series((frame["test_rows"].to_numpy() > 0) & ran_away, index=frame.index)


def left_behind(frame: pd.DataFrame) -> int:
    """Returns how many sites personalization leaves worse than the global model, or without a model that works."""
    return int(((frame["gain"] < 0) | diverged(frame)).sum())


def headline(summary: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns the global and the personalized score of new sites, or of training sites where there is no new one."""
    group = summary["new_sites"] if summary["new_sites"]["n"] else summary["training_sites"]
    return group["global"]["mean"], group["personalized"]["mean"]
