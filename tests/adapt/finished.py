"""Small finished runs for the tests of sites that join after them, and files of such sites."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fedmeta
from fedmeta.adapt.initialization import FILE, MetaModel
from fedmeta.experiment import Experiment

COLUMNS = ("age", "dose", "weight")


def rows(seed: int, count: int, tilt: float, missing: float = 0.0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Patients of one hospital: features in units of their own, and a score whose meaning `tilt` shifts."""
    draw = np.random.default_rng(seed)
    plain = draw.normal(size=(count, len(COLUMNS)))
    score = plain @ [1.0, 2.0, 0.0] + tilt * plain[:, 2] + 0.3 * draw.normal(size=count)
    x = plain * [10.0, 0.01, 1000.0] + [50.0, 0.2, 70000.0]
    x[draw.uniform(size=x.shape) < missing] = np.nan
    return x, score


def write_csv(path: Path, x: NDArray[Any], labels: list[Any], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "label"])
        for row, label in zip(x.tolist(), labels, strict=True):
            writer.writerow(["" if value != value else value for value in row] + [label])
    return path


def labels_of(score: NDArray[Any]) -> list[str]:
    return ["ill" if value > 0 else "well" for value in score]


def hospitals(folder: Path, regression: bool = False, missing: float = 0.0) -> Path:
    """Eight hospitals' files, half of which weigh the third column one way and half the other."""
    folder.mkdir()
    for number in range(8):
        x, score = rows(number, 60, 3.0 if number % 2 else -3.0, missing)
        labels = score.round(3).tolist() if regression else labels_of(score)
        write_csv(folder / f"hospital-{number}.csv", x, labels)
    return folder


def experiment(tmp: Path, data: Path | None = None, *overrides: str) -> Experiment:
    of_data = [f"data.path={data}", "data.source=tables"] if data else ["data.source=digits"]
    usual = ["server.rounds=30", "server.sites_per_round=0", "server.lr=0.02", "learner.inner_lr=0.2"]
    usual += ["tracking.uri=none", f"tracking.folder={tmp / 'runs'}", "evaluation.every=0", "model.hidden=8"]
    return Experiment().with_overrides([*of_data, *usual, *overrides])


def run(tmp: Path, data: Path | None = None, *overrides: str) -> tuple[fedmeta.Result, MetaModel]:
    """Runs an experiment to its end; returns the result and what it leaves."""
    from fedmeta import checkpoint

    result = fedmeta.run(experiment(tmp, data, *overrides))
    start = MetaModel.of(checkpoint.newest(result.folder)[0])
    start.write(tmp / FILE)
    return result, start
