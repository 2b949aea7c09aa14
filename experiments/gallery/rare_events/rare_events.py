"""A sampler that is tuned to rare events: importance sampling whose proposal is learned (Rubinstein 1999).

A site is a portfolio with loss w . x of twenty standard normal factors x, and fails where the loss exceeds b. The
probability p = P(w . x > b) is between 1e-7 and 3e-6: plain sampling sees nothing. Samples of N(m, I), each weighted
by the likelihood ratio r(x) = exp(|m|^2 / 2 - m . x), estimate p without bias for any shift m, and with little variance
for a good one:

    estimate = mean of 1{w . x > b} r(x)        variance cut = p (1 - p) / variance of a summand

Inner problem: the shift, by steps of the multilevel cross-entropy method (each: sample, take the level that the best
15 % exceed, but never beyond failure; move m to the weighted mean of what exceeds it). Outer problem: the shift that
all sites start from. Everything is known exactly: p by the normal distribution, and the best shift b w / |w|^2 nearly
(Bucklew 2004, section 5.2: the likeliest failure).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fedmeta
from fedmeta.problems.problem import Parameters
from fedmeta.problems.solvers import Rates

FACTORS = 20


def log_ratio(x: Tensor, shift: Tensor) -> Tensor:
    """Returns log of the standard normal density over that of N(shift, I), for rows x [n, factors]."""
    return 0.5 * shift.square().sum() - x @ shift


def draw(shift: Tensor, count: int, seed: Tensor, purpose: int) -> Tensor:
    """Returns samples [count, factors] of N(shift, I), the same for the same seed and purpose."""
    random = torch.Generator().manual_seed(10 * int(seed) + purpose)
    return shift + torch.randn(count, len(shift), generator=random, dtype=torch.float64).to(shift.dtype)


@dataclass(frozen=True)
class MultilevelCrossEntropy(fedmeta.Solver):
    """Steps of the multilevel cross-entropy method (Rubinstein and Kroese 2004, algorithm 3.1). A black box.

    Attributes:
        samples: Samples per step.
        quantile: The share of them that exceeds a level.
    """

    kind = "black box"
    samples: int = 200
    quantile: float = 0.15

    def solve(
        self, problem: fedmeta.Problem, parameters: Parameters, data: Any, steps: int, rates: Rates
    ) -> list[Parameters]:
        """Returns the path of `steps` steps; a rate below 1 smooths: m <- (1 - rate) m + rate * new mean."""
        path = [parameters]
        for step in range(steps):
            shift = path[-1]["shift"]
            x = draw(shift, self.samples, data["seed"], 2 + step)
            excess = x @ data["weights"] - data["threshold"]
            level = torch.quantile(excess, 1 - self.quantile).clamp(max=0)
            elite, ratio = excess >= level, log_ratio(x, shift)
            share = torch.softmax(ratio.masked_fill(~elite, -torch.inf), 0)
            path.append({**parameters, "shift": torch.lerp(shift, share @ x, float(rates["shift"]))})
        return path


def probability(data: Mapping[str, Tensor]) -> float:
    """Returns the exact probability of failure."""
    return 0.5 * math.erfc(float(data["threshold"] / data["weights"].norm()) / math.sqrt(2))


def likeliest(data: Mapping[str, Tensor]) -> Tensor:
    """Returns the likeliest failure b w / |w|^2 [factors], the known good shift."""
    return data["threshold"] * data["weights"] / data["weights"].square().sum()


class RareEvents(fedmeta.Problem, fedmeta.TaskSource):
    """Portfolios with weights of a common and an own part.

    Args:
        portfolios: The number of sites.
        spread: How far their weights differ, relative to the common part.
        samples: Samples of an estimate.
    """

    metrics = (
        fedmeta.Metric("log10_variance_cut", higher_is_better=True),
        fedmeta.Metric("off_by_a_fifth", higher_is_better=False, unit="share of estimates"),
        fedmeta.Metric("relative_error", higher_is_better=False),
    )
    solver = MultilevelCrossEntropy()

    def __init__(self, portfolios: int = 70, spread: float = 0.35, samples: int = 5000) -> None:
        self.samples = samples
        random = torch.Generator().manual_seed(0)
        own = torch.randn(portfolios, FACTORS, generator=random, dtype=torch.float64)
        self.weights = (torch.randn(FACTORS, generator=random, dtype=torch.float64) + spread * own) / FACTORS**0.5
        deviations = 4.75 + 0.2 * torch.randn(portfolios, generator=random, dtype=torch.float64).clamp(-1.1, 2.2)
        self.thresholds = deviations * self.weights.norm(dim=1)

    def init(self, seed: int) -> Parameters:
        """Returns no shift: plain sampling."""
        return {"shift": torch.zeros(FACTORS, dtype=torch.float64)}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns what a site would minimize if it knew it; the solver sees samples alone."""
        return self.outer(parameters, data)

    def outer(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns the log of the exact second moment of a summand, E[1{S} r] under the nominal distribution.

        With shift m it is exp(|m|^2) P(w . x > b + w . m), by completing the square.
        """
        shift, weights = parameters["shift"], data["weights"]
        beyond = (data["threshold"] + weights @ shift) / weights.norm()
        return shift.square().sum() + torch.special.log_ndtr(-beyond)

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns figures of one estimate, and the exact variance cut."""
        shift, p = parameters["shift"], probability(data)
        second = float(self.outer(parameters, data).exp())
        x = draw(shift, self.samples, data["seed"], 1)
        hits = (x @ data["weights"] > data["threshold"]) * log_ratio(x, shift).exp()
        error = abs(float(hits.mean()) / p - 1)
        figures = (math.log10(p * (1 - p) / max(second - p * p, 1e-300)), float(error > 0.2), error)
        return {metric.name: torch.tensor(value) for metric, value in zip(self.metrics, figures, strict=True)}

    def sites(self) -> list[str]:
        """Returns the portfolios' names."""
        return [f"portfolio-{number:02d}" for number in range(len(self.weights))]

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns a portfolio twice, with seeds of its samples for adapting and for the estimate."""
        number = int(site.rpartition("-")[2])
        key = ((seed * 10_000 + round) * 1_000 + number) * 2
        own = {"weights": self.weights[number], "threshold": self.thresholds[number]}
        return fedmeta.Task(*({**own, "seed": torch.tensor(key + part)} for part in (0, 1)))
