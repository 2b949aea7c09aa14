"""What the command line shows of results: tables. On stderr, for people; stdout is for programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmeta.cli.folding import fitted
from fedmeta.experiment import UNTRACKED, Experiment, Tracking, without_user_info
from fedmeta.search.comparison import Comparison, budget, compared_kind
from fedmeta.search.comparison_report import against, spread
from fedmeta.search.space import describe, short
from fedmeta.tables import (
    groups,
    ledger_lines,
    local_methods,
    number,
    percent,
    score_label,
    stream_lines,
    subgroups_table,
    text,
    with_diverged,
)
from fedmeta.tracking.description import data_name

if TYPE_CHECKING:
    from fedmeta.search.results import StudyResult
    from fedmeta.unlearning.values import Values

MOST_COLUMNS = 60
MOST_ROWS = 60
"""How many sites a table shows; of more, the first ones."""
MAX_TRIALS = 10
"""How many trials a table shows; of more, the best ones."""
LANDSCAPE = {
    "loss": "meta-objective: mean query loss after adapting",
    "gradient_norm": "norm of its gradient",
    "largest_eigenvalue": "largest eigenvalue of its Hessian",
    "smallest_eigenvalue": "smallest eigenvalue",
    "negative_share": "share of negative curvature",
    "flat_share": "share of flat directions (below 1e-4 of the largest)",
    "condition": "largest size over the median size of the others",
    "gradient_cosine": "mean cosine of two sites' meta-gradients",
    "gradient_product": "mean inner product of them",
    "path_cosine": "mean cosine of two sites' adaptation paths",
    "path_product": "mean inner product of them",
}
"""The figures of a landscape, as its table names them."""


def results(summary: Mapping[str, Any], experiment: Experiment) -> None:
    """Shows the results of a run, and the line that opens the MLflow UI on it."""
    console = Console(stderr=True)
    data = experiment.data
    rows = f"{data.ways * data.shots if data.ways else data.support} rows" if experiment.on_rows else "its own data"
    caption = (
        f"{score_label(summary)}, on each site's test data: what a site reaches local-only on {rows}, and before and "
        "after adapting on them; worst 10 % of sites; share of sites that adapting helps, harms"
    )
    if methods := local_methods(summary):
        caption += f"; local-only is the best by cross-validation: {methods}"
    if summary.get("held_out") is False:
        caption += "; support and query are the same data by nature"
    title = _title(summary)
    padding = (0, 1, 0, 0)  # fits into 80 columns
    table = Table(title=title, caption=caption, padding=padding, title_justify="left", caption_justify="left")
    for heading in ("", "n", "local-\nonly", "global", "personalized", "worst\n10 %", "helped", "harmed"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, own in groups(summary):
        table.add_row(
            label,
            str(own["n"]),
            number(own["local_only"]["mean"]),
            number(own["global"]["mean"]),
            f"[bold]{number(own['personalized']['mean'])}[/]",
            number(own["personalized"]["worst_decile"]),
            percent(own["helped"]),
            percent(own["harmed"]),
        )
    console.print(fitted(table, console))
    _show_subgroups(console, summary, experiment)
    for line in [*_other_metrics(summary), *stream_lines(summary), *ledger_lines(summary)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_after(summary, experiment), highlight=False, markup=False, soft_wrap=True)


def _show_subgroups(console: Console, summary: Mapping[str, Any], experiment: Experiment) -> None:
    """Shows the score by subgroup, where the run has such."""
    found = subgroups_table(summary)
    if not found.rows:
        return
    smallest = experiment.evaluation.smallest_subgroup
    table = Table(
        title=f"{summary['score']['name']} by subgroup",
        caption=f"pooled: over the test rows of sites that show at least {smallest} of the subgroup",
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("", "", "sites", "rows", "global", "personalized"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for name, label, sites, rows, before, after, *_ in found.rows:
        table.add_row(escape(str(name)), str(label), str(sites), str(rows), text(before), text(after))
    console.print(fitted(table, console))


def _other_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Returns a line for each group's further metrics, pooled figures, and metrics that are undefined at some sites."""
    lines = []
    for label, own in groups(summary):
        parts = []
        for name, values in own["personalized"]["metrics"].items():
            bound = f" ± {values['pooled_bound']:.1g}" if values.get("pooled_bound") else ""
            pooled = "" if values["pooled"] is None else f" (pooled {number(values['pooled'])}{bound})"
            if name != summary["score"]["name"] or pooled:
                parts.append(f"{name} {number(values['mean'])}{pooled}")
        if classical := own.get("classical"):
            taken = f" by {classical['evaluations']:.0f} evaluations" if classical["evaluations"] else ""
            parts.append(f"classical method {number(classical['mean'])}{taken}")
        if optimum := own.get("optimum"):
            parts.append(f"optimum {number(optimum['mean'])}")
        parts += [f"{name} undefined at {count}" for name, count in own["undefined"].items()]
        parts += with_diverged(own)
        lines += [f"{label}: {', '.join(parts)}"] if parts else []
    return lines


