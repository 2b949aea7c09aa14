from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clients.app import app
from fedmeta.build import learner_of
from fedmeta.messages import (
    EVALUATE,
    FAILURES,
    TRAIN,
    EvaluateReply,
    RoundRequest,
    TrainReply,
    pack_failure,
    payload_bytes,
)
from server.federation import Federation
from server.membership import Membership
from server.optimizer import ServerOptimizer
from server.sampling import sample_cohort, sites_to_evaluate
from server.site_statistics import ask_standardisation
from server.strategy import MetaGradientStrategy
from tests.server.digits import digits
from tests.several_nodes import NODE_IDS, Fault, SeveralNodes, breaks, lost, silence

LOST = "Flower error code 5: the node is lost or its app did not start"


def strategy_over(grid: SeveralNodes) -> MetaGradientStrategy:
    """Returns a strategy that takes plain steps of length 1, so that a step shows the aggregate."""
    federation = Membership(grid, grid.experiment).federation
    learner = learner_of(grid.experiment, federation.shape, federation.classes)
    settings = grid.experiment.server.model_copy(update={"optimizer": "sgd", "lr": 1.0})
    optimizer = ServerOptimizer(settings, learner.update, learner.init(0))
    constants, _ = ask_standardisation(grid, federation, grid.experiment)
    return MetaGradientStrategy(grid.experiment, federation, optimizer, constants, "a-run", learner=learner)


def train(grid: SeveralNodes, strategy: MetaGradientStrategy, number: int = 1) -> tuple[dict[str, Tensor], object]:
    """Runs one round; returns the aggregate gradient and the metrics."""
    before = strategy.optimizer.meta_state
    messages = strategy.configure_train(number, strategy.arrays(), ConfigRecord(), grid)
    _, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages, timeout=1.0))
    after = strategy.optimizer.meta_state
    return {key: value - after[key] for key, value in before.items()}, metrics


def replies_of(grid: SeveralNodes, strategy: MetaGradientStrategy) -> dict[int, TrainReply]:
    messages = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    like = strategy.optimizer.meta_state
    return {
        reply.metadata.src_node_id: TrainReply.unpack(reply.content, like)
        for reply in grid.send_and_receive(messages, timeout=1.0)
    }


def sites_of(grid: SeveralNodes, strategy: MetaGradientStrategy, node: int) -> set[str]:
    """Returns the sites of a node that the first round's cohort has."""
    messages = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    return {
        name
        for message in messages
        if message.metadata.dst_node_id == node
        for name in RoundRequest.unpack(message.content).names
    }


def spoil(change: Callable[[RecordDict], None]) -> Fault:
    """Returns a fault that changes what a reply holds."""

    def fault(message: Message, reply: Message) -> Message:
        change(reply.content)
        return reply

    return fault


def with_nan(content: RecordDict) -> None:
    arrays = content["gradient"].to_torch_state_dict()
    next(iter(arrays.values())).view(-1)[0] = torch.nan
    content["gradient"] = ArrayRecord.from_torch_state_dict(arrays)


def with_a_number_too_large(content: RecordDict) -> None:
    arrays = {key: value.double() for key, value in content["gradient"].to_torch_state_dict().items()}
    next(iter(arrays.values())).view(-1)[0] = 1e39
    content["gradient"] = ArrayRecord.from_torch_state_dict(arrays)


def with_next_to_no_weight(content: RecordDict) -> None:
    content["cohort"]["weight"] = 1e-300


def with_the_weight_of_a_crowd(content: RecordDict) -> None:
    content["cohort"]["weight"] = 1e9


def with_another_shape(content: RecordDict) -> None:
    arrays = {key: value[..., :1] for key, value in content["gradient"].to_torch_state_dict().items()}
    content["gradient"] = ArrayRecord.from_torch_state_dict(arrays)


def with_other_names(content: RecordDict) -> None:
    content["sites"]["names"] = [*content["sites"]["names"][1:], "somebody-else"]


def with_a_passenger(content: RecordDict) -> None:
    content["rows"] = ConfigRecord({"first": "63 years, male"})


