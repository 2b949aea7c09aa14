"""Sites from files: populations, their splits, and a round's rows as tensors.

population = load(experiment.data)
rows = split(population, experiment.data, seed)
new_sites = draw_new_sites(population.names, experiment.data.new_sites, seed)
episodes = training_episodes(rows, population.find(cohort), round_number, support, query)
batch = gather(population, episodes, standardisation, class_codes(population.class_names, run_classes))
"""

from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fedmeta.data.batches import gather, gather_rows, standardised
from fedmeta.data.episodes import (
    Episodes,
    Padded,
    evaluation_episodes,
    group_by_size,
    training_episodes,
    training_order,
)
from fedmeta.data.few_shot import evaluation_tasks, few_shot, training_tasks
from fedmeta.data.gram import GramCache, gram_matrices
from fedmeta.data.population import (
    ArrayPopulation,
    Population,
    class_codes,
    left_out,
    order_classes,
    without_sites,
)
from fedmeta.data.ragged import Ragged
from fedmeta.data.splits import Split, draw_new_sites, draw_validation_sites, split
from fedmeta.data.sums import (
    FeatureSums,
    Standardisation,
    feature_sums,
    standardisation,
    target_scale,
    target_sums,
    train_sums,
)
from fedmeta.data.synthetic import SyntheticPopulation
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from fedmeta.text import first_bad_name

SOURCES = {
    "npz": "fedmeta.data.npz:load_npz",
    "tables": "fedmeta.data.tables:load_tables",
    "digits": "fedmeta.data.digits:load_digits",
    "omniglot": "fedmeta.data.omniglot:load_omniglot",
    "shakespeare": "fedmeta.data.shakespeare:load_shakespeare",
    "huggingface": "fedmeta.data.huggingface:load_huggingface",
    "synthetic": "fedmeta.data.synthetic:load_synthetic",
}
"""What `data.source` may be, and the function of a `Data` section that loads it. By import path, since the packages
that a source needs take seconds to import, and a deployed node is a new process for every message."""


LEAVE_OUT = ("npz", "tables")
"""Sources that leave out the sites of `data.without` before they look at any cell."""


def load(data: Data) -> Population:
    """Returns the population that an experiment's `[data]` section describes.

    Raises:
        FedmetaError: The source is not there, or its data are not as they should be.
    """
    population: Population = _function(SOURCES[data.source])(data)
    if data.source not in LEAVE_OUT:
        population = without_sites(population, data.without)
    _check_names(population, data.path or data.source)
    return _few_shot(population, data)


def load_site(
    data: Data,
    path: str,
    name: str = "",
    only: Sequence[str] | None = None,
    categorical: Collection[str] | None = None,
) -> Population:
    """Returns the population of a deployed node: one site that holds all rows of the file.

    Args:
        data: What a file's columns mean; its `source` and `path` do not matter.
        path: An `.npz` file, or a table as for `load_tables`.
        name: The site's name; the file's where empty.
        only: The columns of a table that are features; None for all but the label.
        categorical: Which of them are categories, where a run has fixed that; None = found by their cells.
    """
    if Path(path).suffix.lower() == ".npz":
        population: Population = _function("fedmeta.data.npz:load_npz_site")(data, path, name)
    else:
        population = _function("fedmeta.data.tables:load_table_site")(data, path, name, only, categorical)
    _check_names(population, path)
    return _few_shot(population, data)


def _few_shot(population: Population, data: Data) -> Population:
    """Returns a population as it is or, with `data.ways`, as what few-shot tasks are drawn from."""
    if not data.ways:
        return population
    if isinstance(population, ArrayPopulation) and population.categories:
        named = population.categories[0][0]
        raise FedmetaError(f'data.ways: column "{named}" holds categories, and few-shot tasks are of numbers alone')
    return few_shot(population, data)


def _check_names(population: Population, where: str) -> None:
    """Checks that sites, classes and features have names that may be shown (`fedmeta.text.name_problem`).

    Raises:
        FedmetaError: One has not; the message names it.
    """
    names: dict[str, Sequence[str]] = {"feature": population.feature_names}
    if isinstance(population, ArrayPopulation):  # others make their names themselves
        names["site"] = population.names
        names["category"] = [name for _, own in population.categories for name in own]
    # A symbol of a text is shown as what it is.
    names["class"] = tuple(name for name in population.class_names if not (population.tokens and len(name) == 1))
    for what, texts in names.items():
        if bad := first_bad_name(texts):
            raise FedmetaError(f"{where}: the {what} {bad}: rename it")


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


__all__ = [
    "SOURCES",
    "ArrayPopulation",
    "Episodes",
    "FeatureSums",
    "GramCache",
    "Padded",
    "Population",
    "Ragged",
    "Split",
    "Standardisation",
    "SyntheticPopulation",
    "class_codes",
    "draw_new_sites",
    "draw_validation_sites",
    "evaluation_episodes",
    "evaluation_tasks",
    "feature_sums",
    "gather",
    "gather_rows",
    "gram_matrices",
    "group_by_size",
    "left_out",
    "load",
    "load_site",
    "order_classes",
    "split",
    "standardisation",
    "standardised",
    "target_scale",
    "target_sums",
    "train_sums",
    "training_episodes",
    "training_order",
    "training_tasks",
    "without_sites",
]
