"""What a run trains, and what each of its rounds is asked and computed by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.checkpoint import KEPT
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.learners.order import EXACT, FIRST
from fedmeta.messages import EvaluateReply, RoundRequest, write_arrays
from server.cohorts import Cohorts
from server.downlink import Downlink
from server.federation import Federation
from server.optimizer import ServerOptimizer
from server.order import Probe
from server.privacy import SiteLevelDP
from server.round_log import RoundLog


class RunState:
    """The meta-state of a run, its sites, and what is remembered from round to round.

    Args:
        experiment: The run's description.
        federation: The sites and their nodes; may be replaced between rounds.
        optimizer: The server optimizer, which holds the learned part of the meta-state.
        constants: The rest of the meta-state (standardisation), which does not change.
        run: The name of the run's folder.
        privacy: Draws the cohorts and noises their sums, where the experiment asks for that.
        learner: What the run trains: its problem may make its own step of what sites send.

    Attributes:
        saved_rounds: The rounds whose checkpoints are on the disk.
        engine: Which engine nodes compute with, and
        budget: how many bytes they may use; 0 = each node's own rule.
        norms: The norms of replies accepted lately (`server.influence`).
        cohorts: What is remembered of the sites that took part.
        per_site: Whether nodes send their sites' own gradients, and not their sum.
        order: Which order of gradient a round takes; "" for the learner's own.
        compared: What the last round's probe found.
        downlink: What nodes were sent, with `server.compression_down`.
        template: The keys, shapes and types of a gradient, which do not change.
        log: What happened in the last round or evaluation.
        evaluated: The sites' figures in the last evaluation; None where none came.
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
        self.learner = learner
        self.saved_rounds = (0,) * KEPT
        self.engine: str = experiment.runtime.engine
        self.budget = int(experiment.runtime.memory * (1 << 30))
        self.norms: tuple[float, ...] = ()
        self.cohorts = Cohorts.of(experiment, {}, {})
        self.per_site = experiment.server.aggregator != "mean" or not experiment.plain_cohorts
        self.order = "first" if experiment.learner.order != "exact" else ""
        self.compared: Probe | None = None
        self.log = RoundLog()
        self.evaluated: EvaluateReply | None = None
        self.downlink = Downlink(experiment) if experiment.server.compression_down != "none" else None
        self._packed: ArrayRecord | None = None
        self.template = learner.message_template(
            {name: value for name, value in self.meta_state.items() if not name.startswith("standardisation.")}
        )

    @property
    def meta_state(self) -> dict[str, Tensor]:
        """A copy of the meta-state as it stands, with its constants."""
        return {**self.optimizer.meta_state, **self.constants}

    def replace(self, meta_state: Mapping[str, Tensor]) -> None:
        """Puts another meta-state in place; the optimizer's memory stays."""
        self.optimizer.replace(meta_state)
        self.stepped()

    def restore(self, meta_state: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        """Puts another meta-state and the optimizer's memory beside it in place."""
        self.optimizer.restore(meta_state, memory)
        self.stepped()

    def stepped(self) -> None:
        """Has the next message carry the meta-state as it is now."""
        self._packed = None

    def arrays(self) -> ArrayRecord:
        """Returns the meta-state as it stands, as a record."""
        if self._packed is None:
            self._packed = write_arrays(self.meta_state)
        return self._packed

    def order_of(self, number: int) -> str:
        """Returns the gradient of a round: first order until `learner.first_order_rounds` are over."""
        first = self.experiment.learner.first_order_rounds
        return (FIRST if number <= first else EXACT) if first else self.order

    def request(self, number: int, names: tuple[str, ...], **how: Any) -> RoundRequest:
        """Returns what a node is asked about its sites, without the meta-state.

        Args:
            number: The round.
            names: The sites.
            how: What else a `RoundRequest` holds.
        """
        return RoundRequest(
            meta_state={},
            round_number=number,
            classes=self.federation.classes,
            names=names,
            run=self.run,
            saved_rounds=self.saved_rounds,
            engine=self.engine,
            budget=self.budget,
            **how,
            categories=self.federation.categories,
        )

    def training_content(self, number: int, node: int, names: tuple[str, ...], **how: Any) -> RecordDict:
        """Returns what a node is sent to train with: a request, and the meta-state or what changed in it.

        Args:
            number: The round.
            node: The node.
            names: Its sites.
            how: What else a `RoundRequest` holds.
        """
        request = self.request(number, names, **how)
        if self.downlink is None:
            return request.pack(self.arrays())
        self.downlink.advance(number, self.meta_state)
        return self.downlink.content(request, node)

    def answered(self, node: int) -> None:
        """Notes that a node replied to what it was last sent."""
        if self.downlink:
            self.downlink.answered(node)

    def weights(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Returns what sites weigh in the mean: 1, or as they announced when they joined."""
        return self._weights(self.federation.indices(names))

    def share(self, weight: float) -> float:
        """Returns what a round's sites weigh, of the weight of all training sites."""
        return min(1.0, weight / float(self._weights(self.federation.training).sum()))

    def _weights(self, sites: NDArray[np.int64]) -> NDArray[np.float64]:
        if not self.experiment.weighs_rows:
            return np.ones(len(sites))
        return np.minimum(self.federation.weights[sites], self.experiment.server.max_weight or np.inf)
