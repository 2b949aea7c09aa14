"""Is local-only a strong baseline? Held against scikit-learn's default models on the same rows of real sites.

    python experiments/local_only.py

takes every data set of ../shared/data that has labels, lets each site solve alone on its support rows as
`evaluation.local_baseline = "auto"` does, and scores it on the site's test rows beside what a default
LogisticRegression and default boosted trees reach on the same rows. It writes experiments/results/local_only.md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from clients.local_models import fit_rows
from clients.node import RowNode
from fedmeta import data
from fedmeta.build import learner_of
from fedmeta.experiment import Experiment, load_experiment
from fedmeta.messages import LOCAL_METHODS
from fedmeta.task import Batch

HERE = Path(__file__).parent
SIZES = {"heart": (20, 100), "har": (20, 100), "writers": (20, 60), "omniglot": (5,), "shakespeare": (20, 60)}
"""How many support rows at most each data set's sites solve on; Omniglot's tasks have one drawing of each of five."""

MOST_SITES = 40
"""How many sites of each data set are solved; seconds each with scikit-learn."""

SLACK = 0.005
"""How far below LogisticRegression's mean the local-only mean may be."""


@dataclass(frozen=True)
class Compared:
    """Mean accuracies over the sites of one data set.

    Attributes:
        name: The data set.
        support: The most support rows of a site.
        sites: How many sites (or tasks) were solved.
        auto: Local-only.
        logistic: LogisticRegression().
        trees: HistGradientBoostingClassifier(); NaN where it was not tried.
        seconds: What local-only took, all sites together.
        methods: How many sites each method won.
    """

    name: str
    support: int
    sites: int
    auto: float
    logistic: float
    trees: float
    seconds: float
    methods: str

    @property
    def passed(self) -> bool:
        """Whether local-only is not below LogisticRegression by more than `SLACK`."""
        return self.auto >= self.logistic - SLACK


def batches(experiment: Experiment, most: int = MOST_SITES) -> tuple[Iterator[Batch], tuple[int, ...], tuple[str, ...]]:
    """Returns the evaluation tasks of an experiment's sites, the shape of a row, and the classes."""
    population = data.load(experiment.data)
    node = RowNode(
        experiment,
        population,
        data.split(population, experiment.data, experiment.runtime.seed),
        np.arange(len(population)),
    )
    scale = data.standardisation(node.sums(node.hosted))
    classes = data.order_classes(node.classes())
    tested = np.flatnonzero(node.split.test_sizes(node.hosted) > 0)
    drawn = np.sort(np.random.default_rng(0).permutation(tested)[:most])
    return (batch for _, batch in node.evaluation_batches(drawn, scale, classes)), node.shape, classes


def default_accuracy(kind: type, batch: Batch, site: int, **settings: object) -> float:
    """Returns the accuracy on a site's query rows of a scikit-learn model fitted to its support rows."""
    (x, y, mask), (qx, qy, qmask) = batch.support, batch.query
    rows = [(a[site].numpy(), b[site].numpy(), m[site].numpy() > 0) for a, b, m in ((x, y, mask), (qx, qy, qmask))]
    (fit_x, fit_y), (test_x, test_y) = ((_vectors(a[m]), b[m]) for a, b, m in rows)
    if len(np.unique(fit_y)) < 2:
        return float((test_y == fit_y[0]).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float((kind(**settings).fit(fit_x, fit_y).predict(test_x) == test_y).mean())


def _vectors(x: NDArray[np.floating | np.integer]) -> NDArray[np.float64]:
    if np.issubdtype(x.dtype, np.integer):
        return np.eye(CODES)[x].reshape(len(x), -1)
    return x.reshape(len(x), -1).astype(np.float64)


CODES = 80
"""The symbols of Shakespeare's text."""


def compare(name: str, support: int, most: int = MOST_SITES, trees: bool = True) -> Compared:
    """Returns how local-only and scikit-learn's defaults do on the sites of one data set."""
    settings = ["tracking.uri=none"] + ([] if name == "omniglot" else [f"data.support={support}"])
    experiment = load_experiment(HERE / f"{name}.toml", settings).absolute()
    found, shape, classes = batches(experiment, most)
    learner = learner_of(experiment, shape, classes, 0)
    start = learner.init(experiment.runtime.seed)
    own: dict[str, list[float]] = {"auto": [], "logistic": [], "trees": []}
    seconds, methods = 0.0, Counter[str]()
    for batch in found:
        began = time.process_time()
        figures, chosen = fit_rows(learner, start, batch, experiment)
        seconds += time.process_time() - began
        methods.update(LOCAL_METHODS[number] for number in chosen)
        own["auto"] += figures["accuracy"][:, 0].tolist()
        for site in range(batch.sites):
            own["logistic"].append(default_accuracy(LogisticRegression, batch, site))
            few = int(batch.support[2][site].sum()) < 50 or not trees
            own["trees"].append(np.nan if few else default_accuracy(HistGradientBoostingClassifier, batch, site))
    means = {key: float(np.mean(values)) if len(values) else np.nan for key, values in own.items()}
    text = ", ".join(f"{method} {count}" for method, count in methods.most_common())
    return Compared(name, support, len(own["auto"]), **means, seconds=seconds, methods=text)


def main() -> None:
    """Compares on every data set, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"data sets; all of {', '.join(SIZES)} if none is named")
    parser.add_argument("--sites", type=int, default=MOST_SITES, help="how many sites of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.names or SIZES:
        for support in SIZES[name]:
            found = compare(name, support, options.sites, trees=name in ("heart", "writers"))
            rows.append(found)
            print(found, flush=True)
    if not options.names:
        (HERE / "results" / "local_only.md").write_text("\n".join(page(rows, options.sites)) + "\n")
    if not all(row.passed for row in rows):
        raise SystemExit(1)


def page(rows: list[Compared], most: int) -> list[str]:
    """Returns the lines of the page, of at most so many sites of each data set."""
    table = [
        f"| {row.name} | {row.support} | {row.sites} | **{row.auto:.3f}** | {row.logistic:.3f} "
        f"| {'' if np.isnan(row.trees) else f'{row.trees:.3f}'} | {row.methods} | {row.seconds:.1f} |"
        for row in rows
    ]
    return [
        "# Is local-only a strong baseline?",
        "",
        "    python experiments/local_only.py",
        "",
        '`evaluation.local_baseline = "auto"` against scikit-learn\'s default LogisticRegression and default boosted',
        "trees: mean accuracy on test rows over sites that solve alone, fitted to the same support rows, in the data",
        f"sets of ../shared/data that have labels (up to {most} sites each; each Omniglot alphabet: 20 tasks). Which",
        "methods local-only took is in the last column but one; seconds are of one processor, all sites together.",
        "Below 50 rows only the linear model is tried; trees neither beyond 256 features nor beyond 10 classes.",
        "",
        "| data | rows at most | sites | local-only | LogisticRegression | trees | methods | seconds |",
        "|---|---|---|---|---|---|---|---|",
        *table,
        "",
        f"Local-only is below LogisticRegression by more than {SLACK} on "
        f"{sum(not row.passed for row in rows)} of {len(rows)} rows.",
    ]


if __name__ == "__main__":
    main()
