"""What one site can move: little where it is only unusual, nothing where it is not finite, and no choice for all."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from clients.app import app
from fedmeta import checkpoint
from fedmeta.build import learner_of
from fedmeta.data.sums import FeatureSums, median_sums, standardisation
from fedmeta.errors import FedmetaError
from fedmeta.messages import EngineReply, TrainReply
from fedmeta.progress import Progress, ignore_progress
from server import training_loop
from server.adaptation_schedule import middle_mean, tune_adaptation
from server.engine_choice import choose_engine
from server.influence import FIRST, bound, norm_of, outlying
from server.membership import Membership
from server.optimizer import ServerOptimizer
from server.round_log import UNDONE
from server.site_statistics import ask_standardisation
from server.strategy import MetaGradientStrategy
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, Fault, SeveralNodes

NAMES = ("abbey", "hope", "mercy", "zion")
LIAR, LIAR_NODE = "mercy", NODE_IDS[2]


def federation(folder: Path, *overrides: str, names: tuple[str, ...] = NAMES) -> SeveralNodes:
    experiment = hospitals(folder, "runtime.engine=vmap", "runtime.memory=0.25", *overrides)
    return SeveralNodes(app, experiment, node_configs=[hospital(folder, name, 16) for name in names])


def in_rounds(*numbers: int, change: Callable[[Message], None]) -> Fault:
    """Returns a fault that changes a node's train replies of some rounds."""

    def fault(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and int(message.metadata.group_id) in numbers:
            change(reply)
        return reply

    return fault


def times(factor: float) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        arrays = {k: v.double() * factor for k, v in reply.content["gradient"].to_torch_state_dict().items()}
        reply.content["gradient"] = ArrayRecord.from_torch_state_dict(arrays)

    return change


def reply(gradient: list[float], weight: float = 1.0) -> TrainReply:
    return TrainReply({"theta": torch.tensor(gradient)}, weight, ("a",), np.zeros(1), np.ones(1, dtype=bool))


# The bound


def test_a_reply_is_shortened_to_the_multiple_of_the_median_and_others_stay() -> None:
    usual = [reply([3.0, 4.0]) for _ in range(FIRST)]
    found = bound([*usual, reply([3e3, 4e3])], (), 30.0)
    assert found.excess == {FIRST: pytest.approx(1000 / 30)}
    assert all(mine is own for mine, own in zip(found.replies, usual, strict=False))
    assert norm_of(found.replies[-1]) == pytest.approx(30 * 5)
    assert found.norms == (*[5.0] * FIRST, pytest.approx(150.0))
    assert norm_of(reply([30.0, 40.0], weight=10.0)) == 5.0


def test_there_is_no_bound_before_the_tenth_reply_nor_where_it_is_switched_off() -> None:
    few = [reply([1.0])] * (FIRST - 2) + [reply([1e9])]
    assert bound(few, (), 30.0).excess == {}
    assert bound(few, (1.0,), 30.0).excess == {FIRST - 2: pytest.approx(1e9 / 30)}
    assert bound(few, (1.0,) * 20, 0.0) == bound(few, (), 0.0)
    # Zeros are no measure of what is usual.
    assert bound([reply([0.0])] * 20 + [reply([1.0])], (), 30.0).excess == {}


def test_statistics_that_cannot_be_shortened_are_left_out() -> None:
    found = bound([reply([1.0])] * FIRST + [reply([1e9])], (), 900.0, shorten=False)
    assert len(found.replies) == FIRST
    assert found.norms == (1.0,) * FIRST


def test_what_is_far_larger_than_usual_is_distinguished_from_what_is_undefined() -> None:
    assert outlying(np.array([0.5, np.nan, 0.1, 2000.0, -0.2]), 1e3).tolist() == [False, False, False, True, False]
    assert not outlying(np.array([1.0, 1e9]), 1e3).any()


# A run


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e3, 1e30])
def test_one_long_reply_neither_stalls_the_run_nor_makes_it_infinite(tmp_path: Path, factor: float) -> None:
    settings = ("server.rounds=12", "runtime.checkpoint_every=1", "server.lr=0.1")
    for name in ("honest", "lied"):
        (tmp_path / name).mkdir()
    grid = federation(tmp_path / "honest", *settings)
    honest = training_loop.run(grid, grid.experiment, ignore_progress)
    grid = federation(tmp_path / "lied", *settings)
    grid.faults[LIAR_NODE] = in_rounds(6, change=times(factor))
    notes: list[Progress] = []
    lied = training_loop.run(grid, grid.experiment, notes.append)
    shown = [note.note for note in notes if note.note]
    assert len(shown) == 1
    assert shown[0].startswith("round 6: mercy: its reply was ")
    assert shown[0].endswith("; the checkpoint from before is kept as before-round-000006.safetensors")
    assert checkpoint.read(lied.folder / "before-round-000006.safetensors").round_number == 5
    entries = json.loads((lied.folder / "failures.json").read_text())
    assert [(entry["round"], entry["what"], entry["site"]) for entry in entries] == [(6, "shortened", LIAR)]
    assert all(bool(value.isfinite().all()) for value in lied.meta_state.values())
    saved, _ = checkpoint.newest(lied.folder)
    assert all(bool(value.isfinite().all()) for value in saved.optimizer.values())
    assert len(saved.norms) == 48
    # Adam continues: its memory holds at most what one reply of 30 times the usual length leaves there.
    squares = [float(value.max()) for name, value in saved.optimizer.items() if name.endswith("exp_avg_sq")]
    memory = checkpoint.newest(honest.folder)[0].optimizer
    usual = [float(value.max()) for name, value in memory.items() if name.endswith("exp_avg_sq")]
    assert max(squares) < 1e3 * max(usual)


