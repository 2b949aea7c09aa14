"""Scores by hand."""

import pytest
import torch
from torch import nn

from fedmeta import Task, engines
from fedmeta.engines import ENGINES
from fedmeta.learners import build
from fedmeta.problems.rows import calibration_error, loss, row_errors, row_losses, score


def test_calibration_error_by_hand() -> None:
    # Confidences .9 (right), .9 (wrong), .6 (right): gaps |.5 - .9| in one bin of two rows, |1 - .6| in another of one.
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    error = calibration_error(p.log(), y, torch.ones(3, dtype=torch.float64))
    assert error.item() == pytest.approx((2 * 0.4 + 0.4) / 3)


def test_padding_and_unseen_classes() -> None:
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    y, mask = torch.tensor([0, -1, 0]), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert score(p.log(), y, mask).item() == pytest.approx(0.5)
    assert loss(p.log(), y, mask).item() == pytest.approx(-torch.tensor(0.8).log().item())
    assert calibration_error(p.log(), y, mask).item() == pytest.approx(abs(0.5 - 0.8))


def test_regression_has_no_calibration() -> None:
    y = torch.zeros(4)
    assert calibration_error(torch.ones(4, 1), y, torch.ones(4)).isnan()
    assert score(torch.full((4, 1), 2.0), y, torch.ones(4)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_may_be_integers_of_any_width(dtype: torch.dtype, engine: str) -> None:
    learner = build("maml", nn.Linear(4, 3), inner_steps=2)
    state, x, y = learner.init(0), torch.randn(6, 4), torch.arange(6) % 3
    expected, _, _ = engines.meta_gradients(learner, state, [Task((x, y), (x, y))], engine)
    narrow = y.to(dtype)
    found, _, _ = engines.meta_gradients(learner, state, [Task((x, narrow), (x, narrow))], engine)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_row_errors_are_the_derivatives_of_row_losses(rows: int, targets: int | None) -> None:
    outputs = torch.randn(rows, targets or 4, dtype=torch.float64, requires_grad=True)
    y = torch.arange(rows) % 4 - 1 if targets is None else torch.randn(rows, targets, dtype=torch.float64).squeeze(1)
    (expected,) = torch.autograd.grad(row_losses(outputs, y).sum(), outputs)
    torch.testing.assert_close(row_errors(outputs, y), expected)
    assert torch.autograd.gradcheck(lambda outputs: row_errors(outputs, y), (outputs,))


def test_calibration_has_ten_bins() -> None:
    """Rows of confidences .55, .65, ... lie in bins of their own: right ones and wrong ones do not cancel."""
    confidence = torch.tensor([0.55, 0.65, 0.75, 0.85, 0.95])
    outputs = torch.stack([confidence, 1 - confidence], 1).log()
    y, mask = torch.tensor([0, 1, 0, 1, 0]), torch.ones(5)
    expected = (0.45 + 0.65 + 0.25 + 0.85 + 0.05) / 5
    assert float(calibration_error(outputs, y, mask)) == pytest.approx(expected, abs=1e-6)
