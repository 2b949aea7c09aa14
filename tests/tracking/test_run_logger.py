"""What reaches MLflow, in real stores: names, rounds, artifacts; and what happens when a store is not there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.tracking import async_queue
from fedmeta.tracking.events import UNSENT, End, MetricValue, read_unsent, sync
from fedmeta.tracking.experiment_view import VIEW_TAG
from fedmeta.tracking.mlflow_client import Dataset, open_client
from fedmeta.tracking.run_logger import Tracker
from fedmeta.tracking.ui import serving
from tests.tracking.made_up_run import ACCURACY, RMSE, SNR, evaluation, groups, history, summary

NEW, TRAINING, ROUNDS, EVERY = 3, 5, 4, 2
NAMES = [*(f"new-{i:03}" for i in range(NEW)), *(f"site-{i:03}" for i in range(TRAINING))]


def experiment(uri, name="runs", curves=50):
    return Experiment.from_toml(
        f'[learner]\nname = "maml"\n[tracking]\nuri = "{uri}"\nexperiment = "{name}"\nsite_curves = {curves}\n',
        "a test",
    )


def start(described, folder, resume_run_id=None, score=ACCURACY):
    data = Dataset("digits", "digits", "0123456789abcdef", NEW + TRAINING)
    return Tracker.start(described.tracking, described.params(), folder, data, resume_run_id, score)


def figures(round_number):
    return {"train/query_loss": 1 / round_number, "time/round_s": 0.1, "traffic/bytes_up": 9.0, "failures/replies": 0.0}


def log(tracker, run, rounds):
    for number in rounds:
        if number:
            tracker.round(number, figures(number))
        if number % EVERY == 0:
            sites = run[run["round"] == number]
            tracker.evaluation(number, sites, groups(sites))


def steps(client, run_id, key):
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def shown_table(client, run_id):
    """The table that MLflow's tag names as one to show."""
    (table,) = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert table["type"] == "table"
    return pd.read_json(client.download_artifacts(run_id, table["path"]), orient="split")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store that the tests of this file share, since MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store #1')}/mlflow.db"


