"""Products with shared weights, against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fedmeta.engines.lowrank.matmul import fused_linear, products


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shared", [False, True])
def test_products_of_each_site(shared: bool) -> None:
    x, weight = numbers(3, 4, 5, seed=0), numbers(1 if shared else 3, 2, 5, seed=1)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return products(x, weight.expand(3, 2, 5))

    torch.testing.assert_close(function(x, weight), torch.einsum("snw,sow->sno", x, weight.expand(3, 2, 5)))
    assert gradcheck(function, (x, weight))
    assert gradgradcheck(function, (x, weight))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_joint_products_are_two_layers_with_one_derivative(used: tuple[bool, bool], biased: bool) -> None:
    x = numbers(2, 7, 5, seed=0).detach()
    weight, bias = numbers(3, 5, seed=2), numbers(3, seed=3) if biased else None

    def function(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        found = fused_linear(x, 4, weight, bias)
        return tuple(z for z, wanted in zip(found, used, strict=True) if wanted)

    expected = [functional.linear(rows, weight, bias) for rows in (x[:, :4], x[:, 4:])]
    torch.testing.assert_close(
        function(weight, bias), tuple(z for z, wanted in zip(expected, used, strict=True) if wanted)
    )
    assert gradcheck(function, (weight, bias))
