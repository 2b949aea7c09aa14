"""A site's own model on raw rows: imputation and standardisation included, as torch state in one file."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fedmeta.adapt.initialization import Form, MetaModel, check_form, check_scaling, check_target, check_tensors
from fedmeta.adapt.rows import raw_rows
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import read_json, read_tensors, write_atomic
from fedmeta.models import Parameters
from fedmeta.models.attention import exact_attention
from fedmeta.problems.multilabel import NAME as MULTILABEL
from fedmeta.signing import check_signature, signed
from fedmeta.targets import TargetScale
from fedmeta.trust import BY_OPTION, refuse_foreign_code

FILE = "model.safetensors"
FORMAT = "fedmeta-model-1"


class SiteModel(nn.Module):
    """A network with what comes before and after it: raw rows in, probabilities or numbers out.

    Args:
        network: The network, with the site's parameters.
        mean: What is subtracted from features, to be broadcast over a row.
        scale: What they are then divided by.
        form: What rows and labels look like.
        experiment: The run's description, as the start holds it.
        target: What targets of a regression are standardized by.
    """

    mean: Tensor
    scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Tensor,
        scale: Tensor,
        form: Form,
        experiment: Experiment,
        target: TargetScale | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.form = form
        self.experiment = experiment
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.log = bool(target and target.log)
        if form.regression:
            own = target or TargetScale()
            self.register_buffer("target_mean", torch.from_numpy(own.mean.copy()))
            self.register_buffer("target_scale", torch.from_numpy(own.scale.copy()))
        self.eval()

    @classmethod
    def of(cls, start: MetaModel, parameters: Parameters) -> SiteModel:
        """Returns the model of a site that has these parameters."""
        network = copy.deepcopy(start.learner.network.module)
        model = cls(network, start.mean, start.scale, start.form, start.experiment, start.target)
        own = {name: value.detach().clone() for name, value in parameters.items()}
        unknown = model.network.load_state_dict(own, strict=False).unexpected_keys
        assert not unknown, f"the model has no {unknown}"
        return model

    def prepare(self, x: Tensor) -> Tensor:
        """Returns raw rows [n, *shape], NaN where a value is missing, standardised; a missing value becomes the mean.

        Symbols' codes stay as they are.
        """
        if self.form.tokens:
            return x
        kind = next(self.network.parameters()).dtype
        # Subtracted before the type is changed: float32 would lose the differences of large numbers.
        x = (x - self.mean.to(x.dtype)) / self.scale.to(x.dtype)
        return torch.where(torch.isnan(x), torch.zeros_like(x), x).to(kind)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the classes' probabilities [n, classes] of raw rows [n, *shape].

        Of several labels of 0 or 1 each one's probability [n, labels]. For regression numbers [n], of several targets
        [n, targets], in float64 and the targets' own units.
        """
        with exact_attention():  # as in training
            outputs: Tensor = self.network(self.prepare(x))
        if not self.form.regression:
            return outputs.softmax(-1)
        if self.experiment.problem.name == MULTILABEL:
            return outputs.sigmoid().double()
        # As `TargetScale.restore`, in what an exporter can trace.
        own = outputs.double() * self.target_scale + self.target_mean
        own = own.exp() if self.log else own
        return own.reshape(-1) if self.form.outputs == 1 else own.reshape(-1, self.form.outputs)

    def predict(self, x: Any) -> NDArray[Any]:
        """Returns class names (text) or numbers [n] for raw rows; of several targets [n, targets].

        Args:
            x: A frame with the run's columns, in any order, or an array [n, *shape]; NaN where a value is missing.

        Raises:
            FedmetaError: A column is missing, a value is not a number, or rows have another shape.
        """
        return decode(self._outputs(x), self.form)

    def predict_proba(self, x: Any) -> NDArray[Any]:
        """Returns the probability of each class [n, classes] for raw rows, in the order of `form.classes`.

        Raises:
            FedmetaError: The model predicts numbers; or as for `predict`.
        """
        if self.form.regression:
            raise FedmetaError("the model predicts numbers, and these have no probabilities: use predict")
        return self._outputs(x).double().numpy()

    def _outputs(self, x: Any) -> Tensor:
        rows, notes = raw_rows(x, self.form)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        with torch.no_grad():
            outputs: Tensor = self(torch.from_numpy(np.ascontiguousarray(rows)))
        return outputs

    def write(self, path: Path, start: MetaModel, facts: Mapping[str, Any]) -> None:
        """Writes the model's state, how it is built, and facts about it into one file, atomically."""
        texts = {
            "format": FORMAT,
            "experiment": start.experiment.to_toml(),
            "form": json.dumps(asdict(self.form)),
            "facts": json.dumps(facts),
        }
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_atomic(path, save(state, signed(texts, state)))

    @classmethod
    def read(cls, path: Path, code: Collection[str] = (), *, remedy: str = BY_OPTION) -> SiteModel:
        """Reads what `write` wrote.

        Args:
            path: The file.
            code: What it may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).
            remedy: How a person allows more code, for the message.

        Raises:
            FedmetaError: It is not such a file, asks for other code, or lacks the signature that is asked for.
        """
        from fedmeta.build import learner_of

        texts, state = read_tensors(path, "site's model", FORMAT)
        check_signature(str(path), texts, state)
        form = read_json(texts.get("form", ""), Form, f"{path}: not what rows and labels look like")
        experiment = Experiment.from_toml(texts.get("experiment", ""), str(path)).without_weights()
        refuse_foreign_code(experiment, str(path), code, remedy=remedy)
        check_form(form, str(path))
        mean, scale = (state.get(name, torch.empty(0)) for name in ("mean", "scale"))
        check_scaling(mean, scale, form, str(path))
        if form.regression:
            # A model of an early version was trained in the targets' own units.
            state = {"target_mean": torch.zeros(1).double(), "target_scale": torch.ones(1).double(), **state}
        entries = {f"standardisation.{name}": value for name, value in state.items() if name.startswith("target_")}
        target = TargetScale.of(entries, log=experiment.target_kind == "log")
        check_target(target, form, str(path))

        def built() -> SiteModel:
            learner = learner_of(experiment, form.shape, form.classes, form.outputs)
            return cls(learner.network.module, mean, scale, form, experiment, target)

        if not any(":" in name for name in (experiment.model.name, experiment.learner.name)):
            # Without storage first: a few bytes may describe a model of any size.
            with torch.device("meta"):
                check_tensors(state, built().state_dict(), str(path))
        model = built()
        model.load_state_dict(state)
        return model


def decode(outputs: Tensor, form: Form) -> NDArray[Any]:
    """Returns class names (text) or numbers for a model's outputs [n, classes], [n] or [n, targets]."""
    if form.regression:
        numbers: NDArray[Any] = outputs.double().numpy()
        return numbers
    names: NDArray[Any] = np.array(form.classes, dtype=object)[outputs.argmax(-1).numpy()]
    return names
