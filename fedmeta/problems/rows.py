"""Losses and scores of a batch of rows, as functions of outputs, labels and a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedmeta.errors import FedmetaError

BINS = 10


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of values [n] over the rows where mask [n] is 1; zero where there is no row."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Returns the loss of each row [n].

    Cross-entropy where y [n] holds classes, of any type of whole numbers (a row of an unseen class, -1, must be masked
    out by the caller), squared error, averaged over a row's targets, where y [n] or [n, targets] is floating point.

    Raises:
        FedmetaError: Outputs and labels do not fit each other.
    """
    check_shapes(outputs, y)
    if y.is_floating_point():
        errors = (outputs.reshape(y.shape) - y).square()
        return errors if y.dim() == 1 else errors.flatten(1).mean(1)
    try:
        return functional.cross_entropy(outputs, y.long().clamp(min=0), reduction="none")
    except IndexError:
        raise FedmetaError(beyond(int(y.max()), outputs.shape[-1])) from None


def row_errors(outputs: Tensor, y: Tensor) -> Tensor:
    """Returns the derivative of each row's loss (`row_losses`) with respect to its outputs, in their shape.

    In closed form: softmax minus one-hot, or twice the error over the number of targets; differentiable once more.

    Raises:
        FedmetaError: Outputs and labels do not fit each other.
    """
    check_shapes(outputs, y)
    if y.is_floating_point():
        errors = 2 * (outputs.reshape(y.shape) - y)
        return (errors if y.dim() == 1 else errors / y[0].numel()).reshape(outputs.shape)
    own = y.clamp(min=0).unsqueeze(-1) == torch.arange(outputs.shape[-1], device=y.device)
    return outputs.softmax(-1) - own.to(outputs.dtype)


def check_shapes(outputs: Tensor, y: Tensor) -> None:
    """Checks that there are outputs [n, classes] for classes y [n], or as many numbers as floating-point y [n, ...].

    Raises:
        FedmetaError: There are not.
    """
    shapes = f"outputs of shape {tuple(outputs.shape)}, labels of shape {tuple(y.shape)}"
    if y.is_floating_point():
        if outputs.shape[:1] != y.shape[:1] or outputs.numel() != y.numel():
            raise FedmetaError(f"{shapes}: a regression needs as many outputs for each row as it has targets")
        return
    if y.dim() != 1:
        raise FedmetaError(
            f"{shapes}: labels of whole numbers are classes, one for each row: make y [n] (y[:, 0] of one column), "
            "take floating-point y for a regression, or give a fedmeta.problems.Supervised of your own another loss"
        )
    if outputs.dim() != 2 or len(outputs) != len(y):
        raise FedmetaError(f"{shapes}: the model must return outputs [{len(y)}, classes], one row for each row of x")
    if outputs.shape[1] == 1:
        raise FedmetaError(
            f"{shapes}: one output for labels that are classes: give the model an output for each class, 2 for two, or "
            "take floating-point y for a regression"
        )


def beyond(label: int, classes: int) -> str:
    """Returns what is wrong with a label that the model has no output for."""
    return (
        f"label {label} is beyond the model's {classes} outputs, which are for classes 0 to {classes - 1}: number "
        "classes from 0, or give the model more outputs"
    )


def loss(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean loss (a scalar) over the rows of mask [n]; rows of an unseen class count for nothing."""
    check_shapes(outputs, y)
    if not y.is_floating_point():
        mask = mask * (y >= 0)
    return masked_mean(row_losses(outputs, y), mask)


def score(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Returns the accuracy (a row of an unseen class counts as wrong), or the RMSE for floating-point y; a scalar."""
    if y.is_floating_point():
        return masked_mean(row_losses(outputs, y), mask).sqrt()
    return masked_mean((outputs.argmax(-1) == y).to(mask.dtype), mask)


def calibration_error(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Returns the expected calibration error over ten bins of equal width (Guo et al., ICML 2017, eq. 3); a scalar.

    The mean over rows of how far, in a row's bin of confidence, mean confidence and accuracy lie apart. A row of an
    unseen class counts as wrong. NaN for floating-point y.
    """
    if y.is_floating_point():
        return torch.full_like(mask.sum(), torch.nan)
    confidence, predicted = outputs.softmax(-1).max(-1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    member = (bins[:, None] == torch.arange(BINS, device=bins.device)).to(mask.dtype) * mask[:, None]
    gaps = (member * ((predicted == y).to(mask.dtype) - confidence.to(mask.dtype))[:, None]).sum(0).abs()
    return gaps.sum() / mask.sum().clamp(min=1)


def concatenate(*parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns several (x, y, mask) as one."""
    x, y, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return x, y, mask
