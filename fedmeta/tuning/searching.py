"""Runs a search: as many trials as were asked for, side by side or one by one; killed, it goes on where it was."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

from optuna import Study
from optuna.trial import TrialState

from fedmeta.build import smoke_test
from fedmeta.errors import FedmetaError
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.results import Search, found
from fedmeta.tuning.samplers import grid
from fedmeta.tuning.space import Range, Settings
from fedmeta.tuning.tracked import publish, search_run
from fedmeta.tuning.trial import attempt, bury, interrupted, opened, put_back

HOPELESS = 3
"""After so many trials in a row that could not even begin, the search stops, and they wait to be tried again."""
BEHIND = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
QUEUED = "queued"

Report = Callable[[Search], None]
"""Takes what a search has found so far."""


def search(plan: Plan, report: Report, judge: Callable[[Search], Search] | None = None) -> Search:
    """Runs the trials that a search still lacks, and returns what it has found.

    Args:
        plan: The search; one of the same name that was interrupted, or had fewer trials, goes on.
        report: Is called before the first trial and after each.
        judge: Returns what was found with what it is worth on new sites.

    Raises:
        FedmetaError: Another process works on this search, the store, the data or the model cannot be used, or no
            trial could begin.
        KeyboardInterrupt: The user stopped it; what was running waits for the search to go on.
    """
    learner = smoke_test(plan.experiment)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _alone(plan.folder):
        study = opened(plan, learner.problem.metrics[0])
        for trial in interrupted(study):
            bury(plan, trial)
            put_back(study, trial.number)
        total = _queue(plan, study)
        with search_run(plan) as run:
            report(found(plan, study))
            try:
                missing = total - len(study.get_trials(deepcopy=False, states=BEHIND))
                for _ in _trials(plan, missing, run.run_id if run else ""):
                    _stop_where_nothing_begins(study)
                    report(found(plan, study))
                result = judge(found(plan, study)) if judge else found(plan, study)
            except BaseException:
                publish(run, found(plan, study))
                raise
            result.best  # noqa: B018 - says why there is none
            publish(run, result)
    return result


def _queue(plan: Plan, study: Study) -> int:
    """Has the experiment's own settings tried first, and a grid's points after; returns how many trials there are."""
    own = plan.own_settings()
    points: list[Settings] = [own] if own else []
    if plan.sampler == "grid":
        # The experiment's own settings are a point of the grid where everything is a choice.
        besides = len(points) if any(isinstance(each, Range) for each in plan.space) else 0
        points += grid(plan.space, plan.trials - besides, plan.seed)
    if QUEUED not in study.user_attrs:
        for settings in points:
            study.enqueue_trial(settings, skip_if_exists=True)
        study.set_user_attr(QUEUED, len(study.get_trials(deepcopy=False)))
    return int(study.user_attrs[QUEUED]) if plan.sampler == "grid" else plan.trials


def _stop_where_nothing_begins(study: Study) -> None:
    last = [trial for trial in study.get_trials(deepcopy=False) if trial.state in BEHIND][-HOPELESS:]
    lost = [trial for trial in last if trial.state == TrialState.FAIL and "run_id" not in trial.user_attrs]
    if len(lost) == HOPELESS:
        for trial in lost:
            study.enqueue_trial(trial.params)
        raise FedmetaError(f"{HOPELESS} trials in a row could not begin; the last: {lost[-1].user_attrs['problem']}")


def _trials(plan: Plan, count: int, parent: str) -> Iterator[None]:
    """Runs so many trials; yields after each."""
    if plan.workers == 1:
        for _ in range(count):
            attempt(plan, parent)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.workers, mp_context=context, initializer=_end_with_parent) as pool:
        pending = {pool.submit(attempt, plan, parent) for _ in range(count)}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield
        except BrokenProcessPool:
            raise FedmetaError("a process of the search was killed; give the command again, and it goes on") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Ends this process when the search that started it is gone, however it went: nobody else would."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            connection.wait([parent.sentinel])
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock that the kernel lets go of when this process ends, however it ends.

    Raises:
        FedmetaError: Another process holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FedmetaError(
                f"another fedmeta tune works on this search ({folder}); wait for it, or stop it"
            ) from None
        yield
