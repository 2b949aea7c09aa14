"""What a terminal shows of a run, and what stays away from pipes."""

import os
import pty
import re
import subprocess
import sys

import pandas as pd
import pytest

from fedmeta.cli import live, tables
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress
from tests.tracking.made_up_run import evaluation, summary

RUN = """
from fedmeta.cli import live
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress

with live.progress(Experiment.from_toml("[server]\\nrounds = 4", "a test")) as report:
    report(Progress(1, 4))
    report(Progress(2, 4, 0.5, 0.75, failures=3))
    report(Progress(3, 4, 0.5, 0.75, failures=3))
    report(Progress(4, 4, 0.625, 0.875, failures=3))
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*\b[349][0-7]")


def in_a_terminal(code, **environment):
    """Runs code whose stderr is a terminal of 120 columns; returns what it wrote there."""
    ours, theirs = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=variables)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.communicate()[0] == b"", "stdout is for results"
    assert process.returncode == 0
    return written


def results(sites, capsys):
    tables.results(summary(sites, 40), Experiment())
    output = capsys.readouterr()
    assert output.out == "", "stdout is for the JSON object"
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in output.err.splitlines()]
    return output.err, {cells[1]: cells[2:-1] for cells in lines if len(cells) > 3}


@pytest.fixture(scope="module")
def coloured():
    return in_a_terminal(RUN, NO_COLOR=None).decode()


def test_progress_shows_scores_and_failures(coloured):
    assert "4/4" in coloured
    assert "global 0.625" in coloured
    assert "0.875" in coloured
    assert "3 failed" in coloured
    assert "▁█" in coloured, "one bar for each evaluation, not for each round"


def test_no_color_is_honoured(coloured):
    assert COLOUR.search(coloured)
    assert not COLOUR.search(in_a_terminal(RUN, NO_COLOR="1").decode())


def test_a_pipe_gets_no_progress(capsys):
    with live.progress(Experiment()) as report:
        report(Progress(1, 4, 0.5, 0.75))
        report(Progress(2, 4, note="node 2 left"))
    assert capsys.readouterr().err == "fedmeta: node 2 left\n"
    with live.progress(Experiment(), quiet=True) as report:
        report(Progress(2, 4, note="node 2 left"))
    assert capsys.readouterr().err == ""


def test_a_sparkline_rises_with_its_values_and_stays_short():
    assert live.sparkline([0.5]) == "▄"
    assert live.sparkline([0.2, 0.9]) == "▁█"
    assert live.sparkline([0.0, 0.5, 1.0, 0.0]) == "▁▅█▁"
    rising = live.sparkline([place / 500 for place in range(501)])
    assert len(rising) == live.MOST_BARS
    assert list(rising) == sorted(rising)
    assert (rising[0], rising[-1]) == ("▁", "█")


@pytest.mark.parametrize("regression", [False, True])
def test_the_table_has_both_groups(capsys, regression):
    sites = evaluation(10, 30, regression=regression)
    text, table = results(sites, capsys)
    new = sites[sites["kind"] == "new"]
    score = "rmse" if regression else "accuracy"
    worst = new[f"personalized_{score}"].max() if regression else new[f"personalized_{score}"].min()
    assert table["new sites"] == [
        "10",
        "-",
        f"{new[f'global_{score}'].mean():.3f}",
        f"{new[f'personalized_{score}'].mean():.3f}",
        f"{worst:.3f}",
        f"{(new['gain'] > 0).mean():.0%}",
        f"{(new['gain'] < 0).mean():.0%}",
    ]
    assert table["training sites"][0] == "30"
    assert "fedmeta ui" in text
    assert ("rmse" if regression else "accuracy") in text


def test_a_sites_name_is_no_style(capsys):
    frame = pd.DataFrame({"site": ["[/bold]", "[red]mercy"], "kind": ["new", "training"], "train_rows": [3, 4]})
    tables.sites(frame)
    shown = capsys.readouterr().out
    assert "[/bold]" in shown
    assert "[red]mercy" in shown


def test_a_group_without_sites_has_dashes(capsys):
    _, table = results(evaluation(0, 3), capsys)
    assert table["new sites"] == ["0", "-", "-", "-", "-", "-", "-"]
