"""What a finished run hands to a new site: the meta-state, how to adapt from it, and what rows and labels look like.

One file, `meta_model.safetensors`, without anything of the sites that trained, nor of where the run was tracked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from fedmeta.build import learner_of
from fedmeta.checkpoint import Checkpoint
from fedmeta.data.columns import Columns, feature_names
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import bootstrap_interval
from fedmeta.experiment import Evaluation, Experiment, Runtime, Server, Tracking
from fedmeta.files import read_json, read_tensors, write_atomic
from fedmeta.learners import Learner
from fedmeta.learners.rates import scale_inner_lr
from fedmeta.signing import UNSIGNED, check_signature, signed
from fedmeta.targets import TARGET_MEAN, TARGET_SCALE, TargetScale
from fedmeta.trust import BY_OPTION, code_of, refuse_foreign_code, without_own_files

FILE = "meta_model.safetensors"
FORMAT = "fedmeta-start-1"
MOST_STEPS = 10_000
"""More inner steps are refused in a file (steps)."""

FEWEST_SITES = 8
"""Of fewer training sites no average gain is shown to a new one, nor used for its advice (sites)."""

LARGEST_ROW = 1 << 26
"""A row with more values is refused in a file (values)."""

MEAN, SCALE = "standardisation.mean", "standardisation.scale"


@dataclass(frozen=True)
class Form:
    """What rows and labels look like.

    Attributes:
        shape: The shape of one row.
        features: The features' names where a row is a vector.
        classes: The classes by code; empty for regression.
        regression: Whether labels are numbers.
        tokens: Whether features are codes of symbols.
        targets: What each target of a regression is called; empty for classes.
        categories: The columns of categories that some features stand for, and the names that the run knows of each.
    """

    shape: tuple[int, ...]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    regression: bool
    tokens: bool
    targets: tuple[str, ...] = ()
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def columns(self) -> Columns:
        """What a row of a table becomes."""
        return Columns(self.features, self.categories)

    @property
    def on_rows(self) -> bool:
        """Whether data are rows; those of an own task source have no such form."""
        return bool(self.shape)

    @property
    def outputs(self) -> int:
        """The width of the model's output."""
        return max(1, len(self.targets)) if self.regression else len(self.classes)

    @property
    def named(self) -> bool:
        """Whether each feature of a row has its own name."""
        return len(self.shape) == 1 and len(set(self.features)) == self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of raw rows: vectors may hold numbers, such as times, whose differences float32 would lose."""
        return torch.int64 if self.tokens else torch.float64 if len(self.shape) == 1 else torch.float32


@dataclass(frozen=True)
class Record:
    """What adapting did at the run's training sites, on their test data, at its last evaluation.

    Attributes:
        sites: How many sites.
        gain: How much better their score was after adapting, the mean over sites; positive is better.
        low: The lower end of the 95 % bootstrap interval of that mean.
        high: Its upper end.
        harmed: The share of sites whose score was worse.
    """

    sites: int
    gain: float
    low: float
    high: float
    harmed: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Record | None:
        """Returns what a checkpoint's last evaluation shows; None where fewer than `FEWEST_SITES` have a score."""
        if not checkpoint.evaluations:
            return None
        last = checkpoint.evaluations[-1]
        values = last.figures.get("rmse" if checkpoint.regression else "accuracy")
        if values is None:
            return None
        gains = (values[np.arange(len(values)), last.chosen] - values[:, 0]) * (-1 if checkpoint.regression else 1)
        new = set(checkpoint.new_sites)
        gains = gains[[checkpoint.names[site] not in new for site in last.sites]]
        gains = gains[np.isfinite(gains)]
        if len(gains) < FEWEST_SITES:
            return None
        low, high = bootstrap_interval(gains)
        assert low is not None
        assert high is not None
        return cls(len(gains), float(gains.mean()), low, high, float((gains < 0).mean()))

    @property
    def helps(self) -> bool:
        """Whether adapting helps such sites on average, beyond chance."""
        return self.low > 0


@dataclass(frozen=True)
class Header:
    """What the file of a start holds beside its tensors and its experiment (see `MetaModel`)."""

    run_id: str
    round_number: int
    form: Form
    steps: int
    rate: float
    finished: bool
    record: Record | None = None


