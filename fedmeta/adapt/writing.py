"""Puts a site's model into a folder: as torch state, as ONNX, for MLflow, with its card; the whole folder or none."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fedmeta.adapt import conformal, export
from fedmeta.adapt.adaptation import Adapted
from fedmeta.adapt.model import FILE
from fedmeta.adapt.model_card import card
from fedmeta.errors import FedmetaError

MLFLOW_FOLDER = "mlflow-model"
CARD = "card.md"
SUMMARY = "adapted.json"
COMPARED_ROWS = 256
"""On how many of the site's rows at most ONNX and torch are compared."""


class Written(NamedTuple):
    """What lies in the folder.

    Attributes:
        folder: The folder.
        files: The names of what is in it.
        onnx_difference: How far ONNX and torch are apart on the site's rows; None where there is no ONNX.
        note: Why there is none; empty where there is.
    """

    folder: Path
    files: tuple[str, ...]
    onnx_difference: float | None
    note: str


def check_folder(out: Path) -> None:
    """Checks that a folder can be made before anything is computed for it.

    Raises:
        FedmetaError: It is there and not empty, or its parent cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedmetaError(f"--out {out}: it is there already and not empty; name a new folder")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedmetaError(f"--out {out}: cannot be made: {error.strerror or error}") from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` to be filled, which then gets that name: the whole folder is there, or none.

    Raises:
        FedmetaError: The folder is there already, or the disk does not take it.
    """
    check_folder(out)
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
        try:
            part.chmod(0o755)
            yield part
            part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise FedmetaError(f"--out {out}: cannot be written: {error.strerror or error}") from error


def names_in(folder: Path) -> tuple[str, ...]:
    """Returns the names of what lies in a folder, sorted."""
    return tuple(sorted(path.name for path in folder.iterdir()))


def write(adapted: Adapted, out: Path) -> Written:
    """Writes everything into a new folder.

    Raises:
        FedmetaError: The folder is there already, or the disk does not take it.
    """
    with whole_folder(out) as part:
        difference, note = _fill(part, adapted)
        files = names_in(part)
    return Written(out, files, difference, note)


def _fill(folder: Path, adapted: Adapted) -> tuple[float | None, str]:
    from fedmeta.tracking import model as tracked

    start, form = adapted.start, adapted.start.form
    adapted.model.write(folder / FILE, start, adapted.summary())
    if adapted.sets:
        adapted.sets.write(folder / conformal.FILE)
    difference, note = _export(folder, adapted)
    example, columns = start.example_input()
    tracked.save(
        folder / MLFLOW_FOLDER,
        folder / FILE,
        example,
        columns,
        regression=form.regression,
        adapts=False,
    )
    (folder / SUMMARY).write_text(json.dumps(adapted.summary() | {"onnx_difference": difference}) + "\n")
    (folder / CARD).write_text(card(adapted, [path.name for path in folder.iterdir()]), encoding="utf-8")
    return difference, note


def _export(folder: Path, adapted: Adapted) -> tuple[float | None, str]:
    missing = export.missing_packages()
    if missing:
        return None, f"no model.onnx: install {' and '.join(missing)} (pip install 'fedmeta[adapt]')"
    try:
        return export.export(adapted.model, adapted.rows.x[:COMPARED_ROWS], folder / export.FILE), ""
    except FedmetaError as error:
        (folder / export.FILE).unlink(missing_ok=True)
        return None, f"no model.onnx: {error}"
