"""A new site of an own problem: its task is asked of the run's task source, solved from the run's start, and scored.

The support data alone adapt; the query scores before and after, by the problem's own metrics, and decides nothing.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.writing import CARD, SUMMARY, Written, names_in, whole_folder
from fedmeta.build import dtype_of, load_code, source_of
from fedmeta.errors import FedmetaError, nearest
from fedmeta.pictures import before_and_after
from fedmeta.problems import Metric, TaskSource
from fedmeta.problems.cohort_tables import CohortTables
from fedmeta.problems.problem import Parameters, has_picture
from fedmeta.problems.source import as_dtype
from fedmeta.signing import signed
from fedmeta.tables import Cell, markdown_table, number, plain
from fedmeta.task import Task
from fedmeta.tracking.plots import write as write_figure

FILE = "parameters.safetensors"
FORMAT = "fedmeta-parameters-1"
PICTURE = "before_after.png"

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Solved:
    """What came of a site's data.

    Attributes:
        start: What the run left for new sites.
        name: The site's name.
        data: Where its data came from: a file's name, or the run's own source.
        task: The site's task; its support adapts, its query scores.
        path: The parameters after 0, 1, ... steps, before constraints.
        scores: Every metric's value on the query after as many steps.
        held_out: Whether support and query are disjoint draws.
        date: When, in UTC.
    """

    start: MetaModel
    name: str
    data: str
    task: Task
    path: tuple[Parameters, ...]
    scores: tuple[Scores, ...]
    held_out: bool
    date: str

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The problem's metrics, the score first."""
        return tuple(self.start.learner.problem.metrics)

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return len(self.path) - 1

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The adapted parameters as objectives see them: constrained, detached, under the problem's own names."""
        with torch.no_grad():
            found = self.start.learner.problem.constrain(self.path[-1])
        return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in found.items()}

    @property
    def advice(self) -> str:
        """One sentence: whether adapting made the site's score better on its query."""
        score = self.metrics[0]
        before, after = (self.scores[place][score.name] for place in (0, -1))
        if not math.isfinite(after):
            return f"Keep the start: after {self.steps} steps {score.name} is not finite."
        if score.better(after, before):
            return f"Use the adapted parameters: {score.name} {self._change} on the query."
        return f"Keep the start: adapting does not make it better, {score.name} {self._change} on the query."

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the result is used, a sentence each."""
        found = []
        if not self.start.finished:
            found.append(f"The run has not ended: this is its state after round {self.start.round_number}.")
        if not self.held_out:
            found.append("Support and query are the same by nature: these scores are not on held-out data.")
        return tuple(found)

    @property
    def _change(self) -> str:
        score = self.metrics[0]
        before, after = (number(self.scores[place][score.name]) for place in (0, -1))
        return f"{before} -> {after}{f' {score.unit}' if score.unit else ''}"

    def summary(self) -> dict[str, Any]:
        """Returns what the command line prints as JSON."""
        score = self.metrics[0]
        figures = {
            state: {name: value if math.isfinite(value) else None for name, value in self.scores[place].items()}
            for state, place in (("global", 0), ("personalized", -1))
        }
        better = score.better(self.scores[-1][score.name], self.scores[0][score.name])
        return {
            "run_id": self.start.run_id,
            "learner": self.start.name,
            "digest": self.start.digest,
            "site": self.name,
            "score": score.to_json(),
            "steps": self.steps,
            "advice": "personal" if better else "global",
            **figures,
            "curve": [value if math.isfinite(value) else None for value in (each[score.name] for each in self.scores)],
            "held_out": self.held_out,
            "warnings": list(self.warnings),
        }


def adapt_task(start: MetaModel, data: str = "", site: str = "") -> Solved:
    """Adapts a run's start to one site of its task source.

    Args:
        start: What the run left for new sites.
        data: The site's own file, which the source is called with as `path`; "" for a site that the source knows.
        site: The site's name; with `data` its file's name where left out.

    Raises:
        FedmetaError: The source takes no file, has no such site, or fails; or the site's task is of another form.
    """
    name = site or Path(data).stem
    if not name:
        raise FedmetaError("name the site's file with --data FILE, or a site of the run's task source with --site")
    source = _source(start, data, name)
    known = sorted(map(str, source.sites()))
    if name not in known:
        raise FedmetaError(f'the task source has no site "{name}"{nearest(name, known)} (it has {len(known)})')
    learner = start.learner
    try:
        task = as_dtype(source.task(name, "test", 0, start.experiment.runtime.seed), dtype_of(start.experiment))
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise FedmetaError(f'the task source failed for site "{name}": {error}') from error
    try:
        path = learner.adaptation_path(start.state, task.support, learner.evaluation_steps(start.steps))
        path = [{key: value.detach() for key, value in own.items()} for own in path]
        with torch.no_grad():
            scores = [{key: float(value) for key, value in learner.evaluate(own, task.query).items()} for own in path]
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise FedmetaError(f'site "{name}": its data do not fit the problem: {error}') from error
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    origin = Path(data).name or start.experiment.data.source
    return Solved(start, name, origin, task, tuple(path), tuple(scores), bool(source.held_out), date)


def _source(start: MetaModel, data: str, name: str) -> TaskSource:
    experiment = start.experiment
    given: dict[str, str] = {}
    if data:
        if not Path(data).exists():
            raise FedmetaError(f"--data {data}: no such file")
        path = experiment.data.source if ":" in experiment.data.source else experiment.problem.name
        if "path" not in inspect.signature(load_code(path, "the run's task source")).parameters:
            raise FedmetaError(
                f"--data {data}: the run's task source {path} takes no argument path, and so reads no site's own file; "
                "give it one, or name a site that it knows with --site NAME"
            )
        given = {"path": str(Path(data).absolute()), "site": name}
    source = source_of(experiment, **given)
    if not isinstance(source, TaskSource):
        raise FedmetaError("the run's data are rows; fedmeta adapt takes the site's file with --data FILE")
    return source


def write(solved: Solved, out: Path) -> Written:
    """Writes adapted parameters, scores, a card and the problem's picture into a folder; the whole folder or none.

    Raises:
        FedmetaError: The folder is there already, or the disk does not take it.
    """
    with whole_folder(out) as part:
        note = _fill(part, solved)
        files = names_in(part)
    return Written(out, files, None, note)


def _fill(folder: Path, solved: Solved) -> str:
    start, note = solved.start, ""
    texts = {
        "format": FORMAT,
        "experiment": start.experiment.to_toml(),
        "adapted": json.dumps(solved.summary()),
    }
    (folder / FILE).write_bytes(save(solved.parameters, signed(texts, solved.parameters)))
    if has_picture(start.learner.problem):
        score = solved.metrics[0].name
        scores = (solved.scores[0][score], solved.scores[-1][score])
        try:
            figure = before_and_after(start.learner.problem, list(solved.path), solved.task.query, scores, solved.name)
            if figure:
                write_figure(figure, folder / PICTURE)
        except Exception as error:  # whatever a user's own code raises
            note = f"no picture: {error}"
    (folder / SUMMARY).write_text(json.dumps(solved.summary()) + "\n")
    (folder / CARD).write_text(_card(solved, (folder / PICTURE).exists()), encoding="utf-8")
    return note


def _card(solved: Solved, picture: bool) -> str:
    start = solved.start
    facts = [
        ("site's data", solved.data),
        ("run", f"{start.run_id}, {start.round_number} rounds"),
        ("learner", f"{start.name}, inner rate {start.learner.inner_lr:g}"),
        ("problem", start.experiment.problem.name),
        ("digest of the start", start.digest),
        ("inner steps taken", str(solved.steps)),
        ("made", solved.date),
    ]
    rows: list[tuple[Cell, ...]] = [
        (metric.name + (f" ({metric.unit})" if metric.unit else ""), *(solved.scores[k][metric.name] for k in (0, -1)))
        for metric in solved.metrics
    ]
    lines = [f"# {start.name} adapted to {plain(solved.name)}", "", solved.advice, ""]
    lines += [*markdown_table(("", ""), facts, left=2), ""]
    lines += [*markdown_table(("on the query", "before", "after"), rows), ""]
    lines += [f"- {warning}" for warning in solved.warnings] + [""] * bool(solved.warnings)
    if picture:
        lines += [f"![before and after]({PICTURE})", ""]
    lines += [
        f"`{FILE}` holds the adapted parameters, constraints applied:",
        "",
        "```python",
        "from safetensors.torch import load_file",
        "",
        f'parameters = load_file("{FILE}")  # {", ".join(sorted(solved.parameters)[:8])}',
        "```",
    ]
    if isinstance(start.learner.problem, CohortTables):
        columns = ", ".join(start.learner.problem.needed)
        lines += ["", f"`fedmeta predict DIR --data FILE` gives a line for each row of a file with columns {columns}."]
    return "\n".join(lines) + "\n"
