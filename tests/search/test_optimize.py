"""Searches: scored on validation sites alone, resumed where they stopped, written down for a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmeta import load_experiment
from fedmeta.data import draw_new_sites
from fedmeta.errors import FedmetaError
from fedmeta.progress import Progress, ProgressCallback
from fedmeta.search import search_report
from fedmeta.search.optimize import open_study, optimize, tune
from fedmeta.search.results import MIN_TRIALS_FOR_IMPORTANCE, StudyResult
from fedmeta.search.study import load_study
from tests.search.searches import config, searched, tried


def test_finds_the_best_settings_and_writes_an_experiment_that_runs(tmp_path: Path) -> None:
    asked = config(tmp_path, 3)
    found = searched(asked)
    assert [each.state for each in found.trials] == ["done"] * 3
    assert found.best.score == max(each.score for each in found.trials)
    assert len({tuple(each.settings.values()) for each in found.trials}) == 3
    assert found.baseline is not None
    assert found.baseline.number == 0
    assert found.baseline.settings == {"learner.inner_lr": 0.1, "server.lr": 0.003}
    best = load_experiment(asked.folder / "best.toml")
    assert best == found.experiment
    assert best.evaluation.judge == "new_sites"
    written = json.loads((asked.folder / "tuning.json").read_text())
    assert written["best"]["settings"] == found.best.settings
    assert len(written["trials"]) == 3
    assert search_report.verdict(found) in (asked.folder / "tuning.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_in_two_parts_is_the_unbroken_one(tmp_path: Path, sampler: str) -> None:
    unbroken = searched(config(tmp_path / "one", 3, sampler, "server.rounds=1"))
    searched(config(tmp_path / "two", 2, sampler, "server.rounds=1"))
    resumed = searched(config(tmp_path / "two", 3, sampler, "server.rounds=1"))
    assert tried(resumed) == tried(unbroken)


@pytest.mark.slow
def test_an_interrupted_trial_is_repeated(tmp_path: Path) -> None:
    asked = config(tmp_path / "stopped", 4)

    def interrupt(name: str, number: int) -> ProgressCallback:
        def take(progress: Progress) -> None:
            if number == 2 and progress.round_number == 2:
                raise KeyboardInterrupt

        return take

    with open_study(asked) as study, pytest.raises(KeyboardInterrupt):
        optimize(asked, study, "", progress=interrupt)
    found = searched(asked)
    assert tried(found) == tried(searched(config(tmp_path / "unbroken", 4)))
    # It was resumed from the checkpoint that Ctrl-C wrote, in the same folder.
    assert len(list((asked.folder / "trials").iterdir())) == 4


@pytest.mark.slow
def test_rows_of_new_sites_change_no_trial(tmp_path: Path) -> None:
    sites, rows = 8, 16
    names = [f"site-{number}" for number in range(sites)]
    random = np.random.default_rng(0)
    site = np.repeat(np.arange(sites), rows)
    x = random.normal(size=(sites * rows, 5)) + random.normal(size=(sites, 5))[site]
    y = (x @ random.normal(size=(5, 3))).argmax(1)
    new = np.isin(site, [names.index(name) for name in draw_new_sites(names, 0.25, 0)])
    found: dict[str, StudyResult] = {}
    for name, change in (("plain", 0.0), ("changed", 50.0)):
        path = tmp_path / "data" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        labels = np.where(new & bool(change), (y + 1) % 3, y)
        np.savez(path, x=x + change * new[:, None], y=labels, site=site, site_names=names, class_names=["a", "b", "c"])
        own = ["data.source=npz", f"data.path={path}", "data.new_sites=0.25", "data.support=5", "data.query=3"]
        found[name] = searched(config(tmp_path / name, 3, "tpe", *own, pruner="median"))
    assert tried(found["plain"]) == tried(found["changed"])
    assert len({each.score for each in found["plain"].trials}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_bad_trials_are_pruned(tmp_path: Path, pruner: str) -> None:
    over = ["learner.inner_lr=0.0001:0.1:log", "server.lr=0.00001:0.03:log"]
    found = searched(config(tmp_path, 16, "random", "server.rounds=10", over=over, pruner=pruner))
    pruned = [each for each in found.trials if each.state == "pruned"]
    assert pruned
    assert all(0 < each.rounds < 10 for each in pruned)
    assert found.best.state == "done"
    assert "pruned" in search_report.markdown(found)
    # Which settings matter shows in several completed trials; brackets may leave fewer.
    enough = len(found.completed) >= MIN_TRIALS_FOR_IMPORTANCE
    assert set(found.importance) == ({"learner.inner_lr", "server.lr"} if enough else set())


@pytest.mark.slow
def test_a_search_whose_trials_cannot_start_fails_and_loses_none(tmp_path: Path) -> None:
    asked = config(tmp_path, 6, "random", "server.aggregator=bulyan", "server.weighting=uniform")
    with pytest.raises(FedmetaError, match=r"3 trials in a row could not start; the last: .*bulyan"):
        searched(asked)
    study = load_study(asked)
    assert sum(each.state.name == "WAITING" for each in study.trials) == 3


@pytest.mark.slow
def test_a_setting_that_is_impossible_fails_alone(tmp_path: Path) -> None:
    over = ["server.aggregator=mean,median", "server.weighting=uniform,examples"]
    found = searched(config(tmp_path, 4, "grid", "server.rounds=1", over=over))
    assert sorted(each.state for each in found.trials) == ["done", "done", "done", "failed"]
    (failed,) = [each for each in found.trials if each.state == "failed"]
    assert "weighting" in failed.problem


@pytest.mark.slow
def test_two_processes_do_not_work_on_one_search(tmp_path: Path) -> None:
    asked = config(tmp_path, 2)
    refusals = []

    def meanwhile(found: StudyResult) -> None:
        if not refusals:
            with pytest.raises(FedmetaError, match="another process works on this search") as refused:
                searched(asked)
            refusals.append(refused)

    tune(asked, meanwhile)
    assert refusals


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "cmaes", "grid"])
def test_every_sampler_tries_what_it_was_given(tmp_path: Path, sampler: str) -> None:
    over = ["learner.inner_lr=0.01:1:log", "learner.inner_steps=1:2", "learner.name=fomaml,fedavg-ft"]
    asked = config(tmp_path, 13, sampler, "server.rounds=1", over=over)
    found = searched(asked)
    states = [each.state for each in found.trials]
    assert states == ["done"] * len(states)
    assert len(states) == asked.total
    for each in found.trials:
        assert all(dimension.holds(each.settings[dimension.key]) for dimension in asked.space)


@pytest.mark.slow
def test_trials_side_by_side_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    alone = searched(config(tmp_path / "alone", 5))
    together = searched(replace(config(tmp_path / "together", 5), workers=2))
    assert tried(together) == tried(alone)


@pytest.mark.slow
def test_trials_on_ray_are_those_of_one_process(tmp_path: Path) -> None:
    alone = searched(config(tmp_path / "alone", 2, "random", "runtime.nodes=2"))
    simulated = searched(config(tmp_path / "ray", 2, "random", "runtime.nodes=2", runtime="ray"))
    assert [each.state for each in simulated.trials] == ["done", "done"]
    assert [each.settings for each in simulated.trials] == [each.settings for each in alone.trials]
    assert [each.score for each in simulated.trials] == pytest.approx([each.score for each in alone.trials], abs=0.02)
