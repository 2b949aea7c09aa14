"""Where a run happens: in this process (local, the default), Flower's simulation (ray), a federation (deployment)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress, ProgressCallback, ignore_progress
from fedmeta.runtime.own_rows import with_datasets, with_frame
from fedmeta.tables import groups, number, results_table, text

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from fedmeta.data import Population


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        summary: The JSON object of the command line.
        sites: The final evaluation, one row per site (see `fedmeta.evaluation.sites_frame`).
        meta_state: The final meta-state, standardisation included.
        history: Every evaluation, one row per site and evaluation.
        folder: The run's folder: checkpoint, experiment file, sites, pictures.
    """

    summary: dict[str, Any]
    sites: pd.DataFrame
    meta_state: dict[str, Tensor]
    history: pd.DataFrame
    folder: Path

    def __repr__(self) -> str:
        """Returns a line: the learner, the rounds, the new sites' score before and after adapting, the folder."""
        summary, score = self.summary, self.summary["score"]["name"]
        means = [
            f"{label} {number(own['global']['mean'])} -> {number(own['personalized']['mean'])}"
            for label, own in groups(summary)
        ]
        rounds = f"{summary['rounds']} rounds"
        return f"<Result: {summary['learner']}, {rounds}, {score}: {', '.join(means)}; {self.folder}>"

    def _repr_html_(self) -> str:
        """Returns the run's table for notebooks."""
        import pandas as pd  # takes a third of a second to import

        table = results_table(self.summary)
        frame = pd.DataFrame([[text(cell) for cell in row] for row in table.rows], columns=list(table.headings))
        return f"<p>{escape(repr(self))}</p>{frame.to_html(index=False)}"


def run(
    experiment: Experiment,
    *,
    runtime: str = "local",
    resume: str | None = None,
    report: ProgressCallback = ignore_progress,
    frame: pd.DataFrame | None = None,
    label: str = "",
    site: str = "",
    datasets: Mapping[str, Any] | None = None,
) -> Result:
    """Runs an experiment to its end.

    Args:
        experiment: The run's description.
        runtime: "local" (server and sites in this process), "ray" (Flower's simulation) or "deployment" (a federation
            whose SuperLink the environment names; see `fedmeta.runtime.deployment`).
        resume: A run of this experiment to resume: its folder, that folder's name, its MLflow id, or "auto" for the
            newest unfinished one; None starts a new one.
        report: Takes progress.
        frame: The rows of all sites, in place of the experiment's [data] source, path, label and site_column. They are
            kept as a table in the folder of runs, under the name of their content, so that the run can be resumed.
        label: The frame's column of labels; empty for `data.label`.
        site: The frame's column that names each row's site; empty for `data.site_column`.
        datasets: A `torch.utils.data.Dataset` for each site by its name, of pairs of a row and its label; kept as a
            frame is.

    Raises:
        FedmetaError: Something that the user can mend; the message has what, where and what to do.
    """
    if runtime not in (*RUNTIMES, "deployment"):
        known = (*RUNTIMES, "deployment")
        raise FedmetaError(f'no runtime "{runtime}"{nearest(runtime, known)} (known: {", ".join(known)})')
    if resume is not None and not resume.strip():
        raise FedmetaError('--resume names no run: give its folder, its MLflow id, or "auto"')
    experiment = experiment.with_overrides([]).with_user_info_kept()
    if frame is not None and datasets is not None:
        raise FedmetaError("frame and datasets both hold the sites' rows: give one of them")
    if runtime == "deployment" and (frame is not None or datasets is not None):
        raise FedmetaError(
            "rows of this program are for a run on this machine: in a deployment each site has its own file"
        )
    if runtime == "deployment":
        return _deployment(experiment, resume, report)
    experiment = experiment.absolute()
    if frame is not None:
        experiment = with_frame(experiment, frame, label, site)
    elif datasets is not None:
        experiment = with_datasets(experiment, datasets)
    elif label or site:
        raise FedmetaError("label and site name columns of frame, and there is none: set data.label, data.site_column")
    # Here and below, imports that take seconds: a command that only asks a SuperLink something needs none of them.
    from fedmeta import checkpoint

    root = Path(experiment.tracking.folder)
    folder = checkpoint.find(root, resume, experiment.to_toml()) if resume else None
    if folder:
        stored = Experiment.from_toml(checkpoint.newest(folder)[0].experiment, origin=str(folder))
        _check_same(experiment, stored, folder)
        experiment = stored
    return RUNTIMES[runtime](experiment, folder, report)


