"""What private runs on the same sites have spent together: their epsilons and deltas add up (basic composition)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fedmeta.experiment import Experiment
from fedmeta.tracking.mlflow_client import SUMMARY

LEDGER = "privacy.json"
"""The file by which a private run counts its rounds, from the first on."""


def privacy_spent(experiment: Experiment, folders: Iterable[Path]) -> str:
    """Returns one sentence about the privacy that runs have spent together; empty where they add no noise.

    Args:
        experiment: What they have in common.
        folders: Folders of runs, or of folders of runs.
    """
    if not experiment.privacy.noise_multiplier:
        return ""
    epsilon, delta, counted, open_ = 0.0, 0.0, 0, 0
    for run in sorted({ledger.parent for folder in folders for ledger in folder.rglob(LEDGER)}):
        try:
            spent = json.loads((run / SUMMARY).read_text(encoding="utf-8"))["privacy"]
            epsilon, delta, counted = epsilon + float(spent["epsilon"]), delta + float(spent["delta"]), counted + 1
        except (OSError, ValueError, KeyError, TypeError):
            open_ += 1
    text = f"Privacy: {counted} runs on the same sites have spent epsilon {epsilon:.3g} at delta {delta:.2g} together"
    if open_:
        text += f"; {open_} more did not end, and what they spent is not in it"
    return f"{text}. The choice among them is not covered by any one run's epsilon."
