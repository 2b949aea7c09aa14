"""How often the prediction sets of `fedmeta adapt` hold the truth at new sites, and how large they are.

    python experiments/prediction_sets.py

trains experiments/writers.toml, digits.toml, heart.toml (with four seeds, which make three of its four hospitals
new) and har.toml, gives 10, 20 and 40 rows of each new site to the code of `fedmeta adapt`, and scores its sets on the
site's other rows, beside those of

- split conformal: the model adapts to half of the rows, and the other half sets the threshold, at the same level;
- CV+ at .05, by leaving out one row at a time, whose guarantee is 1 - 2 alpha = 90 % (Barber and others, 2021);
- one threshold of the federation: the 90 % quantile of the scores of the training sites' query rows after they adapted
  to as many rows; nothing is promised to a single site.

It writes experiments/results/prediction_sets.md. The interval of the mean coverage is a bootstrap over sites.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedmeta
from fedmeta import checkpoint, data
from fedmeta.adapt.conformal import ALPHA, make_sets
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.model import SiteModel
from fedmeta.experiment import Experiment, load_experiment
from fedmeta.models import Parameters

HERE = Path(__file__).parent
FILES = {"writers": ("writers.toml", (0,)), "digits": ("digits.toml", (0,)), "heart": ("heart.toml", (0, 1, 2, 3))}
FILES |= {"har": ("har.toml", (0,))}
SIZES = (10, 20, 40)
DRAWS = {"writers": 1, "digits": 5, "heart": 10, "har": 5}
"""How often each new site's rows are drawn."""

MOST_TRAINING_SITES = 60
"""On how many training sites the federation's threshold is measured at most."""

FEWEST_TEST_ROWS = 10
METHODS = ("min-max (ours)", "CV+ at .05", "split conformal", "federation's threshold")


class Site(NamedTuple):
    """One draw of a site's rows: raw features and codes; the first ones are known, the others score."""

    name: str
    x: Tensor
    y: Tensor


