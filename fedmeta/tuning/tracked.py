"""A search's own MLflow run, over those of its trials; found again when the search goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from fedmeta.tracking.results import quiet_matplotlib
from fedmeta.tracking.run_page import data_name, metric_suffixes
from fedmeta.tracking.summary_run import SummaryRun, summary_run
from fedmeta.tuning.page import markdown, write
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.results import Search

SECTION = "search"


def search_run(plan: Plan) -> AbstractContextManager[SummaryRun | None]:
    """Returns what opens the search's run, the one that its folder names where there is one, and ends it.

    Raises:
        FedmetaError: The store cannot be reached or written.
    """
    what = " · ".join((data_name(plan.experiment.params()), plan.experiment.learner.name, plan.sampler))
    name = f"tune · {what} · {plan.trials} trials"
    return summary_run(plan.experiment, "search", name, plan.folder, plan.parent)


def publish(run: SummaryRun | None, search: Search) -> None:
    """Writes the search's files, and logs its figures, table and pictures; nothing where no trial ended."""
    if not search.done:
        return
    folder = search.plan.folder
    write(search, folder)
    if run is None:
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
    run.publish(f"**{said}**\n{rest}", metrics, tables, files, _pictures(search, folder), curves)


def _pictures(search: Search, folder: Path) -> dict[str, Path]:
    quiet_matplotlib()
    from fedmeta.tuning import pictures

    return {f"{SECTION}/{path.stem}": path for path in pictures.save(search, folder)}
