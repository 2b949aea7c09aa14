"""A new site of an own problem: adapted parameters and scores by its own metrics, from its own file."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedmeta
from fedmeta import Metric, Problem, Task, TaskSource
from fedmeta.adapt.locate import find_start
from fedmeta.adapt.own_problem import FILE, PICTURE, adapt_task, write
from fedmeta.cli.main import main
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment

CODE = ("tests.adapt.test_own_problem",)


class Focus(Problem, TaskSource):
    """Every site's target lies near a common one; scored in dB, which is negative far away. A box constrains it."""

    metrics = (Metric("snr", higher_is_better=True, unit="dB"), Metric("error", higher_is_better=False))

    def __init__(self, path="", site="", broken=""):
        self.path, self.site, self.broken = path, site, broken

    def init(self, seed):
        return {"position": torch.zeros(4)}

    def constrain(self, parameters):
        return {"position": 3 * torch.tanh(parameters["position"] / 3)}

    def inner(self, parameters, data):
        return (parameters["position"] - data["target"]).square().sum(-1).mean()

    def evaluate(self, parameters, data):
        error = self.inner(parameters, data)
        return {"snr": -10 * torch.log10(error), "error": error}

    def picture(self, parameters, data):
        return torch.outer(parameters["position"], parameters["position"])

    def sites(self):
        return [self.site] if self.path else [f"body-{number}" for number in range(8)]

    def task(self, site, purpose, round, seed):  # noqa: A002
        if self.path:
            center = torch.from_numpy(np.load(self.path)).float()
        else:
            random = torch.Generator().manual_seed(int(site[-1]))
            center = torch.tensor([1.0, -1.0, 0.5, 0.0]) + 0.3 * torch.randn(4, generator=random)
        noise = torch.Generator().manual_seed(1000 * round + (purpose == "train"))
        rows = center + 0.05 * torch.randn(12, 4, generator=noise)
        return Task({"target": rows[:6]}, {"target": rows[6:]})


class NoFile(Focus):
    def __init__(self):
        super().__init__()


def experiment_of(folder, name="Focus", *settings):
    return Experiment.from_toml(
        "",
        overrides=[
            f"problem.name=tests.adapt.test_own_problem:{name}",
            "learner.inner_lr=0.2",
            "learner.inner_steps=4",
            "server.rounds=5",
            "server.lr=0.3",
            "evaluation.every=0",
            "tracking.uri=none",
            f"tracking.folder={folder}",
            *settings,
        ],
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return fedmeta.run(experiment_of(tmp_path_factory.mktemp("runs")))


def start_of(result):
    return find_start(str(result.folder), result.folder.parent, "", CODE)


def test_a_run_leaves_pictures_of_its_problem(result):
    assert {path.name for path in (result.folder / "pictures").glob("*_site.png")} >= {"worst_site.png"}


def test_a_site_that_the_source_knows_gets_what_the_run_gave_it(result):
    for _, row in result.sites.iterrows():
        solved = adapt_task(start_of(result), site=row["site"])
        assert solved.scores[0]["snr"] == pytest.approx(row["global_snr"], abs=1e-5)
        assert solved.scores[-1]["snr"] == pytest.approx(row["personalized_snr"], abs=1e-5)


def test_a_sites_own_file_is_adapted_to_offline(result, tmp_path):
    target = np.array([1.2, -0.8, 0.4, 0.1])
    np.save(tmp_path / "clinic.npy", target)
    solved = adapt_task(start_of(result), data=str(tmp_path / "clinic.npy"))
    assert solved.name == "clinic"
    summary = solved.summary()
    assert summary["personalized"]["snr"] > summary["global"]["snr"]
    assert summary["advice"] == "personal"
    assert len(summary["curve"]) == 5
    written = write(solved, tmp_path / "out")
    assert {FILE, PICTURE, "card.md", "adapted.json"} <= set(written.files)
    parameters = load_file(tmp_path / "out" / FILE)
    # Constraints are applied: these are the values that objectives see.
    assert torch.equal(parameters["position"], 3 * torch.tanh(solved.path[-1]["position"] / 3))
    assert parameters["position"].sub(torch.from_numpy(target).float()).norm() < 0.6
    assert json.loads((tmp_path / "out" / "adapted.json").read_text()) == json.loads(json.dumps(summary))
    assert "-> " in solved.advice
    assert "dB" in (tmp_path / "out" / "card.md").read_text()


def test_only_support_adapts(result, tmp_path):
    solved = adapt_task(start_of(result), site="body-1")
    start = start_of(result)
    path = start.learner.adaptation_path(start.state, solved.task.support, 4)
    assert torch.equal(path[-1]["position"], solved.path[-1]["position"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "--site"),
        ({"site": "body-9"}, 'no site "body-9"'),
        ({"data": "missing.npy"}, "no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(result, how, words):
    with pytest.raises(FedmetaError, match=words) as refused:
        adapt_task(start_of(result), **how)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_source_that_reads_no_file_reports_it(tmp_path):
    result = fedmeta.run(experiment_of(tmp_path, "NoFile", "server.rounds=1"))
    np.save(tmp_path / "clinic.npy", np.zeros(4))
    with pytest.raises(FedmetaError, match=r"takes no argument path.*--site"):
        adapt_task(start_of(result), data=str(tmp_path / "clinic.npy"))
    assert adapt_task(start_of(result), site="body-0").scores


def test_the_code_of_a_start_is_allowed_by_a_person_alone(result):
    with pytest.raises(FedmetaError, match="--code"):
        find_start(str(result.folder), result.folder.parent, "")


def test_the_command_prints_scores_and_json(result, tmp_path, capsys, monkeypatch):
    command = ["adapt", str(result.folder), "--site", "body-2", "--out", str(tmp_path / "out"), "--code", CODE[0]]
    monkeypatch.setattr(sys, "argv", ["fedmeta", *command, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert json.loads(printed.out.splitlines()[-1])["score"]["name"] == "snr"
    assert "before" in printed.err
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2  # the folder is there already