def sites(start: MetaModel, run: checkpoint.Checkpoint, names: list[str], rows: int, draws: int) -> Iterator[Site]:
    """Yields draws of rows of sites; where neighbors resemble each other, known rows are of the first half in time."""
    population = data.load(Experiment.from_toml(run.experiment).data)
    codes = data.class_codes(population.class_names, start.form.classes)
    draw = np.random.default_rng(0)
    for site in np.repeat(population.find(names), draws):
        own = population.rows(np.array([site])).rows
        if start.experiment.data.neighbors_alike:
            own = np.concatenate([draw.choice(own[: len(own) // 2], rows, replace=False), own[len(own) // 2 :]])
        else:
            own = own[draw.permutation(len(own))]
        if len(own) >= rows + FEWEST_TEST_ROWS:
            x = population.features(own).to(start.form.dtype)
            yield Site(str(population.names[site]), x, torch.from_numpy(codes[population.labels(own)]))


def scores(start: MetaModel, bare: SiteModel, parameters: Parameters, x: Tensor) -> NDArray[np.float64]:
    """Returns 1 - p of each class [rows, classes]."""
    outputs = start.learner.predict(parameters, bare.prepare(x)).detach().double().softmax(-1).numpy()
    return np.asarray(1 - outputs)


def adapted(start: MetaModel, bare: SiteModel, x: Tensor, y: Tensor) -> Parameters:
    """Returns the parameters after the run's own steps on rows."""
    return start.learner.adapt(start.state, (bare.prepare(x), y), start.steps)


def of_labels(found: NDArray[np.float64], y: Tensor) -> NDArray[np.float64]:
    """Returns the scores of the rows' own classes [rows]."""
    return found[np.arange(len(y)), y.numpy()]


def within(found: NDArray[np.float64], calibration: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns which classes a split-conformal threshold lets in; all where rows are too few."""
    rank = math.ceil((1 - ALPHA) * (len(calibration) + 1) - 1e-9)
    return found <= (np.sort(calibration)[rank - 1] if rank <= len(calibration) else math.inf)


def cv_plus(start: MetaModel, bare: SiteModel, site: Site, rows: int, alpha: float = ALPHA / 2) -> NDArray[np.bool_]:
    """Returns CV+'s sets with each row left out in turn (the jackknife+)."""
    worse = np.zeros((len(site.y) - rows, len(start.form.classes)))
    for row in range(rows):
        others = torch.arange(rows) != row
        own = adapted(start, bare, site.x[:rows][others], site.y[:rows][others])
        limit = of_labels(scores(start, bare, own, site.x[row : row + 1]), site.y[row : row + 1])
        worse += scores(start, bare, own, site.x[rows:]) > limit
    return np.asarray(worse < math.ceil((1 - alpha) * (rows + 1) - 1e-9))


def sets_of(start: MetaModel, bare: SiteModel, site: Site, rows: int, threshold: float) -> list[NDArray[np.bool_]]:
    """Returns each method's sets for a site's other rows [rows, classes]; the predicted class is in each of them."""
    known, labels = site.x[:rows], site.y[:rows]
    whole = adapted(start, bare, known, labels)
    model = SiteModel.of(start, whole)
    ours = make_sets(start, model, known, labels)
    assert ours is not None
    half = adapted(start, bare, known[: rows // 2], labels[: rows // 2])
    kept = of_labels(scores(start, bare, half, known[rows // 2 :]), labels[rows // 2 :])
    final = scores(start, bare, whole, site.x[rows:])
    split = scores(start, bare, half, site.x[rows:])
    found = [cv_plus(start, bare, site, rows), within(split, kept), final <= threshold]
    for each, own in zip(found, (final, split, final), strict=True):
        each[np.arange(len(own)), own.argmin(axis=1)] = True
    return [ours.classes(site.x[rows:]), *found]


def federation_threshold(start: MetaModel, run: checkpoint.Checkpoint, bare: SiteModel, rows: int) -> float:
    """Returns the 90 % quantile of the training sites' scores, each site with the same weight."""
    names = [name for name in run.names if name not in set(run.new_sites)][:MOST_TRAINING_SITES]
    found, weights = [], []
    for site in sites(start, run, names, rows, 1):
        own = adapted(start, bare, site.x[:rows], site.y[:rows])
        found.append(of_labels(scores(start, bare, own, site.x[rows:]), site.y[rows:]))
        weights.append(np.full(len(found[-1]), 1 / len(found[-1])))
    if not found:
        return math.nan
    values, mass = np.concatenate(found), np.concatenate(weights)
    order = np.argsort(values)
    share = np.cumsum(mass[order]) / mass.sum()
    return float(values[order][min(len(order) - 1, int(np.searchsorted(share, 1 - ALPHA)))])


def measure(name: str, runs: list[Path]) -> Iterator[str]:
    """Yields a line of the table for each number of rows and method."""
    for rows in SIZES:
        covered: dict[str, list[NDArray[np.float64]]] = {}
        count = 0
        for folder in runs:
            run = checkpoint.newest(folder)[0]
            start = MetaModel.of(run)
            bare = SiteModel.of(start, start.learner.theta(start.state))
            threshold = federation_threshold(start, run, bare, rows)
            for site in sites(start, run, list(run.new_sites), rows, DRAWS[name]):
                count += 1
                truth = site.y[rows:].numpy()
                results = [
                    (float(own[np.arange(len(truth)), truth].mean()), float(own.sum(axis=1).mean()))
                    for own in sets_of(start, bare, site, rows, threshold)
                ]
                covered.setdefault(f"{folder.name} {site.name}", []).append(np.array(results))
        if not covered:
            yield f"| {name} | {rows} | no new site has so many and {FEWEST_TEST_ROWS} more | | | | |"
            continue
        by_site = np.stack([np.mean(draws, axis=0) for draws in covered.values()])
        again = np.random.default_rng(0).integers(len(by_site), size=(2000, len(by_site)))
        low, high = np.percentile(by_site[again, :, 0].mean(axis=1), [2.5, 97.5], axis=0)
        for place, method in enumerate(METHODS):
            share, size = by_site[:, place].mean(axis=0)
            yield (
                f"| {name} | {rows} | {method} | {len(by_site)} ({count}) | **{share:.1%}** | "
                f"{low[place]:.1%} to {high[place]:.1%} | {size:.2f} |"
            )


def trained(name: str, folder: Path) -> list[Path]:
    """Returns the folders of an experiment's runs: those that are there, or else new ones."""
    file, seeds = FILES[name]
    found = []
    for seed in seeds:
        place = folder / f"{name}-{seed}"
        if not place.is_dir():
            overrides = ["tracking.uri=none", f"tracking.folder={place}", "evaluation.every=0", f"runtime.seed={seed}"]
            fedmeta.run(load_experiment(HERE / file, overrides))
        found.append(next(each for each in sorted(place.iterdir()) if each.is_dir()))
    return found


def main() -> None:
    """Trains, measures and writes the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, help="a folder for the runs; those in it are used again")
    parser.add_argument("--only", nargs="*", default=list(FILES), help="which data; the page has these alone")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prediction_sets.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lines: list[str] = []
        for name in given.only:
            for line in measure(name, trained(name, given.runs or Path(scratch))):
                print(line, flush=True)
                lines.append(line)
    given.out.write_text(PAGE + "\n".join(lines) + "\n" + AFTER, encoding="utf-8")


PAGE = """# Prediction sets at new sites: coverage and size

    python experiments/prediction_sets.py

New sites of the experiments (maml), none of which took part in training, give so many rows to the code of
`fedmeta adapt`; the sets are scored on the site's other rows. Coverage is the mean over sites, with its 95 % bootstrap
interval over sites; size is the mean number of classes in a set. Every set holds the predicted class.

| data | rows | method | sites (draws) | coverage | 95 % interval | mean size |
|---|---|---|---|---|---|---|
"""
AFTER = """
*min-max (ours)* is what `adapt` and `predict` show: at least 90 % over exchangeable rows. *CV+* at .05 promises the
same and holds every class below 19 rows. *Split conformal* promises the same by half of the rows. The *federation's
threshold* promises nothing to one site. **HAR has no guarantee**: a person's rows are in time, known rows are of the
first half and the others of the second, and the figure is what was measured there. With few sites the interval over
sites is no more than a hint.
"""

if __name__ == "__main__":
    main()
