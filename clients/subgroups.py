"""Figures of a site's test rows by subgroup: what leaves is counts, the score, and sums for pooled figures."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clients.node import RowNode, Sites
from fedmeta.data import evaluation_episodes
from fedmeta.data.columns import Categories
from fedmeta.data.population import ArrayPopulation
from fedmeta.data.subgroups import HIDDEN, Subgrouping, all_levels, codes_of, parse, shown
from fedmeta.problems import Supervised
from fedmeta.problems.pooled import Bins, pooled, sums_of
from fedmeta.problems.row_metrics import predictions_of

Floats = NDArray[np.float64]

ROWS = "rows"


@dataclass
class SubgroupFigures:
    """What a node's sites show of their subgroups, filled batch by batch.

    Attributes:
        node: The node.
        groupings: The columns that rows are grouped by.
        categories: The names that the run knows.
        smallest: The fewest rows of a subgroup that are shown (rows).
        states: Of what figures are: before and after adaptation.
        by_site: "rows" and for each state the score [sites, subgroups]; 0 rows and NaN where nothing is shown.
        sums: Sums for pooled figures, by "GROUP/STATE@SUBGROUP/NAME".
    """

    node: RowNode
    groupings: tuple[Subgrouping, ...]
    categories: Categories
    smallest: int
    states: tuple[str, ...]
    by_site: dict[str, Floats]
    sums: dict[str, Floats] = field(default_factory=dict)

    @classmethod
    def of(cls, node: object, sites: int, categories: Categories, states: tuple[str, ...]) -> SubgroupFigures | None:
        """Returns empty figures of so many sites; None where the run has no subgroups, or data are no rows."""
        if not isinstance(node, RowNode) or not isinstance(node.population, ArrayPopulation):
            return None
        groupings = parse(node.experiment.evaluation.subgroups)
        if not groupings:
            return None
        empty = np.full((sites, len(all_levels(groupings, categories))), np.nan)
        by_site = {ROWS: np.zeros_like(empty)} | {state: empty.copy() for state in states}
        return cls(node, groupings, categories, node.experiment.evaluation.smallest_subgroup, states, by_site)

    def add(
        self,
        problem: Supervised,
        group: Sites,
        sites: Sites,
        outputs: NDArray[np.floating],
        y: NDArray[np.generic],
        taken: NDArray[np.int64],
        groups: tuple[int, ...],
    ) -> None:
        """Adds the figures of a batch.

        Args:
            problem: The problem.
            group: The places of the batch's sites among all.
            sites: The batch's sites.
            outputs: The model's outputs [sites, steps + 1, rows, outputs], in the targets' own units.
            y: Labels [sites, rows], likewise.
            taken: The steps that each site takes [sites].
            groups: The group that each site of the request is pooled in, -1 for none.
        """
        population, data = self.node.population, self.node.experiment.data
        assert isinstance(population, ArrayPopulation)
        query = evaluation_episodes(self.node.split, sites, data.support).query
        for place, site in enumerate(group.tolist()):
            present = query.mask[place]
            start = 0
            for grouping in self.groupings:
                levels = len(grouping.levels(self.categories))
                codes = codes_of(population, query.rows[place][present], grouping, self.categories)
                counts = np.bincount(codes[codes != HIDDEN], minlength=levels)
                missing = int((codes == HIDDEN).sum())
                for level in np.flatnonzero(shown(np.append(counts, missing), self.smallest)[:levels]).tolist():
                    own = np.flatnonzero(present)[codes == level]
                    self.by_site[ROWS][site, start + level] = len(own)
                    for state, step in zip(self.states, (0, int(taken[place])), strict=True):
                        found = predictions_of(outputs[place, step, own], y[place, own], problem.positive)
                        if not np.isfinite(found.probabilities if found.classes else found.outputs).all():
                            continue
                        sums = sums_of(found, len(own), problem.metrics, Bins())
                        scored = pooled(sums, problem.metrics, problem.positive)
                        self.by_site[state][site, start + level] = scored.get(problem.metrics[0].name, np.nan)
                        if groups[site] >= 0:
                            for name, value in sums.items():
                                key = f"{groups[site]}/{state}@{start + level}/{name}"
                                self.sums[key] = self.sums[key] + value if key in self.sums else value
                start += levels
