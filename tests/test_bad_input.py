"""Whatever a user gets wrong is one line on stderr, exit code 2, no traceback, and nothing half-written."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedmeta.cli.main import main

Case = Callable[[Path], list[str]]


def npz(folder: Path, **arrays: object) -> str:
    path = folder / "sites.npz"
    np.savez(path, **arrays)
    return str(path)


def rows(**changes: object) -> dict[str, object]:
    random = np.random.default_rng(0)
    base = {"x": random.normal(size=(60, 3)), "y": np.arange(60) % 2, "site": np.arange(60) // 20}
    return {**base, **changes}


def of_npz(**changes: object) -> Case:
    return lambda folder: ["--set", "data.source=npz", "--set", f"data.path={npz(folder, **rows(**changes))}"]


def of_npz_with(setting: str) -> Case:
    return lambda folder: [*of_npz()(folder), "--set", setting]


def of_table(text: str) -> Case:
    def case(folder: Path) -> list[str]:
        (folder / "tables").mkdir()
        (folder / "tables" / "north.csv").write_text("a,b,label\n1,2,yes\n2,3,no\n3,4,yes\n")
        (folder / "tables" / "south.csv").write_text(text)
        return ["--set", "data.source=tables", "--set", f"data.path={folder / 'tables'}"]

    return case


def of(*settings: str) -> Case:
    return lambda folder: [word for setting in settings for word in ("--set", setting)]


def with_nan_column() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(60, 3))
    x[:, 1] = np.nan
    return x


def not_an_npz(folder: Path) -> list[str]:
    (folder / "sites.npz").write_text("certainly not a zip archive")
    return ["--set", "data.source=npz", "--set", f"data.path={folder / 'sites.npz'}"]


def broken_module(folder: Path) -> list[str]:
    (folder / "broken_file.py").write_text("def f(:\n")
    return ["--set", "model.name=broken_file:f"]


def unwritable(folder: Path) -> list[str]:
    (folder / "taken").write_text("a file where a folder should be")
    return ["--set", f"tracking.folder={folder / 'taken' / 'runs'}"]


CASES: dict[str, tuple[Case, str]] = {
    "missing data file": (of("data.source=npz", "data.path=nowhere.npz"), "nowhere.npz"),
    "path that is too long": (of("data.source=npz", f"data.path={'x' * 5000}"), "File name too long"),
    "home of nobody": (of("data.source=npz", "data.path=~nobody-of-that-name/x.npz"), "home folder"),
    "not an npz": (not_an_npz, "sites.npz"),
    "pickled arrays": (of_npz(x=np.array([{"a": 1}] * 60, dtype=object)), "x"),
    "wrong lengths": (of_npz(y=np.zeros(59, dtype=int)), "59"),
    "no rows": (of_npz(x=np.zeros((0, 3)), y=np.zeros(0, dtype=int), site=np.zeros(0, dtype=int)), "no rows"),
    "all-NaN column": (of_npz(x=with_nan_column()), "column"),
    "infinite feature": (of_npz(x=np.full((60, 3), np.inf)), "row"),
    "missing label": (of_npz(y=np.full(60, np.nan)), "y"),
    "label column absent": (of_table("a,b,outcome\n1,2,yes\n"), "label"),
    "text in a number column": (of_table("a,b,label\n1,tall,yes\n2,3,no\n"), "tall"),
    "other columns": (of_table("a,c,label\n1,2,yes\n2,3,no\n"), "south"),
    "unknown key": (of("server.round=3"), "rounds"),
    "unknown section": (of("serve.rounds=3"), "server"),
    "negative lr": (of("learner.inner_lr=-1"), "inner_lr"),
    "wrong type": (of("server.rounds=many"), "rounds"),
    "unknown learner": (of("learner.name=mamll"), "maml"),
    "unknown model": (of("model.name=resnett"), "model"),
    "model that cannot be imported": (of("model.name=nowhere:model"), "nowhere"),
    "model with batch statistics": (of("model.name=tests.bad_models:batch_norm"), "GroupNorm"),
    "model of other rows": (of("model.name=tests.bad_models:of_other_rows"), "failed on rows of shape (8, 8)"),
    "model of too few outputs": (of("model.name=tests.bad_models:of_too_few_outputs"), "make it (2, 10)"),
    "model of two results": (of("model.name=tests.bad_models:of_two_results"), "must return one tensor"),
    "model of open widths": (of("model.name=tests.bad_models:lazy"), "has no size yet"),
    "model in a broken file": (broken_module, "invalid syntax"),
    "learner in a broken file": (
        lambda folder: [broken_module(folder)[0], "learner.name=broken_file:f"],
        "broken_file",
    ),
    "text model for numbers": (of_npz_with("model.name=char_lstm"), "symbol codes"),
    "images too small": (of("model.name=cnn", "model.channels=8,8,8,8"), "channels"),
    "too many new sites": (of("data.new_sites=400"), "400"),
    "unreachable tracking": (of("tracking.uri=http://127.0.0.1:9"), "127.0.0.1:9"),
    "unwritable folder": (unwritable, "taken"),
    "setting without a value": (of("server.rounds"), "server.rounds"),
    "unknown option": (lambda folder: ["--rounds", "3"], "--rounds"),
    "unknown runtime": (lambda folder: ["--runtime", "cloud"], "cloud"),
    "nothing to resume": (lambda folder: ["--resume", "auto"], "resume"),
}


@pytest.mark.parametrize("words", [["tune", "e.toml", "--trials", "3"], ["compare", "e.toml", "--learners", "maml"]])
def test_a_model_that_cannot_work_leaves_no_search_and_no_comparison_behind(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.toml").write_text('[model]\nname = "tests.bad_models:of_other_rows"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.setattr(sys, "argv", ["fedmeta", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "failed on rows of shape (8, 8)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["e.toml"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, expected = CASES[name]
    (tmp_path / "e.toml").write_text('[tracking]\nuri = "none"\n[server]\nrounds = 1\n')
    words = case(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.setattr(sys, "argv", ["fedmeta", "run", "e.toml", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("fedmeta: ")
    assert printed.err.count("\n") == 1, printed.err
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before, "something was half-written"


@pytest.mark.quick("not TOML")
@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"[server\nrounds = 1", "line 1"), (b"\xff\xfe", "UTF-8"), (None, "no such file")],
    ids=["not TOML", "not text", "missing"],
)
def test_experiment_file(content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "e.toml").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "fedmeta", "run", "e.toml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "e.toml" in done.stderr
    assert expected in done.stderr


def test_unfinished_output_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedmeta", "--help"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


def test_no_command_shows_the_help_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedmeta"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "compare" in shown.out
    assert shown.err == ""


def test_the_help_explains_what_arguments_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedmeta", "run", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "The experiment, a TOML file. [required]" in shown
    assert "[default: local]" in shown
