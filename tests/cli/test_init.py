"""The tutorial's hospitals: from nothing to a first honest result in two commands and one edit."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedmeta.cli.main import main
from fedmeta.data.propose import propose, to_toml
from fedmeta.errors import FedmetaError
from fedmeta.experiment import load_experiment
from tests.data.hospitals import NAMES, write, write_one

SHORT = ["--set", "tracking.uri=none", "--set", "server.rounds=5", "--quiet", "--json"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmeta", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_five_files_need_two_commands_and_one_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data")
    assert command(monkeypatch, "init", "data") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "experiment.toml is written; before it runs, mend the tables: data/elm.csv: lines have different" in message
    assert "expected 7 in line 41, saw 3" in message
    lines = Path("data/elm.csv").read_text().splitlines()
    Path("data/elm.csv").write_text("\n".join(lines[:40] + lines[41:]) + "\n")
    assert command(monkeypatch, "run", "experiment.toml", *SHORT[:4], "--json") == 0
    out = capsys.readouterr()
    assert 'site castle: column "cholesterol" has median' in out.err, "other units are named before the run"
    found = json.loads(out.out.splitlines()[-1])
    assert (found["new_sites"]["n"], found["training_sites"]["n"]) == (1, 4)
    text = Path("experiment.toml").read_text()
    for line in ('label = "readmitted"', '"patient_id",  # not in abbey', '"admitted",  # a date'):
        assert line in text


def test_one_file_with_a_column_of_hospitals_needs_no_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_one(tmp_path / "all.csv")
    assert command(monkeypatch, "init", "all.csv") == 0
    assert 'site_column = "hospital"' in capsys.readouterr().out
    assert command(monkeypatch, "run", "experiment.toml", *SHORT) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["new_sites"]["n"] + found["training_sites"]["n"] == len(NAMES)
    monkeypatch.setenv("COLUMNS", "160")
    assert command(monkeypatch, "sites", "experiment.toml") == 0
    shown = capsys.readouterr().out
    for part in ("labels  classification into 2 classes", "no (", "category", "cholesterol", "mean by site"):
        assert part in shown


def test_init_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_one(tmp_path / "all.csv")
    Path("experiment.toml").write_text("mine")
    assert command(monkeypatch, "init", "all.csv") == 2
    assert Path("experiment.toml").read_text() == "mine"


def test_what_init_writes_is_an_experiment(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(3):
        rows = 50
        frame = pd.DataFrame({"Unnamed: 0": np.arange(rows), 'asa "class"': draw.integers(1, 5, rows)})
        frame["study_id"] = [f"S{number}-{row}" for row in range(rows)]
        frame["year"] = 2024
        frame["nothing"] = None
        frame["bp"] = draw.normal(120, 10, rows)
        frame["disease"] = draw.integers(0, 2, rows)
        frame.to_csv(tmp_path / f"h{number}.csv", index=False)
    found = propose(str(tmp_path))
    assert found.label == "disease"
    assert set(found.ignored) == {"Unnamed: 0", "study_id", "year", "nothing"}
    (tmp_path / "e.toml").write_text(to_toml(found))
    data = load_experiment(tmp_path / "e.toml", []).data
    assert data.categorical == ('asa "class"',)
    assert set(data.ignore) == set(found.ignored)


def test_an_npz_file_needs_no_more_than_its_name(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, y, site = draw.normal(size=(90, 3)), draw.integers(0, 2, 90), np.arange(90) % 3
    np.savez(tmp_path / "d.npz", x=x, y=y, site=site)
    (tmp_path / "e.toml").write_text(to_toml(propose(str(tmp_path / "d.npz"))))
    data = load_experiment(tmp_path / "e.toml", []).data
    assert (data.source, data.new_sites, data.support) == ("npz", 1, 7)
    np.savez(tmp_path / "one.npz", x=x, y=y)
    with pytest.raises(FedmetaError, match='no array "site"'):
        propose(str(tmp_path / "one.npz"))


def test_init_names_what_it_cannot_find(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"has no file \*\.csv or \*\.parquet"):
        propose(str(tmp_path))
    write(tmp_path / "data")
    with pytest.raises(FedmetaError, match='no column "outcome" in every file; they share admitted, age'):
        propose(str(tmp_path / "data"), "outcome")