def site_values(found: Values) -> None:
    """Shows what each training site is worth, the most valuable for new sites first."""
    console = Console(stderr=True)
    score = f"{found.score}, {'higher' if found.higher_is_better else 'lower, with its sign turned,'} is better"
    for group, label in (("new_sites", "new sites"), ("training_sites", "training sites")):
        if group not in found.everyone:
            continue
        title = f"what each site adds at {label}: {number(found.start[group])} without any, "
        title += f"{number(found.everyone[group])} with all ({score})"
        caption = f"Shapley: mean of {found.pairs} pairs of orders and a 95 % interval; {found.runs} runs"
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        table.add_column("site")
        for heading in ("leave-one-out", "Shapley", "±"):
            table.add_column(heading, justify="right")
        shown = found.shapley[group] if found.pairs else found.left_out[group]
        for place in shown.argsort()[::-1][:MOST_ROWS].tolist():
            cells = (found.left_out[group], found.shapley[group], found.half_width[group])
            table.add_row(escape(found.names[place]), *(number(float(each[place])) for each in cells))
        console.print(fitted(table, console))
        if (more := len(found.names) - MOST_ROWS) > 0:
            console.print(f"and {more} more: --json, or the file", highlight=False)


def comparison(found: Comparison) -> None:
    """Shows several learners, best for new sites first, and the verdict."""
    console = Console(stderr=True)
    console.print(f"[bold]{escape(found.verdict)}[/]", soft_wrap=True, highlight=False)
    if found.privacy:
        console.print(escape(found.privacy), soft_wrap=True, highlight=False)
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
        shares = f"{percent(row['helped'])}, {percent(row['harmed'])}"
        cells = (number(row["global"]), personalized, *others, shares, against(found, row))
        table.add_row(escape(str(row["learner"])), *map(escape, cells))
    console.print(fitted(table, console))
    if early := budget(found.runs):
        console.print(escape(early), highlight=False, soft_wrap=True)
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
        console.print(fitted(best, console))
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
    console.print(fitted(table, console))
    folder = result.config.folder
    lines = {"page": folder / "tuning.md", "run it": f"fedmeta run {shlex.quote(str(folder / 'best.toml'))}"}
    for name, value in (lines | _see(result.config.experiment)).items():
        console.print(f"{name:<12}{value}", highlight=False, markup=False, soft_wrap=True)


def landscape(figures: Mapping[str, Any], title: str, folder: Path) -> None:
    """Shows the landscape of a run."""
    console = Console(stderr=True)
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for key, label in LANDSCAPE.items():
        table.add_row(label, number(figures[key]))
    console.print(fitted(table, console))
    about = f"{figures['sites']} sites, {int(figures['parameters']):,} parameters, {figures['probes']} random starts"
    console.print(f"{about} of {figures['steps']} Lanczos steps", highlight=False)
    console.print(f"files       {folder}", highlight=False, markup=False, soft_wrap=True)


def sites(frame: pd.DataFrame) -> None:
    """Shows a federation's sites as a table on stdout."""
    console = Console()
    table = Table(title=f"{len(frame)} sites, {int((frame['kind'] == 'new').sum())} of them new", title_justify="left")
    for column in frame.columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("site", "kind") else "right")
    for row in frame.head(MOST_ROWS).itertuples(index=False):
        table.add_row(*(_cell(column, value) for column, value in zip(frame.columns, row, strict=True)))
    console.print(fitted(table, console))
    if len(frame) > MOST_ROWS:
        console.print(f"... and {len(frame) - MOST_ROWS} more; --json prints all of them")


def columns(frame: pd.DataFrame, task: str, classes: Sequence[tuple[str, int]]) -> None:
    """Shows on stdout what the labels are and, one by one, a table's columns.

    Args:
        frame: One row per column (`fedmeta.data.findings.summarize_columns`); empty where rows are no named vectors.
        task: What the labels are, and why.
        classes: The classes and how many rows each has.
    """
    console = Console()
    shown = ", ".join(f"{name} ({count})" for name, count in classes[:MOST_ROWS])
    more = f" and {len(classes) - MOST_ROWS} more" if len(classes) > MOST_ROWS else ""
    line = f"labels  {task}{f': {shown}{more}' if classes else ''}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if frame.empty:
        return
    table = Table(title=f"{len(frame)} columns", title_justify="left")
    headings = {"site_means": "mean by site, lowest to highest", "low": "min", "high": "max"}
    kept = [name for name in frame.columns if name in ("column", "type", "missing") or frame[name].notna().any()]
    for name in kept:
        left = name in ("column", "type", "site_means", "values")
        table.add_column(headings.get(name, name), justify="left" if left else "right", overflow="fold")
    for _, row in frame.head(MOST_COLUMNS).iterrows():
        table.add_row(*("" if pd.isna(row[name]) else _cell(name, row[name]) for name in kept))
    console.print(fitted(table, console))
    if len(frame) > MOST_COLUMNS:
        console.print(f"... and {len(frame) - MOST_COLUMNS} more columns")


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
    uri = "" if tracking.uri == usual.uri else f" --uri {shlex.quote(without_user_info(tracking.uri))}"
    own = tracking.experiment
    name = "" if own == usual.experiment else f" --set {shlex.quote(f'tracking.experiment={own}')}"
    return {"see it": f"fedmeta ui --data {shlex.quote(data_name(experiment.params()))}{uri}{name}"}
