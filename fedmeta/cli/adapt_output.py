"""What people see of an adaptation: progress while it runs, then the table, the advice and the files. On stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedmeta.adapt.adaptation import Adapted
from fedmeta.adapt.estimate import SplitProgress
from fedmeta.adapt.intervals import LEVEL, Estimate
from fedmeta.adapt.model_card import measured_sets
from fedmeta.adapt.own_problem import Solved
from fedmeta.adapt.writing import Written
from fedmeta.cli.folding import fitted
from fedmeta.signing import UNSIGNED
from fedmeta.tables import number


@contextmanager
def progress() -> Iterator[SplitProgress]:
    """Shows a bar of the choices made, where stderr is a terminal; yields what feeds it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("choosing how far to adapt", total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)


def show(adapted: Adapted, written: Written) -> None:
    """Shows what the site's rows show and where its model lies."""
    console = Console(stderr=True)
    start, found, test = adapted.start, adapted.judgement, adapted.test
    # The names are a file's and a run's own, and may hold what Rich takes for a style.
    title = escape(f"{adapted.name}: {len(adapted.rows)} rows, {start.name} after {start.round_number} rounds")
    table = Table(title=title, title_justify="left")
    headings = ["", found.before.metric, f"{LEVEL:.0%} interval", *([f"{test.rows} test rows"] if test else [])]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row("global", *_cells(found.before, test.before if test else None, bold=not found.steps))
    if found.chosen:
        steps = f"{found.chosen} inner step{'s' if found.chosen > 1 else ''}"
        table.add_row(
            f"personalized, {steps}", *_cells(found.after, test.after if test else None, bold=bool(found.steps))
        )
    console.print(fitted(table, console))
    console.print(f"[bold]{escape(adapted.advice)}[/]", soft_wrap=True, highlight=False)
    if adapted.sets:
        for line in (adapted.sets.facts.guarantee, *measured_sets(adapted)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if start.signature != UNSIGNED:
        console.print(f"start {start.signature}", highlight=False, markup=False)
    for warning in (*adapted.warnings, *([written.note] if written.note else [])):
        console.print(f"note  {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"model {written.folder}: {', '.join(written.files)}", highlight=False, markup=False, soft_wrap=True)


def show_solved(solved: Solved, written: Written) -> None:
    """Shows an own problem's scores before and after adapting, and where the parameters lie."""
    console = Console(stderr=True)
    start = solved.start
    steps = f"{solved.steps} inner step{'s' if solved.steps != 1 else ''}"
    table = Table(
        title=escape(f"{solved.name}: {steps} from {start.name} after {start.round_number} rounds"),
        title_justify="left",
    )
    for heading in ("on the query", "before", "after"):
        table.add_column(heading, justify="left" if heading == "on the query" else "right")
    for metric in solved.metrics:
        values = (number(solved.scores[place][metric.name]) for place in (0, -1))
        table.add_row(escape(metric.name + (f" ({metric.unit})" if metric.unit else "")), *values)
    console.print(fitted(table, console))
    console.print(f"[bold]{escape(solved.advice)}[/]", soft_wrap=True, highlight=False)
    for warning in (*solved.warnings, *([written.note] if written.note else [])):
        console.print(f"note  {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"files {written.folder}: {', '.join(written.files)}", highlight=False, markup=False, soft_wrap=True)


def _cells(estimate: Estimate, test: float | None, bold: bool) -> list[str]:
    score = number(estimate.score)
    cells = [f"[bold]{score}[/]" if bold else score, f"{number(estimate.low)} to {number(estimate.high)}"]
    return [*cells, *([number(test)] if test is not None else [])]