def as_a_failure(content: RecordDict) -> None:
    content.clear()
    content.update(pack_failure("out-of-memory"))


# ---------------------------------------------------------------- who takes part


@given(st.integers(1, 200), st.integers(0, 40), st.integers(0, 5), st.integers(1, 50))
def test_a_cohort_is_a_draw_without_replacement(sites: int, size: int, seed: int, number: int) -> None:
    training = np.arange(sites) * 3
    cohort = sample_cohort(training, size, seed, number)
    assert len(cohort) == (min(size, sites) or sites)
    assert set(cohort.tolist()) <= set(training.tolist())
    assert (np.diff(cohort) > 0).all()
    assert np.array_equal(cohort, sample_cohort(training, size, seed, number))


def test_all_sites_come_round_equally_often() -> None:
    counts = np.bincount(np.concatenate([sample_cohort(np.arange(40), 10, 0, number) for number in range(1, 401)]))
    # 400 draws of 10 in 40: 100 each, with a standard deviation of about 8.7.
    assert counts.min() > 60
    assert counts.max() < 140


def federation_of(new: list[bool]) -> Federation:
    rows = np.ones(len(new), dtype=np.int64)
    names = tuple(f"site-{number:03d}" for number in range(len(new)))
    node_ids = np.zeros(len(new), dtype=np.uint64)
    return Federation(
        names,
        node_ids,
        rows,
        rows,
        np.array(new),
        np.zeros(len(new), dtype=bool),
        ("a", "b"),
        (),
        (1,),
        regression=False,
        tokens=False,
        weights=rows.astype(float),
    )


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 3))
def test_new_sites_are_evaluated_before_others(new: list[bool], most: int, seed: int) -> None:
    federation = federation_of(new)
    sites = sites_to_evaluate(federation, most, seed)
    wanted = min(most, len(new)) if most else len(new)
    assert len(sites) == len(set(sites.tolist())) == wanted
    assert federation.new[sites].sum() == min(sum(new), wanted)
    assert np.array_equal(sites, sites_to_evaluate(federation, most, seed))


def test_the_cohort_does_not_hang_on_nodes(tmp_path: Path) -> None:
    asked = []
    for nodes in (1, 2, 5):
        grid = SeveralNodes(app, digits(tmp_path), nodes)
        strategy = strategy_over(grid)
        messages = list(strategy.configure_train(3, strategy.arrays(), ConfigRecord(), grid))
        names = [RoundRequest.unpack(message.content).names for message in messages]
        assert all(tuple(sorted(share)) == share for share in names)
        assert {message.metadata.message_type for message in messages} == {TRAIN}
        asked.append(sorted(name for share in names for name in share))
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 8
    assert not set(asked[0]) & set(strategy.federation.new_sites)


def test_every_site_is_evaluated_new_ones_too(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 3)
    strategy = strategy_over(grid)
    messages = list(strategy.configure_evaluate(0, strategy.arrays(), ConfigRecord({"steps": 2}), grid))
    assert {message.metadata.message_type for message in messages} == {EVALUATE}
    strategy.aggregate_evaluate(0, grid.send_and_receive(messages))
    assert strategy.evaluated is not None
    assert strategy.evaluated.names == strategy.federation.names
    assert strategy.evaluated.figures["accuracy"].shape == (40, 3)


