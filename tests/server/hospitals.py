"""A small federation of nodes with a CSV file each, as in a deployment."""

from pathlib import Path
from typing import Any

import numpy as np

from fedmeta.experiment import Experiment

GRANTED = {"min_support": 1, "min_query": 1, "min_test": 1, "max_evaluations": 1000}
"""What sites as small as these must grant beyond a node's defaults."""

SETTINGS = """
[data]
source = "synthetic"
support = 4
query = 4
new_sites = 0

[model]
name = "logistic"

[learner]
inner_steps = 1

[server]
rounds = 3
sites_per_round = 0
round_timeout = 0.5

[evaluation]
every = 0

[tracking]
uri = "none"
"""


def hospitals(folder: Path, *overrides: str) -> Experiment:
    """Returns the experiment of a federation whose nodes name their own files."""
    return Experiment.from_toml(SETTINGS, overrides=[f"tracking.folder={folder / 'runs'}", *overrides])


def hospital(
    folder: Path,
    name: str,
    rows: int = 12,
    columns: tuple[str, ...] = ("age", "pressure"),
    classes: tuple[str, ...] = ("healthy", "ill"),
) -> dict[str, Any]:
    """Writes a hospital's file; returns its node's config, which grants tasks of few rows."""
    draw = np.random.default_rng(len(name) + rows)
    lines = [",".join([*columns, "label"])]
    for row in range(rows):
        values = [f"{value:.3f}" for value in draw.normal(size=len(columns))]
        lines.append(",".join([*values, classes[row % len(classes)]]))
    path = folder / f"{name}.csv"
    path.write_text("\n".join(lines) + "\n")
    return {"site": name, "data": str(path), **GRANTED}
