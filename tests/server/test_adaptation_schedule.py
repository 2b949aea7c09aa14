"""How far sites adapt is chosen by the smallest mean loss over validation sites."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fedmeta
from server.adaptation_schedule import RATES, tune_adaptation
from tests.server.digits import digits


def test_takes_the_smallest_mean_loss() -> None:
    def losses_at(rate: float, steps: int) -> np.ndarray:
        curve = np.abs(np.arange(steps + 1) * rate - 3.0)
        return np.stack([curve + 1, curve + 3])

    found = tune_adaptation(losses_at, 4)
    assert found is not None
    assert (found.steps, found.rate) == (3, 1.0)
    assert set(found.losses) == {f"{rate:g}" for rate in RATES}
    assert found.losses["1"][3] == 2.0


def test_of_equals_the_fewest_steps() -> None:
    found = tune_adaptation(lambda rate, steps: np.ones((2, steps + 1)), 4)
    assert found is not None
    assert (found.steps, found.rate) == (0, min(RATES))


def test_steps_that_diverge_are_not_taken() -> None:
    def losses_at(rate: float, steps: int) -> np.ndarray:
        losses = np.ones((3, steps + 1))
        losses[:, 2] = 0.5
        losses[1, 2] = np.nan if rate > 1 else 0.5
        return losses

    found = tune_adaptation(losses_at, 2)
    assert found is not None
    assert (found.steps, found.rate) == (2, min(RATES))


def test_nobody_answers() -> None:
    assert tune_adaptation(lambda rate, steps: None, 4) is None


@pytest.mark.slow
def test_training_alone_is_the_same_reference_whatever_the_learner_does_itself(tmp_path: Path) -> None:
    def sites(learner: str) -> pd.DataFrame:
        settings = (f"learner.name={learner}", "server.rounds=1", "evaluation.every=0")
        return fedmeta.run(digits(tmp_path, *settings)).sites

    local = sites("local")["local_accuracy"]
    assert local.mean() > 0.6
    for learner in ("fedavg", "per-fedavg", "maml"):
        pd.testing.assert_series_equal(sites(learner)["local_accuracy"], local, check_names=False)
