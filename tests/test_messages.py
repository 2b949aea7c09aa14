import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.app import app
from fedmeta.build import learner_of
from fedmeta.experiment import Experiment
from fedmeta.messages import (
    EVALUATE,
    FAILURES,
    MASKED_EVALUATE,
    MASKED_SUMS,
    MASKED_TRAIN,
    QUERY_CATEGORIES,
    QUERY_ENGINE,
    QUERY_KEYS,
    QUERY_NORMS,
    QUERY_SHARES,
    QUERY_SITES,
    QUERY_SUMS,
    QUERY_UNMASK,
    TRAIN,
    CategoriesReply,
    CategoriesRequest,
    EngineReply,
    EvaluateReply,
    MessageError,
    NormsReply,
    RoundRequest,
    SitesReply,
    SumsReply,
    SumsRequest,
    TrainReply,
    failure,
    pack_failure,
    records,
)
from fedmeta.messages.secure import (
    TAIL,
    Delivery,
    KeysReply,
    KeysRequest,
    MaskedReply,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
)
from fedmeta.runtime.local import NODE_ID, LocalGrid

GRADIENT = {"theta.weight": torch.tensor([[1.0, -2.0], [0.1, 3.0]]), "alpha": torch.tensor(0.5)}

SITES = SitesReply(
    names=("abbey", "zürich"),
    train_rows=(12, 0),
    test_rows=(3, 1),
    classes=("0", "1"),
    features=("age", "chol"),
    shape=(2,),
    regression=False,
    tokens=False,
    weights=(12.0, 0.5),
    form="ab01",
)
SUMS = SumsReply(np.array([2.0, 3.0]), np.array([1e9, -3.5]), np.array([1e18, 4.5]))
NEGATIVE = "a count or a sum of squares is negative"
TARGETS = SumsReply(*(np.array([each]) for each in (2.0, 3.0, 5.0, 2.0, -7.0, 25.0)))
REQUEST = RoundRequest(
    meta_state={**GRADIENT, "standardisation.mean": torch.zeros(2)},
    round_number=7,
    classes=("0", "1"),
    names=("abbey",),
    run="maml-digits-0",
    saved_rounds=(3, 2),
    steps=5,
    engine="vmap",
    budget=1 << 26,
    order="first",
)
TRAINED = TrainReply(GRADIENT, 2.5, ("abbey", "zion"), np.array([0.25, math.nan]), np.array([True, False]))
EVALUATED = EvaluateReply(
    names=("abbey", "zion"),
    figures={
        "accuracy": np.array([[0.5, 1.0], [math.nan, 0.0]]),
        "loss": np.array([[2.0, 0.1], [9.0, math.inf]]),
        "ece": np.array([[0.2, 0.1], [math.nan, math.nan]]),
    },
    chosen=np.array([1, 0]),
    pooled={"0/global/rows": np.array([4.0, 3.0])},
    pooled_sites=(2,),
)
ENGINE = EngineReply("lowrank", 1 << 28, {"lowrank": 0.01, "loop": 0.5})
NORMS = NormsReply(("abbey", "zion"), np.array([0.25, math.nan]))

KEY, SHARE = bytes(32), bytes(33)
KEYS = KeysReply(("abbey", "zion"), (KEY, KEY), (KEY, bytes([1]) * 32))
SHARES_WANTED = SharesRequest(
    ("abbey",), "run train 1", 3, 2, 2, ("abbey", "elm", "zion"), (0, 2, 1), (KEY,) * 3, (KEY,) * 3
)
SHARES = SharesReply(("abbey",), ("elm", "zion"), (0, 0), (0, 1), (b"one", b"two"))
DELIVERY = Delivery.of("run train 1", {("elm", "abbey"): b"one", ("zion", "abbey"): b"two"})
MASKED = MaskedReply(("abbey", "zion"), np.array([[1, 2**64 - 1], [0, 3]], dtype=np.uint64))
UNMASK = UnmaskRequest(("abbey",), "run train 1", 2, ("abbey", "zion"), ("elm",))
HANDED = UnmaskReply(("abbey",), ("elm", "zion"), (0, 0), (0, 1), (SHARE, SHARE))

