"""What the server asks of sites in a round, and what a node answers: meta-gradients or scores."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.engines import ENGINES
from fedmeta.messages.records import (
    CATEGORY_KEYS,
    Categories,
    MessageError,
    only,
    read_arrays,
    read_categories,
    read_list,
    read_names,
    read_record,
    read_scalar,
    with_optional,
    write_arrays,
    write_categories,
    write_names,
)
from fedmeta.problems.metric import Metric

Floats = NDArray[np.float64]

TASK_KEYS = (
    "round", "classes", "run", "saved_rounds", "steps", "rate", "gate", "baseline", "engine", "budget", "per_site",
    "groups",
)  # fmt: skip
LARGEST_LOSS = float(np.finfo(np.float32).max)
"""The largest loss that a site may have."""

MOST_EVALUATIONS = 1 << 40
"""The most evaluations of its objective that a site may report."""

MOST_ROWS = 1 << 40
"""A site of a stream has fewer rows."""

MOST_BUDGET = 1 << 36
"""The most that a node may offer to the sites which are computed together (bytes): a sixteenth of 1 TiB."""

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
"""One part of a path and no more: a site makes a folder of this name."""
BASELINES = ("", "local_only", "classical", "optimum")
"""What an evaluation may be of: adaptation (""), or what it is compared with."""

ORDERS = ("exact", "first")
"""Which gradient a round may want of a learner that has both."""

LOCAL_METHODS = ("linear", "network", "trees", "solver")
"""How a site may solve alone; a site sends the place of its method in this tuple."""

LOSS = "loss"
"""The figure that every site sends: its outer objective."""


@dataclass(frozen=True)
class RoundRequest:
    """Asks a node to work on some of its sites: the content of `train` and of `evaluate`.

    Attributes:
        meta_state: The meta-state, standardisation included.
        round_number: The round, from 1; for `evaluate` the last finished one.
        classes: The run's class list; empty for regression.
        names: The sites, in site order.
        run: The name of the run's folder, under which sites keep what stays with them.
        saved_rounds: The rounds of the run's checkpoints, from each of which it may continue; 0 where there are fewer.
        steps: The number of inner steps (`evaluate`).
        rate: What the inner rates are multiplied by (`evaluate`).
        gate: Whether each site chooses its number of steps on its support rows (`evaluate`).
        baseline: What is scored in place of adaptation (`evaluate`), one of `BASELINES`: "" for adaptation itself,
            "local_only" for what sites solve alone from the meta-state, or the problem's "classical" or "optimum".
        engine: The cohort engine, fixed for the run; "auto" leaves it to the node's rule.
        budget: Bytes that the sites which are computed together may take; 0 leaves it to the engine.
        per_site: Whether each site's own gradient is wanted in place of their sum (`train`).
        groups: The group that each site's pooled sums are added to, -1 = none; empty where no pooled figures are
            wanted (`evaluate`).
        categories: The columns of categories, and the names that the run knows of each.
        order: Which gradient is wanted of a learner that has both, "exact" or "first"; "" for its own (`train`).
        block: The block of a stream, from 0, that scores the sites (`evaluate`); -1 for the one that the round is at.
    """

    meta_state: Mapping[str, Tensor]
    round_number: int
    classes: tuple[str, ...]
    names: tuple[str, ...]
    run: str
    saved_rounds: tuple[int, ...] = (0, 0)
    steps: int = 0
    rate: float = 1.0
    gate: bool = False
    baseline: str = ""
    engine: str = "auto"
    budget: int = 0
    per_site: bool = False
    groups: tuple[int, ...] = ()
    categories: Categories = ()
    order: str = ""
    block: int = -1

    def pack(self, packed_state: ArrayRecord | None = None) -> RecordDict:
        """Returns the message's content; `packed_state` is the meta-state's record where it was packed before."""
        state = write_arrays(self.meta_state) if packed_state is None else packed_state
        task: dict[str, Any] = {
            "round": self.round_number,
            "classes": list(self.classes),
            "run": self.run,
            "saved_rounds": list(self.saved_rounds),
            "steps": self.steps,
            "rate": self.rate,
            "gate": self.gate,
            "baseline": self.baseline,
            "engine": self.engine,
            "budget": self.budget,
            "per_site": self.per_site,
            "groups": list(self.groups),
            **write_categories(self.categories),
            **({"order": self.order} if self.order else {}),
            **({"block": self.block} if self.block >= 0 else {}),
        }
        return RecordDict({"meta_state": state, "task": ConfigRecord(task), "sites": write_names(self.names)})

    @classmethod
    def unpack(cls, content: RecordDict) -> RoundRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "meta_state", "task", "sites")
        keys = with_optional(content, "task", with_optional(content, "task", TASK_KEYS, CATEGORY_KEYS), ("order",))
        keys = with_optional(content, "task", keys, ("block",))
        task = read_record(content, "task", ConfigRecord, *keys)
        run = read_scalar(task, "run", str)
        if not RUN_NAME.fullmatch(run):
            raise MessageError("the run's name is not the name of a folder")
        return cls(
            meta_state=read_arrays(content, "meta_state"),
            round_number=read_scalar(task, "round", int),
            classes=tuple(read_list(task, "classes", str)),
            names=read_names(content),
            run=run,
            saved_rounds=tuple(read_list(task, "saved_rounds", int)),
            steps=read_scalar(task, "steps", int),
            rate=read_scalar(task, "rate", float),
            gate=read_scalar(task, "gate", bool),
            baseline=_baseline(read_scalar(task, "baseline", str)),
            engine=read_scalar(task, "engine", str),
            budget=read_scalar(task, "budget", int),
            per_site=read_scalar(task, "per_site", bool),
            groups=tuple(read_list(task, "groups", int)),
            categories=read_categories(task),
            order=_order(read_scalar(task, "order", str)) if "order" in task else "",
            block=_block(read_scalar(task, "block", int)) if "block" in task else -1,
        )


def _order(name: str) -> str:
    if name not in ORDERS:
        raise MessageError(f'there is no order "{name[:40]}"')
    return name


def _block(number: int) -> int:
    if not 0 <= number < MOST_ROWS:
        raise MessageError("there is no such block of a stream")
    return number


def _baseline(name: str) -> str:
    if name not in BASELINES:
        raise MessageError(f'there is no baseline "{name[:40]}"')
    return name


@dataclass(frozen=True)
class EngineReply:
    """Which cohort engine a node found fastest for the first cohort.

    Attributes:
        engine: Its name.
        budget: Bytes that the node can give to the sites which are computed together.
        seconds: What each engine took in a trial; empty where no trial was needed.
    """

    engine: str
    budget: int
    seconds: Mapping[str, float]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        choice: dict[str, Any] = {"engine": self.engine, "budget": self.budget}
        seconds: dict[str, Any] = dict(self.seconds)
        return RecordDict({"choice": ConfigRecord(choice), "seconds": MetricRecord(seconds)})

    @classmethod
    def unpack(cls, content: RecordDict) -> EngineReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "choice", "seconds")
        choice = read_record(content, "choice", ConfigRecord, "engine", "budget")
        times = read_record(content, "seconds", MetricRecord)
        seconds = {name: read_scalar(times, name, float) for name in times}
        budget = read_scalar(choice, "budget", int)
        if not 0 <= budget <= MOST_BUDGET:
            raise MessageError(f"the budget is not between 0 and {MOST_BUDGET} bytes")
        if not all(0 <= value < float("inf") for value in seconds.values()):
            raise MessageError("the seconds of a trial are not a finite number of at least 0")
        engine = read_scalar(choice, "engine", str)
        if unknown := {engine, *seconds} - set(ENGINES):
            raise MessageError(f'there is no engine "{min(unknown)}"')
        return cls(engine, budget, seconds)


@dataclass(frozen=True)
class TrainReply:
    """The weighted sum of meta-gradients over a node's share of the cohort, or where asked for each site's own.

    Attributes:
        gradient: The sum, with the keys and shapes of the learned part of the meta-state. It travels in float32 where
            that loses nothing, as for one site of weight 1, and otherwise in float64, in which it was added up: a
            node's share of the sum is not rounded before the whole is. Where the request has `per_site`: the sites'
            own gradients, not weighted, along a leading axis [sites, ...]; 0 where one was not finite.
        weight: The sum of the weights of the sites with a finite gradient.
        names: The sites, in the order of the figures.
        query_loss: The query loss after adaptation, per site.
        finite: Whether the site's gradient was finite, per site; where not, it is in neither sum.
    """

    gradient: Mapping[str, Tensor]
    weight: float
    names: tuple[str, ...]
    query_loss: Floats
    finite: NDArray[np.bool_]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        figures: dict[str, Any] = {
            "weight": self.weight,
            "query_loss": self.query_loss.tolist(),
            "finite": self.finite.astype(int).tolist(),
        }
        gradient = {name: _downcast_if_lossless(value) for name, value in self.gradient.items()}
        return RecordDict(
            {"gradient": write_arrays(gradient), "cohort": MetricRecord(figures), "sites": write_names(self.names)}
        )

    @classmethod
    def unpack(cls, content: RecordDict, like: Mapping[str, Tensor], per_site: bool = False) -> TrainReply:
        """Reads a reply whose gradient must have the keys and shapes of `like`, with `per_site` once for each site.

        Raises:
            MessageError: It is not one, or its gradient or weight is not finite.
        """
        only(content, "gradient", "cohort", "sites")
        names = read_names(content)
        gradient = read_arrays(content, "gradient")
        only(gradient, *like)
        sites = (len(names),) if per_site else ()
        for name, value in gradient.items():
            if value.shape != (*sites, *like[name].shape) or value.dtype not in (torch.float32, torch.float64):
                raise MessageError(f"the gradient of {name} has another shape or type than it should")
            # In the type in which the server steps: a number that is finite in 64 bits may not be so in 32.
            bounds = torch.stack(value.aminmax()).to(like[name].dtype).tolist() if value.numel() else []
            if not all(map(isfinite, bounds)):
                raise MessageError(f"the gradient of {name} is not finite")
        cohort = read_record(content, "cohort", MetricRecord, "weight", "query_loss", "finite")
        weight = read_scalar(cohort, "weight", float)
        if not (np.isfinite(weight) and weight >= 0):
            raise MessageError("the weight is not a finite number of at least 0")
        finite = read_list(cohort, "finite", int, len(names))
        if not set(finite) <= {0, 1}:
            raise MessageError("whether a gradient is finite is neither 0 nor 1")
        reply = cls(
            gradient=gradient,
            weight=weight,
            names=names,
            query_loss=np.array(read_list(cohort, "query_loss", float, len(names)), dtype=np.float64),
            finite=np.array(finite, dtype=bool),
        )
        if not (np.abs(reply.query_loss[reply.finite]) <= LARGEST_LOSS).all():
            raise MessageError("the query loss of a site whose gradient is finite is not a number in range")
        return reply


@dataclass(frozen=True)
class NormsReply:
    """How long the meta-gradient of each of a node's training sites is in a round: what the cohort is drawn by.

    Attributes:
        names: The sites.
        norms: The norm of each site's meta-gradient over all entries [sites]; NaN where it is not finite.
    """

    names: tuple[str, ...]
    norms: Floats

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        norms: dict[str, Any] = {"norms": self.norms.tolist()}
        return RecordDict({"cohort": MetricRecord(norms), "sites": write_names(self.names)})

    @classmethod
    def unpack(cls, content: RecordDict) -> NormsReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "cohort", "sites")
        names = read_names(content)
        cohort = read_record(content, "cohort", MetricRecord, "norms")
        norms = np.array(read_list(cohort, "norms", float, len(names)), dtype=np.float64)
        if (norms < 0).any() or np.isinf(norms).any():
            raise MessageError("a norm is below 0 or infinite")
        return cls(names, norms)


@dataclass(frozen=True)
class EvaluateReply:
    """Figures of a node's sites on their test data.

    Attributes:
        names: The sites.
        figures: "loss" (the outer objective) and each metric after 0, 1, ... steps, [sites, steps + 1]; NaN where a
            metric is undefined, or was not computed between the first and the chosen step.
        chosen: The number of inner steps that each site takes [sites]: all, unless it may choose.
        pooled: Sums over the sites of a group, before ("global") and after adaptation, by "GROUP/STATE/NAME".
        pooled_sites: How many sites each group's sums hold.
        evaluations: How many evaluations of the objective a classical method took [sites], or how each site solved
            alone (its place in `LOCAL_METHODS`); empty for all else.
        alarms: The row of a site's stream, from 0, at which its alarm went off in this block, -1 for none [sites];
            empty where no alarm is kept.
        subgroups: Of each of the run's subgroups the test rows ("rows") and the score before ("global") and after
            adaptation [sites, subgroups]; 0 rows and NaN where a site has fewer than `evaluation.smallest_subgroup`.
            Their sums are among `pooled`, by "GROUP/STATE@SUBGROUP/NAME". Empty where the run has none.
    """

    names: tuple[str, ...]
    figures: Mapping[str, Floats]
    chosen: NDArray[np.int64]
    pooled: Mapping[str, Floats] = field(default_factory=dict)
    pooled_sites: tuple[int, ...] = ()
    evaluations: tuple[int, ...] = ()
    alarms: tuple[int, ...] = ()
    subgroups: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """One more than the number of steps."""
        return int(self.figures[LOSS].shape[1])

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        counts: dict[str, Any] = {
            "columns": self.columns,
            "chosen": self.chosen.tolist(),
            "pooled_sites": list(self.pooled_sites),
            "evaluations": list(self.evaluations),
            **({"alarms": list(self.alarms)} if self.alarms else {}),
        }
        figures: dict[str, Any] = {name: values.ravel().tolist() for name, values in self.figures.items()}
        pooled = {name: torch.from_numpy(np.asarray(value)) for name, value in self.pooled.items()}
        records: dict[str, Any] = {
            "figures": MetricRecord(figures),
            "counts": MetricRecord(counts),
            "sites": write_names(self.names),
            "pooled": write_arrays(pooled),
        }
        if self.subgroups:
            records["subgroups"] = write_arrays({name: torch.from_numpy(own) for name, own in self.subgroups.items()})
        return RecordDict(records)

    @classmethod
    def unpack(cls, content: RecordDict, metrics: Sequence[Metric] | None = None) -> EvaluateReply:
        """Reads a reply.

        Args:
            content: The reply's content.
            metrics: The run's metrics, whose names the figures must have; None for any.

        Raises:
            MessageError: It is not one.
        """
        only(content, "figures", "counts", "sites", "pooled", *(["subgroups"] if "subgroups" in content else []))
        names = read_names(content)
        there = content.get("counts")
        own = ("alarms",) if isinstance(there, MetricRecord) and "alarms" in there else ()
        counts = read_record(content, "counts", MetricRecord, "columns", "chosen", "pooled_sites", "evaluations", *own)
        shape = (len(names), read_scalar(counts, "columns", int))
        if shape[1] < 1 or not names:
            raise MessageError("the figures are of no site or have no column")
        record = read_record(content, "figures", MetricRecord)
        if LOSS not in record:
            raise MessageError("there is no loss among the figures")
        figures = {
            name: np.array(read_list(record, name, float, shape[0] * shape[1]), dtype=np.float64).reshape(shape)
            for name in record
        }
        if metrics is not None:
            only(figures, *dict.fromkeys((LOSS, *(metric.name for metric in metrics))))
        chosen = np.array(read_list(counts, "chosen", int, shape[0]), dtype=np.int64)
        if ((chosen < 0) | (chosen >= shape[1])).any():
            raise MessageError("a site takes more steps than there are")
        pooled = {name: value.numpy() for name, value in read_arrays(content, "pooled").items()}
        if not all(value.dtype == np.float64 and np.isfinite(value).all() for value in pooled.values()):
            raise MessageError("the pooled sums are not finite float64 numbers")
        pooled_sites = tuple(read_list(counts, "pooled_sites", int))
        if any(not 0 <= count <= shape[0] for count in pooled_sites):
            raise MessageError("more sites are pooled than there are")
        evaluations = tuple(read_list(counts, "evaluations", int))
        if len(evaluations) not in (0, len(names)) or any(not 0 <= count <= MOST_EVALUATIONS for count in evaluations):
            raise MessageError("the evaluations are not a count for each site")
        alarms = tuple(read_list(counts, "alarms", int, len(names))) if own else ()
        if any(not -1 <= row < MOST_ROWS for row in alarms):
            raise MessageError("the alarms are not a row, or -1, for each site")
        subgroups = _read_subgroups(content, len(names)) if "subgroups" in content else {}
        return cls(names, figures, chosen, pooled, pooled_sites, evaluations, alarms, subgroups)

    def impossible(self, ranges: Mapping[str, tuple[float, float]]) -> dict[str, str]:
        """Returns the sites with a figure that cannot be, and what is wrong with it; NaN, for undefined, can be.

        Args:
            ranges: The lowest and the highest value of each figure; none may be infinite or larger than float32 has.
        """
        found: dict[str, str] = {}
        for name, values in self.figures.items():
            low, high = ranges[name]
            low, high = max(low, -LARGEST_LOSS), min(high, LARGEST_LOSS)
            slack = 1e-6 * max(1.0, *(abs(bound) for bound in (low, high) if abs(bound) < LARGEST_LOSS), 0.0)
            wrong = ((values < low - slack) | (values > high + slack)).any(axis=1)
            for site in np.flatnonzero(wrong).tolist():
                found.setdefault(self.names[site], f"its {name} is outside of [{low:g}, {high:g}]")
        return found

    def without(self, sites: Collection[str]) -> EvaluateReply:
        """Returns the reply without some sites, and without the sums that those are part of."""
        kept = np.array([name not in sites for name in self.names], dtype=bool)
        names = tuple(name for name in self.names if name not in sites)
        figures = {key: own[kept] for key, own in self.figures.items()}
        counts = tuple(count for count, is_kept in zip(self.evaluations, kept.tolist(), strict=False) if is_kept)
        subgroups = {name: own[kept] for name, own in self.subgroups.items()}
        alarms = tuple(row for row, is_kept in zip(self.alarms, kept.tolist(), strict=False) if is_kept)
        return EvaluateReply(names, figures, self.chosen[kept], evaluations=counts, alarms=alarms, subgroups=subgroups)


def _read_subgroups(content: RecordDict, sites: int) -> dict[str, Floats]:
    """Returns the rows and scores of sites' subgroups; raises `MessageError` where they cannot be."""
    found = {name: value.numpy() for name, value in read_arrays(content, "subgroups").items()}
    only(found, "rows", "global", "personalized")
    shape = found["rows"].shape
    if len(shape) != 2 or shape[0] != sites or any(own.shape != shape for own in found.values()):
        raise MessageError("the figures of subgroups have other shapes than they should")
    if any(own.dtype != np.float64 or np.isinf(own).any() for own in found.values()):
        raise MessageError("the figures of subgroups are not finite float64 numbers")
    rows = found["rows"]
    if not (np.isfinite(rows) & (rows >= 0) & (rows == np.round(rows))).all():
        raise MessageError("the rows of subgroups are no counts")
    return found


def _downcast_if_lossless(value: Tensor) -> Tensor:
    """Returns a float64 tensor as float32 where that is the same numbers."""
    short = value.float()
    return short if value.dtype == torch.float64 and torch.equal(short.double(), value) else value