def test_scores_of_other_steps_than_the_rest_fail_alone(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 4)
    strategy = strategy_over(grid)

    def one_step_too_few(message: Message, reply: Message) -> Message:
        whole = EvaluateReply.unpack(reply.content)
        figures = {name: values[:, :-1] for name, values in whole.figures.items()}
        content = EvaluateReply(whole.names, figures, whole.chosen - 1).pack()
        return Message(content, reply_to=message)

    grid.faults[NODE_IDS[1]] = one_step_too_few
    messages = list(strategy.configure_evaluate(0, strategy.arrays(), ConfigRecord({"steps": 2}), grid))
    strategy.aggregate_evaluate(0, grid.send_and_receive(messages))
    assert strategy.evaluated is not None
    assert strategy.evaluated.figures["accuracy"].shape == (30, 3)
    assert set(strategy.log.failed.values()) == {"bad reply: it has scores of other steps than asked"}
    assert set(strategy.log.failed) == set(strategy.federation.names) - set(strategy.evaluated.names)
    # Of two nodes, too, the one that answers what it was not asked is left out, also where its sites come first.
    grid = SeveralNodes(app, digits(tmp_path), 2)
    strategy = strategy_over(grid)
    grid.faults[int(strategy.federation.node_ids[0])] = one_step_too_few
    messages = list(strategy.configure_evaluate(0, strategy.arrays(), ConfigRecord({"steps": 2}), grid))
    strategy.aggregate_evaluate(0, grid.send_and_receive(messages))
    assert strategy.evaluated is not None
    assert strategy.evaluated.figures["accuracy"].shape == (20, 3)
    assert strategy.federation.names[0] in strategy.log.failed


# ---------------------------------------------------------------- what the aggregate is


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_aggregate_is_the_weighted_mean_over_sites(tmp_path: Path, weighting: str) -> None:
    whole = SeveralNodes(app, digits(tmp_path, f"server.weighting={weighting}", "model.dtype=float64"), 4)
    strategy = strategy_over(whole)
    weights, total = 0.0, {key: torch.zeros_like(value) for key, value in strategy.optimizer.meta_state.items()}
    for reply in replies_of(whole, strategy).values():
        weights += reply.weight
        for key, value in reply.gradient.items():
            total[key] += value
    sites = strategy.federation.indices(sorted(set().union(*(sites_of(whole, strategy, node) for node in NODE_IDS))))
    rows = strategy.federation.train_rows[sites]
    assert weights == (rows.sum() if weighting == "examples" else 8)
    gradient, _ = train(whole, strategy)
    assert all(torch.allclose(gradient[key], total[key] / weights, rtol=1e-12, atol=1e-15) for key in total)


def test_examples_and_uniform_weigh_differently(tmp_path: Path) -> None:
    gradients = []
    for weighting in ("uniform", "examples"):
        grid = SeveralNodes(app, digits(tmp_path, f"server.weighting={weighting}"), 2)
        gradients.append(train(grid, strategy_over(grid))[0])
    assert not torch.allclose(gradients[0]["theta.1.weight"], gradients[1]["theta.1.weight"], rtol=1e-3)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_the_aggregate_is_the_same_however_sites_are_dealt_to_nodes(tmp_path: Path, engine: str) -> None:
    gradients = []
    for nodes in (1, 3, 5):
        grid = SeveralNodes(app, digits(tmp_path, f"runtime.engine={engine}"), nodes)
        gradients.append(train(grid, strategy_over(grid))[0])
    for other in gradients[1:]:
        assert all(torch.allclose(value, other[key], rtol=0, atol=1e-7) for key, value in gradients[0].items())


# ---------------------------------------------------------------- what goes wrong


