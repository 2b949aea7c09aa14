"""Thousands of mutated files: each is read, or refused in one line, in bounded time and memory, and runs nothing.

Mutations are drawn under a seed; a failure names the kind of file and the number, which make it again.
"""

import resource
import signal
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedmeta import checkpoint, trust
from fedmeta.adapt.initialization import FILE as START
from fedmeta.adapt.locate import read_start
from fedmeta.adapt.model import FILE as MODEL
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.serving import _load_pyfunc
from fedmeta.data import load_site
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data, load_experiment
from tests.adapt.finished import run

CPU_S = 5.0
"""The most processor time that one file may take (seconds); time on the wall depends on what else the machine does."""
MEMORY = 1 << 30
"""How much more memory all files together may take (bytes)."""

HUGE = (b"999999999999", b"1e308", b"-1", b"NaN", b"[" * 200, b"\0" * 64, b"\xff" * 16, b"subprocess:call", b'"' * 9)


def mutated(content: bytes, other: bytes, seed: int) -> bytes:
    """Returns content with one to four changes."""
    draw = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(int(draw.integers(1, 5))):
        # Half of all changes hit the first kilobyte, where headers lie, or the last, where archives and tables end.
        size = len(data) or 1
        near = [min(size, 1024), size, size][int(draw.integers(3))]
        place = int(draw.integers(near)) if draw.integers(4) else size - 1 - int(draw.integers(min(size, 1024)))
        length = int(draw.integers(1, 65))
        match int(draw.integers(9)):
            case 0:
                data[place : place + 1] = bytes([int(draw.integers(256))])
            case 1:
                data[place : place + length] = draw.bytes(length)
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                data[place:place] = HUGE[int(draw.integers(len(HUGE)))]
            case 6:
                start = int(draw.integers(max(1, len(other))))
                data[place : place + length] = other[start : start + length]
            case 7:
                data[place : place + 1] = bytes(
                    [(data[place] if place < len(data) else 0) ^ (1 << int(draw.integers(8)))]
                )
            case _:
                data = bytearray(data[place:] + data[:place]) if draw.integers(8) == 0 else data + bytes(length)
    return bytes(data)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes, Callable[[Path], object]]]:
    """One good file of each kind: its name, its content, and what reads it."""
    folder = tmp_path_factory.mktemp("good")
    result, start = run(folder / "runs", None, "server.rounds=1")
    start.write(folder / START)
    SiteModel.of(start, start.learner.theta(start.state)).write(folder / MODEL, start, {"a": 1})
    state = checkpoint.newest(result.folder)[1]
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(24, 3)), draw.integers(2, size=24)
    for name, save in (("rows.npz", np.savez), ("packed.npz", np.savez_compressed)):
        save(folder / name, x=x, y=y, site=np.zeros(24, dtype=np.int64), feature_names=np.array(["a", "b", "c"]))
    lines = ["a,b,c,label", *(",".join(f"{v:.3f}" for v in row) + f",{'xy'[k]}" for row, k in zip(x, y, strict=True))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    columns = {name: x[:, place] for place, name in enumerate("abc")} | {"label": [str(value) for value in y]}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    (folder / "run.toml").write_text(start.experiment.to_toml())
    tables, arrays = Data(source="tables", path="."), Data(source="npz", path=".")
    readers: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "start": (folder / START, read_start),
        "start under MLflow": (folder / START, lambda path: _load_pyfunc(str(path.parent))),
        "model": (folder / MODEL, SiteModel.read),
        "checkpoint": (state, read_start),
        "npz": (folder / "rows.npz", lambda path: load_site(arrays, str(path))),
        "packed npz": (folder / "packed.npz", lambda path: load_site(arrays, str(path))),
        "csv": (folder / "rows.csv", lambda path: load_site(tables, str(path))),
        "parquet": (folder / "rows.parquet", lambda path: load_site(tables, str(path))),
        "experiment": (folder / "run.toml", load_experiment),
    }
    return {kind: (path.name, path.read_bytes(), read) for kind, (path, read) in readers.items()}


KINDS = (
    "start", "start under MLflow", "model", "checkpoint", "npz", "packed npz", "csv", "parquet", "experiment"
)  # fmt: skip


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a file has something imported by name, or a process started."""

    def never(*arguments: Any, **_: Any) -> types.ModuleType:
        raise AssertionError(f"a file had something run: {arguments}")

    monkeypatch.setattr(trust, "import_module", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setattr("os.system", never)


def attack(kind: str, files: Any, folder: Path, seeds: range) -> int:
    """Reads mutated files; returns how many were refused."""
    name, content, read = files[kind]
    others = [other for _, other, _ in files.values()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    refused = 0

    def slow(*_: Any) -> None:
        raise TimeoutError

    read_before = signal.signal(signal.SIGPROF, slow)
    try:
        for seed in seeds:
            path = folder / name
            path.write_bytes(mutated(content, others[seed % len(others)], seed))
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            try:
                read(path)
            except FedmetaError as error:
                refused += 1
                message = str(error)
                assert len(message.splitlines()) == 1, (kind, seed, message)
                assert len(message) < 2000, (kind, seed, message[:200])
            except BaseException as error:
                raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.signal(signal.SIGPROF, read_before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY, kind
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_that_is_mutated_is_read(kind: str, files: Any, tmp_path: Path) -> None:
    name, content, read = files[kind]
    (tmp_path / name).write_bytes(content)
    read(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_files(kind: str, files: Any, tmp_path: Path, nothing_runs: None) -> None:
    assert attack(kind, files, tmp_path, range(40)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutated_files(kind: str, files: Any, tmp_path: Path, nothing_runs: None) -> None:
    count = -(-10_000 // len(KINDS))
    assert attack(kind, files, tmp_path, range(1_000, 1_000 + count)) > count / 8
