"""What the pages of the gallery share: runs over seeds, scores of other starts on the same tasks, intervals, tables."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedmeta
from fedmeta.evaluation import bootstrap_interval
from fedmeta.learners import Learner
from fedmeta.problems.problem import Parameters
from fedmeta.runtime import Result

Floats = NDArray[np.float64]

SEEDS = tuple(range(int(os.environ.get("GALLERY_SEEDS", "3"))))
"""Three of them, unless GALLERY_SEEDS asks for a quicker look; pages name how many their figures are of."""


def run(entry: str, *overrides: str, seed: int = 0) -> Result:
    """Returns the finished run of an entry's TOML file, untracked, in a temporary folder."""
    file = Path(__file__).parent / entry / "run.toml"
    with tempfile.TemporaryDirectory() as folder:
        usual = ["tracking.uri=none", f"tracking.folder={folder}", "evaluation.local_baseline=none"]
        settings = [*usual, "evaluation.every=0", f"runtime.seed={seed}", *overrides]
        return fedmeta.run(fedmeta.load_experiment(file, settings))


def new_sites(result: Result) -> list[str]:
    """Returns the names of the sites that took no part in training."""
    return sorted(result.sites.loc[result.sites["kind"] == "new", "site"])


def training_sites(result: Result) -> list[str]:
    """Returns the names of the sites that took part."""
    return sorted(result.sites.loc[result.sites["kind"] == "training", "site"])


def started(learner: Learner, start: Parameters) -> dict[str, Tensor]:
    """Returns a meta-state whose parameters begin at `start`; what that lacks begins where the problem has it."""
    return {key: start.get(key.removeprefix("theta."), value) for key, value in learner.init(0).items()}


def solutions(
    learner: Learner,
    state: Mapping[str, Tensor],
    source: fedmeta.TaskSource,
    sites: Sequence[str],
    steps: int,
    purpose: str = "test",
    seed: int = 0,
) -> list[Parameters]:
    """Returns what each site's own solver makes of a start in so many steps on its support data."""
    number = 0 if purpose == "test" else 1
    found = []
    for site in sites:
        support = source.task(site, purpose, number, seed).support
        found.append({name: value.detach() for name, value in learner.adapt(state, support, steps).items()})
    return found


def average(parameters: Sequence[Parameters]) -> Parameters:
    """Returns the mean of the sites' own solutions, constraints not applied."""
    return {name: torch.stack([own[name] for own in parameters]).mean(0) for name in parameters[0]}


def scores(
    learner: Learner,
    state: Mapping[str, Tensor],
    source: fedmeta.TaskSource,
    sites: Sequence[str],
    steps: int,
    seed: int = 0,
) -> dict[str, Floats]:
    """Returns each metric [sites, steps + 1] on the sites' test tasks after 0, 1, ... `steps` steps from a start."""
    rows: dict[str, list[list[float]]] = {metric.name: [] for metric in learner.problem.metrics}
    for site in sites:
        support, query = source.task(site, "test", 0, seed)
        path = learner.adaptation_path(state, support, steps)
        with torch.no_grad():
            found = [learner.evaluate(own, query) for own in path]
        for name, values in rows.items():
            values.append([float(each[name]) for each in found])
    return {name: np.array(values) for name, values in rows.items()}


def interval(values: Any, digits: int = 3, sign: bool = False) -> str:
    """Returns the mean over sites with its 95 % interval (bootstrap over sites, all seeds of one together).

    Args:
        values: One value per site [sites], or per seed and site [seeds, sites].
        digits: Digits after the point.
        sign: Whether a plus is written.
    """
    by_site = np.atleast_2d(np.asarray(values, dtype=float)).mean(0)
    low, high = bootstrap_interval(by_site)
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{by_site.mean():{form}} [{low:{form}}, {high:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(entry: str, name: str, text: str) -> None:
    """Writes measured text into an entry's page, between the marks `<!-- NAME -->` and `<!-- end -->`."""
    page = Path(__file__).parent / entry / "README.md"
    before = page.read_text(encoding="utf-8")
    mark = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not mark.search(before):
        raise SystemExit(f"{page} has no place for {name}")
    page.write_text(mark.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before), encoding="utf-8")
    print(f"{name}\n{text}\n", flush=True)
