"""One round: who takes part, what they are sent, how their meta-gradients are combined, how the meta-state steps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.checkpoint import KEPT
from fedmeta.data.subgroups import all_levels, parse
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import NEW, TRAINING
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.learners.learner import key_of
from fedmeta.messages import (
    EVALUATE,
    FAILURES,
    LOSS,
    MASKED_EVALUATE,
    MASKED_TRAIN,
    QUERY_ENGINE,
    QUERY_NORMS,
    TRAIN,
    EngineReply,
    EvaluateReply,
    MessageError,
    NormsReply,
    RoundRequest,
    TrainReply,
    failure,
    payload_bytes,
    write_arrays,
)
from fedmeta.messages.compressed import unpack_reply
from fedmeta.messages.secure import SCORE_GROUPS, TAIL, scores_size
from fedmeta.problems import Supervised
from fedmeta.problems.pooled import impossible as pooled_impossible
from fedmeta.problems.problem import has_outer_step
from fedmeta.secure.graph import FEWEST
from fedmeta.secure.ring import decode, decode_wide
from server import influence
from server.aggregation import Gradient, aggregate_replies
from server.cohorts import Cohorts, by_site
from server.federation import NO_NODE, SITE_UNAVAILABLE, Federation
from server.lateness import Answer, Outstanding, Received, scaled
from server.optimizer import ServerOptimizer
from server.order import Probe, compare
from server.privacy import SiteLevelDP
from server.sampling import draw_cohort, sites_to_evaluate
from server.secure_sum import secure_sum

STATES = ("global", "personalized")
"""Before and after adaptation, as pooled sums name it."""

DIVERGED = "its meta-gradient was not finite"
"""Why a site was left out of a round whose adaptation, or whose start, has run away."""

WEIGHTLESS = "its weight is 0"
"""Why a reply that would count for nothing is left out."""

UNDONE = "the step along the round's replies was not finite, and was undone"
"""Why a round changed nothing."""

LOSS_EXCESS = 1e3
"""How many times the usual a site's query loss may be to be in a round's mean."""

FIGURE_EXCESS = 1e6
"""How many times the usual a site's figure may be in an evaluation of several nodes."""

ASKED_FOR_ENGINE = 3
"""How many nodes are asked which engine is fastest: of three, one cannot choose for all."""


