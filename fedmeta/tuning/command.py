"""What `fedmeta tune` does: it makes a plan of its options, runs it, and shows what was found. All words on stderr."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedmeta.comparison import interval
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import UNTRACKED, Experiment, Tracking
from fedmeta.progress import Report as RunReport
from fedmeta.tracking.store import shown
from fedmeta.tuning import page, strategies
from fedmeta.tuning.judging import judge as judge_settings
from fedmeta.tuning.language import space_of
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.results import Search
from fedmeta.tuning.samplers import SAMPLERS
from fedmeta.tuning.searching import Report, search
from fedmeta.tuning.space import usual_space, words

MOST_ROWS = 10


def plan_of(
    experiment: Experiment, over: Sequence[str], trials: int, sampler: str, pruner: str, workers: int, runtime: str
) -> Plan:
    """Returns the search that the options ask for.

    Raises:
        FedmetaError: An option cannot be.
    """
    experiment = experiment.absolute()
    space = space_of(over, experiment) if over else usual_space(experiment)
    seed = experiment.runtime.seed
    return Plan(experiment, tuple(space), trials, sampler, pruner, seed, workers, runtime)


def tune(plan: Plan, seeds: int, out: Path | None) -> str:
    """Runs a search, sets the best against the experiment's own on new sites with so many seeds, and shows it."""

    def judge(found: Search) -> Search:
        if not found.done or found.best == found.own:
            return found  # there is nothing to set against the experiment's own settings
        own = plan.experiment
        judged = judge_settings(found.experiment, own, seeds, plan.folder, plan.runtime, bars.run)
        return replace(found, judged=judged)

    with _bars(plan) as bars:
        found = search(plan, bars.search(plan.sampler), judge if seeds else None)
    _show(found)
    if out:
        page.write(found, out)
    return page.to_json(found)


def compare(plan: Plan, names: Sequence[str], seeds: int, out: Path | None) -> str:
    """Gives each way of searching the same trials, and shows them beside one another."""
    for name in names:
        if name not in SAMPLERS:
            raise FedmetaError(f'--compare: no way "{name}"{nearest(name, SAMPLERS)} (known: {", ".join(SAMPLERS)})')
    with _bars(plan) as bars:
        found = strategies.compare_strategies(plan, names, seeds, bars.search)
    _show_strategies(found)
    if out:
        strategies.write(found, out)
    return strategies.to_json(found)


class _Bars:
    """One bar at a time: of a search's trials, or of a run's rounds."""

    def __init__(self, progress: Progress, plan: Plan) -> None:
        self._progress, self._plan = progress, plan

    def search(self, title: str) -> Report:
        """Returns what takes a search's progress."""
        task = self._only(title, self._plan.trials, "no trial yet")

        def take(found: Search) -> None:
            best = f"best {found.best.score:.3f}, {words(found.best.settings)}" if found.done else "no trial yet"
            self._progress.update(task, completed=sum(each.state != "waiting" for each in found.attempts), said=best)

        return take

    def run(self, title: str, number: int, count: int) -> RunReport:
        """Returns what takes the progress of one of some runs."""
        task = self._only(f"{number}/{count} {title}", self._plan.experiment.server.rounds, "")
        return lambda stand: self._progress.update(task, completed=stand.round_number)

    def _only(self, title: str, total: int, said: str) -> TaskID:
        for earlier in self._progress.task_ids:
            self._progress.remove_task(earlier)
        return self._progress.add_task(title, total=total, said=said)


@contextmanager
def _bars(plan: Plan) -> Iterator[_Bars]:
    """Shows bars where stderr is a terminal."""
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[said]}")]
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield _Bars(progress, plan)


def _show(found: Search) -> None:
    console = Console(stderr=True)
    console.print(f"[bold]{page.verdict(found)}[/]", soft_wrap=True, highlight=False)
    keys = [each.key for each in found.plan.space]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (found.score.name, *(key.removeprefix("learner.") for key in keys), ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    ranked = found.done[:MOST_ROWS]
    ranked += [found.own] if found.own and found.own not in ranked else []
    for each in ranked:
        cells = [words({key: each.settings[key]}).rpartition(" ")[2] for key in keys]
        table.add_row(f"{each.score:.3f}", *cells, "as it was" if each == found.own else "")
    console.print(table)
    if found.judged:
        judged = found.judged
        gain = interval(judged.difference, judged.low, judged.high)
        console.print(f"new sites   {judged.best:.3f}, as it was {judged.own:.3f}: {gain}", highlight=False)
    best = shlex.quote(str(found.plan.folder / "best.toml"))
    console.print(f"page        {found.plan.folder / 'tuning.md'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"run it      fedmeta run {best}", highlight=False, markup=False, soft_wrap=True)
    tracking = found.plan.experiment.tracking
    if tracking.uri != UNTRACKED:
        usual = Tracking().experiment
        named = f" --set tracking.experiment={tracking.experiment}" if tracking.experiment != usual else ""
        see = f"fedmeta ui --uri {shlex.quote(shown(tracking.uri))}{named}"
        console.print(f"see it      {see}", highlight=False, markup=False, soft_wrap=True)


def _show_strategies(found: strategies.Strategies) -> None:
    console = Console(stderr=True)
    console.print(f"[bold]{found.verdict()}[/]", soft_wrap=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    counts = found.milestones()
    for heading in ("strategy", *(f"after {count}" for count in counts), "sd", "pruned", "seconds"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right", no_wrap=True)
    for _, row in found.table().iterrows():
        cells = [f"{row[f'after_{count}']:.3f}" for count in counts]
        table.add_row(row["strategy"], *cells, f"{row['sd']:.3f}", f"{row['pruned']:.0%}", f"{row['seconds']:.0f}")
    console.print(table)
    console.print(f"page  {found.folder / 'strategies.md'}", highlight=False, markup=False, soft_wrap=True)
