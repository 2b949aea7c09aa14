"""Pictures that an own problem draws of a site's solution, before and after adapting, side by side.

They show a site's data, and so are drawn only where these are at hand: in simulation, and at a site that adapts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.build import dtype_of, source_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.problems import Problem, TaskSource
from fedmeta.problems.problem import Data, Parameters, has_picture
from fedmeta.problems.source import as_dtype
from fedmeta.tables import number
from fedmeta.tracking.metrics import worst_first
from fedmeta.tracking.plots import DOTS_PER_INCH, FOLDER, GROUND, write

PANEL_IN = 3.2
"""The width of one panel (inches)."""


def image_of(problem: Problem, parameters: Parameters, data: Data) -> NDArray[Any] | None:
    """Returns a problem's picture [height, width] or [height, width, 3] of constrained parameters; None for none.

    Raises:
        FedmetaError: It is no such array.
    """
    found = problem.picture(problem.constrain(parameters), data)
    if found is None:
        return None
    image = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise FedmetaError(
            f"problem {type(problem).__name__}: picture returned an array of shape {image.shape}; "
            "return [height, width] or [height, width, 3]"
        )
    return image


def side_by_side(title: str, panels: Mapping[str, NDArray[Any]]) -> Figure:
    """Draws pictures beside each other, all on one color scale where they are [height, width]."""
    height, width = next(iter(panels.values())).shape[:2]
    panel = min(PANEL_IN * height / width, 2 * PANEL_IN)
    figure = Figure((PANEL_IN * len(panels), panel + 0.7), dpi=DOTS_PER_INCH, facecolor=GROUND, layout="constrained")
    values = np.concatenate([image.reshape(-1) for image in panels.values()])
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for each, (name, image) in zip(axes, panels.items(), strict=True):
        each.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect="auto")
        each.set_title(name, fontsize=9)
        each.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def before_and_after(
    problem: Problem, path: list[Parameters], data: Data, scores: tuple[float, float], title: str
) -> Figure | None:
    """Draws a site's solution at the start of its path and at the end; None where the problem has no picture."""
    score, panels = problem.metrics[0], {}
    unit = f" {score.unit}" if score.unit else ""
    for name, parameters, value in zip(("before", "after"), (path[0], path[-1]), scores, strict=True):
        image = image_of(problem, parameters, data)
        if image is None:
            return None
        panels[f"{name} adapting: {score.name} {number(value)}{unit}"] = image
    return side_by_side(title, panels)


def write_pictures(
    experiment: Experiment, learner: Learner, meta_state: Mapping[str, Tensor], sites: pd.DataFrame, folder: Path
) -> list[Path]:
    """Writes the pictures of a run's worst and median new sites into its folder; of training sites where none is new.

    Args:
        experiment: The run's description.
        learner: Its learner.
        meta_state: Its final meta-state.
        sites: Its last evaluation with a row per site.
        folder: The run's folder.

    Returns:
        The files; none where the problem draws nothing, or its data are rows.
    """
    problem = learner.problem
    if not has_picture(problem):
        return []
    source = source_of(experiment)
    if not isinstance(source, TaskSource):
        return []
    score = problem.metrics[0]
    new = sites[sites["kind"] == "new"]
    ranked = worst_first(new if len(new) else sites)
    ranked = ranked[np.isfinite(ranked[f"personalized_{score.name}"])]
    if not len(ranked):
        return []
    chosen = {"worst_site": ranked.iloc[0]} | (
        {"median_site": ranked.iloc[len(ranked) // 2]} if len(ranked) > 2 else {}
    )
    files = []
    for name, row in chosen.items():
        task = as_dtype(source.task(row["site"], "test", 0, experiment.runtime.seed), dtype_of(experiment))
        path = learner.adaptation_path(meta_state, task.support, int(row["steps_taken"]))
        scores = (float(row[f"global_{score.name}"]), float(row[f"personalized_{score.name}"]))
        figure = before_and_after(problem, path, task.query, scores, f"{name.replace('_', ' ')}: {row['site']}")
        if figure:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            files.append(write(figure, folder / FOLDER / f"{name}.png"))
    return files
