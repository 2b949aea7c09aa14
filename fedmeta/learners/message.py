"""What a learner sends for one site, checked: what a learner of the user's own does wrong becomes one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.importing import first_line
from fedmeta.learners.learner import Learner
from fedmeta.models.functional import MISTAKES
from fedmeta.task import Task

SHOWN = 3
"""How many keys a message lists."""


def message(
    learner: Learner, meta_state: Mapping[str, Tensor], task: Task
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what a site sends and its figures (`Learner.message`).

    Raises:
        FedmetaError: The learner or its problem fails, or returns something else.
    """
    sent = asked(learner, "meta_gradient", learner.message, meta_state, task)
    return checked(learner, sent, learner.message_template(meta_state))


def asked(learner: Learner, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a learner's method returns.

    Raises:
        FedmetaError: It fails.
    """
    try:
        return method(*arguments)
    except (FedmetaError, torch.OutOfMemoryError):
        raise
    except MISTAKES as error:
        raise FedmetaError(f"learner {type(learner).__name__}: {name} failed: {first_line(error)}") from error


def checked(learner: Learner, sent: Any, template: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns a learner's gradient and figures as dictionaries of tensors.

    Args:
        learner: The learner.
        sent: What its `message` returned.
        template: Tensors with the keys and shapes that it must have.

    Raises:
        FedmetaError: It is something else; the message names it.
    """
    name = type(learner).__name__
    if not (isinstance(sent, tuple) and len(sent) == 2 and all(isinstance(part, Mapping) for part in sent)):
        raise FedmetaError(
            f"learner {name}: meta_gradient must return (gradient, figures), two dictionaries, and not "
            f"{type(sent).__name__}"
        )
    gradient, figures = sent
    if gradient.keys() != template.keys():
        lacking, extra = (
            ", ".join(sorted(names)[:SHOWN])
            for names in (template.keys() - gradient.keys(), gradient.keys() - template.keys())
        )
        parts = [f"lacks {lacking}"] * bool(lacking) + [f"has {extra} besides"] * bool(extra)
        raise FedmetaError(
            f"learner {name}: what it sends {' and '.join(parts)}: its keys are the trained meta-state's"
        )
    for key, value in gradient.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(template[key].shape):
            raise FedmetaError(f"learner {name}: it sends {key} of shape {shape}, and not {tuple(template[key].shape)}")
    if "query_loss" not in figures:
        raise FedmetaError(f'learner {name}: its figures hold no "query_loss"')
    like = next(iter(template.values()))
    scalars = {}
    for key, value in figures.items():
        if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
            raise FedmetaError(f'learner {name}: its figure "{key}" must be one number, not {_kind(value)}')
        tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=like.dtype)
        scalars[key] = tensor.to(like.device).reshape(())
    return dict(gradient), scalars


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
