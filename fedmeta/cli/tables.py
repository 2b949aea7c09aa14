"""What the command line shows of results: tables. On stderr, for people; stdout is for programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmeta.experiment import UNTRACKED, Experiment, Tracking
from fedmeta.search.comparison import Comparison, compared_kind
from fedmeta.search.comparison_report import against, spread
from fedmeta.search.space import describe, short
from fedmeta.tracking.run_page import number
from fedmeta.tracking.store import shown

if TYPE_CHECKING:
    from fedmeta.search.results import StudyResult

MOST_ROWS = 60
"""How many sites a table shows; of more, the first ones."""
MAX_TRIALS = 10
"""How many trials a table shows; of more, the best ones."""
LARGE = 1e5
"""From here on an error is written with a power of ten: adaptation ran away, and digits would burst the table."""


def results(summary: Mapping[str, Any], experiment: Experiment) -> None:
    """Shows what a run came to, and the line that opens the MLflow UI on it."""
    console = Console(stderr=True)
    score, data = summary["score"], experiment.data
    name = f"{score['name']} ({score['unit']})" if score["unit"] else score["name"]
    better = "higher" if score["higher_is_better"] else "lower"
    rows = (
        f"{data.ways * data.shots if data.ways else data.support} rows" if experiment.on_rows else "a site's own data"
    )
    caption = (
        f"{name}, {better} is better, on each site's test data: what a site reaches alone on {rows}, and before and "
        "after adapting on them; worst 10 % of sites; share of sites that adapting helps, harms"
    )
    if summary.get("held_out") is False:
        caption += "; support and query are the same data by nature"
    table = Table(title=_title(summary), caption=caption, title_justify="left", caption_justify="left")
    table.padding = (0, 1, 0, 0)  # so that eight columns fit into eighty characters
    for heading in ("", "n", "alone", "global", "personalized", "worst 10 %", "helped", "harmed"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    judges = summary.get("judge", "new_sites").replace("_", " ")
    for group, name in (("new_sites", judges), ("training_sites", "training sites")):
        own = summary[group]
        table.add_row(
            name,
            str(own["n"]),
            _number(own["local_only"]["mean"]),
            _number(own["global"]["mean"]),
            f"[bold]{_number(own['personalized']['mean'])}[/]",
            _number(own["personalized"]["worst_decile"]),
            *("-" if own[key] is None else f"{own[key]:.0%}" for key in ("helped", "harmed")),
        )
    console.print(table)
    for line in _other_metrics(summary, score["name"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_after(summary, experiment), highlight=False, markup=False, soft_wrap=True)


def _other_metrics(summary: Mapping[str, Any], score: str) -> list[str]:
    """Returns a line for each further metric, pooled figure and count of sites at which a metric is undefined."""
    lines = []
    for group in ("new_sites", "training_sites"):
        own = summary[group]
        if not own["n"]:
            continue
        parts = []
        for name, values in own["personalized"]["metrics"].items():
            pooled = "" if values["pooled"] is None else f" (pooled {_number(values['pooled'])})"
            if name != score or pooled:
                parts.append(f"{name} {_number(values['mean'])}{pooled}")
        parts += [f"{name} undefined at {count}" for name, count in own["undefined"].items()]
        if parts:
            lines.append(f"{group.replace('_', ' ')}: {', '.join(parts)}")
    return lines


def comparison(found: Comparison) -> None:
    """Shows several learners, best for new sites first, and the verdict."""
    console = Console(stderr=True)
    console.print(f"[bold]{escape(found.verdict)}[/]", soft_wrap=True, highlight=False)
    score = found.score
    caption = (
        f"{score.name}{f' ({score.unit})' if score.unit else ''} of {compared_kind(found.sites)} sites, "
        f"{'higher' if score.higher_is_better else 'lower'} is better; share of sites that adapting helps, harms; "
        f"paired difference to {found.baseline}, positive is better, with its 95 % interval over sites"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), caption=caption, caption_justify="left")
    # An interval has to fit into 80 columns.
    for heading in (
        "learner",
        "global",
        "personalized",
        "worst\n10 %",
        "local-\nonly",
        "helped,\nharmed",
        "difference",
    ):
        table.add_column(heading, justify="left" if heading == "learner" else "right")
    for _, row in found.table.iterrows():
        personalized = spread(row["personalized"], row["personalized_sd"])
        others = (number(row["worst_decile"]), number(row["local_only"]))
        shares = f"{number(row['helped'], share=True)}, {number(row['harmed'], share=True)}"
        cells = (number(row["global"]), personalized, *others, shares, against(found, row))
        table.add_row(escape(str(row["learner"])), *map(escape, cells))
    console.print(table)
    for learner, reason in found.left_out.items():
        console.print(f"{learner} is left out: {reason}", highlight=False, markup=False, soft_wrap=True)
    if found.trials:
        count = len(next(iter(found.trials.values())))
        caption = f"the best of {count} for each learner, on validation sites of the first seed"
        best = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
        best.add_column("learner", no_wrap=True)
        best.add_column("best settings")
        for name in found.table["learner"]:
            best.add_row(str(name), escape(describe(found.trials[name][0].settings)))
        console.print(best)
    console.print(f"table  {found.folder / 'comparison.md'}", highlight=False, markup=False, soft_wrap=True)


def search(result: StudyResult) -> None:
    """Shows the verdict of a search, its best trials, and what to run next."""
    from fedmeta.search import search_report  # it imports Optuna and PyTorch, which the other tables do not need

    console = Console(stderr=True)
    console.print(f"[bold]{escape(search_report.verdict(result))}[/]", soft_wrap=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (result.score.name, *(short(each.key) for each in result.config.space), ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for trial in search_report.shown_trials(result, most=MAX_TRIALS):
        table.add_row(*map(escape, search_report.cells(trial, result)))
    console.print(table)
    folder = result.config.folder
    lines = {"page": folder / "tuning.md", "run it": f"fedmeta run {shlex.quote(str(folder / 'best.toml'))}"}
    for name, value in (lines | _see(result.config.experiment)).items():
        console.print(f"{name:<12}{value}", highlight=False, markup=False, soft_wrap=True)


def sites(frame: pd.DataFrame) -> None:
    """Shows a federation's sites as a table on stdout."""
    console = Console()
    table = Table(title=f"{len(frame)} sites, {int((frame['kind'] == 'new').sum())} of them new", title_justify="left")
    for column in frame.columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("site", "kind") else "right")
    for row in frame.head(MOST_ROWS).itertuples(index=False):
        table.add_row(*(_cell(column, value) for column, value in zip(frame.columns, row, strict=True)))
    console.print(table)
    if len(frame) > MOST_ROWS:
        console.print(f"... and {len(frame) - MOST_ROWS} more; --json prints all of them")