@pytest.fixture(scope="module")
def whole_run(store, tmp_path_factory):
    """A run from its start to its end, tracked from another working directory."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "experiment.toml").write_text("[data]\n")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.safetensors").write_bytes(b"state")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tracker = start(experiment(store), folder)
        run = history(NEW, TRAINING, ROUNDS, EVERY)
        log(tracker, run, range(ROUNDS + 1))
        files = [folder / "experiment.toml", folder / "checkpoint"]
        assert tracker.finish(summary(run, ROUNDS), run, files) == []
    finally:
        os.chdir(before)
    return open_client(store), tracker.run_id, run, folder


def test_the_metrics_are_those_of_the_contract(whole_run):
    client, run_id, run, _ = whole_run
    logged = client.get_run(run_id).data.metrics
    by_group = [
        f"{group}/{name}"
        for group in ("new_sites", "training_sites")
        for name in (
            "personalized_accuracy_mean",
            "personalized_accuracy_std",
            "personalized_accuracy_worst_decile",
            "global_accuracy_mean",
            "personalized_ece_mean",
        )
    ]
    sites = [f"{name}/{site}" for name in ("personalized_accuracy", "global_accuracy") for site in NAMES]
    results = [
        "final/new_sites_personalized",
        "final/new_sites_global",
        "final/new_sites_worst_decile",
        "final/helped",
        "final/harmed",
        "final/training_sites_personalized",
        "final/sites_left_behind",
    ]
    assert set(logged) == {*by_group, *sites, *results, *figures(1)}
    last = run[run["round"] == ROUNDS]
    new = groups(last)["new_sites"]
    assert logged["final/new_sites_personalized"] == new["personalized"]["mean"]
    assert logged["new_sites/personalized_accuracy_worst_decile"] == new["personalized"]["worst_decile"]
    assert logged["final/sites_left_behind"] == (last["gain"] < 0).sum()
    assert logged["global_accuracy/site-002"] == last.set_index("site")["global_accuracy"]["site-002"]


def test_every_metric_comes_once_a_round(whole_run):
    client, run_id, _, _ = whole_run
    evaluated = list(range(0, ROUNDS + 1, EVERY))
    assert steps(client, run_id, "train/query_loss") == list(range(1, ROUNDS + 1))
    assert steps(client, run_id, "personalized_accuracy/new-000") == evaluated
    assert steps(client, run_id, "training_sites/global_accuracy_mean") == evaluated
    assert steps(client, run_id, "final/helped") == [0], "one value at round 0 is what MLflow draws as a bar"


def test_params_tags_and_data_describe_the_run(whole_run, store):
    client, run_id, _, _ = whole_run
    run = client.get_run(run_id)
    assert run.data.params == {key: str(value) for key, value in experiment(store).params().items()}
    assert run.info.run_name == "maml · digits · seed 0"
    assert run.info.status == "FINISHED"
    expected = {"fedmeta.learner": "maml", "fedmeta.data": "digits", "fedmeta.seed": "0"}
    assert expected.items() <= run.data.tags.items()
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "0123456789abcdef")
    assert '"sites": 8' in data.dataset.profile


def test_the_description_begins_with_the_verdict(whole_run):
    client, run_id, run, _ = whole_run
    text = client.get_run(run_id).data.tags["mlflow.note.content"]
    first, _, second, *rest = text.splitlines()
    new = groups(run[run["round"] == ROUNDS])["new_sites"]
    assert first.startswith(f"**maml: accuracy {new['personalized']['mean']:.3f} on {NEW} new sites**")
    assert second == "No site is left behind." or second.startswith("Left behind, ")
    assert any([cell.strip() for cell in line.split("|")][1:3] == ["new sites", "3"] for line in rest)


def test_the_artifacts_are_there_wherever_the_process_ran(whole_run, store, tmp_path):
    client, run_id, run, folder = whole_run
    assert {file.path for file in client.list_artifacts(run_id)} == {
        "checkpoint",
        "experiment.toml",
        "images",
        "per_site.json",
        "pictures",
        "sites.parquet",
    }
    beside = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts" / run_id / "artifacts"
    assert (beside / "checkpoint" / "state.safetensors").read_bytes() == b"state"
    names = {"adaptation", "gain_by_rows", "heat_map", "rounds", "sites", "sites_card"}
    assert {file.stem for file in (beside / "pictures").glob("*.png")} == names
    assert not (folder / "mlruns").exists()
    pd.testing.assert_frame_equal(pd.read_parquet(beside / "sites.parquet")[["site", "round"]], run[["site", "round"]])


def test_the_table_of_sites_is_worst_first(whole_run):
    client, run_id, _, _ = whole_run
    table = shown_table(client, run_id)
    scores = ["global_accuracy", "personalized_accuracy", "gain", "personalized_ece"]
    assert list(table.columns) == ["site", "kind", "rows", *scores]
    assert len(table) == NEW + TRAINING
    assert table["personalized_accuracy"].is_monotonic_increasing


@pytest.mark.slow
def test_a_resumed_run_repeats_nothing_and_its_results_are_renewed(store, tmp_path):
    tracker = start(experiment(store, "resumed"), tmp_path)
    run = history(NEW, TRAINING, 6, EVERY)
    early = run[run["round"] <= ROUNDS]
    log(tracker, early, range(ROUNDS + 1))
    assert tracker.finish(summary(early, ROUNDS), early) == []
    resumed = start(experiment(store, "resumed"), tmp_path, tracker.run_id)
    log(resumed, run, range(3, 7))
    assert resumed.finish(summary(run, 6), run) == []
    client = open_client(store)
    assert steps(client, tracker.run_id, "train/query_loss") == [1, 2, 3, 4, 5, 6]
    assert steps(client, tracker.run_id, "global_accuracy/site-001") == [0, 2, 4, 6]
    result = client.get_run(tracker.run_id).data.metrics["final/new_sites_personalized"]
    assert result == groups(run[run["round"] == 6])["new_sites"]["personalized"]["mean"]
    table = shown_table(client, tracker.run_id)
    assert len(table) == NEW + TRAINING


@pytest.mark.slow
def test_odd_sites_and_values(store, tmp_path):
    """Names that MLflow refuses, values that it distorts, a group without sites, and a limit to the curves."""
    names = ["ward/7", "ward?7", "é .", "..", "Ward_7"]
    sites = evaluation(0, 5).assign(site=names)
    sites.loc[0, ["personalized_accuracy", "gain"]] = float("nan")
    described = experiment(store, "odd", curves=4)
    tracker = start(described, tmp_path)
    tracker.evaluation(1, sites, groups(sites))
    tracker.round(1, {"train/query_loss": float("inf"), "time/round_s": None, "failures/replies": 2})
    tracker.round(1, {"failures/replies": 3})
    assert tracker.finish(summary(sites, 1), sites) == []
    run = open_client(store).get_run(tracker.run_id)
    curves = {key.partition("/")[2] for key in run.data.metrics if key.startswith("global_accuracy/")}
    assert len(curves) == 4
    assert "é" in curves
    assert len([key for key in run.data.metrics if key.startswith("personalized_accuracy/")]) == 3
    assert not [key for key in run.data.metrics if key.startswith("new_sites/")]
    assert run.data.metrics["failures/replies"] == 2
    assert "train/query_loss" not in run.data.metrics
    assert "on 4 training sites" in run.data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_any_score_is_tracked_with_its_direction_and_unit(store, tmp_path):
    """An own problem's score in dB, a further metric that is undefined at a site, and the problem's own pictures."""
    sites = evaluation(2, 3, score=SNR)
    sites["local_snr"] = -35.0
    sites.loc[1, ["global_ece", "personalized_ece"]] = float("nan")
    tracker = start(experiment(store, "snr"), tmp_path, score=SNR)
    found = summary(sites, 1, score=SNR)
    found["new_sites"]["personalized"]["pooled"] = -20.0
    tracker.evaluation(0, sites, {name: found[name] for name in ("new_sites", "training_sites")})
    (tmp_path / "pictures").mkdir()
    for name in ("start before", "start after"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "pictures" / f"{name}.png")
    assert tracker.finish(found, sites) == []
    client = open_client(store)
    run = client.get_run(tracker.run_id)
    assert {"new_sites/personalized_snr_worst_decile", "global_snr/site-000"} < set(run.data.metrics)
    assert run.data.metrics["new_sites/undefined_ece"] == 1
    assert run.data.metrics["final/new_sites_local_only"] == -35.0
    assert run.data.metrics["final/new_sites_pooled"] == -20.0
    assert run.data.metrics["final/beats_local"] == 1.0
    assert not [key for key in run.data.metrics if "accuracy" in key]
    text = run.data.tags["mlflow.note.content"]
    assert text.startswith(f"**maml: snr {found['new_sites']['personalized']['mean']:.3f} dB on 2 new sites**")
    assert "snr (dB), higher is better" in text
    assert shown_table(client, tracker.run_id)["personalized_snr"].is_monotonic_increasing
    pictures = {file.path for file in client.list_artifacts(tracker.run_id, "images")}
    for name in ("sites", "start before", "start after"):
        assert any(path.startswith(f"images/0_summary~{name}+step+0+") for path in pictures)


def test_a_new_experiment_opens_with_the_best_run_on_top(store, tmp_path):
    for score, ascending in ((SNR, False), (RMSE, True)):
        name = f"view of {score.name}"
        tracker = start(experiment(store, name), tmp_path / score.name, score=score)
        tracker.stop("FINISHED")
        view = json.loads(open_client(store).get_experiment_by_name(name).tags[VIEW_TAG])
        assert json.loads(view["state"])["orderByAsc"] is ascending
        assert f"personalized_{score.name}" in view["state"]


def test_a_run_that_breaks_is_marked_so(store, tmp_path):
    tracker = start(experiment(store, "broken"), tmp_path)
    tracker.round(1, figures(1))
    (tmp_path / "failures.json").write_text("[]")
    assert tracker.stop("FAILED", [tmp_path / "failures.json"]) == []
    run = open_client(store).get_run(tracker.run_id)
    assert [file.path for file in open_client(store).list_artifacts(tracker.run_id)] == ["failures.json"]
    assert (run.info.status, run.data.metrics["traffic/bytes_up"]) == ("FAILED", 9.0)


def test_a_deleted_experiment_is_refused(store, tmp_path):
    tracker = start(experiment(store, "deleted"), tmp_path)
    tracker.stop("FINISHED")
    client = open_client(store)
    client.delete_experiment(client.get_run(tracker.run_id).info.experiment_id)
    with pytest.raises(FedmetaError, match='"deleted" was deleted'):
        start(experiment(store, "deleted"), tmp_path)


def test_an_unknown_run_cannot_be_resumed(store, tmp_path):
    with pytest.raises(FedmetaError, match="0123456789"):
        start(experiment(store), tmp_path, "0123456789")


def unused_port() -> int:
    """Returns a port that is free, and not MLflow's usual one, which another test may take meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_mlflow_is_imported_only_where_a_run_starts():
    code = "import fedmeta.tracking, sys; print('mlflow' in sys.modules, 'matplotlib' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def wait_until_sent(tracker):
    deadline = time.monotonic() + 60
    while tracker._queue.pending() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_outlives_its_store_and_loses_nothing(tmp_path, monkeypatch, capsys):
    """The server is killed in the middle of the run; what it missed waits in the run's folder until it is back."""
    monkeypatch.setattr(async_queue, "PATIENCE_S", 0.5)
    store, folder = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    open_client(store).search_experiments()
    run = history(NEW, TRAINING, 6, EVERY)
    with serving(store, unused_port()) as server:
        uri = server.address
        tracker = start(experiment(uri), folder)
        log(tracker, run, range(3))
        wait_until_sent(tracker)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    log(tracker, run, range(3, 7))
    unsent = tracker.finish(summary(run, 6), run)
    notices = capsys.readouterr().err
    assert f"{uri} does not take events (Connection refused); training continues" in notices
    assert f"{uri} did not take {len(unsent)} events; they are in {folder / UNSENT}" in notices
    assert read_unsent(folder / UNSENT) == (tracker.run_id, unsent)
    assert f"once it is back: fedmeta sync {folder}" in notices
    assert {entry.step for entry in unsent if isinstance(entry, MetricValue)} == {0, 3, 4, 5, 6}
    assert isinstance(unsent[-1], End)
    with pytest.raises(FedmetaError, match="cannot be used: nothing answers"):
        list(sync(folder, uri))

    # The server is back, on the same database.
    port = int(uri.rpartition(":")[2])
    with serving(store, port):
        assert list(sync(tmp_path, uri)) == [(folder, len(unsent), 0)]
        assert list(sync(tmp_path, uri)) == []
        there = {file.path for file in open_client(uri).list_artifacts(tracker.run_id)}
        assert there == {"images", "per_site.json", "pictures", "sites.parquet"}
    assert not (folder / UNSENT).exists()
    client = open_client(store)
    logged = client.get_run(tracker.run_id)
    assert logged.info.status == "FINISHED"
    assert steps(client, tracker.run_id, "train/query_loss") == [1, 2, 3, 4, 5, 6]
    assert steps(client, tracker.run_id, "personalized_accuracy/new-001") == [0, 2, 4, 6]
    assert logged.data.metrics["final/new_sites_global"] > 0


@pytest.mark.slow
def test_a_store_that_comes_back_gets_what_it_missed(tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    run = history(NEW, TRAINING, ROUNDS, EVERY)
    open_client(store).search_experiments()
    with serving(store, unused_port()) as server:
        port = int(server.address.rpartition(":")[2])
        tracker = start(experiment(server.address), tmp_path / "run")
        log(tracker, run, range(2))
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    log(tracker, run, range(2, ROUNDS + 1))
    with serving(store, port):
        assert tracker.finish(summary(run, ROUNDS), run) == []
    assert steps(open_client(store), tracker.run_id, "train/query_loss") == list(range(1, ROUNDS + 1))
