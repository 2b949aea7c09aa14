"""Searches: judged on validation sites alone, gone on with where they stopped, written down for a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmeta import load_experiment
from fedmeta.data import draw_new_sites
from fedmeta.errors import FedmetaError
from fedmeta.progress import Progress
from fedmeta.tuning import page, trial
from fedmeta.tuning.results import ENOUGH, Search
from fedmeta.tuning.searching import search
from tests.search.searches import plan, searched, tried


def test_finds_the_best_settings_and_writes_an_experiment_that_runs(tmp_path: Path) -> None:
    asked = plan(tmp_path, 3)
    found = searched(asked)
    assert [each.state for each in found.attempts] == ["done"] * 3
    assert found.best.score == max(each.score for each in found.attempts)
    assert len({tuple(each.settings.values()) for each in found.attempts}) == 3
    assert found.own is not None
    assert found.own.number == 0
    assert found.own.settings == {"learner.inner_lr": 0.1, "server.lr": 0.003}
    best = load_experiment(asked.folder / "best.toml")
    assert best == found.experiment
    assert best.evaluation.judge == "new_sites"
    said = json.loads((asked.folder / "tuning.json").read_text())
    assert said["best"]["settings"] == found.best.settings
    assert len(said["trials"]) == 3
    assert page.verdict(found) in (asked.folder / "tuning.md").read_text()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_in_two_parts_is_the_unbroken_one(tmp_path: Path, sampler: str) -> None:
    unbroken = searched(plan(tmp_path / "one", 3, sampler, "server.rounds=1"))
    searched(plan(tmp_path / "two", 2, sampler, "server.rounds=1"))
    resumed = searched(plan(tmp_path / "two", 3, sampler, "server.rounds=1"))
    assert tried(resumed) == tried(unbroken)


def test_a_trial_that_was_interrupted_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plan(tmp_path / "stopped", 3)
    watched = trial._Watch.__call__

    def interrupt(watch: trial._Watch, progress: Progress) -> None:
        watched(watch, progress)
        if watch._trial.number == 1 and progress.round_number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trial._Watch, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            searched(asked)
    found = searched(asked)
    assert tried(found) == tried(searched(plan(tmp_path / "unbroken", 3)))
    # It went on from the checkpoint that Ctrl-C wrote, in the same folder.
    assert len(list((asked.folder / "trials").iterdir())) == 3


def test_rows_of_new_sites_change_no_trial(tmp_path: Path) -> None:
    sites, rows = 8, 16
    names = [f"site-{number}" for number in range(sites)]
    random = np.random.default_rng(0)
    site = np.repeat(np.arange(sites), rows)
    x = random.normal(size=(sites * rows, 5)) + random.normal(size=(sites, 5))[site]
    y = (x @ random.normal(size=(5, 3))).argmax(1)
    new = np.isin(site, [names.index(name) for name in draw_new_sites(names, 0.25, 0)])
    found: dict[str, Search] = {}
    for name, change in (("plain", 0.0), ("changed", 50.0)):
        path = tmp_path / "data" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        labels = np.where(new & bool(change), (y + 1) % 3, y)
        np.savez(path, x=x + change * new[:, None], y=labels, site=site, site_names=names, class_names=["a", "b", "c"])
        own = ["data.source=npz", f"data.path={path}", "data.new_sites=0.25", "data.support=5", "data.query=3"]
        found[name] = searched(plan(tmp_path / name, 3, "tpe", *own, pruner="median"))
    assert tried(found["plain"]) == tried(found["changed"])
    assert len({each.score for each in found["plain"].attempts}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_bad_trials_are_given_up_on_their_way(tmp_path: Path, pruner: str) -> None:
    over = ["learner.inner_lr=0.0001:0.1:log", "server.lr=0.00001:0.03:log"]
    found = searched(plan(tmp_path, 16, "random", "server.rounds=10", over=over, pruner=pruner))
    pruned = [each for each in found.attempts if each.state == "pruned"]
    assert pruned
    assert all(0 < each.rounds < 10 for each in pruned)
    assert found.best.state == "done"
    assert "pruned" in page.markdown(found)
    # Which settings matter can be told from several trials that came to their end; brackets may leave fewer.
    told = sum(each.state == "done" for each in found.attempts) >= ENOUGH
    assert set(found.importance) == ({"learner.inner_lr", "server.lr"} if told else set())


def test_a_search_whose_trials_cannot_begin_says_why_and_loses_none(tmp_path: Path) -> None:
    asked = plan(tmp_path, 6, "random", "server.aggregator=bulyan", "server.weighting=uniform")
    with pytest.raises(FedmetaError, match=r"3 trials in a row could not begin; the last: .*bulyan"):
        searched(asked)
    study = trial.opened(asked)
    assert sum(each.state.name == "WAITING" for each in study.trials) == 3


def test_a_setting_that_is_impossible_fails_alone(tmp_path: Path) -> None:
    over = ["server.aggregator=mean,median", "server.weighting=uniform,examples"]
    found = searched(plan(tmp_path, 4, "grid", "server.rounds=1", over=over))
    assert sorted(each.state for each in found.attempts) == ["done", "done", "done", "failed"]
    (failed,) = [each for each in found.attempts if each.state == "failed"]
    assert "weighting" in failed.problem


def test_two_processes_do_not_work_on_one_search(tmp_path: Path) -> None:
    asked = plan(tmp_path, 2)
    refusals = []

    def meanwhile(found: Search) -> None:
        if not refusals:
            with pytest.raises(FedmetaError, match="another fedmeta tune works on this search") as refused:
                searched(asked)
            refusals.append(refused)

    search(asked, meanwhile)
    assert refusals


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "cmaes", "grid"])
def test_every_way_of_searching_tries_what_it_was_given(tmp_path: Path, sampler: str) -> None:
    over = ["learner.inner_lr=0.01:1:log", "learner.inner_steps=1:2", "learner.name=fomaml,fedavg-ft"]
    asked = plan(tmp_path, 13, sampler, "server.rounds=1", over=over)
    found = searched(asked)
    states = [each.state for each in found.attempts]
    assert states == ["done"] * len(states)
    assert len(states) == 13 if sampler != "grid" else 8 <= len(states) <= 13
    for each in found.attempts:
        assert all(dimension.holds(each.settings[dimension.key]) for dimension in asked.space)


@pytest.mark.slow
def test_trials_side_by_side_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    alone = searched(plan(tmp_path / "alone", 5))
    together = searched(replace(plan(tmp_path / "together", 5), workers=2))
    assert tried(together) == tried(alone)


@pytest.mark.slow
def test_trials_on_ray_are_those_of_one_process(tmp_path: Path) -> None:
    alone = searched(plan(tmp_path / "alone", 2, "random", "runtime.nodes=2"))
    simulated = searched(plan(tmp_path / "ray", 2, "random", "runtime.nodes=2", runtime="ray"))
    assert [each.state for each in simulated.attempts] == ["done", "done"]
    assert [each.settings for each in simulated.attempts] == [each.settings for each in alone.attempts]
    assert [each.score for each in simulated.attempts] == pytest.approx(
        [each.score for each in alone.attempts], abs=0.02
    )
