"""Before and after adaptation: one row per site, and summaries over sites.

Scores are accuracies, or root mean squared errors for regression (lower is better there, and "worst" is highest).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedmeta.checkpoint import Evaluation

NEW, TRAINING, VALIDATION = "new", "training", "validation"
GROUPS = {NEW: "new_sites", TRAINING: "training_sites"}
"""The two kinds of sites, and what summaries call them."""


def score_name(regression: bool) -> str:
    """Returns what a site is scored by: "accuracy" or "rmse"."""
    return "rmse" if regression else "accuracy"


def sites_frame(
    names: Sequence[str],
    kinds: Sequence[str],
    train_rows: Sequence[int],
    test_rows: Sequence[int],
    evaluation: Evaluation,
    *,
    regression: bool,
) -> pd.DataFrame:
    """Returns one evaluation as a frame with one row per site.

    Args:
        names: The sites.
        kinds: "new", "training" or "validation", per site.
        train_rows: Train rows per site.
        test_rows: Test rows per site; a site without any has no score (NaN).
        evaluation: Their scores.
        regression: Whether scores are RMSE.

    Returns:
        Columns site, kind, rows (train rows), test_rows, round; global_accuracy, personalized_accuracy (after the steps
        that the site takes), ungated_accuracy (after all steps), local_accuracy (training alone on support rows; NaN
        where that was not asked for), gain (how much better the personalized score is than the global one),
        steps_taken; global_loss, personalized_loss, global_ece, personalized_ece (expected calibration errors), steps
        (the list of scores by inner step). For regression `_rmse` for `_accuracy`.
    """
    name = score_name(regression)
    unjudged = np.asarray(test_rows) == 0
    scores, losses, calibration = evaluation.scores, evaluation.losses, evaluation.calibration
    last = np.arange(len(scores)), evaluation.chosen
    columns = {
        f"global_{name}": scores[:, 0],
        f"personalized_{name}": scores[last],
        f"ungated_{name}": scores[:, -1],
        f"local_{name}": evaluation.reference,
        "gain": (scores[last] - scores[:, 0]) * (-1 if regression else 1),
        "global_loss": losses[:, 0],
        "personalized_loss": losses[last],
        "global_ece": calibration[:, 0],
        "personalized_ece": calibration[last],
    }
    return pd.DataFrame(
        {
            "site": list(names),
            "kind": list(kinds),
            "rows": np.asarray(train_rows, dtype=np.int64),
            "test_rows": np.asarray(test_rows, dtype=np.int64),
            "round": evaluation.round_number,
            **{column: np.where(unjudged, np.nan, values) for column, values in columns.items()},
            "steps_taken": evaluation.chosen,
            "steps": list(np.where(unjudged[:, None], np.nan, scores).tolist()),
        }
    )


def summarize(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Returns the summaries of new and of training sites in a frame of one evaluation.

    Returns:
        Per group n (sites that have a score), diverged (see `diverged`), global and personalized (see
        `summarize_scores`, and "ece", the mean expected calibration error), helped (the share of sites whose
        personalized score is at least as good as the global one; a diverged site is not helped), the mean gain, and the
        mean scores "ungated" (all take all steps) and "local" (each on its own).
    """
    return {group: _summarise_group(frame[frame["kind"] == kind]) for kind, group in GROUPS.items()}


def _summarise_group(frame: pd.DataFrame) -> dict[str, Any]:
    regression = "global_rmse" in frame.columns
    name = score_name(regression)
    judged = frame[frame[f"global_{name}"].notna() & frame[f"personalized_{name}"].notna()]
    lost = diverged(frame)
    summary: dict[str, Any] = {"n": len(judged), "diverged": int(lost.sum())}
    for state in ("global", "personalized"):
        scores, loss, ece = (judged[f"{state}_{figure}"] for figure in (name, "loss", "ece"))
        summary[state] = {**summarize_scores(scores, loss, worst_is_high=regression), "ece": _mean(ece)}
    everyone = frame[lost | frame.index.isin(judged.index)]
    summary["helped"] = _mean((everyone["gain"] >= 0) & ~lost[everyone.index])
    summary["gain"] = _mean(judged["gain"])
    for other in ("ungated", "local"):
        summary[other] = _mean(judged[f"{other}_{name}"])
    return summary


def _mean(values: pd.Series) -> float | None:
    """Returns the mean; None where there is nothing, or nothing known."""
    mean = values.mean() if len(values) else math.nan
    return None if math.isnan(mean) else float(mean)


def summarize_scores(scores: pd.Series, losses: pd.Series, *, worst_is_high: bool = False) -> dict[str, float | None]:
    """Returns mean, std (over sites, population form), worst_decile, min and mean loss of per-site scores.

    `worst_decile` is the mean of the worst ceil(n / 10) sites: the lowest accuracies, or the highest errors. All are
    None where there is no site.
    """
    if not len(scores):
        return dict.fromkeys(("mean", "std", "worst_decile", "min", "loss"))
    worst = np.sort(scores.to_numpy())[:: -1 if worst_is_high else 1][: math.ceil(len(scores) / 10)]
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std(ddof=0)),
        "worst_decile": float(worst.mean()),
        "min": float(scores.min()),
        "loss": float(losses.mean()),
    }


def diverged(frame: pd.DataFrame) -> pd.Series[bool]:
    """Returns per site whether it has test rows and its adapted model no finite score or loss on them.

    Such a model says nothing, though an accuracy can be counted of it: adaptation has run away.
    """
    name = "rmse" if "global_rmse" in frame.columns else "accuracy"
    figures = frame[[f"personalized_{name}", "personalized_loss"]].to_numpy(dtype=np.float64)
    return pd.Series((frame["test_rows"].to_numpy() > 0) & ~np.isfinite(figures).all(axis=1), index=frame.index)


def left_behind(frame: pd.DataFrame) -> int:
    """Returns how many sites personalisation leaves worse than the global model, or without a model that works."""
    return int(((frame["gain"] < 0) | diverged(frame)).sum())


def headline(summary: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns the global and the personalized score of new sites, or of training sites where there is no new one."""
    group = summary["new_sites"] if summary["new_sites"]["n"] else summary["training_sites"]
    return group["global"]["mean"], group["personalized"]["mean"]