PACKED: list[tuple[Any, Callable[[RecordDict], Any]]] = [
    (SITES, SitesReply.unpack),
    (SumsRequest(("abbey", "zion")), SumsRequest.unpack),
    (SUMS, SumsReply.unpack),
    (TARGETS, SumsReply.unpack),
    (REQUEST, RoundRequest.unpack),
    (TRAINED, lambda content: TrainReply.unpack(content, GRADIENT)),
    (EVALUATED, EvaluateReply.unpack),
    (ENGINE, EngineReply.unpack),
    (KeysRequest(("abbey", "zion"), "run train 1"), KeysRequest.unpack),
    (KEYS, KeysReply.unpack),
    (SHARES_WANTED, SharesRequest.unpack),
    (SHARES, SharesReply.unpack),
    (DELIVERY, Delivery.unpack),
    (MASKED, MaskedReply.unpack),
    (UNMASK, UnmaskRequest.unpack),
    (HANDED, UnmaskReply.unpack),
    (NORMS, NormsReply.unpack),
]
KINDS = [type(message).__name__ for message, _ in PACKED]


def same(one: Any, other: Any) -> bool:
    """Returns whether two values of a message are equal, types, shapes and NaN included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return type(one) is type(other) and one == other


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(("message", "unpack"), PACKED, ids=KINDS)
def test_every_message_comes_back_as_it_was(message: Any, unpack: Callable[[RecordDict], Any]) -> None:
    read = unpack(message.pack())
    assert type(read) is type(message)
    assert vars(read).keys() == vars(message).keys()
    for key, value in vars(message).items():
        assert same(value, getattr(read, key)), key


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=8))
def test_numbers_travel_unrounded_whichever_type_they_are_in(values: list[float]) -> None:
    for gradient in (torch.tensor(values), torch.tensor(values, dtype=torch.float64) * (1 + 2.0**-40)):
        reply = TrainReply({"theta": gradient}, 1.0, (), np.array([]), np.array([], dtype=bool))
        read = TrainReply.unpack(reply.pack(), {"theta": torch.zeros(len(values))})
        assert torch.equal(read.gradient["theta"].double(), gradient.double())


def test_a_sum_that_float32_holds_travels_in_half_the_bytes() -> None:
    sizes = {}
    for name, value in (("short", 0.5), ("long", 0.1)):
        gradient = {"theta": torch.full((1000,), value, dtype=torch.float64)}
        sizes[name] = (
            TrainReply(gradient, 1.0, (), np.array([]), np.array([], dtype=bool)).pack()["gradient"].count_bytes()
        )
    assert sizes["long"] - sizes["short"] == 4000


@pytest.mark.parametrize("code", [*FAILURES, "something else"])
def test_a_failure_is_a_code_of_the_list_and_nothing_else(code: str) -> None:
    content = pack_failure(code)
    assert {name: dict(record) for name, record in content.items()} == {
        "failure": {"code": code if code in FAILURES else "internal"}
    }
    assert failure(content) == (code if code in FAILURES else "internal")


def test_a_failure_that_has_details_is_reported_as_an_internal_one() -> None:
    assert failure(SITES.pack()) is None
    assert failure(RecordDict({"failure": ConfigRecord({"code": "patient 63 has no label"})})) == "internal"
    assert failure(RecordDict({"failure": ConfigRecord({})})) == "internal"
    assert failure(RecordDict({"failure": MetricRecord({"code": 3})})) == "internal"


# ---------------------------------------------------------------- what leaves a site

TYPES = {int: "int", float: "float", bool: "bool", str: "str", bytes: "bytes"}
Form = dict[str, dict[str, str]]

CONTRACT: dict[str, Form] = {
    QUERY_SITES: {
        "sites": {"names": "str*40"},
        "schema": {"classes": "str*10", "features": "str*0", "shape": "int*2", "regression": "bool", "tokens": "bool"}
        | {"form": "str", "held_out": "bool", "targets": "str*0"},
        "sizes": {"train_rows": "int*40", "test_rows": "int*40", "weights": "float*40"},
    },
    QUERY_SUMS: {
        "sums": dict.fromkeys(("count", "total", "square"), "float64(1, 1)")
        | {f"target_{name}": "float64(0,)" for name in ("count", "total", "square")}
    },
    QUERY_NORMS: {"sites": {"names": "str*3"}, "cohort": {"norms": "float*3"}},
    QUERY_ENGINE: {"choice": {"engine": "str", "budget": "int"}, "seconds": {}},
    TRAIN: {
        "sites": {"names": "str*3"},
        "cohort": {"weight": "float", "query_loss": "float*3", "finite": "int*3"},
        "gradient": {
            "theta.1.weight": "float64(8, 64)",
            "theta.1.bias": "float64(8,)",
            "theta.3.weight": "float64(10, 8)",
            "theta.3.bias": "float64(10,)",
        },
    },
    EVALUATE: {
        "sites": {"names": "str*3"},
        "counts": {"columns": "int", "chosen": "int*3", "pooled_sites": "str*0", "evaluations": "str*0"},
        "figures": {"loss": "float*9", "accuracy": "float*9", "ece": "float*9"},
        "pooled": {},
    },
}
"""All that a client's replies hold: records, keys, types and lengths."""