@dataclass(frozen=True)
class MetaModel:
    """What a finished run hands to a new site.

    Attributes:
        experiment: The run's description without what concerns the run alone: server, tracking, machine, paths.
        run_id: The run's MLflow id, or its own where it was not tracked.
        round_number: How many rounds it was trained.
        meta_state: The meta-state, without standardisation.
        mean: What is subtracted from features, to be broadcast over a row.
        scale: What they are then divided by.
        target: What targets of a regression are standardized by.
        form: What rows and labels look like.
        steps: The inner steps after which the run scored sites.
        rate: What the inner rates were multiplied by there.
        finished: Whether the run had ended.
        signature: What is known of the signature of the file that it was read from.
        record: What adapting did at the run's training sites; None where too few were scored.
    """

    experiment: Experiment
    run_id: str
    round_number: int
    meta_state: Mapping[str, Tensor]
    mean: Tensor
    scale: Tensor
    form: Form
    steps: int
    rate: float
    finished: bool = True
    target: TargetScale = field(default_factory=TargetScale)
    signature: str = UNSIGNED
    record: Record | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, code: Collection[str] = ()) -> MetaModel:
        """Returns the start that a run's checkpoint holds.

        Args:
            checkpoint: The checkpoint.
            code: What it may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).

        Raises:
            FedmetaError: It asks for other code, or lacks the shape of rows, as those of early versions.
        """
        if not checkpoint.shape and not checkpoint.form:
            raise FedmetaError(
                f"run {checkpoint.run_id}: its checkpoint is of an early version of fedmeta and lacks what "
                "rows look like; run the experiment again"
            )
        experiment = Experiment.from_toml(checkpoint.experiment, f"run {checkpoint.run_id}")
        handed_on = _without_surroundings(experiment)
        refuse_foreign_code(handed_on, f"run {checkpoint.run_id}", code)
        features, shape = checkpoint.features, checkpoint.shape
        if checkpoint.categories:
            features = feature_names(features, checkpoint.categories)
            shape = (len(features),)
        form = Form(
            shape,
            features,
            checkpoint.classes,
            checkpoint.regression,
            checkpoint.tokens,
            checkpoint.targets,
            checkpoint.categories,
        )
        try:
            steps = int(checkpoint.schedule.get("steps", experiment.evaluation_steps))
            rate = float(checkpoint.schedule.get("rate", 1.0))
        except (TypeError, ValueError, OverflowError):
            raise FedmetaError(f"run {checkpoint.run_id}: how far its sites adapted is not a number") from None
        meta_state = dict(checkpoint.meta_state)
        mean, scale = (meta_state.pop(name, torch.empty(0)) for name in (MEAN, SCALE))
        if not form.on_rows:
            mean, scale = torch.zeros(1), torch.ones(1)
        target = _pop_target(meta_state, experiment)
        run = (checkpoint.run_id, checkpoint.round_number)
        found = cls(handed_on, *run, meta_state, mean, scale, form, steps, rate, checkpoint.finished, target)
        found = replace(found, record=Record.of(checkpoint))
        check(found, f"run {checkpoint.run_id}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is copied and pickled: the fields, without the learner that is built from them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def learner(self) -> Learner:
        """The run's learner, with the inner rate that the run chose."""
        learner = learner_of(self.experiment, self.form.shape, self.form.classes, self.form.outputs)
        return scale_inner_lr(learner, {}, self.rate)[0]

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The meta-state, with the learned inner rates as the run chose them."""
        return scale_inner_lr(self.learner, self.meta_state, self.rate)[1]

    @property
    def name(self) -> str:
        """The learner's name."""
        return self.experiment.learner.name

    @cached_property
    def digest(self) -> str:
        """A hash of the meta-state, the standardisation and the form, 32 characters."""
        content = blake2b(json.dumps(asdict(self.form)).encode(), digest_size=16)
        for name, tensor in sorted(self._tensors().items()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.numpy().tobytes())
        return content.hexdigest()

    def example(self) -> NDArray[Any]:
        """Returns a row [1, *shape] of the means over all training sites: an example that is no site's row."""
        if self.form.tokens:
            return np.zeros((1, *self.form.shape), dtype=np.int64)
        row = np.broadcast_to(self.mean.numpy(), (1, *self.form.shape))
        return row.astype(np.float64 if self.form.dtype == torch.float64 else np.float32)

    def example_input(self) -> tuple[NDArray[Any], tuple[str, ...]]:
        """Returns an example as a caller writes it [1, columns], and the columns; no names where rows have none.

        Numbers are the means over all training sites; of a category it is the first name that the run knows.
        """
        row, form = self.example(), self.form
        if not form.categories:
            return row, form.features if form.named else ()
        known, means = dict(form.categories), dict(zip(form.features, row[0].tolist(), strict=True))
        cells = [(known[name] or ("other",))[0] if name in known else means[name] for name in form.columns.names]
        return np.array([cells], dtype=object), form.columns.names

    def write(self, path: Path) -> None:
        """Writes the start as one file, atomically, signed where the environment names a key.

        Raises:
            OSError: The disk does not take it.
            FedmetaError: The key cannot be read.
        """
        header = Header(**{each.name: getattr(self, each.name) for each in fields(Header)})
        texts = {"format": FORMAT, "experiment": self.experiment.to_toml(), "header": json.dumps(asdict(header))}
        tensors = self._tensors()
        write_atomic(path, save(tensors, signed(texts, tensors)))

    @classmethod
    def read(cls, path: Path, code: Collection[str] = (), *, remedy: str = BY_OPTION) -> MetaModel:
        """Reads what `write` wrote.

        Args:
            path: The file.
            code: As for `of`.
            remedy: How a person allows more code, for the message.

        Raises:
            FedmetaError: It is not such a file, asks for other code, or lacks the signature that is asked for.
        """
        texts, tensors = read_tensors(path, "start for new sites", FORMAT)
        signature = check_signature(str(path), texts, tensors)
        header = read_json(texts.get("header", ""), Header, f"{path}: its header is not that of a start for new sites")
        experiment = without_own_files(Experiment.from_toml(texts.get("experiment", ""), str(path)))
        refuse_foreign_code(experiment, str(path), code, remedy=remedy)
        mean, scale = (tensors.pop(name, torch.empty(0)) for name in (MEAN, SCALE))
        target = _pop_target(tensors, experiment)
        facts = {each.name: getattr(header, each.name) for each in fields(Header)} | {"signature": signature}
        found = cls(experiment=experiment, meta_state=tensors, mean=mean, scale=scale, target=target, **facts)
        check(found, str(path))
        return found

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {**self.meta_state, MEAN: self.mean, SCALE: self.scale}
        if self.form.regression and self.form.on_rows:
            own = (self.target.mean, self.target.scale)
            tensors |= dict(zip((TARGET_MEAN, TARGET_SCALE), map(torch.from_numpy, own), strict=True))
        return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def check(start: MetaModel, origin: str) -> None:
    """Checks that the parts of a start fit together, without taking more memory than its tensors.

    The model that the experiment describes is built without storage first: a few bytes may describe any size.

    Raises:
        FedmetaError: A number is out of range, or a tensor is missing, unknown, not finite or of another shape.
    """
    form, own = start.form, bool(code_of(start.experiment))
    if form.on_rows or not own:
        check_form(form, origin)
    counts = {
        "steps": start.steps,
        "round_number": start.round_number,
        "inner_steps": start.experiment.learner.inner_steps,
    }
    if not (0 <= start.steps <= MOST_STEPS and counts["inner_steps"] <= MOST_STEPS and start.round_number >= 0):
        raise FedmetaError(f"{origin}: impossible numbers of steps or rounds: {counts}")
    if (own_record := start.record) and not all(map(math.isfinite, asdict(own_record).values())):
        raise FedmetaError(f"{origin}: what adapting did at training sites is not finite: {own_record}")
    if not 0 < start.rate < float("inf"):
        raise FedmetaError(f"{origin}: the rate is {start.rate}, and must be a finite number greater than 0")
    if form.on_rows:
        check_scaling(start.mean, start.scale, form, origin)
        check_target(start.target, form, origin)
    if own:
        return  # the user's own code, which was allowed; what it builds may need real storage
    try:
        with torch.device("meta"):
            expected = learner_of(start.experiment, form.shape, form.classes, form.outputs).init(0)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise FedmetaError(f"{origin}: its model cannot be built: {str(error).splitlines()[0]}") from None
    check_tensors(start.meta_state, expected, origin)


def check_form(form: Form, origin: str) -> None:
    """Checks what rows and labels look like; raises `FedmetaError` where no rows do."""
    size = math.prod(form.shape)
    named = not form.features or len(form.shape) != 1 or len(form.features) == size
    if not (form.shape and min(form.shape) > 0 and size <= LARGEST_ROW and named):
        raise FedmetaError(f"{origin}: rows of shape {list(form.shape)[:8]} with {len(form.features)} names cannot be")
    known = [f"{name}={each}" for name, names in form.categories for each in names]
    if (len(set(form.features)) < len(form.features) and form.categories) or not set(known) <= set(form.features):
        raise FedmetaError(f"{origin}: its categories are not those of its {len(form.features)} features")
    if len(set(form.targets)) < len(form.targets) or (form.targets and not form.regression):
        raise FedmetaError(f"{origin}: {len(form.targets)} names of targets, or one of them twice, cannot be")
    if bool(form.classes) == form.regression or len(set(form.classes)) < len(form.classes):
        kind = "regression" if form.regression else "classification"
        raise FedmetaError(f"{origin}: {kind} with {len(form.classes)} class names, or one of them twice, cannot be")


def check_scaling(mean: Tensor, scale: Tensor, form: Form, origin: str) -> None:
    """Checks the standardisation of features; raises `FedmetaError` where it cannot be applied to rows."""
    for name, value in ((MEAN, mean), (SCALE, scale)):
        fits = value.dim() <= len(form.shape) and value.numel() and value.is_floating_point()
        fits = fits and all(own in (1, size) for own, size in zip(value.shape[::-1], form.shape[::-1], strict=False))
        if not fits or not value.isfinite().all() or (name == SCALE and not (value > 0).all()):
            raise FedmetaError(f"{origin}: {name} is not what rows of shape {list(form.shape)} need")


def check_target(target: TargetScale, form: Form, origin: str) -> None:
    """Checks the standardization of targets; raises `FedmetaError` where it cannot be undone."""
    for name, value in ((TARGET_MEAN, target.mean), (TARGET_SCALE, target.scale)):
        fits = value.shape in ((1,), (form.outputs if form.regression else 1,))
        if not fits or not np.isfinite(value).all() or (name == TARGET_SCALE and not (value > 0).all()):
            raise FedmetaError(f"{origin}: {name} is not what {form.outputs} targets need")


def _pop_target(tensors: dict[str, Tensor], experiment: Experiment) -> TargetScale:
    """Takes the standardization of targets out of a meta-state; the identity where it holds none."""
    target = TargetScale.of(tensors, log=experiment.target_kind == "log")
    for name in (TARGET_MEAN, TARGET_SCALE):
        tensors.pop(name, None)
    return target


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Checks tensors from a file; raises `FedmetaError` where they are not finite, or other than expected."""
    for name in sorted(found.keys() ^ expected.keys()):
        raise FedmetaError(f'{origin}: tensor "{name[:80]}" is {"missing" if name in expected else "unknown"}')
    for name, value in found.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
            raise FedmetaError(
                f'{origin}: tensor "{name[:80]}" has shape {list(value.shape)} and type {value.dtype}, and the model '
                f"that it describes needs {list(wanted.shape)} and {wanted.dtype}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise FedmetaError(f'{origin}: tensor "{name[:80]}" is not finite')


def _without_surroundings(experiment: Experiment) -> Experiment:
    """Returns a description of the learner, the model and the columns; paths and addresses stay where the run was."""
    data = experiment.data
    new_sites = data.new_sites if isinstance(data.new_sites, int | float) else len(data.new_sites)
    return experiment.model_copy(
        update={
            "data": data.model_copy(update={"path": Path(data.path).name, "new_sites": new_sites}),
            "model": experiment.without_weights().model,
            "problem": without_own_files(experiment).problem,
            "server": Server(),
            "evaluation": Evaluation(),
            "tracking": Tracking(),
            "runtime": Runtime(seed=experiment.runtime.seed),
        }
    )
