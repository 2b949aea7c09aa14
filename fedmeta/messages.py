"""The contract between clients/ and server/: what each message holds. Nothing else leaves a site.

`query.sites`: a node replies with its sites' names and numbers of train and test rows, the labels that occur there,
    the feature names and the shape of a row.
`query.sums`: the server names training sites; a node replies with the count, the sum and the sum of squares of each
    feature over those sites' train rows, added up.
`query.engine`: the server sends what it will send for the first round's `train`; a node replies with the cohort engine
    that it found fastest, the seconds that each took in a trial, and the memory that it can give to one cohort.
`train`: the server sends the meta-state, the round, the class list and the names of the cohort's sites; a node replies
    with the weighted sum of their meta-gradients (or displacements) and its weight, and per site with the query loss
    and whether the gradient was finite.
`evaluate`: the server sends the meta-state, the number of inner steps, the class list and names of sites; a node
    replies per site with the score (accuracy or RMSE), the loss and the calibration error on test rows after 0, 1, ...
    inner steps, and with the number of steps that the site takes.

A node that cannot answer replies with a code of `FAILURES` and nothing else: the text of an exception may hold a cell
of the data. Every message is built and read here and nowhere else; reading checks names, types, shapes and lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.wire import MessageError, only, read_arrays, read_list, read_record, read_scalar, write_arrays

__all__ = [
    "EVALUATE",
    "FAILURES",
    "QUERY_ENGINE",
    "QUERY_SITES",
    "QUERY_SUMS",
    "TRAIN",
    "EngineReply",
    "EvaluateReply",
    "MessageError",
    "SitesReply",
    "SumsReply",
    "SumsRequest",
    "TrainReply",
    "WorkRequest",
    "failure",
    "pack_failure",
]

Floats = NDArray[np.float64]

QUERY_SITES, QUERY_SUMS, QUERY_ENGINE = "query.sites", "query.sums", "query.engine"
TRAIN, EVALUATE = "train", "evaluate"

TASK_KEYS = ("round", "classes", "run", "saved_round", "steps", "rate", "gate", "reference", "engine", "budget")

FIGURES = ("scores", "losses", "calibration")

FAILURES = {
    "bad-experiment": "the node could not use the experiment it was sent; its own log says why",
    "bad-data": "the site's data could not be read; its own log names the file and the cell",
    "bad-message": "the node could not read the message",
    "unknown-site": "the node does not host a site that it was asked for",
    "out-of-memory": "the node ran out of memory",
    "internal": "the node failed for another reason; its own log has the traceback",
}
"""Every code that a node may reply with instead of an answer, and what it means."""


@dataclass(frozen=True)
class SitesReply:
    """Which sites a node hosts.

    Attributes:
        names: The sites' names.
        train_rows: Train rows per site.
        test_rows: Test rows per site.
        classes: The labels that occur at them, as text; empty for regression.
        features: Feature names, where rows have them.
        shape: The shape of one row.
        regression: Whether labels are numbers.
        tokens: Whether features are integer codes that must not be scaled.
    """

    names: tuple[str, ...]
    train_rows: tuple[int, ...]
    test_rows: tuple[int, ...]
    classes: tuple[str, ...]
    features: tuple[str, ...]
    shape: tuple[int, ...]
    regression: bool
    tokens: bool

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        schema: dict[str, Any] = {
            "classes": list(self.classes),
            "features": list(self.features),
            "shape": list(self.shape),
            "regression": self.regression,
            "tokens": self.tokens,
        }
        sizes: dict[str, Any] = {"train_rows": list(self.train_rows), "test_rows": list(self.test_rows)}
        return RecordDict(
            {"sites": _names(self.names), "schema": ConfigRecord(schema), "sizes": MetricRecord(sizes)},
        )

    @classmethod
    def unpack(cls, content: RecordDict) -> SitesReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sites", "schema", "sizes")
        names = _read_names(content)
        sizes = read_record(content, "sizes", MetricRecord, "train_rows", "test_rows")
        schema = read_record(content, "schema", ConfigRecord, "classes", "features", "shape", "regression", "tokens")
        rows = {key: tuple(read_list(sizes, key, int, len(names))) for key in ("train_rows", "test_rows")}
        if min((*rows["train_rows"], *rows["test_rows"]), default=0) < 0:
            raise MessageError("a number of rows is negative")
        if len(set(names)) < len(names):
            raise MessageError("two sites have the same name")
        shape = tuple(read_list(schema, "shape", int))
        if min(shape, default=1) < 1:
            raise MessageError("the shape of a row is not positive")
        return cls(
            names=names,
            train_rows=rows["train_rows"],
            test_rows=rows["test_rows"],
            classes=tuple(read_list(schema, "classes", str)),
            features=tuple(read_list(schema, "features", str)),
            shape=shape,
            regression=read_scalar(schema, "regression", bool),
            tokens=read_scalar(schema, "tokens", bool),
        )


@dataclass(frozen=True)
class SumsRequest:
    """Asks a node for the feature sums of some of its sites, which are training sites."""

    names: tuple[str, ...]

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        return RecordDict({"sites": _names(self.names)})

    @classmethod
    def unpack(cls, content: RecordDict) -> SumsRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites")
        return cls(_read_names(content))


@dataclass(frozen=True)
class SumsReply:
    """Feature sums over the train rows of the sites asked for, missing values left out; float64, all of one shape."""

    count: Floats
    total: Floats
    square: Floats

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        sums = {"count": self.count, "total": self.total, "square": self.square}
        return RecordDict({"sums": write_arrays({name: torch.from_numpy(value) for name, value in sums.items()})})

    @classmethod
    def unpack(cls, content: RecordDict) -> SumsReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sums")
        sums = {name: value.numpy() for name, value in read_arrays(content, "sums").items()}
        only(sums, "count", "total", "square")
        if len({value.shape for value in sums.values()}) != 1:
            raise MessageError("the sums are not of one shape")
        if not all(value.dtype == np.float64 and np.isfinite(value).all() for value in sums.values()):
            raise MessageError("the sums are not finite float64 numbers")
        if (sums["count"] < 0).any() or (sums["square"] < 0).any():
            raise MessageError("a count or a sum of squares is negative")
        return cls(**sums)


@dataclass(frozen=True)
class WorkRequest:
    """Asks a node to work on some of its sites: the content of `train` and of `evaluate`.

    Attributes:
        meta_state: The meta-state, standardisation included.
        round_number: The round, from 1; for `evaluate` the last finished one.
        classes: The run's class list; empty for regression.
        names: The sites, in site order.
        run: The name of the run's folder, under which sites keep what stays with them.
        saved_round: The round of the run's last checkpoint; 0 where there is none.
        steps: The number of inner steps (`evaluate`).
        rate: What the inner rates are multiplied by (`evaluate`).
        gate: Whether each site chooses its number of steps on its support rows (`evaluate`).
        reference: Whether sites train from the meta-state on their own, as the learner "local" does (`evaluate`).
        engine: The cohort engine, fixed for the run; "auto" leaves it to the node's rule.
        budget: Bytes that the sites which are computed together may take; 0 leaves it to the engine.
    """

    meta_state: Mapping[str, Tensor]
    round_number: int
    classes: tuple[str, ...]
    names: tuple[str, ...]
    run: str
    saved_round: int = 0
    steps: int = 0
    rate: float = 1.0
    gate: bool = False
    reference: bool = False
    engine: str = "auto"
    budget: int = 0

    def pack(self, packed_state: ArrayRecord | None = None) -> RecordDict:
        """Returns the message's content; `packed_state` is the meta-state's record where it was packed before."""
        state = write_arrays(self.meta_state) if packed_state is None else packed_state
        task: dict[str, Any] = {
            "round": self.round_number,
            "classes": list(self.classes),
            "run": self.run,
            "saved_round": self.saved_round,
            "steps": self.steps,
            "rate": self.rate,
            "gate": self.gate,
            "reference": self.reference,
            "engine": self.engine,
            "budget": self.budget,
        }
        return RecordDict({"meta_state": state, "task": ConfigRecord(task), "sites": _names(self.names)})

    @classmethod
    def unpack(cls, content: RecordDict) -> WorkRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "meta_state", "task", "sites")
        task = read_record(content, "task", ConfigRecord, *TASK_KEYS)
        return cls(
            meta_state=read_arrays(content, "meta_state"),
            round_number=read_scalar(task, "round", int),
            classes=tuple(read_list(task, "classes", str)),
            names=_read_names(content),
            run=read_scalar(task, "run", str),
            saved_round=read_scalar(task, "saved_round", int),
            steps=read_scalar(task, "steps", int),
            rate=read_scalar(task, "rate", float),
            gate=read_scalar(task, "gate", bool),
            reference=read_scalar(task, "reference", bool),
            engine=read_scalar(task, "engine", str),
            budget=read_scalar(task, "budget", int),
        )


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
        if budget < 0:
            raise MessageError("the budget is negative")
        return cls(read_scalar(choice, "engine", str), budget, seconds)


@dataclass(frozen=True)
class TrainReply:
    """The weighted sum of meta-gradients over a node's share of the cohort.

    Attributes:
        gradient: The sum, with the keys and shapes of the learned part of the meta-state. It travels in float32 where
            that loses nothing, as for one site of weight 1, and otherwise in float64, in which it was added up: a
            node's share of the sum is not rounded before the whole is.
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
        gradient = {name: _shortest(value) for name, value in self.gradient.items()}
        return RecordDict(
            {"gradient": write_arrays(gradient), "cohort": MetricRecord(figures), "sites": _names(self.names)}
        )

    @classmethod
    def unpack(cls, content: RecordDict, like: Mapping[str, Tensor]) -> TrainReply:
        """Reads a reply whose gradient must have the keys and shapes of `like`.

        Raises:
            MessageError: It is not one, or its gradient or weight is not finite.
        """
        only(content, "gradient", "cohort", "sites")
        gradient = read_arrays(content, "gradient")
        only(gradient, *like)
        for name, value in gradient.items():
            if value.shape != like[name].shape or value.dtype not in (torch.float32, torch.float64):
                raise MessageError(f"the gradient of {name} has another shape or type than it should")
            if not value.isfinite().all():
                raise MessageError(f"the gradient of {name} is not finite")
        names = _read_names(content)
        cohort = read_record(content, "cohort", MetricRecord, "weight", "query_loss", "finite")
        weight = read_scalar(cohort, "weight", float)
        if not (np.isfinite(weight) and weight >= 0):
            raise MessageError("the weight is not a finite number of at least 0")
        return cls(
            gradient=gradient,
            weight=weight,
            names=names,
            query_loss=np.array(read_list(cohort, "query_loss", float, len(names))),
            finite=np.array(read_list(cohort, "finite", int, len(names)), dtype=bool),
        )


