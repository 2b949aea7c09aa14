"""Models whose outputs depend on more than what is trained."""

import torch
from torch import Tensor, nn


class Fourier(nn.Module):
    """Random features in a buffer, kept out of torch's own state, before a layer that is trained."""

    def __init__(self, inputs: int, outputs: int, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(inputs, 24) / 4, persistent=persistent)
        self.head = nn.Linear(48, outputs)

    def forward(self, x: Tensor) -> Tensor:
        phase = x.flatten(1) @ self.basis
        return self.head(torch.cat([phase.sin(), phase.cos()], 1))


def fourier(shape: tuple[int, ...], outputs: int, persistent: bool = False) -> nn.Module:
    return Fourier(torch.Size(shape).numel(), outputs, persistent)


def random_body(shape: tuple[int, ...], outputs: int) -> nn.Module:
    body = nn.Linear(torch.Size(shape).numel(), 24)
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    return nn.Sequential(nn.Flatten(), body, nn.Tanh(), nn.Linear(24, outputs))
