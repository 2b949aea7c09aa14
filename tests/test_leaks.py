"""Test rows adapt, normalise, stop and select nothing: changing them changes scores and nothing else."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fedmeta
from fedmeta.data import evaluation_episodes, load, split
from fedmeta.experiment import LEARNERS, Experiment

SITES, ROWS, FEATURES = 8, 24, 6
SETTINGS = [
    "data.source=npz",
    "data.new_sites=2",
    "data.support=8",
    "data.query=4",
    "model.hidden=8",
    "learner.inner_steps=2",
    "learner.solve_steps=5",
    "server.rounds=3",
    "server.sites_per_round=0",
    "evaluation.every=0",
    "evaluation.schedule=auto",
    "evaluation.gate=true",
    "tracking.uri=none",
    # Chosen by time, it could be another in the next run, and another one rounds otherwise.
    "runtime.engine=vmap",
]
CHOICES = ["site", "kind", "rows", "test_rows", "steps_taken"]


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    site = np.repeat(np.arange(SITES), ROWS)
    x = random.normal(size=(SITES * ROWS, FEATURES)) + 0.3 * random.normal(size=(SITES, FEATURES))[site]
    x[:, 2] = np.where(random.random(len(x)) < 0.1, np.nan, x[:, 2])
    y = (np.nan_to_num(x) @ random.normal(size=(FEATURES, 3))).argmax(1)
    return x, y, site


def described(folder: Path, name: str, x: np.ndarray, y: np.ndarray, site: np.ndarray, learner: str) -> Experiment:
    path = folder / f"{name}.npz"
    np.savez(path, x=x, y=y, site=site, class_names=np.array(["a", "b", "c"]))
    own = [f"data.path={path}", f"learner.name={learner}", f"tracking.folder={folder / name}"]
    return Experiment().with_overrides([*SETTINGS, *own])


def reported_test_rows(experiment: Experiment) -> np.ndarray:
    """Returns the test rows of all sites that are not validation sites (those are there to choose by)."""
    population = load(experiment.data)
    kinds = fedmeta.run(experiment).sites.set_index("site")["kind"]
    sites = np.array([n for n, name in enumerate(population.names) if kinds[name] != "validation"])
    return split(population, experiment.data, experiment.runtime.seed).test_rows(sites).rows


@pytest.mark.quick("maml")
@pytest.mark.parametrize("learner", LEARNERS)
def test_changed_test_rows_change_scores_only(learner: str, tmp_path: Path) -> None:
    x, y, site = rows()
    plain = described(tmp_path, "plain", x, y, site, learner)
    tested = reported_test_rows(plain)
    assert len(tested) > 50
    other_x, other_y = x.copy(), y.copy()
    other_x[tested] = other_x[tested] * -3 + 5
    other_y[tested] = (other_y[tested] + 1) % 3
    first = fedmeta.run(plain)
    moved = fedmeta.run(described(tmp_path, "moved", other_x, y, site, learner))
    relabelled = fedmeta.run(described(tmp_path, "relabelled", x, other_y, site, learner))
    for other in (moved, relabelled):
        assert first.meta_state.keys() == other.meta_state.keys()
        for name, value in first.meta_state.items():
            assert torch.equal(value, other.meta_state[name]), name
        pd.testing.assert_frame_equal(first.sites[CHOICES], other.sites[CHOICES])
        assert first.summary.get("schedule") == other.summary.get("schedule")
        assert not first.sites["global_loss"].equals(other.sites["global_loss"]), "the scores should have moved"


def test_support_rows_are_train_rows(tmp_path: Path) -> None:
    x, y, site = rows()
    experiment = described(tmp_path, "plain", x, y, site, "maml")
    population = load(experiment.data)
    cut = split(population, experiment.data, 0)
    episodes = evaluation_episodes(cut, population.all_sites, 8)
    support, test = (part.rows[part.mask] for part in (episodes.support, episodes.query))
    assert not set(support.tolist()) & set(test.tolist())
    assert set(support.tolist()) <= set(cut.train_rows(population.all_sites).rows.tolist())
