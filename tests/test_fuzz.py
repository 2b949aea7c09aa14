"""Thousands of broken replies, checkpoints and data files: each is refused with a message, or read for what it is."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmeta import checkpoint
from fedmeta.data import load_site
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from fedmeta.messages import EvaluateReply, MessageError, TrainReply, failure
from tests.test_checkpoint import assert_same, saved
from tests.test_messages import GRADIENT, PACKED

MUTATIONS = [pytest.param(60, id="60"), pytest.param(2500, id="2500", marks=pytest.mark.slow)]
"""How many of each kind; four kinds of 2500 are ten thousand."""

NASTY = [
    b"\0",
    b"\xff",
    b'"',
    b"\n",
    b"\r",
    b",",
    b";",
    b"-",
    b"e",
    b".",
    b"1e999",
    b"nan",
    b"inf",
    b"\xc3\xa9",
    b"PK\5\6",
]


def mutated(content: bytes, draws: random.Random) -> bytes:
    """Returns bytes with one to three changes: flipped, cut, inserted, removed, doubled or swapped."""
    changed = bytearray(content)
    for _ in range(draws.randint(1, 3)):
        place = draws.randrange(len(changed) or 1)
        length = draws.choice((1, 1, 2, 8, 64))
        match draws.choice(("flip", "flip", "cut", "insert", "remove", "double", "zero")):
            case "flip" if changed:
                changed[place] ^= 1 << draws.randrange(8)
            case "cut":
                del changed[place:]
            case "insert":
                changed[place:place] = draws.choice([*NASTY, draws.randbytes(length)])
            case "remove":
                del changed[place : place + length]
            case "double":
                changed[place:place] = changed[place : place + length]
            case _:
                changed[place : place + length] = bytes(length)
    return bytes(changed)


def read_into(found: list[Any], unpack: Callable[[RecordDict], object], content: RecordDict) -> None:
    found.append(unpack(content))


def refusal(read: Callable[[], object], *kinds: type[BaseException]) -> str:
    """Returns in what words something was refused, or the empty string where it was read; no other error passes."""
    try:
        read()
    except kinds as error:
        shown = str(error)
        assert shown
        assert "\n" not in shown
        return shown
    return ""


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("count", MUTATIONS)
def test_no_broken_checkpoint_is_read_as_another(tmp_path: Path, count: int) -> None:
    draws = random.Random(1)
    path = checkpoint.write(saved(), tmp_path)
    whole, refused = path.read_bytes(), 0
    for _ in range(count):
        path.write_bytes(mutated(whole, draws))
        shown = refusal(lambda: checkpoint.read(path), FedmetaError)
        refused += bool(shown)
        if shown:
            assert str(path) in shown
        else:
            assert_same(checkpoint.read(path), saved())
    assert refused > 0.9 * count


@pytest.mark.parametrize("count", MUTATIONS)
def test_no_broken_npz_file_is_read_as_other_numbers(tmp_path: Path, count: int) -> None:
    draws = random.Random(2)
    path = tmp_path / "site.npz"
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    np.savez(path, x=x, y=np.arange(12) % 2, feature_names=np.array(["age", "chol", "rate"]), time=np.arange(12.0))
    whole, refused = path.read_bytes(), 0
    data = Data(source="npz", path=str(path))
    for _ in range(count):
        path.write_bytes(mutated(whole, draws))
        shown = refusal(lambda: load_site(data, str(path), "abbey"), FedmetaError)
        refused += bool(shown)
        if shown:
            assert str(path) in shown
        else:
            population = load_site(data, str(path), "abbey")
            assert np.array_equal(population.features(np.arange(12)), x)
    assert refused > 0.3 * count


@pytest.mark.slow
@pytest.mark.parametrize("count", MUTATIONS)
def test_a_broken_csv_file_is_refused_with_the_place_or_read_as_numbers(tmp_path: Path, count: int) -> None:
    draws = random.Random(3)
    path = tmp_path / "site.csv"
    random_numbers = np.random.default_rng(0).normal(size=(12, 2))
    lines = [f"{row[0]:.4f},{row[1]:.4f},{('ill', 'well')[number % 2]}" for number, row in enumerate(random_numbers)]
    whole = ("age,chol,label\n" + "\n".join(lines) + "\n").encode()
    data = Data(source="tables", path=str(tmp_path))
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(whole, draws))
        shown = refusal(lambda: load_site(data, str(path), "abbey"), FedmetaError)
        refused += bool(shown)
        if shown:
            assert str(path) in shown
        else:
            population = load_site(data, str(path), "abbey")
            rows = population.rows(np.array([0])).rows
            features = population.features(rows)
            assert features.shape == (len(rows), *population.shape)
            assert not np.isinf(features).any()
            assert set(np.unique(population.labels(rows))) <= set(range(len(population.class_names)))
    assert 0.1 * count < refused < 0.95 * count


# ---------------------------------------------------------------- replies


def mutate_reply(content: RecordDict, draws: random.Random) -> RecordDict:
    """Returns a reply of which a record, a key, a value, an array's bytes, shape or type was changed."""
    changed = RecordDict(dict(content.items()))
    name = draws.choice(list(changed))
    record = changed[name]
    key = draws.choice(list(record) or [""])
    others: list[Any] = [MetricRecord({"weight": 1.0}), ConfigRecord({"names": ["abbey"]}), ArrayRecord()]
    match draws.choice(("drop", "rename", "kind", "key", "value", "value", "value", "extra")):
        case "drop":
            del changed[name]
        case "rename":
            changed[name + draws.choice("sx ")] = changed.pop(name)
        case "kind":
            del changed[name]
            changed[name] = draws.choice(others)
        case "extra":
            changed[draws.choice(("failure", "rows", "more"))] = draws.choice(others)
        case "key" if key:
            entries = dict(record)
            entry = entries.pop(key)
            if draws.random() < 0.5:
                entries[f"{key}~"] = entry
            changed[name] = type(record)(entries)
        case _ if isinstance(record, ArrayRecord) and key:
            changed[name] = ArrayRecord({**record, key: mutate_array(record[key], draws)})
        case _ if key:
            values = [-1, 0, 7, 2**62, -0.5, float("nan"), float("inf"), [], [1], [1.5, -2.0], [-1] * 3]
            if isinstance(record, ConfigRecord):
                values += ["", "x", b"x", True, ["a", "a"], [""], [True]]
            value = record[key]
            if isinstance(value, list) and value and draws.random() < 0.7:
                scalars = [entry for entry in values if not isinstance(entry, list)]
                values = [[*value[:-1], type(value[-1])(entry)] for entry in scalars if type(entry) is type(value[-1])]
            entries = {**record, key: draws.choice(values)}
            changed[name] = type(record)(entries)
    return changed