@pytest.mark.slow
def test_norms_outlive_a_stop(tmp_path: Path) -> None:
    grid = federation(tmp_path, "server.rounds=6", "runtime.checkpoint_every=1")
    grid.faults[LIAR_NODE] = in_rounds(5, change=times(1e6))

    def stop(progress: Progress) -> None:
        if progress.round_number == 4 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training_loop.run(grid, grid.experiment, stop)
    (folder,) = (tmp_path / "runs").iterdir()
    outcome = training_loop.run(grid, grid.experiment, ignore_progress, folder)
    entries = json.loads((outcome.folder / "failures.json").read_text())
    assert [(entry["round"], entry["what"]) for entry in entries] == [(5, "shortened")]


def test_a_step_that_is_not_finite_is_undone_and_the_run_continues(tmp_path: Path) -> None:
    grid = federation(tmp_path, "server.rounds=4", "runtime.checkpoint_every=1")
    grid.faults[LIAR_NODE] = in_rounds(2, change=times(1e30))
    notes: list[Progress] = []
    states: dict[int, checkpoint.Checkpoint] = {}

    def report(progress: Progress) -> None:
        notes.append(progress)
        for path in (tmp_path / "runs").glob("*/round-*.safetensors"):
            states[int(path.stem[-6:])] = checkpoint.read(path)

    training_loop.run(grid, grid.experiment, report)
    shown = [note.note for note in notes if note.note]
    assert f"round 2 skipped: abbey (and 3 more): {UNDONE}" in shown
    for name, value in states[1].meta_state.items():
        assert torch.equal(value, states[2].meta_state[name])
    for name, value in states[1].optimizer.items():
        assert torch.equal(value, states[2].optimizer[name])
    assert states[2].norms == states[1].norms
    assert not torch.equal(states[3].meta_state["theta.1.weight"], states[1].meta_state["theta.1.weight"])


def test_min_sites_is_not_met_by_replies_that_count_for_nothing(tmp_path: Path) -> None:
    grid = federation(tmp_path, "server.min_sites=4", "server.rounds=1")

    def nothing(reply: Message) -> None:
        times(1e3)(reply)
        reply.content["cohort"]["finite"] = [0]
        reply.content["cohort"]["weight"] = 0.0

    grid.faults[LIAR_NODE] = in_rounds(1, change=nothing)
    notes: list[Progress] = []
    with pytest.raises(FedmetaError, match="none of 1 rounds had a usable reply"):
        training_loop.run(grid, grid.experiment, notes.append)
    assert "round 1 skipped: mercy: its meta-gradient was not finite" in [note.note for note in notes]


# Weights


