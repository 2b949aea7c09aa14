"""Judged on validation sites, a run never sees the new sites: it can choose settings for them without a leak."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fedmeta
from clients.app import app
from fedmeta.data import draw_new_sites, draw_validation_sites
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from server.membership import Membership
from tests.server.digits import digits
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes

SITES, ROWS = 10, 20
NAMES = [f"site-{n}" for n in range(SITES)]
JUDGE = "evaluation.judge=validation_sites"


def described(folder: Path, name: str, change: float, *overrides: str) -> Experiment:
    """Returns an experiment whose new sites' rows are changed."""
    random = np.random.default_rng(0)
    site = np.repeat(np.arange(SITES), ROWS)
    x = random.normal(size=(SITES * ROWS, 5)) + random.normal(size=(SITES, 5))[site]
    y = (x @ random.normal(size=(5, 3))).argmax(1)
    new = np.isin(site, [NAMES.index(each) for each in draw_new_sites(NAMES, 0.2, 0)])
    x[new] = x[new] * (1 - change) + change * 100
    y[new] = (y[new] + bool(change)) % 3
    path = folder / f"{name}.npz"
    np.savez(path, x=x, y=y, site=site, site_names=np.array(NAMES), class_names=np.array(["a", "b", "c"]))
    settings = ["data.source=npz", f"data.path={path}", "data.support=6", "data.query=4", "model.hidden=8"]
    settings += ["server.rounds=3", "server.sites_per_round=3", "evaluation.every=1", "tracking.uri=none"]
    return Experiment().with_overrides([*settings, f"tracking.folder={folder / name}", *overrides])


@pytest.mark.quick("maml-fixed")
@pytest.mark.parametrize("schedule", ["fixed", "auto"])
@pytest.mark.parametrize("learner", ["maml", "fedrep"])
def test_rows_of_new_sites_change_nothing(tmp_path: Path, learner: str, schedule: str) -> None:
    own = [JUDGE, f"learner.name={learner}", f"evaluation.schedule={schedule}"]
    plain = fedmeta.run(described(tmp_path, "plain", 0.0, *own))
    changed = fedmeta.run(described(tmp_path, "changed", 1.0, *own))
    assert plain.meta_state.keys() == changed.meta_state.keys()
    assert all(torch.equal(value, changed.meta_state[name]) for name, value in plain.meta_state.items())
    pd.testing.assert_frame_equal(plain.history, changed.history)
    assert plain.summary["new_sites"] == changed.summary["new_sites"]
    assert plain.summary["judge"] == "validation_sites"
    assert not set(plain.sites["site"]) & set(draw_new_sites(NAMES, 0.2, 0))


@pytest.mark.slow
def test_who_judges_was_split_off_the_training_sites_and_others_choose(tmp_path: Path) -> None:
    result = fedmeta.run(described(tmp_path, "plain", 0.0, JUDGE, "evaluation.schedule=auto"))
    rest = sorted(set(NAMES) - set(draw_new_sites(NAMES, 0.2, 0)))
    scored = draw_validation_sites(rest, 0.2, 0)
    choosers = draw_validation_sites([name for name in rest if name not in scored], 0.2, 0)
    kinds = result.sites.set_index("site")["kind"]
    assert set(kinds.index[kinds == "new"]) == set(scored)
    assert set(kinds.index[kinds == "validation"]) == set(choosers)
    assert len(kinds) == len(rest) == 8
    # Without the judge's split, the sites that choose how far to adapt would have been the ones that judge here.
    honest = fedmeta.run(described(tmp_path, "honest", 0.0, "evaluation.schedule=auto")).sites.set_index("site")["kind"]
    assert set(honest.index[honest == "validation"]) == set(scored)


@pytest.mark.slow
def test_a_run_continues_with_the_same_judges(tmp_path: Path) -> None:
    unbroken = fedmeta.run(digits(tmp_path / "unbroken", JUDGE))
    stopping = digits(tmp_path / "stopped", JUDGE, "runtime.checkpoint_every=1")

    def stop(progress: fedmeta.progress.Progress) -> None:
        if progress.round_number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(stopping, report=stop)
    resumed = fedmeta.run(stopping, resume="auto")
    pd.testing.assert_frame_equal(resumed.history, unbroken.history)
    assert resumed.summary["new_sites"] == unbroken.summary["new_sites"]


def test_nobody_joins_such_a_run(tmp_path: Path) -> None:
    names = ["abbey", "mercy", "zion", "hope"]
    experiment = hospitals(tmp_path, "data.new_sites=1", JUDGE)
    grid = SeveralNodes(app, experiment, node_configs=[hospital(tmp_path, name) for name in names])
    membership = Membership(grid, experiment)
    before = membership.federation.names
    assert len(before) == 3
    grid.join(NODE_IDS[4], hospital(tmp_path, "grace"))
    assert membership.poll_new_nodes() == ["grace left out: the run is scored on validation sites"]
    assert membership.federation.names == before


def test_too_few_sites_to_split_off_are_reported(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, "data.new_sites=1", JUDGE)
    grid = SeveralNodes(app, experiment, node_configs=[hospital(tmp_path, name) for name in ("abbey", "mercy")])
    with pytest.raises(FedmetaError, match=r"^evaluation.validation_sites = 0.2 leaves no site to train on"):
        Membership(grid, experiment)
