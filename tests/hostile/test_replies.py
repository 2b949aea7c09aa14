"""Every field of every reply, changed in every way that is not possible: refused, named, and without any effect.

A reply with one field changed must leave the run exactly as the same node's silence does: the meta-state, the
optimizer's memory, the statistics, the figures. What is possible and only unusual is bounded, which has tests below.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from clients.app import app
from fedmeta.build import learner_of
from fedmeta.messages import EVALUATE, QUERY_ENGINE, QUERY_SITES, QUERY_SUMS, TRAIN
from server.engine_choice import choose_engine
from server.membership import Membership
from server.optimizer import ServerOptimizer
from server.site_statistics import ask_standardisation
from server.strategy import MetaGradientStrategy
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes, silence

NAMES = ("abbey", "hope", "mercy", "zion")
LIAR, LIAR_NODE = "mercy", NODE_IDS[2]
Change = Callable[[Any], Any]


def each(value: Any, change: Change) -> Any:
    """Returns a value, or a list's first entry, changed; an array changed at the first place that is not 0."""
    if isinstance(value, list):
        return [change(value[0]), *value[1:]]
    if isinstance(value, Array):
        numbers = value.numpy().copy()
        place = np.unravel_index(int((numbers != 0).argmax()), numbers.shape)
        numbers[place] = change(numbers[place])
        return Array(numbers)
    return change(value)


OTHERS: dict[type, Any] = {int: "3", float: "0.5", str: 5, bool: "yes"}


def of_other_type(value: Any) -> Any:
    if isinstance(value, Array):
        return Array(np.zeros(value.shape, dtype=np.int64))
    if isinstance(value, list):
        return [OTHERS[type(value[0])]] * len(value) if value else [b"x"]
    return OTHERS[type(value)]


def emptied(value: Any) -> Any:
    if isinstance(value, Array):
        return Array(np.zeros(0))
    return [] if isinstance(value, list) else "" if isinstance(value, str) else None


NOT_A_NUMBER: dict[str, Change] = {
    "NaN": lambda value: each(value, lambda one: math.nan),
    "infinite": lambda value: each(value, lambda one: math.inf),
    "empty": emptied,
    "another type": of_other_type,
}
TIMES: dict[str, Change] = {
    f"times {factor:g}": lambda value, factor=factor: each(
        value, lambda one: int(one * factor) if isinstance(one, int) else one * factor
    )
    for factor in (1e3, 1e30)
}
TEXT: dict[str, Change] = {
    "empty": emptied,
    "an empty text": lambda value: each(value, lambda one: ""),
    "another type": of_other_type,
    "a line break": lambda value: each(value, lambda one: f"{one}\nfedmeta: done"),
    "a terminal's code": lambda value: each(value, lambda one: f"\x1b[2J{one}"),
    "another direction": lambda value: each(value, lambda one: f"{one}\u202e"),
    "too long": lambda value: each(value, lambda one: "x" * 65),
}


def becomes(*values: Any) -> dict[str, Change]:
    """Returns changes that put a value in the place of the field, or of its first entry."""
    return {f"becomes {value}": lambda old, value=value: each(old, lambda one: value) for value in values}


COUNT = {"another type": of_other_type, "empty": emptied, **becomes(-1, 2**63), "times 1e30": TIMES["times 1e+30"]}
OF_NO_TARGET = {"another type": of_other_type, "of a target": lambda _: Array(np.ones(1))}
POOLED = NOT_A_NUMBER | TIMES | becomes(-1.0)

