"""A run that decides about itself, by the scores of validation sites while it trains.

All that it has decided is in the checkpoint, and no decision depends on a clock: a resumed run decides as the unbroken
one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.messages import LOSS, EvaluateReply
from server.ledger import Decision, per_round
from server.stopping import Progressed, ValidationScore, progressed, reached, score_of_sites
from server.strategy import MetaGradientStrategy

BEST = "best/"
"""How the names of the best meta-state's tensors begin in the checkpoint's memory."""


class Steering:
    """What a run decides about itself.

    Args:
        experiment: The run's description.
        learner: What the run trains.
        strategy: Holds the meta-state.
        earlier: The checkpoint that the run resumes from.

    Raises:
        FedmetaError: The experiment asks for decisions that cannot be made here.
    """

    def __init__(
        self,
        experiment: Experiment,
        learner: Learner,
        strategy: MetaGradientStrategy,
        earlier: Checkpoint | None = None,
    ) -> None:
        self.experiment, self.strategy = experiment, strategy
        self.learner, self.metric = learner, learner.problem.metrics[0]
        self.patience = experiment.evaluation.patience
        self.active = experiment.steered
        _check(experiment, learner, strategy)
        known: Mapping[str, Any] = earlier.steering if earlier else {}
        memory = earlier.memory if earlier else {}
        self.seen: int = known.get("seen", -1)
        self.ended: str = known.get("ended", "")
        self.target: dict[str, Any] = dict(known.get("target", {}))
        self.last_score = ValidationScore(**known["last_score"]) if "last_score" in known else None
        self.progress = Progressed(ValidationScore(**known["best"]), known["waited"]) if "best" in known else None
        self.best = {name.removeprefix(BEST): value for name, value in memory.items() if name.startswith(BEST)}
        self.ledger = [Decision(**entry) for entry in known.get("ledger", [])]

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it, beside `memory`."""
        if not self.active:
            return {}
        return {
            "seen": self.seen,
            "ended": self.ended,
            "target": self.target,
            "ledger": [decision.to_json() for decision in self.ledger],
            **({"last_score": self.last_score.to_json()} if self.last_score else {}),
            **({"best": self.progress.best.to_json(), "waited": self.progress.waited} if self.progress else {}),
        }

    @property
    def memory(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps of it."""
        return {BEST + name: value for name, value in self.best.items()}

    def due(self, round_number: int, last: int) -> bool:
        """Returns whether the validation sites are to be scored after a round."""
        every = self.experiment.evaluation.every
        return self.active and self.seen < round_number and (round_number % every == 0 or round_number >= last)

    def observe(self, round_number: int, last: int, reply: EvaluateReply | None, totals: Mapping[str, float]) -> str:
        """Decides by the scores of validation sites.

        Args:
            round_number: The round after which they were scored.
            last: The last round that the run may have.
            reply: Their figures; None where no site answered: then nothing is decided.
            totals: Seconds and bytes so far.

        Returns:
            What to report to the user; "" for nothing.
        """
        self.seen = round_number
        found = _score(reply, self.metric.name, round_number)
        if found is None:
            return f"no validation site has a score after round {round_number}: nothing is decided by it"
        self.last_score = found
        if self.patience:
            self.progress = progressed(self.progress, found, self.metric)
            if self.progress.best == found:
                self.best = self.strategy.optimizer.meta_state
        target = self.experiment.target
        if target is not None and not self.target and reached(target, found, self.metric):
            return self._reach(round_number, last, found, totals)
        if self.progress and self.progress.waited >= self.patience and round_number < last:
            return self._stop(round_number, last, found, totals)
        return ""

    def restore_best(self) -> str:
        """Puts the best meta-state in place at the end of training; returns what to report, "" for nothing."""
        if not (self.patience and self.progress and self.best) or self.target:
            return ""
        best = self.progress.best
        if self.last_score is None or best.round_number == self.last_score.round_number:
            return ""
        self.strategy.replace(self.best)
        if not any(decision.what == "restore" for decision in self.ledger):
            why = f"the meta-state after round {best.round_number} is the best at the validation sites"
            self.ledger.append(Decision(self.seen, "restore", why, self.last_score.score, best.score))
        return f"restored the meta-state after round {best.round_number}: {self.metric.name} {best.score:.4g} there"

    def summary(self, rounds_allowed: int) -> dict[str, Any]:
        """Returns its entries of the run's summary."""
        if not self.active:
            return {}
        stopping: dict[str, Any] = {"rounds_allowed": rounds_allowed, "ended": self.ended}
        if self.last_score:
            stopping["validation_score"] = self.last_score.score
        if self.progress:
            stopping |= {"best_round": self.progress.best.round_number, "best_score": self.progress.best.score}
        if self.experiment.target is not None:
            stopping |= {"target": self.experiment.target, "reached": bool(self.target), **self.target}
        return {"stopping": stopping, "ledger": [decision.to_json() for decision in self.ledger]}

    def _reach(self, round_number: int, last: int, found: ValidationScore, totals: Mapping[str, float]) -> str:
        self.target = {"to_target": {"rounds": round_number, "wall_s": round(totals.get("wall_s", 0.0), 3)}}
        self.target["to_target"] |= {name: int(totals.get(name, 0)) for name in ("bytes_down", "bytes_up")}
        self.ended = "target"
        why = f"{self.metric.name} {found.score:.4g} of validation sites reached the target {self.experiment.target:g}"
        self._note("stop", round_number, last, why, found, found, totals)
        return f"ended after round {round_number} of {last}: {why}"

    def _stop(self, round_number: int, last: int, found: ValidationScore, totals: Mapping[str, float]) -> str:
        assert self.progress
        best = self.progress.best
        self.ended = "patience"
        why = (
            f"{self.progress.waited} evaluations without a better {self.metric.name} of validation sites than "
            f"{best.score:.4g} after round {best.round_number}"
        )
        self._note("stop", round_number, last, why, best, found, totals)
        return f"ended after round {round_number} of {last}: {why}"

    def _note(
        self,
        what: str,
        round_number: int,
        last: int,
        why: str,
        before: ValidationScore,
        after: ValidationScore,
        totals: Mapping[str, float],
    ) -> None:
        seconds, moved = per_round(totals, round_number)
        left = last - round_number
        decision = Decision(round_number, what, why, before.score, after.score)
        self.ledger.append(replace(decision, saved_rounds=left, saved_s=left * seconds, saved_bytes=left * moved))


def _score(reply: EvaluateReply | None, name: str, round_number: int) -> ValidationScore | None:
    """Returns the score of validation sites after the steps that they take."""
    if reply is None:
        return None
    taken = np.arange(len(reply.names)), reply.chosen
    return score_of_sites(reply.figures[name][taken], reply.figures[LOSS][taken], round_number)


def _check(experiment: Experiment, learner: Learner, strategy: MetaGradientStrategy) -> None:
    """Raises `FedmetaError` where what steers the run has nothing to decide by."""
    if not experiment.steered:
        return
    key = "[evaluation] patience" if experiment.evaluation.patience else "[server] until"
    if not experiment.evaluation.every:
        raise FedmetaError(f"{key}: needs evaluation.every above 0: validation sites are scored at evaluations")
    if not strategy.federation.validation.any():
        raise FedmetaError(
            f"{key}: no training site can be split off as a validation site: give the run more sites, or raise "
            "evaluation.validation_sites"
        )
    if experiment.evaluation.patience and learner.personal(strategy.meta_state):
        raise FedmetaError(
            f'[evaluation] patience with [learner] name = "{experiment.learner.name}": what sites kept in the best '
            "round is gone by the end; set patience to 0"
        )
