"""Narrow terminals: whatever the width, every cell is there whole, and no line is longer than the terminal."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from fedmeta.cli import tables
from fedmeta.cli.folding import fitted
from fedmeta.experiment import Experiment
from tests.tracking.made_up_run import ACCURACY, evaluation, summary


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(fitted(table, console))
    return console.file.getvalue()  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(30, 120),
    st.lists(st.tuples(*[st.integers(-(10**11), 10**11)] * 5), min_size=1, max_size=4),
)
def test_numbers_are_whole_at_any_width(width: int, rows: list[tuple[int, ...]]) -> None:
    table = Table(title="a title", caption="a caption of several words that wraps")
    for heading in ("site", "local-\nonly", "global", "personalized", "worst\n10 %"):
        table.add_column(heading, justify="right" if heading != "site" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    text = printed(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert not [value for row in rows for value in row if str(value) not in text]
    assert "…" not in text


def test_a_table_that_fits_stays_one() -> None:
    table = Table("learner", "score")
    table.add_row("maml", "0.5")
    assert "┃" in printed(table, 60)
    assert printed(table, 12).split() == ["maml", "score:", "0.5"]


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_results_are_shown_whole(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = summary(evaluation(3, 5), 40, score=ACCURACY)
    tables.results(found, Experiment())
    text = capsys.readouterr().err
    assert "…" not in text
    for group in ("new_sites", "training_sites"):
        assert f"{found[group]['personalized']['worst_decile']:.3f}" in text
    assert ("┃" in text) == (columns == 80)
