"""What a model that lies in a folder gives for the rows of a file: one line a row, as a table for people and programs.

Nothing but the folder and the file is read, and nothing leaves the machine.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedmeta.adapt import conformal
from fedmeta.adapt.conformal import Sets
from fedmeta.adapt.distance import far_rows
from fedmeta.adapt.initialization import FILE as START_FILE
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.model import FILE as MODEL_FILE
from fedmeta.adapt.model import SiteModel, decode
from fedmeta.adapt.rows import read_inputs
from fedmeta.data.table_file import TEXT_SUFFIXES, format_of
from fedmeta.errors import FedmetaError, nearest
from fedmeta.files import write_atomic

STDIN = "-"
"""The name of a file that stands for the standard input."""

BATCH = 4096
"""How many rows the model is given at once."""

_KINDS = ((b"PAR1", ".parquet"), (b"PK\x03\x04", ".npz"), (b"\x1f\x8b", ".csv.gz"))


class Predicted(NamedTuple):
    """Predictions for the rows of a file.

    Attributes:
        table: A line for each row, in the file's order: `prediction` (of several targets one column each), of classes
            `probability_CLASS` each and `set`, the classes of its prediction set between bars, of a number `low` and
            `high`; and `warning`, "" where there is none.
        notes: What to know of the file and the model, a sentence each.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def far(self) -> int:
        """How many rows have a warning."""
        return int((self.table["warning"] != "").sum())


def read_model(folder: Path, code: Collection[str] = ()) -> tuple[SiteModel, tuple[str, ...]]:
    """Returns the model in a folder, and a note where it is a run's and no site's.

    Args:
        folder: What `fedmeta adapt --out` made, its file of torch state, its `mlflow-model`, or a run's folder.
        code: What it may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).

    Raises:
        FedmetaError: There is no model in it, or it cannot be read.
    """
    for place in (folder, folder / "data"):
        if (place / MODEL_FILE).is_file():
            return SiteModel.read(place / MODEL_FILE, code), ()
        if (place / START_FILE).is_file():
            return _global(place / START_FILE, code)
    if folder.is_file():
        return _global(folder, code) if folder.name == START_FILE else (SiteModel.read(folder, code), ())
    if not folder.exists():
        there = [each.name for each in folder.absolute().parent.glob("*/") if (each / MODEL_FILE).is_file()]
        raise FedmetaError(f"{folder}: no such folder{nearest(folder.name, there)}; fedmeta adapt --out makes it")
    raise FedmetaError(f"{folder} holds no {MODEL_FILE}: name a folder that fedmeta adapt --out made")


def _global(path: Path, code: Collection[str]) -> tuple[SiteModel, tuple[str, ...]]:
    start = MetaModel.read(path, code)
    if not start.form.on_rows:
        raise FedmetaError(f"{path}: the run solves an own problem and predicts for no rows")
    note = "This is a run's global model, adapted to no site: fedmeta adapt makes a site's own."
    return SiteModel.of(start, start.learner.theta(start.state)), (note,)


def read_sets(folder: Path, model: SiteModel) -> Sets | None:
    """Returns the prediction sets in a site's folder; None where it has none, as that of a run."""
    path = (folder.parent if folder.is_file() else folder) / conformal.FILE
    return Sets.read(path, model) if path.is_file() else None


def predict(model: SiteModel, data: str, missing: Sequence[str] = (), sets: Sets | None = None) -> Predicted:
    """Returns what a model predicts for the rows of a file.

    Args:
        model: The model.
        sets: Its prediction sets.
        data: A CSV, TSV, Parquet or npz file; "-" for the standard input.
        missing: Texts that mean a missing value in the file, besides the run's.

    Raises:
        FedmetaError: The file cannot be read, lacks a column, or a cell is no number.
    """
    own = model.experiment.data
    with as_file(data) as path:
        x, notes = read_inputs(model.form, own.model_copy(update={"missing": (*own.missing, *missing)}), path)
    notes = tuple(note.replace(path, "stdin") for note in notes) if data == STDIN else notes
    with torch.no_grad():
        parts = [model(torch.from_numpy(np.ascontiguousarray(x[start : start + BATCH]))) for start in _starts(len(x))]
        inside = [_inside(sets, x[start : start + BATCH]) for start in _starts(len(x))] if sets else []
    outputs = torch.cat(parts)
    form = model.form
    predicted = decode(outputs, form)
    if predicted.ndim == 2:
        columns = {f"prediction_{name}": predicted[:, place] for place, name in enumerate(form.targets)}
    else:
        columns = {"prediction": predicted}
    if not form.regression:
        columns |= {f"probability_{name}": outputs[:, place].numpy() for place, name in enumerate(form.classes)}
    if sets:
        notes = (*notes, sets.facts.guarantee)
        ends = np.concatenate(inside)
        if form.regression:
            columns |= {"low": ends[:, 0], "high": ends[:, 1]}
        else:
            names = np.array(form.classes, dtype=object)
            columns["set"] = np.array(["|".join(names[row]) for row in ends], dtype=object)
    return Predicted(pd.DataFrame(columns | {"warning": far_rows(model, x)}), notes)


def _inside(sets: Sets, x: NDArray[np.generic]) -> NDArray[np.generic]:
    """Returns which classes are in the set of each raw row [n, classes], or the interval of its number [n, 2]."""
    rows = torch.from_numpy(np.ascontiguousarray(x))
    return sets.interval(rows) if sets.model.form.regression else sets.classes(rows)


def _starts(rows: int) -> range:
    return range(0, max(rows, 1), BATCH)


@contextmanager
def as_file(data: str) -> Iterator[str]:
    """Yields the path of a file; the standard input is put into one, by what its first bytes show it to be."""
    if data != STDIN:
        yield data
        return
    import sys

    content = sys.stdin.buffer.read()
    if not content.strip():
        raise FedmetaError("--data -: the standard input is empty")
    suffix = next((suffix for first, suffix in _KINDS if content.startswith(first)), TEXT_SUFFIXES[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"stdin{suffix}"
        path.write_bytes(content)
        try:
            yield str(path)
        except FedmetaError as error:
            raise FedmetaError(str(error).replace(str(path), "stdin")) from None


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Writes predictions as CSV or Parquet, by the file's suffix, atomically.

    Raises:
        FedmetaError: The suffix is another, or the disk does not take it.
    """
    check_out(out)
    content = io.BytesIO()
    if format_of(out) == ".csv":
        table.to_csv(content, index=False)
    else:
        table.to_parquet(content, index=False)
    try:
        write_atomic(out, content.getvalue())
    except OSError as error:
        raise FedmetaError(f"--out {out}: cannot be written: {error.strerror or error}") from error


def check_out(out: Path) -> None:
    """Checks that predictions can be written to a file of this name; raises `FedmetaError` where they cannot."""
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise FedmetaError(f"--out {out}: name a file that ends in .csv or .parquet")
    if not out.absolute().parent.is_dir():
        raise FedmetaError(f"--out {out}: there is no folder {out.parent}")
