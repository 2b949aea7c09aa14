"""The run as a value on disk: written atomically, read without executing anything, resumed exactly.

One file per checkpoint, `round-NNNNNN.safetensors`: tensors, and a header of texts. The header's digest covers all of
it, so that a damaged file is known as one and the file before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.files import read_tensors, write_atomic

FORMAT = "2"
LISTS = (
    "classes", "names", "new_sites", "validation_sites", "features", "shape", "train_rows", "test_rows", "weights",
    "targets", "norms", "categories", "took_part",
)  # fmt: skip
FIGURES = (
    "regression", "tokens", "form", "held_out", "engine", "budget", "schedule", "lateness", "finished", "steering",
)  # fmt: skip
HEADER = ("experiment", "run_id", "round_number", *LISTS, *FIGURES)
UNFINISHED = "unfinished"
"""The file in a run's folder that is there until its results are written down and handed over."""

KEPT = 2
"""How many checkpoints a run keeps: the newest, and one before it in case that one is damaged."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation.

    Attributes:
        round_number: The round after which sites were evaluated.
        sites: The sites, as indices into `Checkpoint.names` [sites].
        figures: "loss" and each metric after 0, 1, ... inner steps [sites, steps + 1]; NaN where it is undefined.
        chosen: The number of inner steps that each site takes [sites].
        local: Each metric of what a site does alone [sites]; NaN or absent where that was not asked for.
        pooled: Sums over the test rows of a group of sites, by "GROUP/STATE/NAME" (`fedmeta.problems.pooled`).
        pooled_sites: How many sites each group's sums hold [groups].
        baselines: Of the problem's own baselines, by "classical_NAME" and "optimum_NAME": each metric, the loss, and
            the evaluations that they took [sites].
        subgroups: "rows" and the score "global" and "personalized" of each of the run's subgroups [sites, subgroups].
    """

    round_number: int
    sites: NDArray[np.int64]
    figures: Mapping[str, NDArray[np.float64]]
    chosen: NDArray[np.int64]
    local: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    pooled: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    pooled_sites: tuple[int, ...] = ()
    baselines: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    subgroups: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns all of it but the round as arrays by name."""
        groups = {"figures": self.figures, "local": self.local, "pooled": self.pooled, "baselines": self.baselines}
        groups |= {"subgroups": self.subgroups}
        parts = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        return {
            "sites": self.sites,
            "chosen": self.chosen,
            "pooled_sites": np.array(self.pooled_sites, np.int64),
            **parts,
        }

    @classmethod
    def of(cls, round_number: int, arrays: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Returns the evaluation whose `arrays` these are."""
        kinds = ("figures", "local", "pooled", "baselines", "subgroups")
        groups: dict[str, dict[str, NDArray[Any]]] = {kind: {} for kind in kinds}
        for name, value in arrays.items():
            group, _, rest = name.partition("/")
            if rest:
                groups[group][rest] = value
        pooled_sites = tuple(arrays["pooled_sites"].tolist())
        return cls(round_number, arrays["sites"], chosen=arrays["chosen"], pooled_sites=pooled_sites, **groups)


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to resume from a round as if it had never stopped.

    Attributes:
        experiment: The experiment as TOML.
        run_id: The run's MLflow id, or its own where it is not tracked.
        round_number: The last finished round.
        meta_state: The meta-state after it, standardisation included.
        optimizer: The server optimizer's memory.
        classes: The run's class list.
        names: All sites' names, sorted.
        new_sites: Those that never take part in training.
        validation_sites: Those that only choose how far to adapt.
        evaluations: Every evaluation so far.
        engine: The cohort engine that was chosen before round 1.
        budget: The bytes that one cohort may take, chosen before round 1.
        totals: Sums over the rounds so far: seconds and bytes.
        metrics: Per-round figures that tracking may not have been sent yet, by round.
        schedule: How far sites adapted at the end, where the run chose that.
        features: The features' names where a row is a vector.
        shape: The shape of one row.
        train_rows: Train rows per site, of all names.
        test_rows: Test rows per site.
        regression: Whether labels are numbers.
        tokens: Whether features are codes of symbols.
        weights: Each site's weight, as it was when it joined.
        form: A digest of the form of an own source's tasks; empty for rows.
        held_out: Whether support and query are different data.
        targets: What each target of a regression is called; empty for classes.
        categories: The columns of categories, and the names that the run knows of each.
        norms: The norms of the replies accepted lately, by which longer ones are known (`server.influence`).
        steering: What the run has decided about itself so far, and by which figures (`server.steering`).
        memory: Tensors that such decisions need: the best meta-state, or the one from before a decision.
        took_part: In how many rounds each site's reply was in the step, of all names; empty where that is not known.
        lateness: The simulated clock, sites' usual times, and which replies are outstanding (`server.lateness`).
        late: The gradients of those that a simulation holds.
        finished: Whether training and the last evaluation are over; writing down the results is all that may be left.
    """

    experiment: str
    run_id: str
    round_number: int
    meta_state: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    new_sites: tuple[str, ...]
    validation_sites: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    totals: Mapping[str, float]
    engine: str = "auto"
    budget: int = 0
    metrics: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    train_rows: tuple[int, ...] = ()
    test_rows: tuple[int, ...] = ()
    regression: bool = False
    tokens: bool = False
    weights: tuple[float, ...] = ()
    form: str = ""
    held_out: bool = True
    norms: tuple[float, ...] = ()
    finished: bool = False
    targets: tuple[str, ...] = ()
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()
    steering: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    took_part: tuple[int, ...] = ()
    lateness: Mapping[str, Any] = field(default_factory=dict)
    late: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def state_digest(self) -> str:
        """A hash of the meta-state alone, every tensor with its name, type and shape; 64 characters."""
        return _digest({}, self.meta_state, 32)

    @property
    def categorical(self) -> tuple[str, ...]:
        """Which features are columns of categories."""
        return tuple(name for name, _ in self.categories)


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """Writes a checkpoint into a run's folder, atomically, and removes all but the newest two.

    Raises:
        FedmetaError: The folder or the disk does not take it.
    """
    path = folder / f"round-{checkpoint.round_number:06d}.safetensors"
    try:
        write_atomic(path, _encode(checkpoint))
        for old in _files(folder)[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise FedmetaError(f"{path}: cannot write the checkpoint: {error.strerror or error}") from error
    return path


def keep_before(folder: Path, round_number: int) -> Path | None:
    """Keeps the newest checkpoint from before a round under another name, so that it is not replaced by later ones.

    Only the first one of a run is kept: later rounds may build on what is to be undone.

    Args:
        folder: The run's folder.
        round_number: The round whose replies were out of the ordinary.

    Returns:
        The file, `before-round-NNNNNN.safetensors`; None where one was kept already or there is no checkpoint.

    Raises:
        FedmetaError: The folder or the disk does not take it.
    """
    files = _files(folder)
    if not files or any(folder.glob("before-round-*.safetensors")):
        return None
    path = folder / f"before-round-{round_number:06d}.safetensors"
    try:
        write_atomic(path, files[0].read_bytes())
    except OSError as error:
        raise FedmetaError(f"{path}: cannot keep the checkpoint: {error.strerror or error}") from error
    return path


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        FedmetaError: The file cannot be read, is of another version, or is damaged.
    """
    header, tensors = read_tensors(path, "checkpoint", FORMAT)
    digest = header.pop("digest", "")
    if digest != _digest(header, tensors):
        raise FedmetaError(f"{path}: the checkpoint is damaged (its digest differs)")
    try:
        return _decode(header, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FedmetaError(f"{path}: not a checkpoint of this version of fedmeta") from error


def newest(folder: Path) -> tuple[Checkpoint, Path]:
    """Returns the newest undamaged checkpoint in a run's folder, and its file.

    Raises:
        FedmetaError: There is none; the message has what is wrong with the newest.
    """
    problems = []
    for path in _files(folder):
        try:
            return read(path), path
        except FedmetaError as error:
            problems.append(str(error))
    raise FedmetaError(problems[0] if problems else f"{folder}: no checkpoint in this folder")


def find(root: Path, run: str, experiment: str) -> Path:
    """Returns the folder of the run to resume.

    Args:
        root: The folder of all runs.
        run: A run's MLflow id, its folder or that folder's name; "auto" = the newest unfinished run of the same
            experiment.
        experiment: The experiment as TOML, for "auto".

    Raises:
        FedmetaError: There is no such run.
    """
    if run != "auto":
        for folder in (root / run, Path(run)):
            if _files(folder):
                return folder
        for folder in _newest_first(root):
            if _run_id(folder) == run:
                return folder
        raise FedmetaError(f'no checkpoint of a run "{run}" in {root}')
    for folder in _newest_first(root):
        try:
            checkpoint, _ = newest(folder)
        except FedmetaError:
            continue
        ended = checkpoint.finished and not (folder / UNFINISHED).exists()
        if not ended and checkpoint.experiment == experiment:
            return folder
    raise FedmetaError(f"no unfinished run of this experiment in {root}; leave out --resume to start one")


def _run_id(folder: Path) -> str | None:
    try:
        return newest(folder)[0].run_id
    except FedmetaError:
        return None


def rounds(folder: Path, last: int) -> tuple[int, ...]:
    """Returns the rounds, up to `last`, of the newest two checkpoints in a folder; 0 where there are fewer."""
    found = [int(path.stem.removeprefix("round-")) for path in _files(folder)]
    past = [number for number in found if number <= last]
    return tuple([*past, *[0] * KEPT][:KEPT])


def _files(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the newest first (names grow longer beyond round 999 999); no copies."""
    found = [path for path in folder.glob("round-*.safetensors") if path.stem.removeprefix("round-").isdecimal()]
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def _newest_first(root: Path) -> Iterator[Path]:
    newest_files = {path.parent: path.stat().st_mtime for path in sorted(root.glob("*/round-*.safetensors"))}
    yield from sorted(newest_files, key=newest_files.__getitem__, reverse=True)


def _encode(checkpoint: Checkpoint) -> bytes:
    tensors = {f"meta_state/{name}": value for name, value in checkpoint.meta_state.items()}
    tensors |= {f"optimizer/{name}": value for name, value in checkpoint.optimizer.items()}
    tensors |= {f"late/{name}": value for name, value in checkpoint.late.items()}
    tensors |= {f"memory/{name}": value for name, value in checkpoint.memory.items()}
    for evaluation in checkpoint.evaluations:
        for what, array in evaluation.arrays().items():
            tensors[f"evaluation/{evaluation.round_number}/{what}"] = torch.from_numpy(np.asarray(array))
    # `contiguous` leaves any stride to a dimension of size 1, as of a lone site, and then bytes cannot be viewed.
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    values: dict[str, Any] = {name: getattr(checkpoint, name) for name in HEADER}
    values |= {"totals": dict(checkpoint.totals)}
    values |= {"metrics": {str(number): dict(figures) for number, figures in checkpoint.metrics.items()}}
    header = {"format": FORMAT, **{name: json.dumps(value) for name, value in values.items()}}
    return save(tensors, {**header, "digest": _digest(header, tensors)})


def _decode(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Checkpoint:
    values: dict[str, Any] = {name: json.loads(value) for name, value in header.items() if name != "format"}
    groups: dict[str, dict[str, Tensor]] = {
        name: {} for name in ("meta_state", "optimizer", "memory", "late", "evaluation")
    }
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = value
    by_round: dict[int, dict[str, NDArray[Any]]] = {}
    for name, value in groups["evaluation"].items():
        number, _, what = name.partition("/")
        by_round.setdefault(int(number), {})[what] = value.numpy()
    evaluations = tuple(Evaluation.of(number, by_round[number]) for number in sorted(by_round))
    for name in LISTS:
        values[name] = tuple(values.get(name, ()))
    values["categories"] = tuple((name, tuple(names)) for name, names in values["categories"])
    values["metrics"] = {int(number): figures for number, figures in values["metrics"].items()}
    for name, value in values.items():
        _adapter(name).validate_python(value, strict=True)
    kept = ("meta_state", "optimizer", "memory", "late")
    values |= {name: groups[name] for name in kept} | {"evaluations": evaluations}
    return Checkpoint(**values)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """Returns what checks one entry of a header against the type of the checkpoint's attribute of this name."""
    return TypeAdapter(get_type_hints(Checkpoint)[name])


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor], size: int = 16) -> str:
    content = blake2b(json.dumps(dict(sorted(header.items()))).encode(), digest_size=size)
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
