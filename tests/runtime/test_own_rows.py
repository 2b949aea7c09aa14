"""Rows that a program holds: torch data sets for each site become the population that they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fedmeta
from fedmeta.data import load
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.runtime.own_rows import with_datasets


def datasets(seed: int = 0) -> dict[str, TensorDataset]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for number, name in enumerate(("north", "south", "west", "east")):
        x = torch.randn(20 + number, 3, 2, generator=draw)
        found[name] = TensorDataset(x, (x.sum((1, 2)) > 0).long())
    return found


def test_data_sets_are_sites(tmp_path: Path) -> None:
    given, described = datasets(), Experiment().with_overrides([f"tracking.folder={tmp_path}"])
    experiment = with_datasets(described, given)
    population = load(experiment.data)
    assert population.names == ("east", "north", "south", "west")
    assert population.shape == (3, 2)
    rows = population.rows(population.find(["south"])).rows
    np.testing.assert_array_equal(population.features(rows), given["south"].tensors[0])
    np.testing.assert_array_equal(population.labels(rows), given["south"].tensors[1])
    assert with_datasets(described, datasets()).data.path == experiment.data.path, "the same rows have the same file"
    assert with_datasets(described, datasets(1)).data.path != experiment.data.path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give a data set for each site"),
        ({"a": []}, "a: there are no rows"),
        ({"a": iter([])}, "needs a length"),
        ({"a": [1.0]}, "item 0 is no pair"),
        ({"a": [(["x"], 1)]}, "and not numbers"),
        ({"a": [(torch.zeros(2), 1)], "b": [(torch.zeros(3), 1)]}, "rows have different shapes"),
    ],
)
def test_what_is_no_data_set_is_refused(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=message):
        with_datasets(Experiment().with_overrides([f"tracking.folder={tmp_path}"]), given)


@pytest.mark.slow
def test_a_run_takes_them(tmp_path: Path) -> None:
    settings = ["server.rounds=2", "evaluation.every=0", "data.new_sites=1", "model.name=logistic", "tracking.uri=none"]
    experiment = Experiment().with_overrides([*settings, f"tracking.folder={tmp_path}"])
    result = fedmeta.run(experiment, datasets=datasets())
    assert sorted(result.sites["site"]) == ["east", "north", "south", "west"]
    with pytest.raises(FedmetaError, match="give one of them"):
        fedmeta.run(experiment, datasets=datasets(), frame=result.sites)
