"""What private runs on the same sites spend adds up, wherever a choice among them is shown."""

import json
from pathlib import Path

import pytest

from fedmeta.adapt import adaptation, model_card
from fedmeta.progress import ignore_progress
from fedmeta.search import compare, search_report
from fedmeta.search.comparison_report import markdown
from fedmeta.search.privacy_spent import privacy_spent
from tests.adapt.finished import COLUMNS, hospitals, labels_of, rows, run, write_csv
from tests.search.searches import config, described, searched

NOISY = ("privacy.clip_norm=0.5", "privacy.noise_multiplier=2.0")


def test_epsilons_and_deltas_add_up_and_runs_that_did_not_end_are_named(tmp_path: Path) -> None:
    for name, epsilon in (("a", 1.25), ("b", 2.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "privacy.json").touch()
        spent = {"privacy": {"epsilon": epsilon, "delta": 1e-5, "rounds": 3}}
        (tmp_path / name / "summary.json").write_text(json.dumps(spent))
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "privacy.json").touch()
    found = privacy_spent(described(tmp_path, *NOISY), [tmp_path, tmp_path / "a"])
    assert found.startswith("Privacy: 2 runs on the same sites have spent epsilon 3.75 at delta 2e-05 together; 1 more")
    assert privacy_spent(described(tmp_path), [tmp_path]) == ""


@pytest.mark.slow
def test_a_search_and_a_comparison_of_private_runs_show_the_sum(tmp_path: Path) -> None:
    result = searched(config(tmp_path, 2, "random", *NOISY))
    summaries = [json.loads(path.read_text()) for path in result.config.folder.rglob("summary.json")]
    assert len(summaries) == 2
    spent = [summary["privacy"]["epsilon"] for summary in summaries]
    shown = f"2 runs on the same sites have spent epsilon {sum(spent):.3g} at delta 2e-05 together"
    assert shown in search_report.verdict(result)
    assert "Privacy" not in search_report.verdict(searched(config(tmp_path / "plain", 1)))
    private = described(tmp_path / "compared", *NOISY)
    compared = compare.compare(private, ["maml"], 2, report=lambda *_: ignore_progress)
    assert "Privacy: 2 runs on the same sites have spent epsilon" in compared.privacy
    assert compared.privacy in markdown(compared)


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [True, False])
def test_the_card_of_an_adapted_model_states_what_epsilon_covers(noisy: bool, tmp_path: Path) -> None:
    overrides = ("server.rounds=2", "privacy.delta=0.01", *(NOISY if noisy else ()))
    _, start = run(tmp_path, hospitals(tmp_path / "data"), *overrides)
    x, score = rows(77, 40, 3.0)
    file = write_csv(tmp_path / "own.csv", x, labels_of(score), COLUMNS)
    card = model_card.card(adaptation.adapt(start, str(file), ""), [])
    assert ("It does not cover this model" in card) is noisy
