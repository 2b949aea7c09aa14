"""A deployed model watches rows: no alarm while nothing changes, an alarm with its row after a switch."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedmeta.adapt.model import FILE, SiteModel
from fedmeta.cli.main import app
from fedmeta.errors import FedmetaError
from fedmeta.stream.watching import Report, watch_file
from tests.adapt.finished import hospitals, labels_of, rows, run, write_csv


def test_advice_names_the_row_and_the_rate() -> None:
    calm = Report(200, 0.01, None, None, 3.2, 0.5, None, ())
    assert calm.advice.startswith("no alarm in 200 rows: the evidence reached 3.2 of the 100")
    assert "(5 rows are few for that)" in Report(5, 0.01, None, None, 1.0, 0.5, None, ()).advice
    found = Report(200, 0.01, 120, 101, 150.0, 0.5, 2.0, ())
    assert "alarm at row 120: losses have risen from about row 101 on, from 0.5 to 2 on average" in found.advice
    assert "at most 0.01" in found.advice


@pytest.mark.slow
@pytest.mark.parametrize("regression", [False, True])
def test_a_switch_is_found_in_a_file_and_a_calm_file_has_none(tmp_path: Path, regression: bool) -> None:
    _, start = run(tmp_path, hospitals(tmp_path / "data", regression))
    model = SiteModel.of(start, start.learner.theta(start.state))
    x, score = rows(11, 240, 0.0)
    calm = score.round(3).tolist() if regression else labels_of(score)
    turned = -score[120:]
    later = turned.round(3).tolist() if regression else labels_of(turned)
    still = watch_file(model, str(write_csv(tmp_path / "calm.csv", x, calm)), 0.01)
    assert still.alarm is None
    assert still.capital < 100
    path = write_csv(tmp_path / "switch.csv", x, [*calm[:120], *later])
    found = watch_file(model, str(path), 0.01)
    assert found.alarm is not None
    assert found.change is not None
    assert 120 < found.alarm < 200
    assert abs(found.change - 121) < 25
    assert found.after is not None
    assert found.after > found.before
    with pytest.raises(FedmetaError, match="--rate 1: it must be a probability"):
        watch_file(model, str(path), 1.0)
    folder = tmp_path / "site"
    folder.mkdir()
    model.write(folder / FILE, start, {})
    shown = CliRunner().invoke(app, ["watch", str(folder), "--data", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout.strip().splitlines()[-1])["alarm"] == found.alarm
    assert np.isfinite(found.capital)
