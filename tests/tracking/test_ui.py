"""The MLflow UI on a real store, in a real browser: the links open what they promise."""

import os
import re
import signal
import socket
import subprocess
import sys
from urllib.error import URLError
from urllib.request import urlopen

import pandas as pd
import pytest

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.tracking.mlflow_client import Dataset, open_client
from fedmeta.tracking.run_logger import Tracker
from fedmeta.tracking.ui import experiment_link, run_link, serving, ui
from tests.tracking.browser import CHROMIUM, browser
from tests.tracking.made_up_run import ACCURACY, groups, history, summary

NEW, TRAINING, ROUNDS, EVERY = 6, 24, 20, 5
PATIENCE_S = 60.0


def track(uri, folder, learner, worse):
    described = Experiment.from_toml(f'[learner]\nname = "{learner}"\n[tracking]\nuri = "{uri}"\n', "a test")
    data = Dataset("digits", "digits", "0123456789abcdef", NEW + TRAINING)
    tracker = Tracker.start(described.tracking, described.params(), folder / learner, data, score=ACCURACY)
    run = history(NEW, TRAINING, ROUNDS, EVERY)
    run["personalized_accuracy"] -= worse
    run["gain"] -= worse
    for number in range(ROUNDS + 1):
        tracker.round(number, {"train/query_loss": 2 / (number + 1), "time/round_s": 0.1, "failures/replies": 0})
        if number % EVERY == 0:
            sites = run[run["round"] == number]
            tracker.evaluation(number, sites, groups(sites))
    assert tracker.finish(summary(run, ROUNDS, learner), run) == []
    return tracker.run_id, run


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    runs = {learner: track(uri, folder, learner, worse) for learner, worse in (("maml", 0.0), ("local", 0.2))}
    return uri, runs


def titles(run: pd.DataFrame) -> set[str]:
    """What the cards of the per-site charts are called, as they stand in the page."""
    return {f">{site}<" for site in run["site"]}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_finds_the_sites_of_a_run_and_the_bars_of_the_experiment(tracked, tmp_path):
    uri, runs = tracked
    run_id, run = runs["maml"]
    client = open_client(uri)
    command = f"from fedmeta.tracking.ui import ui; ui({uri!r}, 'fedmeta')"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    try:
        link = process.stdout.readline().strip()
        address = link.partition("/#")[0]
        with browser(tmp_path / "profile") as page:
            page.open(run_link(address, client.get_run(run_id).info.experiment_id, run_id), height=5600)
            missing = page.wait_for({*titles(run), "personalized_accuracy", "global_accuracy"}, PATIENCE_S)
            if missing:
                page.screenshot(tmp_path / "run.png")
            assert not missing, f"the run's page lacks {missing}, see {tmp_path}/run.png"

            page.open(link, height=2400)
            best_first = "maml · digits · seed 0"
            wanted = {best_first, "local · digits · seed 0", "final/new_sites_personalized", "0_summary/sites"}
            missing = page.wait_for({*wanted, "Sort: final/new_sites_personalized"}, PATIENCE_S)
            page.screenshot(tmp_path / "experiment.png")
            assert not missing, f"the experiment's page lacks {missing}, see {tmp_path}/experiment.png"
            dom = page.evaluate("document.documentElement.outerHTML")
            assert dom.index(best_first) < dom.index("local · digits · seed 0")
            assert dom.index("final/new_sites_personalized") < dom.index("0_summary/sites"), "results are on top"
            assert "data.source=digits" not in dom, "the picture stands without all params above it"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with pytest.raises(URLError):
        urlopen(f"{address}/health", timeout=5)


@pytest.mark.slow
def test_what_is_served_and_linked(tracked):
    uri, _ = tracked
    with serving(uri) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.address)
        link = experiment_link(server.address, "fedmeta")
        assert link.startswith(f"{server.address}/#/experiments/1/runs?workflowType=machine_learning")
        assert "viewStateShareKey=fedmeta" in link
        assert experiment_link(server.address, "no such experiment") == f"{server.address}/#/experiments"
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(FedmetaError, match=f"port {port} is taken"), serving(uri, port):
            pass
        os.killpg(server.process.pid, signal.SIGKILL)


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FedmetaError, match="there is no MLflow store"):
        ui(f"sqlite:///{tmp_path}/mlflow.db", "fedmeta")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_of_a_server_only_the_link_is_printed(capsys):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        # It accepts connections and answers nothing, like a server behind a login would for all we know.
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        ui(address, "fedmeta")
    assert capsys.readouterr().out == f"{address}/#/experiments\n"