TABLE: dict[str, dict[tuple[str, str], dict[str, Change]]] = {
    QUERY_SITES: {
        ("sites", "names"): TEXT,
        ("sizes", "train_rows"): COUNT,
        ("sizes", "test_rows"): COUNT,
        ("sizes", "weights"): NOT_A_NUMBER | becomes(-1.0, -1e-9),
        ("schema", "classes"): TEXT | {"20 000 of them": lambda value: [f"class {k}" for k in range(20_000)]},
        ("schema", "features"): TEXT,
        ("schema", "shape"): COUNT | becomes(0, 3, 2000),
        ("schema", "regression"): {"another type": of_other_type, "the other one": lambda value: not value},
        ("schema", "tokens"): {"another type": of_other_type, "the other one": lambda value: not value},
        ("schema", "form"): {"another type": of_other_type, "made up": lambda _: "ab01", "long": lambda _: "x" * 999},
        ("schema", "targets"): {"another type": of_other_type, "of numbers": lambda _: ["age"]},
        ("schema", "held_out"): {"another type": of_other_type},
    },
    QUERY_SUMS: {
        ("sums", "count"): NOT_A_NUMBER | TIMES | becomes(-1.0, 0.5, 9.0),
        ("sums", "total"): NOT_A_NUMBER | TIMES | {"plus 5e6": lambda value: each(value, lambda one: one + 5e6)},
        ("sums", "square"): NOT_A_NUMBER | becomes(-1.0, 0.0, 1e300, 1.7e308) | {"times 1e30": TIMES["times 1e+30"]},
        ("sums", "target_count"): OF_NO_TARGET,
        ("sums", "target_total"): OF_NO_TARGET,
        ("sums", "target_square"): OF_NO_TARGET,
    },
    QUERY_ENGINE: {
        ("choice", "engine"): {"another type": of_other_type, "empty": emptied, "made up": lambda value: "spam"},
        ("choice", "budget"): {"another type": of_other_type, **becomes(-1, 2**36 + 1, 2**62)},
    },
    TRAIN: {
        ("sites", "names"): TEXT | becomes("abbey"),
        ("cohort", "weight"): NOT_A_NUMBER | TIMES | becomes(-1.0, 0.0, 2.0),
        ("cohort", "query_loss"): NOT_A_NUMBER,
        ("cohort", "finite"): {"another type": of_other_type, "empty": emptied, **becomes(-1, 0, 2)},
        ("gradient", "theta.1.weight"): NOT_A_NUMBER,
    },
    EVALUATE: {
        ("sites", "names"): TEXT | becomes("abbey"),
        ("counts", "columns"): {"another type": of_other_type, **becomes(0, -1, 3, 2**62)},
        ("counts", "chosen"): {"another type": of_other_type, "empty": emptied, **becomes(-1, 2)},
        ("counts", "evaluations"): {
            "another type": of_other_type, "negative": lambda _: [-1], "too many": lambda _: [1, 1],
            "too large": lambda _: [2**41],
        },
        ("counts", "pooled_sites"): {"another type": of_other_type, **becomes(-1, 2)},
        ("figures", "loss"): {key: NOT_A_NUMBER[key] for key in ("infinite", "empty", "another type")} | becomes(-1.0)
        | {"times 1e30": TIMES["times 1e+30"]},
        ("figures", "accuracy"): {key: NOT_A_NUMBER[key] for key in ("infinite", "empty", "another type")}
        | becomes(-1.0, 1.01, 2.0, 1e3),
        ("figures", "ece"): {key: NOT_A_NUMBER[key] for key in ("infinite", "empty", "another type")}
        | becomes(-0.01, 1.01),
        ("pooled", "1/global/rows"): POOLED,
        ("pooled", "1/global/confusion"): POOLED,
        ("pooled", "1/global/losses"): {key: POOLED[key] for key in (*NOT_A_NUMBER, "times 1e+30", "becomes -1.0")},
        ("pooled", "1/personalized/calibration"): NOT_A_NUMBER | becomes(-1.0, 99.0),
    },
}  # fmt: skip
"""By kind of reply, record and field: the changes that make the reply one that cannot be."""

CASES = [
    (kind, record, field, name, change)
    for kind, fields in TABLE.items()
    for (record, field), changes in fields.items()
    for name, change in changes.items()
]


HOW = {"steps": 1, "rate": 1.0, "gate": False, "pool": True}


