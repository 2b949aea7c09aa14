"""Site-level differential privacy at the server: who is drawn, what noise a round's sum gets, what has been spent.

Sites shorten their meta-gradients to `clip_norm`. A round then releases

    (sum of what the drawn sites sent + N(0, (noise_multiplier clip_norm)^2)) / expected number of sites

Draws and noise come from the system's entropy and from no seed: noise that can be computed can be subtracted. The
denominator is fixed, and a round in which no site was drawn releases noise alone, for who was there is not to be seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import locked, write_atomic
from fedmeta.learners import Learner
from fedmeta.messages import MessageError, TrainReply
from server.accountant import Accountant
from server.aggregation import Gradient, total

BUDGET_FILE = "privacy.json"
"""The file in a run's folder that counts the rounds whose meta-state has been released, also those since repeated."""

CLIP_TOLERANCE = 1 + 1e-6
"""How far rounding may carry a clipped sum beyond its bound."""


class SiteLevelDP:
    """The private rounds of one run.

    Args:
        experiment: The run's description; its `privacy.noise_multiplier` is above 0.
        sites: The number of training sites.
        folder: The run's folder, which keeps what has been spent.
        done: The rounds that the run has behind it.

    Raises:
        FedmetaError: Delta promises nothing, the accountant is not installed, or the ledger is not what it should be.
    """

    def __init__(self, experiment: Experiment, sites: int, folder: Path, done: int = 0) -> None:
        settings = experiment.privacy
        if settings.delta >= 1 / sites:
            raise FedmetaError(
                f"[privacy] delta = {settings.delta:g}: must be below 1/{sites}, one over the number of training sites"
            )
        expected = min(experiment.server.sites_per_round or sites, sites)
        # A server that draws the cohort knows who is in it: towards it drawing hides nothing.
        counted = sites if settings.secure_aggregation else expected
        self.accountant = Accountant(sites, counted, settings.noise_multiplier, settings.delta)
        self.expected = expected
        self.clip_norm = settings.clip_norm
        self.deviation = settings.noise_multiplier * settings.clip_norm
        self._ledger = folder / BUDGET_FILE
        self.spent = _read(self._ledger, sites) if done or self._ledger.exists() else 0
        self.budget = settings.epsilon
        first = self.accountant.epsilon(1)  # fails now if the accountant is not installed
        if self.budget and first > self.budget:
            raise FedmetaError(
                f"[privacy] epsilon = {self.budget:g}: the first round already takes {first:.3g}: "
                "raise noise_multiplier or epsilon, or lower sites_per_round"
            )

    @property
    def epsilon(self) -> float:
        """Epsilon of all rounds released so far."""
        return self.accountant.epsilon(self.spent)

    def rounds_left(self, most: int) -> int:
        """Returns how many more rounds the budget allows, at most `most`; a budget of 0 allows any number."""
        if not self.budget:
            return most
        return max(0, self.accountant.rounds_within(self.budget, self.spent + most) - self.spent)

    def sample(self, training: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the training sites that take part in a round: each one by its own draw."""
        share = self.expected / self.accountant.sites
        return training[_uniform(len(training)) <= share]

    def check(self, reply: TrainReply) -> None:
        """Checks that a node's sum is no longer than its sites' clipped gradients can make it.

        Raises:
            MessageError: It is.
        """
        norm = float(torch.stack([value.double().norm() for value in reply.gradient.values()]).norm())
        if norm > CLIP_TOLERANCE * self.clip_norm * len(reply.names):
            raise MessageError("its gradient is longer than privacy.clip_norm allows")

    def release(self, replies: Sequence[TrainReply], like: Mapping[str, Tensor]) -> Gradient:
        """Returns the noised mean of the replies' sums, in float64, once it is written down that it was released.

        Args:
            replies: The nodes' sums of clipped gradients; there may be none.
            like: Tensors with the gradient's keys and shapes.

        Raises:
            FedmetaError: It cannot be written down.
        """
        self._count()
        empty = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
        sums = total(replies) if replies else empty
        return {
            name: (value + self.deviation * noise(tuple(value.shape))) / self.expected for name, value in sums.items()
        }

    def release_noised(self, sums: Gradient) -> Gradient:
        """Returns the mean of a secure sum, whose noise the sites added, once it is written down that it was released.

        Raises:
            FedmetaError: It cannot be written down.
        """
        self._count()
        return {name: value / self.expected for name, value in sums.items()}

    def _count(self) -> None:
        """Counts one more round on the disk, on top of what stands there: also rounds that another process released.

        Raises:
            FedmetaError: It cannot be written down; then nothing may be released.
        """
        with locked(self._ledger.with_name(f".{self._ledger.name}.lock"), wait=True):
            written = _read(self._ledger, self.accountant.sites) if self._ledger.exists() else 0
            spent = max(self.spent, written) + 1
            try:
                write_atomic(self._ledger, json.dumps({"rounds": spent, "sites": self.accountant.sites}).encode())
            except OSError as error:
                raise FedmetaError(f"{self._ledger}: cannot be written: {error.strerror or error}") from error
            self.spent = spent

    def summary(self) -> dict[str, float]:
        """Returns its entries of the run's summary."""
        return {"epsilon": self.epsilon, "delta": self.accountant.delta, "rounds": self.spent}


def make_dp_mechanism(
    experiment: Experiment, learner: Learner, meta_state: Mapping[str, Tensor], sites: int, folder: Path, done: int
) -> SiteLevelDP | None:
    """Returns what makes a run's rounds private; None where the experiment asks for no noise.

    Raises:
        FedmetaError: As `check` and `SiteLevelDP` do.
    """
    if not experiment.privacy.noise_multiplier:
        return None
    check(experiment, learner, meta_state)
    return SiteLevelDP(experiment, sites, folder, done)


def check(experiment: Experiment, learner: Learner, meta_state: Mapping[str, Tensor]) -> None:
    """Checks that noise and the rest of an experiment make sense together.

    Raises:
        FedmetaError: They do not.
    """
    server, name = experiment.server, experiment.learner.name
    keeps = bool(learner.personal(meta_state))
    rules = (
        (
            experiment.weighs_rows,
            f'[server] weighting = "{server.weighting}": must be "uniform"',
            "a site's size would scale what it adds, and is no secret itself",
        ),
        (
            server.aggregator != "mean",
            f'[server] aggregator = "{server.aggregator}": must be "mean"',
            "the noise is measured for a sum",
        ),
        (
            server.sampling != "uniform",
            f'[server] sampling = "{server.sampling}": must be "uniform"',
            "the accountant counts on a draw that is independent for each site",
        ),
        (
            server.variance_reduction != "none",
            f'[server] variance_reduction = "{server.variance_reduction}": must be "none"',
            "a remembered update would count in rounds whose noise was not measured for it",
        ),
        (
            server.objective != "mean",
            f'[server] objective = "{server.objective}": must be "mean"',
            "weights by loss change how much one site may add, and losses have no noise",
        ),
        (server.admit, "[server] admit = true: must be false", "the accountant's number of sites is fixed"),
        (
            server.min_sites > 1,
            f"[server] min_sites = {server.min_sites}: must be 1",
            "a round that is skipped reveals who was there",
        ),
        (
            learner.update == "nothing",
            f'[learner] name = "{name}": must be one whose sites send something',
            "there is nothing to protect",
        ),
        (
            keeps,
            f'[learner] name = "{name}": must be one that keeps nothing at the sites',
            "what a site kept reveals in which rounds it was drawn, which the accountant takes for secret",
        ),
    )
    for broken, refused, reason in rules:
        if broken:
            raise FedmetaError(f"{refused} with privacy.noise_multiplier above 0: {reason}")


def noise(shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal numbers of this shape, in float64, from the system's entropy (Box and Muller 1958)."""
    count = int(np.prod(shape, dtype=np.int64))
    radius = np.sqrt(-2 * np.log(_uniform(count)))
    return torch.from_numpy(radius * np.cos(2 * np.pi * _uniform(count))).reshape(shape)


def _uniform(count: int) -> NDArray[np.float64]:
    """Returns uniform numbers in (0, 1], with 53 bits each, from the system's entropy."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53


def _read(ledger: Path, sites: int) -> int:
    """Returns how many rounds a run has released.

    Raises:
        FedmetaError: The file is not a ledger, or one of another number of training sites.
    """
    try:
        entries = json.loads(ledger.read_text())
        rounds, population = int(entries["rounds"]), int(entries["sites"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmetaError(
            f"{ledger}: it records how much privacy the run has spent, and cannot be read: {error}"
        ) from error
    if population != sites:
        raise FedmetaError(f"{ledger}: the run had {population} training sites and now has {sites}: start a new one")
    return rounds
