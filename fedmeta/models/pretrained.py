"""Parts of a model that are not drawn or not trained: weights from a file, and parameters frozen by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedmeta.errors import FedmetaError, nearest

SHOWN = 5
"""How many names a message lists."""


def freeze_parameters(module: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes parameters: they travel, and are neither adapted nor learned.

    Args:
        module: The model.
        patterns: Names of parameters or layers; * and ? stand for any characters.

    Raises:
        FedmetaError: A pattern fits no parameter.
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        fitting = [name for name in parameters if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not fitting:
            raise FedmetaError(
                f'[model] freeze: no parameter fits "{pattern}"{nearest(pattern, parameters)} (the model has: '
                f"{_listed(list(parameters))})"
            )
        for name in fitting:
            parameters[name].requires_grad_(False)


def load_weights(module: nn.Module, path: str) -> tuple[list[str], list[str]]:
    """Puts the tensors of a safetensors file into a model, by name.

    Args:
        module: The model; what the file does not hold stays as it was drawn.
        path: The file.

    Returns:
        The names that were loaded, and those that were not.

    Raises:
        FedmetaError: The file cannot be read, or holds a tensor that the model has not, or of another shape.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = _read(path)
    for name, value in found.items():
        if name not in own:
            raise FedmetaError(
                f'[model] weights = "{path}": the model has no "{name[:80]}"{nearest(name, own)} (it has: '
                f"{_listed(list(own))}); leave out or rename what it does not have"
            )
        if value.shape != own[name].shape:
            raise FedmetaError(
                f'[model] weights = "{path}": "{name[:80]}" has shape {tuple(value.shape)}, and the model needs '
                f"{tuple(own[name].shape)}; leave it out to have it drawn"
            )
        if value.is_floating_point() != own[name].is_floating_point() or not bool(torch.isfinite(value).all()):
            raise FedmetaError(f'[model] weights = "{path}": "{name[:80]}" is not finite, or of type {value.dtype}')
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return [name for name in own if name in found], [name for name in own if name not in found]


def _read(path: str) -> Mapping[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FedmetaError(f'[model] weights = "{path}": no such file')
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FedmetaError(
            f'[model] weights = "{path}": not a safetensors file ({error}); write one by '
            "safetensors.torch.save_file(model.state_dict(), path): other formats may run code when they are read"
        ) from None
    if not found:
        raise FedmetaError(f'[model] weights = "{path}": it holds no tensor')
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
