"""Runs a learner for many sites at once: the reference loop, and the fast ways, equal to it.

An engine is a module with two functions: `meta_gradients(learner, meta_state, batch, weights)`, which returns a
`WeightedSum`, and `evaluate(learner, meta_state, batch, steps)`, which returns `Scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmeta.engines import program, vmap
from fedmeta.engines.frozen_layers import after_frozen_layers
from fedmeta.engines.lowrank.engine import fits
from fedmeta.engines.microbatch import BUDGET, chunk_sites, chunks
from fedmeta.engines.rows import check_derivatives, check_labels, check_rows, check_tasks
from fedmeta.engines.selection import ENGINES, choose_engine, choose_engine_by_site, run, trial
from fedmeta.engines.weighted_sum import NORM, Figures, WeightedSum, join_figures
from fedmeta.errors import FedmetaError, nearest
from fedmeta.learners import Learner
from fedmeta.learners.local_steps import with_order
from fedmeta.models.attention import exact_attention
from fedmeta.task import Batch, Task, stack, stack_trees

__all__ = ["BUDGET", "ENGINES", "choose_engine", "evaluate", "fits", "gradient_norms", "meta_gradients", "trial"]

NO_BOUND = 1e300
"""A length that no gradient has: with it as `clip_norm` norms are computed and nothing is shortened."""


def meta_gradients(
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    tasks: Sequence[Task] | Batch,
    engine: str = "auto",
    *,
    weights: Sequence[float] | Tensor | None = None,
    chunk: int | None = None,
    budget: int = BUDGET,
    rounded: bool = True,
    clip_norm: float = 0.0,
    per_site: bool = False,
    check: str = "auto",
) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Computes the weighted sum of many sites' meta-gradients.

    Args:
        learner: The learner.
        meta_state: The meta-state.
        tasks: One task per site, in site order; or the same as one padded `Batch`.
        engine: "auto" or a key of `ENGINES`. All give the same up to the last bits; one that does not compute this
            learner and model gives way to another (`fits` has the reason).
        weights: The weight of each site [sites]; None for 1 each.
        chunk: The number of sites that are computed together; None for as many as the budget holds.
        budget: Bytes that the sites which are computed together may take, by prediction.
        rounded: Whether to return the sum in the meta-state's types; else it stays in float64 where parts were added
            up, and where one part was all, in the type in which that was computed.
        clip_norm: The longest gradient of one site, over all entries of the meta-state; longer ones are shortened
            before they are added up; 0 = any length. Costs up to half more in the low-rank form, which computes norms
            without
            any site's gradient; elsewhere, and with learned inner rates, several times as much.
        per_site: Whether to return each site's own gradient in place of the sum.
        check: As `runtime.check` of an experiment: "auto" compares derivatives of own models, problems and learners
            once with a finite difference; "straight-through" and "off" let them differ on purpose.

    Returns:
        The weighted sum (the meta-state's keys, its parts summed in float64 in site order), or with
        `per_site` the sites' gradients as they are [sites, ...], 0 for one that is not finite; the total weight; and
        per-site figures [sites], among them "query_loss" and "finite". A site whose gradient or query loss is not
        finite has neither a share in the sum nor in the weight.

    Raises:
        FedmetaError: There is no such engine, the weights are not one number of at least 0 for each site, tasks and
            model do not fit each other, the model is no function of its rows, or the learner fails.
    """
    template = learner.message_template(meta_state)
    own = _weights(weights, tasks.sites if isinstance(tasks, Batch) else len(tasks))
    if len(own):
        batch = with_order(learner, tasks if isinstance(tasks, Batch) else stack_tasks(learner, tasks))
        whole = learner, meta_state, batch
        name, learner, meta_state, batch = _chosen(engine, *whole)
        if check == "auto":
            check_derivatives(*whole)
        if clip_norm or per_site:
            name = choose_engine_by_site(name, learner, batch, meta_state, per_site)
        own = own.to(batch.device)
        total = run(name, learner, meta_state, batch, own, chunk, budget, clip_norm, per_site)
    else:
        total = WeightedSum.empty(template, clip_norm, per_site)
        total.metrics = {"query_loss": [own], "finite": [own]}
    values = total.stacked() if per_site else total.total
    gradient = {name: value.to(template[name].dtype) if rounded else value for name, value in values.items()}
    return gradient, total.weight, {name: values[0] for name, values in total.metrics.items()}


