"""Who takes part in a round, and how what they send becomes an unbiased estimate for all training sites.

Uniform draws are in `server.sampling`. What is here applies where `server.sampling` is "optimal" or "clustered", where
`server.variance_reduction` is "fedvarp", or where `server.objective` weighs sites by their losses. A drawn site's
update counts by a factor, and the sum is divided by the weight of all training sites: the mean
over draws is then the mean over all sites. A site that was drawn and did not answer is missing in that sum, and is
named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.messages import TrainReply
from fedmeta.problems.problem import has_outer_step
from fedmeta.randomness import generator
from server import clustered_sampling, fedvarp, optimal_sampling
from server.aggregation import Gradient
from server.federation import Federation
from server.objective import site_weights
from server.sampling import draw_cohort

MOST_MEMORY = 1 << 31
"""The most bytes of updates that a server remembers."""

VARP, SKETCHES = "varp", "sketches"
"""The names of what is remembered, in a checkpoint."""

AskNorms = Callable[[NDArray[np.int64]], Mapping[str, float]]
"""Asks training sites (indices) for the norms of their updates; those that did not answer are absent."""


@dataclass
class Cohorts:
    """The cohorts of a run, and what the server remembers of their sites.

    Attributes:
        experiment: The run's description.
        factors: By which the update of each site of the round counts; empty where all count alike.
        memory: Each site's last update [values], for FedVARP.
        sketches: A sketch of each site's last update, for clustered sampling.
        shares: Each site's share of the objective, for "worst".
    """

    experiment: Experiment
    factors: dict[str, float]
    memory: dict[str, Tensor]
    sketches: dict[str, NDArray[np.float64]]
    shares: dict[str, float]

    @classmethod
    def of(cls, experiment: Experiment, known: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cohorts:
        """Returns a run's cohorts, as a checkpoint has them (`to_json` and `tensors`), or new ones."""
        varp = dict(zip(known.get(VARP, []), tensors[VARP], strict=True)) if VARP in tensors else {}
        sketched = (
            dict(zip(known.get(SKETCHES, []), tensors[SKETCHES].numpy(), strict=True)) if SKETCHES in tensors else {}
        )
        return cls(experiment, {}, varp, sketched, dict(known.get("shares", {})))

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it, beside `tensors`."""
        return {VARP: sorted(self.memory), SKETCHES: sorted(self.sketches), "shares": self.shares}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps of it."""
        _, memory = fedvarp.stacked(self.memory)
        sketched = [torch.from_numpy(self.sketches[name]) for name in sorted(self.sketches)]
        return {
            **({VARP: memory} if memory is not None else {}),
            **({SKETCHES: torch.stack(sketched)} if sketched else {}),
        }

    @property
    def plain(self) -> bool:
        """Whether a round is the mean over a cohort, as it is by default."""
        return self.experiment.plain_cohorts

    def draw(self, federation: Federation, round_number: int, ask_norms: AskNorms) -> NDArray[np.int64]:
        """Returns the sites of a round, ascending, and notes by which factor each counts."""
        server, seed = self.experiment.server, self.experiment.runtime.seed
        self.factors = {}
        if server.sampling not in ("optimal", "clustered"):
            cohort = draw_cohort(federation, server, seed, round_number)
            self._note(federation, cohort, np.full(len(cohort), len(federation.training) / max(1, len(cohort))))
            return cohort
        training = federation.training
        size = min(server.sites_per_round or len(training), len(training))
        if size == len(training):
            self._note(federation, training, np.ones(size))
            return training
        weights = _weights(self.experiment, federation, training)
        random = generator(seed, f"{server.sampling} sampling", round_number)
        if server.sampling == "optimal":
            found = ask_norms(training)
            norms = np.array([found.get(federation.names[site], 0.0) for site in training.tolist()]) * weights
            chances = optimal_sampling.probabilities(norms, size)
            places = optimal_sampling.systematic(chances, random)
            factors = 1 / chances[places]
        else:
            names = [federation.names[site] for site in training.tolist()]
            nothing = np.zeros(clustered_sampling.SKETCH)
            sketches = np.array([self.sketches.get(name, nothing) for name in names])
            times = clustered_sampling.draw(clustered_sampling.distributions(sketches, weights, size), random)
            places = np.flatnonzero(times)
            factors = times[places] * weights.sum() / (size * weights[places])
        self._note(federation, training[places], factors)
        return training[places]

    def aggregate(self, replies: Sequence[TrainReply], federation: Federation) -> Gradient:
        """Returns the estimate of the mean over all training sites that a round's replies make, in float64.

        Args:
            replies: One reply per site, its update times its weight, in site order.
            federation: The sites.
        """
        server = self.experiment.server
        training = [federation.names[site] for site in federation.training.tolist()]
        weights = dict(zip(training, _weights(self.experiment, federation, federation.training).tolist(), strict=True))
        total = sum(weights.values())
        factors = dict(self.factors)
        if server.objective != "mean":
            losses = {reply.names[0]: float(reply.query_loss[0]) for reply in replies}
            if server.objective == "worst":
                even = 1 / len(training)
                known = {name: self.shares.get(name, even) for name in training}
                whole = sum(known.values())
                self.shares = {name: share / whole for name, share in known.items()}
            own, self.shares = site_weights(server, losses, self.shares)
            factors = {name: factors[name] * weight for name, weight in own.items()}
        updates = {reply.names[0]: fedvarp.flattened(reply.gradient) / reply.weight for reply in replies}
        if server.sampling == "clustered":
            seed = self.experiment.runtime.seed
            self.sketches |= {name: clustered_sampling.sketch(value.numpy(), seed) for name, value in updates.items()}
        if server.variance_reduction == "fedvarp":
            flat = fedvarp.estimate(self.memory, weights, updates, factors)
            self.memory = fedvarp.remember(self.memory, updates)
        else:
            flat = torch.zeros_like(next(iter(updates.values())))
            for name in sorted(updates):
                flat += factors[name] * weights[name] * updates[name]
            flat /= total
        return fedvarp.unflattened(flat, replies[0].gradient)

    def _note(self, federation: Federation, sites: NDArray[np.int64], factors: NDArray[np.float64]) -> None:
        names = [federation.names[site] for site in sites.tolist()]
        self.factors = dict(zip(names, factors.tolist(), strict=True))


