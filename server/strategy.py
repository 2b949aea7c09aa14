"""One round: who takes part, what they are sent, how their meta-gradients are combined, how the meta-state steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.checkpoint import KEPT
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import NEW, TRAINING
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.learners.learner import key_of
from fedmeta.messages import (
    EVALUATE,
    FAILURES,
    QUERY_ENGINE,
    TRAIN,
    EngineReply,
    EvaluateReply,
    MessageError,
    RoundRequest,
    TrainReply,
    failure,
    payload_bytes,
    write_arrays,
)
from fedmeta.problems import has_payload
from server.aggregation import Gradient, aggregate_replies
from server.federation import NO_NODE, SITE_UNAVAILABLE, Federation
from server.optimizer import ServerOptimizer
from server.privacy import SiteLevelDP
from server.sampling import draw_cohort, sites_to_evaluate

DIVERGED = "its meta-gradient was not finite"
"""Why a site was left out of a round whose adaptation, or whose start, has run away."""


@dataclass
class RoundLog:
    """What happened in one round.

    Attributes:
        failed: Site (or "node NUMBER") and the reason, for each that gave no usable answer.
        bytes_down: Bytes of all messages sent.
        bytes_up: Bytes of all replies received.
    """

    failed: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def reasons(self, advise: bool = False) -> str:
        """Returns the first failure in words, with who gave it, how many others there are, and what may help."""
        if not self.failed:
            return "no site was asked, or too few gave a finite gradient"
        site, reason = next(iter(self.failed.items()))
        others = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
        advice = ". Smaller rates may help: learner.inner_lr, server.lr" if advise and reason == DIVERGED else ""
        return f"{site}{others}: {reason}{advice}"


class MetaGradientStrategy(Strategy):
    """Samples sites by name, combines their meta-gradients, and steps the meta-state with a torch optimizer.

    Args:
        experiment: The run's description.
        federation: The sites and their nodes; may be replaced between rounds.
        optimizer: The server optimizer, which holds the learned part of the meta-state.
        constants: The rest of the meta-state (standardisation), which does not change.
        run: The name of the run's folder.
        privacy: Draws the cohorts and noises their sums, where the experiment asks for that.
        learner: What the run trains: its problem may make its own step of what sites send.
    """

    def __init__(
        self,
        experiment: Experiment,
        federation: Federation,
        optimizer: ServerOptimizer,
        constants: Mapping[str, Tensor],
        run: str,
        privacy: SiteLevelDP | None = None,
        *,
        learner: Learner,
    ) -> None:
        self.experiment = experiment
        self.federation = federation
        self.optimizer = optimizer
        self.constants = dict(constants)
        self.run = run
        self.privacy = privacy
        self.saved_rounds = (0,) * KEPT
        self.engine: str = experiment.runtime.engine
        self.budget = int(experiment.runtime.memory * (1 << 30))
        self.log = RoundLog()
        self.evaluated: EvaluateReply | None = None
        self._requested: dict[int, tuple[str, ...]] = {}
        self._columns = 1
        self._groups: dict[str, int] = {}
        self._packed: ArrayRecord | None = None
        # What a gradient looks like: the keys, shapes and types, which do not change.
        self.learner = learner
        self._template = learner.message_template(
            {name: value for name, value in self.meta_state.items() if not name.startswith("standardisation.")}
        )

    def summary(self) -> None:
        """Prints nothing: what a run is, the experiment says."""

    @property
    def meta_state(self) -> dict[str, Tensor]:
        """A copy of the meta-state as it stands, with its constants."""
        return {**self.optimizer.meta_state, **self.constants}

    def arrays(self) -> ArrayRecord:
        """Returns the meta-state as it stands, as a record."""
        if self._packed is None:
            self._packed = write_arrays(self.meta_state)
        return self._packed

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draws the round's cohort and sends each of its nodes the meta-state and the names of its sites."""
        self.log = RoundLog()
        server = self.experiment.server
        if self.privacy:
            cohort = self.privacy.sample(self.federation.training)
        else:
            cohort = draw_cohort(self.federation, server, self.experiment.runtime.seed, server_round)
        return self._messages(grid, TRAIN, server_round, cohort, arrays, per_site=server.aggregator != "mean")

    def choose_engine(self, grid: Grid) -> EngineReply | None:
        """Asks a node which engine is fastest for the first cohort, and keeps that for the whole run.

        Returns:
            The choice and its figures; None where the experiment names an engine and a budget, or a node was silent and
            each goes by its own rule.

        Raises:
            FedmetaError: Every node of the cohort reports that it cannot compute it.
        """
        if self.engine != "auto" and self.budget:
            return None
        cohort = draw_cohort(self.federation, self.experiment.server, self.experiment.runtime.seed, 1)
        nodes = self.federation.node_ids[cohort]
        for node in dict.fromkeys(nodes.tolist()):
            messages = self._messages(grid, QUERY_ENGINE, 1, cohort[nodes == node], self.arrays())
            self.log = RoundLog()
            for _, content in self._valid_replies(
                grid.send_and_receive(messages, timeout=self.experiment.server.round_timeout)
            ):
                try:
                    reply = EngineReply.unpack(content)
                except MessageError:
                    continue
                self.engine = reply.engine if self.engine == "auto" else self.engine
                self.budget = self.budget or reply.budget
                return reply
            codes = {reason.partition(":")[0] for reason in self.log.failed.values()}
            if not codes or not codes <= FAILURES.keys():
                return None
        raise FedmetaError(
            f"no node can compute the first cohort: {self.log.reasons()}; the nodes' logs have the cause"
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Steps the meta-state along what the aggregator makes of the replies' meta-gradients.

        Returns:
            The new meta-state and the round's query loss; or (None, None) where fewer than `server.min_sites` sites
            gave a usable gradient, or fewer than the aggregator needs, and the meta-state stays as it is. A private
            round always steps, and tells no loss where nobody was drawn.
        """
        usable = self._train_replies(replies)
        num_ok = sum(int(reply.finite.sum()) for reply in usable)
        gradient: Gradient | None = None
        if self.privacy:
            gradient = self.privacy.release(usable, self._template)
        elif num_ok >= max(1, self.experiment.server.min_sites):
            gradient = aggregate_replies(usable, self.experiment.server)
        if gradient is None:
            return None, None
        self._step(gradient, usable)
        self._packed = None
        losses = [loss for reply in usable for loss in reply.query_loss[reply.finite].tolist()]
        metrics = {"query_loss": float(np.mean(losses))} if losses else {}
        return self.arrays(), MetricRecord({**metrics, "sites": num_ok})

    def _step(self, mean: Gradient, replies: list[TrainReply]) -> None:
        """Steps the meta-state along the sites' mean, or by the problem's own step where it has one."""
        problem = self.learner.problem
        if not (has_payload(problem) and callable(getattr(problem, "outer_step", None))):
            self.optimizer.step(mean)
            return
        weight = sum(reply.weight for reply in replies)
        state = self.meta_state
        whole = self.learner.theta(state)
        stepped = problem.outer_step(whole, {name: value * weight for name, value in mean.items()}, weight)  # type: ignore[attr-defined]
        changed = {key_of(state, name): value.to(whole[name].dtype) for name, value in stepped.items()}
        self.optimizer.replace({name: changed.get(name, value) for name, value in self.optimizer.meta_state.items()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks for the scores of all sites, or of `evaluation.sites` of them: new sites first, then a seeded draw.

        Args:
            server_round: The last finished round.
            arrays: The meta-state.
            config: How: steps, rate, gate, baseline as in `RoundRequest`; validation, true to ask only the sites that
                choose how far to adapt; and pool, true for sums over the test rows of new and of training sites.
            grid: Flower's grid.
        """
        self.log = RoundLog()
        how = dict(config)
        steps = how.get("steps")
        self._columns = 1 + (steps if isinstance(steps, int) and not how.get("baseline") else 0)
        if how.pop("validation", False):
            sites = np.flatnonzero(self.federation.validation)
        else:
            sites = sites_to_evaluate(self.federation, self.experiment.evaluation.sites, self.experiment.runtime.seed)
        kinds = {NEW: 0, TRAINING: 1}
        self._groups = {}
        if how.pop("pool", False):
            self._groups = {
                self.federation.names[site]: kinds.get(self.federation.kind(site), -1) for site in sites.tolist()
            }
        return self._messages(grid, EVALUATE, server_round, sites, arrays, **how)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collects the sites' scores, in site order, into `evaluated`; returns None where none came."""
        usable: list[EvaluateReply] = []
        for node, content in self._valid_replies(replies):
            try:
                reply = EvaluateReply.unpack(content, self.learner.problem.metrics)
                self._check_names(node, reply.names)
                if reply.columns != self._columns:
                    raise MessageError("it has scores of other steps than asked")
            except MessageError as error:
                self._record_failure(node, f"bad reply: {error}")
                continue
            usable.append(reply)
        if not usable:
            self.evaluated = None
            return None
        names = [name for reply in usable for name in reply.names]
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        pooled: dict[str, NDArray[np.float64]] = {}
        for reply in usable:
            for name, value in reply.pooled.items():
                if name in pooled and pooled[name].shape != value.shape:
                    self.log.failed.update(dict.fromkeys(reply.names, "its pooled sums have another shape"))
                    continue
                pooled[name] = pooled[name] + value if name in pooled else value
        counts = np.zeros(max((len(reply.pooled_sites) for reply in usable), default=0), dtype=np.int64)
        for reply in usable:
            counts[: len(reply.pooled_sites)] += np.array(reply.pooled_sites, dtype=np.int64)
        self.evaluated = EvaluateReply(
            names=tuple(names[index] for index in order),
            figures={
                name: np.concatenate([reply.figures[name] for reply in usable])[order] for name in usable[0].figures
            },
            chosen=np.concatenate([reply.chosen for reply in usable])[order],
            pooled=pooled,
            pooled_sites=tuple(counts.tolist()),
            evaluations=_counts(usable, order),
        )
        return MetricRecord({"sites": len(names)})

    def _train_replies(self, replies: Iterable[Message]) -> list[TrainReply]:
        """Returns the replies that are what they should be; names the sites of the others, and those left out."""
        usable: list[TrainReply] = []
        for node, content in self._valid_replies(replies):
            try:
                per_site = self.experiment.server.aggregator != "mean"
                reply = TrainReply.unpack(content, self._template, per_site)
                self._check_names(node, reply.names)
                self._check_weight(reply)
                if self.privacy:
                    self.privacy.check(reply)
            except MessageError as error:
                self._record_failure(node, f"bad reply: {error}")
                continue
            for name, finite in zip(reply.names, reply.finite, strict=True):
                if not finite:
                    self.log.failed[name] = DIVERGED
            usable.append(reply)
        return usable

    def _messages(
        self, grid: Grid, kind: str, server_round: int, sites: NDArray[np.int64], arrays: ArrayRecord, **how: Any
    ) -> list[Message]:
        self._requested = self.federation.by_node(sites)
        messages = []
        for node, names in self._requested.items():
            grouped = tuple(self._groups[name] for name in names) if kind == EVALUATE and self._groups else ()
            content = RoundRequest(
                meta_state={},
                round_number=server_round,
                classes=self.federation.classes,
                names=names,
                run=self.run,
                saved_rounds=self.saved_rounds,
                engine=self.engine,
                budget=self.budget,
                **how,
                groups=grouped,
            ).pack(arrays)
            if node == NO_NODE:
                continue
            self.log.bytes_down += payload_bytes(content)
            messages.append(grid.create_message(content, kind, node, str(server_round)))
        return messages

    def _valid_replies(self, replies: Iterable[Message]) -> Iterable[tuple[int, RecordDict]]:
        """Yields each node's answer in the order of its first site; counts errors, failures and silence."""
        received = {reply.metadata.src_node_id: reply for reply in replies}
        for node in sorted(self._requested, key=lambda node: self._requested[node][0]):
            reply = received.get(node)
            if reply is None:
                self._record_failure(node, "no reply in time" if node != NO_NODE else SITE_UNAVAILABLE)
            elif reply.has_error():
                self._record_failure(
                    node, f"Flower error code {reply.error.code}: the node is lost or its app did not start"
                )
            elif code := failure(reply.content):
                self._record_failure(node, f"{code}: {FAILURES[code]}")
            else:
                self.log.bytes_up += payload_bytes(reply.content)
                yield node, reply.content

    def _check_names(self, node: int, names: tuple[str, ...]) -> None:
        if names != self._requested[node]:
            raise MessageError("it speaks of other sites than it was asked for")

    def _check_weight(self, reply: TrainReply) -> None:
        """Checks a reply's weight: one for each site in the sum, or the weight that it announced when it joined."""
        finite = [name for name, whole in zip(reply.names, reply.finite, strict=True) if whole]
        announced = float(len(finite))
        if self.experiment.weighs_rows:
            announced = float(self.federation.weights[self.federation.indices(finite)].sum())
        if abs(reply.weight - announced) > 1e-9 * max(1.0, announced):
            raise MessageError("its weight is not that of its sites as they announced it")

    def _record_failure(self, node: int, reason: str) -> None:
        self.log.failed.update(dict.fromkeys(self._requested[node], reason))


def _counts(replies: Sequence[EvaluateReply], order: NDArray[np.int64]) -> tuple[int, ...]:
    """Returns the sites' evaluations in site order; nothing where one reply has none."""
    if not all(reply.evaluations for reply in replies):
        return ()
    every = np.concatenate([np.array(reply.evaluations, dtype=np.int64) for reply in replies])
    return tuple(every[order].tolist())
