"""One round as Flower has it: who takes part, what they are sent, how their replies become a step; and an evaluation.

Rounds of other kinds are `server.quorum_rounds` and `server.secure_rounds`.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmeta.data.subgroups import names_of_run
from fedmeta.messages import EVALUATE, TRAIN
from server.aggregation import Gradient
from server.evaluation_replies import STATES, Asked, evaluation_replies
from server.exchange import Shares, messages
from server.federation import judges
from server.probes import probe
from server.round_cohort import round_cohort
from server.round_log import RoundLog
from server.round_step import step_along
from server.run_state import RunState
from server.sampling import sites_to_evaluate
from server.train_replies import train_replies


class MetaGradientStrategy(RunState, Strategy):
    """Samples sites by name, combines their meta-gradients, and steps the meta-state with a torch optimizer."""

    # What was asked, between Flower's two halves of a round and of an evaluation.
    _shares: Shares = MappingProxyType({})
    _asked = Asked()
    _probed: Gradient | None = None

    def summary(self) -> None:
        """Prints nothing: the experiment describes the run."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draws the round's cohort and sends each of its nodes the meta-state and the names of its sites."""
        self.log = RoundLog()
        self._shares, self._probed = self.federation.by_node(round_cohort(self, server_round, grid)), None
        order = self.order_of(server_round)
        return messages(
            grid,
            TRAIN,
            server_round,
            self._shares,
            lambda node, names: self.training_content(server_round, node, names, per_site=self.per_site, order=order),
            self.log,
        )

    def probe(self, server_round: int, order: str, grid: Grid) -> None:
        """Computes the round's cohort in another order too: `aggregate_train` compares, and steps along its own."""
        self._probed = probe(self, server_round, order, self._shares, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Steps the meta-state along what the aggregator makes of the replies' meta-gradients.

        Returns:
            The new meta-state and the round's query loss; or (None, None) where the meta-state stays as it is, as
            `server.round_step.step_along` has it.
        """
        self.compared = None
        metrics = step_along(self, train_replies(self, replies, self._shares), self._probed)
        return (None, None) if metrics is None else (self.arrays(), metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks for the scores of all sites, or of `evaluation.sites` of them: new sites first, then a seeded draw.

        Args:
            server_round: The last finished round.
            arrays: The meta-state.
            config: How: steps, rate, gate, baseline as in `RoundRequest`; validation, true to ask only the sites by
                whose scores the run decides; and pool, true for sums over the test rows of new and of training sites;
                block of a stream, in place of the one that the round is at.
            grid: Flower's grid.
        """
        self.log = RoundLog()
        how = dict(config)
        steps, baseline = how.get("steps"), how.get("baseline")
        if how.pop("validation", False):
            sites = judges(self.federation, self.experiment)
        else:
            sites = sites_to_evaluate(self.federation, self.experiment.evaluation.sites, self.experiment.runtime.seed)
        groups = self.federation.groups(sites) if how.pop("pool", False) else {}
        self._asked = Asked(
            shares=self.federation.by_node(sites),
            columns=1 + (steps if isinstance(steps, int) and not baseline else 0),
            states=("local",) if baseline else STATES,
            groups=groups,
            subgroups=len(names_of_run(self.experiment, self.federation.categories)) if groups and not baseline else 0,
        )
        return messages(
            grid,
            EVALUATE,
            server_round,
            self._asked.shares,
            lambda _, names: self.request(
                server_round, names, **how, groups=tuple(groups[name] for name in names) if groups else ()
            ).pack(arrays),
            self.log,
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collects the sites' scores, in site order, into `evaluated`; returns None where none came."""
        self.evaluated = evaluation_replies(self, replies, self._asked)
        return MetricRecord({"sites": len(self.evaluated.names)}) if self.evaluated else None
