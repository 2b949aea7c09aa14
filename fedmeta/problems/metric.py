"""A figure of merit as a value: its name, which way is better, its unit and its possible range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

DIVERGED = 100.0
"""How many times the global model's loss, or 1, the adapted one's may be before the site counts as diverged."""


@dataclass(frozen=True)
class Metric:
    """What a site's solution is scored by.

    Attributes:
        name: How columns, tables and MLflow name it, such as "accuracy" or "snr".
        higher_is_better: Which way is better.
        unit: Its unit, such as "dB"; empty for none.
        low: The smallest possible value.
        high: The largest possible value.
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1: a difference times this is positive where it improves."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def label(self) -> str:
        """The name with the unit, for axes and headings."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def better(self, one: float, other: float) -> bool:
        """Returns whether one value is strictly better than another; never with NaN."""
        return self.sign * (one - other) > 0

    def to_json(self) -> dict[str, Any]:
        """Returns the entry "score" of a run's summary."""
        return {"name": self.name, "higher_is_better": self.higher_is_better, "unit": self.unit}


def metric_of(entry: Mapping[str, Any]) -> Metric:
    """Returns the metric that an entry of a summary describes (`Metric.to_json`)."""
    return Metric(str(entry["name"]), bool(entry["higher_is_better"]), str(entry.get("unit", "")))


def score_of(sites: pd.DataFrame) -> Metric:
    """Returns what a frame of sites (`fedmeta.evaluation.sites_frame`) is scored by; without its unit."""
    name = next(str(column).removeprefix("ungated_") for column in sites.columns if str(column).startswith("ungated_"))
    return Metric(name, bool(sites["higher_is_better"].iloc[0]) if len(sites) else True)


def gain_label(score: Metric) -> str:
    """Returns the label of an axis of gains, positive where personalization helps."""
    return f"gain in {score.label}" if score.higher_is_better else f"reduction of {score.label}"