FAULTS: list[tuple[Fault, str]] = [
    (breaks, LOST),
    (silence, "no reply in time"),
    (spoil(as_a_failure), f"out-of-memory: {FAILURES['out-of-memory']}"),
    (spoil(with_nan), "bad reply: the gradient of theta.1.weight is not finite"),
    (spoil(with_a_number_too_large), "bad reply: the gradient of theta.1.weight is not finite"),
    (spoil(with_next_to_no_weight), "bad reply: its weight is not that of its sites"),
    (spoil(with_the_weight_of_a_crowd), "bad reply: its weight is not that of its sites"),
    (spoil(with_another_shape), "bad reply: the gradient of"),
    (spoil(with_other_names), "bad reply: it speaks of other sites than it was asked for"),
    (spoil(with_a_passenger), "bad reply: it holds ['cohort', 'gradient', 'rows', 'sites']"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_faulty_node_is_counted_named_and_survived(tmp_path: Path, fault: Fault, reason: str) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 3)
    strategy = strategy_over(grid)
    good = {node: reply for node, reply in replies_of(grid, strategy).items() if node != NODE_IDS[1]}
    expected = {
        key: sum(reply.gradient[key].double() for reply in good.values()) / sum(reply.weight for reply in good.values())
        for key in strategy.optimizer.meta_state
    }
    grid.faults[NODE_IDS[1]] = fault
    gradient, metrics = train(grid, strategy)
    assert metrics is not None
    failed = strategy.log.failed
    assert set(failed) == sites_of(grid, strategy, NODE_IDS[1])
    assert all(shown.startswith(reason) for shown in failed.values())
    assert all(torch.allclose(gradient[key].double(), expected[key], rtol=0, atol=1e-7) for key in expected)


def test_no_text_of_an_error_is_passed_on(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 2)
    strategy = strategy_over(grid)
    grid.faults[NODE_IDS[1]] = breaks
    train(grid, strategy)
    assert strategy.log.failed
    assert not any("text" in reason for reason in strategy.log.failed.values())


def test_sites_whose_gradient_is_not_finite_are_named_and_left_out(tmp_path: Path) -> None:
    # Absurdly long inner steps overflow at some sites, and real gradients with them.
    grid = SeveralNodes(app, digits(tmp_path, "learner.inner_lr=1e30", "model.activation=gelu"), 2)
    strategy = strategy_over(grid)
    gradient, metrics = train(grid, strategy)
    assert strategy.log.failed
    assert set(strategy.log.failed.values()) == {"its meta-gradient was not finite"}
    assert metrics is None or all(value.isfinite().all() for value in gradient.values())


def test_a_round_without_enough_sites_changes_nothing(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path, "server.min_sites=8"), 3)
    strategy = strategy_over(grid)
    assert train(grid, strategy)[1] is not None
    grid.faults[NODE_IDS[0]] = silence
    gradient, metrics = train(grid, strategy)
    assert metrics is None
    assert all(not value.any() for value in gradient.values())


def test_nobody_answers(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 2)
    strategy = strategy_over(grid)
    grid.faults = dict.fromkeys(NODE_IDS, silence)
    assert train(grid, strategy)[1] is None
    assert len(strategy.log.failed) == 8
    assert strategy.log.bytes_up == 0
    messages = strategy.configure_evaluate(1, strategy.arrays(), ConfigRecord(), grid)
    assert strategy.aggregate_evaluate(1, grid.send_and_receive(messages)) is None
    assert strategy.evaluated is None
    assert len(strategy.log.failed) == 40


def test_uninvited_and_doubled_replies_do_not_count_twice(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 2)
    strategy = strategy_over(grid)
    other = strategy_over(grid)
    expected, _ = train(grid, other)
    before = strategy.optimizer.meta_state
    messages = list(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    outsider = lost(grid.create_message(RecordDict(), TRAIN, 4711, "1"))
    strategy.aggregate_train(1, [*replies, *replies, outsider])
    assert strategy.log.failed == {}
    after = strategy.optimizer.meta_state
    assert all(torch.equal(before[key] - after[key], expected[key]) for key in expected)
    assert strategy.log.bytes_up == sum(payload_bytes(reply.content) for reply in replies)


def test_evaluations_survive_a_faulty_node(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 4)
    strategy = strategy_over(grid)
    grid.faults[NODE_IDS[2]] = breaks
    messages = strategy.configure_evaluate(1, strategy.arrays(), ConfigRecord(), grid)
    strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    assert strategy.evaluated is not None
    assert len(strategy.evaluated.names) == 30
    assert set(strategy.evaluated.names) | set(strategy.log.failed) == set(strategy.federation.names)
    assert set(strategy.log.failed.values()) == {LOST}
    assert list(strategy.evaluated.names) == sorted(strategy.evaluated.names)


def test_bytes_are_those_of_the_records(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 3)
    strategy = strategy_over(grid)
    messages = list(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid))
    sent = sum(payload_bytes(message.content) for message in messages)
    state = strategy.arrays().count_bytes()
    assert strategy.log.bytes_down == sent
    assert sent > 3 * state
