"""A site's own model on raw rows: imputation and standardisation included, as torch state in one file."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fedmeta.adapt.initialization import Form, MetaModel, check_form, check_scaling, check_tensors
from fedmeta.experiment import Experiment
from fedmeta.files import read_json, read_tensors, write_atomic
from fedmeta.models import Parameters
from fedmeta.models.attention import exact_attention
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
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, scale: Tensor, form: Form) -> None:
        super().__init__()
        self.network = network
        self.form = form
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.eval()

    @classmethod
    def of(cls, start: MetaModel, parameters: Parameters) -> SiteModel:
        """Returns the model of a site that has these parameters."""
        network = copy.deepcopy(start.learner.network.module)
        model = cls(network, start.mean, start.scale, start.form)
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

    def outputs(self, x: Tensor) -> Tensor:
        """Returns the network's outputs for prepared rows, attention computed as in training."""
        with exact_attention():
            found: Tensor = self.network(x)
            return found

    def forward(self, x: Tensor) -> Tensor:
        """Returns the classes' probabilities [n, classes], or for regression numbers [n], of raw rows [n, *shape]."""
        outputs = self.outputs(self.prepare(x))
        return outputs.reshape(-1) if self.form.regression else outputs.softmax(-1)

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        """Returns class names (text) or numbers [n] for raw rows [n, *shape]."""
        with torch.no_grad():
            outputs = self(torch.from_numpy(np.ascontiguousarray(x)).to(self.form.dtype))
        return said(outputs, self.form)

    def write(self, path: Path, start: MetaModel, facts: Mapping[str, Any]) -> None:
        """Writes the model's state, how it is built, and facts about it into one file, atomically."""
        texts = {
            "format": FORMAT,
            "experiment": start.experiment.to_toml(),
            "form": json.dumps(asdict(self.form)),
            "facts": json.dumps(facts),
        }
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_atomic(path, save(state, texts))

    @classmethod
    def read(cls, path: Path, code: Collection[str] = (), *, remedy: str = BY_OPTION) -> SiteModel:
        """Reads what `write` wrote.

        Args:
            path: The file.
            code: What it may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).
            remedy: How a person allows more code, for the message.

        Raises:
            FedmetaError: It is not such a file, or asks for other code.
        """
        from fedmeta.build import learner_of

        texts, state = read_tensors(path, "site's model", FORMAT)
        form = read_json(texts.get("form", ""), Form, f"{path}: not what rows and labels look like")
        experiment = Experiment.from_toml(texts.get("experiment", ""), str(path))
        refuse_foreign_code(experiment, str(path), code, remedy=remedy)
        check_form(form, str(path))
        mean, scale = (state.get(name, torch.empty(0)) for name in ("mean", "scale"))
        check_scaling(mean, scale, form, str(path))

        def built() -> SiteModel:
            return cls(learner_of(experiment, form.shape, form.classes).network.module, mean, scale, form)

        if not any(":" in name for name in (experiment.model.name, experiment.learner.name)):
            # Without storage first: a few bytes may describe a model of any size.
            with torch.device("meta"):
                check_tensors(state, built().state_dict(), str(path))
        model = built()
        model.load_state_dict(state)
        return model


def said(outputs: Tensor, form: Form) -> NDArray[Any]:
    """Returns class names (text) or numbers [n] for a model's outputs [n, classes] or [n]."""
    if form.regression:
        numbers: NDArray[Any] = outputs.double().numpy()
        return numbers
    names: NDArray[Any] = np.array(form.classes, dtype=object)[outputs.argmax(-1).numpy()]
    return names
