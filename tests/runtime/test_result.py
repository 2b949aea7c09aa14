"""A finished run as Python and notebooks show it."""

from pathlib import Path

import pandas as pd

from fedmeta.runtime import Result
from tests.tracking.made_up_run import evaluation, summary


def test_its_repr_is_one_line_and_its_html_the_table_of_the_terminal() -> None:
    empty = pd.DataFrame()
    found = summary(evaluation(2, 3), 4)
    result = Result(found, empty, {}, empty, Path("runs/<a>"))
    line = repr(result)
    assert "\n" not in line
    assert f"{found['new_sites']['personalized']['mean']:.3f}" in line
    page = result._repr_html_()
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    assert "beats local-only" in page
