"""Learners beside one another: the same sites, splits and budget, several seeds, differences with intervals."""

from fedmeta.comparison.page import markdown, spread, to_json, write
from fedmeta.comparison.results import BASELINE, Comparison, difference, interval, sites_by_learner, verdict
from fedmeta.comparison.running import compare

__all__ = [
    "BASELINE",
    "Comparison",
    "compare",
    "difference",
    "interval",
    "markdown",
    "sites_by_learner",
    "spread",
    "to_json",
    "verdict",
    "write",
]
