"""Ten thousand mutated messages: each is refused with one line or is still a message; nothing else happens."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fedmeta.messages import MessageError
from tests.test_messages import KINDS, PACKED

EACH = 10_000 // len(PACKED) + 1
VALUES: tuple[Any, ...] = (
    True, 0, -1, 2, 2**62, -(2**62), 0.0, -0.5, 1e30, 1e300, float("nan"), float("inf"), "", "x" * 10_000, "a\n\x1b[2J",
    "\u202e", b"", b"\x80", [], [0], [2**62] * 3, [float("nan")] * 2, ["a"] * 1000, ["\0", "b"], [True], [b"\x93NUMPY"],
)  # fmt: skip


def mutated(array: Array, draws: random.Random) -> Array:
    """Returns an array with some of its bytes, its shape or its type changed."""
    data = bytearray(array.data)
    for _ in range(draws.randint(1, 4)):
        if data:
            data[draws.randrange(len(data))] = draws.randrange(256)
    dtype, shape, kind = array.dtype, list(array.shape), array.stype
    match draws.randrange(6):
        case 0:
            shape = [draws.choice([-1, 0, 1, 7, 2**31, 2**62]) for _ in range(draws.randint(0, 3))]
        case 1:
            dtype = draws.choice(["float64", "int64", "object", "V8", "U3", "no type", ""])
        case 2:
            kind = draws.choice(["torch.Tensor", "pickle", ""])
        case 3:
            data = data[: draws.randrange(len(data) + 1)]
        case 4:
            # What NumPy's format has before the numbers: a shape and a type of the sender's choice.
            header = "{'descr': '%s', 'fortran_order': False, 'shape': (%d,), }\n"
            text = (header % (draws.choice(["<f8", "|O", "<U9"]), draws.choice([1, 2**40, 2**62]))).encode()
            data = bytearray(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    return Array(dtype=dtype, shape=tuple(shape), stype=kind, data=bytes(data))


def mutate(content: RecordDict, draws: random.Random) -> None:
    """Changes one thing in a message."""
    name = draws.choice(sorted(content))
    record: Any = content[name]
    if not record or draws.random() < 0.05:
        del content[name]
        return
    key = draws.choice(sorted(record))
    if isinstance(record, ArrayRecord):
        record[key] = mutated(record[key], draws)
        return
    value = draws.choice(VALUES)
    if isinstance(record[key], list) and record[key] and draws.random() < 0.5 and not isinstance(value, list):
        value = [*record[key][:-1], value]
    try:
        record[key] = value
    except TypeError:  # Flower's record refuses it
        del record[key]


@pytest.mark.quick("TrainReply*", "RoundRequest*")
@pytest.mark.parametrize(("message", "unpack"), PACKED, ids=KINDS)
def test_mutated_messages_end_in_one_line(message: Any, unpack: Callable[[RecordDict], Any]) -> None:
    draws = random.Random(type(message).__name__)
    refused = 0
    for _ in range(EACH):
        content = message.pack()
        for _ in range(draws.randint(1, 3)):
            if content:
                mutate(content, draws)
        try:
            unpack(content)
        except MessageError as error:
            refused += 1
            line = str(error)
            if not (line.isprintable() and 0 < len(line) < 2000):
                pytest.fail(f"not one line: {line!r}")
    assert refused > EACH / 2
