"""How far sites adapt is chosen by the smallest mean loss over validation sites."""

import numpy as np

from server.schedule import RATES, choose_schedule


def test_takes_the_smallest_mean_loss() -> None:
    def losses_at(rate: float, steps: int) -> np.ndarray:
        curve = np.abs(np.arange(steps + 1) * rate - 3.0)
        return np.stack([curve + 1, curve + 3])

    found = choose_schedule(losses_at, 4)
    assert found is not None
    assert (found.steps, found.rate) == (3, 1.0)
    assert set(found.losses) == {f"{rate:g}" for rate in RATES}
    assert found.losses["1"][3] == 2.0


def test_of_equals_the_fewest_steps() -> None:
    found = choose_schedule(lambda rate, steps: np.ones((2, steps + 1)), 4)
    assert found is not None
    assert (found.steps, found.rate) == (0, min(RATES))


def test_steps_that_diverge_are_not_taken() -> None:
    def losses_at(rate: float, steps: int) -> np.ndarray:
        losses = np.ones((3, steps + 1))
        losses[:, 2] = 0.5
        losses[1, 2] = np.nan if rate > 1 else 0.5
        return losses

    found = choose_schedule(losses_at, 2)
    assert found is not None
    assert (found.steps, found.rate) == (2, min(RATES))


def test_nobody_answers() -> None:
    assert choose_schedule(lambda rate, steps: None, 4) is None