@pytest.mark.slow
def test_a_cap_bounds_what_claimed_rows_weigh(tmp_path: Path) -> None:
    def steps(cap: float, rows: int) -> torch.Tensor:
        folder = tmp_path / f"{cap}-{rows}"
        folder.mkdir()
        settings = ('server.weighting="examples"', f"server.max_weight={cap}", "server.optimizer=sgd", "server.lr=1.0")
        grid = federation(folder, *settings, "server.rounds=1", "evaluation.every=0")

        def claim(message: Message, reply: Message) -> Message:
            kind = message.metadata.message_type
            if kind == "query.sites":
                reply.content["sizes"]["train_rows"] = [rows]
                reply.content["sizes"]["weights"] = [float(rows)]
            if kind == "train":
                reply.content["cohort"]["weight"] = min(float(rows), cap or math.inf)
            return reply

        grid.faults[LIAR_NODE] = claim
        return training_loop.run(grid, grid.experiment, ignore_progress).meta_state["theta.1.weight"]

    honest, capped, free = steps(8.0, 8), steps(8.0, 10**6), steps(0.0, 10**6)
    assert torch.equal(honest, capped)
    assert not torch.allclose(honest, free)


# What sites choose for all


def engine_of(grid: SeveralNodes, answers: dict[int, tuple[str, int] | None]) -> tuple[str, int]:
    def answer(choice: tuple[str, int] | None) -> Fault:
        def fault(message: Message, reply: Message) -> Message | None:
            if message.metadata.message_type != "query.engine":
                return reply
            if choice is None:
                return None
            reply.content = EngineReply(*choice, {}).pack()
            return reply

        return fault

    grid.faults = {node: answer(choice) for node, choice in answers.items()}
    experiment = grid.experiment.with_overrides(["runtime.engine=auto", "runtime.memory=0.0"])
    federation = Membership(grid, experiment).federation
    learner = learner_of(experiment, federation.shape, federation.classes)
    optimizer = ServerOptimizer(experiment.server, "gradient", learner.init(0))
    constants, _ = ask_standardisation(grid, federation, experiment)
    strategy = MetaGradientStrategy(experiment, federation, optimizer, constants, "a-run", learner=learner)
    choose_engine(strategy, grid)
    return strategy.engine, strategy.budget


def test_one_node_of_three_chooses_neither_engine_nor_budget_for_all(tmp_path: Path) -> None:
    grid = federation(tmp_path, names=NAMES[:3])
    one, two, three = NODE_IDS[:3]
    honest = ("vmap", 1 << 26)
    assert engine_of(grid, {one: honest, two: ("vmap", 1 << 27), three: ("vmap", 1 << 36)}) == ("vmap", 1 << 27)
    assert engine_of(grid, {one: honest, two: honest, three: ("loop", 1 << 36)}) == honest
    assert engine_of(grid, {one: ("loop", 1 << 36), two: honest, three: None}) == ("auto", 0)
    assert engine_of(grid, {one: honest, two: honest, three: None}) == honest
    assert engine_of(grid, {one: honest, two: honest, three: ("vmap", 1 << 62)}) == honest
    assert engine_of(grid, {one: None, two: None, three: ("loop", 1 << 36)}) == ("auto", 0)


def test_one_false_site_does_not_choose_how_far_all_adapt() -> None:
    honest = [abs(step * rate - 4.0) for rate in (0.25, 0.5, 1.0, 2.0, 4.0) for step in range(9)]
    curves = dict(zip((0.25, 0.5, 1.0, 2.0, 4.0), np.array(honest).reshape(5, 9), strict=True))

    def losses_at(rate: float, steps: int, lie: float = 0.0) -> Any:
        false = np.full(steps + 1, lie) if lie else curves[rate]
        false = false.copy()
        if lie and rate == 4.0:
            false[8] = -lie
        return np.stack([curves[rate], curves[rate] + 0.1, false, curves[rate] + 0.2, curves[rate]])

    wanted = tune_adaptation(losses_at, 4)
    assert wanted is not None
    for lie in (1e3, 1e30, math.inf):
        found = tune_adaptation(lambda rate, steps, lie=lie: losses_at(rate, steps, lie), 4)
        assert found is not None
        assert found[:2] == wanted[:2]


