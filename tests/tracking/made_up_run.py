"""Values of a run as they come out of an evaluation, made up but plausible, for the tests of what shows them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedmeta.evaluation import summarize
from fedmeta.problems.metric import score_of

STEPS = 5


def evaluation(
    new: int, training: int, progress: float = 1.0, round_number: int = 0, regression: bool = False
) -> pd.DataFrame:
    """One evaluation; `progress` in [0, 1] says how far training has come."""
    draws = np.random.default_rng(0)
    count = new + training
    rows = draws.integers(8, 200, count)
    talent = draws.normal(0, 0.05, count)
    before = np.clip(0.35 + 0.35 * progress + 2 * talent, 0.05, 0.98)
    gain = (0.05 + 0.2 * progress) * draws.uniform(-0.15, 1, count) * (rows / rows.max()) ** 0.3
    steps = before[:, None] + gain[:, None] * (1 - np.exp(-np.arange(STEPS + 1) / (STEPS - 2))) / (
        1 - np.exp(-STEPS / 3)
    )
    scores = np.clip(steps, 0.02, 0.99)
    if regression:
        scores = 3 - 2 * scores
    score = "rmse" if regression else "accuracy"
    return pd.DataFrame(
        {
            "site": [f"new-{i:03}" for i in range(new)] + [f"site-{i:03}" for i in range(training)],
            "kind": ["new"] * new + ["training"] * training,
            "rows": rows,
            "test_rows": rows,
            "round": round_number,
            "higher_is_better": not regression,
            f"global_{score}": scores[:, 0],
            f"personalized_{score}": scores[:, -1],
            f"ungated_{score}": scores[:, -1],
            f"local_{score}": np.nan,
            "gain": (scores[:, -1] - scores[:, 0]) * (-1 if regression else 1),
            "global_loss": scores[:, 0],
            "personalized_loss": scores[:, -1],
            "global_ece": 0.1,
            "personalized_ece": 0.1,
            "steps_taken": STEPS,
            "steps": scores.tolist(),
        }
    )


def summary(sites: pd.DataFrame, rounds: int, learner: str = "maml") -> dict[str, Any]:
    last = sites[sites["round"] == sites["round"].max()]
    return {
        "run_id": "r",
        "learner": learner,
        "seed": 0,
        "rounds": rounds,
        "wall_s": 12.3,
        "bytes_down": 1_000_000,
        "bytes_up": 1_000_000,
        "failures": 0,
        "score": score_of(sites).to_json(),
        **summarize(last, [score_of(sites)]),
        "checkpoint": str(Path("checkpoint")),
    }


def history(new: int, training: int, rounds: int, every: int) -> pd.DataFrame:
    """All evaluations of a run, from before training to its end."""
    evaluated = range(0, rounds + 1, every)
    return pd.concat(
        [evaluation(new, training, 1 - math.exp(-3 * r / rounds), round_number=r) for r in evaluated], ignore_index=True
    )
