import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedmeta import checkpoint as module
from fedmeta import files
from fedmeta.checkpoint import KEPT, Checkpoint, Evaluation, find, newest, read, rounds, write
from fedmeta.errors import FedmetaError
from fedmeta.files import read_tensors


def evaluation(number: int, sites: int = 3, steps: int = 2) -> Evaluation:
    draw = np.random.default_rng(number)
    scores, losses, calibration = draw.normal(size=(3, sites, steps + 1))
    scores[0] = np.nan
    losses[-1, -1] = np.inf
    return Evaluation(
        round_number=number,
        sites=np.arange(sites) * 2,
        figures={"accuracy": scores, "loss": losses, "ece": calibration},
        chosen=np.full(sites, steps),
        local={"accuracy": np.full(sites, np.nan)},
        pooled={"0/global/rows": np.array([3.0, 2.0])},
        pooled_sites=(2, 0),
    )


def saved(number: int = 7, **changes: Any) -> Checkpoint:
    """Returns a checkpoint in which every field has something to lose."""
    whole = Checkpoint(
        experiment='[data]\nsource = "digits"  # zürich "\\u2028"\n',
        run_id="0123456789abcdef",
        round_number=number,
        meta_state={
            "theta.weight": torch.tensor([[1.0, -0.0], [math.nan, 1e-45]]),
            "alpha": torch.tensor(0.1, dtype=torch.float64),
            "standardisation.mean": torch.zeros(0),
        },
        optimizer={"theta.weight/exp_avg": torch.ones(2, 2), "theta.weight/step": torch.tensor(7.0)},
        classes=("0", "ill", 'a "quoted" one'),
        names=("abbey", "hope", "mercy", "zion", "zürich"),
        new_sites=("zion",),
        validation_sites=("hope",),
        features=("age", "größe"),
        shape=(2,),
        train_rows=(9, 0, 20, 1, 5),
        test_rows=(9, 1, 0, 1, 5),
        regression=True,
        tokens=True,
        weights=(9.0, 0.5, 20.0, 1.0, 5.0),
        form="0123",
        held_out=False,
        evaluations=(evaluation(0), evaluation(5, 2, 0), evaluation(10)),
        totals={"wall_s": 0.1 + 0.2, "bytes_up": 2.0**53, "failures": 0},
        engine="lowrank",
        budget=1 << 28,
        metrics={1: {"train/query_loss": 0.25}, 12: {"time/round_s": 1e-9}},
    )
    return replace(whole, **changes)


def same(one: Any, other: Any) -> bool:
    """Returns whether two values are the same to the bit."""
    if isinstance(one, Evaluation):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for field in fields(one):
        assert same(getattr(one, field.name), getattr(other, field.name)), field.name


# ---------------------------------------------------------------- there and back


def test_every_field_comes_back_to_the_bit(tmp_path: Path) -> None:
    assert_same(read(write(saved(), tmp_path)), saved())
    empty = saved(evaluations=(), optimizer={}, classes=(), new_sites=(), metrics={}, totals={}, finished=True)
    assert_same(read(write(empty, tmp_path)), empty)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(min_size=1, max_size=9), st.lists(st.floats(width=32), max_size=5), max_size=3),
    st.lists(st.text(max_size=9), max_size=4),
    st.text(max_size=30),
)
def test_any_names_and_numbers_come_back(
    tmp_path: Path, state: dict[str, list[float]], names: list[str], text: str
) -> None:
    tensors = {f"theta.{name}": torch.tensor(values, dtype=torch.float32) for name, values in state.items()}
    whole = saved(meta_state=tensors, names=tuple(names), experiment=text)
    assert_same(read(write(whole, tmp_path)), whole)


def test_a_state_that_shares_memory_is_written_apart(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    views = {"theta.a": shared, "theta.b": shared.T, "theta.c": shared[:, 1]}
    state = read(write(saved(meta_state=views), tmp_path)).meta_state
    assert all(torch.equal(state[name], value) for name, value in views.items())


# ---------------------------------------------------------------- files


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for number in (0, 5, 10, 999_999, 1_000_000):
        path = write(saved(number), tmp_path)
        assert path in set(tmp_path.iterdir())
        assert newest(tmp_path)[0].round_number == number
    assert len(list(tmp_path.iterdir())) == KEPT == 2
    assert {read(path).round_number for path in tmp_path.iterdir()} == {999_999, 1_000_000}


def test_the_rounds_that_were_written_are_known_up_to_the_one_resumed(tmp_path: Path) -> None:
    assert rounds(tmp_path, 0) == (0, 0)
    write(saved(5), tmp_path)
    assert rounds(tmp_path, 5) == (5, 0)
    write(saved(10), tmp_path)
    assert rounds(tmp_path, 10) == rounds(tmp_path, 12) == (10, 5)
    assert rounds(tmp_path, 5) == (5, 0), "a damaged newest is of an abandoned course"


def test_a_write_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = write(saved(7), tmp_path)
    before = first.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for number in (7, 8):
        with pytest.raises(
            FedmetaError, match=r"round-00000\d\.safetensors: cannot write the checkpoint: No space left"
        ):
            write(saved(number), tmp_path)
    assert list(tmp_path.iterdir()) == [first]
    assert first.read_bytes() == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FedmetaError, match="cannot write the checkpoint"):
        write(saved(), tmp_path / "run")


