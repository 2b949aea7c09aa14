"""Models that must be refused."""

from torch import Tensor, nn


class Pair(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.layer(x.flatten(1)), 1


def batch_norm(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs))


def of_other_rows(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, outputs))


def of_too_few_outputs(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs - 1))


def of_two_results(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return Pair(outputs)


def lazy(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(outputs))
