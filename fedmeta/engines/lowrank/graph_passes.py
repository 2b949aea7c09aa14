"""A recording's lines made fewer, and its arrays too, without another bit in what comes out.

Each line of the graph holds in its `meta` where its result lies: "memory", the line whose result owns the memory, which
is the line itself unless it is a view of another's; and "layout", the result's shape, strides, offset and type.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

aten: Any = torch.ops.aten

IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.relu.default: aten.relu_.default,
    aten.baddbmm.default: aten.baddbmm_.default,
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
}
"""Operations that can write over their first operand, and how."""

COMPARED = 4000
"""How many numbers are compared at the least to establish that two ways to a sum have the same bits."""

Layout = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]

COMMUTING = frozenset({aten.add.Tensor, aten.mul.Tensor})
"""Those that can write over their second one too."""


def annotate_layout(node: fx.Node, value: Tensor, memory: fx.Node) -> None:
    """Notes where the result of a line lies: in its own memory, or in another's."""
    node.meta["memory"] = memory
    node.meta["layout"] = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device)


def optimize_graph(graph: fx.Graph) -> None:
    """Shortens a graph of straight-line code whose lines are noted, in place."""
    _drop_views(graph)
    _join_products(graph)
    _reuse_memory(graph)


def _drop_views(graph: fx.Graph) -> None:
    """Takes a view that is laid out as what it views, directly or by other views, for that."""
    for node in list(graph.nodes):
        seen: Any = node
        while _is_view(seen):
            seen = seen.args[0]
            if seen.meta["layout"] == node.meta["layout"]:
                node.replace_all_uses_with(seen)
                break
    graph.eliminate_dead_code()


def _is_view(node: fx.Node) -> bool:
    """Whether a line only looks at its first operand's memory in another way."""
    if node.op != "call_function" or not _noted(node) or node.meta["memory"] is node or _writes(node):
        return False
    viewed = node.args[0]
    return isinstance(viewed, fx.Node) and viewed.meta.get("memory") is node.meta["memory"]


def _join_products(graph: fx.Graph) -> None:
    """Replaces the sum of a batch of products and something by the product that is added to that, where bits allow."""
    overwritten = {node.meta["memory"] for node in graph.nodes if _writes(node)}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs:
            continue
        operands: Any = node.args
        for product, other in (operands, operands[::-1]):
            if _joins(node, product, other) and overwritten.isdisjoint(_memories(product)):
                with graph.inserting_before(node):
                    joined = graph.call_function(aten.baddbmm.default, (other, *product.args))
                joined.meta.update(node.meta, memory=joined)
                _replace(graph, node, joined)
                graph.erase_node(product)
                break


def _joins(node: fx.Node, product: Any, other: Any) -> bool:
    """Whether a line adds `other` to a batch of products that is used nowhere else, and might as well at once."""
    if not isinstance(product, fx.Node) or not isinstance(other, fx.Node) or product is other:
        return False
    if product.target is not aten.bmm.default or len(product.users) > 1:
        return False
    operands: Any = product.args
    layouts = [each.meta["layout"] for each in (node, product, other, *operands)]
    return layouts[0] == layouts[1] == layouts[2] and _adds_alike(*layouts[2:])


@lru_cache(maxsize=1024)
def _adds_alike(*layouts: Layout) -> bool:
    """Whether a product that is added where it is computed has the bits of the sum, tried on random numbers.

    A library may add up a long inner product in parts, to what it is added to first or last, as it finds best for the
    shapes.
    """
    random = torch.Generator().manual_seed(0)

    def draw(layout: Layout) -> Tensor:
        shape, strides, _, dtype, device = layout
        extent = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        return torch.randn(extent, generator=random, dtype=dtype).to(device).as_strided(shape, strides)

    if not layouts[0][3].is_floating_point or 0 in layouts[0][0]:
        return False
    for _ in range(max(2, COMPARED // torch.Size(layouts[0][0]).numel())):
        other, one, two = map(draw, layouts)
        if not torch.equal(torch.baddbmm(other, one, two), torch.bmm(one, two) + other):
            return False
    return True


def _memories(node: fx.Node) -> set[fx.Node]:
    return {operand.meta["memory"] for operand in node.all_input_nodes}


def _reuse_memory(graph: fx.Graph) -> None:
    """Lets a line write over an operand that nothing uses any more, where it has the result's layout."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for operand in filter(_noted, node.all_input_nodes):
            last[operand.meta["memory"]] = places[node]
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in IN_PLACE or node.kwargs:
            continue
        operands: Any = node.args
        for place in (0, 1) if node.target in COMMUTING else (0,):
            operand, others = operands[place], [*operands[:place], *operands[place + 1 :]]
            if not _can_reuse_buffer(node, operand, others) or last[operand.meta["memory"]] != places[node]:
                continue
            with graph.inserting_before(node):
                target, memory = IN_PLACE[node.target], operand.meta["memory"]
                named = {"grad_input": operand} if target is aten.threshold_backward.grad_input else {}
                over = graph.call_function(target, (operand, *others), named)
            over.meta.update(node.meta, memory=memory)
            last[memory], places[over] = last.get(node, -1), places[node]
            _replace(graph, node, over)
            break


def _can_reuse_buffer(node: fx.Node, operand: Any, others: list[Any]) -> bool:
    """Whether an operand fills memory that a line of the graph allocated, in the result's layout, and no other does."""
    if not isinstance(operand, fx.Node) or operand.meta["layout"] != node.meta["layout"]:
        return False
    memory = operand.meta["memory"]
    if memory.op != "call_function" or _size(memory) != _size(operand):
        return False
    return all(other.meta["memory"] is not memory for other in others if isinstance(other, fx.Node))


def _size(node: fx.Node) -> tuple[int, Any]:
    shape, _, _, dtype, _ = node.meta["layout"]
    return torch.Size(shape).numel(), dtype


def _noted(node: fx.Node) -> bool:
    """Whether it is noted where the line's result lies; of several results each has its own line."""
    return "memory" in node.meta


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _replace(graph: fx.Graph, node: fx.Node, other: fx.Node) -> None:
    """Replaces a line that allocates by another; what views the one's memory then views the other's."""
    for each in graph.nodes:
        if each.meta.get("memory") is node:
            each.meta["memory"] = other.meta["memory"]
    node.replace_all_uses_with(other)
    graph.erase_node(node)
