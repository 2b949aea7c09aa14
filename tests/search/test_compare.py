"""Settings of a comparison, chosen without new sites and with the same budget for every learner; its MLflow run."""

import json
from pathlib import Path

import pandas as pd
import pytest
from fedmeta.comparison.settings import candidates
from fedmeta.tuning import evenly

from fedmeta import comparison
from fedmeta.data import draw_new_sites, load
from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS, Experiment
from fedmeta.progress import Progress, Report
from fedmeta.tracking.opening import open_client

SETTINGS = ["server.rounds=3", "evaluation.every=0", "learner.inner_steps=2", "model.hidden=16"]


def described(folder: Path, *overrides: str) -> Experiment:
    return Experiment().with_overrides([*SETTINGS, f"tracking.folder={folder}", "tracking.uri=none", *overrides])


def started(
    experiment: Experiment, learners: list[str], tune: int, stop_in: str = "", stop: BaseException | None = None
) -> tuple[comparison.Comparison, list[str]]:
    """Returns what came of a comparison, and which runs were started; with `stop_in` such a run is ended by Ctrl-C."""
    titles: list[str] = []

    def report(title: str, number: int, count: int) -> Report:
        def take(progress: Progress) -> None:
            if title not in titles:
                titles.append(title)
            if stop_in and stop_in in title and progress.round_number == 2:
                raise stop or KeyboardInterrupt

        return take

    return comparison.compare(experiment, learners, 2, tune=tune, report=report), titles


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_gets_the_same_draw_which_begins_with_its_own_settings(learner: str) -> None:
    experiment = Experiment().with_overrides([f"learner.name={learner}"])
    tried = candidates(experiment, 5)
    assert len(tried) == 5
    assert tried[0]["learner.inner_lr"] == experiment.learner.inner_lr
    reference = candidates(Experiment(), 5)
    assert [each["learner.inner_lr"] for each in tried] == [each["learner.inner_lr"] for each in reference]
    assert candidates(experiment, 8)[:5] == tried


def test_learners_bring_their_own_keys() -> None:
    keys = {
        name: set(candidates(Experiment().with_overrides([f"learner.name={name}"]), 1)[0])
        for name in ("maml", "fedprox", "pfedme")
    }
    assert keys["maml"] == {"learner.inner_lr", "server.lr"}
    assert keys["fedprox"] == keys["maml"] | {"learner.mu"}
    assert keys["pfedme"] == keys["maml"] | {"learner.lam", "learner.local_lr"}


def test_points_cover_the_space() -> None:
    points = evenly(16, 2)
    quarters = {(x > 0.5, y > 0.5) for x, y in points[1:]}
    assert len(quarters) == 4
    assert all(len({int(point[place] * 8) for point in points}) == 8 for place in (0, 1))


def test_an_interrupted_search_goes_on_and_its_best_settings_are_used(tmp_path: Path) -> None:
    experiment = described(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        started(experiment, ["fedavg-ft", "maml"], 3, stop_in="tune maml · inner_lr 0.0")
    found, titles = started(experiment, ["fedavg-ft", "maml"], 3)
    assert not any(title.startswith("tune fedavg-ft") for title in titles), "was tried before"
    assert 0 < sum(title.startswith("tune maml") for title in titles) < 3
    assert [title for title in titles if not title.startswith("tune")] == [
        f"{name}, seed {seed}" for seed in (0, 1) for name in ("fedavg-ft", "maml")
    ]
    for name, trials in found.trials.items():
        assert len(trials) == 3
        assert trials[0].score == max(trial.score for trial in trials if trial.score is not None)
        assert sum(trial.untuned for trial in trials) == 1
        kept = json.loads((found.folder / f"{name}-1.json").read_text())
        run = Experiment.from_toml((Path(kept["folder"]) / "experiment.toml").read_text()).params()
        assert {key: run[key] for key in trials[0].settings} == trials[0].settings
        assert run["evaluation.judge"] == "new_sites"
    _, again = started(experiment, ["fedavg-ft", "maml"], 3)
    assert again == []
    page = (found.folder / "comparison.md").read_text()
    assert "the best of 3 settings" in page
    said = json.loads((found.folder / "comparison.json").read_text())
    assert said["settings"]["maml"] == found.trials["maml"][0].settings


def test_a_run_that_fails_loses_and_does_not_end_the_comparison(tmp_path: Path) -> None:
    failure = FedmetaError("none of 10 rounds had a usable reply")
    found, _ = started(described(tmp_path), ["fedavg"], 2, "tune fedavg · inner_lr 0.1,", failure)
    best, failed = found.trials["fedavg"]
    assert (failed.score, failed.problem, failed.untuned) == (None, str(failure), True)
    assert best.score is not None
    assert "| - | 2 | 1 |" in (found.folder / "comparison.md").read_text()


def test_a_comparison_whose_every_run_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"^hopeless$"):
        started(described(tmp_path), ["fedavg"], 2, "tune fedavg", FedmetaError("hopeless"))


