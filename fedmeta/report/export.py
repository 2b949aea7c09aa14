"""A report's figures and tables as files for a paper: SVG and PDF, CSV and LaTeX, with the captions beside them."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from fedmeta.errors import FedmetaError
from fedmeta.report.document import Block, Folded, Picture, Pictures
from fedmeta.report.latex import latex_table
from fedmeta.report.on_comparison import on_comparison
from fedmeta.report.on_run import on_run
from fedmeta.report.reading import Run, read
from fedmeta.report.writing import csv_table

CAPTIONS = "captions.md"

SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "pdf.fonttype": 42}
"""Letters stay text, which publishers can edit, and not outlines."""


def export(names: Sequence[str], out: Path, root: Path, uri: str) -> list[Path]:
    """Writes every figure of a report as SVG and PDF, and every table as CSV and LaTeX, into a new folder.

    Args:
        names: What the report is about, as `fedmeta.report.reading.read` takes it.
        out: The folder; must not be there, or be empty.
        root: The folder of all runs.
        uri: The MLflow store that is asked for what is not there.

    Returns:
        The files: figures, tables, and `captions.md` with a line for each. A picture that an own problem drew as pixels
        stays a PNG file.

    Raises:
        FedmetaError: What to report on is not found or has not ended, or the folder cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedmetaError(f"--export {out}: it is there already and not empty; name a new folder")
    about = read(names, root, uri)
    document = on_run(about) if isinstance(about, Run) else on_comparison(about)
    captions = [f"# {document.title}", "", document.lead, ""]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
        try:
            part.chmod(0o755)
            for picture in (each for section in document.sections for each in _pictures(section.blocks)):
                files = _draw(picture, part)
                captions.append(f"- {', '.join(files)}: {picture.caption}")
            for table in document.tables():
                (part / f"{table.name}.csv").write_text(csv_table(table), encoding="utf-8")
                (part / f"{table.name}.tex").write_text(latex_table(table) + "\n", encoding="utf-8")
                captions.append(f"- {table.name}.csv, {table.name}.tex: {table.caption or 'no caption'}")
            (part / CAPTIONS).write_text("\n".join(captions) + "\n", encoding="utf-8")
            part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise FedmetaError(f"--export {out}: cannot be written: {error.strerror or error}") from error
    return sorted(out.iterdir())


def _pictures(blocks: Iterable[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Pictures):
            yield from block.pictures
        elif isinstance(block, Folded):
            yield from _pictures(block.blocks)


def _draw(picture: Picture, folder: Path) -> list[str]:
    """Writes a figure's files into a folder; returns their names."""
    if isinstance(picture.image, bytes):
        (folder / f"{picture.name}.png").write_bytes(picture.image)
        return [f"{picture.name}.png"]
    names = []
    # Without dates and with fixed identifiers the same run gives the same bytes.
    dates = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": picture.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        for kind, metadata in dates.items():
            names.append(f"{picture.name}.{kind}")
            picture.image.savefig(folder / names[-1], format=kind, metadata=metadata)
    return names