def test_a_middle_mean_leaves_out_a_fifth_at_either_end() -> None:
    assert middle_mean(np.array([[1.0], [math.inf]])).tolist() == [math.inf]
    assert middle_mean(np.array([[1.0], [3.0], [1e30]])).tolist() == [3.0]
    assert middle_mean(np.arange(10.0)[:, None]).tolist() == [4.5]
    # More than a fifth diverge: the rate is too large.
    assert middle_mean(np.array([[1.0]] * 7 + [[math.inf]] * 3)).tolist() == [math.inf]


# Standardisation


def test_robust_statistics_are_near_the_usual_ones_and_false_sites_do_not_move_them() -> None:
    random = np.random.default_rng(0)
    rows = [random.normal(center, 2.0, size=(40, 3)) for center in random.normal(5, 1, 15)]
    own = [(np.full(3, 40.0), site.sum(0), (site**2).sum(0)) for site in rows]
    lies = [(np.full(3, 40.0), np.full(3, 40.0 * 1e6), np.full(3, 40.0 * 1e13))] * 4
    plain = standardisation(FeatureSums(*(np.sum(part, axis=0) for part in zip(*own, strict=True))))
    for sums in (own, own + lies):
        found = standardisation(median_sums(FeatureSums(*(np.stack(part) for part in zip(*sums, strict=True)))))
        np.testing.assert_allclose(found.mean, plain.mean, atol=1.0)
        np.testing.assert_allclose(found.scale, plain.scale, rtol=0.4)


def test_robust_statistics_of_what_is_constant_or_was_never_seen() -> None:
    count, total, square = np.array([[4.0, 4, 0]] * 5), np.array([[8.0, 0, 0]] * 5), np.array([[16.0, 0, 0]] * 5)
    found = standardisation(median_sums(FeatureSums(count, total, square)))
    assert found.mean.tolist() == [2.0, 0.0, 0.0]
    assert found.scale.tolist() == [1.0, 1.0, 1.0]
    # Constant within sites and different between them: the distance between sites is the spread.
    total, square = np.arange(5.0)[:, None] * 4e3, (np.arange(5.0)[:, None] * 1e3) ** 2 * 4
    found = standardisation(median_sums(FeatureSums(np.full((5, 1), 4.0), total, square)))
    assert found.mean.tolist() == [2000.0]
    assert found.scale.tolist() == [pytest.approx(1482.6)]


@pytest.mark.parametrize("aggregator", ["mean", "median"])
def test_false_sums_that_are_possible_are_bounded(tmp_path: Path, aggregator: str) -> None:
    grid = federation(tmp_path, f"server.aggregator={aggregator}", "server.byzantine=1")
    members = Membership(grid, grid.experiment).federation
    honest, _ = ask_standardisation(grid, members, grid.experiment)

    def lie(message: Message, reply: Message) -> Message:
        sums = reply.content["sums"]
        count = sums["count"].numpy()
        sums["total"], sums["square"] = Array(count * 1e6), Array(count * 1e13)
        return reply

    grid.faults[LIAR_NODE] = lie
    found, refused = ask_standardisation(grid, members, grid.experiment)
    assert set(refused) == ({LIAR} if aggregator == "mean" else set())
    for name, value in found.items():
        torch.testing.assert_close(value, honest[name], rtol=1.0, atol=1.0)


def test_a_round_that_was_undone_leaves_a_strategy_as_it_was(tmp_path: Path) -> None:
    grid = federation(tmp_path)
    members = Membership(grid, grid.experiment).federation
    learner = learner_of(grid.experiment, members.shape, members.classes)
    constants, _ = ask_standardisation(grid, members, grid.experiment)
    optimizer = ServerOptimizer(grid.experiment.server, "gradient", learner.init(0))
    strategy = MetaGradientStrategy(grid.experiment, members, optimizer, constants, "a-run", learner=learner)
    messages = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    before = strategy.meta_state
    times(1e30)(replies[0])
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert strategy.log.undone
    assert strategy.optimizer.state() == {}
    assert all(torch.equal(value, before[name]) for name, value in strategy.meta_state.items())
    assert strategy.norms == ()
