"""The real data beside the checkout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmeta.data import (
    ArrayPopulation,
    class_codes,
    draw_new_sites,
    evaluation_episodes,
    gather,
    load,
    split,
    standardisation,
    train_sums,
    training_episodes,
)
from fedmeta.experiment import Data

HEART = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal")


def read(**keys: Any) -> ArrayPopulation:
    there = load(Data(**keys))
    assert isinstance(there, ArrayPopulation)
    return there


@pytest.mark.parametrize(
    ("source", "path", "keys", "sites", "rows", "shape", "classes"),
    [
        ("npz", "har/har.npz", {"split": "blocks"}, 21, 7352, (561,), 6),
        ("npz", "heart/heart.npz", {}, 4, 920, (13,), 2),
        ("tables", "heart/raw", {"columns": (*HEART, "num"), "label": "num", "binarise": 0.0}, 4, 920, (13,), 2),
        ("npz", "qmnist_writers/qmnist_writers.npz", {"min_rows": 40}, 584, 70_000, (28, 28), 10),
        ("npz", "omniglot/omniglot28.npz", {"site_key": "alphabet"}, 50, 32_460, (28, 28), 1623),
    ],
)
def test_from_file_to_batch(
    shared_data: Path, source: Any, path: str, keys: Any, sites: int, rows: int, shape: Any, classes: int
) -> None:
    data = Data(source=source, path=str(shared_data / path), **keys)
    there = read(**data.model_dump())
    assert (len(there), len(there.x), there.shape, len(there.class_names)) == (sites, rows, shape, classes)
    sides = split(there, data, 0)
    new = there.find(draw_new_sites(there.names, data.new_sites, 0))
    assert len(new) == max(1, round(0.2 * sites))
    training = np.setdiff1d(there.all_sites, new)
    scale = standardisation(train_sums(sides, training, data.standardise))
    codes = class_codes(there.class_names, there.class_names)
    cohort = training[:8]
    x, y, mask = gather(there, training_episodes(sides, cohort, 1, 20, 20), scale, codes).query
    assert x.isfinite().all()
    assert x[mask.bool()].abs().mean() < 2
    assert (y[mask.bool()] >= 0).all()
    scored_rows = gather(there, evaluation_episodes(sides, new, 20), scale, codes).query[2].sum(1)
    assert scored_rows.tolist() == sides.test_sizes(new).tolist()


def test_the_hospitals_are_the_same_in_both_forms(shared_data: Path) -> None:
    arrays = read(source="npz", path=str(shared_data / "heart/heart.npz"))
    columns = (*HEART, "num")
    tables = read(source="tables", path=str(shared_data / "heart/raw"), columns=columns, label="num", binarise=0.0)
    assert tables.names == tuple(f"processed.{name}" for name in ("cleveland", "hungarian", "switzerland", "va"))
    assert tables.feature_names == arrays.feature_names == HEART
    for site, name in enumerate(["cleveland", "hungarian", "switzerland", "long_beach_va"]):
        ours, theirs = tables.sites.of(site), arrays.sites.of(arrays.names.index(name))
        np.testing.assert_array_equal(tables.y[ours], arrays.y[theirs])
        np.testing.assert_array_equal(tables.x[ours].astype(np.float32), arrays.x[theirs])


def test_people_are_split_by_time(shared_data: Path) -> None:
    path = str(shared_data / "har/har.npz")
    there = read(source="npz", path=path, split="blocks")
    time = np.load(path)["time"]
    sides = split(there, Data(split="blocks"), 0)
    for site in there.all_sites:
        train, test = (side(np.array([site])).rows for side in (sides.train_rows, sides.test_rows))
        assert time[train].max() < time[test].min()
