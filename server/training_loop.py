"""The rounds of a run: train, now and then evaluate, track, write checkpoints; from the start or from a checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from flwr.app import ArrayRecord, ConfigRecord, ConfigScalar, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedmeta import checkpoint as checkpoints
from fedmeta.checkpoint import Checkpoint, Evaluation
from fedmeta.data import subgroups
from fedmeta.data.stream_split import step_of
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import headline, summarize
from fedmeta.experiment import Experiment
from fedmeta.files import locked, remove_parts
from fedmeta.messages import EvaluateReply
from fedmeta.problems.problem import has_picture
from fedmeta.progress import FailureThrottle, Progress, ProgressCallback
from server import secure_evaluation, stream
from server.adaptation_schedule import AdaptationSchedule
from server.engine_choice import choose_engine
from server.evaluation import evaluate_all_sites
from server.federation import SITE_UNAVAILABLE, remap_site_indices
from server.lateness import Received
from server.round_kinds import gather
from server.run_checkpoint import checkpoint_of
from server.run_log import FAILURES_FILE, evaluation_frame, make_run_folder, new_folder, remove_unused
from server.run_parts import RunParts, assemble
from server.secure_rounds import secure_scores
from server.signals import defer_keyboard_interrupt
from server.system_metrics import ProcessMonitor

LOCK = ".lock"
"""The file in a run's folder that the process which writes there has locked."""