def gradient_norms(
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    batch: Batch,
    engine: str = "auto",
    *,
    budget: int = BUDGET,
    check: str = "auto",
) -> Tensor:
    """Returns the norm of each site's meta-gradient over all entries [sites], float64; NaN where it is not finite.

    In the low-rank form no site's gradient is made for it (`fedmeta.engines.lowrank.ghost_clipping`).

    Args:
        learner: The learner.
        meta_state: The meta-state.
        batch: The sites' tasks.
        engine: As for `meta_gradients`.
        budget: As for `meta_gradients`.
        check: As for `meta_gradients`.
    """
    _, _, figures = meta_gradients(
        learner, meta_state, batch, engine, budget=budget, rounded=False, clip_norm=NO_BOUND, check=check
    )
    return torch.where(figures["finite"].bool(), figures[NORM], torch.nan)


def evaluate(
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    tasks: Sequence[Task] | Batch,
    engine: str = "auto",
    *,
    steps: int | None = None,
    chunk: int | None = None,
    budget: int = BUDGET,
) -> Figures:
    """Scores every site on its query rows before, during and after adaptation on its support rows.

    Args:
        learner: The learner.
        meta_state: The meta-state.
        tasks: One task per site (support: the rows to adapt on; query: the rows that score), or one padded `Batch`.
        engine: As for `meta_gradients`.
        steps: Inner steps; None for the learner's own number. A learner that does not adapt takes none.
        chunk: As for `meta_gradients`.
        budget: As for `meta_gradients`.

    Returns:
        "loss" and each metric [sites, steps + 1], after 0, 1, ... steps; for supervised problems whose metrics need
        them, the model's "outputs" [sites, steps + 1, rows, outputs].
    """
    taken = learner.evaluation_steps(steps)
    if not (tasks.sites if isinstance(tasks, Batch) else len(tasks)):
        names = ("loss", *(metric.name for metric in learner.problem.metrics))
        return {name: torch.zeros(0, taken + 1) for name in names}
    batch = tasks if isinstance(tasks, Batch) else stack_tasks(learner, tasks)
    name, learner, meta_state, batch = _chosen(engine, learner, meta_state, batch)
    size = chunk or chunk_sites(learner, meta_state, batch, name, budget)
    parts, places = [], []
    for sites, part in chunks(batch, size):
        with exact_attention():
            parts.append(ENGINES[name].evaluate(learner, meta_state, part, taken))
        places.append(sites)
    order = torch.cat(places).argsort()
    return {name: figure[order] for name, figure in join_figures(parts).items()}


def stack_tasks(learner: Learner, tasks: Sequence[Task]) -> Batch:
    """Returns tasks as one batch: rows padded to one length, the trees of an own problem stacked.

    Raises:
        FedmetaError: They are no such tasks, or differ in form.
    """
    if not learner.problem.on_rows:
        return stack_trees(tasks)
    check_tasks(tasks)
    return stack(tasks)


def _weights(weights: Sequence[float] | Tensor | None, sites: int) -> Tensor:
    own = torch.ones(sites) if weights is None else torch.as_tensor(weights)
    if own.shape != (sites,) or not bool(((own >= 0) & (own < torch.inf)).all()):
        raise FedmetaError(f"weights: {sites} numbers of at least 0 are needed, one for each site")
    return own.double()


def _chosen(
    engine: str, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch
) -> tuple[str, Learner, Mapping[str, Tensor], Batch]:
    """Returns the engine, and learner, meta-state and tasks as it gets them: behind frozen layers.

    The loop is the reference, and stays as it is; the low-rank form computes once by itself what is fixed.
    """
    name = _engine(engine, learner, meta_state, batch)
    if engine == "loop" or name == "lowrank":
        return name, learner, meta_state, batch
    reduced = after_frozen_layers(learner, meta_state, batch)
    return (name if reduced[0] is learner else _engine(engine, *reduced), *reduced)


def _engine(name: str, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> str:
    """Returns the engine that a name stands for here, once the model is known to be a function of the rows."""
    if name not in (*ENGINES, "auto"):
        raise FedmetaError(f'no engine "{name}"{nearest(name, ENGINES)} (known: auto, {", ".join(ENGINES)})')
    check_rows(learner, meta_state, batch)
    check_labels(learner, batch)
    if name == "vmap" and vmap.fits(learner, batch, meta_state):
        return "loop"
    if name == "program" and program.fits(learner, batch, meta_state):
        return choose_engine(learner, batch, meta_state)
    if name == "auto" or (name == "lowrank" and fits(learner, batch, meta_state)):
        return choose_engine(learner, batch, meta_state)
    return name