class Stand:
    """Four hospitals and a server that has asked them for everything once."""

    def __init__(self, folder: Path) -> None:
        settings = ('learner.name="maml"', 'runtime.engine="auto"', "data.min_rows=1")
        self.experiment = hospitals(folder, *settings)
        self.configs = [hospital(folder, name, 16) for name in NAMES]
        self.grid = self.new_grid()
        self.federation = Membership(self.grid, self.experiment).federation
        self.learner = learner_of(self.experiment, self.federation.shape, self.federation.classes)
        self.constants, _ = ask_standardisation(self.grid, self.federation, self.experiment)
        strategy = self.new_strategy()
        messages = list(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), self.grid))
        self.replies = {TRAIN: list(self.grid.send_and_receive(messages))}
        messages = list(strategy.configure_evaluate(1, strategy.arrays(), ConfigRecord(HOW), self.grid))
        self.replies[EVALUATE] = list(self.grid.send_and_receive(messages))

    def new_grid(self) -> SeveralNodes:
        return SeveralNodes(app, self.experiment, node_configs=self.configs)

    def new_strategy(self) -> MetaGradientStrategy:
        optimizer = ServerOptimizer(self.experiment.server, "gradient", self.learner.init(0))
        return MetaGradientStrategy(
            self.experiment, self.federation, optimizer, self.constants, "a-run", learner=self.learner
        )

    def found(self, kind: str, spoil: Callable[[RecordDict], None] | None) -> tuple[Any, dict[str, str]]:
        """Returns all that a reply of this kind can have an effect on, and who was refused why; None = silence."""
        grid = self.new_grid()

        def fault(message: Message, reply: Message) -> Message | None:
            if message.metadata.message_type != kind:
                return reply
            if spoil is None:
                return silence(message, reply)
            spoil(reply.content)
            return reply

        grid.faults[LIAR_NODE] = fault
        if kind == QUERY_SITES:
            membership = Membership(grid, self.experiment)
            same = {key: value for key, value in vars(membership.federation).items() if key != "training"}
            return same, dict(membership.refused) or {f"node {node}": "no answer" for node in membership._paused}
        if kind == QUERY_SUMS:
            return ask_standardisation(grid, self.federation, self.experiment)
        strategy = self.new_strategy()
        if kind == QUERY_ENGINE:
            strategy.federation = self.federation
            found = choose_engine(strategy, grid)
            return (strategy.engine, found is not None), dict(strategy.log.failed)
        replies = [copy.deepcopy(reply) for reply in self.replies[kind]]
        kept = [fault(_asks(kind), reply) if reply.metadata.src_node_id == LIAR_NODE else reply for reply in replies]
        arrived = [reply for reply in kept if reply is not None]
        if kind == TRAIN:
            strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
            _, metrics = strategy.aggregate_train(1, arrived)
            state = strategy.optimizer
            return (state.meta_state, state.state(), dict(metrics or {}), strategy.norms), dict(strategy.log.failed)
        strategy.configure_evaluate(1, strategy.arrays(), ConfigRecord(HOW), grid)
        strategy.aggregate_evaluate(1, arrived)
        assert strategy.evaluated is not None
        return vars(strategy.evaluated), dict(strategy.log.failed)


def _asks(kind: str) -> Any:
    class Metadata:
        message_type = kind

    class Asking:
        metadata = Metadata

    return Asking


def assert_equal(one: Any, other: Any) -> None:
    """Checks two values, of nested dictionaries and tuples too, for the same bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, tuple) and one and not isinstance(one[0], str | int | float):
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    else:
        assert one == other


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.membership.POLL_S", 0.01)
        yield Stand(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture(scope="module")
def silent(stand: Stand) -> dict[str, tuple[Any, dict[str, str]]]:
    """What there is where the liar says nothing, by kind of reply."""
    return {kind: stand.found(kind, None) for kind in TABLE}


def put(content: RecordDict, record: str, field: str, change: Change) -> None:
    """Changes a field; None takes it away. Flower's own records refuse some types: then another record holds it."""
    own: Any = content[record]
    value = change(own[field])
    if value is None:
        del own[field]
        return
    try:
        own[field] = value
    except TypeError:
        entries = {**own, field: value}
        content[record] = ArrayRecord() if isinstance(own, ArrayRecord) else ConfigRecord(entries)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "record", "field", "name", "change"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}" for c in CASES]
)
def test_what_cannot_be_is_refused_named_and_without_effect(
    stand: Stand, silent: dict[str, Any], kind: str, record: str, field: str, name: str, change: Change
) -> None:
    before, _ = silent[kind]
    after, refused = stand.found(kind, lambda content: put(content, record, field, change))
    assert_equal(after, before)
    assert LIAR in refused or f"node {LIAR_NODE}" in refused or (kind == QUERY_SITES and refused)
    assert all(reason.isprintable() for reason in refused.values())