def by_site(replies: Sequence[TrainReply], experiment: Experiment, federation: Federation) -> list[TrainReply]:
    """Returns replies with a gradient for each site as one reply per site whose gradient is finite, in site order.

    Each holds the site's gradient times its weight, as a reply of one site in a sum does.
    """
    found: dict[str, TrainReply] = {}
    for reply in replies:
        weights = _weights(experiment, federation, federation.indices(reply.names)).tolist()
        for place, (name, weight) in enumerate(zip(reply.names, weights, strict=True)):
            if reply.finite[place]:
                gradient = {key: weight * value[place].double() for key, value in reply.gradient.items()}
                one = slice(place, place + 1)
                found[name] = replace(
                    reply,
                    gradient=gradient,
                    weight=weight,
                    names=(name,),
                    query_loss=reply.query_loss[one],
                    finite=reply.finite[one],
                )
    return [found[name] for name in sorted(found)]


def _weights(experiment: Experiment, federation: Federation, sites: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns what sites weigh in the mean: 1, or the weight that they announced when they joined."""
    if not experiment.weighs_rows:
        return np.ones(len(sites))
    return np.minimum(federation.weights[sites], experiment.server.max_weight or np.inf)


def check(experiment: Experiment, learner: Learner, meta_state: Mapping[str, Tensor], sites: int) -> None:
    """Checks that the rules of a run's cohorts go with the rest of it.

    Args:
        experiment: The run's description.
        learner: What it trains.
        meta_state: The trained part of the meta-state.
        sites: The number of training sites.

    Raises:
        FedmetaError: They do not.
    """
    server = experiment.server
    if experiment.plain_cohorts:
        return
    what = (
        f'sampling = "{server.sampling}"'
        if server.sampling in ("optimal", "clustered")
        else 'variance_reduction = "fedvarp"'
        if server.variance_reduction != "none"
        else f'objective = "{server.objective}"'
    )
    size = 4 * sites * sum(value.numel() for value in learner.message_template(meta_state).values())
    rules = (
        (has_outer_step(learner.problem), "the problem makes its own step of plain sums, which factors would change"),
        (learner.update == "nothing", f'learner.name = "{experiment.learner.name}" sends nothing'),
        (
            server.sampling == "optimal" and bool(learner.personal(meta_state)),
            f'learner.name = "{experiment.learner.name}" keeps something at the sites, and asking for norms would be a '
            "round by itself there",
        ),
        (
            server.objective != "mean" and learner.update != "gradient",
            f'learner.name = "{experiment.learner.name}" sends a {learner.update}, and weights by loss are made for '
            "meta-gradients: take maml, fomaml or the like",
        ),
        (
            server.sampling == "clustered" and sites > clustered_sampling.MOST_SITES,
            f"sites are put together by a distance for each pair, for {clustered_sampling.MOST_SITES} sites at most, "
            f"and the run trains on {sites}",
        ),
        (
            server.variance_reduction == "fedvarp" and size > MOST_MEMORY,
            f"the server would remember {size / 1e9:.1f} GB of updates, and {MOST_MEMORY / 1e9:.1f} GB are the most",
        ),
    )
    for broken, reason in rules:
        if broken:
            raise FedmetaError(f"[server] {what}: {reason}")
