"""The server's step: a torch optimizer over the meta-state, with its state as plain tensors for the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmeta.build import DEFAULT_OPTIMIZERS
from fedmeta.experiment import Server


def resolve(settings: Server, sends: str) -> tuple[str, float]:
    """Returns the optimizer's name and learning rate, with "auto" replaced by what suits the learner."""
    name, lr = DEFAULT_OPTIMIZERS[sends]
    return (
        name if settings.optimizer == "auto" else settings.optimizer,
        lr if settings.lr == "auto" else settings.lr,
    )


LARGEST_GRADIENT, LARGEST_STATE, LARGEST_LR = 1e12, 1e30, 1e6
"""Below these a step cannot overflow."""


class ServerOptimizer:
    """Steps the learned part of the meta-state along an aggregated meta-gradient.

    Args:
        settings: The experiment's section [server].
        sends: What the learner's sites send ("gradient", "delta", "nothing").
        meta_state: The learned part of the meta-state; copied.
        averaged: The prefix of keys that are means over all training sites (`Learner.averaged`); empty for none.
    """

    def __init__(self, settings: Server, sends: str, meta_state: Mapping[str, Tensor], averaged: str = "") -> None:
        name, lr = resolve(settings, sends)
        self._small = lr * max(1.0, settings.weight_decay) <= LARGEST_LR
        self._values = {key: value.clone() for key, value in meta_state.items()}
        self._averaged = [key for key in self._values if averaged and key.startswith(averaged)]
        self._stepped = [key for key in self._values if key not in self._averaged]
        self._optimizer = _make(name, [self._values[key] for key in self._stepped], lr, settings)

    def step(self, gradient: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Steps the meta-state along a gradient with its keys; means over all sites by a round's share of them."""
        for key in self._stepped:
            value = self._values[key]
            value.grad = gradient[key].to(value.dtype)
        self._optimizer.step()
        with torch.no_grad():
            for key in self._averaged:
                self._values[key].sub_(gradient[key].to(self._values[key].dtype), alpha=share)

    def replace(self, meta_state: Mapping[str, Tensor]) -> None:
        """Puts another meta-state in the place of the one as it stands; the optimizer's memory stays."""
        with torch.no_grad():
            for key, value in self._values.items():
                value.copy_(meta_state[key])

    def step_if_finite(self, gradient: Mapping[str, Tensor], share: float = 1.0) -> bool:
        """Steps along a gradient, and undoes that where the meta-state or the memory has become infinite.

        A step that cannot overflow, as nearly all cannot, is not copied for: with a gradient below 1e12 and a state
        below 1e30, Adam's memory of squares stays below 1e24 and the state below 1e37 (float32 ends at 3e38).

        Args:
            gradient: What sites sent, averaged.
            share: What the round's sites weigh, of the weight of all training sites.

        Returns:
            Whether the step stands.
        """
        if self._small and _below(gradient, LARGEST_GRADIENT) and _below(self._values, LARGEST_STATE):
            self.step(gradient, share)
            return True
        before, memory = self.meta_state, {name: value.clone() for name, value in self.state().items()}
        self.step(gradient, share)
        if self.finite:
            self._small = False  # its memory may hold what the next steps add to
            return True
        self.restore(before, memory)
        return False

    @property
    def finite(self) -> bool:
        """Whether all numbers of the meta-state and of the memory are finite."""
        every = (*self._values.values(), *self.state().values())
        return all(bool(value.isfinite().all()) for value in every)

    @property
    def meta_state(self) -> dict[str, Tensor]:
        """A copy of the meta-state as it stands."""
        return {key: value.detach().clone() for key, value in self._values.items()}

    def state(self) -> dict[str, Tensor]:
        """Returns the optimizer's memory as tensors named "KEY/WHAT"."""
        memory = self._optimizer.state_dict()["state"]
        names = self._stepped
        return {
            f"{names[index]}/{what}": torch.as_tensor(value)
            for index, values in memory.items()
            for what, value in values.items()
            if value is not None
        }

    def restore(self, meta_state: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Puts back a meta-state and what `state` returned beside it."""
        self.replace(meta_state)
        self._small = self._small and _below(state, LARGEST_STATE)
        memory: dict[int, dict[str, Tensor]] = {}
        names = self._stepped
        for name, value in state.items():
            key, _, what = name.rpartition("/")
            memory.setdefault(names.index(key), {})[what] = value.clone()
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": memory})


def _below(tensors: Mapping[str, Tensor], bound: float) -> bool:
    """Returns whether all numbers are between -bound and bound; NaN is not."""
    with torch.no_grad():
        ends = [end for value in tensors.values() if value.numel() for end in value.aminmax()]
    return all(-bound < float(end) < bound for end in ends)


def _make(name: str, values: list[Tensor], lr: float, settings: Server) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    # In one pass over each tensor instead of a dozen: a third of the time for 100 000 parameters.
    if name == "adam":
        return torch.optim.Adam(values, lr=lr, eps=settings.eps, weight_decay=decay, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(values, lr=lr, eps=settings.eps, weight_decay=decay, fused=True)
    momentum = settings.momentum if name == "momentum" else 0.0
    return torch.optim.SGD(values, lr=lr, momentum=momentum, weight_decay=decay, fused=True)
