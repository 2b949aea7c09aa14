"""Scores by hand."""

import pytest
import torch

from fedmeta.learners.loss import calibration_error, loss, score


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
