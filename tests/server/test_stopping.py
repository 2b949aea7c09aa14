"""Patience and targets on validation sites: when a run ends before its last round, and with which meta-state."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmeta
from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.problems import Metric
from fedmeta.progress import Progress
from server.ledger import Decision, per_round
from server.stopping import Progressed, ValidationScore, progressed, reached, score_of_sites
from tests.server.digits import digits

HIGHER, LOWER = Metric("accuracy", higher_is_better=True), Metric("rmse", higher_is_better=False)

# Steps far too long: the first meta-state is the best one, and later ones are worse.
HARMFUL = ("server.optimizer=sgd", "server.lr=30", "server.rounds=6", "evaluation.every=1", "evaluation.patience=2")


def test_a_better_score_starts_the_wait_again_in_either_direction() -> None:
    for metric, values in ((HIGHER, [0.5, 0.4, 0.6, 0.6, 0.5]), (LOWER, [0.5, 0.6, 0.4, 0.4, 0.5])):
        seen: Progressed | None = None
        waits = []
        for number, value in enumerate(values):
            seen = progressed(seen, ValidationScore(number, value, 1.0), metric)
            waits.append((seen.best.round_number, seen.waited))
        assert waits == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


def test_of_equal_scores_the_smaller_loss_is_better() -> None:
    first = progressed(None, ValidationScore(0, 0.5, 1.0), HIGHER)
    assert progressed(first, ValidationScore(1, 0.5, 0.9), HIGHER).best.round_number == 1
    assert progressed(first, ValidationScore(1, 0.5, 1.0), HIGHER).best.round_number == 0


def test_a_target_is_reached_from_the_right_side() -> None:
    assert reached(0.9, ValidationScore(1, 0.9, 0.0), HIGHER)
    assert not reached(0.9, ValidationScore(1, 0.89, 0.0), HIGHER)
    assert reached(2.0, ValidationScore(1, 1.5, 0.0), LOWER)
    assert not reached(2.0, ValidationScore(1, 2.5, 0.0), LOWER)


def test_one_site_cannot_decide_and_none_is_no_score() -> None:
    found = score_of_sites(np.array([0.5, 0.6, 1.0, np.nan, 0.5, 0.0]), np.array([1.0, 1, 1, 1, 1, np.inf]), 3)
    assert found == ValidationScore(3, pytest.approx((0.5 + 0.6 + 0.5) / 3), 1.0)  # type: ignore[arg-type]
    assert score_of_sites(np.array([np.nan]), np.array([1.0]), 0) is None
    # What a checkpoint holds is JSON, which has no infinity.
    away = score_of_sites(np.array([0.5]), np.array([np.inf]), 0)
    assert away
    assert ValidationScore(**json.loads(json.dumps(away.to_json(), allow_nan=False))) == away


def test_what_a_decision_saves_is_counted_by_the_mean_round() -> None:
    assert per_round({"wall_s": 10.0, "bytes_up": 30.0, "bytes_down": 10.0}, 4) == (2.5, 10.0)
    decision = Decision(3, "stop", "why", 0.5, 0.4, 2, 1.0, 4.0)
    assert Decision(**json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize(
    ("given", "kept"),
    [("{score = 0.9}", "score = 0.9"), ("score = 1", "score = 1.0"), ("", ""), ("{score=-2.5}", "score = -2.5")],
)
def test_a_target_is_a_table_or_its_text(given: str, kept: str) -> None:
    experiment = Experiment().with_overrides([f"server.until={given}"])
    assert experiment.server.until == kept
    assert Experiment.from_toml(experiment.to_toml()) == experiment
    assert Experiment.from_params(experiment.params()) == experiment
    if given:
        table = given if given.startswith("{") else f"{{{given}}}"
        assert Experiment.from_toml(f"[server]\nuntil = {table}").server.until == kept


@pytest.mark.parametrize("given", ["0.9", "{accuracy = 0.9}", "{score = true}", "{score = nan}", "{score = 'x'}", "a"])
def test_what_is_no_target_is_refused(given: str) -> None:
    with pytest.raises(FedmetaError, match=r"\[server\] until = .*a table with the key score"):
        Experiment().with_overrides([f"server.until={given}"])


@pytest.mark.slow
def test_what_cannot_be_steered_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"\[evaluation\] patience = 2: needs validate_every or every above 0"):
        digits(tmp_path, "evaluation.patience=2", "evaluation.every=0")
    with pytest.raises(
        FedmetaError, match=r"^\[server\] until: needs evaluation.validate_every or evaluation.every above 0"
    ):
        fedmeta.run(digits(tmp_path, "server.until={score=0.9}", "evaluation.every=0"))
    with pytest.raises(
        FedmetaError, match=r"^\[evaluation\] patience with \[learner\] name = .ditto.: what sites kept"
    ):
        fedmeta.run(digits(tmp_path, "evaluation.patience=1", "learner.name=ditto"))


@pytest.mark.slow
def test_patience_ends_the_run_with_its_best_meta_state(tmp_path: Path) -> None:
    notes: list[str] = []

    def report(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    result = fedmeta.run(digits(tmp_path, *HARMFUL), report=report)
    stopping = result.summary["stopping"]
    assert stopping["ended"] == "patience"
    assert stopping["rounds_allowed"] == 6
    best, last = stopping["best_round"], result.summary["rounds"]
    assert last == best + 2 < 6
    assert stopping["best_score"] >= stopping["validation_score"]
    assert [decision["what"] for decision in result.summary["ledger"]] == ["stop", "restore"]
    assert result.summary["ledger"][0]["saved_rounds"] == 6 - last
    assert any(note.startswith(f"ended after round {last} of 6: 2 evaluations without") for note in notes)
    assert any(note.startswith(f"restored the meta-state after round {best}:") for note in notes)
    # The state is bit for bit the one of a run that ends there by itself, on the same sites.
    there = fedmeta.run(digits(tmp_path / "there", *HARMFUL, f"server.rounds={best}"))
    assert there.meta_state.keys() == result.meta_state.keys()
    assert all(torch.equal(value, there.meta_state[name]) for name, value in result.meta_state.items())
    assert there.summary["new_sites"] == result.summary["new_sites"]
    # The start that other sites get is the best one too, and sites that decide are no sites that are reported.
    kept, _ = checkpoint.newest(result.folder)
    assert all(torch.equal(value, kept.meta_state[name]) for name, value in result.meta_state.items())
    kinds = result.sites.groupby("kind")["site"].nunique()
    assert kinds["validation"] == 6
    assert result.summary["training_sites"]["n"] == kinds["training"] == 26


@pytest.mark.slow
def test_a_target_ends_the_run_and_its_cost_is_in_the_summary(tmp_path: Path) -> None:
    result = fedmeta.run(digits(tmp_path, "server.until={score=0.0}", "evaluation.every=2"))
    stopping = result.summary["stopping"]
    assert (stopping["ended"], stopping["reached"], stopping["target"]) == ("target", True, 0.0)
    assert stopping["to_target"]["rounds"] == result.summary["rounds"] == 0
    assert stopping["to_target"]["bytes_up"] > 0
    missed = fedmeta.run(digits(tmp_path / "missed", "server.until={score=1.5}", "server.rounds=2"))
    assert missed.summary["stopping"]["reached"] is False
    assert missed.summary["rounds"] == 2


@pytest.mark.slow
def test_a_run_without_these_keys_has_none_of_it(tmp_path: Path) -> None:
    result = fedmeta.run(digits(tmp_path, "server.rounds=1"))
    assert not {"stopping", "ledger"} & result.summary.keys()
    assert "validation" not in set(result.sites["kind"])


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])
def test_a_run_with_patience_resumes_to_the_same_bits(tmp_path: Path, after: int) -> None:
    settings = (*HARMFUL, "runtime.checkpoint_every=1")
    unbroken = fedmeta.run(digits(tmp_path / "unbroken", *settings))

    def stop(progress: Progress) -> None:
        if progress.round_number == after and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(digits(tmp_path / "stopped", *settings), report=stop)
    resumed = fedmeta.run(digits(tmp_path / "stopped", *settings), resume="auto")
    assert all(torch.equal(value, resumed.meta_state[name]) for name, value in unbroken.meta_state.items())
    assert resumed.summary["stopping"] == unbroken.summary["stopping"]
    assert resumed.summary["new_sites"] == unbroken.summary["new_sites"]
