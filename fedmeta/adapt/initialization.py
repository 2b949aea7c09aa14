"""What a finished run hands to a new site: the meta-state, how to adapt from it, and what rows and labels look like.

One file, `meta_model.safetensors`, without anything of the sites that trained, nor of where the run was tracked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
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
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Evaluation, Experiment, Privacy, Runtime, Server, Tracking
from fedmeta.files import read_tensors, write_atomic
from fedmeta.learners import Learner
from fedmeta.learners.rates import scale_inner_lr
from fedmeta.trust import BY_OPTION, refuse_foreign_code

FILE = "meta_model.safetensors"
FORMAT = "fedmeta-start-1"
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
    """

    shape: tuple[int, ...]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    regression: bool
    tokens: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Form:
        """Returns the form that `asdict` and JSON made `values` of."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    @property
    def outputs(self) -> int:
        """The width of the model's output."""
        return 1 if self.regression else len(self.classes)

    @property
    def named(self) -> bool:
        """Whether a row's features are told apart by names."""
        return len(self.shape) == 1 and len(set(self.features)) == self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of raw rows: vectors may hold numbers, such as times, whose differences float32 would lose."""
        return torch.int64 if self.tokens else torch.float64 if len(self.shape) == 1 else torch.float32


@dataclass(frozen=True)
class MetaModel:
    """What a finished run hands to a new site.

    Attributes:
        experiment: The run's description without what concerns the run alone: server, tracking, machine, data path.
        run_id: The run's MLflow id, or its own where it was not tracked.
        round_number: How many rounds it was trained.
        meta_state: The meta-state, without standardisation.
        mean: What is subtracted from features, to be broadcast over a row.
        scale: What they are then divided by.
        form: What rows and labels look like.
        steps: The inner steps that the run judged sites after.
        rate: What the inner rates were multiplied by there.
        finished: Whether the run had ended.
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

    @classmethod
    def of(cls, checkpoint: Checkpoint, code: Collection[str] = ()) -> MetaModel:
        """Returns the start that a run's checkpoint holds.

        Args:
            checkpoint: The checkpoint.
            code: What it may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).

        Raises:
            FedmetaError: It asks for other code, or does not say what rows look like, as those of early versions.
        """
        if not checkpoint.shape:
            raise FedmetaError(
                f"run {checkpoint.run_id}: its checkpoint is of an early version of fedmeta and does not say what rows "
                "look like; run the experiment again"
            )
        experiment = Experiment.from_toml(checkpoint.experiment, f"run {checkpoint.run_id}")
        handed_on = _without_surroundings(experiment)
        refuse_foreign_code(handed_on, f"run {checkpoint.run_id}", code)
        form = Form(checkpoint.shape, checkpoint.features, checkpoint.classes, checkpoint.regression, checkpoint.tokens)
        steps = int(checkpoint.schedule.get("steps", experiment.evaluation_steps))
        rate = float(checkpoint.schedule.get("rate", 1.0))
        meta_state = dict(checkpoint.meta_state)
        mean, scale = meta_state.pop(MEAN), meta_state.pop(SCALE)
        run = (checkpoint.run_id, checkpoint.round_number)
        return cls(handed_on, *run, meta_state, mean, scale, form, steps, rate, checkpoint.finished)

    @cached_property
    def learner(self) -> Learner:
        """The run's learner, with the inner rate that the run chose."""
        learner = learner_of(self.experiment, self.form.shape, self.form.classes)
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

    def write(self, path: Path) -> None:
        """Writes the start as one file, atomically; raises `OSError` where the disk does not take it."""
        header = {
            "run_id": self.run_id,
            "round_number": self.round_number,
            "form": asdict(self.form),
            "steps": self.steps,
            "rate": self.rate,
            "finished": self.finished,
        }
        texts = {"format": FORMAT, "experiment": self.experiment.to_toml(), "header": json.dumps(header)}
        write_atomic(path, save(self._tensors(), texts))

    @classmethod
    def read(cls, path: Path, code: Collection[str] = (), *, remedy: str = BY_OPTION) -> MetaModel:
        """Reads what `write` wrote.

        Args:
            path: The file.
            code: As for `of`.
            remedy: How a person allows more code, for the message.

        Raises:
            FedmetaError: It is not such a file, or asks for other code.
        """
        texts, tensors = read_tensors(path, "start for new sites", FORMAT)
        header = json.loads(texts["header"])
        experiment = Experiment.from_toml(texts["experiment"], str(path))
        refuse_foreign_code(experiment, str(path), code, remedy=remedy)
        mean, scale = tensors.pop(MEAN), tensors.pop(SCALE)
        header["form"] = Form.of(header["form"])
        return cls(experiment=experiment, meta_state=tensors, mean=mean, scale=scale, **header)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {**self.meta_state, MEAN: self.mean, SCALE: self.scale}
        return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _without_surroundings(experiment: Experiment) -> Experiment:
    """Returns a description of the learner, the model and the columns; paths and addresses stay where the run was."""
    data = experiment.data
    new_sites = data.new_sites if isinstance(data.new_sites, int | float) else len(data.new_sites)
    return experiment.model_copy(
        update={
            "data": data.model_copy(update={"path": Path(data.path).name, "new_sites": new_sites}),
            "server": Server(),
            "evaluation": Evaluation(),
            "tracking": Tracking(),
            "runtime": Runtime(seed=experiment.runtime.seed),
            "privacy": Privacy(),
        }
    )
