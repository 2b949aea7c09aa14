"""Whatever a file holds, its reader refuses it in one line, and takes little memory for that."""

import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedmeta import checkpoint
from fedmeta.adapt.initialization import FILE as START
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.locate import read_start
from fedmeta.adapt.model import FILE as MODEL
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.serving import StartServer, _load_pyfunc
from fedmeta.data import load_site, table_file
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data, Experiment
from tests.adapt.finished import run

MIB = 1 << 20
DEEP = "[" * 100_000


def refused(read: Callable[[], object], most: int = 512 * MIB) -> str:
    """Returns the one line of a refusal, which took the process at most so much more memory (bytes)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with pytest.raises(FedmetaError) as error:
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < most
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    return message


# ---------------------------------------------------------------- tables


def table(path: Path, **settings: Any) -> str:
    return refused(lambda: load_site(Data(source="tables", path=".", **settings), str(path)))


@pytest.mark.slow
def test_a_cell_of_fifty_megabytes(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    cell = "9" * (50 * MIB) + "z"
    file.write_text(f"a,b,label\n1,2,x\n{cell},3,y\n")
    assert 'line 3, column "a" is "9999' in table(file)
    file.write_text(f'a,b,label\n1,2,x\n"{cell}",3,y\n')
    assert 'line 3, column "a" is "9999' in table(file)
    file.write_text(f"a,b,label\n1,2,x\n1,3,{cell}\n")
    assert "is a text of 52,428,801 characters, and no label" in table(file)
    file.write_text(f"a,{cell},label\n1,2,x\n")
    assert "a cell of its first line is longer than any name" in table(file)


@pytest.mark.slow
def test_two_hundred_thousand_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    names = [f"c{number}" for number in range(200_000)]
    file.write_text(f"{','.join([*names, 'label'])}\n{'1,' * 200_000}x\n")
    assert "200,001 columns, and a table may have 50,000: save it as an npz file" in table(file)
    pq.write_table(pa.table({name: [1.0] for name in names[:50_001]}), tmp_path / "a.parquet")
    assert "50,001 columns" in table(tmp_path / "a.parquet")


@pytest.mark.slow
def test_many_columns_that_are_not_the_label_are_not_all_listed(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",".join(f"column-{number}" for number in range(5_000)) + "\n" + ",".join(["1"] * 5_000) + "\n")
    assert "column-19 and 4980 more" in table(file)


def test_an_open_quote_takes_the_rest_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('a,b,label\n1,2,x\n"' + "1,2,x\n" * 200_000)
    assert "EOF inside string" in table(file)


def test_a_parquet_file_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_file, "free_memory", lambda: 32 * MIB)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.zeros(4 * MIB), "label": np.zeros(4 * MIB, dtype=np.int8)}), file)
    assert file.stat().st_size < MIB
    assert "more than half of the free memory" in table(file)


# ---------------------------------------------------------------- arrays


def npy(shape: tuple[int, ...], size: int = 0, header: str = "") -> bytes:
    """An array's header, and `size` bytes of zeros."""
    text = header or repr({"descr": "<f8", "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 65536) + text.encode() + bytes(size)


def npz(path: Path, x: bytes, compress: bool = True) -> Path:
    rows = {"y.npy": np.zeros(4, dtype=np.int64), "site.npy": np.zeros(4, dtype=np.int64)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("x.npy", x)
        for name, array in rows.items():
            with archive.open(name, "w") as file:
                np.lib.format.write_array(file, array)
    return path


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (npy((10**12, 3), 64), "announces 24,000,000,000,000 bytes and has"),
        (npy((10**30,), 64), "announces"),
        (npy((-1,), 64), "cannot be read"),
        (npy((4,), header="{" * 60_000), "cannot be read"),
        (npy((4,), header="(" * 9_000), "cannot be read"),
        (b"not an array", "cannot be read"),
        (b"", "cannot be read"),
    ],
    ids=["terabytes", "beyond 64 bits", "a negative length", "a long header", "a deep header", "no array", "nothing"],
)
@pytest.mark.parametrize("compress", [True, False])
def test_an_array_that_is_none(x: bytes, message: str, compress: bool, tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", x, compress)
    assert message in refused(lambda: load_site(Data(source="npz", path="."), str(file)))


def test_an_array_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmeta.data import npz_file

    monkeypatch.setattr(npz_file, "free_memory", lambda: 64 * MIB)
    file = npz(tmp_path / "a.npz", npy((8 * MIB,), 64 * MIB))
    assert file.stat().st_size < MIB
    message = refused(lambda: load_site(Data(source="npz", path="."), str(file)), most=48 * MIB)
    assert "more than half of the free memory" in message


# ---------------------------------------------------------------- experiments


@pytest.mark.parametrize(
    "text",
    [
        "x" * (2 * MIB),
        "[a]\n" * 250_000,
        f"a = {DEEP}",
        "a" + ".a" * 100_000 + " = 1",
        "\0",
        "# " + "é" * 600_000 + "\n[",
    ],
    ids=["long", "twice", "deep", "dotted", "nul", "comment"],
)
def test_an_experiment_that_is_none(text: str) -> None:
    refused(lambda: Experiment.from_toml(text, "e.toml"))


# ---------------------------------------------------------------- what is exported


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaModel, checkpoint.Checkpoint]:
    result, found = run(tmp_path_factory.mktemp("finished"), None, "server.rounds=1")
    return found, checkpoint.newest(result.folder)[0]


def changed(file: Path, texts: dict[str, str], tensors: dict[str, torch.Tensor | None]) -> Path:
    """Writes a safetensors file again with some of its texts and tensors replaced, or left out."""
    with safe_open(file, framework="pt") as read:
        old_texts, old = dict(read.metadata()), {name: read.get_tensor(name) for name in read.offset_keys()}
    new = {name: value for name, value in {**old, **tensors}.items() if value is not None}
    save_file(new, file, {**old_texts, **texts})
    return file


def header(**values: Any) -> dict[str, str]:
    form = {
        "shape": [8, 8],
        "features": [],
        "classes": [str(n) for n in range(10)],
        "regression": False,
        "tokens": False,
    }
    usual = {"run_id": "r", "round_number": 1, "form": form, "steps": 5, "rate": 1.0, "finished": True}
    return {"header": json.dumps({**usual, **values, "form": {**form, **values.get("form", {})}})}


HUGE = '[model]\nhidden = "900000000,900000000"\n'
STARTS: dict[str, tuple[dict[str, str], dict[str, torch.Tensor | None]]] = {
    "no JSON": ({"header": "{"}, {}),
    "deep JSON": ({"header": DEEP}, {}),
    "a list": ({"header": "[]"}, {}),
    "a run's id that is a number": (header(run_id=5), {}),
    "a round that is a text": (header(round_number="1"), {}),
    "a round that is true": (header(round_number=True), {}),
    "a negative round": (header(round_number=-1), {}),
    "endless steps": (header(steps=10**9), {}),
    "steps beyond 64 bits": (header(steps=10**40), {}),
    "a rate of zero": (header(rate=0.0), {}),
    "a rate that is not a number": ({"header": header()["header"].replace('"rate": 1.0', '"rate": NaN')}, {}),
    "a shape that is a text": (header(form={"shape": "8,8"}), {}),
    "an empty shape": (header(form={"shape": []}), {}),
    "a negative shape": (header(form={"shape": [-8, 8]}), {}),
    "a shape without end": (header(form={"shape": [10**6, 10**6, 10**6]}), {}),
    "another shape": (header(form={"shape": [8, 9]}), {}),
    "a class twice": (header(form={"classes": ["a", "a"]}), {}),
    "classes that are numbers": (header(form={"classes": [1, 2]}), {}),
    "no classes": (header(form={"classes": []}), {}),
    "regression with classes": (header(form={"regression": True}), {}),
    "names of other features": (header(form={"shape": [64], "features": ["a"]}), {}),
    "an experiment of no keys": ({"experiment": "[server]\nround = 1"}, {}),
    "an experiment that is deep": ({"experiment": f"a = {DEEP}"}, {}),
    "a model without bounds": ({"experiment": HUGE}, {}),
    "a model of endless layers": ({"experiment": f'[model]\nhidden = "{"1," * 100_000}1"\n'}, {}),
    "inner steps without end": ({"experiment": "[learner]\ninner_steps = 1000000000\n[model]\nhidden='8'"}, {}),
    "another model": ({"experiment": '[model]\nname = "cnn"\n'}, {}),
    "a model for other rows": ({"experiment": '[model]\nname = "char_lstm"\n'}, {}),
    "no mean": ({}, {"standardisation.mean": None}),
    "a mean of another shape": ({}, {"standardisation.mean": torch.zeros(7)}),
    "a mean of integers": ({}, {"standardisation.mean": torch.zeros(8, 8, dtype=torch.int64)}),
    "a scale of zero": ({}, {"standardisation.scale": torch.zeros(8, 8)}),
    "an endless scale": ({}, {"standardisation.scale": torch.full((8, 8), float("inf"))}),
    "a parameter too many": ({}, {"theta.other": torch.zeros(3)}),
    "a parameter too few": ({}, {"theta.1.weight": None}),
    "a parameter of another shape": ({}, {"theta.1.weight": torch.zeros(3, 3)}),
    "a parameter that is not finite": ({}, {"theta.1.bias": torch.full((8,), float("nan"))}),
    "a parameter of integers": ({}, {"theta.1.bias": torch.zeros(8, dtype=torch.int64)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_is_none(case: str, start: Any, tmp_path: Path) -> None:
    start[0].write(tmp_path / START)
    changed(tmp_path / START, *STARTS[case])
    message = refused(lambda: read_start(tmp_path / START), most=128 * MIB)
    assert str(tmp_path) in message
    assert refused(lambda: _load_pyfunc(str(tmp_path))) == message


def test_the_start_that_the_cases_change_is_one(start: Any, tmp_path: Path) -> None:
    start[0].write(tmp_path / START)
    changed(tmp_path / START, header(), {})
    assert read_start(tmp_path / START).digest == start[0].digest


MODELS: dict[str, tuple[dict[str, str], dict[str, torch.Tensor | None]]] = {
    "no JSON": ({"form": "{"}, {}),
    "deep JSON": ({"form": DEEP}, {}),
    "a form without classes": ({"form": json.dumps({"shape": [8, 8]})}, {}),
    "a model without bounds": ({"experiment": HUGE}, {}),
    "no mean": ({}, {"mean": None}),
    "a scale of zero": ({}, {"scale": torch.zeros(8, 8)}),
    "a parameter too many": ({}, {"network.other": torch.zeros(3)}),
    "a parameter too few": ({}, {"network.1.weight": None}),
    "a parameter of another shape": ({}, {"network.1.weight": torch.zeros(3, 3)}),
    "a parameter that is not finite": ({}, {"network.1.bias": torch.full((8,), float("nan"))}),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_sites_model_that_is_none(case: str, start: Any, tmp_path: Path) -> None:
    found, _ = start
    SiteModel.of(found, found.learner.theta(found.state)).write(tmp_path / MODEL, found, {})
    SiteModel.read(tmp_path / MODEL)
    changed(tmp_path / MODEL, *MODELS[case])
    assert str(tmp_path) in refused(lambda: _load_pyfunc(str(tmp_path)), most=128 * MIB)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "a run's id that is a number": {"run_id": 5},
    "an experiment that is a list": {"experiment": ["a"]},
    "names that are numbers": {"names": (1, 2)},
    "a shape of texts": {"shape": ("8", "8")},
    "classes that are a text": {"classes": 5},
    "a schedule that is a list": {"schedule": []},
    "finished that is a text": {"finished": "yes"},
    "a model without bounds": {"experiment": HUGE},
    "a shape without end": {"shape": (10**6, 10**6, 10**6)},
    "steps without end": {"schedule": {"steps": 10**9, "rate": 1.0}},
    "a rate that is a text": {"schedule": {"steps": 1, "rate": "fast"}},
    "an impossible regression": {"regression": True},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_none(case: str, start: Any, tmp_path: Path) -> None:
    path = checkpoint.write(replace(start[1], **CHECKPOINTS[case]), tmp_path)
    refused(lambda: read_start(path), most=128 * MIB)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 10) + b"{",
        struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        struct.pack("<Q", 90 * MIB) + b'{"__metadata__":{"format":"' + b"x" * (90 * MIB - 30) + b'"}}',
    ],
    ids=["nothing", "no length", "a header of a terabyte", "half a header", "a deep header", "a header of 90 MB"],
)
@pytest.mark.parametrize("name", [START, "round-000001.safetensors"])
def test_a_file_that_is_none(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_start(tmp_path / name), most=1024 * MIB)


@pytest.mark.parametrize(
    "text", [DEEP, "{", "5", "[]", '["' + "x" * MIB], ids=["deep", "half", "a number", "none", "open"]
)
def test_a_support_that_is_none(text: str, start: Any) -> None:
    server, rows = StartServer(start[0]), np.zeros((1, 8, 8), dtype=np.float32)
    refused(lambda: server.predict(rows, {"support_x": text, "support_y": '["1"]'}))


def test_memory_is_that_of_the_machine() -> None:
    from fedmeta.files import free_memory

    assert 0 < free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