def form(content: RecordDict) -> Form:
    """Returns what a message's content holds, in the manner of `CONTRACT`."""

    def one(value: Any) -> str:
        if isinstance(value, Array):
            return f"{value.dtype}{tuple(value.shape)}"
        if isinstance(value, list):
            kinds = {TYPES[type(entry)] for entry in value} or {"str"}
            return f"{'|'.join(sorted(kinds))}*{len(value)}"
        return TYPES[type(value)]

    return {name: {key: one(value) for key, value in record.items()} for name, record in content.items()}


@pytest.fixture(scope="module")
def exchange() -> Callable[[str, RecordDict], RecordDict]:
    """Returns a way to ask the real client, which hosts the digits, a question."""
    toml = '[model]\nhidden = "8"\n[learner]\ninner_steps = 2\n[runtime]\nengine = "vmap"\n[tracking]\nuri = "none"'
    grid = LocalGrid(app, Experiment.from_toml(toml))

    def ask(kind: str, content: RecordDict) -> RecordDict:
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, NODE_ID, "1")])
        assert reply.has_content()
        return reply.content

    ask.experiment = Experiment.from_toml(toml)
    return ask


@pytest.fixture(scope="module")
def work(exchange: Any) -> RoundRequest:
    """A request that the client can answer."""
    classes = SitesReply.unpack(exchange(QUERY_SITES, RecordDict())).classes
    state = learner_of(exchange.experiment, (8, 8), classes).init(0)
    scale = {f"standardisation.{name}": torch.ones(1, 1) for name in ("mean", "scale")}
    return RoundRequest(
        {**state, **scale}, 1, classes, ("site-03", "site-11", "site-30"), "a-run", steps=2, engine="vmap"
    )


@pytest.mark.parametrize("kind", CONTRACT)
def test_a_reply_holds_what_the_contract_lists_and_nothing_else(exchange: Any, work: RoundRequest, kind: str) -> None:
    question = {QUERY_SITES: RecordDict(), QUERY_SUMS: SumsRequest(work.names).pack()}.get(kind, work.pack())
    reply = exchange(kind, question)
    assert failure(reply) is None
    found = form(reply)
    if kind == QUERY_ENGINE:
        assert set(found.pop("seconds").values()) <= {"float"}
        assert found == {"choice": CONTRACT[kind]["choice"]}
    else:
        assert found == CONTRACT[kind]


def test_every_question_that_a_client_answers_is_in_the_contract() -> None:
    answered = {kind.removesuffix(".default") for kind in app._registered_funcs}
    secure = {QUERY_KEYS, QUERY_SHARES, QUERY_UNMASK, MASKED_TRAIN, MASKED_SUMS, MASKED_EVALUATE}
    assert answered == {*CONTRACT, QUERY_CATEGORIES, *secure}


