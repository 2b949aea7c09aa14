"""How a node's sites are judged: on their test rows, before, during and after adaptation on their support rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.node import GROUP_ROWS, Node, Sites
from fedmeta import engines
from fedmeta.data import Standardisation
from fedmeta.engines.personal_state import evaluate_personal, stack_personal
from fedmeta.engines.step_selection import FOLDS, choose_steps
from fedmeta.engines.weighted_sum import Scores
from fedmeta.learners import Learner, build
from fedmeta.learners.rates import scale_inner_lr
from fedmeta.messages import EvaluateReply, RoundRequest
from fedmeta.models import Parameters
from fedmeta.task import Batch


@dataclass(frozen=True)
class Evaluator:
    """Scores sites from one meta-state in one way.

    Attributes:
        learner: The learner, with its rates as they are to be used.
        meta_state: The meta-state, likewise.
        steps: The number of inner steps.
        engine: The cohort engine.
        budget: Bytes that the sites which are computed together may take.
    """

    learner: Learner
    meta_state: Mapping[str, Tensor]
    steps: int
    engine: str
    budget: int

    @classmethod
    def of(cls, learner: Learner, meta_state: Mapping[str, Tensor], request: RoundRequest) -> Evaluator:
        """Returns the judge that a request asks for."""
        if request.reference:
            learner = build("local", learner.network, inner_steps=learner.inner_steps, inner_lr=learner.inner_lr)
        learner, scaled = scale_inner_lr(learner, meta_state, request.rate)
        steps = learner.evaluation_steps(request.steps)
        return cls(learner, scaled, steps, request.engine, request.budget or engines.BUDGET)

    def scores(self, batch: Batch, own: Parameters | None) -> Scores:
        """Returns the scores of a batch; `own` are the personal parts that its sites kept, if the learner has such."""
        if own is not None:
            return evaluate_personal(self.learner, self.meta_state, batch, self.steps, own)
        return engines.evaluate(self.learner, self.meta_state, batch, self.engine, steps=self.steps, budget=self.budget)

    def steps_chosen(self, batch: Batch, own: Parameters | None) -> Tensor:
        """Returns the number of steps [sites] that each site chooses on its support rows."""
        together = max(1, GROUP_ROWS // (FOLDS * batch.support[2].shape[1]))
        chosen = []
        for start in range(0, batch.sites, together):
            few = slice(start, start + together)
            repeated = own and {name: value[few].repeat_interleave(FOLDS, 0) for name, value in own.items()}
            evaluate = partial(self.scores, own=repeated)
            chosen.append(choose_steps(evaluate, tuple(tensor[few] for tensor in batch.support)))
        return torch.cat(chosen)


def evaluate_sites(
    node: Node,
    here: Sites,
    request: RoundRequest,
    judge: Evaluator,
    scale: Standardisation,
    kept: Sequence[Parameters | None] | None,
) -> EvaluateReply:
    """Returns the scores of the sites `here`, in groups that bound padding and memory.

    Args:
        node: The node.
        here: The sites, in the request's order.
        request: What was asked.
        judge: How to score.
        scale: The run's standardisation.
        kept: What each site kept of its own, where the learner has such.
    """
    figures = np.full((3, len(here), judge.steps + 1), np.nan)
    chosen = np.full(len(here), judge.steps, dtype=np.int64)
    for group, batch in node.evaluation_batches(here, scale, request.classes):
        own = None
        if kept is not None:
            places = np.repeat(group, batch.sites // len(group)).tolist()
            own = stack_personal(judge.learner, judge.meta_state, [kept[place] for place in places])
        found = judge.scores(batch, own)
        # A site's tasks, several with data.ways, stand one after another; it is judged by their mean.
        by_task = torch.stack(found).double().cpu().numpy()
        if not node.population.regression:
            by_task[0] = counted(by_task[0], batch)
        figures[:, group] = by_task.reshape(len(found), len(group), -1, judge.steps + 1).mean(axis=2)
        if request.gate and judge.steps:
            chosen[group] = np.median(judge.steps_chosen(batch, own).cpu().numpy().reshape(len(group), -1), axis=1)
    scores, losses, calibration = figures
    return EvaluateReply(request.names, scores, losses, calibration, chosen)


def counted(shares: NDArray[np.float64], batch: Batch) -> NDArray[np.float64]:
    """Returns accuracies [tasks, steps + 1] of a batch's query rows as what they stand for: right rows by rows.

    Engines add up float32 shares of rows, whose last bits hang on which rows are right: as many of them after adapting
    as before could read as a loss, and all of them as more than 1.
    """
    rows = batch.query[2].double().sum(1, keepdim=True).clamp(min=1).cpu().numpy()
    accuracies: NDArray[np.float64] = np.rint(shares * rows) / rows
    return accuracies
