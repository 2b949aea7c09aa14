"""Values of a run as they come out of an evaluation, made up but plausible, for the tests of what shows them."""

import math
from typing import Any

import numpy as np
import pandas as pd

from fedmeta.evaluation import summarize
from fedmeta.problems.metric import Metric

STEPS = 5
ACCURACY = Metric("accuracy", True)
RMSE = Metric("rmse", False)
SNR = Metric("snr", True, "dB")
"""A score of an own problem: may be negative, and has a unit."""
SCALES = {"accuracy": (0.0, 1.0), "rmse": (3.0, -2.0), "snr": (-40.0, 30.0)}


def evaluation(
    new: int, training: int, progress: float = 1.0, round_number: int = 0, score: Metric = ACCURACY
) -> pd.DataFrame:
    """One evaluation; `progress` in [0, 1] is how far training has come."""
    draws = np.random.default_rng(0)
    count = new + training
    rows = draws.integers(8, 200, count)
    talent = draws.normal(0, 0.05, count)
    before = np.clip(0.35 + 0.35 * progress + 2 * talent, 0.05, 0.98)
    gain = (0.05 + 0.2 * progress) * draws.uniform(-0.15, 1, count) * (rows / rows.max()) ** 0.3
    done = (1 - np.exp(-np.arange(STEPS + 1) / (STEPS - 2))) / (1 - np.exp(-STEPS / 3))
    base, scale = SCALES[score.name]
    scores = base + scale * np.clip(before[:, None] + gain[:, None] * done, 0.02, 0.99)
    return pd.DataFrame(
        {
            "site": [f"new-{i:03}" for i in range(new)] + [f"site-{i:03}" for i in range(training)],
            "kind": ["new"] * new + ["training"] * training,
            "rows": rows,
            "test_rows": rows,
            "round": round_number,
            "higher_is_better": score.higher_is_better,
            f"global_{score.name}": scores[:, 0],
            f"personalized_{score.name}": scores[:, -1],
            f"ungated_{score.name}": scores[:, -1],
            f"local_{score.name}": np.nan,
            "gain": (scores[:, -1] - scores[:, 0]) * score.sign,
            "global_ece": 0.1,
            "personalized_ece": 0.1,
            "local_ece": np.nan,
            "global_loss": 1.0,
            "personalized_loss": 0.5,
            "steps_taken": STEPS,
            "steps": scores.tolist(),
        }
    )


def groups(sites: pd.DataFrame, score: Metric = ACCURACY) -> dict[str, dict[str, Any]]:
    return summarize(sites[sites["round"] == sites["round"].max()], [score, Metric("ece", False)])


def summary(sites: pd.DataFrame, rounds: int, learner: str = "maml", score: Metric = ACCURACY) -> dict[str, Any]:
    return {
        "run_id": "r",
        "learner": learner,
        "seed": 0,
        "rounds": rounds,
        "wall_s": 12.3,
        "bytes_down": 1_000_000,
        "bytes_up": 1_000_000,
        "failures": 0,
        "score": score.to_json(),
        **groups(sites, score),
        "checkpoint": "checkpoint",
    }


def history(new: int, training: int, rounds: int, every: int) -> pd.DataFrame:
    """All evaluations of a run, from before training to its end."""
    evaluated = range(0, rounds + 1, every)
    return pd.concat(
        [evaluation(new, training, 1 - math.exp(-3 * r / rounds), round_number=r) for r in evaluated], ignore_index=True
    )
