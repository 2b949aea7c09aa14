"""A run that decides about itself, by the scores of validation sites (or judging training sites) while it trains.

All that it has decided is in the checkpoint, and no decision depends on a clock: a resumed run decides as the unbroken
one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.learners.order import EXACT, FIRST, has_first_order
from fedmeta.messages import LOSS, EvaluateReply
from fedmeta.problems.problem import has_outer_step, has_payload
from server.federation import judges
from server.ledger import Decision, per_round
from server.order import Order, after_evaluation, after_probe, climbed, probes
from server.order import summary as order_summary
from server.stopping import Progressed, ValidationScore, progressed, reached, score_of_sites
from server.strategy import MetaGradientStrategy

BEST, GUARD, GUARD_MEMORY = "best/", "guard/", "guard_optimizer/"
TOP, TOP_MEMORY = "top/", "top_optimizer/"
"""How names begin in the checkpoint's memory: of the best meta-state, of what is put back should a climb fail, and of
what a climb by stalling starts from; the last two with the optimizer's memory."""


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
        self.judges = "validation sites" if strategy.federation.validation.any() else "training sites' test rows"
        _check(experiment, learner, strategy)
        known: Mapping[str, Any] = earlier.steering if earlier else {}
        memory = earlier.memory if earlier else {}
        self.seen: int = known.get("seen", -1)
        self.ended: str = known.get("ended", "")
        self.target: dict[str, Any] = dict(known.get("target", {}))
        self.last_score = ValidationScore(**known["last_score"]) if "last_score" in known else None
        self.progress = Progressed(ValidationScore(**known["best"]), known["waited"]) if "best" in known else None
        self.best = _under(memory, BEST)
        self.ledger = [Decision(**entry) for entry in known.get("ledger", [])]
        self.order: Order | None = None
        if experiment.learner.order == "auto":
            self.order = Order.from_json(known["order"]) if "order" in known else Order()
        self.top_round: int = known.get("top_round", 0)
        self.guard, self.guard_memory = _under(memory, GUARD), _under(memory, GUARD_MEMORY)
        self.top, self.top_memory = _under(memory, TOP), _under(memory, TOP_MEMORY)

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
            **({"order": self.order.to_json(), "top_round": self.top_round} if self.order else {}),
            **({"best": self.progress.best.to_json(), "waited": self.progress.waited} if self.progress else {}),
        }

    @property
    def memory(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps of it."""
        kept = {BEST: self.best, GUARD: self.guard, GUARD_MEMORY: self.guard_memory}
        kept |= {TOP: self.top, TOP_MEMORY: self.top_memory}
        return {prefix + name: value for prefix, values in kept.items() for name, value in values.items()}

    def before_round(self) -> None:
        """Has the strategy take the gradient that the run is at."""
        if self.order:
            self.strategy.order = self.order.now

    def probes(self, round_number: int) -> str:
        """Returns in which other order the round's cohort is computed too; "" for none."""
        settings = self.experiment.server
        if not self.order or round_number % settings.probe_every or not probes(self.order, settings):
            return ""
        return EXACT if self.order.now == FIRST else FIRST

    def after_round(self, round_number: int, seconds: float, probe_seconds: float | None) -> str:
        """Takes what a round and its probe found; returns what to report, "" for nothing.

        Args:
            round_number: The round.
            seconds: How long its cohort took.
            probe_seconds: How long it took in the other order; None where there was no probe.
        """
        if not self.order:
            return ""
        now, settings = self.order.now, self.experiment.server
        self.order = self.order.timed(now, seconds, stepped=True)
        if probe_seconds is not None:
            self.order = self.order.timed(EXACT if now == FIRST else FIRST, probe_seconds, stepped=False)
        probe = self.strategy.compared
        if probe is None:
            return ""
        self.order, decision = after_probe(self.order, probe, settings)
        what = f"cosine {probe.cosine:.3f} between both gradients, their norms {probe.ratio:.3g} to 1"
        if decision == "climb":
            return self._climb(round_number, f"{what}, below climb_below = {settings.climb_below:g}", None)
        if decision == "descend":
            self.guard, self.guard_memory = {}, {}
            why = f"{what}, above descend_above = {settings.descend_above:g} in {settings.descend_probes} probes"
            return self._decide(round_number, "descend", why)
        return ""

    def due(self, round_number: int, last: int) -> bool:
        """Returns whether the judging sites are to be scored after a round."""
        if not self.active or self.seen >= round_number:
            return False
        # A climb is guarded by what the judging sites have at the state that it leaves.
        climbed_now = bool(self.order and self.order.guarded and not self.order.guard)
        return climbed_now or round_number % self.experiment.evaluation.validates_every == 0 or round_number >= last

    def observe(self, round_number: int, last: int, reply: EvaluateReply | None, totals: Mapping[str, float]) -> str:
        """Decides by the scores of the judging sites.

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
            return f"none of the {self.judges} has a score after round {round_number}: nothing is decided by it"
        self.last_score = found
        note = self._order_by(found, reply)
        if self.patience:
            self.progress = progressed(self.progress, found, self.metric)
            if self.progress.best == found:
                self.best = self.strategy.optimizer.meta_state
        target = self.experiment.target
        if target is not None and not self.target and reached(target, found, self.metric):
            return self._reach(round_number, last, found, totals)
        if self.progress and self.progress.waited >= self.patience and round_number < last:
            return self._stop(round_number, last, found, totals)
        return note

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
        own = {"order": order_summary(self.order)} if self.order else {}
        return {"stopping": stopping, **own, "ledger": [decision.to_json() for decision in self.ledger]}

    def _order_by(self, found: ValidationScore, reply: EvaluateReply | None) -> str:
        """Climbs, or undoes a climb, by what the judging sites have; returns what to report."""
        if not self.order or reply is None:
            return ""
        if self.ledger and self.ledger[-1].after is None and self.ledger[-1].round < found.round_number:
            self.ledger[-1] = replace(self.ledger[-1], after=found.score)
        losses = reply.figures[LOSS][np.arange(len(reply.names)), reply.chosen]
        score = (self.metric.sign * found.score, -found.loss)
        self.order, decision = after_evaluation(self.order, score, losses, self.experiment.server)
        if decision == "undo":
            self.strategy.restore(self.guard, self.guard_memory)
            climb = next(each for each in reversed(self.ledger) if each.what == "climb")
            rounds = found.round_number - climb.round
            why = f"the {self.judges} got worse after the climb in round {climb.round}: its state is put back"
            self.guard, self.guard_memory = {}, {}
            self.ledger.append(Decision(found.round_number, "undo", why, climb.before, found.score, -rounds))
            return f"round {found.round_number}: undid the climb to the exact gradient: {why}"
        if decision == "climb":
            patience = self.experiment.server.climb_patience
            why = f"{patience} scores of the {self.judges} no better than after round {self.top_round}: from there on"
            self.strategy.restore(self.top, self.top_memory)
            return self._climb(found.round_number, why, np.array(self.order.best_losses))
        if self.order.now == FIRST and not self.order.stalled:
            self.top, self.top_memory = self._here()
            self.top_round = found.round_number
        if not self.order.guarded:
            self.guard, self.guard_memory = {}, {}
        return ""

    def _climb(self, round_number: int, why: str, losses: NDArray[np.float64] | None) -> str:
        assert self.order
        self.order = climbed(self.order, losses)
        self.guard, self.guard_memory = self._here()
        self.top, self.top_memory = {}, {}
        return self._decide(round_number, "climb", why)

    def _here(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the meta-state and what the optimizer remembers, as they are now."""
        optimizer = self.strategy.optimizer
        return dict(optimizer.meta_state), {name: value.clone() for name, value in optimizer.state().items()}

    def _decide(self, round_number: int, what: str, why: str) -> str:
        before = self.last_score.score if self.last_score else None
        self.ledger.append(Decision(round_number, what, why, before))
        to = "up to the exact gradient" if what == "climb" else "down to the first-order gradient"
        return f"round {round_number}: {to}: {why}"

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


def _under(memory: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in memory.items() if name.startswith(prefix)}


def _score(reply: EvaluateReply | None, name: str, round_number: int) -> ValidationScore | None:
    """Returns the score of the judging sites after the steps that they take."""
    if reply is None:
        return None
    taken = np.arange(len(reply.names)), reply.chosen
    return score_of_sites(reply.figures[name][taken], reply.figures[LOSS][taken], round_number)


def _check(experiment: Experiment, learner: Learner, strategy: MetaGradientStrategy) -> None:
    """Raises `FedmetaError` where what steers the run has nothing to decide by."""
    _check_order(experiment, learner)
    if not experiment.steered:
        return
    key = "[evaluation] patience" if experiment.evaluation.patience else "[server] until"
    key = key if experiment.evaluation.patience or experiment.server.until else '[learner] order = "auto"'
    if not experiment.evaluation.validates_every:
        raise FedmetaError(f"{key}: needs evaluation.validate_every or evaluation.every above 0, to decide by scores")
    if experiment.privacy.secure_aggregation:
        raise FedmetaError(f"{key} with privacy.secure_aggregation: it needs the score of each validation site")
    if not experiment.splits_off:
        if not len(judges(strategy.federation, experiment)):
            raise FedmetaError(f"{key}: no training site has test rows to judge by: raise data.test")
    elif not strategy.federation.validation.any():
        raise FedmetaError(
            f"{key}: no training site can be split off as a validation site: give the run more sites, or raise "
            "evaluation.validation_sites"
        )
    if experiment.evaluation.patience and learner.personal(strategy.meta_state):
        raise FedmetaError(
            f'[evaluation] patience with [learner] name = "{experiment.learner.name}": what sites kept in the best '
            "round is gone by the end; set patience to 0"
        )


def _check_order(experiment: Experiment, learner: Learner) -> None:
    """Raises `FedmetaError` where a run cannot take the gradient that it asks for."""
    wanted, first = experiment.learner.order, experiment.learner.first_order_rounds
    if wanted == EXACT and not first:
        return
    server = experiment.server
    whole = server.quorum == 1.0 and server.late != "buffer" and not server.deadline
    rules = (
        (
            experiment.privacy.secure_aggregation or not whole,
            "rounds with a quorum or secure aggregation have one gradient: name fomaml or maml in its place",
        ),
        (
            wanted == "auto" and server.compression != "none",
            "a probe would take what compression keeps at a site for the next round",
        ),
        (
            not has_first_order(learner),
            f'learner.name = "{experiment.learner.name}" has no first-order approximation of all that it trains: take '
            "maml or anil",
        ),
        (has_payload(learner.problem) or has_outer_step(learner.problem), "the problem sends its own statistics"),
        (
            wanted == "auto" and bool(experiment.privacy.noise_multiplier),
            "a probe would release a second sum of each cohort, which the accountant does not count",
        ),
        (wanted == "auto" and not experiment.plain_cohorts, "a probe compares plain means over a cohort"),
    )
    for broken, reason in rules:
        if broken:
            key = f"first_order_rounds = {first}" if first else f'order = "{wanted}"'
            raise FedmetaError(f"[learner] {key}: {reason}")
