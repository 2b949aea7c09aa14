"""A site's deployed model watches the site's own rows, in the file's order, and reports when to re-adapt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.rows import SiteRows, read_rows
from fedmeta.errors import FedmetaError
from fedmeta.stream.alarm import watch

FEWEST = 20
"""Of fewer rows an alarm can hardly come, which is reported."""


@dataclass(frozen=True)
class Report:
    """What a model found of the rows that it watched.

    Attributes:
        rows: The number of rows.
        rate: The probability of a false alarm on all of them, at most.
        alarm: The row, from 1, at which the alarm went off; None where it did not.
        change: The row, from 1, from which the evidence comes, an estimate: re-adapt on the rows from there on.
        capital: The largest evidence; 1 / rate is the alarm.
        before: The mean loss of the rows before the change; of all rows where there is none.
        after: The mean loss from the change on; None where there is none.
        notes: What to know of the file, a sentence each.
    """

    rows: int
    rate: float
    alarm: int | None
    change: int | None
    capital: float
    before: float
    after: float | None
    notes: tuple[str, ...]

    @property
    def advice(self) -> str:
        """What to do, in one sentence."""
        if self.alarm is None or self.change is None:
            few = f" ({self.rows} rows are few for that)" if self.rows < FEWEST else ""
            return (
                f"no alarm in {self.rows} rows{few}: the evidence reached {self.capital:.3g} of the {1 / self.rate:g} "
                "at which it would be one; keep the model"
            )
        return (
            f"alarm at row {self.alarm}: losses have risen from about row {self.change} on, from {self.before:.3g} to "
            f"{self.after:.3g} on average (a false alarm has a probability of at most {self.rate:g}); re-adapt: "
            f"fedmeta adapt on the rows from {self.change} on"
        )

    def summary(self) -> dict[str, Any]:
        """Returns it as one JSON object."""
        return {**vars(self), "notes": list(self.notes), "advice": self.advice}


def watch_file(model: SiteModel, path: str, rate: float, missing: Sequence[str] = (), seed: int = 0) -> Report:
    """Watches the labelled rows of a file, in its order.

    Args:
        model: The site's model, which stays as it is.
        path: A `.csv`, `.parquet` or `.npz` file of rows that it neither adapted nor was trained on, in time.
        rate: The probability of a false alarm on all of them, at most.
        missing: Texts that mean a missing value in the file, besides the run's.
        seed: Key of the draws that break ties.

    Raises:
        FedmetaError: The rate is no probability, or the file cannot be read or is not of the run's form.
    """
    if not 0 < rate < 1:
        raise FedmetaError(f"--rate {rate:g}: it must be a probability, above 0 and below 1")
    rows = read_rows(model, path, missing=missing)
    losses = losses_of(model, rows)
    if not np.isfinite(losses).all():
        row = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
        raise FedmetaError(f"{path}: row {row}: the model's loss there is not finite: check the row's values")
    found = watch(losses, rate, seed)
    alarm = None if found.alarm is None else found.alarm + 1
    change = None if found.change is None else found.change + 1
    until = len(losses) if found.change is None else found.change
    before = float(losses[:until].mean()) if until else float("nan")
    after = None if found.change is None else float(losses[found.change :].mean())
    return Report(len(losses), rate, alarm, change, float(found.capital.max(initial=0.0)), before, after, rows.notes)


def losses_of(model: SiteModel, rows: SiteRows) -> NDArray[np.float64]:
    """Returns the loss of each row [rows]: the negative log probability of its class, or its squared error.

    Of several targets errors are added up, each over its own scale.
    """
    with torch.no_grad():
        outputs = model(rows.x).double()
    if not model.form.regression:
        own = outputs.gather(1, rows.y.reshape(-1, 1)).clamp(min=torch.finfo(torch.float64).tiny)
        losses: NDArray[np.float64] = -own.log().reshape(-1).numpy()
        return losses
    scale = model.target_scale.double().reshape(1, -1)
    errors = (outputs.reshape(len(rows), -1) - rows.y.reshape(len(rows), -1)) / scale
    squares: NDArray[np.float64] = errors.square().sum(1).numpy()
    return squares
