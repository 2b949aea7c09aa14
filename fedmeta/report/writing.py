"""Writes a report's files."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedmeta.errors import FedmetaError
from fedmeta.files import write_atomic
from fedmeta.report import parts
from fedmeta.report.document import Table
from fedmeta.report.html import html_page
from fedmeta.report.latex import latex_page
from fedmeta.report.markdown import markdown_page
from fedmeta.report.on_comparison import on_comparison, shared
from fedmeta.report.on_run import on_run
from fedmeta.report.reading import Compared, Run, read
from fedmeta.tables import Cell
from fedmeta.versions import __version__

HTML, MARKDOWN, LATEX = "report.html", "report.md", "report.tex"
PICTURES, TABLES = "report_pictures", "report_tables"
FOLDER = "report"
FORMULA = tuple("=+-@\t\r")


def write(names: Sequence[str], out: Path | None, root: Path, uri: str) -> list[Path]:
    """Writes a report into a folder as HTML, Markdown and LaTeX, its tables as CSV, and the experiment file.

    Args:
        names: What the report is about, as `fedmeta.report.reading.read` takes it.
        out: The folder; None = `report` in the run's or the comparison's folder, or here where it has none.
        root: The folder of all runs.
        uri: The MLflow store that is asked for what is not there.

    Returns:
        report.html, report.md, report.tex, and the folder of the tables.

    Raises:
        FedmetaError: What to report on is not found or has not ended, or the folder cannot be written.
    """
    about = read(names, root, uri)
    document = on_run(about) if isinstance(about, Run) else on_comparison(about)
    folder = out or (about.folder or Path()) / FOLDER
    footer = f"fedmeta {__version__}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC."
    try:
        for earlier in (folder / PICTURES, folder / TABLES):
            shutil.rmtree(earlier, ignore_errors=True)
        (folder / TABLES).mkdir(parents=True)
        files = {
            MARKDOWN: markdown_page(document, footer, folder / PICTURES),
            LATEX: latex_page(document, footer, PICTURES),
            HTML: html_page(document, footer),
            **{f"{TABLES}/{table.name}.csv": csv_table(table) for table in document.tables()},
        }
        if experiment := _experiment(about):
            files[parts.EXPERIMENT_FILE] = experiment
        for name, text in files.items():
            write_atomic(folder / name, text.encode())
    except OSError as error:
        raise FedmetaError(f"--out {folder}: cannot be written: {error.strerror or error}") from error
    return [folder / name for name in (HTML, MARKDOWN, LATEX, TABLES)]


def csv_table(table: Table) -> str:
    """Returns a table as CSV, its numbers in full; empty where undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([table.headings, *([_cell(cell) for cell in row] for row in table.rows)])
    return text.getvalue()


def _cell(cell: Cell) -> Cell:
    if isinstance(cell, str):
        # Spreadsheets execute cells that begin like a formula, and names of sites may hold anything.
        return f"'{cell}" if cell[:1] in FORMULA else cell
    return cell if cell is not None and math.isfinite(cell) else None


def _experiment(about: Run | Compared) -> str:
    if isinstance(about, Run):
        return parts.without_tracking(about.experiment).to_toml()
    if about.command and about.runs:
        return parts.without_tracking(shared(about)).to_toml()
    return ""
