"""A look at a federation before anything runs: one line per site."""

import numpy as np
import pandas as pd

from fedmeta.data.population import Population
from fedmeta.data.ragged import IntArray
from fedmeta.data.splits import draw_new_sites, split
from fedmeta.experiment import Data

MOST_SITES = 2000
"""How many sites are looked at; those of a larger population are too many to read."""


def summarize_sites(population: Population, data: Data, seed: int) -> pd.DataFrame:
    """Returns what an experiment's sites look like, one row per site (the first 2 000 by name).

    Args:
        population: The sites.
        data: How they are split, and how many of them are new.
        seed: The run's seed.

    Returns:
        Columns site, kind ("new" or "training"), rows, train_rows, test_rows, classes (how many labels occur there) or,
        for regression, label_mean, and missing (the share of the features that are missing).
    """
    sites = population.all_sites[:MOST_SITES]
    rows = split(population, data, seed)
    new = set(draw_new_sites(population.names, data.new_sites, seed))
    names = [population.names[site] for site in sites]
    frame = pd.DataFrame({"site": names, "kind": ["new" if name in new else "training" for name in names]})
    frame["rows"] = population.sizes(sites)
    frame["train_rows"] = rows.train_sizes(sites)
    frame["test_rows"] = rows.test_sizes(sites)
    labels = [population.labels(population.rows(np.array([site])).rows) for site in sites]
    if population.regression:
        frame["label_mean"] = [float(own.mean()) for own in labels]
    else:
        frame["classes"] = [len(np.unique(own)) for own in labels]
    frame["missing"] = [missing_share(population, site) for site in sites]
    return frame


def missing_share(population: Population, site: int) -> float:
    """Returns the share of a site's features that are missing."""
    if not population.missing:
        return 0.0
    rows: IntArray = population.rows(np.array([site])).rows
    return float(population.features(rows).isnan().double().mean())
