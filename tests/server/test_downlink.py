"""Changes of the meta-state in fewer bytes: who gets which, what they add up to, and what a resume makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from clients.app import app
from clients.downlink import KEPT
from fedmeta import run
from fedmeta.checkpoint import newest
from fedmeta.compression import pack
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import build
from fedmeta.messages import TRAIN, MessageError, RoundRequest, payload_bytes
from fedmeta.messages.downlink import BASE, CHANGES, STATE, changed, flat, taken_apart, with_changes, with_whole
from fedmeta.messages.records import read_arrays
from fedmeta.problems import Problem
from fedmeta.progress import Progress, ignore_progress
from fedmeta.randomness import generator
from server import training_loop
from server.compression import check_down
from server.downlink import Downlink
from server.run_checkpoint import DOWNLINK
from tests.server.digits import digits
from tests.several_nodes import NODE_IDS, SeveralNodes

METHODS = ("float16", "bfloat16", "int8", "int4", "top-k")
QUIET = ("evaluation.every=0", "evaluation.local_baseline=none", "server.rounds=4", "server.sites_per_round=0")
DOWN = "server.compression_down=int8"


@pytest.mark.quick("int8")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_small_changes_trains_and_sends_fewer_bytes(tmp_path: Path, method: str) -> None:
    plain = run(digits(tmp_path / "plain", *QUIET))
    small = run(digits(tmp_path / "small", *QUIET, f"server.compression_down={method}"))
    assert small.summary["failures"] == 0
    assert small.summary["bytes_down"] < plain.summary["bytes_down"]
    difference = max(float((plain.meta_state[n] - small.meta_state[n]).abs().max()) for n in plain.meta_state)
    assert 0 < difference < 0.05


def trained_with(grid: SeveralNodes) -> dict[tuple[int, int], RecordDict]:
    """Returns what each node was sent in each round."""
    sent = [message for message in grid.sent if message.metadata.message_type == TRAIN]
    return {(int(each.metadata.group_id), each.metadata.dst_node_id): each.content for each in sent}


def test_a_node_that_was_away_gets_the_whole_state_and_all_adapt_from_the_same(tmp_path: Path) -> None:
    experiment = digits(tmp_path, *QUIET, DOWN)
    grid = SeveralNodes(app, experiment, 3)
    away = NODE_IDS[1]
    seen: dict[int, list[dict[str, torch.Tensor]]] = {}

    def silent(message: Message, reply: Message) -> Message | None:
        return None if message.metadata.message_type == TRAIN and message.metadata.group_id == "2" else reply

    def watch(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == TRAIN:
            kept = grid.contexts[message.metadata.dst_node_id].state
            seen.setdefault(int(message.metadata.group_id), []).append(read_arrays(kept, KEPT))
        return reply

    grid.faults = {node: silent if node == away else watch for node in NODE_IDS[:3]}
    outcome = training_loop.run(grid, experiment, ignore_progress)
    sent = trained_with(grid)
    bases = {key: content[BASE]["round"] for key, content in sent.items()}  # type: ignore[index, call-overload]
    assert {key for key, base in bases.items() if base == 0} == {*((1, node) for node in NODE_IDS[:3]), (3, away)}
    assert all(CHANGES not in content for key, content in sent.items() if not bases[key])
    for states in seen.values():
        assert all(torch.equal(value, other[name]) for other in states for name, value in states[0].items())
    whole, change = payload_bytes(sent[1, away]), payload_bytes(sent[2, away])
    assert change < whole / 3
    counted = newest(outcome.folder)[0].totals["bytes_down"]
    assert counted == sum(payload_bytes(each.content) for each in grid.sent if each.metadata.message_type in (
        TRAIN, "evaluate"
    ))  # fmt: skip


def test_a_node_that_lost_its_memory_is_named_once_and_then_gets_the_whole_state(tmp_path: Path) -> None:
    experiment = digits(tmp_path, *QUIET, DOWN)
    grid = SeveralNodes(app, experiment, 3)

    def forget(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "1":
            grid.contexts[message.metadata.dst_node_id].state = RecordDict()
        return reply

    grid.faults = {NODE_IDS[0]: forget}
    reported: list[Progress] = []
    training_loop.run(grid, experiment, reported.append)
    notes = [progress.note for progress in reported if "no-state" in progress.note]
    assert len(notes) == 1
    assert notes[0].startswith("round 2 without")
    assert trained_with(grid)[3, NODE_IDS[0]][BASE]["round"] == 0  # type: ignore[index, call-overload]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "top-k"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, method: str) -> None:
    own = (*QUIET, f"server.compression_down={method}", "runtime.checkpoint_every=1")
    whole = run(digits(tmp_path / "whole", *own))

    def stop(progress: Any) -> None:
        if progress.round_number == 2 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(digits(tmp_path / "cut", *own), report=stop)
    resumed = run(digits(tmp_path / "cut", *own), resume="auto")
    assert all(torch.equal(value, resumed.meta_state[name]) for name, value in whole.meta_state.items())
    one, other = (newest(result.folder)[0].memory for result in (whole, resumed))
    chain = [name for name in one if name.startswith(DOWNLINK)]
    assert chain
    assert all(torch.equal(one[name], other[name]) for name in chain)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("privacy.secure_aggregation=true",), ("server.aggregator=median",)])
def test_it_goes_with_secure_sums_and_robust_means(tmp_path: Path, more: tuple[str, ...]) -> None:
    plain, small = (run(digits(tmp_path / name, *QUIET, *more, *own)) for name, own in (("a", ()), ("b", (DOWN,))))
    assert small.summary["failures"] == 0
    assert small.summary["bytes_down"] < plain.summary["bytes_down"]
    assert all(torch.allclose(value, small.meta_state[name], atol=0.05) for name, value in plain.meta_state.items())


STATES = {"theta.a": torch.linspace(-1, 1, 300), "theta.b": torch.ones(2, 2), "standardisation.mean": torch.ones(3)}


def request(number: int) -> RoundRequest:
    return RoundRequest({}, number, ("0", "1"), ("a",), "run")


def test_the_chain_follows_the_state_and_old_changes_are_dropped() -> None:
    chain = Downlink(Experiment().with_overrides([DOWN]))
    chain.advance(1, STATES)
    chain.content(request(1), 7)
    chain.answered(7)
    for number in range(2, 9):
        moved = {**STATES, "theta.a": STATES["theta.a"] + number}
        chain.advance(number, moved)
        # What one change leaves out is in the next.
        assert float((chain.state["theta.a"] - moved["theta.a"]).abs().max()) < 0.1
    assert torch.equal(chain.state["standardisation.mean"], STATES["standardisation.mean"])
    whole = sum(4 * value.numel() for value in STATES.values())
    kept = sum(value.nbytes for arrays in chain.changes.values() for value in arrays.values())
    assert 0 < kept < whole
    assert 2 not in chain.changes
    content = chain.content(request(8), 7)  # it has the state of round 1, and that is too long ago
    assert content[BASE]["round"] == 0  # type: ignore[index, call-overload]
    chain.answered(7)
    assert taken_apart(chain.content(request(8), 7))[:2] == (8, {})


def test_several_changes_are_sent_together_and_add_up() -> None:
    chain = Downlink(Experiment().with_overrides([DOWN]))
    chain.advance(1, STATES)
    first = chain.state
    chain.content(request(1), 7)
    chain.answered(7)
    for number in (2, 3):
        chain.advance(number, {**STATES, "theta.b": STATES["theta.b"] * number})
    base, changes, rest = taken_apart(chain.content(request(3), 7))
    assert (base, [*changes]) == (1, [2, 3])
    assert set(rest) == {STATE, "task", "sites"}
    state = first
    for number in (2, 3):
        state = changed(state, changes[number], "int8", 0.1)
    assert all(torch.equal(value, chain.state[name]) for name, value in state.items())


def test_what_is_no_change_is_refused() -> None:
    arrays = pack(flat(STATES)[None], "int8", 0.1, [generator(0, "x", 1)])
    content = with_changes(request(2).pack(), 1, {2: arrays})
    assert taken_apart(content)[0] == 1
    missing = RecordDict({name: record for name, record in content.items() if name != CHANGES})
    with pytest.raises(MessageError, match="it has no changes"):
        taken_apart(missing)
    renamed = with_changes(request(2).pack(), 1, {})
    renamed[CHANGES] = content["sites"]
    with pytest.raises(MessageError):
        taken_apart(renamed)
    assert taken_apart(with_whole(request(2).pack()))[:2] == (0, {})


class Counts(Problem):
    """A problem whose state is a sum of what sites send."""

    def init(self, seed: int) -> dict[str, torch.Tensor]:
        return {"total": torch.zeros(2)}

    def inner(self, parameters: Any, data: Any) -> torch.Tensor:
        return (parameters["total"] ** 2).sum()

    def payload(self, path: Any, task: Any) -> Any:
        return {"total": task.support}

    def payload_shapes(self, state: Any) -> Any:
        return {"total": (2,)}

    def outer_step(self, state: Any, total: Any, weight: float) -> Any:
        return total


def test_a_problem_with_a_step_of_its_own_is_refused() -> None:
    with pytest.raises(FedmetaError, match="a rounded state may be none"):
        check_down(Experiment().with_overrides([DOWN]), build("maml", Counts()))
