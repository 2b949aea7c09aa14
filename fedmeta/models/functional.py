"""A torch module as a pair of pure functions: seeded initial parameters, and outputs from parameters and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter

from fedmeta.errors import FedmetaError, nearest
from fedmeta.importing import first_line
from fedmeta.models.attention import attends, exact_attention
from fedmeta.noise import of_rows
from fedmeta.randomness import torch_seed

Parameters = dict[str, Tensor]
"""A model's parameters by the module's own names."""


class FunctionalModel:
    """A module whose parameters are passed in, so that one module serves every site.

    Args:
        model: A module, or a function without arguments that makes one. A function is called again under the seed
            by `init`, so that its own initial values are kept; a module's layers are re-drawn by their
            `reset_parameters`, and parameters that no layer draws stay as they are.

    Raises:
        FedmetaError: The module keeps running batch statistics (see `refuse_running_statistics`), it has no trainable
            parameter, or one that is complex or whose size is still open.
    """

    def __init__(self, model: nn.Module | Callable[[], nn.Module]) -> None:
        self._make: Callable[[], nn.Module] | None = None if isinstance(model, nn.Module) else model
        self.module: nn.Module = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        refuse_running_statistics(self.module)
        refuse_complex(self.module)
        for name, value in self.module.named_parameters():
            if isinstance(value, UninitializedParameter):
                raise FedmetaError(
                    f"model parameter {name!r} has no size yet: give its layer's width instead of Lazy..."
                )
        # Torch's own dropout draws without a key; in evaluation mode a model is a function of its inputs.
        self.module.eval()
        _keep_every_buffer(self.module)
        self.attends = attends(self.module)
        self.names = tuple(name for name, value in self.module.named_parameters() if value.requires_grad)
        self.frozen = tuple(name for name, _ in _everything(self.module) if name not in self.names)
        if not self.names:
            raise FedmetaError(f"model {type(self.module).__name__} has no trainable parameter")

    def init(self, seed: int) -> Parameters:
        """Returns initial parameters, frozen ones and buffers, drawn from `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            module = self._make() if self._make else _redraw(copy.deepcopy(self.module))
        values = dict(_everything(module))
        return {name: values[name].detach().clone() for name in (*self.names, *self.frozen)}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each parameter, frozen one and buffer."""
        values = dict(_everything(self.module))
        return {name: values[name].shape for name in (*self.names, *self.frozen)}

    def layer(self, name: str = "") -> tuple[str, ...]:
        """Returns the names of the parameters of a layer and of all layers in it.

        Args:
            name: The layer's name in the module, such as "4" or "head"; empty for the last that has parameters of
                its own, in the order in which the module registered them.

        Raises:
            FedmetaError: There is no such layer, or it has no trainable parameter.
        """
        last = self.names[-1].rpartition(".")[0]
        if not name and not last:
            return tuple(own for own in self.names if "." not in own)
        names = tuple(own for own in self.names if own.startswith((name or last) + "."))
        if not names:
            layers = sorted({own.rpartition(".")[0] for own in self.names} - {""})
            raise FedmetaError(
                f'the model has no layer "{name}" with parameters{nearest(name, layers)} (it has: {", ".join(layers)})'
            )
        return names

    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Returns the outputs [n, outputs] for inputs [n, *shape], in the parameters' floating-point type.

        Raises:
            FedmetaError: The model fails, does not return one tensor, or writes into its input, which are the site's
                rows.
        """
        dtype = parameters[self.names[0]].dtype
        if x.is_floating_point() and x.dtype != dtype:
            x = x.to(dtype)
        state: dict[str, Tensor] = dict(parameters)
        for name, value in _everything(self.module):
            own = state.get(name, value)
            wanted = dtype if own.is_floating_point() else own.dtype
            if name not in self.names and (own.dtype != wanted or own.device != x.device):
                state[name] = own.to(x.device, wanted)
        name, before = type(self.module).__name__, x._version
        try:
            with of_rows(x), exact_attention() if self.attends else nullcontext():
                outputs: Any = functional_call(self.module, state, (x,))
        except (FedmetaError, torch.OutOfMemoryError):
            raise
        except MISTAKES as error:
            left = any(word in str(error) for word in ("data pointer", "numpy()"))
            hint = "; numpy and .item() leave torch, where derivatives end: take torch's functions" if left else ""
            place = f"model {name} failed on rows of shape {tuple(x.shape[1:])}"
            raise FedmetaError(f"{place}: {first_line(error)}{hint}") from error
        if not isinstance(outputs, Tensor):
            raise FedmetaError(f"model {name} returned {type(outputs).__name__}; it must return one tensor")
        if x._version != before:
            raise FedmetaError(f"model {name} writes into its input: let its forward begin with x = x.clone()")
        return outputs


def _everything(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers, each under its first name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


MISTAKES = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    NameError,
)
"""What a user's own code raises where it is wrong; MemoryError and what engines raise themselves are none of these."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def refuse_running_statistics(module: nn.Module) -> None:
    """Checks that a module neither keeps running batch statistics nor normalises by those of the batch at hand.

    Raises:
        FedmetaError: It does: the statistics of a test batch would leak into its predictions, and a site's running
            statistics would be averaged as if they were gradients.
    """
    for name, layer in module.named_modules():
        running = isinstance(getattr(layer, "running_mean", None), Tensor)
        if running or isinstance(layer, BATCH_NORMS):
            what = "keeps running batch statistics" if running else "normalises by the statistics of a batch"
            raise FedmetaError(
                f"model layer {name or 'model'!r} ({type(layer).__name__}) {what}, which leak test rows and cannot be "
                "adapted by gradients: use GroupNorm or LayerNorm"
            )


def refuse_complex(module: nn.Module) -> None:
    """Checks that parameters and buffers are real.

    Raises:
        FedmetaError: One is complex: a change of type would drop its imaginary part, and so would a sum of gradients.
    """
    for name, value in _everything(module):
        if value.is_complex():
            raise FedmetaError(
                f"model parameter or buffer {name!r} is complex: keep its real and imaginary parts as two real ones, "
                "and combine them by torch.complex in forward"
            )


def silent_dropout(module: nn.Module) -> list[str]:
    """Returns the layers whose dropout is off here, in training too: torch's own draws without a key."""
    found = []
    for name, layer in module.named_modules():
        shares = [getattr(layer, key, 0.0) for key in ("p", "dropout")]
        if any(isinstance(share, float) and share > 0 for share in shares) and (
            isinstance(layer, nn.MultiheadAttention | nn.RNNBase) or "Dropout" in type(layer).__name__
        ):
            found.append(f"{name or 'model'} ({type(layer).__name__})")
    return found


def _keep_every_buffer(module: nn.Module) -> None:
    """Makes every buffer a part of the module's state: outputs depend on those too that it would leave out."""
    kept = module.state_dict().keys()
    for prefix, layer in module.named_modules():
        for name, value in list(layer.named_buffers(recurse=False)):
            if (f"{prefix}.{name}" if prefix else name) not in kept:
                layer.register_buffer(name, value)


def _redraw(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            reset = getattr(layer, name, None)
            if callable(reset):
                reset()
                break
    return module
