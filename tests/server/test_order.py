"""First order, exact, or what probes and validation sites show: climbs, descents, and a bad climb that is undone."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Server
from fedmeta.learners import Maml, build
from fedmeta.learners.order import EXACT, FIRST, in_order
from fedmeta.progress import Progress
from server.order import Order, Probe, after_evaluation, after_probe, climbed, compare, is_worse, probes, summary
from tests.server.digits import digits

SETTINGS = Server(climb_below=0.8, descend_above=0.95, climb_patience=2, descend_probes=2)
LOSSES = np.array([1.0, 1.2, 0.8, 1.1])
LOW, MIDDLE, HIGH = Probe(0.5, 1.0), Probe(0.9, 1.0), Probe(0.99, 1.0)


def test_a_probe_climbs_below_one_bound_and_descends_above_another() -> None:
    order, decision = after_probe(Order(), MIDDLE, SETTINGS)
    assert decision == ""
    order, decision = after_probe(order, LOW, SETTINGS)
    assert decision == "climb"
    order = climbed(order, LOSSES)
    assert (order.now, order.guarded) == (EXACT, 3)
    decisions = []
    for probe in (HIGH, MIDDLE, HIGH, HIGH):  # between the bounds nothing is in a row any more
        order, decision = after_probe(order, probe, SETTINGS)
        decisions.append(decision)
    assert decisions == ["", "", "", "descend"]
    assert order.now == FIRST


def test_in_first_order_nothing_is_probed_that_could_not_decide() -> None:
    assert probes(Order(), SETTINGS)
    assert not probes(Order(), Server())
    assert probes(climbed(Order()), Server())


def test_judging_sites_that_stall_climb_and_those_that_get_worse_undo_it() -> None:
    order, decisions = Order(), []
    for score in (0.5, 0.6, 0.6, 0.6):
        order, decision = after_evaluation(order, (score,), LOSSES, SETTINGS)
        decisions.append(decision)
    assert decisions == ["", "", "", "climb"]
    order = climbed(order, LOSSES)
    kept, decision = after_evaluation(order, (0.6,), LOSSES - 0.1, SETTINGS)
    assert (decision, kept.now, kept.guarded) == ("", EXACT, 2)
    fallen, decision = after_evaluation(order, (0.4,), LOSSES + np.array([0.5, 0.6, 0.4, 0.5]), SETTINGS)
    assert (decision, fallen.now, fallen.waits) == ("undo", FIRST, 2)
    # The next climb waits for so many evaluations, and the one after it for twice as many.
    decisions = []
    for score in (0.5, 0.6):
        decisions.append(after_probe(fallen, LOW, SETTINGS)[1])
        fallen, _ = after_evaluation(fallen, (score,), LOSSES, SETTINGS)
    assert [*decisions, after_probe(fallen, LOW, SETTINGS)[1]] == ["", "", "climb"]
    # A climb between evaluations is guarded from the next one on, which is of the state that it leaves.
    waiting, decision = after_evaluation(climbed(Order()), (0.4,), LOSSES, SETTINGS)
    assert (decision, waiting.guard, waiting.guarded) == ("", tuple(LOSSES.tolist()), 3)
    assert after_evaluation(waiting, (0.3,), LOSSES + 1, SETTINGS)[1] == "undo"
    again, _ = after_evaluation(climbed(fallen, LOSSES), (0.4,), LOSSES + 1, SETTINGS)
    assert again.waits == 4


def test_worse_is_what_more_than_chance_explains() -> None:
    assert not is_worse(LOSSES, LOSSES)
    assert not is_worse(LOSSES + np.array([0.3, -0.3, 0.3, -0.2]), LOSSES)
    assert is_worse(LOSSES + 0.01, LOSSES)
    assert is_worse(np.array([1.0, np.nan, 1.0, 1.0]), LOSSES)
    assert not is_worse(np.array([1.05]), np.array([1.0]))
    assert is_worse(np.array([1.2]), np.array([1.0]))


def test_gradients_are_compared_whatever_the_order_of_their_keys() -> None:
    one, other = (
        {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])},
        {"b": torch.tensor([4.0]), "a": torch.tensor([2.0])},
    )
    assert compare(one, other) == Probe(pytest.approx(1.0), pytest.approx(0.5))  # type: ignore[arg-type]
    nothing = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert compare(nothing, nothing).cosine == 1
    assert compare(one, nothing).cosine == 0


def test_costs_are_medians_without_the_first_time_and_what_was_saved_is_less_the_probes() -> None:
    order = Order()
    for seconds in (9.0, 1.0, 1.0, 1.2):
        order = order.timed(FIRST, seconds, stepped=True)
    for seconds in (50.0, 3.0):
        order = order.timed(EXACT, seconds, stepped=False)
    found = summary(order)
    assert (found["rounds_first"], found["rounds_exact"], found["first_s"], found["exact_s"]) == (4, 0, 1.0, 3.0)
    assert found["saved_s"] == pytest.approx(4 * 2.0 - 2 * 3.0)
    assert Order.from_json(json.loads(json.dumps(order.to_json()))) == order
    assert summary(Order())["saved_s"] is None


def task(seed: int = 0) -> fedmeta.Task:
    random = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(5, 3, generator=random), torch.randint(2, (5,), generator=random)) for _ in range(2)]
    return fedmeta.Task(*rows)


def test_the_first_order_of_maml_is_fomaml_and_of_anil_its_own() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    maml, fomaml, anil = (build(name, model(), inner_steps=2) for name in ("maml", "fomaml", "anil"))
    state = maml.init(0)
    expected, _ = fomaml.meta_gradient(state, task())
    found, _ = in_order(maml, FIRST).meta_gradient(state, task())
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert in_order(maml, FIRST).estimator == "first-order"
    assert in_order(maml, FIRST) is in_order(maml, FIRST)
    assert in_order(maml, EXACT) is maml
    path = anil.adaptation_path(state, task().support, 2)
    own = torch.autograd.grad(
        anil.outer(end := {name: value.detach().requires_grad_() for name, value in path[-1].items()}, task().query),
        list(end.values()),
    )
    found, _ = in_order(anil, FIRST).meta_gradient(state, task())
    for name, value in zip(end, own, strict=True):
        assert torch.allclose(found[f"theta.{name}"], value)
    with pytest.raises(FedmetaError, match="MetaSgd has no first-order approximation"):
        in_order(build("meta-sgd", model()), FIRST)


@dataclass(frozen=True)
class Wrong(Maml):
    """A learner whose exact gradient points the wrong way; its first-order one is right."""

    def meta_gradient(
        self, meta_state: dict[str, Tensor], task: fedmeta.Task
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gradient, figures = super().meta_gradient(meta_state, task)
        return {name: -value for name, value in gradient.items()}, figures


AUTO = (
    "learner.order=auto",
    "server.probe_every=2",
    "evaluation.every=2",
    "server.rounds=8",
    "server.lr=0.02",
    "server.climb_below=0.9",
)


@pytest.mark.slow
def test_a_planted_bad_climb_is_caught_and_undone(tmp_path: Path) -> None:
    wrong = (
        "learner.name=tests.server.test_order:Wrong",
        "runtime.check=off",
        "evaluation.validation_sites=16",
        "server.lr=0.05",
    )
    notes: list[str] = []
    settings = digits(tmp_path, *AUTO, *wrong, "server.rounds=4")
    result = fedmeta.run(settings, report=lambda progress: notes.append(progress.note))
    ledger = result.summary["ledger"]
    assert [decision["what"] for decision in ledger][:2] == ["climb", "undo"]
    assert "below climb_below" in ledger[0]["why"]
    assert ledger[1]["after"] < ledger[1]["before"] or "got worse" in ledger[1]["why"]
    # No site is split off for it: training sites judge, on test rows.
    assert "training sites' test rows got worse" in ledger[1]["why"]
    assert set(result.sites["kind"]) == {"new", "training"}
    assert any("undid the climb to the exact gradient" in note for note in notes)
    assert result.summary["order"]["now"] == FIRST
    assert result.summary["order"]["rounds_exact"] == ledger[1]["round"] - ledger[0]["round"]
    assert ledger[1]["saved_rounds"] == -2
    # The way back is complete: the state is the one that the climb left, to the last bit.
    there = fedmeta.run(digits(tmp_path / "there", *AUTO, *wrong, "server.rounds=2"))
    assert all(torch.equal(value, there.meta_state[name]) for name, value in result.meta_state.items())


@pytest.mark.slow
def test_a_climb_by_stalling_starts_from_the_best_state(tmp_path: Path) -> None:
    keys = ("server.optimizer=sgd", "server.lr=30", "evaluation.every=0", "evaluation.local_baseline=none")
    auto = (*keys, "learner.order=auto", "server.climb_patience=1", "evaluation.validate_every=1")
    long = fedmeta.run(digits(tmp_path, *auto, "server.rounds=6"))
    climb = next(each for each in long.summary["ledger"] if each["what"] == "climb")
    last, best = climb["round"], int(re.findall(r"no better than after round (\d+)", climb["why"])[0])
    assert best < last
    ended = fedmeta.run(digits(tmp_path / "ended", *auto, f"server.rounds={last}"))
    there = fedmeta.run(digits(tmp_path / "there", *keys, "learner.order=first", f"server.rounds={best}"))
    assert all(torch.equal(value, there.meta_state[name]) for name, value in ended.meta_state.items())


@pytest.mark.slow
def test_auto_on_the_right_gradient_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = (*AUTO, "server.climb_below=0.9999", "server.descend_above=0.99999", "runtime.checkpoint_every=1")
    unbroken = fedmeta.run(digits(tmp_path / "unbroken", *settings))
    assert unbroken.summary["ledger"][0]["what"] == "climb"
    assert unbroken.summary["order"]["probes"] == 4

    def stop(progress: Progress) -> None:
        if progress.round_number == 3 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(digits(tmp_path / "stopped", *settings), report=stop)
    resumed = fedmeta.run(digits(tmp_path / "stopped", *settings), resume="auto")
    assert all(torch.equal(value, resumed.meta_state[name]) for name, value in unbroken.meta_state.items())
    first = [{key: value for key, value in each.items() if key != "saved_s"} for each in unbroken.summary["ledger"]]
    second = [{key: value for key, value in each.items() if key != "saved_s"} for each in resumed.summary["ledger"]]
    assert first == second


@pytest.mark.slow
def test_first_order_by_its_key_is_fomaml(tmp_path: Path) -> None:
    short = ("server.rounds=2", "evaluation.every=0", "evaluation.local_baseline=none")
    keyed = fedmeta.run(digits(tmp_path / "keyed", *short, "learner.order=first"))
    named = fedmeta.run(digits(tmp_path / "named", *short, "learner.name=fomaml"))
    assert all(torch.equal(value, named.meta_state[name]) for name, value in keyed.meta_state.items())
    with pytest.raises(FedmetaError, match=r"order = .first.: learner.name = .reptile. has no first-order"):
        fedmeta.run(digits(tmp_path, *short, "learner.order=first", "learner.name=reptile"))
    private = ("privacy.clip_norm=1.0", "privacy.noise_multiplier=1.0")
    with pytest.raises(FedmetaError, match="a probe would release a second sum"):
        fedmeta.run(digits(tmp_path, *short, "learner.order=auto", *private))


@pytest.mark.slow
def test_a_run_is_in_first_order_until_a_round_and_then_exact(tmp_path: Path) -> None:
    states = {}
    for name, settings in {
        "first": ["learner.order=first", "server.rounds=2"],
        "until the second": ["learner.first_order_rounds=2", "server.rounds=2"],
        "until the first": ["learner.first_order_rounds=1", "server.rounds=2"],
        "exact": ["server.rounds=2"],
    }.items():
        states[name] = fedmeta.run(digits(tmp_path / name, "learner.name=maml", *settings)).meta_state
    keys = list(states["first"])
    assert all(torch.equal(states["first"][key], states["until the second"][key]) for key in keys)
    for other in ("first", "exact"):
        assert not all(torch.equal(states["until the first"][key], states[other][key]) for key in keys)
    with pytest.raises(FedmetaError, match=r'first_order_rounds = 3: needs order = "exact"'):
        digits(tmp_path, "learner.order=first", "learner.first_order_rounds=3")
    with pytest.raises(FedmetaError, match=r"first_order_rounds = 3: .*has no first-order approximation"):
        fedmeta.run(digits(tmp_path / "none", "learner.name=fedavg", "learner.first_order_rounds=3"))
