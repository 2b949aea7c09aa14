"""Watching a run: a live view on stderr, two lines that stay in place; only notes without a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedmeta.experiment import Experiment
from fedmeta.progress import Progress as Stand
from fedmeta.progress import ProgressCallback, ignore_progress
from fedmeta.search.space import describe
from fedmeta.tables import number
from fedmeta.text import visible

if TYPE_CHECKING:
    from fedmeta.search.results import StudyResult
    from fedmeta.search.study import SearchConfig

BARS = "▁▂▃▄▅▆▇█"
NO_BAR = "!"
MOST_BARS = 24
NARROW = 80
"""In a terminal of fewer columns bars are a third as wide."""


@contextmanager
def progress(experiment: Experiment, title: str = "", *, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Shows how far a run is, the time that is left, new sites' score over the evaluations, and how many sites failed.

    The view needs a terminal. Notes, such as a round that was skipped or a site that joined, are printed wherever
    stderr goes.

    Args:
        experiment: What runs.
        title: What to call it; made from learner and data where it is empty.
        quiet: Whether to show nothing at all.

    Yields:
        What takes the run's progress.
    """
    if quiet:
        yield ignore_progress
        return
    console = Console(stderr=True)
    name = title or f"{experiment.learner.name} on {experiment.data.source}"
    view = RunView(name, experiment.server.rounds, narrow=console.width < NARROW)
    with ExitStack() as shown:
        if console.is_terminal:
            shown.enter_context(Live(view.group, console=console, transient=True, refresh_per_second=5))

        def report(stand: Stand) -> None:
            if stand.note:
                console.print(f"fedmeta: {visible(stand.note)}", highlight=False, markup=False, soft_wrap=True)
            view.update(stand)

        yield report


@contextmanager
def several(experiment: Experiment, *, quiet: bool = False) -> Iterator[Callable[[str, int, int], ProgressCallback]]:
    """Shows the progress of one run after the other; yields what gives each run (title, number, count) its view."""
    with ExitStack() as views:

        def next_run(title: str, number: int, count: int) -> ProgressCallback:
            views.close()
            return views.enter_context(progress(experiment, f"{number}/{count} {title}", quiet=quiet))

        yield next_run


@contextmanager
def trials(config: SearchConfig, *, quiet: bool = False) -> Iterator[Callable[[StudyResult], None]]:
    """Shows the progress of a search where stderr is a terminal; yields what takes the results so far."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    view = Progress(*columns, TextColumn("{task.fields[best]}", markup=False), console=console, transient=True)
    task = view.add_task(config.sampler, total=config.total, best="no trial yet")
    with ExitStack() as shown:
        if console.is_terminal and not quiet:
            shown.enter_context(view)

        def update(result: StudyResult) -> None:
            finished = sum(each.state != "waiting" for each in result.trials)
            if result.completed:
                best = f"best {number(result.best.score)}, {describe(result.best.settings)}"
                view.update(task, completed=finished, best=best)
            if finished == config.total:
                shown.close()  # what follows has its own view

        yield update


class RunView:
    """What the live view shows of one run.

    Attributes:
        group: The two lines.
    """

    def __init__(self, name: str, rounds: int, narrow: bool = False) -> None:
        self._most = MOST_BARS // 3 if narrow else MOST_BARS
        columns = (TextColumn("{task.description}", markup=False), BarColumn(self._most), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True))
        self._task = self._bar.add_task(name, total=rounds)
        self._scores: list[float] = []
        self._line = Text("starting", style="dim")
        self.group = Group(self._bar, self._line)

    def update(self, stand: Stand) -> None:
        """Takes the run's progress."""
        self._bar.update(self._task, completed=stand.round_number, total=stand.rounds)
        score = stand.personalized_score
        if score is not None and (not self._scores or not _same(self._scores[-1], score)):
            self._scores.append(score)
        self._line.plain = ""
        self._line.style = ""
        if score is None or stand.global_score is None:
            self._line.append("new sites: no score yet", style="dim")
        else:
            self._line.append("new sites ").append(sparkline(self._scores, self._most), style="cyan")
            self._line.append(f" personalized {number(score)}", style="bold")
            self._line.append(f", global {number(stand.global_score)}")
        if stand.failures:
            self._line.append(f"   {stand.failures} failed", style="red")


def sparkline(values: Sequence[float], most: int = MOST_BARS) -> str:
    """Returns values as bars between their lowest and their highest; of too many, evenly chosen ones and the last.

    What is not finite is shown as `NO_BAR`.
    """
    if len(values) > most:
        values = [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    top = len(BARS) - 1

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return NO_BAR
        # Halved, for the difference of two finite numbers may not be one.
        return BARS[round(top * (value / 2 - low / 2) / (high / 2 - low / 2)) if high / 2 > low / 2 else top // 2]

    return "".join(map(bar, values))


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
