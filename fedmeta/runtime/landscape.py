"""The landscape of a finished run: from its checkpoint and its data, read here, to figures and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from clients.app import app as client_app
from clients.node import learner_for, node_of, split_meta_state
from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED, Experiment
from fedmeta.files import write_atomic
from fedmeta.landscape import Landscape, landscape
from fedmeta.runtime.local import LocalGrid
from fedmeta.tracking.plots import finish, new_figure, set_titles, write
from fedmeta.trust import refuse_foreign_code

FOLDER = "landscape"


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        figures: The figures by name; None for one that is not finite.
        title: The run, and after which round.
        folder: Where figures and picture lie.
    """

    figures: dict[str, float | int | None]
    title: str
    folder: Path


def measure(
    run: str, root: Path, uri: str, code: Collection[str], sites: int, steps: int, probes: int, out: Path | None
) -> Measured:
    """Measures a run's landscape, and writes it into a folder and to MLflow.

    Args:
        run: The run's folder, that folder's name, or its MLflow id.
        root: The folder of all runs.
        uri: The MLflow store that knows the run.
        code: What the run may name of code that is not part of fedmeta.
        sites: How many training sites' tasks make the objective.
        steps: Lanczos steps.
        probes: Random starts.
        out: Where to write; None for a folder in the run's.

    Raises:
        FedmetaError: There is no such run, its data cannot be read here, or it asks for other code.
    """
    folder = Path(run) if Path(run).is_dir() else checkpoint.find(root, run, "")
    state, _ = checkpoint.newest(folder)
    experiment = Experiment.from_toml(state.experiment, str(folder))
    refuse_foreign_code(experiment, str(folder), code)
    node = node_of(LocalGrid(client_app, experiment.absolute()).context).with_categories(state.categories)
    learner = learner_for(node, state.classes)
    meta_state, scale = split_meta_state(state.meta_state, "cpu")
    kept = set(state.names) - set(state.new_sites) - set(state.validation_sites)
    training = [site for site in node.hosted.tolist() if _name(node, site) in kept]
    chosen = np.array(training)[np.unique(np.linspace(0, len(training) - 1, sites).astype(np.int64))]
    batch = node.training_batch(chosen, max(1, state.round_number), scale, state.classes)
    tasks = [batch.task(place) for place in range(batch.sites)]
    try:
        found = landscape(learner, meta_state, tasks, steps, probes, experiment.runtime.seed)
    except RuntimeError as error:
        raise FedmetaError(f"{folder}: the meta-objective has no second derivative here: {error}") from error
    figures = {key: value if math.isfinite(value) else None for key, value in found.figures().items()}
    figures |= {"round": state.round_number, "sites": len(chosen), "steps": steps, "probes": probes}
    target = out or folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    picture = write(draw(found), target / f"{FOLDER}.png")
    write_atomic(target / f"{FOLDER}.json", json.dumps(figures).encode())
    if experiment.tracking.uri != UNTRACKED and state.run_id:
        from fedmeta.tracking.parent_run import add_results

        numbers = {f"{FOLDER}/{key}": value for key, value in figures.items() if value is not None}
        add_results(
            experiment.tracking.uri or uri, state.run_id, numbers, {FOLDER: picture}, [target / f"{FOLDER}.json"]
        )
    return Measured(figures, f"{folder.name}, after round {state.round_number}", target)


def draw(found: Landscape) -> Figure:
    """Draws the spectral density on a logarithmic scale, and the extreme eigenvalues."""
    own = found.spectrum
    span = max(own.largest - own.smallest, 1e-12)
    width = span / 100
    places = np.linspace(own.smallest - 0.05 * span, own.largest + 0.05 * span, 800)
    density = own.density(places, width)
    figure, axes = new_figure(7.0, 4.0)
    axes.semilogy(places, np.maximum(density, density.max() * 1e-7), color="#0072B2", label="spectral density")
    for value, name in ((own.smallest, "smallest"), (own.largest, "largest")):
        axes.axvline(value, color="#8C8C8C", linestyle=":", linewidth=1, label=f"{name}: {value:.3g}")
    axes.axvspan(min(own.smallest, 0.0), 0.0, color="#D55E00", alpha=0.08, linewidth=0)
    title = f"Curvature: {own.smallest:.3g} to {own.largest:.3g}, {own.negative:.1%} of it negative"
    set_titles(axes, title, "eigenvalue of the meta-objective's Hessian", "spectral density")
    return finish(figure, axes)


def _name(node: Any, site: int) -> str:
    names = node.population.names if hasattr(node, "population") else node.names
    return str(names[site])
