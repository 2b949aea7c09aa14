"""Lists: every run of a folder, a damaged one named; every learner with its keys; words completed by the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmeta import checkpoint
from fedmeta.cli import listing
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import LEARNERS, learner_class, settings_of
from fedmeta.tracking.mlflow_client import SUMMARY
from tests.tracking.made_up_run import evaluation, summary


def make_run(folder: Path, learner: str, ended: bool) -> None:
    folder.mkdir(parents=True)
    (folder / listing.DESCRIBED).write_text(Experiment().with_overrides([f"learner.name={learner}"]).to_toml())
    if ended:
        (folder / listing.SUMMARY).write_text(json.dumps(summary(evaluation(3, 5), 40, learner)))
    else:
        (folder / listing.UNFINISHED).touch()


def test_the_files_are_those_that_runs_write() -> None:
    assert (listing.SUMMARY, listing.UNFINISHED) == (SUMMARY, checkpoint.UNFINISHED)


def test_runs_are_listed_with_their_score_and_what_is_damaged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "one", "maml", ended=True)
    make_run(tmp_path / "two", "fedavg", ended=False)
    (tmp_path / "compare-abc").mkdir()
    make_run(tmp_path / "bad", "maml", ended=True)
    (tmp_path / "bad" / listing.SUMMARY).write_text("{")
    found, unreadable = listing.list_runs(tmp_path)
    assert {each["run"]: (each["learner"], each["state"]) for each in found} == {
        "one": ("maml", "finished"),
        "two": ("fedavg", "unfinished"),
    }
    assert unreadable == [str(tmp_path / "bad")]
    scored = next(each for each in found if each["run"] == "one")
    assert scored["personalized"] == summary(evaluation(3, 5), 40, "maml")["new_sites"]["personalized"]["mean"]
    listing.runs(tmp_path, as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["run"] for line in lines[:2]] == [each["run"] for each in found]
    listing.runs(tmp_path / "compare-abc")
    assert "no run in" in capsys.readouterr().out
    with pytest.raises(FedmetaError, match="no such folder"):
        listing.runs(tmp_path / "none")


def test_every_learner_is_listed_with_its_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    found = {each["learner"]: each for each in listing.list_learners()}
    assert list(found) == list(LEARNERS)
    for name, each in found.items():
        assert each["about"], name
        assert each["keys"] == list(settings_of(learner_class(name)))
    listing.learners()
    text = capsys.readouterr().out
    assert not [name for name in LEARNERS if name not in text]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "words", "completed"), [("bash", "fedmeta la", "landscape"), ("zsh", "fedmeta lea", "learners")]
)
def test_a_shell_completes_commands(shell: str, words: str, completed: str) -> None:
    program = Path(sys.executable).with_name("fedmeta")
    asked = {"bash": {"COMP_WORDS": words, "COMP_CWORD": "1"}, "zsh": {"_TYPER_COMPLETE_ARGS": words}}[shell]
    environment = {**os.environ, "_FEDMETA_COMPLETE": f"complete_{shell}", **asked}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert completed in done.stdout, done.stderr
