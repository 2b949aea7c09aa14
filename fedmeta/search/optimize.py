"""Runs a search: its missing trials one by one or in parallel; killed, it resumes where it stopped."""

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
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

from optuna import Study
from optuna.trial import TrialState

from fedmeta.build import smoke_test
from fedmeta.errors import FedmetaError
from fedmeta.search.final_evaluation import FinalEvaluation
from fedmeta.search.results import StudyResult, load_results
from fedmeta.search.search_report import publish, search_run
from fedmeta.search.study import PROBLEM, RUN_ID, SearchConfig, current_trials, load_study, requeue, requeue_interrupted
from fedmeta.search.trial import TrialProgress, run_trial

MAX_FAILED_STARTS = 3
"""After this many trials in a row that could not start, the search stops, and they wait to be repeated."""

OnTrial = Callable[[StudyResult], None]
"""Takes what a search has found so far, before its first trial and after each."""


def tune(
    config: SearchConfig, on_trial: OnTrial, final: Callable[[StudyResult], FinalEvaluation] | None = None
) -> StudyResult:
    """Runs a search and publishes it as one run in MLflow, with its trials under it.

    Args:
        config: The search; an interrupted or shorter one of the same name is resumed.
        on_trial: Takes what was found so far.
        final: Compares the best trial with the baseline on new sites; not called where they are the same.

    Raises:
        FedmetaError: As for `optimize`.
        KeyboardInterrupt: The user stopped it; what was running is repeated when the search is resumed.
    """
    with open_study(config) as study, search_run(config) as run:
        on_trial(load_results(config, study))
        try:
            result = optimize(config, study, run.run_id if run else "", on_trial)
            if final and not result.best.untuned:
                result = replace(result, final=final(result))
        except BaseException:
            publish(run, load_results(config, study))
            raise
        publish(run, result)
    return result


@contextmanager
def open_study(config: SearchConfig) -> Iterator[Study]:
    """Checks what is tuned, and opens its study for this process alone; interrupted trials wait to be repeated.

    Since the lock ends with its process, every trial that is still marked as running was interrupted: no heartbeat has
    to expire before it can be repeated.

    Raises:
        FedmetaError: The data or the model cannot be used, or another process works on this search.
    """
    if config.runtime == "deployment":
        raise FedmetaError("a search needs --runtime local or ray; run what it finds in the deployed federation")
    score = smoke_test(config.experiment).problem.metrics[0]
    config.folder.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(config.folder):
        study = load_study(config, score)
        requeue_interrupted(config, study)
        yield study


def optimize(
    config: SearchConfig,
    study: Study,
    parent: str,
    on_trial: OnTrial = lambda result: None,
    progress: TrialProgress | None = None,
) -> StudyResult:
    """Runs the trials that a search still lacks, and returns what it has found.

    Args:
        config: The search.
        study: Its study, opened by `open_study`.
        parent: The MLflow run that shows its trials; "" = none.
        on_trial: Is called after each trial.
        progress: Returns what takes a trial's progress; only with one worker.

    Raises:
        FedmetaError: No trial could start or complete.
    """
    finished = sum(trial.state.is_finished() for trial in current_trials(study))
    for _ in _run_trials(config, config.total - finished, parent, progress):
        _stop_if_none_starts(study)
        on_trial(load_results(config, study))
    result = load_results(config, study)
    if not result.completed:
        raise FedmetaError(next((each.problem for each in result.trials if each.problem), "no trial completed"))
    return result


def _stop_if_none_starts(study: Study) -> None:
    last = [trial for trial in current_trials(study) if trial.state.is_finished()][-MAX_FAILED_STARTS:]
    failed = [trial for trial in last if trial.state is TrialState.FAIL and not trial.user_attrs.get(RUN_ID)]
    if len(failed) == MAX_FAILED_STARTS:
        for trial in failed:
            requeue(study, trial)
        raise FedmetaError(
            f"{MAX_FAILED_STARTS} trials in a row could not start; the last: {failed[-1].user_attrs[PROBLEM]}"
        )


def _run_trials(config: SearchConfig, count: int, parent: str, progress: TrialProgress | None) -> Iterator[None]:
    """Runs so many trials; yields after each."""
    if config.workers == 1:
        for _ in range(count):
            run_trial(config, parent, progress)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_exit_with_parent) as pool:
        pending = {pool.submit(run_trial, config, parent) for _ in range(count)}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield
        except BrokenProcessPool:
            raise FedmetaError("a worker of the search was killed; repeat the command to resume the search") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _exit_with_parent() -> None:
    """Ends this worker when the search that started it has ended, however it did."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            connection.wait([parent.sentinel])
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    """Holds a lock that the kernel releases when this process ends, however it ends.

    Raises:
        FedmetaError: Another process holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FedmetaError(f"another process works on this search ({folder}); wait for it, or stop it") from None
        yield