def test_replies_of_a_secure_sum_hold_what_the_contract_lists_and_nothing_else(
    exchange: Any, work: RoundRequest
) -> None:
    name, ring = "a round", range(3)
    keys = exchange(QUERY_KEYS, KeysRequest(work.names, name).pack())
    assert form(keys) == {"sites": {"names": "str*3"}, "keys": {"cipher": "bytes*3", "mask": "bytes*3"}}
    public = KeysReply.unpack(keys)
    wanted = SharesRequest(work.names, name, 3, 2, 2, work.names, tuple(ring), public.cipher, public.mask)
    shares = exchange(QUERY_SHARES, wanted.pack())
    pairs = {"known": "str*3", "senders": "int*6", "receivers": "int*6", "texts": "bytes*6"}
    assert form(shares) == {"sites": {"names": "str*3"}, "shares": pairs}
    delivery = Delivery.of(name, SharesReply.unpack(shares).by_pair())
    masked = exchange(MASKED_TRAIN, delivery.add_to(work.pack()))
    values = 8 * 64 + 8 + 10 * 8 + 10 + len(TAIL)
    assert form(masked) == {"sites": {"names": "str*3"}, "masked": {"numbers": f"int64(3, {values})"}}
    handed = exchange(QUERY_UNMASK, UnmaskRequest(work.names, name, 3, work.names, ()).pack())
    back = {"known": "str*3", "holders": "int*9", "owners": "int*9", "shares": "bytes*9"}
    assert form(handed) == {"sites": {"names": "str*3"}, "shares": back}
    assert (
        failure(exchange(QUERY_UNMASK, UnmaskRequest(work.names, name, 3, work.names, ()).pack())) == "secure-refused"
    )
    assert failure(exchange(QUERY_SHARES, wanted.pack())) == "secure-refused"


def test_columns_of_categories_travel_as_they_are() -> None:
    known = (("sex", ("F", "M")), ("ward", ()), ("zone", ("1",)))
    assert CategoriesReply.unpack(CategoriesReply(known).pack()).categories == known
    request = CategoriesRequest(("a", "b"), ("sex", "ward"))
    assert CategoriesRequest.unpack(request.pack()) == request
    sums = SumsRequest(("a",), categories=known)
    assert SumsRequest.unpack(sums.pack()) == sums
    work = RoundRequest({}, 1, ("0", "1"), ("a",), "run", categories=known)
    assert RoundRequest.unpack(work.pack()).categories == known
    sites = SitesReply(("a",), (4,), (2,), ("0", "1"), ("age", "sex"), (2,), False, False, categorical=("sex",))
    assert SitesReply.unpack(sites.pack()).categorical == ("sex",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_columns": ["sex", "sex"]}, "do not fit together"),
        ({"category_counts": [2]}, "has 1 values and not 2"),
        ({"category_counts": [-1, 4]}, "do not fit together"),
        ({"category_counts": [1, 1]}, "do not fit together"),
        ({"category_names": ["F", "F", "x"]}, "two categories of a column have the same name"),
        ({"category_names": ["F", " M", "x"]}, "begins or ends with a space"),
        ({"category_names": ["F", "M\u202e", "x"]}, "cannot be printed"),
        ({"category_names": ["F", "M" * 65, "x"]}, "has 65 characters"),
        ({"other": 1}, "it holds"),
    ],
)
def test_impossible_categories_are_refused(change: dict[str, Any], message: str) -> None:
    content = CategoriesReply((("sex", ("F", "M")), ("ward", ("x",)))).pack()
    content["categories"] = ConfigRecord({**content["categories"], **change})
    with pytest.raises(MessageError, match=message):
        CategoriesReply.unpack(content)


# ---------------------------------------------------------------- what is not a message

VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(-3, 3), max_size=5),
    st.lists(st.floats(), max_size=5),
    st.lists(st.text(max_size=3), max_size=5),
    st.lists(st.booleans(), max_size=5),
)
SCALARS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.lists(st.integers(-3, 3), max_size=5))
ARRAYS = st.one_of(
    st.builds(
        lambda dtype, shape: Array(np.ones(shape, dtype=dtype)),
        st.sampled_from(["float32", "float64", "float16", "int64", "bool", "complex64", "U3"]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    st.builds(
        lambda dtype, shape, data: Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data),
        st.text(max_size=8),
        st.lists(st.integers(-2, 3), max_size=2).map(tuple),
        st.binary(max_size=200),
    ),
)
RECORDS = st.one_of(
    st.dictionaries(st.text(max_size=4), VALUES, max_size=3).map(lambda values: ConfigRecord(values)),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=3).map(lambda values: MetricRecord(values)),
    st.dictionaries(st.text(max_size=4), ARRAYS, max_size=2).map(lambda values: ArrayRecord(values)),
)


