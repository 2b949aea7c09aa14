"""What a site grants to the runs that ask it: its own policy, which no experiment can change.

A deployed node's config may hold each key, as in `--node-config 'site="a" data="/data/a.csv" min_test=30'`, and so may
the TOML file `fedmeta-policy.toml` beside its data, which the config overrules. A request for more is answered
with the code `beyond-policy`; the reason stays in the node's log. In simulation there is no site to protect, and
nothing is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context
from numpy.typing import NDArray

from clients.local_state import StorageError
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import write_atomic
from fedmeta.learners import learner_class, settings_of
from fedmeta.messages import RoundRequest
from fedmeta.task import Batch

FILE = "fedmeta-policy.toml"
"""The file's name, beside the data."""

LEDGER = "requests.json"
"""The file in the node's `state` folder that counts what was asked."""

EXACT, ROUNDED = "exact", "rounded"
DECIMALS = 2
"""Decimals that are left of a rounded figure."""

HOUR_S = 3600.0
MOST_RUNS = 1000
"""The ledger keeps the evaluations of so many runs; an older run counts as a new one."""


class PolicyError(FedmetaError):
    """A request for more than the site grants."""


@dataclass(frozen=True)
class Policy:
    """What a site grants.

    Attributes:
        min_support: The fewest support rows that it answers for (rows).
        min_query: The fewest query rows of a training task (rows).
        min_test: The fewest test rows that it is evaluated on (rows).
        max_inner_steps: The most steps of any kind that one request may ask of a task, inner or local (steps).
        max_evaluations: The most evaluations of one run (messages).
        max_requests: The most training and evaluation requests in an hour, of all runs together (messages).
        metrics: "exact", or "rounded": figures of the site to two decimals, and no sums over rows for pooled metrics.
    """

    min_support: int = 10
    min_query: int = 10
    min_test: int = 10
    max_inner_steps: int = 200
    max_evaluations: int = 20
    max_requests: int = 1000
    metrics: str = EXACT

    def check_steps(self, experiment: Experiment, request: RoundRequest) -> None:
        """Refuses more inner steps than are granted.

        Raises:
            PolicyError: The experiment or the request asks for more.
        """
        section = experiment.learner
        own = settings_of(learner_class(section.name))
        settings = {**{name: value for name, value in section.model_dump().items() if name in own}, **section.extra}
        asked = {f"learner.{name}": value for name, value in settings.items() if name.endswith(("steps", "epochs"))}
        for name, steps in {**asked, "the request's steps": request.steps}.items():
            if not isinstance(steps, int) or steps > self.max_inner_steps:
                raise PolicyError(f"{name} = {steps}, and max_inner_steps = {self.max_inner_steps}")

    def check_sums(self, train_rows: NDArray[np.int64]) -> None:
        """Refuses sums over fewer train rows than the site answers for: of one row they are that row.

        Raises:
            PolicyError: A site has fewer than `min_support` train rows.
        """
        if len(train_rows) and train_rows.min() < self.min_support:
            raise PolicyError(f"a site has {train_rows.min()} train rows, and min_support = {self.min_support}")

    def check_rows(self, batch: Batch, *, test: bool) -> None:
        """Refuses tasks of fewer rows than the site answers for; tasks of an own source are not counted in rows.

        Args:
            batch: The tasks.
            test: Whether the query rows are test rows.

        Raises:
            PolicyError: A task has fewer support, query or test rows.
        """
        limits = (("support", self.min_support), ("test", self.min_test) if test else ("query", self.min_query))
        for (name, fewest), rows in zip(limits, (_rows(batch.support), _rows(batch.query)), strict=True):
            if rows is not None and len(rows) and rows.min() < fewest:
                raise PolicyError(f"a task has {rows.min()} {name} rows, and min_{name} = {fewest}")

    def figures(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns a site's figures as they may leave."""
        return values if self.metrics == EXACT else np.round(values, DECIMALS)

    def lines(self, counted: str) -> list[str]:
        """Returns the policy as lines `key = value` for people, and where requests are counted."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [*(f"{name} = {json.dumps(value)}" for name, value in values), f"requests are counted {counted}"]


def _rows(data: Any) -> NDArray[np.int64] | None:
    """Returns how many rows each task of a batch has; None where the data are no rows."""
    if not isinstance(data, tuple) or len(data) != 3:
        return None
    return np.asarray(data[2].sum(1).round().long().cpu().numpy(), dtype=np.int64)


def is_deployed(config: Mapping[str, Any]) -> bool:
    """Returns whether a node's config is that of a site, and not of a share in a simulation."""
    return "data" in config or "partition-id" not in config


def policy_of(config: Mapping[str, Any]) -> Policy | None:
    """Returns the policy of a node; None in simulation.

    Raises:
        FedmetaError: A key is unknown, or its value not possible.
    """
    if not is_deployed(config):
        return None
    values: dict[str, Any] = {}
    if "data" in config:
        path = Path(str(config["data"])).expanduser().parent / FILE
        if path.is_file():
            values |= {key: (value, str(path)) for key, value in _read(path).items()}
    known = [field.name for field in fields(Policy)]
    values |= {key: (config[key], "node config") for key in known if key in config}
    for key, (value, origin) in values.items():
        _check(key, value, origin, known)
    return Policy(**{key: value for key, (value, _) in values.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedmetaError(f"{path}: not a policy: {error}") from None


def _check(key: str, value: Any, origin: str, known: list[str]) -> None:
    if key not in known:
        raise FedmetaError(f'{origin}: there is no key "{key}" in a policy; they are {", ".join(known)}')
    if key == "metrics":
        if value not in (EXACT, ROUNDED):
            raise FedmetaError(f'{origin}: metrics = {value!r}: must be "{EXACT}" or "{ROUNDED}"')
    elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FedmetaError(f"{origin}: {key} = {value!r}: must be a whole number of at least 0")


def counted(config: Mapping[str, Any]) -> str:
    """Returns where a node counts requests, for people."""
    if "state" in config:
        return f"in {Path(str(config['state'])) / LEDGER}"
    return 'while the node lives, by run: give it a folder, state="FOLDER", to count for good'


def count_request(policy: Policy, context: Context, run: str, *, evaluation: bool) -> None:
    """Counts a request before it is answered.

    Args:
        policy: What the site grants.
        context: The node's; `state` in its config is the folder that keeps the counts.
        run: The run's name.
        evaluation: Whether it is an evaluation.

    Raises:
        PolicyError: It asks for more than is granted; it is not counted then.
        StorageError: It cannot be counted.
    """
    with _ledger(context) as counts:
        now = time.time()
        # A clock that was set back makes no request free.
        counts["times"] = [moment for moment in counts["times"] if moment > now - HOUR_S]
        if len(counts["times"]) >= policy.max_requests:
            raise PolicyError(f"{len(counts['times'])} requests in an hour, and max_requests = {policy.max_requests}")
        runs = counts["evaluations"]
        if evaluation:
            done = runs.pop(run, 0)
            if done >= policy.max_evaluations:
                raise PolicyError(f"{done} evaluations of one run, and max_evaluations = {policy.max_evaluations}")
            runs[run] = done + 1
            for name in list(runs)[:-MOST_RUNS]:
                del runs[name]
        counts["times"].append(now)


@contextmanager
def _ledger(context: Context) -> Iterator[dict[str, Any]]:
    """Gives the counts, and keeps them as they are at the end of a block that raises nothing."""
    state = context.node_config.get("state")
    if state is None:
        record = context.state.get("requests")
        counts = _counts(str(record["counts"]) if isinstance(record, ConfigRecord) else "")
        yield counts
        context.state["requests"] = ConfigRecord({"counts": json.dumps(counts)})
        return
    path = Path(str(state)) / LEDGER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: requests cannot be counted: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            counts = _counts(path.read_text() if path.exists() else "")
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: cannot be read: {error}") from error
        yield counts
        try:
            write_atomic(path, json.dumps(counts).encode())
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        os.close(lock)


def _counts(text: str) -> dict[str, Any]:
    """Reads counts; raises `ValueError` where a text holds none."""
    if not text:
        return {"times": [], "evaluations": {}}
    counts = json.loads(text)
    if not (isinstance(counts, dict) and isinstance(counts.get("times"), list)):
        raise ValueError("it holds no counts")
    times, runs = counts["times"], counts.get("evaluations")
    if not all(isinstance(moment, float | int) for moment in times) or not isinstance(runs, dict):
        raise ValueError("it holds no counts")
    return {"times": times, "evaluations": runs}
