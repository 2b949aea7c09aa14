"""A comparison's own MLflow run: found again by a command that goes on, so that there is one however often it stops."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedmeta.comparison.page import markdown
from fedmeta.comparison.results import Comparison, sites_by_learner
from fedmeta.experiment import UNTRACKED, Experiment
from fedmeta.tracking.experiment_page import COMPARISON
from fedmeta.tracking.run_page import data_name, metric_suffixes
from fedmeta.tracking.summary_run import SummaryRun

SCORES = {"global": "new_sites_global", "personalized": "new_sites_personalized", "worst_decile": "new_sites_worst"}
SCORES |= {"helped": "helped", "difference": "difference", "wall_s": "seconds", "bytes_up": "bytes_up"}
"""The table's columns that become metrics, one for each learner, and the names of their charts' sections."""
KEPT = "mlflow.json"


class ComparisonPage:
    """Opens the run, takes the results, and ends it; does nothing where the experiment is not tracked."""

    def __init__(self, run: SummaryRun | None) -> None:
        self._run = run

    @classmethod
    def open(
        cls, experiment: Experiment, learners: Sequence[str], seeds: int, folder: Path, runtime: str
    ) -> ComparisonPage:
        """Opens the comparison's run, the one that the folder names where there is one.

        Raises:
            FedmetaError: The store cannot be reached or written.
        """
        if runtime == "deployment":
            from fedmeta.runtime.deployment import tracked

            experiment = tracked(experiment).absolute()
        if experiment.tracking.uri == UNTRACKED:
            return cls(None)
        kept = folder / KEPT
        known = json.loads(kept.read_text()) if kept.exists() else {}
        earlier = known.get("run_id", "") if known.get("uri") == experiment.tracking.uri else ""
        named = ", ".join(learners[:4]) + (f" and {len(learners) - 4} more" if len(learners) > 4 else "")
        many = f"{seeds} seeds" if seeds > 1 else f"seed {experiment.runtime.seed}"
        name = f"compare · {data_name(experiment.params())} · {named} · {many}"
        run = SummaryRun.open(experiment, "comparison", name, earlier)
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"run_id": run.run_id, "uri": experiment.tracking.uri}))
        return cls(run)

    def parent_of(self, experiment: Experiment) -> Experiment:
        """Returns the experiment as one that MLflow shows under this comparison."""
        if self._run is None:
            return experiment
        return experiment.with_overrides([f"tracking.parent={self._run.run_id}"])

    def publish(self, comparison: Comparison) -> None:
        """Logs the aggregates, the table of sites by learner, the page and the picture."""
        if self._run is None:
            return
        suffixes = metric_suffixes(comparison.table["learner"])
        metrics = {
            f"{COMPARISON}/{name}/{suffixes[row['learner']]}": row[column]
            for _, row in comparison.table.iterrows()
            for column, name in SCORES.items()
        }
        folder = comparison.folder
        files = [folder / name for name in ("comparison.md", "comparison.json", "sites.parquet")]
        tables = {"sites_by_learner.json": sites_by_learner(comparison), "learners.json": comparison.table.round(4)}
        self._run.publish(_description(comparison), metrics, tables, files, _pictures(comparison))

    def __enter__(self) -> ComparisonPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self._run.end("KILLED" if stopped else "FAILED" if error else "FINISHED")


def _description(comparison: Comparison) -> str:
    verdict, _, rest = markdown(comparison).partition("\n")
    return f"**{verdict}**\n{rest}"


def _pictures(comparison: Comparison) -> dict[str, Path]:
    # Matplotlib would announce, on a fresh machine, that it looks for fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from fedmeta.tracking import comparison_pictures

    table: Any = comparison.table
    return {
        f"{COMPARISON}/differences": comparison_pictures.save(
            table, comparison.baseline, comparison.score, comparison.folder
        )
    }
