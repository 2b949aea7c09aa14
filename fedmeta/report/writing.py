"""Writes a report's files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedmeta import __version__
from fedmeta.errors import FedmetaError
from fedmeta.files import write_atomic
from fedmeta.report import parts
from fedmeta.report.html_page import html_page
from fedmeta.report.markdown_page import markdown_page
from fedmeta.report.on_comparison import on_comparison, shared
from fedmeta.report.on_run import on_run
from fedmeta.report.reading import Compared, Run, read
from fedmeta.tracking.results import quiet_matplotlib

HTML, MARKDOWN, PICTURES = "report.html", "report.md", "report_pictures"
FOLDER = "report"


def write(names: Sequence[str], out: Path | None, root: Path, uri: str) -> list[Path]:
    """Writes report.html, report.md with its pictures, and the experiment file into a folder; returns the first two.

    Args:
        names: What the report is about, as `fedmeta.report.reading.read` takes it.
        out: The folder; None = `report` in the run's or the comparison's own folder, or here where it has none.
        root: The folder of all runs.
        uri: The MLflow store that is asked for what is not there.

    Raises:
        FedmetaError: What to report on is not found or has not ended, or the folder cannot be written.
    """
    quiet_matplotlib()
    about = read(names, root, uri)
    document = on_run(about) if isinstance(about, Run) else on_comparison(about)
    folder = out or (about.folder or Path()) / FOLDER
    footer = f"fedmeta {__version__}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = markdown_page(document, footer, folder / PICTURES)
        write_atomic(folder / HTML, html_page(document, footer).encode())
        write_atomic(folder / MARKDOWN, text.encode())
        if experiment := _experiment(about):
            write_atomic(folder / parts.EXPERIMENT_FILE, experiment.encode())
    except OSError as error:
        raise FedmetaError(f"--out {folder}: cannot be written: {error.strerror or error}") from error
    return [folder / HTML, folder / MARKDOWN]


def _experiment(about: Run | Compared) -> str:
    if isinstance(about, Run):
        return parts.where_left_out(about.experiment).to_toml()
    if about.command and about.runs:
        return parts.where_left_out(shared(about)).to_toml()
    return ""
