"""Tightened recordings: fewer lines, less memory, the same bits, and inputs as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fedmeta.engines.lowrank import capture, graph_passes
from fedmeta.engines.lowrank.capture import capture_graph

SITES, ROWS = 3, 4
SHAPE = (SITES, ROWS, ROWS)

STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda one, other: one + other,
    "add the turned": lambda one, other: one + other.transpose(1, 2),
    "subtract": lambda one, other: one - other,
    "multiply": lambda one, other: one * other,
    "scale": lambda one, other: one * 0.5,
    "relu": lambda one, other: one.relu(),
    "threshold": lambda one, other: torch.ops.aten.threshold_backward(one, other, 0),
    "product": lambda one, other: torch.bmm(one, other),
    "product and sum": lambda one, other: torch.bmm(one, other.transpose(1, 2)) + other,
    "sum and product": lambda one, other: one + torch.bmm(one, other),
    "view": lambda one, other: one.view(SITES * ROWS, ROWS).view(SHAPE),
    "turn twice": lambda one, other: one.transpose(1, 2).transpose(1, 2),
    "rows": lambda one, other: one.view(-1, ROWS).relu().view(SHAPE) + one,
    "one site": lambda one, other: one[0].expand(SHAPE) + other,
    "softmax": lambda one, other: one.softmax(-1),
}


def graph_of(compute: Callable[..., list[Tensor]], *inputs: Tensor) -> fx.Graph:
    """Returns the tightened graph of a computation."""
    recorder = capture._Recorder(inputs, ())
    with recorder:
        outputs = compute(*inputs)
    recorder.graph.output([recorder.node(value) for value in outputs])
    recorder.graph.eliminate_dead_code()
    graph_passes.optimize_graph(recorder.graph)
    recorder.graph.lint()
    return recorder.graph


def targets(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12
    ),
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_any_computation_keeps_its_bits_and_its_inputs(steps: list[tuple[str, int, int]], wanted: list[int]) -> None:
    def compute(*inputs: Tensor) -> list[Tensor]:
        values = list(inputs)
        for name, one, other in steps:
            # Mostly recent ones, so that many are used once.
            values.append(STEPS[name](values[-1 - one % min(len(values), 4)], values[-1 - other % len(values)]))
        return [values[-1 - place % len(values)] for place in wanted]

    torch.manual_seed(0)
    replay = capture_graph(compute, [torch.randn(SHAPE), torch.randn(SHAPE)])
    for _ in range(2):
        inputs = [torch.randn(SHAPE), torch.randn(SHAPE)]
        before = [value.clone() for value in inputs]
        found, expected = replay(*inputs), compute(*inputs)
        assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))
        assert all(torch.equal(value, other) for value, other in zip(inputs, before, strict=True))


def test_a_result_may_be_used_like_any_tensor() -> None:
    (value,) = capture_graph(lambda x: [x * 2], [torch.ones(3)])(torch.ones(3))
    value.requires_grad_()
    value.square().sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [4.0] * 3


def test_a_view_laid_out_like_what_it_views_is_that() -> None:
    def compute(x: Tensor) -> list[Tensor]:
        return [x.transpose(0, 1).transpose(0, 1).view(6).view(2, 3).exp()]

    assert targets(graph_of(compute, torch.randn(2, 3))) == [torch.ops.aten.exp.default]


def test_what_is_not_used_again_is_written_over() -> None:
    aten = torch.ops.aten

    def compute(x: Tensor) -> list[Tensor]:
        y = x.exp()
        return [(y.view(-1) + 1).relu() * x.view(-1)]

    found = targets(graph_of(compute, torch.randn(2, 3)))
    assert [aten.add_.Tensor in found, aten.relu_.default in found, aten.mul_.Tensor in found] == [True] * 3


def test_what_is_used_again_by_another_view_is_not_written_over() -> None:
    def compute(x: Tensor) -> list[Tensor]:
        y = x.exp()
        return [y * 2, y.view(-1) + 1]

    found = targets(graph_of(compute, torch.randn(2, 3)))
    assert torch.ops.aten.mul_.Tensor not in found
    assert torch.ops.aten.add_.Tensor in found


def test_inputs_and_results_are_not_written_over() -> None:
    def compute(x: Tensor) -> list[Tensor]:
        y = x + 1
        return [y, y * 2]

    assert targets(graph_of(compute, torch.randn(2))) == [torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 2, 10, 20, 128, 1000]))
def test_products_are_joined_with_sums_only_where_the_bits_are_the_same(n: int, rows: int, width: int, k: int) -> None:
    def compute(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        return [torch.bmm(x, y.transpose(1, 2)) + z]

    torch.manual_seed(k)
    shapes = (n, rows, k), (n, width, k), (n, rows, width)
    inputs = [torch.randn(shape) for shape in shapes]
    joined = torch.ops.aten.baddbmm.default in targets(graph_of(compute, *inputs))
    alike = True
    for _ in range(20):
        inputs = [torch.randn(shape) for shape in shapes]
        x, y, z = inputs
        alike &= torch.equal(torch.baddbmm(z, x, y.transpose(1, 2)), compute(*inputs)[0])
    assert alike or not joined


def test_whole_numbers_are_not_joined() -> None:
    numbers = torch.ones(2, 3, 3, dtype=torch.int64)
    found = targets(graph_of(lambda x: [torch.bmm(x, x) + x], numbers))
    assert torch.ops.aten.baddbmm.default not in found