def mutate(content: RecordDict, data: st.DataObject) -> None:
    """Changes one thing in a message: a record or an entry is added, replaced, taken away or renamed."""
    name = data.draw(st.sampled_from(sorted(content)))
    match data.draw(st.sampled_from(["add", "replace", "remove", "rename", "entry", "entry", "entry"])):
        case "add":
            content[data.draw(st.text(max_size=5))] = data.draw(RECORDS)
        case "replace":
            content[name] = data.draw(RECORDS)
        case "remove":
            del content[name]
        case "rename":
            content[data.draw(st.text(max_size=5))] = content.pop(name)
        case _:
            record: Any = content[name]
            kind = {ConfigRecord: VALUES, MetricRecord: SCALARS, ArrayRecord: ARRAYS}[type(record)]
            key = data.draw(st.sampled_from([*sorted(record), "another"]))
            if data.draw(st.booleans()):
                record[key] = data.draw(kind)
            else:
                record.pop(key, None)


@pytest.mark.quick("TrainReply")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize(("message", "unpack"), PACKED, ids=KINDS)
@given(data=st.data())
def test_what_is_not_a_message_is_refused_as_such(
    message: Any, unpack: Callable[[RecordDict], Any], data: st.DataObject
) -> None:
    content = message.pack()
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            mutate(content, data)
    try:
        read = unpack(content)
    except MessageError:
        return
    # What was read is a message all the same: it can be packed and read again.
    assert type(unpack(read.pack())) is type(message)


@pytest.mark.slow
@given(st.one_of(st.builds(dict), st.dictionaries(st.text(max_size=5), RECORDS, max_size=3)))
def test_foreign_records_are_refused_by_every_message(records: dict[str, Any]) -> None:
    for _, unpack in PACKED:
        with pytest.raises(MessageError):
            unpack(RecordDict(records))


def changed(message: Any, record: str, key: str, value: Any) -> RecordDict:
    content: RecordDict = message.pack()
    content[record][key] = value
    return content


def of_no_site(columns: int) -> RecordDict:
    nothing = np.zeros((0, 2))
    content = EvaluateReply((), {"loss": nothing}, np.array([], dtype=np.int64)).pack()
    content["counts"]["columns"] = columns
    return content


