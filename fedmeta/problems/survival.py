r"""Survival by discrete time: a hazard in each interval, with right-censored rows.

Times are cut into intervals j = 1 ... J. With hazard h_j(x) = sigmoid(b_j + w.x), the chance of an event in interval j
for a row that reached it, S_j(x) = prod_{k <= j} (1 - h_k(x)) is the chance to survive it. A row with its event in
interval k contributes -log h_k - sum_{j < k} log(1 - h_j); one censored in interval k, -sum_{j < k} log(1 - h_j): it is
known to have survived the intervals before (Singer and Willett, Journal of Educational Statistics 18:155, 1993). w and
the baseline b are what a site adapts.

Scores: Harrell's C-index, the share of comparable pairs in which the earlier event has the larger predicted risk (the
sum of hazards), ties half; and the Brier score of survival at the end of an interval, weighted by the inverse
probability of not being censored (Graf and others, Statistics in Medicine 18:2529, 1999), which the scored rows give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedmeta.errors import FedmetaError
from fedmeta.problems.cohort_tables import CohortTables, Table
from fedmeta.problems.metric import Metric
from fedmeta.problems.problem import Parameters, Problem

RowsOfTime = dict[str, Tensor]
"""x [n, features], interval [n] from 0, event [n] 1 or 0 = censored, and mask [n]."""


class Survival(Problem, CohortTables):
    """Discrete-time survival at sites with tables, or on simulated sites of known truth.

    Args:
        path: A folder with a table for each site, or one site's file; empty for simulated sites.
        site: The name of a single file's site.
        time: The column of times, at least 0, to the event or to censoring.
        event: The column that is 1 for an event and 0 where the row is censored.
        features: The columns of features.
        cuts: The ends of the intervals but the last, rising, in the unit of `time`.
        brier: At the end of which interval (from 1) the Brier score is taken; 0 for the middle one.
        support: Rows that a site adapts on.
        query: Rows that score it in training.
        test: The share of rows that are kept for the final scores.
        center: What is subtracted from each feature, known to all sites.
        scale: What features are then divided by.
        most_test: The length that test rows are padded to, the same at all nodes that read their own site alone.
    """

    def __init__(
        self,
        path: str = "",
        site: str = "",
        time: str = "time",
        event: str = "event",
        features: Sequence[str] = ("a", "b", "c"),
        cuts: Sequence[float] = (1.0, 2.0, 3.0, 4.0),
        brier: int = 0,
        support: int = 40,
        query: int = 40,
        test: float = 0.3,
        center: Sequence[float] = (),
        scale: Sequence[float] = (),
        most_test: int = 0,
    ) -> None:
        if not cuts or min(cuts) <= 0 or list(cuts) != sorted(set(cuts)):
            raise FedmetaError(f"[problem] cuts = {list(cuts)}: give rising ends of intervals, greater than 0")
        self.cuts, self.time, self.event = np.array(cuts, dtype=np.float64), time, event
        self.place = (brier or (len(cuts) + 2) // 2) - 1
        if not 0 <= self.place < len(cuts):
            raise FedmetaError(f"[problem] brier = {brier}: the interval must be 1 to {len(cuts)}, which have an end")
        CohortTables.__init__(
            self, path, site, self._simulate, features, (time, event), support, query, test, center, scale, most_test
        )
        end = f"{self.cuts[self.place]:g}"
        self.metrics = (
            Metric("c_index", higher_is_better=True, low=0, high=1),
            Metric(f"brier_at_{end}", higher_is_better=False, low=0),
            Metric("nll", higher_is_better=False, low=0),
        )

    def _simulate(self) -> dict[str, Table]:
        """Returns simulated sites' tables, whose columns are called as the problem's."""
        names = {"time": self.time, "event": self.event}
        return {
            site: {names.get(name, name): values for name, values in table.items()}
            for site, table in simulated(self.cuts).items()
        }

    def predicted(self, parameters: Parameters, table: Table) -> dict[str, NDArray[np.float64]]:
        """Returns each row's chance to survive to each cut, `survival_at_T`, and its `risk`, the sum of hazards."""
        with torch.no_grad():
            hazard = self.logits(parameters, self.standardized(table)).sigmoid().double()
        survival = (1 - hazard).cumprod(-1)
        found = {f"survival_at_{end:g}": survival[:, place].numpy() for place, end in enumerate(self.cuts.tolist())}
        return found | {"risk": hazard.sum(-1).numpy()}

    def outcome(self, site: str, table: Table) -> dict[str, Tensor]:
        """Returns each row's interval and whether it ends in an event."""
        time, event = table[self.time], table[self.event]
        if (time < 0).any() or not np.isin(event, (0, 1)).all():
            raise FedmetaError(f'site {site}: "{self.time}" must be at least 0 and "{self.event}" 0 or 1 in each row')
        interval = np.searchsorted(self.cuts, time, side="left")
        return {"interval": torch.from_numpy(interval), "event": torch.tensor(event, dtype=torch.float32)}

    def init(self, seed: int) -> Parameters:
        """Returns no effect of any feature, and a hazard of 0.1 in each interval."""
        return {"weight": torch.zeros(self.width), "baseline": torch.full((len(self.cuts) + 1,), -2.2)}

    def logits(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Returns the hazards' logits [n, intervals]."""
        return (x @ parameters["weight"])[:, None] + parameters["baseline"]

    def inner(self, parameters: Parameters, data: RowsOfTime) -> Tensor:
        """Returns the mean negative log-likelihood of rows."""
        z, place = self.logits(parameters, data["x"]), torch.arange(len(self.cuts) + 1)
        before = (place < data["interval"][:, None]).to(z.dtype)
        here = (place == data["interval"][:, None]).to(z.dtype) * data["event"][:, None]
        each = -(before * logsigmoid(-z) + here * logsigmoid(z)).sum(-1)
        return self.mean(each, data)

    def evaluate(self, parameters: Parameters, data: RowsOfTime) -> dict[str, Tensor]:
        """Returns C-index, Brier score and mean negative log-likelihood; NaN where a score is undefined."""
        hazard = self.logits(parameters, data["x"]).sigmoid()
        survival = (1 - hazard).cumprod(-1)[:, self.place]
        brier = brier_score(survival, data["interval"], data["event"], data["mask"], self.place)
        concordance = c_index(hazard.sum(-1), data["interval"], data["event"], data["mask"])
        return {"c_index": concordance, self.metrics[1].name: brier, "nll": self.inner(parameters, data)}


def c_index(risk: Tensor, interval: Tensor, event: Tensor, mask: Tensor) -> Tensor:
    """Returns Harrell's C-index of rows [n]; NaN without a comparable pair.

    A pair is comparable where one row has an event in an earlier interval than the other's event, or than the interval
    in which the other was censored, or in the same interval as that.
    """
    earlier = interval[:, None] < interval
    same = (interval[:, None] == interval) & (event == 0)
    comparable = (earlier | same).to(risk.dtype) * event[:, None] * mask[:, None] * mask
    order = (risk[:, None] > risk).to(risk.dtype) + 0.5 * (risk[:, None] == risk).to(risk.dtype)
    return (comparable * order).sum() / comparable.sum()


def brier_score(survival: Tensor, interval: Tensor, event: Tensor, mask: Tensor, place: int) -> Tensor:
    """Returns the weighted Brier score of the predicted chance to survive interval `place` (from 0) [n]; or NaN.

    Rows censored in an interval leave after its events. A row whose event is by then counts by the inverse chance of
    not being censored before its interval; one at risk after it, before the next; one censored by then not at all.
    """
    chance = [torch.ones((), dtype=survival.dtype)]
    for each in range(place + 1):
        here = (interval == each).to(survival.dtype) * mask
        at_risk = ((interval > each).to(survival.dtype) * mask).sum() + (here * (1 - event)).sum()
        lost = (here * (1 - event)).sum()
        chance.append(chance[-1] * (1 - lost / at_risk.clamp(min=1)))
    kept = torch.stack(chance).clamp(min=1e-12)  # 0 where no row is left that it could weigh
    died = (interval <= place).to(survival.dtype) * event * mask
    alive = (interval > place).to(survival.dtype) * mask
    weight = died / kept[interval.clamp(max=place)] + alive / kept[place + 1]
    error = died * survival**2 + alive * (1 - survival) ** 2
    return (weight * error).sum() / mask.sum()


TRUE_WEIGHT = (0.8, -0.5, 0.0)
"""What the features of simulated sites do to the hazard's logit, on average over sites."""

TRUE_SPREAD = 0.4
"""The standard deviation of each effect, and of the baseline, between simulated sites."""

TRUE_BASELINE = -1.5


def simulated(cuts: np.ndarray, sites: int = 24, rows: int = 200, seed: int = 0) -> dict[str, Table]:
    """Returns simulated sites of known truth: effects around `TRUE_WEIGHT`, a third of rows censored at random."""
    found: dict[str, Table] = {}
    ends = np.append(cuts, cuts[-1] + 1)
    for number in range(sites):
        draw = np.random.default_rng([seed, number])
        weight = np.array(TRUE_WEIGHT) + TRUE_SPREAD * draw.normal(size=3)
        x = draw.normal(size=(rows, 3))
        z = TRUE_BASELINE + TRUE_SPREAD * draw.normal() + x @ weight
        happens = draw.random((rows, len(ends))) < 1 / (1 + np.exp(-z))[:, None]
        interval = np.where(happens.any(axis=1), happens.argmax(axis=1), len(ends))
        censored = np.where(draw.random(rows) < 1 / 3, draw.integers(0, len(ends), rows), len(ends))
        event = interval < np.minimum(censored, len(ends))
        last = np.minimum(np.minimum(interval, censored), len(ends) - 1)
        table = {name: x[:, place] for place, name in enumerate("abc")}
        found[f"site-{number:02d}"] = table | {"time": ends[last] - 0.25, "event": event.astype(np.float64)}
    return found
