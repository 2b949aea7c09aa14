"""A run that starts from an earlier one whose sites, columns and classes were others."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fedmeta
from fedmeta.checkpoint import newest
from fedmeta.errors import FedmetaError
from server.warm_start import _fitted
from tests.test_categories import experiment, frame


def test_tensors_are_taken_by_the_names_of_columns_and_classes() -> None:
    before, now = (("a", "b", "c"), ("ill", "well")), (("c", "new", "a"), ("dead", "ill", "well"))
    old, fresh = torch.arange(6.0).reshape(2, 3), -torch.ones(3, 3)
    found = _fitted("theta.weight", fresh, old, "cf", before, now)
    assert found is not None
    # Rows are dead, ill, well; columns c, new, a: what has no name in the earlier run begins without effect.
    assert found.tolist() == [[0, 0, 0], [2, 0, 0], [5, 0, 3]]
    bias = _fitted("theta.bias", -torch.ones(3), torch.tensor([4.0, 6.0]), "c", before, now)
    assert bias is not None
    assert bias.tolist() == [-1, 4, 6], "a class that is new begins as drawn"
    assert _fitted("theta.hidden", torch.zeros(4), torch.zeros(5), ".", before, now) is None


@pytest.mark.slow
def test_a_run_on_other_sites_starts_where_the_earlier_one_ended(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(5):
        frame(number).to_csv(data / f"h{number}.csv", index=False)
    first = fedmeta.run(experiment(tmp_path, data, 'data.new_sites=["h4"]'))
    with pytest.raises(FedmetaError, match=r"\[model\] start"):
        fedmeta.run(experiment(tmp_path, data, "model.start=nowhere"))
    (data / "h0.csv").unlink()
    draw = np.random.default_rng(0)
    for number in (1, 2, 3, 4, 5, 6):  # a column more, and the wards' order of columns changed
        pd.DataFrame(frame(number)).assign(bmi=draw.normal(25, 3, 60)).to_csv(data / f"h{number}.csv", index=False)
    notes: list[str] = []
    second = fedmeta.run(
        experiment(tmp_path, data, 'data.new_sites=["h3", "h6"]', f"model.start={first.folder}", "server.rounds=1"),
        report=lambda at: notes.append(at.note),
    )
    facts = second.summary["started_from"]
    assert facts["rounds"] == 6
    assert (facts["sites_added"], facts["sites_lost"]) == (["h5", "h6"], ["h0"])
    assert (facts["columns_added"], facts["columns_lost"], facts["tensors_drawn"]) == (["bmi"], [], [])
    assert facts["new_sites_that_trained_it"] == ["h3"]
    assert any("h3 trained the earlier run" in note for note in notes)
    # One round of small steps later, each column's weights are still those of its name.
    old, new = newest(first.folder)[0].meta_state, second.meta_state
    (name,) = (key for key in old if key.startswith("theta.") and old[key].dim() == 2)
    assert new[name].shape[1] == old[name].shape[1] + 1
    others = [place for place in range(new[name].shape[1]) if place != 1]
    assert (new[name][:, others] - old[name]).abs().max() < 0.02
    assert new[name][:, 1].abs().max() < 0.02