@dataclass
class RoundLog:
    """What happened in one round.

    Attributes:
        failed: Site (or "node NUMBER") and the reason, for each that gave no usable answer.
        shortened: Site and by how much, for each whose reply was shortened (`server.influence`).
        outlying: Site and why its query loss is not in the round's mean.
        undone: Whether the round's step was undone.
        skipped: Why a round with secure aggregation has no sum.
        late: Sites that the round closed without, and sites whose late replies are not used, with the reason.
        took_part: The sites whose replies are in the round's step.
        bytes_down: Bytes of all messages sent.
        bytes_up: Bytes of all replies received.
    """

    failed: dict[str, str] = field(default_factory=dict)
    shortened: dict[str, str] = field(default_factory=dict)
    outlying: dict[str, str] = field(default_factory=dict)
    undone: bool = False
    skipped: str = ""
    late: dict[str, str] = field(default_factory=dict)
    took_part: tuple[str, ...] = ()
    bytes_down: int = 0
    bytes_up: int = 0

    def reasons(self, advise: bool = False) -> str:
        """Returns the first failure, with who gave it, how many others there are, and what may help."""
        if self.skipped:
            return self.skipped
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
        self.norms: tuple[float, ...] = ()
        self.busy: frozenset[str] = frozenset()
        self.cohorts = Cohorts.of(experiment, {}, {})
        self.per_site = experiment.server.aggregator != "mean" or not experiment.plain_cohorts
        self.order = "first" if experiment.learner.order != "exact" else ""
        self.probed: Gradient | None = None
        self.compared: Probe | None = None
        self.log = RoundLog()
        self.evaluated: EvaluateReply | None = None
        self._requested: dict[int, tuple[str, ...]] = {}
        self._columns = 1
        self._states: tuple[str, ...] = STATES
        self._groups: dict[str, int] = {}
        self._packed: ArrayRecord | None = None
        # What a gradient looks like: the keys, shapes and types, which do not change.
        self.learner = learner
        self._template = learner.message_template(
            {name: value for name, value in self.meta_state.items() if not name.startswith("standardisation.")}
        )

    def summary(self) -> None:
        """Prints nothing: the experiment describes the run."""

    @property
    def meta_state(self) -> dict[str, Tensor]:
        """A copy of the meta-state as it stands, with its constants."""
        return {**self.optimizer.meta_state, **self.constants}

    def replace(self, meta_state: Mapping[str, Tensor]) -> None:
        """Puts another meta-state in place; the optimizer's memory stays."""
        self.optimizer.replace(meta_state)
        self._packed = None

    def restore(self, meta_state: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        """Puts another meta-state and the optimizer's memory beside it in place."""
        self.optimizer.restore(meta_state, memory)
        self._packed = None

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
        cohort = self._cohort(server_round, grid)
        return self._messages(grid, TRAIN, server_round, cohort, arrays, per_site=self.per_site, order=self.order)

    def probe(self, server_round: int, order: str, grid: Grid) -> None:
        """Computes the round's cohort in another order too: `aggregate_train` compares, and steps along its own."""
        names = [name for requested in self._requested.values() for name in requested]
        sites, arrays = self.federation.indices(sorted(names)), self.arrays()
        messages = self._messages(grid, TRAIN, server_round, sites, arrays, per_site=self.per_site, order=order)
        replies = grid.send_and_receive(messages, timeout=self.experiment.server.round_timeout)
        usable = self._train_replies(replies)
        self.probed = aggregate_replies(usable, self.experiment.server) if usable else None

    def _norms(self, grid: Grid, server_round: int, sites: NDArray[np.int64], arrays: ArrayRecord) -> dict[str, float]:
        """Asks training sites how long their updates are; those whose update is not finite or that fail are absent."""
        messages = self._messages(grid, QUERY_NORMS, server_round, sites, arrays)
        found: dict[str, float] = {}
        for node, content in self._valid_replies(
            grid.send_and_receive(messages, timeout=self.experiment.server.round_timeout)
        ):
            try:
                reply = NormsReply.unpack(content)
                self._check_names(node, reply.names)
            except MessageError as error:
                self._record_failure(node, f"bad reply: {error}")
                continue
            for name, norm in zip(reply.names, reply.norms.tolist(), strict=True):
                if np.isfinite(norm):
                    found[name] = norm
                else:
                    self.log.failed[name] = DIVERGED
        return found

    def _cohort(self, server_round: int, grid: Grid) -> NDArray[np.int64]:
        if self.privacy:
            return self.privacy.sample(self.federation.training)
        if self.cohorts.plain:
            return draw_cohort(self.federation, self.experiment.server, self.experiment.runtime.seed, server_round)

        def ask_norms(sites: NDArray[np.int64]) -> dict[str, float]:
            return self._norms(grid, server_round, sites, self.arrays())

        return self.cohorts.draw(self.federation, server_round, ask_norms)

    def choose_engine(self, grid: Grid) -> EngineReply | None:
        """Asks up to three nodes which engine is fastest for the first cohort, and takes the choice of most.

        The budget is the median of those who chose so, and of an even number the lower one of the two in the middle.

        Returns:
            The choice and its figures; None where the experiment names an engine and a budget, or where most do not
            agree: every node then follows its own rule.

        Raises:
            FedmetaError: Every node of the cohort reports that it cannot compute it.
        """
        if (self.engine != "auto" and self.budget) or self.experiment.privacy.secure_aggregation:
            return None  # with secure aggregation every node follows its own rule: its times and memory are its own
        cohort = draw_cohort(self.federation, self.experiment.server, self.experiment.runtime.seed, 1)
        homes = self.federation.node_ids[cohort]
        nodes = [node for node in dict.fromkeys(homes.tolist()) if node != NO_NODE]
        for first in range(0, len(nodes), ASKED_FOR_ENGINE):
            asked = nodes[first : first + ASKED_FOR_ENGINE]
            self.log = RoundLog()
            here = cohort[np.isin(homes, np.array(asked, dtype=np.uint64))]
            messages = self._messages(grid, QUERY_ENGINE, 1, here, self.arrays())
            answers: list[EngineReply] = []
            for node, content in self._valid_replies(
                grid.send_and_receive(messages, timeout=self.experiment.server.round_timeout)
            ):
                try:
                    answers.append(EngineReply.unpack(content))
                except MessageError as error:
                    self._record_failure(node, f"bad reply: {error}")
            for answer in answers:
                alike = sorted((each for each in answers if each.engine == answer.engine), key=lambda each: each.budget)
                if 2 * len(alike) > len(asked):
                    self.engine = answer.engine if self.engine == "auto" else self.engine
                    self.budget = self.budget or alike[(len(alike) - 1) // 2].budget
                    return EngineReply(self.engine, self.budget, answer.seconds)
            codes = {reason.partition(":")[0] for reason in self.log.failed.values()}
            if answers or not codes or not codes <= FAILURES.keys():
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
            gave a usable gradient, or fewer than the aggregator needs, or the step would make it infinite, and the
            meta-state stays as it is. A private round always steps, and has no loss where no site was drawn.
        """
        self.compared = None
        return self._aggregate(self._train_replies(replies))

    def configure_quorum(self, server_round: int, grid: Grid) -> list[tuple[Message, int, tuple[str, ...]]]:
        """Returns a round's messages with their nodes and sites, for those of its cohort that are not busy."""
        self.log = RoundLog()
        cohort = self._cohort(server_round, grid)
        free = np.array([self.federation.names[site] not in self.busy for site in cohort.tolist()], dtype=bool)
        split = getattr(grid, "splits_sites", False)
        found = []
        for sites in [cohort[free][place : place + 1] for place in range(int(free.sum()))] if split else [cohort[free]]:
            messages = self._messages(grid, TRAIN, server_round, sites, self.arrays(), per_site=self.per_site)
            for message in messages:
                node = message.metadata.dst_node_id
                found.append((message, node, self._requested[node]))
            self.log.failed.update(dict.fromkeys(self._requested.get(NO_NODE, ()), SITE_UNAVAILABLE))
        return found

    def aggregate_quorum(
        self, server_round: int, received: Received, weight_of: Callable[[Outstanding, int], float]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Steps along what came before the round closed; returns what `aggregate_train` does."""
        self.log.late = {**received.missing, **received.dropped}
        usable = [reply for each, answer in received.on_time for reply in self._usable(each, answer)]
        for each, answer in received.late:
            factor = weight_of(each, server_round)
            usable += [scaled(reply, factor) for reply in self._usable(each, answer)]
        return self._aggregate(usable)

    def _usable(self, each: Outstanding, answer: Answer) -> list[TrainReply]:
        if isinstance(answer, TrainReply):
            return [answer]
        self._requested = {each.node: each.names}
        return self._train_replies([answer])

    def secure_train(self, server_round: int, grid: Grid) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Runs a round whose replies the server sees as their sum alone; returns what `aggregate_train` does."""
        self.log = log = RoundLog()
        cohort = self._cohort(server_round, grid)
        self._requested = self.federation.by_node(cohort)
        template = {name: self._template[name] for name in sorted(self._template)}
        size = sum(value.numel() for value in template.values()) + len(TAIL)
        arrays = self.arrays()
        found = secure_sum(
            grid,
            self._requested,
            self.experiment,
            f"{self.run} train {server_round}",
            MASKED_TRAIN,
            lambda names: self._request(server_round, names).pack(arrays),
            size,
        )
        log.bytes_down, log.bytes_up, log.failed = found.bytes_down, found.bytes_up, found.failed
        if found.total is None:
            log.skipped = found.why
            return None, None
        sums = decode(found.total, self.experiment.privacy.quantum)
        sizes = [*(value.numel() for value in template.values()), *[1] * len(TAIL)]
        *flat, weight, count, loss, counted = torch.split(torch.from_numpy(sums), sizes)
        gradient = {name: own.reshape(template[name].shape) for name, own in zip(template, flat, strict=True)}
        total, num_ok = float(weight), round(float(count))
        log.took_part = found.left
        if num_ok < len(found.left):
            log.failed["of the sum"] = f"{len(found.left) - num_ok} of {len(found.left)} sites: {DIVERGED}"
        mean: Gradient | None = None
        if self.privacy:
            mean = self.privacy.release_noised(gradient)
        elif num_ok >= max(1, self.experiment.server.min_sites) and total > 0:
            mean = {name: value / total for name, value in gradient.items()}
        if mean is None:
            return None, None
        if not self._step(mean, total):
            log.undone = True
            log.took_part = ()
            log.failed.update(dict.fromkeys(found.left, UNDONE))
            return None, None
        self._packed = None
        metrics = {"query_loss": float(loss) / round(float(counted))} if round(float(counted)) else {}
        return self.arrays(), MetricRecord({**metrics, "sites": num_ok})

    def secure_evaluate(self, server_round: int, grid: Grid, **how: Any) -> NDArray[np.float64] | None:
        """Returns the sums of an evaluation by group of sites [groups, numbers]; None where too few were left.

        A group of fewer than three sites is left out: its sums would be those of one or two.
        """
        self.log = log = RoundLog()
        sites = sites_to_evaluate(self.federation, self.experiment.evaluation.sites, self.experiment.runtime.seed)
        kinds = {NEW: 0, TRAINING: 1}
        group_of = {self.federation.names[site]: kinds.get(self.federation.kind(site), -1) for site in sites.tolist()}
        sizes = Counter(group_of.values())
        small = {group for group, count in sizes.items() if count < FEWEST}
        arrays, size = self.arrays(), scores_size(len(self.learner.problem.metrics))

        def request(names: tuple[str, ...]) -> RecordDict:
            groups = tuple(-1 if group_of[name] in small else group_of[name] for name in names)
            return self._request(server_round, names, groups=groups, **how).pack(arrays)

        context = f"{self.run} evaluate {server_round}"
        shares = self.federation.by_node(sites)
        found = secure_sum(grid, shares, self.experiment, context, MASKED_EVALUATE, request, 2 * size)
        log.bytes_down, log.bytes_up, log.failed = found.bytes_down, found.bytes_up, found.failed
        if found.total is None:
            log.skipped = found.why
            return None
        return decode_wide(found.total, self.experiment.privacy.quantum).reshape(SCORE_GROUPS, -1)

    def _aggregate(self, usable: list[TrainReply]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not self.cohorts.plain:
            usable = by_site(usable, self.experiment, self.federation)
        norms = self.norms
        if self.experiment.server.aggregator == "mean" and not self.privacy:
            usable, norms = self._bounded(usable)
        num_ok = sum(int(reply.finite.sum()) for reply in usable)
        gradient: Gradient | None = None
        if self.privacy:
            gradient = self.privacy.release(usable, self._template)
        elif num_ok >= max(1, self.experiment.server.min_sites) and not self.cohorts.plain:
            gradient = self.cohorts.aggregate(usable, self.federation)
        elif num_ok >= max(1, self.experiment.server.min_sites):
            gradient = aggregate_replies(usable, self.experiment.server)
        if gradient is None:
            return None, None
        if self.probed is not None:
            both = (gradient, self.probed) if self.order == "first" else (self.probed, gradient)
            self.compared, self.probed = compare(*both), None
        if not self._step(gradient, sum(reply.weight for reply in usable)):
            self.log.undone = True
            self.log.failed.update({name: UNDONE for reply in usable for name in reply.names})
            return None, None
        self.norms = norms
        self._packed = None
        self.log.took_part = tuple(
            name for reply in usable for name, finite in zip(reply.names, reply.finite, strict=True) if finite
        )
        metrics = self._mean_loss(usable)
        return self.arrays(), MetricRecord({**metrics, "sites": num_ok})

    def _mean_loss(self, replies: list[TrainReply]) -> dict[str, float]:
        """Returns the mean query loss of the sites that count, without those that are far out of the ordinary."""
        names = [name for reply in replies for name, finite in zip(reply.names, reply.finite, strict=True) if finite]
        if not names:
            return {}
        losses = np.concatenate([reply.query_loss[reply.finite] for reply in replies])
        far = influence.outlying(losses, LOSS_EXCESS)
        why = f"its query loss is more than {LOSS_EXCESS:g} times the usual, and is not in the mean"
        self.log.outlying = dict.fromkeys([names[place] for place in np.flatnonzero(far).tolist()], why)
        return {"query_loss": float(np.mean(losses[~far]))}

    def _bounded(self, replies: list[TrainReply]) -> tuple[list[TrainReply], tuple[float, ...]]:
        """Bounds what each reply does (`server.influence`); returns those that count, and the norms to remember.

        Statistics that a problem makes its own step of cannot be shortened: beyond the square of the bound, for they
        grow with a site's rows, they are refused.
        """
        cap = self.experiment.server.norm_cap
        own_step = has_outer_step(self.learner.problem)
        found = influence.bound(replies, self.norms, cap**2 if own_step else cap, shorten=not own_step)
        for place, times in found.excess.items():
            what = f"its reply was {times:.3g} times as long as server.norm_cap = {cap:g} allows, and was"
            names = replies[place].names
            if own_step:
                self.log.failed.update(dict.fromkeys(names, f"{what} refused"))
            else:
                self.log.shortened.update(dict.fromkeys(names, f"{what} shortened"))
        return found.replies, found.norms

    def _step(self, mean: Gradient, weight: float) -> bool:
        """Steps the meta-state along the sites' mean, or by the problem's own step where it has one.

        Returns:
            Whether the step stands; one that is not finite, or a step of the problem's that fails, is undone.
        """
        problem = self.learner.problem
        if not has_outer_step(problem):
            return self.optimizer.step_if_finite(mean)
        state = self.meta_state
        whole = self.learner.theta(state)
        total = {name: value * weight for name, value in mean.items()}
        try:
            stepped = problem.outer_step(whole, total, weight)
        except Exception as error:  # whatever a user's own code makes of what sites sent
            logging.getLogger("fedmeta.server").warning("outer_step failed: %s: %s", type(error).__name__, error)
            return False
        changed = {key_of(state, name): value.to(whole[name].dtype) for name, value in stepped.items()}
        if not all(bool(value.isfinite().all()) for value in changed.values()):
            return False
        self.optimizer.replace({name: changed.get(name, value) for name, value in self.optimizer.meta_state.items()})
        return True

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
        self._states = ("local",) if how.get("baseline") else STATES
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
                self._check_pooled(reply)
            except MessageError as error:
                self._record_failure(node, f"bad reply: {error}")
                continue
            refused = reply.impossible(self._ranges())
            self.log.failed.update({name: f"bad reply: {what}" for name, what in refused.items()})
            if len(refused) < len(reply.names):
                usable.append(reply.without(refused) if refused else reply)
        usable = self._without_outliers(usable)
        if not usable:
            self.evaluated = None
            return None
        names = [name for reply in usable for name in reply.names]
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        pooled: dict[str, NDArray[np.float64]] = {}
        for reply in usable:
            for name, value in reply.pooled.items():
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
            subgroups=_subgroups(usable, order),
        )
        return MetricRecord({"sites": len(names)})

    def _train_replies(self, replies: Iterable[Message]) -> list[TrainReply]:
        """Returns the replies that are what they should be; names the sites of the others, and those left out."""
        usable: list[TrainReply] = []
        for node, content in self._valid_replies(replies):
            try:
                server = self.experiment.server
                if server.compression != "none":
                    reply = unpack_reply(content, self._template, server.compression, server.compression_keep)
                    reply = reply if self.per_site else self._summed(reply)
                else:
                    reply = TrainReply.unpack(content, self._template, self.per_site)
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
            # What a reply holds beside sites that count for nothing must have no effect.
            if not reply.finite.any():
                continue
            if reply.weight == 0:
                self._record_failure(node, WEIGHTLESS)
                continue
            usable.append(reply)
        return usable

    def _messages(
        self, grid: Grid, kind: str, server_round: int, sites: NDArray[np.int64], arrays: ArrayRecord, **how: Any
    ) -> list[Message]:
        self._requested = self.federation.by_node(sites)
        messages = []
        for node, names in self._requested.items():
            grouped = tuple(self._groups[name] for name in names) if kind == EVALUATE and self._groups else ()
            content = self._request(server_round, names, **how, groups=grouped).pack(arrays)
            if node == NO_NODE:
                continue
            self.log.bytes_down += payload_bytes(content)
            messages.append(grid.create_message(content, kind, node, str(server_round)))
        return messages

    def _request(self, server_round: int, names: tuple[str, ...], **how: Any) -> RoundRequest:
        return RoundRequest(
            meta_state={},
            round_number=server_round,
            classes=self.federation.classes,
            names=names,
            run=self.run,
            saved_rounds=self.saved_rounds,
            engine=self.engine,
            budget=self.budget,
            **how,
            categories=self.federation.categories,
        )

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
        announced = float(self._weights(finite).sum())
        if abs(reply.weight - announced) > 1e-9 * max(1.0, announced):
            raise MessageError("its weight is not that of its sites as they announced it")

    def _summed(self, reply: TrainReply) -> TrainReply:
        """Returns sites' own gradients as the weighted sum that a node sends where nothing is packed."""
        weights = torch.from_numpy(self._weights(reply.names) * reply.finite)
        gradient = {name: torch.tensordot(weights, value.double(), dims=1) for name, value in reply.gradient.items()}
        return TrainReply(gradient, reply.weight, reply.names, reply.query_loss, reply.finite)

    def _weights(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Returns what sites weigh in the mean: 1, or as they announced when they joined."""
        if not self.experiment.weighs_rows:
            return np.ones(len(names))
        own = self.federation.weights[self.federation.indices(names)]
        return np.minimum(own, self.experiment.server.max_weight or np.inf)

    def _ranges(self) -> dict[str, tuple[float, float]]:
        """Returns the range of each figure of a site; the loss on rows, where it is the usual one, is at least 0."""
        problem = self.learner.problem
        low = 0.0 if isinstance(problem, Supervised) and problem.plain else -np.inf
        return {LOSS: (low, np.inf), **{metric.name: (metric.low, metric.high) for metric in problem.metrics}}

    def _without_outliers(self, replies: list[EvaluateReply]) -> list[EvaluateReply]:
        """Returns the replies of several nodes without sites whose figures are far out of the ordinary; names these."""
        if len(replies) < influence.FEWEST_TO_COMPARE:
            return replies
        refused: dict[str, str] = {}
        names = [name for reply in replies for name in reply.names]
        for figure in replies[0].figures:
            for column in range(self._columns):
                values = np.concatenate([reply.figures[figure][:, column] for reply in replies])
                for place in np.flatnonzero(influence.outlying(values, FIGURE_EXCESS)).tolist():
                    why = f"bad reply: its {figure} is more than {FIGURE_EXCESS:g} times the usual"
                    refused.setdefault(names[place], why)
        self.log.failed.update(refused)
        kept = (reply.without(refused) if refused.keys() & set(reply.names) else reply for reply in replies)
        return [reply for reply in kept if reply.names]

    def _check_pooled(self, reply: EvaluateReply) -> None:
        """Checks that the pooled sums are of the groups asked for, and possible for their rows."""
        of_group: dict[int, list[str]] = {}
        for name in reply.names:
            of_group.setdefault(self._groups.get(name, -1), []).append(name)
        sums: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
        levels = {str(place) for place in range(len(self.subgroups))} if self._groups else set()
        self._check_subgroups(reply, len(levels))
        for key, value in reply.pooled.items():
            group, _, rest = key.partition("/")
            state, _, name = rest.partition("/")
            whole, _, part = state.partition("@")
            asked = whole in self._states and (part in levels if "@" in state else True)
            if group not in {str(place) for place in of_group if place >= 0} or not asked:
                raise MessageError("its pooled sums are of groups that were not asked for")
            sums.setdefault((group, state), {})[name] = value
        for place, count in enumerate(reply.pooled_sites):
            if count > len(of_group.get(place, ())):
                raise MessageError("more sites are pooled than there are")
        for (group, _), found in sums.items():
            rows = float(self.federation.test_rows[self.federation.indices(of_group[int(group)])].sum())
            rows = np.inf if self.experiment.data.ways else rows  # few-shot tasks draw rows more than once
            classes, targets = len(self.federation.classes), len(self.federation.targets)
            if problem := pooled_impossible(found, self.learner.problem.metrics, classes, targets, rows):
                raise MessageError(f"its pooled sums are not possible: {problem}")

    @property
    def subgroups(self) -> tuple[str, ...]:
        """The names of the subgroups that sites are asked for at the end."""
        return all_levels(parse(self.experiment.evaluation.subgroups), self.federation.categories)

    def _check_subgroups(self, reply: EvaluateReply, levels: int) -> None:
        """Checks that the figures of subgroups are of those asked for, and possible for the sites' test rows."""
        if not reply.subgroups:
            return
        rows = reply.subgroups["rows"]
        if not levels or rows.shape[1] != levels:
            raise MessageError("its subgroups are not those that were asked for")
        smallest = self.experiment.evaluation.smallest_subgroup
        most = self.federation.test_rows[self.federation.indices(reply.names)][:, None]
        if ((rows > 0) & (rows < smallest)).any() or (rows > most).any():
            raise MessageError("a subgroup has fewer rows than may be shown, or more than its site")
        score = self.learner.problem.metrics[0]
        for state in STATES:
            scores = reply.subgroups[state]
            outside = (scores < score.low - 1e-6) | (scores > score.high + 1e-6)
            if outside.any() or np.isfinite(scores[rows == 0]).any():
                raise MessageError(f"the {score.name} of a subgroup cannot be")

    def _record_failure(self, node: int, reason: str) -> None:
        self.log.failed.update(dict.fromkeys(self._requested[node], reason))


def _subgroups(replies: Sequence[EvaluateReply], order: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Returns the figures of sites' subgroups in site order; 0 rows and NaN for sites that sent none."""
    given = next((reply.subgroups for reply in replies if reply.subgroups), {})
    found = {}
    for name, own in given.items():
        empty = 0.0 if name == "rows" else np.nan
        parts = [reply.subgroups.get(name, np.full((len(reply.names), own.shape[1]), empty)) for reply in replies]
        found[name] = np.concatenate(parts)[order]
    return found


def _counts(replies: Sequence[EvaluateReply], order: NDArray[np.int64]) -> tuple[int, ...]:
    """Returns the sites' evaluations in site order; nothing where one reply has none."""
    if not all(reply.evaluations for reply in replies):
        return ()
    every = np.concatenate([np.array(reply.evaluations, dtype=np.int64) for reply in replies])
    return tuple(every[order].tolist())