def _check_same(given: Experiment, stored: Experiment, folder: Path) -> None:
    """Checks that a run to resume is of the experiment that the user gave; where it is tracked may differ."""
    known = stored.params()
    for key, value in given.params().items():
        if value != known.get(key) and not key.startswith("tracking."):
            raise FedmetaError(
                f"--resume {folder.name}: a run of another experiment, with {key} = {known.get(key)} and not {value}; "
                f"it resumes with {folder / 'experiment.toml'}"
            )


def _local(experiment: Experiment, resume: Path | None, report: ProgressCallback) -> Result:
    import torch

    from clients.app import app
    from clients.node import invalidate_stale_caches, node_of
    from fedmeta.runtime.checking import check_own_code
    from fedmeta.runtime.delayed import DelayedGrid
    from fedmeta.runtime.local import LocalGrid
    from server import training_loop

    if experiment.runtime.threads:
        torch.set_num_threads(experiment.runtime.threads)
    invalidate_stale_caches(experiment.data)
    for note in check_own_code(experiment):
        report(Progress(0, experiment.server.rounds, note=note))
    grid = DelayedGrid(app, experiment) if experiment.runtime.delay else LocalGrid(app, experiment)
    node = node_of(grid.context)  # errors in the data are reported in full here, since they are the user's own
    for note in data_notes(getattr(node, "population", None), experiment):
        report(Progress(0, experiment.server.rounds, note=note))
    outcome = training_loop.run(grid, experiment, report, resume, data_here=True)
    return result_of(outcome.summary, outcome.sites, outcome.meta_state, outcome.folder)


MOST_NOTES = 12
"""How many notes on the data a run reports; `fedmeta sites` shows all of them."""


def data_notes(population: Population | None, experiment: Experiment) -> list[str]:
    """Returns what reading the sites' files left out or decided, and what is probably not meant in them."""
    from fedmeta.data.findings import findings

    if population is None or experiment.tracking.parent:
        return []
    notes = [*getattr(population, "notes", ()), *findings(population, experiment.data)]
    more = len(notes) - MOST_NOTES
    return [
        *notes[:MOST_NOTES],
        *([f"and {more} more notes on the data: fedmeta sites shows them"] if more > 0 else []),
    ]


def _ray(experiment: Experiment, resume: Path | None, report: ProgressCallback) -> Result:
    from fedmeta.runtime import ray
    from fedmeta.runtime.checking import check_own_code

    for note in check_own_code(experiment):
        report(Progress(0, experiment.server.rounds, note=note))
    return _result_in(*ray.run(experiment, resume, report))


def _deployment(experiment: Experiment, resume: str | None, report: ProgressCallback) -> Result:
    from fedmeta.runtime import deployment

    return _result_in(*deployment.run(experiment, resume, report))


def _result_in(summary: dict[str, Any], folder: Path) -> Result:
    import pandas as pd

    from fedmeta import checkpoint

    state, _ = checkpoint.newest(folder)
    return result_of(summary, pd.read_parquet(folder / "sites.parquet"), dict(state.meta_state), folder)


def result_of(summary: dict[str, Any], history: pd.DataFrame, meta_state: dict[str, Tensor], folder: Path) -> Result:
    """Returns a run's result from its files."""
    last = history[history["round"] == history["round"].max()].reset_index(drop=True)
    return Result(summary, last, meta_state, history, folder)


RUNTIMES: dict[str, Callable[[Experiment, Path | None, ProgressCallback], Result]] = {"local": _local, "ray": _ray}
"""The runtimes of this machine by their names on the command line; a deployment is elsewhere."""
