"""A comparison's own MLflow run: found again by a command that goes on, so that there is one however often it stops."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedmeta.comparison.page import markdown
from fedmeta.comparison.results import Comparison, sites_by_learner
from fedmeta.experiment import Experiment
from fedmeta.tracking.experiment_page import COMPARISON
from fedmeta.tracking.results import quiet_matplotlib
from fedmeta.tracking.run_page import data_name, metric_suffixes
from fedmeta.tracking.summary_run import SummaryRun, summary_run

SCORES = {"global": "new_sites_global", "personalized": "new_sites_personalized", "worst_decile": "new_sites_worst"}
SCORES |= {"helped": "helped", "difference": "difference", "wall_s": "seconds", "bytes_up": "bytes_up"}
"""The table's columns that become metrics, one for each learner, and the names of their charts' sections."""


def comparison_run(
    experiment: Experiment, learners: Sequence[str], seeds: int, folder: Path, runtime: str
) -> AbstractContextManager[SummaryRun | None]:
    """Returns what opens the comparison's run, the one that the folder names where there is one, and ends it.

    Raises:
        FedmetaError: The store cannot be reached or written.
    """
    if runtime == "deployment":
        from fedmeta.runtime.deployment import tracked

        experiment = tracked(experiment).absolute()
    named = ", ".join(learners[:4]) + (f" and {len(learners) - 4} more" if len(learners) > 4 else "")
    many = f"{seeds} seeds" if seeds > 1 else f"seed {experiment.runtime.seed}"
    name = f"compare · {data_name(experiment.params())} · {named} · {many}"
    return summary_run(experiment, "comparison", name, folder)


def under(run: SummaryRun | None, experiment: Experiment) -> Experiment:
    """Returns the experiment as one that MLflow shows under a comparison's run."""
    return experiment.with_overrides([f"tracking.parent={run.run_id}"]) if run else experiment


def publish(run: SummaryRun, comparison: Comparison) -> None:
    """Logs the aggregates, the table of sites by learner, the page and the picture."""
    suffixes = metric_suffixes(comparison.table["learner"])
    metrics = {
        f"{COMPARISON}/{name}/{suffixes[row['learner']]}": row[column]
        for _, row in comparison.table.iterrows()
        for column, name in SCORES.items()
    }
    folder = comparison.folder
    files = [folder / name for name in ("comparison.md", "comparison.json", "sites.parquet")]
    tables = {"sites_by_learner.json": sites_by_learner(comparison), "learners.json": comparison.table.round(4)}
    run.publish(_description(comparison), metrics, tables, files, _pictures(comparison))


def _description(comparison: Comparison) -> str:
    verdict, _, rest = markdown(comparison).partition("\n")
    return f"**{verdict}**\n{rest}"


def _pictures(comparison: Comparison) -> dict[str, Path]:
    quiet_matplotlib()
    from fedmeta.tracking import comparison_pictures

    table: Any = comparison.table
    return {
        f"{COMPARISON}/differences": comparison_pictures.save(
            table, comparison.baseline, comparison.score, comparison.folder
        )
    }
