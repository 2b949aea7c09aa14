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
from tests.tracking.made_up_run import ACCURACY, RMSE, SNR, evaluation, summary

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


def results(sites, capsys, score=ACCURACY):
    tables.results(summary(sites, 40, score=score), Experiment())
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


@pytest.mark.slow
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


@pytest.mark.parametrize("score", [ACCURACY, RMSE, SNR])
def test_the_table_has_both_groups(capsys, score):
    sites = evaluation(10, 30, score=score)
    text, table = results(sites, capsys, score)
    new = sites[sites["kind"] == "new"]
    before, after = new[f"global_{score.name}"], new[f"personalized_{score.name}"]
    worst = after.min() if score.higher_is_better else after.max()
    shares = [f"{(new['gain'] > 0).mean():.0%}", f"{(new['gain'] < 0).mean():.0%}"]
    assert table["new sites"] == ["10", "-", f"{before.mean():.3f}", f"{after.mean():.3f}", f"{worst:.3f}", *shares]
    assert table["training sites"][0] == "30"
    assert "fedmeta ui" in text
    assert score.label in text
    assert "new sites: ece 0.100" in text


def test_a_sites_name_is_no_style(capsys):
    frame = pd.DataFrame({"site": ["[/bold]", "[red]mercy"], "kind": ["new", "training"], "train_rows": [3, 4]})
    tables.sites(frame)
    shown = capsys.readouterr().out
    assert "[/bold]" in shown
    assert "[red]mercy" in shown


def test_a_group_without_sites_has_no_row(capsys):
    _, table = results(evaluation(0, 3), capsys)
    assert "new sites" not in table
    assert table["training sites"][0] == "3"
