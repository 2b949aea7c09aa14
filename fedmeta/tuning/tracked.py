"""A search's own MLflow run, over those of its trials; found again when the search goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType

from fedmeta.experiment import UNTRACKED
from fedmeta.tracking.run_page import data_name, metric_suffixes
from fedmeta.tracking.summary_run import SummaryRun
from fedmeta.tuning.page import markdown, write
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.results import Search

SECTION = "search"
KEPT = "mlflow.json"


class SearchPage:
    """Opens the run, takes what was found, and ends it; without tracking it only writes the search's files."""

    def __init__(self, run: SummaryRun | None) -> None:
        self._run = run
        self.run_id = run.run_id if run else ""

    @classmethod
    def open(cls, plan: Plan) -> SearchPage:
        """Opens the search's run, the one that its folder names where there is one.

        Raises:
            FedmetaError: The store cannot be reached or written.
        """
        experiment = plan.experiment
        if experiment.tracking.uri == UNTRACKED:
            return cls(None)
        kept = plan.folder / KEPT
        known = json.loads(kept.read_text()) if kept.exists() else {}
        earlier = known.get("run_id", "") if known.get("uri") == experiment.tracking.uri else ""
        what = " · ".join((data_name(experiment.params()), experiment.learner.name, plan.sampler))
        run = SummaryRun.open(experiment, "search", f"tune · {what} · {plan.trials} trials", earlier, plan.parent)
        kept.write_text(json.dumps({"run_id": run.run_id, "uri": experiment.tracking.uri}))
        return cls(run)

    def publish(self, search: Search) -> None:
        """Writes the search's files, and logs its figures, table and pictures; nothing where no trial ended."""
        if not search.done:
            return
        folder = search.plan.folder
        write(search, folder)
        if self._run is None:
            return
        metrics = {f"{SECTION}/best": search.best.score, f"{SECTION}/own": search.own.score if search.own else None}
        if search.judged:
            metrics |= {f"{SECTION}/new_sites_best": search.judged.best, f"{SECTION}/new_sites_own": search.judged.own}
            metrics |= {f"{SECTION}/new_sites_difference": search.judged.difference}
        keys = metric_suffixes(search.importance)
        metrics |= {f"{SECTION}_importance/{keys[key]}": share for key, share in search.importance.items()}
        said, _, rest = markdown(search).partition("\n")
        files = [folder / name for name in ("tuning.md", "tuning.json", "best.toml")]
        tables = {"trials.json": search.frame()}
        curves = {f"{SECTION}/best_so_far": search.best_so_far()}
        self._run.publish(f"**{said}**\n{rest}", metrics, tables, files, _pictures(search, folder), curves)

    def __enter__(self) -> SearchPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self._run.end("KILLED" if stopped else "FAILED" if error else "FINISHED")


def _pictures(search: Search, folder: Path) -> dict[str, Path]:
    # Matplotlib would announce, on a fresh machine, that it looks for fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from fedmeta.tuning import pictures

    return {f"{SECTION}/{path.stem}": path for path in pictures.save(search, folder)}