WRONG = [
    ("SitesReply", changed(SITES, "sizes", "train_rows", [12]), '"train_rows" has 1 values and not 2'),
    ("SitesReply", changed(SITES, "sizes", "train_rows", [12.0, 1.0]), '"train_rows" is not a list of int'),
    (
        "SitesReply",
        changed(SITES, "sites", "names", ["a\nb", "zion"]),
        'the site "a\\nb" has a character that cannot be',
    ),
    ("SitesReply", changed(SITES, "sites", "names", ["x" * 65, "zion"]), 'the site "xxx'),
    (
        "SitesReply",
        changed(SITES, "sites", "names", ["\u202eabbey", "zion"]),
        'the site "\\u202eabbey" has',
    ),
    ("SitesReply", changed(SITES, "schema", "classes", ["0", ""]), 'the class "" is empty'),
    ("SitesReply", changed(SITES, "schema", "features", ["age", "\x1b[2J"]), 'the feature "\\x1b[2J" has a character'),
    ("SitesReply", changed(SITES, "schema", "classes", ["0", "0"]), "two classes have the same name"),
    ("SitesReply", changed(SITES, "schema", "shape", [3]), "its rows have another length than its list of features"),
    ("SitesReply", changed(SITES, "schema", "shape", [2**40]), "the shape of a row is not positive, or has more than"),
    ("SitesReply", changed(SITES, "schema", "form", "<b>" * 99), "the form of its tasks is no digest"),
    ("SitesReply", changed(SITES, "sizes", "test_rows", [-1, 1]), "a number of rows is negative"),
    ("SitesReply", changed(SITES, "sites", "names", ["abbey", "abbey"]), "two sites have the same name"),
    ("SitesReply", changed(SITES, "schema", "regression", 1), '"regression" is not of type bool'),
    ("SitesReply", changed(SITES, "schema", "shape", [-2]), "the shape of a row is not positive"),
    ("SitesReply", changed(SITES, "sizes", "train_rows", [12, 2**63]), '"train_rows" has a number that is too large'),
    ("SitesReply", changed(SITES, "schema", "rows", "63,male"), "it holds "),
    ("SumsReply", changed(SUMS, "sums", "total", Array(np.array([1.0]))), "the sums are not of one shape"),
    ("SumsReply", changed(SUMS, "sums", "total", Array(np.array([1.0, np.nan]))), "the sums are not finite float64"),
    ("SumsReply", changed(SUMS, "sums", "total", Array(np.float32([1, 2]))), "the sums are not finite float64"),
    (
        "SumsReply",
        changed(SUMS, "sums", "count", Array(np.array([-1.0, 2]))),
        NEGATIVE,
    ),
    ("SumsReply", changed(SUMS, "sums", "total", Array(np.array([1.0, 1e300]))), "a sum is of larger numbers than"),
    ("SumsReply", changed(SUMS, "sums", "square", Array(np.array([1e18, 1e300]))), "a sum is of larger numbers than"),
    ("SumsReply", changed(SUMS, "sums", "total", Array(np.array([1e9, 5e6]))), "a sum of squares is smaller than the"),
    ("SumsReply", changed(SUMS, "sums", "count", Array(np.array([2.0, 0.0]))), "a sum is of larger numbers than"),
    ("SumsReply", changed(SUMS, "sums", "count", Array(np.array([2.5, 3.0]))), "a count is not a whole number"),
    ("SumsReply", changed(SUMS, "sums", "target_square", Array(np.array([-1.0]))), "the sums are not of one shape"),
    ("SumsReply", changed(TARGETS, "sums", "target_square", Array(np.array([-1.0]))), NEGATIVE),
    (
        "SumsReply",
        changed(TARGETS, "sums", "target_total", Array(np.array([np.inf]))),
        "the sums are not finite float64",
    ),
    (
        "SumsReply",
        changed(TARGETS, "sums", "target_total", Array(np.array([1e300]))),
        "a sum is of larger numbers than",
    ),
    (
        "TrainReply",
        changed(TRAINED, "gradient", "alpha", Array(np.float32([1, 2]))),
        "the gradient of alpha has another",
    ),
    ("TrainReply", changed(TRAINED, "gradient", "alpha", Array(np.array(1))), "the gradient of alpha has another"),
    (
        "TrainReply",
        changed(TRAINED, "gradient", "alpha", Array(np.array(np.nan, dtype=np.float32))),
        "the gradient of alpha is not fin",
    ),
    (
        "TrainReply",
        changed(TRAINED, "gradient", "alpha", Array(np.array(np.inf, dtype=np.float32))),
        "the gradient of alpha is not fin",
    ),
    (
        "TrainReply",
        changed(TRAINED, "gradient", "alpha", Array(np.array(1e39))),
        "the gradient of alpha is not fin",
    ),
    ("TrainReply", changed(TRAINED, "gradient", "beta", Array(np.array(0, dtype=np.float32))), "it holds "),
    ("TrainReply", changed(TRAINED, "cohort", "weight", -1.0), "the weight is not a finite number of at least 0"),
    ("TrainReply", changed(TRAINED, "cohort", "weight", math.inf), "the weight is not a finite number of at least 0"),
    ("TrainReply", changed(TRAINED, "cohort", "query_loss", [0.5]), '"query_loss" has 1 values and not 2'),
    ("TrainReply", changed(TRAINED, "cohort", "finite", [2, 0]), "whether a gradient is finite is neither 0 nor 1"),
    (
        "TrainReply",
        changed(TRAINED, "cohort", "query_loss", [math.nan, 0.0]),
        "the query loss of a site whose",
    ),
    ("TrainReply", changed(TRAINED, "cohort", "query_loss", [1e39, 0.0]), "the query loss of a site whose"),
    ("TrainReply", changed(TRAINED, "cohort", "finite", [1, 0, 1]), '"finite" has 3 values and not 2'),
    ("TrainReply", changed(TRAINED, "sites", "names", "abbey"), '"names" is not a list of str'),
    ("EvaluateReply", changed(EVALUATED, "counts", "columns", 0), "the figures are of no site or have no column"),
    ("EvaluateReply", changed(EVALUATED, "counts", "columns", -2), "the figures are of no site or have no column"),
    ("EvaluateReply", changed(EVALUATED, "counts", "columns", 2**62), '"accuracy" has 4 values and not'),
    ("EvaluateReply", changed(EVALUATED, "figures", "loss", [1.0] * 3), '"loss" has 3 values and not 4'),
    ("EvaluateReply", changed(EVALUATED, "counts", "chosen", [0, 2]), "a site takes more steps than there are"),
    ("EvaluateReply", changed(EVALUATED, "counts", "chosen", [0, -1]), "a site takes more steps than there are"),
    ("EvaluateReply", changed(EVALUATED, "counts", "chosen", [0, 2**63]), '"chosen" has a number that is too large'),
    ("EvaluateReply", of_no_site(2**62), "the figures are of no site or have no column"),
    ("NormsReply", changed(NORMS, "cohort", "norms", [-1.0, 0.0]), "a norm is below 0 or infinite"),
    ("NormsReply", changed(NORMS, "cohort", "norms", [math.inf, 0.0]), "a norm is below 0 or infinite"),
    ("NormsReply", changed(NORMS, "cohort", "norms", [1.0]), '"norms" has 1 values and not 2'),
    ("RoundRequest", changed(REQUEST, "task", "round", "1"), '"round" is not of type int'),
    ("RoundRequest", changed(REQUEST, "task", "round", True), '"round" is not of type int'),
    ("EngineReply", changed(ENGINE, "choice", "budget", -1), "the budget is not between 0 and"),
    ("EngineReply", changed(ENGINE, "choice", "budget", 2**62), "the budget is not between 0 and"),
    ("EngineReply", changed(ENGINE, "seconds", "loop", math.nan), "the seconds of a trial are not a finite number"),
    ("EngineReply", changed(ENGINE, "choice", "budget", 2**63), '"budget" has a number that is too large'),
    ("EngineReply", changed(ENGINE, "seconds", "lowrank", [1.0]), '"lowrank" is not of type float'),
    ("EngineReply", changed(ENGINE, "choice", "engine", "spam"), 'there is no engine "spam"'),
    ("EngineReply", changed(ENGINE, "seconds", "x" * 300, 1.0), 'there is no engine "xxx'),
    ("KeysRequest", changed(KeysRequest(("a",), "x"), "round", "context", ""), "the round has no name"),
    ("KeysRequest", changed(KeysRequest(("a",), "x"), "round", "context", "x\n"), "the round has no name"),
    ("KeysReply", changed(KEYS, "keys", "mask", [KEY]), '"mask" has 1 values and not 2'),
    ("KeysReply", changed(KEYS, "keys", "cipher", [KEY, b""]), '"cipher" has a value of another length'),
    ("KeysReply", changed(KEYS, "keys", "cipher", ["a", "b"]), '"cipher" is not a list of bytes'),
    ("SharesRequest", changed(SHARES_WANTED, "ring", "sites", 2), "the round's ring, its neighborhoods"),
    ("SharesRequest", changed(SHARES_WANTED, "ring", "needed", 9), "the round's ring, its neighborhoods"),
    ("SharesRequest", changed(SHARES_WANTED, "ring", "sites", 2**40), "the round's ring, its neighborhoods"),
    ("SharesRequest", changed(SHARES_WANTED, "ring", "places", [0, 0, 1]), "two sites have one place"),
    ("SharesRequest", changed(SHARES_WANTED, "ring", "places", [0, 3, 1]), '"places" has a value that is not'),
    ("SharesRequest", changed(SHARES_WANTED, "sites", "names", ["oak"]), "two sites have one place in the ring, or a"),
    ("SharesReply", changed(SHARES, "shares", "receivers", [0, 0]), "a site shares twice with another"),
    ("SharesReply", changed(SHARES, "shares", "senders", [0, 1]), '"senders" has a value that is not between'),
    ("SharesReply", changed(SHARES, "shares", "texts", [b"one", b"x" * 2000]), '"texts" has a value of another'),
    ("SharesReply", changed(SHARES, "shares", "known", ["elm", "elm"]), '"known" has a site twice'),
    ("SharesReply", changed(SHARES, "shares", "known", ["elm", "a\nb"]), "the site "),
    ("Delivery", changed(DELIVERY, "secure", "receivers", [0, -1]), '"receivers" has a value that is not between'),
    ("MaskedReply", changed(MASKED, "masked", "numbers", Array(np.zeros(4))), "the masked numbers are not int64 by"),
    ("MaskedReply", changed(MASKED, "masked", "numbers", Array(np.zeros((3, 1), int))), "the masked numbers are not"),
    ("UnmaskRequest", changed(UNMASK, "wanted", "keys", ["zion"]), "both secrets of one site are asked for"),
    ("UnmaskRequest", changed(UNMASK, "wanted", "left", -1), "the number of sites that are left is not between"),
    ("UnmaskReply", changed(HANDED, "shares", "shares", [SHARE, KEY]), '"shares" has a value of another length'),
    ("UnmaskReply", changed(HANDED, "shares", "owners", [1, 1]), "a site hands over two shares of one secret"),
]


