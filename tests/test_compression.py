"""Gradients in fewer bytes: what is lost, what is not, and what travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from clients.local_state import read
from fedmeta import compression, run
from fedmeta.compression import BLOCK, LEVELS, PackedError, kept, pack, unpack
from fedmeta.errors import FedmetaError
from fedmeta.messages import MessageError, TrainReply
from fedmeta.messages.compressed import pack_reply, unpack_reply
from tests.server.digits import digits

METHODS = ("float16", "bfloat16", "int8", "int4", "top-k")
SIZE = 3 * BLOCK + 5


def generators(sites: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, site]) for site in range(sites)]


def values(sites: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).normal(size=(sites, SIZE)) * np.array([[1.0], [1e-3]])[:sites]


@pytest.mark.parametrize("method", METHODS)
def test_it_takes_the_bytes_that_it_should(method: str) -> None:
    arrays = pack(values(), method, 0.1, generators(2))
    taken = sum(value.nbytes for value in arrays.values()) / 2
    blocks = -(-SIZE // BLOCK)
    wanted = {"float16": 2 * SIZE, "bfloat16": 2 * SIZE, "int8": SIZE + 4 * blocks, "top-k": 8 * kept(SIZE, 0.1)}
    assert taken == wanted.get(method, -(-SIZE // 2) + 4 * blocks)


@pytest.mark.parametrize("method", METHODS)
def test_what_comes_back_is_near(method: str) -> None:
    own = values()
    found = unpack(pack(own, method, 1.0, generators(2)), method, 1.0, 2, SIZE)
    blocks = np.abs(own).max(1, keepdims=True)
    bounds = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "top-k": 2.0**-24}
    bound = bounds[method] * np.abs(own) + 1e-7 if method in bounds else blocks / LEVELS[method]
    assert (np.abs(found - own) <= bound).all()


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_rounding_at_random_is_right_on_average(method: str) -> None:
    own = values(1)
    every = [unpack(pack(own, method, 1.0, generators(1, seed)), method, 1.0, 1, SIZE) for seed in range(400)]
    step = np.abs(own).max() / LEVELS[method]
    assert (np.abs(np.mean(every, axis=0) - own) < 5 * step / 2 / 20).all()


def test_the_largest_entries_are_sent_as_they_are() -> None:
    own = np.array([[0.0, -3.0, 0.5, 2.0, -0.1]])
    found = unpack(pack(own, "top-k", 0.4, generators(1)), "top-k", 0.4, 1, 5)
    assert found.tolist() == [[0.0, -3.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_large_numbers_finite(method: str) -> None:
    own = np.zeros((2, SIZE))
    own[1] = 1e6
    found = unpack(pack(own, method, 0.5, generators(2)), method, 0.5, 2, SIZE)
    assert not found[0].any()
    assert np.isfinite(found).all()


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another name": ("int8", {"code": np.zeros((2, SIZE), np.int8)}, "it holds"),
    "another type": ("float16", {"half": np.zeros((2, SIZE), np.float32)}, '"half" is not float16'),
    "another shape": ("float16", {"half": np.zeros((1, SIZE), np.float16)}, '"half" is not float16'),
    "no number": ("float16", {"half": np.full((2, SIZE), np.nan, np.float16)}, "a number is not finite"),
    "an infinite one": ("bfloat16", {"brain": np.full((2, SIZE), 0x7F80, np.int16)}, "a number is not finite"),
    "a code beyond": (
        "int8",
        {"codes": np.full((2, SIZE), -128, np.int8), "scales": np.ones((2, 4), np.float32)},
        "a code is beyond",
    ),
    "a negative scale": (
        "int4",
        {"codes": np.zeros((2, -(-SIZE // 2)), np.uint8), "scales": -np.ones((2, 4), np.float32)},
        "a scale is negative",
    ),
    "a place twice": (
        "top-k",
        {"places": np.zeros((2, 78), np.int32), "values": np.zeros((2, 78), np.float32)},
        "the places of its entries",
    ),
    "a place beyond": (
        "top-k",
        {"places": np.arange(78, dtype=np.int32)[None].repeat(2, 0) + SIZE, "values": np.zeros((2, 78), np.float32)},
        "the places of its entries",
    ),
}


@pytest.mark.parametrize(("method", "arrays", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_packed_gradient_is_refused(method: str, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(PackedError, match=message):
        unpack(arrays, method, 0.1, 2, SIZE)


LIKE = {"theta.b": torch.zeros(5), "theta.a": torch.zeros(3, 256)}


def content(method: str = "int8") -> RecordDict:
    own = values(2)
    reply = TrainReply({}, 2.0, ("abbey", "zion"), np.zeros(2), np.ones(2, dtype=bool))
    return pack_reply(pack(own, method, 0.1, generators(2)), reply)


def test_a_packed_reply_is_read_as_each_sites_own_gradient() -> None:
    reply = unpack_reply(content("float16"), LIKE, "float16", 0.1)
    assert {name: tuple(value.shape) for name, value in reply.gradient.items()} == {
        "theta.a": (2, 3, 256), "theta.b": (2, 5)
    }  # fmt: skip
    assert np.allclose(reply.gradient["theta.a"][0].flatten().numpy(), values()[0, : 3 * 256], atol=1e-2)


@pytest.mark.parametrize("change", ["record", "figure", "method", "array"])
def test_a_reply_that_is_not_packed_as_agreed_is_refused(change: str) -> None:
    found = content()
    if change == "record":
        del found["packed"]
    elif change == "figure":
        found["cohort"]["weight"] = -1.0  # type: ignore[index]
    elif change == "array":
        found["packed"] = ArrayRecord()
    with pytest.raises(MessageError):
        unpack_reply(found, LIKE, "int4" if change == "method" else "int8", 0.1)


QUIET = ("evaluation.every=0", "evaluation.local_baseline=none", "server.rounds=4")


@pytest.mark.quick("int8")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_small_messages_trains(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = run(digits(tmp_path / "plain", *QUIET))
    small = run(digits(tmp_path / "small", *QUIET, f"server.compression={method}"))
    assert small.summary["failures"] == 0
    difference = max(float((plain.meta_state[n] - small.meta_state[n]).abs().max()) for n in plain.meta_state)
    assert 0 < difference < 0.05


@pytest.mark.slow
def test_what_was_not_sent_is_kept_at_the_site_and_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # sites do not know the folder of runs, and keep what is theirs in the usual one
    own = (*QUIET, "server.compression=top-k", "runtime.checkpoint_every=1")
    whole = run(digits(tmp_path / "whole", *own))

    def stop(progress: Any) -> None:
        if progress.round_number == 2 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(digits(tmp_path / "cut", *own), report=stop)
    resumed = run(digits(tmp_path / "cut", *own), resume="auto")
    assert all(torch.equal(value, resumed.meta_state[name]) for name, value in whole.meta_state.items())
    folder = tmp_path / "fedmeta-runs" / whole.folder.name / "personal" / "unsent"
    kept_at = [read(folder, f"site-{number:02d}", 99) for number in range(40)]
    assert any(own is not None and bool(own["residual"].any()) for own in kept_at)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("privacy.secure_aggregation=true",), "a ring adds whole numbers"),
        (("privacy.noise_multiplier=1.0", "privacy.clip_norm=1.0", "privacy.delta=0.001"), "is beyond clip_norm"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    assert set(METHODS) < set(compression.__doc__.replace("`", " ").replace(",", " ").split())  # type: ignore[union-attr]
    with pytest.raises(FedmetaError, match=message):
        run(digits(tmp_path, *QUIET, "server.compression=int8", *settings))