@pytest.mark.parametrize(("tune", "fails_in"), [(2, "tune fedavg ·"), (0, "fedavg, seed 1")])
def test_a_learner_that_fails_alone_is_left_out_and_named(tmp_path: Path, tune: int, fails_in: str) -> None:
    learners = ["fedavg", "fedavg-ft"]
    found, _ = started(described(tmp_path), learners, tune, fails_in, FedmetaError("hopeless"))
    assert found.left_out == {"fedavg": "hopeless"}
    assert list(found.table["learner"]) == ["fedavg-ft"]
    assert set(found.sites["learner"]) == {"fedavg-ft"}
    assert "\nfedavg is left out: hopeless.\n" in (found.folder / "comparison.md").read_text()
    assert json.loads((found.folder / "comparison.json").read_text())["left_out"] == found.left_out


def test_trials_are_judged_on_sites_that_are_new_to_no_one_of_that_seed(tmp_path: Path) -> None:
    experiment = described(tmp_path)
    found, _ = started(experiment, ["fedavg-ft"], 2)
    new = set(draw_new_sites(load(experiment.data).names, experiment.data.new_sites, 0))
    folders = list((found.folder / "trials").glob("*/sites.parquet"))
    assert len(folders) == 2
    for path in folders:
        sites = pd.read_parquet(path)
        assert not new & set(sites["site"])
        assert (sites["kind"] == "new").any()


@pytest.mark.slow
def test_there_is_one_comparison_run_however_often_the_command_is_given(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    experiment = described(tmp_path / "runs", f"tracking.uri={uri}")
    with pytest.raises(KeyboardInterrupt):
        started(experiment, ["fedavg-ft", "maml"], 2, stop_in="tune maml")
    client = open_client(uri)
    (first,) = comparison_runs(client)
    assert first.info.status == "KILLED"
    for learners in (["fedavg-ft", "maml"], ["fedavg-ft", "maml"], ["fedavg-ft", "maml", "local"]):
        started(experiment, learners, 2)
        (run,) = comparison_runs(client)
        assert run.info.run_id == first.info.run_id
        assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("compare · digits · fedavg-ft, maml, local")
    assert {f"comparison/new_sites_personalized/{name}" for name in learners} <= set(run.data.metrics)
    assert run.data.tags["mlflow.note.content"].startswith("**Best for new sites: ")
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "sites_by_learner.json")).read_text())
    assert set(learners) <= set(table["columns"])
    assert len(table["data"]) == len({row[0] for row in table["data"]})
    everything = client.search_runs([run.info.experiment_id])
    nested = [each for each in everything if each.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    assert {each.data.params["evaluation.judge"] for each in nested} == {"validation_sites"}
    assert not any("final/new_sites_personalized" in each.data.metrics for each in nested)
    flat = [each for each in everything if each not in nested and each.info.run_id != run.info.run_id]
    assert len(flat) == 6


def comparison_runs(client):
    experiment = client.get_experiment_by_name("fedmeta")
    return client.search_runs([experiment.experiment_id], "tags.`fedmeta.kind` = 'comparison'")


def test_an_experiment_is_known_by_what_it_says_and_not_by_what_it_leaves_to_the_defaults() -> None:
    spoken = Experiment().with_overrides(["learner.inner_lr=0.1", "server.rounds=7"])
    assert spoken.identity() == Experiment().with_overrides(["server.rounds=7"]).identity()
    assert spoken.identity() != Experiment().with_overrides(["server.rounds=8"]).identity()
