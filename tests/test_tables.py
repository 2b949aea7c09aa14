"""How numbers and tables look, with any metric and with what is undefined."""

import pytest

from fedmeta import tables
from fedmeta.tables import Change, Share
from fedmeta.tracking import metrics
from tests.tracking.made_up_run import RMSE, SNR, evaluation, summary


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("text", "text"),
        (0.5, "0.500"),
        (-12.3456, "-12.346"),
        (0.0, "0.000"),
        (1e-17, "0.000"),
        (0.00012, "1.20e-04"),
        (1234567.0, "1.23e+06"),
        (Change(0.25), "+0.250"),
        (Change(-0.00001), "-1.00e-05"),
        (Share(0.125), "12%"),
        (12345, "12,345"),
        (None, "-"),
        (float("nan"), "-"),
        (Share(float("nan")), "-"),
        (float("-inf"), "-"),
    ],
)
def test_a_cell_shows_its_value(cell, shown):
    assert tables.text(cell) == shown


def test_markdown_shows_names_as_they_are():
    lines = tables.markdown_table(("site", "score"), [("a|b *c* <i> `d` _e_ f_g [x](y) [z]", 0.5)])
    assert lines == [
        "| site | score |",
        "| --- | ---: |",
        r"| a\|b \*c\* \<i\> \`d\` \_e\_ f_g [x\](y) [z] | 0.500 |",
    ]


def test_results_have_a_row_for_each_group_with_sites():
    found = summary(evaluation(2, 3, score=SNR), 1, score=SNR)
    headings, rows = tables.results_table(found)
    assert [row[0] for row in rows] == ["new sites", "training sites"]
    assert "pooled" not in headings
    found["new_sites"]["personalized"]["pooled"] = -3.0
    found["judge"] = "validation_sites"
    headings, rows = tables.results_table(found)
    assert rows[0][headings.index("pooled")] == -3.0
    assert rows[0][0] == "validation sites"
    assert all(len(row) == len(headings) for row in rows)
    assert tables.results_table(summary(evaluation(0, 3), 1)).rows[0][0] == "training sites"
    assert tables.score_label(found) == "snr (dB), higher is better"
    assert tables.score_label(summary(evaluation(1, 1, score=RMSE), 1, score=RMSE)) == "rmse, lower is better"


def test_further_metrics_count_where_they_are_undefined():
    sites = evaluation(2, 3, score=SNR)
    sites.loc[1, ["global_ece", "personalized_ece"]] = float("nan")
    headings, rows = tables.metrics_table(summary(sites, 1, score=SNR))
    assert [row[:2] for row in rows] == [("ece", "new sites"), ("ece", "training sites")]
    assert rows[0][headings.index("sites") :] == (1, 1)
    assert rows[1][headings.index("sites") :] == (3, 0)


def test_a_ledger_has_a_row_and_a_line_for_each_decision_and_its_totals() -> None:
    stop = {"round": 30, "what": "stop", "why": "no better", "before": 0.8, "after": 0.7}
    stop |= {"saved_rounds": 70, "saved_s": 3.5, "saved_bytes": 2e6}
    undo = {"round": 10, "what": "undo", "why": "worse", "before": 0.8, "after": None}
    undo |= {"saved_rounds": -4, "saved_s": 0.0, "saved_bytes": 0.0}
    reached = {"rounds": 5, "wall_s": 1.0, "bytes_up": 1e6, "bytes_down": 2e6}
    order = {"rounds_first": 9, "rounds_exact": 1, "probes": 2, "first_s": 0.1, "exact_s": 0.3, "saved_s": 1.6}
    own = {"ledger": [stop, undo], "stopping": {"to_target": reached}, "order": order}
    assert tables.ledger_lines(own) == [
        "stop after round 30: no better; saves 70 rounds, 3.5 s",
        "undo after round 10: worse; 4 rounds lost",
        "to the target: 5 rounds, 1.0 s, 3.0 MB",
        "order: 9 rounds of first order, 1 exact, 2 probes; a cohort takes first 0.1 s, exact 0.3 s; first order saved "
        "1.6 s, probes counted",
    ]
    found = tables.ledger_table(own)
    assert [row[0] for row in found.rows] == ["stop after round 30", "undo after round 10"]
    assert all(len(row) == len(found.headings) for row in found.rows)
    assert tables.ledger_lines({}) == []
    totals = metrics._ledger(own)
    assert (totals["ledger/saved_rounds"], totals["ledger/to_target_rounds"]) == (66, 5)
    assert totals["ledger/order_saved_s"] == 1.6
    assert metrics._ledger({}) == {}