def mutate_array(array: Array, draws: random.Random) -> Array:
    dtype, shape, kind, data = array.dtype, array.shape, array.stype, array.data
    match draws.choice(("data", "data", "data", "dtype", "shape", "kind", "swap")):
        case "data":
            data = mutated(data, draws)
        case "dtype":
            dtype = draws.choice(("float16", "int64", "object", "nonsense"))
        case "shape":
            shape = draws.choice(((), (1,), (-1,), (2**40,), (*shape, 1)))
        case "kind":
            kind = draws.choice(("", "pickle", "numpy"))
        case _:
            other = np.zeros(draws.choice(((), (3,), (2, 2), (0, 2))), draws.choice(("f2", "f4", "f8", "i8", "?")))
            return Array(other)
    return Array(dtype=dtype, shape=shape, stype=kind, data=data)


def check_accepted(reply: Any) -> None:
    """Checks what a reply that was taken promises to the server."""
    if isinstance(reply, TrainReply):
        assert {name: value.shape for name, value in reply.gradient.items()} == {
            name: value.shape for name, value in GRADIENT.items()
        }
        assert all(value.isfinite().all() and value.is_floating_point() for value in reply.gradient.values())
        assert np.isfinite(reply.weight)
        assert reply.weight >= 0
        assert len(reply.names) == len(reply.query_loss) == len(reply.finite)
    if isinstance(reply, EvaluateReply):
        shapes = {values.shape for values in reply.figures.values()}
        assert shapes == {(len(reply.names), reply.columns)}
        assert len(reply.chosen) == len(reply.names)
        assert ((reply.chosen >= 0) & (reply.chosen < reply.columns)).all()


@pytest.mark.parametrize("count", MUTATIONS)
def test_a_broken_reply_is_refused_or_has_the_right_form(count: int) -> None:
    draws = random.Random(4)
    refused = 0
    for _ in range(count):
        message, unpack = draws.choice(PACKED)
        content = message.pack()
        for _ in range(draws.randint(1, 2)):
            content = mutate_reply(content, draws) if len(content) else content
        if failure(content):
            continue
        read: list[Any] = []
        refused += bool(refusal(partial(read_into, read, unpack, content), MessageError))
        for reply in read:
            check_accepted(reply)
    assert refused > 0.5 * count


def test_numbers_that_are_out_of_reach_do_not_become_rows_of_memory() -> None:
    array = Array(dtype="float32", shape=(2**40,), stype="numpy.ndarray", data=Array(np.zeros(2, "f4")).data)
    reply = TrainReply({"theta": torch.zeros(2)}, 1.0, (), np.array([]), np.array([], dtype=bool)).pack()
    reply["gradient"] = ArrayRecord({"theta": array})
    read = TrainReply.unpack(reply, {"theta": torch.zeros(2)})
    assert torch.equal(read.gradient["theta"], torch.zeros(2))