def test_the_table_has_every_field_of_every_reply(stand: Stand) -> None:
    grid = stand.new_grid()
    seen: dict[str, set[tuple[str, str]]] = {kind: set() for kind in TABLE}

    def keep(message: Message, reply: Message) -> Message:
        seen[message.metadata.message_type] |= {(name, key) for name, record in reply.content.items() for key in record}
        return reply

    grid.faults[LIAR_NODE] = keep
    Membership(grid, stand.experiment)
    ask_standardisation(grid, stand.federation, stand.experiment)
    strategy = stand.new_strategy()
    choose_engine(strategy, grid)
    for kind in (TRAIN, EVALUATE):
        for reply in stand.replies[kind]:
            seen[kind] |= {(name, key) for name, record in reply.content.items() for key in record}
    for kind, fields in seen.items():
        missing = {field for field in fields if field not in TABLE[kind]}
        # Of tensors of one kind one stands for all.
        alike = {field for field in missing if field[0] in ("gradient", "pooled", "seconds")}
        assert missing == alike


# What is possible, and only unusual


def scaled(stand: Stand, factor: float) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        arrays = {key: value.double() * factor for key, value in content["gradient"].to_torch_state_dict().items()}
        content["gradient"] = ArrayRecord.from_torch_state_dict(arrays)

    return spoil


@pytest.mark.parametrize("factor", [1e3, 1e30])
def test_a_reply_far_longer_than_usual_is_shortened_and_named(stand: Stand, factor: float) -> None:
    def step(liar: float, norms: tuple[float, ...]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        strategy = stand.new_strategy()
        strategy.norms = norms
        strategy.configure_train(1, strategy.arrays(), ConfigRecord(), stand.new_grid())
        replies = [copy.deepcopy(reply) for reply in stand.replies[TRAIN]]
        for reply in replies:
            if reply.metadata.src_node_id == LIAR_NODE:
                scaled(stand, liar)(reply.content)
        strategy.aggregate_train(1, replies)
        return strategy.optimizer.state(), strategy.log.shortened

    honest, shortened = step(1.0, (1.0,) * 9)
    assert shortened == {}
    memory, shortened = step(factor, (1.0,) * 9)
    assert list(shortened) == [LIAR]
    assert "as long as server.norm_cap = 30 allows, and was shortened" in shortened[LIAR]
    usual = max(float(value.abs().max()) for name, value in honest.items() if name.endswith("exp_avg_sq"))
    squares = [value for name, value in memory.items() if name.endswith("exp_avg_sq")]
    # The median norm of the round is near 1; a quarter of 30 times that, squared, and a thousandth of it.
    assert max(float(value.max()) for value in squares) < 0.001 * (2 * 30 / 4) ** 2 + usual
    # Before the tenth reply there is no bound, but a step that is not finite is undone.
    memory, shortened = step(factor, ())
    assert shortened == {}
    assert all(bool(value.isfinite().all()) for value in memory.values())


def test_a_loss_far_larger_than_usual_is_not_in_the_mean(stand: Stand, silent: dict[str, Any]) -> None:
    (_, _, metrics, _), failed = stand.found(
        TRAIN, lambda content: put(content, "cohort", "query_loss", lambda _: [1e30])
    )
    assert failed == {}
    assert metrics["query_loss"] < 10
    assert metrics["sites"] == 4


def test_what_is_in_a_reply_that_counts_for_nothing_has_no_effect(stand: Stand, silent: dict[str, Any]) -> None:
    def spoil(content: RecordDict) -> None:
        scaled(stand, 1e6)(content)
        content["cohort"] = MetricRecord({**content["cohort"], "finite": [0], "weight": 0.0})

    after, refused = stand.found(TRAIN, spoil)
    assert_equal(after, silent[TRAIN][0])
    assert refused == {LIAR: "its meta-gradient was not finite"}