@dataclass(frozen=True)
class EvaluateReply:
    """Scores of a node's sites on their test rows.

    Attributes:
        names: The sites.
        scores: Accuracy (RMSE for regression) after 0, 1, ... steps, [sites, steps + 1].
        losses: The mean loss, of the same shape.
        calibration: The expected calibration error, of the same shape; NaN for regression.
        chosen: The number of inner steps that each site takes [sites]: all, unless it may choose.
    """

    names: tuple[str, ...]
    scores: Floats
    losses: Floats
    calibration: Floats
    chosen: NDArray[np.int64]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        figures: dict[str, Any] = {
            "columns": int(self.scores.shape[1]),
            "scores": self.scores.ravel().tolist(),
            "losses": self.losses.ravel().tolist(),
            "calibration": self.calibration.ravel().tolist(),
            "chosen": self.chosen.tolist(),
        }
        return RecordDict({"figures": MetricRecord(figures), "sites": _names(self.names)})

    @classmethod
    def unpack(cls, content: RecordDict) -> EvaluateReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "figures", "sites")
        names = _read_names(content)
        figures = read_record(content, "figures", MetricRecord, "columns", *FIGURES, "chosen")
        shape = (len(names), read_scalar(figures, "columns", int))
        if shape[1] < 1:
            raise MessageError("the figures have no column")
        values = (read_list(figures, key, float, shape[0] * shape[1]) for key in FIGURES)
        scores, losses, calibration = (np.array(value, dtype=np.float64).reshape(shape) for value in values)
        chosen = np.array(read_list(figures, "chosen", int, shape[0]), dtype=np.int64)
        if ((chosen < 0) | (chosen >= shape[1])).any():
            raise MessageError("a site takes more steps than there are")
        return cls(names, scores, losses, calibration, chosen)


def _shortest(value: Tensor) -> Tensor:
    """Returns a float64 tensor as float32 where that is the same numbers."""
    short = value.float()
    return short if value.dtype == torch.float64 and torch.equal(short.double(), value) else value


def pack_failure(code: str) -> RecordDict:
    """Returns the content of a reply that says why there is no answer: a code of `FAILURES`."""
    return RecordDict({"failure": ConfigRecord({"code": code if code in FAILURES else "internal"})})


def failure(content: RecordDict) -> str | None:
    """Returns the failure code of a reply, or None where it is an answer."""
    if "failure" not in content:
        return None
    code = content["failure"].get("code") if isinstance(content["failure"], ConfigRecord) else None
    return code if isinstance(code, str) and code in FAILURES else "internal"


def _names(names: tuple[str, ...]) -> ConfigRecord:
    return ConfigRecord({"names": list(names)})


def _read_names(content: RecordDict) -> tuple[str, ...]:
    return tuple(read_list(read_record(content, "sites", ConfigRecord, "names"), "names", str))