@pytest.mark.parametrize(("kind", "content", "shown"), WRONG)
def test_what_is_wrong_with_a_message_is_reported(kind: str, content: RecordDict, shown: str) -> None:
    unpack = dict(zip(KINDS, (unpack for _, unpack in PACKED), strict=True))[kind]
    with pytest.raises(MessageError) as refusal:
        unpack(content)
    assert str(refusal.value).startswith(shown)


@pytest.mark.parametrize(("message", "unpack"), PACKED, ids=KINDS)
def test_a_record_more_or_less_is_refused(message: Any, unpack: Callable[[RecordDict], Any]) -> None:
    more = message.pack()
    more["text"] = ConfigRecord({"error": "63 years, male"})
    with pytest.raises(MessageError):
        unpack(more)
    for name in message.pack():
        less = message.pack()
        del less[name]
        with pytest.raises(MessageError):
            unpack(less)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
def test_arrays_travel_as_flowers_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    for tensor in (value, value.movedim(0, -1) if shape else value):
        record = records.write_arrays({"name": tensor})
        own = Array(tensor.contiguous().numpy())
        assert (record["name"].data, record["name"].dtype) == (own.data, own.dtype)
        assert record["name"].shape == own.shape
        assert torch.equal(records.read_arrays(RecordDict({"arrays": record}), "arrays")["name"], tensor)


