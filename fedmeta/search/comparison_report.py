"""A comparison as Markdown, as JSON, and as one run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from fedmeta.experiment import Experiment
from fedmeta.launch import tracked
from fedmeta.search.comparison import Comparison, budget, compared_kind, interval, sites_by_learner
from fedmeta.search.space import describe
from fedmeta.tables import markdown_table, number, percent, plain
from fedmeta.tracking.description import NAMED_SITES, data_name
from fedmeta.tracking.experiment_view import COMPARISON
from fedmeta.tracking.metrics import metric_suffixes
from fedmeta.tracking.parent_run import ParentRun, parent_run

CHARTS = {
    "global": "new_sites_global", "personalized": "new_sites_personalized", "worst_decile": "new_sites_worst",
    "local_only": "new_sites_local_only", "helped": "helped", "harmed": "harmed", "difference": "difference",
    "wall_s": "seconds", "bytes_up": "bytes_up",
}  # fmt: skip
"""The table's columns that become metrics in MLflow, one for each learner, and the names of their charts."""


def markdown(comparison: Comparison) -> str:
    """Returns the verdict, the table, and the settings where they were tuned, as Markdown."""
    score, kind = comparison.score, compared_kind(comparison.sites)
    unit, better = f" ({score.unit})" if score.unit else "", "higher" if score.higher_is_better else "lower"
    heads = ["learner", "seeds", "global", "personalized", "worst 10 %", "local-only", "helped", "harmed"]
    rows = []
    for _, row in comparison.table.iterrows():
        cells = [str(row["learner"]), str(int(row["seeds"]))]
        cells += [spread(row[name], row[f"{name}_sd"]) for name in ("global", "personalized")]
        cells += [number(row[name]) for name in ("worst_decile", "local_only")]
        cells += [percent(row["helped"]), percent(row["harmed"])]
        cells.append(against(comparison, row))
        rows.append([*cells, f"{row['rounds']:.0f}", f"{row['bytes_up'] / 1e6:.1f}", f"{row['wall_s']:.1f}"])
    note = (
        f"Mean {score.name}{unit} of {kind} sites, {better} is better; ± standard deviation over seeds. Helped and "
        "harmed are the shares of sites that personalization makes better and worse. Differences are paired by site "
        "and seed, positive = better, with their 95 % interval over sites."
    )
    table = markdown_table([*heads, f"difference to {comparison.baseline}", "rounds", "MB up", "seconds"], rows)
    lines = [comparison.verdict, "", *table, "", note]
    if early := budget(comparison.runs):
        lines += ["", early]
    for learner, reason in comparison.left_out.items():
        lines += ["", f"{learner} is left out: {reason}."]
    if comparison.privacy:
        lines += ["", comparison.privacy]
    return "\n".join([*lines, *_settings(comparison)]) + "\n"


def _settings(comparison: Comparison) -> list[str]:
    if not comparison.trials:
        return []
    count = len(next(iter(comparison.trials.values())))
    name = comparison.score.name
    rows = []
    for learner in comparison.table["learner"]:
        trials = comparison.trials[learner]
        untuned = next((trial.score for trial in trials if trial.untuned), None)
        failed = sum(trial.score is None for trial in trials)
        seconds = sum(trial.seconds or 0.0 for trial in trials)
        cells = [learner, describe(trials[0].settings), number(trials[0].score), number(untuned)]
        rows.append([*cells, str(len(trials)), str(failed), f"{seconds:.0f}"])
    return [
        "",
        f"Each learner at the best of {count} settings, by the mean personalized {name} of validation sites of the "
        "first seed, which were split off its training sites; no new site of that seed was seen. Other seeds draw "
        "other new sites, and some of those took part in this choice.",
        "",
        *markdown_table(["learner", "best settings", f"{name} there", f"{name} untuned", "tried", "failed", "seconds"],
                        rows),
    ]  # fmt: skip


