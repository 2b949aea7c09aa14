"""Torch modules by name or by import path, and modules as pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fedmeta.errors import FedmetaError, nearest
from fedmeta.importing import first_line, load_object
from fedmeta.models.convolutional import cnn, conv4, image_shape
from fedmeta.models.dense import logistic, mlp
from fedmeta.models.functional import FunctionalModel, Parameters, refuse_complex, refuse_running_statistics
from fedmeta.models.layers import Shape, widths
from fedmeta.models.pretrained import freeze_parameters, load_weights
from fedmeta.models.recurrent import char_lstm

__all__ = [
    "MODELS",
    "FunctionalModel",
    "Parameters",
    "Shape",
    "build",
    "freeze_parameters",
    "image_shape",
    "load_weights",
    "refuse_running_statistics",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "logistic": logistic,
    "mlp": mlp,
    "cnn": cnn,
    "conv4": conv4,
    "char_lstm": char_lstm,
}
"""Every named model: a function of (shape of a row, outputs) and its own keys."""


def build(
    name: str, shape: Shape, outputs: int, *, freeze: Sequence[str] = (), weights: str = "", **settings: Any
) -> nn.Module:
    """Builds a model.

    Args:
        name: A key of `MODELS`, or `package.module:function`, called as `function(shape, outputs, **settings)`.
        shape: The shape of one row.
        outputs: The number of classes, or 1 for regression.
        freeze: Names or patterns of parameters that are never trained, such as "body.*".
        weights: A safetensors file whose tensors the model starts from; "" for none.
        **settings: The model's own keys. A named model takes those it has and passes over the rest, so that one
            experiment can switch models; widths may be given as "64,64".

    Returns:
        A module whose outputs are [n, outputs].

    Raises:
        FedmetaError: No such model or function, the function failed or did not return a module, the module keeps
            running batch statistics or complex numbers, or `freeze` or `weights` do not fit it.
    """
    if ":" in name:
        module = _call(name, shape, outputs, settings)
    elif name in MODELS:
        accepted = inspect.signature(MODELS[name]).parameters
        module = MODELS[name](shape, outputs, **{key: widths(v) for key, v in settings.items() if key in accepted})
        # Their derivatives are verified by fedmeta's own tests, those of others once before they are used.
        module.built_in = True  # type: ignore[assignment]
    else:
        raise FedmetaError(f'no model "{name}"{nearest(name, MODELS)} (known: {", ".join(MODELS)})')
    refuse_running_statistics(module)
    refuse_complex(module)
    if weights:
        load_weights(module, weights)
    freeze_parameters(module, freeze)
    return module


def _call(path: str, shape: Shape, outputs: int, settings: Mapping[str, Any]) -> nn.Module:
    function = load_object(path, "[model] name")
    try:
        module = function(shape, outputs, **settings)
    except Exception as error:  # Whatever a user's own code raises, its author wants to know where it was called from.
        raise FedmetaError(
            f'[model] name = "{path}" failed when called with ({shape}, {outputs}, ...): {first_line(error)}'
        ) from error
    if not isinstance(module, nn.Module):
        raise FedmetaError(f'[model] name = "{path}" returned {type(module).__name__}, not a torch.nn.Module')
    return module