def _cell(column: str, value: Any) -> str:
    if column == "missing":
        return f"{value:.1%}"
    # A name may hold what Rich takes for a style.
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))


def _title(summary: Mapping[str, Any]) -> str:
    failed = f", {summary['failures']} failed replies" if summary["failures"] else ""
    diverged = sum(summary[group].get("diverged", 0) for group in ("new_sites", "training_sites"))
    failed += f", {diverged} sites diverged" if diverged else ""
    return (
        f"{summary['learner']}, seed {summary['seed']}: {summary['rounds']} rounds in {summary['wall_s']:.1f} s{failed}"
    )


def _after(summary: Mapping[str, Any], experiment: Experiment) -> str:
    lines = [f"checkpoint  {summary['checkpoint']}"]
    if spent := summary.get("privacy"):
        lines.insert(0, f"privacy     epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g}")
    return "\n".join([*lines, *(f"{name:<12}{value}" for name, value in _see(experiment).items())])


def _see(experiment: Experiment) -> dict[str, str]:
    """Returns the command that opens the MLflow UI; nothing where nothing is tracked."""
    tracking, usual = experiment.tracking, Tracking()
    if tracking.uri == UNTRACKED:
        return {}
    uri = "" if tracking.uri == usual.uri else f" --uri {shlex.quote(shown(tracking.uri))}"
    name = "" if tracking.experiment == usual.experiment else f" --set tracking.experiment={tracking.experiment}"
    return {"see it": f"fedmeta ui{uri}{name}"}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < LARGE else f"{value:.2e}"
