"""Attention as it can be differentiated twice, and the same wherever a model is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def exact_attention() -> Iterator[None]:
    """Within it attention is computed by plain products: neither fused nor by torch's fast path for inference.

    Fused attention has no second derivative. The fast path of torch's own encoder layers, taken where nothing is
    differentiated, makes another model of one with a padding mask: it leaves padded positions at zero.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def attends(module: nn.Module) -> bool:
    """Returns whether a module holds one of torch's own attention layers."""
    return any(isinstance(layer, nn.MultiheadAttention) for layer in module.modules())