def left_behind(comparison: Comparison) -> str:
    """Returns a sentence on the new sites that the best learner's adapting harms, the largest mean loss first."""
    best, kind = str(comparison.table["learner"].iloc[0]), compared_kind(comparison.sites)
    own = comparison.sites[(comparison.sites["learner"] == best) & (comparison.sites["kind"] == kind)]
    gains = own.groupby("site")["gain"].mean()
    losing = gains[gains < 0].sort_values()
    if losing.empty:
        return f"{best} leaves none of {len(gains)} {kind} sites behind."
    named = ", ".join(plain(str(name)[:60]) for name in losing.index[:NAMED_SITES])
    more = f" and {len(losing) - NAMED_SITES} more" if len(losing) > NAMED_SITES else ""
    return f"{best} leaves {len(losing)} of {len(gains)} {kind} sites behind: {named}{more}."


def to_json(comparison: Comparison) -> str:
    """Returns the verdict, the table, the runs, and the trials of settings as one JSON object."""
    table, runs = (json.loads(frame.to_json(orient="records")) for frame in (comparison.table, comparison.runs))
    trials = {learner: [asdict(trial) for trial in tried] for learner, tried in comparison.trials.items()}
    return json.dumps(
        {"verdict": comparison.verdict, "baseline": comparison.baseline, "score": comparison.score.to_json()}
        | {"table": table, "runs": runs, "left_out": dict(comparison.left_out)}
        | {"settings": {learner: tried[0]["settings"] for learner, tried in trials.items()}, "trials": trials}
    )


def write(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.md, comparison.json and sites.parquet (every run's final evaluation) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(markdown(comparison))
    (folder / "comparison.json").write_text(to_json(comparison) + "\n")
    comparison.sites.to_parquet(folder / "sites.parquet", index=False)


def spread(mean: float, sd: float) -> str:
    """Returns a mean with its standard deviation over seeds as text; without one where there is one seed."""
    return number(mean) if not np.isfinite(sd) else f"{number(mean)} ± {number(sd)}"


def against(comparison: Comparison, row: pd.Series) -> str:
    """Returns the difference of a row of the table from the baseline, with its interval, as text."""
    baseline = row["learner"] == comparison.baseline
    return "baseline" if baseline else interval(row["difference"], row["low"], row["high"])


def comparison_run(
    experiment: Experiment, learners: Sequence[str], seeds: int, folder: Path, runtime: str
) -> AbstractContextManager[ParentRun | None]:
    """Returns what opens the comparison's run, the one that the folder names where there is one, and ends it.

    Raises:
        FedmetaError: The store cannot be reached or written.
    """
    if runtime == "deployment":
        experiment = tracked(experiment).absolute()
    named = ", ".join(learners[:4]) + (f" and {len(learners) - 4} more" if len(learners) > 4 else "")
    many = f"{seeds} seeds" if seeds > 1 else f"seed {experiment.runtime.seed}"
    name = f"compare · {data_name(experiment.params())} · {named} · {many}"
    return parent_run(experiment, "comparison", name, folder)


def publish(run: ParentRun, comparison: Comparison, data: str) -> None:
    """Logs the aggregates, the table of sites by learner, the page and the picture; its runs become its children.

    Args:
        run: The comparison's run.
        comparison: The results.
        data: The data set, as runs name it.
    """
    from fedmeta.tracking import comparison_plots, plots

    suffixes = metric_suffixes(comparison.table["learner"])
    metrics = {
        f"{COMPARISON}/{name}/{suffixes[row['learner']]}": row[column]
        for _, row in comparison.table.iterrows()
        for column, name in CHARTS.items()
    }
    folder = comparison.folder
    files = [folder / name for name in ("comparison.md", "comparison.json", "sites.parquet")]
    tables = {"sites_by_learner.json": sites_by_learner(comparison), "learners.json": comparison.table.round(4)}
    verdict, _, rest = markdown(comparison).partition("\n")
    drawn = comparison_plots.differences(comparison.table, comparison.baseline, comparison.score)
    picture = plots.write(drawn, folder / "differences.png")
    page = f"**{verdict}** {left_behind(comparison)}\n{rest}"
    run.publish(page, metrics, tables, files, {f"{COMPARISON}/differences": picture})
    run.adopt(comparison.runs["run_id"])
    run.announce(f"{comparison.verdict} {left_behind(comparison)}", data)
