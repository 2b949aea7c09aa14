"""How a node's sites are evaluated: on their test data, before, during and after adaptation on their support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.local_only import own_baseline, solve_alone
from clients.node import GROUP_ROWS, Node, Sites
from clients.policy import ROUNDED, Policy
from clients.stream import losses_of_rows
from clients.subgroups import SubgroupFigures
from fedmeta import engines
from fedmeta.data import Standardisation
from fedmeta.engines.personal_state import evaluate_personal, stack_personal
from fedmeta.engines.step_selection import FOLDS, choose_steps, last_good_steps
from fedmeta.engines.weighted_sum import Figures
from fedmeta.learners import Learner
from fedmeta.learners.rates import scale_inner_lr
from fedmeta.messages import LOSS, EvaluateReply, RoundRequest
from fedmeta.models import Parameters
from fedmeta.problems import RowMetric, Supervised
from fedmeta.problems.pooled import Bins, Sums, sums_of
from fedmeta.problems.row_metrics import Predictions, in_original_units, on_predictions, predictions_of
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.task import Batch

Floats = NDArray[np.float64]

STATES = ("global", "personalized")


@dataclass(frozen=True)
class Evaluator:
    """Evaluates sites from one meta-state in one way.

    Attributes:
        learner: The learner, with its rates as they are to be used.
        meta_state: The meta-state, likewise.
        steps: The number of inner steps.
        engine: The engine.
        budget: Bytes that the sites which are computed together may take.
        baseline: What is scored in place of adaptation, as in `RoundRequest`.
    """

    learner: Learner
    meta_state: Mapping[str, Tensor]
    steps: int
    engine: str
    budget: int
    baseline: str = ""

    @classmethod
    def of(cls, learner: Learner, meta_state: Mapping[str, Tensor], request: RoundRequest) -> Evaluator:
        """Returns the evaluator that a request asks for."""
        budget = request.budget or engines.BUDGET
        if request.baseline:
            return cls(learner, meta_state, request.steps, request.engine, budget, request.baseline)
        learner, scaled = scale_inner_lr(learner, meta_state, request.rate)
        return cls(learner, scaled, learner.evaluation_steps(request.steps), request.engine, budget)

    def figures(self, batch: Batch, own: Parameters | None) -> Figures:
        """Returns a batch's figures; `own` are the personal parts that its sites kept, if the learner has such."""
        if own is not None:
            return evaluate_personal(self.learner, self.meta_state, batch, self.steps, own)
        return engines.evaluate(self.learner, self.meta_state, batch, self.engine, steps=self.steps, budget=self.budget)

    def select_steps(self, batch: Batch, own: Parameters | None) -> Tensor:
        """Returns the number of steps [sites] that each site selects on its support rows.

        Where the selected steps, taken on all of these rows, blow up, the site goes back to the last good one.
        """
        together = max(1, GROUP_ROWS // (FOLDS * batch.support[2].shape[1]))
        chosen = []
        for start in range(0, batch.sites, together):
            few = slice(start, start + together)
            repeated = own and {name: value[few].repeat_interleave(FOLDS, 0) for name, value in own.items()}
            evaluate = partial(self.figures, own=repeated)
            support = tuple(tensor[few] for tensor in batch.support)
            here = partial(self.figures, own=own and {name: value[few] for name, value in own.items()})
            chosen.append(last_good_steps(here, support, choose_steps(evaluate, support)))
        return torch.cat(chosen)


def evaluate_sites(
    node: Node,
    here: Sites,
    request: RoundRequest,
    evaluator: Evaluator,
    scale: Standardisation,
    kept: Sequence[Parameters | None] | None,
    policy: Policy | None = None,
    losses: dict[int, Floats] | None = None,
) -> EvaluateReply:
    """Returns the figures of the sites `here`, in groups that bound padding and memory.

    Args:
        node: The node.
        here: The sites, in the request's order.
        request: What was asked.
        evaluator: How to evaluate.
        scale: The run's standardisation; metrics of a regression are given in the targets' own units.
        kept: What each site keeps locally, where the learner has such.
        policy: What the site grants; None in simulation.
        losses: Takes the loss of each of a site's test rows, at the steps that it takes, by its place in `here`.

    Raises:
        PolicyError: A site has fewer rows than its policy answers for.
    """
    problem = evaluator.learner.problem
    names = dict.fromkeys((LOSS, *(metric.name for metric in problem.metrics)))
    columns = 1 if evaluator.baseline else evaluator.steps + 1
    figures = {name: np.full((len(here), columns), np.nan) for name in names}
    chosen = np.full(len(here), columns - 1, dtype=np.int64)
    evaluations = np.zeros(len(here), dtype=np.int64)
    pooled: dict[str, Floats] = {}
    pooled_sites = [0] * (max(request.groups, default=-1) + 1)
    wanted = bool(request.groups) and not evaluator.baseline and not (policy and policy.metrics == ROUNDED)
    subgroups = SubgroupFigures.of(node, len(here), request.categories, STATES) if wanted else None
    for group, batch in node.evaluation_batches(here, scale, request.classes):
        if policy:
            policy.check_rows(batch, test=True)
        if evaluator.baseline == "local_only":
            found, methods = solve_alone(evaluator.learner, evaluator.meta_state, batch, node.experiment)
            # Of several few-shot tasks of a site the first one's stands for all: they have equally many rows.
            evaluations[group] = np.reshape(methods, (len(group), -1))[:, 0]
        elif evaluator.baseline:
            found, counts = own_baseline(evaluator.baseline, evaluator.learner, evaluator.meta_state, batch)
            evaluations[group] = counts
        else:
            own = None
            if kept is not None:
                places = np.repeat(group, batch.sites // len(group)).tolist()
                own = stack_personal(evaluator.learner, evaluator.meta_state, [kept[place] for place in places])
            found = evaluator.figures(batch, own)
            if request.gate and evaluator.steps:
                picked = evaluator.select_steps(batch, own).cpu().numpy().reshape(len(group), -1)
                chosen[group] = np.median(picked, axis=1)
        outputs, y = found.pop(OUTPUTS, None), batch.query[1] if problem.on_rows else None
        taken = np.repeat(chosen[group], batch.sites // len(group))
        if losses is not None and outputs is not None and y is not None and batch.sites == len(group):
            mask = batch.query[2].cpu().numpy()
            for place, site in enumerate(group.tolist()):
                reached = outputs[place, int(taken[place])].detach().cpu().numpy()
                losses[site] = losses_of_rows(reached, y[place].cpu().numpy(), mask[place])
        if outputs is not None and y is not None and y.is_floating_point() and not scale.target.identity:
            restored, outputs, y = in_original_units(outputs, y, batch.query[2], scale.target, problem.metrics)
            found |= restored
        by_task = {name: value.double().cpu().numpy() for name, value in found.items()}
        if "accuracy" in by_task:
            by_task["accuracy"] = exact_accuracy(by_task["accuracy"], batch)
        if isinstance(problem, Supervised) and outputs is not None and y is not None:
            queries = y.cpu().numpy(), batch.query[2].cpu().numpy()
            states = ("local",) if evaluator.baseline else STATES
            sums = _on_predictions(
                problem, outputs.cpu().numpy(), queries, taken, by_task, states, bool(request.groups)
            )
            per_site = batch.sites // len(group)
            if subgroups:
                labels = y.cpu().numpy()
                subgroups.add(problem, group, here[group], outputs.cpu().numpy(), labels, taken, request.groups)
            for place, parts in enumerate(sums):
                site = int(group[place // per_site])
                number = request.groups[site] if request.groups else -1
                if number >= 0:
                    pooled_sites[number] += place % per_site == 0
                    for name, value in parts.items():
                        key = f"{number}/{name}"
                        pooled[key] = pooled[key] + value if key in pooled else value
        # A site's tasks, several with data.ways, stand one after another; it is scored by their mean.
        for name in figures:
            figures[name][group] = by_task[name].reshape(len(group), -1, columns).mean(axis=1)
    _mark_diverged(figures)
    if policy and policy.metrics == ROUNDED:
        figures = {name: policy.figures(values) for name, values in figures.items()}
        pooled, pooled_sites = {}, [0] * len(pooled_sites)
    counted = tuple(evaluations.tolist()) if evaluator.baseline in ("classical", "local_only") else ()
    by_site = subgroups.by_site if subgroups else {}
    pooled |= subgroups.sums if subgroups else {}
    return EvaluateReply(
        request.names, figures, chosen, pooled, tuple(pooled_sites), evaluations=counted, subgroups=by_site
    )


def _mark_diverged(figures: dict[str, Floats]) -> None:
    """Replaces figures that float32 does not hold by NaN, and has a loss of NaN stand for divergence beside them.

    The server takes no infinite figure; a site whose parameters ran away is one without a finite loss.
    """
    largest = float(np.finfo(np.float32).max)
    away = np.any([np.abs(values) > largest for values in figures.values()], axis=0)
    for values in figures.values():
        values[np.abs(values) > largest] = np.nan
    figures[LOSS][away] = np.nan


def _on_predictions(
    problem: Supervised,
    outputs: NDArray[np.floating],
    queries: tuple[NDArray[Any], NDArray[Any]],
    taken: NDArray[np.int64],
    figures: dict[str, Floats],
    states: tuple[str, ...],
    pool: bool,
) -> list[Sums]:
    """Adds the metrics that scikit-learn computes to a batch's figures, and returns each task's pooled sums.

    Args:
        problem: The problem.
        outputs: The model's outputs [tasks, steps + 1, rows, outputs].
        queries: The tasks' labels [tasks, rows] (targets in their own units) and which rows are there.
        taken: The steps that each task's site takes [tasks].
        figures: The figures so far; metrics are computed at the first and the last taken step, the score at every one.
        states: Of what sums are: of the first and the last taken step, or "local" of the only one.
        pool: Whether pooled sums are wanted.
    """
    chosen = [m for m in problem.metrics if isinstance(m, RowMetric) and m.on_predictions is not None]
    columns = outputs.shape[1]
    for metric in chosen:
        figures[metric.name] = np.full((len(outputs), columns), np.nan)
    sums: list[Sums] = []
    if not chosen and not pool:
        return sums
    y, mask = queries
    bins = Bins()
    for task in range(len(outputs)):
        present = mask[task] > 0
        steps = {0, int(taken[task])}
        every = range(columns) if any(metric is problem.metrics[0] for metric in chosen) else sorted(steps)
        known: dict[int, Predictions] = {}
        for step in every:
            known[step] = predictions_of(outputs[task, step, present], y[task, present], problem.positive)
            for metric in chosen:
                if step in steps or metric is problem.metrics[0]:
                    figures[metric.name][task, step] = on_predictions(metric, known[step])
        if pool:
            own: Sums = {}
            for state, step in zip(states, (0, int(taken[task])), strict=False):
                part = known[step]
                finite = np.isfinite(part.probabilities if part.classes else part.outputs).all()
                if finite:
                    added = sums_of(part, int(present.sum()), problem.metrics, bins)
                    own |= {f"{state}/{name}": value for name, value in added.items()}
            sums.append(own)
    return sums


def exact_accuracy(shares: Floats, batch: Batch) -> Floats:
    """Returns accuracies [tasks, steps + 1] of a batch's query rows as what they stand for: right rows by rows.

    Engines add up float32 shares of rows, whose last bits depend on which rows are right: as many of them after
    adapting as before could read as a loss, and all of them as more than 1.
    """
    rows = batch.query[2].double().sum(1, keepdim=True).clamp(min=1).cpu().numpy()
    accuracies: Floats = np.rint(shares * rows) / rows
    return accuracies
