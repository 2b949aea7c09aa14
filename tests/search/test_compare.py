"""Comparisons: the same sites for all, runs that are found again, settings tuned without new sites, the MLflow run."""

import json
from pathlib import Path

import pandas as pd
import pytest

from fedmeta.data import draw_new_sites, load
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress, ProgressCallback, ignore_progress
from fedmeta.search.compare import compare
from fedmeta.search.comparison import Comparison
from fedmeta.search.comparison_report import write
from fedmeta.tracking.mlflow_client import open_client

LEARNERS = ["fedavg-ft", "maml", "local"]
SETTINGS = ["server.rounds=3", "evaluation.every=0", "learner.inner_steps=2", "model.hidden=16"]


def described(folder: Path, *overrides: str) -> Experiment:
    return Experiment().with_overrides([*SETTINGS, f"tracking.folder={folder}", "tracking.uri=none", *overrides])


def started(
    experiment: Experiment, learners: list[str], tune: int = 0, stop_in: str = "", stop: BaseException | None = None
) -> tuple[Comparison, list[str]]:
    """Returns what came of a comparison, and which runs were started; with `stop_in` such a run is ended by Ctrl-C."""
    titles: list[str] = []

    def report(title: str, number: int, count: int) -> ProgressCallback:
        def take(progress: Progress) -> None:
            if title not in titles:
                titles.append(title)
            if stop_in and stop_in in title and progress.round_number == 2:
                raise stop or KeyboardInterrupt

        return take

    return compare(experiment, learners, 2, tune=tune, report=report), titles


@pytest.mark.slow
def test_an_interrupted_search_is_resumed_and_its_best_settings_are_used(tmp_path: Path) -> None:
    experiment = described(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        started(experiment, ["fedavg-ft", "maml"], 3, stop_in="tune maml · inner_lr 0.0")  # not its first
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
    written = json.loads((found.folder / "comparison.json").read_text())
    assert written["settings"]["maml"] == found.trials["maml"][0].settings


@pytest.mark.slow
def test_a_run_that_fails_loses_and_does_not_end_the_comparison(tmp_path: Path) -> None:
    failure = FedmetaError("none of 10 rounds had a usable reply")
    found, _ = started(described(tmp_path), ["fedavg"], 2, "tune fedavg · inner_lr 0.1,", failure)
    best, failed = found.trials["fedavg"]
    assert (failed.score, failed.problem, failed.untuned) == (None, str(failure), True)
    assert best.score is not None
    assert "| - | 2 | 1 |" in (found.folder / "comparison.md").read_text()


@pytest.mark.slow
def test_a_comparison_whose_every_run_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"^diverged$"):
        started(described(tmp_path), ["fedavg"], 2, "tune fedavg", FedmetaError("diverged"))


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "fails_in"), [(2, "tune fedavg ·"), (0, "fedavg, seed 1")])
def test_a_learner_that_fails_alone_is_left_out_and_named(tmp_path: Path, tune: int, fails_in: str) -> None:
    learners = ["fedavg", "fedavg-ft"]
    found, _ = started(described(tmp_path), learners, tune, fails_in, FedmetaError("diverged"))
    assert found.left_out == {"fedavg": "diverged"}
    assert list(found.table["learner"]) == ["fedavg-ft"]
    assert set(found.sites["learner"]) == {"fedavg-ft"}
    assert "\nfedavg is left out: diverged.\n" in (found.folder / "comparison.md").read_text()
    assert json.loads((found.folder / "comparison.json").read_text())["left_out"] == found.left_out


@pytest.mark.slow
def test_trials_are_scored_on_sites_that_are_new_to_no_one_of_that_seed(tmp_path: Path) -> None:
    experiment = described(tmp_path)
    started(experiment, ["fedavg-ft"], 2)
    new = set(draw_new_sites(load(experiment.data).names, experiment.data.new_sites, 0))
    folders = list(tmp_path.glob("tune-qmc-*/trials/*/sites.parquet"))
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


def test_an_experiment_is_identified_by_its_values_however_they_are_given() -> None:
    explicit = Experiment().with_overrides(["learner.inner_lr=0.1", "server.rounds=7"])
    assert explicit.identity() == Experiment().with_overrides(["server.rounds=7"]).identity()
    assert explicit.identity() != Experiment().with_overrides(["server.rounds=8"]).identity()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("compare")
    settings = ["server.rounds=2", "evaluation.every=0", "learner.inner_steps=2", "tracking.uri=none"]
    return Experiment().with_overrides([*settings, f"tracking.folder={folder}"])


@pytest.mark.slow
def test_compares_on_the_same_sites_and_finds_its_runs_again(experiment: Experiment) -> None:
    found, titles = started(experiment, LEARNERS)
    assert len(titles) == 6
    assert found.baseline == "fedavg-ft"
    assert set(found.table["learner"]) == set(LEARNERS)
    assert found.table["personalized"].is_monotonic_decreasing
    for seed in (0, 1):
        of_seed = found.sites[found.sites["seed"] == seed]
        kinds = [set(own.loc[own["kind"] == "new", "site"]) for _, own in of_seed.groupby("learner")]
        assert all(kind == kinds[0] for kind in kinds)
    again, titles = started(experiment, [*LEARNERS, "fedavg"])
    assert titles == ["fedavg, seed 0", "fedavg, seed 1"]
    own = ["learner", "seed", "run_id"]
    known = again.runs[again.runs["learner"] != "fedavg"][own].sort_values(own, ignore_index=True)
    pd.testing.assert_frame_equal(found.runs[own].sort_values(own, ignore_index=True), known)


@pytest.mark.slow
def test_is_written_as_markdown_and_json(experiment: Experiment, tmp_path: Path) -> None:
    found, _ = started(experiment, LEARNERS)
    write(found, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("Best for new sites: ")
    assert all(f"| {learner} | 2 |" in text for learner in LEARNERS)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["verdict"] in text
    assert len(written["runs"]) == 6
    assert len(pd.read_parquet(tmp_path / "sites.parquet")) == 6 * 40


@pytest.mark.parametrize(
    ("learners", "settings", "problem"),
    [
        (["maml", "maml"], [], "twice"),
        ([], [], "names none"),
        (["maml", "mammal"], [], 'no learner "mammal"; did you mean "maml"'),
        (["maml"], ["data.source=npz", "data.path=nowhere.npz"], "nowhere.npz: no such file"),
        (["maml"], ["data.new_sites=400"], "leaves no site to train on"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, learners: list[str], settings: list[str], problem: str
) -> None:
    places = [f"tracking.folder={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    with pytest.raises(FedmetaError, match=problem):
        compare(Experiment().with_overrides([*places, *settings]), learners, 1, report=lambda *words: ignore_progress)
    assert not list(tmp_path.iterdir())