def test_arrays_in_column_order_are_read_too() -> None:
    numbers = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    found = records.read_arrays(RecordDict({"arrays": ArrayRecord({"name": Array(numbers)})}), "arrays")
    assert found["name"].tolist() == numbers.tolist()


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"0", lambda data: data[:90], lambda _: b""]
)
@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_arrays_of_another_length_are_refused(shape: tuple[int, ...], change: Callable[[bytes], bytes]) -> None:
    own = Array(np.ones(shape))
    mutated = Array(own.dtype, own.shape, own.stype, change(own.data))
    content = RecordDict({"arrays": ArrayRecord({"name": mutated})})
    with pytest.raises(MessageError):
        records.read_arrays(content, "arrays")


def test_figures_of_subgroups_travel_and_are_checked() -> None:
    figures, chosen = {"loss": np.ones((2, 1))}, np.zeros(2, dtype=np.int64)
    rows = np.array([[12.0, 0.0, 30.0], [0.0, 15.0, 11.0]])
    scores = np.where(rows > 0, 0.5, np.nan)
    own = {"rows": rows, "global": scores, "personalized": scores}
    reply = EvaluateReply(("a", "b"), figures, chosen, subgroups=own)
    found = EvaluateReply.unpack(reply.pack())
    for name, values in own.items():
        np.testing.assert_array_equal(found.subgroups[name], values)
    assert found.without({"a"}).subgroups["rows"].tolist() == [rows[1].tolist()]
    assert EvaluateReply.unpack(EvaluateReply(("a", "b"), figures, chosen).pack()).subgroups == {}
    for wrong in (
        {"rows": rows},
        own | {"rows": rows + 0.5},
        own | {"rows": -rows},
        own | {"rows": rows[:1]},
        own | {"global": scores[:, :2]},
        own | {"global": np.full_like(scores, np.inf)},
        own | {"more": scores},
    ):
        with pytest.raises(MessageError):
            EvaluateReply.unpack(EvaluateReply(("a", "b"), figures, chosen, subgroups=wrong).pack())
