"""Counts by Poisson regression: admissions in a week, falls per patient day.

A row's count is y ~ Poisson(e exp(b + w.x)), with exposure e (days, patients; 1 where there is no such column). The
objective is the mean negative log-likelihood up to log y!, m - y log m with the predicted mean m = e exp(b + w.x).
Scores: the mean Poisson deviance, 2 (y log(y / m) - (y - m)), and the mean absolute error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.problems.cohort_tables import CohortTables, Table
from fedmeta.problems.metric import Metric
from fedmeta.problems.problem import Parameters, Problem

CountedRows = dict[str, Tensor]
"""x [n, features], y [n] counts, log_exposure [n], and mask [n]."""


class Counts(Problem, CohortTables):
    """Poisson regression at sites with tables, or on simulated sites of known truth.

    Args:
        path: A folder with a table for each site, or one site's file; empty for simulated sites.
        site: The name of a single file's site.
        count: The column of counts.
        exposure: The column of exposures, greater than 0; empty for 1 in each row.
        features: The columns of features.
        support: Rows that a site adapts on.
        query: Rows that score it in training.
        test: The share of rows that are kept for the final scores.
        center: What is subtracted from each feature, known to all sites.
        scale: What features are then divided by.
        most_test: The length that test rows are padded to, the same at all nodes that read their own site alone.
    """

    metrics = (
        Metric("deviance", higher_is_better=False, low=0),
        Metric("mae", higher_is_better=False, low=0),
        Metric("nll", higher_is_better=False),
    )

    def __init__(
        self,
        path: str = "",
        site: str = "",
        count: str = "count",
        exposure: str = "",
        features: Sequence[str] = ("a", "b", "c"),
        support: int = 20,
        query: int = 20,
        test: float = 0.3,
        center: Sequence[float] = (),
        scale: Sequence[float] = (),
        most_test: int = 0,
    ) -> None:
        self.count, self.exposure = count, exposure
        others = (count, *([exposure] if exposure else []))
        CohortTables.__init__(
            self, path, site, self._simulate, features, others, support, query, test, center, scale, most_test
        )

    def _simulate(self) -> dict[str, Table]:
        """Returns simulated sites' tables, whose columns are called as the problem's."""
        self.exposure = self.exposure or "days"
        names = {"days": self.exposure, "count": self.count}
        return {
            site: {names.get(name, name): values for name, values in table.items()}
            for site, table in simulated().items()
        }

    @property
    def needed(self) -> tuple[str, ...]:
        """The features, and the exposure where the problem has one."""
        return (*self.features, *([self.exposure] if self.exposure else []))

    def predicted(self, parameters: Parameters, table: Table) -> dict[str, NDArray[np.float64]]:
        """Returns the mean count of each row as `prediction`."""
        exposure = table[self.exposure] if self.exposure else np.ones(len(table[self.features[0]]))
        if (exposure <= 0).any():
            raise FedmetaError(f'"{self.exposure}" must be greater than 0 in each row')
        data = {"x": self.standardized(table), "log_exposure": torch.from_numpy(np.log(exposure)).float()}
        with torch.no_grad():
            return {"prediction": self.log_mean(parameters, data).exp().double().numpy()}

    def outcome(self, site: str, table: Table) -> dict[str, Tensor]:
        """Returns each row's count and the logarithm of its exposure."""
        y = table[self.count]
        exposure = table[self.exposure] if self.exposure else np.ones(len(y))
        if (y < 0).any() or (y != np.round(y)).any():
            raise FedmetaError(f'site {site}: "{self.count}" must be a whole number of at least 0 in each row')
        if (exposure <= 0).any():
            raise FedmetaError(f'site {site}: "{self.exposure}" must be greater than 0 in each row')
        return {"y": torch.tensor(y, dtype=torch.float32), "log_exposure": torch.from_numpy(np.log(exposure)).float()}

    def init(self, seed: int) -> Parameters:
        """Returns no effect of any feature, and a rate of 1."""
        return {"weight": torch.zeros(self.width), "bias": torch.zeros(())}

    def log_mean(self, parameters: Parameters, data: CountedRows) -> Tensor:
        """Returns the logarithm of each row's predicted mean [n]."""
        return data["log_exposure"] + parameters["bias"] + data["x"] @ parameters["weight"]

    def inner(self, parameters: Parameters, data: CountedRows) -> Tensor:
        """Returns the mean negative log-likelihood of rows, up to log y!."""
        m = self.log_mean(parameters, data)
        return self.mean(m.exp() - data["y"] * m, data)

    def evaluate(self, parameters: Parameters, data: CountedRows) -> dict[str, Tensor]:
        """Returns mean deviance, mean absolute error and mean negative log-likelihood."""
        m, y = self.log_mean(parameters, data), data["y"]
        deviance = 2 * (torch.xlogy(y, y) - y * m - (y - m.exp()))
        each = {"deviance": deviance, "mae": (y - m.exp()).abs(), "nll": m.exp() - y * m}
        return {name: self.mean(values, data) for name, values in each.items()}


TRUE_WEIGHT = (0.5, -0.3, 0.0)
"""What the features of simulated sites do to the logarithm of the rate, on average over sites."""

TRUE_SPREAD = 0.3
"""The standard deviation of each effect, and of the logarithm of the rate, between simulated sites."""


def simulated(sites: int = 24, rows: int = 120, seed: int = 0) -> dict[str, Table]:
    """Returns simulated sites of known truth: effects around `TRUE_WEIGHT`, exposures of 1 to 7 days."""
    found: dict[str, Table] = {}
    for number in range(sites):
        draw = np.random.default_rng([seed, number])
        weight, bias = np.array(TRUE_WEIGHT) + TRUE_SPREAD * draw.normal(size=3), TRUE_SPREAD * draw.normal()
        x, days = draw.normal(size=(rows, 3)), draw.integers(1, 8, rows)
        table = {name: x[:, place] for place, name in enumerate("abc")}
        counts = draw.poisson(days * np.exp(bias + x @ weight))
        found[f"site-{number:02d}"] = table | {"days": days.astype(np.float64), "count": counts.astype(np.float64)}
    return found
