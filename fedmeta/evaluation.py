"""Before and after adaptation: one row per site, and summaries over sites.

Scores are accuracies, or root mean squared errors for regression (lower is better there, and "worst" is highest).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

NEW, TRAINING = "new", "training"
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
    scores: NDArray[np.float64],
    losses: NDArray[np.float64],
    *,
    round_number: int,
    regression: bool,
) -> pd.DataFrame:
    """Returns one evaluation as a frame with one row per site.

    Args:
        names: The sites.
        kinds: "new" or "training", per site.
        train_rows: Train rows per site.
        test_rows: Test rows per site; a site without any has no score (NaN).
        scores: The score after 0, 1, ... inner steps [sites, steps + 1].
        losses: The loss, of the same shape.
        round_number: The round after which the sites were evaluated.
        regression: Whether scores are RMSE.

    Returns:
        Columns site, kind, rows, test_rows, round, global_accuracy, personalized_accuracy, gain (how much better the
        personalized score is), global_loss, personalized_loss, steps (the list of scores by inner step); for
        regression `_rmse` for `_accuracy`.
    """
    name = score_name(regression)
    judged = np.asarray(test_rows) > 0
    scores = np.where(judged[:, None], scores, np.nan)
    losses = np.where(judged[:, None], losses, np.nan)
    gain = scores[:, -1] - scores[:, 0]
    return pd.DataFrame(
        {
            "site": list(names),
            "kind": list(kinds),
            "rows": np.asarray(train_rows, dtype=np.int64),
            "test_rows": np.asarray(test_rows, dtype=np.int64),
            "round": round_number,
            f"global_{name}": scores[:, 0],
            f"personalized_{name}": scores[:, -1],
            "gain": -gain if regression else gain,
            "global_loss": losses[:, 0],
            "personalized_loss": losses[:, -1],
            "steps": list(scores.tolist()),
        }
    )


def summarise(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Returns the summaries of new and of training sites in a frame of one evaluation.

    Returns:
        Per group n (sites that have test rows), global and personalized (see `summarise_scores`), and helped: the
        share of sites whose personalized score is at least as good as the global one.
    """
    return {group: _summarise_group(frame[frame["kind"] == kind]) for kind, group in GROUPS.items()}


def _summarise_group(frame: pd.DataFrame) -> dict[str, Any]:
    regression = "global_rmse" in frame.columns
    name = score_name(regression)
    judged = frame[frame[f"global_{name}"].notna() & frame[f"personalized_{name}"].notna()]
    helped = judged["gain"] >= 0
    return {
        "n": len(judged),
        "global": summarise_scores(judged[f"global_{name}"], judged["global_loss"], worst_is_high=regression),
        "personalized": summarise_scores(
            judged[f"personalized_{name}"], judged["personalized_loss"], worst_is_high=regression
        ),
        "helped": float(helped.mean()) if len(judged) else None,
    }


def summarise_scores(scores: pd.Series, losses: pd.Series, *, worst_is_high: bool = False) -> dict[str, float | None]:
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


def left_behind(frame: pd.DataFrame) -> int:
    """Returns how many sites personalisation leaves worse than the global model."""
    return int((frame["gain"] < 0).sum())


def headline(summary: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns the global and the personalized score of new sites, or of training sites where there is no new one."""
    group = summary["new_sites"] if summary["new_sites"]["n"] else summary["training_sites"]
    return group["global"]["mean"], group["personalized"]["mean"]