def test_a_half_written_file_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    path = write(saved(7), tmp_path)
    (tmp_path / "round-000008.part").write_bytes(path.read_bytes())
    assert newest(tmp_path)[1] == path


# ---------------------------------------------------------------- damage


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path) -> None:
    first, second = write(saved(7), tmp_path), write(saved(8), tmp_path)
    content = second.read_bytes()
    for damaged in (content[:-1], content[:100], b"", content[:-9] + b"\xff" + content[-8:]):
        second.write_bytes(damaged)
        state, path = newest(tmp_path)
        assert path == first
        assert state.round_number == 7
    first.write_bytes(b"")
    with pytest.raises(FedmetaError, match=r"^\S+round-000008\.safetensors: the checkpoint is damaged"):
        newest(tmp_path)


def test_a_copy_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    path = write(saved(5), tmp_path)
    (tmp_path / "round-000009 (copy).safetensors").write_bytes(path.read_bytes())
    assert newest(tmp_path)[1] == path
    assert rounds(tmp_path, 5) == (5, 0)
    later = [write(saved(number), tmp_path) for number in (6, 7)]
    assert newest(tmp_path)[1] == later[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics", None), ("metrics", "{"), ("names", "null"), ("metrics", '{"x": {}}'), ("rows", "1")],
)
def test_a_whole_file_with_another_header_is_refused_in_words(tmp_path: Path, name: str, text: str | None) -> None:
    path = write(saved(), tmp_path)
    header, tensors = read_tensors(path, "checkpoint", module.FORMAT)
    del header["digest"]
    changed = {key: value for key, value in header.items() if key != name} | ({name: text} if text else {})
    save_file(tensors, path, {**changed, "digest": module._digest(changed, tensors)})
    with pytest.raises(FedmetaError, match=r"safetensors: not a checkpoint of this version of fedmeta$"):
        read(path)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r": no checkpoint in this folder$"):
        newest(tmp_path)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_a_byte_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "round-000007.safetensors"
    if not (tmp_path / "whole").exists():
        (tmp_path / "whole").write_bytes(write(saved(), tmp_path).read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "remove"])):
        case "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[place:]
        case "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        case _:
            del content[place : place + data.draw(st.integers(1, 20))]
    path.write_bytes(content)
    try:
        state = read(path)
    except FedmetaError as error:
        shown = str(error)
    else:
        # Blanks in the header's JSON, and its order, say nothing: what was read is what was written.
        shown = ""
        assert_same(state, saved())
    assert "\n" not in shown


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "round-000001.safetensors"
    for head in (b"", len(content).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}"):
        path.write_bytes(head + content)
        with pytest.raises(FedmetaError):
            read(path)


def test_another_kind_of_file_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "round-000001.safetensors"
    save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(FedmetaError, match="not a checkpoint of this version"):
        read(path)
    save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path, {"format": module.FORMAT, "digest": "0"})
    with pytest.raises(FedmetaError, match="the checkpoint is damaged"):
        read(path)


# ---------------------------------------------------------------- which run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs, the older ones first: three of one experiment, of which the last is finished."""
    for age, (name, changes) in enumerate(
        {
            "old": {"run_id": "a" * 32},
            "damaged": {"run_id": "b" * 32},
            "other": {"run_id": "c" * 32, "experiment": "[server]\nrounds = 3\n"},
            "done": {"run_id": "d" * 32, "finished": True},
        }.items()
    ):
        path = write(saved(**changes), tmp_path / "runs" / name)
        os.utime(path, (1e9 + age, 1e9 + age))
    damaged = tmp_path / "runs" / "damaged" / "round-000007.safetensors"
    damaged.write_bytes(b"nothing")
    os.utime(damaged, (2e9, 2e9))
    (tmp_path / "runs" / "empty").mkdir()
    return tmp_path / "runs"


def test_a_run_is_found_by_its_folders_name_its_path_or_its_id(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(runs, "other", "") == runs / "other"
    assert find(Path("elsewhere"), str(runs / "other"), "") == runs / "other"
    assert find(runs, "c" * 32, "") == runs / "other"
    assert find(runs, "d" * 32, "") == runs / "done"
    monkeypatch.chdir(runs.parent)
    assert find(Path("elsewhere"), "runs/old", "").resolve() == runs / "old"


def test_auto_is_the_newest_unfinished_run_of_the_experiment(runs: Path) -> None:
    assert find(runs, "auto", saved().experiment) == runs / "old"
    assert find(runs, "auto", "[server]\nrounds = 3\n") == runs / "other"
    newer = write(saved(9), runs / "newer")
    os.utime(newer, (3e9, 3e9))
    assert find(runs, "auto", saved().experiment) == runs / "newer"


@pytest.mark.parametrize("name", ["", "nobody", "empty", "e" * 32, "../..", "round-000007.safetensors"])
def test_a_run_that_is_not_there_is_named(runs: Path, name: str) -> None:
    with pytest.raises(FedmetaError, match=r"no checkpoint of a run"):
        find(runs, name, "")


def test_auto_without_a_run_reports_what_to_do(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FedmetaError, match=r"no unfinished run of this experiment in .*; leave out --resume"):
            find(root, "auto", saved().experiment)