MAX_EMPTY_ROUNDS = 10
"""After so many rounds in a row without a usable reply the run stops."""


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        summary: The JSON object of the command line.
        sites: Every evaluation with one row per site (see `fedmeta.evaluation.sites_frame`).
        meta_state: The final meta-state, standardisation included.
        folder: The run's folder.
    """

    summary: dict[str, Any]
    sites: pd.DataFrame
    meta_state: dict[str, Tensor]
    folder: Path


def run(
    grid: Grid,
    experiment: Experiment,
    on_progress: ProgressCallback,
    resume: Path | None = None,
    *,
    data_here: bool = False,
) -> Outcome:
    """Runs an experiment over the nodes of a grid.

    Args:
        grid: Flower's grid.
        experiment: The run's description.
        on_progress: Called with the progress after each round.
        resume: The folder of an unfinished run of this experiment to resume.
        data_here: Whether this machine holds the sites' data, as in simulation; then a problem's pictures are drawn.

    Raises:
        FedmetaError: The run cannot start, or none of ten rounds, or of all of a shorter run's, had a usable reply.
        KeyboardInterrupt, SystemExit: The user stopped it; a checkpoint has been written.
    """
    folder = resume or new_folder(experiment)
    make_run_folder(folder)
    with locked(folder / LOCK):
        earlier = checkpoints.newest(folder)[0] if resume else None
        return _run(grid, experiment, on_progress, folder, earlier, data_here)


def _run(
    grid: Grid,
    experiment: Experiment,
    on_progress: ProgressCallback,
    folder: Path,
    earlier: Checkpoint | None,
    data_here: bool,
) -> Outcome:
    try:
        remove_parts(folder)
        loop = TrainingLoop(grid, experiment, on_progress, assemble(grid, experiment, folder, earlier))
    except BaseException:
        if earlier is None:
            remove_unused(folder)
        raise
    try:
        loop.start()
        loop.run()
        return loop.finish(data_here)
    except (KeyboardInterrupt, SystemExit):  # Flower exits a ServerApp whose run was stopped
        with defer_keyboard_interrupt():
            try:
                loop.save()
            finally:
                loop.logger.stop("KILLED")
            loop.report(f"stopped after round {loop.round_number}; to resume: --resume {loop.logger.folder.name}")
        raise
    except BaseException:
        with defer_keyboard_interrupt():
            loop.logger.stop("FAILED")
        raise


class TrainingLoop:
    """A run in progress; what it is made of is in its checkpoint."""

    def __init__(self, grid: Grid, experiment: Experiment, on_progress: ProgressCallback, parts: RunParts) -> None:
        self.grid, self.experiment, self.on_progress = grid, experiment, on_progress
        self.membership, self.learner, self.strategy = parts.membership, parts.learner, parts.strategy
        self.steering, self.lateness, self.privacy = parts.steering, parts.lateness, parts.privacy
        self.logger, self.without_sums, self.started_from = parts.logger, parts.without_sums, parts.started_from
        self.metrics = parts.learner.problem.metrics
        earlier = parts.earlier
        self.round_number = earlier.round_number if earlier else 0
        self.alarms: list[dict[str, Any]] = list(earlier.steering.get("alarms", [])) if earlier else []
        self.evaluations: list[Evaluation] = list(earlier.evaluations) if earlier else []
        self.totals: dict[str, float] = dict(earlier.totals) if earlier else {}
        known = zip(earlier.names, earlier.took_part, strict=False) if earlier else ()
        self.took_part: Counter[str] = Counter(dict(known))
        self.scores: tuple[float | None, float | None] = (None, None)
        self.last = experiment.server.rounds
        if self.privacy:
            self.last = self.round_number + self.privacy.rounds_left(self.last - self.round_number)
        self.finished = bool(earlier and earlier.finished)
        self.opened = bool(earlier and earlier.run_id)
        self.empty_rounds = 0
        self.useful = bool(self.round_number)
        self.failure_throttle = FailureThrottle(see=FAILURES_FILE)
        self.influence_throttle = FailureThrottle(see=FAILURES_FILE)
        self.monitor = ProcessMonitor()

    def start(self) -> None:
        """Opens the tracked run, and has the engine chosen where that is not done.

        A checkpoint stands on the disk before the tracked run is opened: whenever the process dies from here on, the
        run can be resumed, and in the same tracked run.
        """
        fresh = self.experiment.runtime.checkpoint_every and not self.opened
        if self.started_from:
            self.logger.keep_start(self.started_from)
        if fresh:
            self.save()
        with defer_keyboard_interrupt():  # a tracked run that was opened must be known, to be ended
            self.logger.start(self.membership.federation)
        if not self.round_number and self.experiment.server.rounds:
            self.logger.engine(choose_engine(self.strategy, self.grid))
        if fresh:
            self.save()

    def run(self) -> None:
        """Runs the rounds that are left, with an evaluation before the first one."""
        self.report()
        self.logger.log_failures(0, self.membership.refused, "start")
        for site, difference in self.membership.refused.items():
            self.report(f"refused {site}: {difference}")
        for note in self.membership.notes:
            self.report(note)
        self.logger.log_failures(0, self.without_sums, "standardisation")
        for site, reason in self.without_sums.items():
            self.report(f"standardisation without {site}: {reason}")
        self.logger.log_failures(self.round_number, dict.fromkeys(self.membership.absent, SITE_UNAVAILABLE), "start")
        for site in self.membership.absent:
            self.report(f"continues without {site}: {SITE_UNAVAILABLE}")
        every, last = self.experiment.evaluation.every, self.last
        if last < self.experiment.server.rounds:
            budget, rounds = self.experiment.privacy.epsilon, self.experiment.server.rounds
            self.report(f"the privacy budget of epsilon {budget:g} ends the run after {last} of {rounds} rounds")
        saves = self.experiment.runtime.checkpoint_every
        # A run that was stopped between a round and its evaluation continues with the evaluation.
        if every and self.round_number % every == 0 and self.round_number < last and not self._evaluated():
            self._evaluate()
        self._steer()
        while self.round_number < last and not self.steering.ended:
            if stream.holds(self.experiment, self.round_number + 1):
                self.round_number += 1
            else:
                self._round(self.round_number + 1)
            # The last evaluation, with all that belongs to it, is `finish`'s.
            if every and self.round_number % every == 0 and self.round_number < last:
                self._evaluate()
            self._steer()
            if saves and self.round_number % saves == 0:
                self.save()
            self.report()

    def finish(self, data_here: bool) -> Outcome:
        """Evaluates the final meta-state where that is not done, writes the results, and ends the tracked run."""
        if not self.finished:
            with defer_keyboard_interrupt():
                if note := self.steering.restore_best():
                    self.report(note)
            self._evaluate(last=True)
        if not self.finished:
            raise FedmetaError("no site could be evaluated at the end of the run; its checkpoint holds the meta-state")
        path = self.save()
        sites = pd.concat(
            [self._frame(evaluation) for evaluation in self.evaluations],
            ignore_index=True,
        )
        if (evaluations := self.learner.problem.solver.evaluations) > 1:
            sites["step_evaluations"] = evaluations
        privacy = self.privacy.summary() if self.privacy else {}
        groups = self._summarize(self.evaluations[-1])
        in_time = {"stream": self._in_time()} if self.experiment.stream.block else {}
        trial = bool(self.experiment.tracking.parent)  # whose pictures are never looked at
        if data_here and has_picture(self.learner.problem) and not trial:
            self._draw(sites[sites["round"] == self.round_number])
        held_out, totals = self.membership.federation.held_out, self.totals
        outcome: Outcome | None = None
        try:
            with defer_keyboard_interrupt():
                steering = self.steering.summary(self.experiment.server.rounds) | in_time
                summary = self.logger.finish(
                    sites, groups, self.metrics[0], totals, self.round_number, path, privacy, held_out, steering
                )
                outcome = Outcome(summary, sites, self.strategy.meta_state, self.logger.folder)
        except (KeyboardInterrupt, SystemExit):
            if outcome is None:
                raise  # else all is done, and there is nothing left to stop
        assert outcome is not None
        return outcome

    def _draw(self, sites: pd.DataFrame) -> None:
        """Draws what the problem shows of some sites; a finished training does not fail because of a picture."""
        from fedmeta.pictures import write_pictures  # matplotlib takes a second to import

        try:
            write_pictures(self.experiment, self.learner, self.strategy.meta_state, sites, self.logger.folder)
        except Exception as error:  # whatever a user's own code raises
            self.report(f"the problem's pictures could not be drawn: {error}")

    def save(self) -> Path:
        """Writes a checkpoint and returns its path."""
        checkpoint = checkpoint_of(
            self.membership.federation,
            self.strategy,
            self.steering,
            self.logger,
            under_way=self.lateness.state(self.grid) if self.lateness else ({}, {}),
            round_number=self.round_number,
            took_part=self.took_part,
            evaluations=self.evaluations,
            totals=self.totals,
            alarms=self.alarms,
            finished=self.finished,
        )
        path = checkpoints.write(checkpoint, self.logger.folder)
        self.strategy.saved_rounds = checkpoints.rounds(self.logger.folder, self.round_number)
        return path

    def _round(self, number: int) -> None:
        started = time.perf_counter()
        strategy, before = self.strategy, self.membership.federation.names
        refused = set(self.membership.refused)
        for note in self.membership.poll_new_nodes():
            self.report(note)
        fresh = {site: why for site, why in self.membership.refused.items() if site not in refused}
        self.logger.log_failures(number, fresh, "start")
        self.evaluations = remap_site_indices(self.evaluations, before, self.membership.federation)
        strategy.federation = self.membership.federation
        self.steering.before_round()
        gathered = gather(strategy, number, self.grid, self.lateness, self.steering.probes(number))
        with defer_keyboard_interrupt():
            metrics = gathered.step()
            self.round_number = number
            # A private round steps also where no node answered, for who was asked is not to be seen.
            if note := self.steering.after_round(number, gathered.seconds, gathered.probe_seconds):
                self.report(note)
            idle = metrics is None or bool(strategy.log.failed and not metrics["sites"])
            self.empty_rounds = self.empty_rounds + 1 if idle else 0
            self.useful = self.useful or not idle
            self.took_part.update(strategy.log.took_part)
            self._log(number, time.perf_counter() - started, metrics, gathered.late)
        if metrics is None or strategy.log.failed:
            what = f"round {number} {'skipped:' if metrics is None else 'without'} {strategy.log.reasons()}"
            if note := self.failure_throttle.filter(what, strategy.log.failed):
                self.report(note)
        if self.empty_rounds == MAX_EMPTY_ROUNDS or (number == self.last and not self.useful):
            raise FedmetaError(
                f"none of {self.empty_rounds} rounds had a usable reply: {strategy.log.reasons(advise=True)}"
            )

    def _log(self, number: int, seconds: float, metrics: MetricRecord | None, late: Received | None) -> None:
        """Tracks a round's figures, and names the sites whose replies were not used as they came."""
        log = self.strategy.log
        self._count(seconds)
        figures = {"time/round_s": seconds, "failures/replies": float(len(log.failed))}
        figures |= {"traffic/bytes_up": log.bytes_up, "traffic/bytes_down": log.bytes_down}
        figures |= self.monitor.metrics()
        if self.privacy:
            figures["privacy/epsilon"] = self.privacy.epsilon
        if late:
            used = sum(len(each.names) for each, _ in late.late)
            figures |= {"late/sites": float(len(late.missing)), "late/used": float(used)}
            if self.experiment.runtime.delay:
                figures["time/simulated_s"] = self.lateness.clock if self.lateness else 0.0
        loss = metrics.get("query_loss") if metrics else None
        self.logger.round(number, figures | ({"train/query_loss": loss} if isinstance(loss, float) else {}))
        self.logger.log_failures(number, log.failed)
        self.logger.log_failures(number, log.late, "late")
        self.logger.log_failures(number, log.shortened, "shortened")
        self.logger.log_failures(number, log.outlying, "query loss")
        if log.shortened or log.undone:
            self._report_influence(number)

    def _report_influence(self, number: int) -> None:
        """Keeps a checkpoint from before a round whose replies were out of the ordinary, and reports them."""
        kept = checkpoints.keep_before(self.logger.folder, number)
        note = f"; the checkpoint from before is kept as {kept.name}" if kept else ""
        shortened = self.strategy.log.shortened
        if shortened:
            site, why = next(iter(shortened.items()))
            others = f" (and {len(shortened) - 1} more)" if len(shortened) > 1 else ""
            note = f"round {number}: {site}{others}: {why}{note}"
            if line := self.influence_throttle.filter(note, dict.fromkeys(shortened, "shortened")):
                self.report(line)
        elif note:
            self.report(note.removeprefix("; "))

    def _evaluate(self, last: bool = False) -> None:
        """Evaluates all sites; at the end also local-only, and after as many steps as the schedule allows."""
        counted = self.totals
        try:
            if self.experiment.privacy.secure_aggregation:
                found = self._secure_evaluate()
            else:
                found = evaluate_all_sites(self._ask, self.strategy, self.learner, self.round_number, last)
        except BaseException:
            # It comes a second time, should the run be resumed, and is then counted.
            self.totals = counted
            raise
        if found is None:
            return
        evaluation, schedule = found
        with defer_keyboard_interrupt():
            if self._evaluated():
                self.evaluations.pop()
            self.evaluations.append(evaluation)
            frame = self._frame(evaluation)
            groups = self._summarize(evaluation)
            self.scores = headline(groups)
            self.logger.evaluation(self.round_number, frame, groups, schedule)
            self.finished = last
        self.report()

    def _in_time(self) -> dict[str, Any]:
        """Returns what the blocks of a stream came to, and what the last meta-state has of them in hindsight."""
        settings, every = self.experiment.evaluation, self.experiment.evaluation.every
        steps = {step_of(each.round_number, every): each for each in self.evaluations if each.round_number}
        frames = {step: self._frame(each) for step, each in sorted(steps.items())}
        later: dict[int, pd.DataFrame] = {}
        if self.experiment.stream.hindsight:
            taken = self.learner.evaluation_steps(settings.steps)
            for step, each in steps.items():
                reply = self._ask(self.strategy.arrays(), steps=taken, rate=1.0, gate=settings.gate, block=step)
                if reply:
                    sites = self.membership.federation.indices(reply.names)
                    later[step] = self._frame(Evaluation(each.round_number, sites, reply.figures, reply.chosen))
        ordered = list(frames)
        found = {place: later[step] for place, step in enumerate(ordered) if step in later}
        return stream.summarize_stream(self.experiment, list(frames.values()), found, self.metrics[0], self.alarms)

    def _hear(self, reply: EvaluateReply) -> None:
        """Notes the alarms that sites had in a block."""
        step = step_of(self.round_number, self.experiment.evaluation.every)
        self.alarms = [alarm for alarm in self.alarms if alarm["step"] != step]
        went_off = {name: row for name, row in zip(reply.names, reply.alarms, strict=True) if row >= 0}
        self.alarms += [{"site": name, "step": step, "row": row} for name, row in went_off.items()]
        for name, row in went_off.items():
            self.report(f"round {self.round_number}: alarm at {name}, at its row {row + 1}: it forgets what was before")

    def _frame(self, evaluation: Evaluation) -> pd.DataFrame:
        """Returns an evaluation as a frame with one row per site."""
        federation = self.membership.federation
        return evaluation_frame(self.experiment, federation, evaluation, self.metrics, self._subgroups)

    def _secure_evaluate(self) -> tuple[Evaluation, AdaptationSchedule | None] | None:
        """Returns an evaluation that holds the sums of groups of sites alone; None where too few were left."""
        started, settings = time.perf_counter(), self.experiment.evaluation
        steps = self.learner.evaluation_steps(settings.steps)
        sums = secure_scores(self.strategy, self.round_number, self.grid, steps=steps, rate=1.0, gate=settings.gate)
        self._count(time.perf_counter() - started)
        self.logger.log_failures(self.round_number, self.strategy.log.failed, "evaluation")
        if sums is None:
            self.report(f"no evaluation after round {self.round_number}: {self.strategy.log.reasons()}")
            return None
        return secure_evaluation.evaluation_of(self.round_number, sums, self.metrics), None

    def _steer(self) -> None:
        """Scores the validation sites, where the run decides by them and it is time, and decides."""
        number, last, settings = self.round_number, self.last, self.experiment.evaluation
        if not self.steering.due(number, last):
            return
        steps = self.learner.evaluation_steps(settings.steps)
        reply = self._ask(self.strategy.arrays(), steps=steps, rate=1.0, gate=settings.gate, validation=True)
        with defer_keyboard_interrupt():
            note = self.steering.observe(number, last, reply, self.totals)
            found = self.steering.last_score
            if found and found.round_number == number:
                self.logger.add(number, {f"validation/personalized_{self.metrics[0].name}": found.score})
        if note:
            self.report(note)

    def _ask(self, arrays: ArrayRecord, **how: ConfigScalar) -> EvaluateReply | None:
        """Returns the scores of one message to all nodes; None where no site was evaluated, which is reported."""
        started = time.perf_counter()
        strategy = self.strategy
        messages = strategy.configure_evaluate(self.round_number, arrays, ConfigRecord(dict(how)), self.grid)
        replies = self.grid.send_and_receive(messages, timeout=self.experiment.server.round_timeout)
        strategy.aggregate_evaluate(self.round_number, replies)
        self._count(time.perf_counter() - started)
        self.logger.log_failures(self.round_number, strategy.log.failed, "evaluation")
        if strategy.evaluated is None:
            self.report(f"no site was evaluated after round {self.round_number}: {strategy.log.reasons()}")
        elif strategy.log.failed:
            self.report(f"evaluation after round {self.round_number} without {strategy.log.reasons()}")
        if strategy.evaluated and strategy.evaluated.alarms:
            self._hear(strategy.evaluated)
        return strategy.evaluated

    @property
    def _subgroups(self) -> tuple[str, ...]:
        return subgroups.names_of_run(self.experiment, self.membership.federation.categories)

    def _summarize(self, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
        positive = getattr(self.learner.problem, "positive", 1)
        sums, counts, names = evaluation.pooled, evaluation.pooled_sites, self._subgroups
        groups = summarize(self._frame(evaluation), self.metrics, sums, counts, positive, names)
        return secure_evaluation.summaries(groups, evaluation.pooled, self.metrics)

    def _evaluated(self) -> bool:
        return bool(self.evaluations) and self.evaluations[-1].round_number == self.round_number

    def _count(self, seconds: float) -> None:
        log = self.strategy.log
        gains = {"wall_s": seconds, "bytes_down": log.bytes_down, "bytes_up": log.bytes_up}
        gains["failures"] = len(log.failed)
        self.totals = {name: self.totals.get(name, 0.0) + gain for name, gain in gains.items()}

    def report(self, note: str = "") -> None:
        """Reports the run's progress, with a note where there is one."""
        failures = int(self.totals.get("failures", 0))
        self.on_progress(Progress(self.round_number, self.last, *self.scores, failures, note, self.logger.run_id))
