"""Frozen layers, such as a pretrained encoder under a head or adapters that are tuned: computed once for all sites.

What a model computes before the first parameter that is trained is the same at every site and in every inner step. It
is computed once for the rows of a cohort, and an engine gets its results as rows and the rest of the model as the
model: the same numbers, without an encoder in every step. The place is found in the model's graph (`torch.fx`): the
last tensor with a row for each row of the data behind which nothing else of the data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fedmeta import noise
from fedmeta.engines.rows import check_rows
from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner
from fedmeta.learners.learner import FROZEN
from fedmeta.models import FunctionalModel
from fedmeta.models.attention import exact_attention
from fedmeta.models.functional import MISTAKES
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Batch, Rows

ROWS_AT_ONCE = 256
"""How many rows go through the frozen layers together."""

CHECKED_ROWS = 3
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far the model in two parts may be from the whole one, relative to the largest output."""


@dataclass(frozen=True)
class Parts:
    """A model in two parts.

    Attributes:
        encoder: The frozen layers, from rows to features.
        problem: The problem with the rest of the model, from features to outputs.
    """

    encoder: nn.Module
    problem: Supervised


_parts: WeakKeyDictionary[Supervised, dict[tuple[torch.Size, torch.dtype], Parts | None]] = WeakKeyDictionary()


def after_frozen_layers(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch
) -> tuple[Learner, Mapping[str, Tensor], Batch]:
    """Returns learner, meta-state and tasks behind the model's frozen layers; all as they are where there are none."""
    problem = learner.problem
    if not isinstance(problem, Supervised) or not problem.frozen or not problem.plain:
        return learner, meta_state, batch
    check_rows(learner, meta_state, batch)  # what follows holds for a function of each row
    x = batch.support[0]
    known, form = _parts.setdefault(problem, {}), (x.shape[2:], x.dtype)
    if form not in known:
        known[form] = _split(problem, learner.theta(meta_state), x.flatten(0, 1)[:CHECKED_ROWS])
    parts = known[form]
    if parts is None:
        return learner, meta_state, batch
    theta = learner.theta(meta_state)

    def features(rows: Rows) -> Rows:
        flat = rows[0].flatten(0, 1)
        found = [_encoded(parts.encoder, theta, problem, part) for part in torch.split(flat, ROWS_AT_ONCE)]
        return torch.cat(found).reshape(*rows[0].shape[:2], *found[0].shape[1:]), *rows[1:]

    own = {FROZEN + name for name in problem.frozen if name not in parts.problem.frozen}
    rest = {name: value for name, value in meta_state.items() if name not in own}
    reduced = replace(batch, support=features(batch.support), query=features(batch.query), pairs=None)
    return replace(learner, problem=parts.problem), rest, reduced


def _encoded(encoder: nn.Module, theta: Mapping[str, Tensor], problem: Supervised, x: Tensor) -> Tensor:
    """Returns the features of rows, in the type of what is trained."""
    dtype = theta[problem.trained[0]].dtype
    state = {}
    for name, value in (*encoder.named_parameters(), *encoder.named_buffers()):
        own = theta.get(name, value)
        state[name] = own.to(x.device, dtype) if own.is_floating_point() else own.to(x.device)
    with torch.no_grad(), exact_attention():
        found: Tensor = functional_call(encoder, state, (x.to(dtype) if x.is_floating_point() else x,))
    return found


def _split(problem: Supervised, theta: Mapping[str, Tensor], rows: Tensor) -> Parts | None:
    """Returns the model in two parts, checked on some rows; None where it is not of that form."""
    network = problem.network
    with torch.no_grad(), noise.asked() as drawn:
        whole = network(dict(theta), rows)
    if drawn or not len(rows):
        return None
    try:
        graph = fx.Tracer().trace(network.module)
    except (fx.proxy.TraceError, NotImplementedError, *MISTAKES):
        return None  # its path depends on values, or on more than torch's graph has
    for node in reversed(_frozen_nodes(graph, network)):
        parts = _cut(graph, node, problem)
        if parts is None:
            continue
        try:
            features = _encoded(parts.encoder, theta, problem, rows)
            if features.dim() < 2 or len(features) != len(rows) or not features.is_floating_point():
                continue
            with torch.no_grad():
                found = parts.problem.network({name: theta[name] for name in parts.problem.layout}, features)
        except (FedmetaError, *MISTAKES):
            return None
        bound = TOLERANCE.get(whole.dtype, 0.0) * max(1.0, float(whole.abs().max()))
        same = found.shape == whole.shape and float((found - whole).abs().max()) <= bound
        return parts if same else None
    return None


def _frozen_nodes(graph: fx.Graph, network: FunctionalModel) -> list[fx.Node]:
    """Returns the nodes of a graph, in order, that no trained parameter has a part in; without rows and parameters."""
    frozen: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        names = [f"{node.target}.", str(node.target)] if node.op in ("call_module", "get_attr") else []
        own = any(name.startswith(names[0]) or name == names[1] for name in network.names) if names else False
        frozen[node] = not own and all(frozen[each] for each in node.all_input_nodes)
    return [node for node, still in frozen.items() if still and node.op.startswith("call")]


def _needed(node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """Returns what a node needs, itself included, without going beyond `stop`, which is left out."""
    found: set[fx.Node] = set()
    left = [node]
    while left:
        each = left.pop()
        if each is not stop and each not in found:
            found.add(each)
            left += each.all_input_nodes
    return found


def _cut(graph: fx.Graph, node: fx.Node, problem: Supervised) -> Parts | None:
    """Returns the model cut after a node; None where more of the data is needed behind it, or nothing is gained."""
    network = problem.network
    behind = _needed(next(each for each in graph.nodes if each.op == "output"), node)
    if any(each.op == "placeholder" for each in behind):
        return None
    before, after = fx.Graph(), fx.Graph()
    seen: dict[fx.Node, fx.Node] = {}
    copied = {node: after.placeholder("features")}
    ahead = _needed(node)
    for each in graph.nodes:
        if each in ahead:
            seen[each] = before.node_copy(each, seen.__getitem__)
        if each in behind:
            copied[each] = after.node_copy(each, copied.__getitem__)
    before.output(seen[node])
    encoder = fx.GraphModule(network.module, before)
    if not any(True for _ in (*encoder.parameters(), *encoder.buffers())):
        return None
    rest = copy(problem)
    stale = ("known", "layout", "trained", "moved")
    rest.__dict__ = {name: value for name, value in problem.__dict__.items() if name not in stale}
    rest.network = FunctionalModel(fx.GraphModule(network.module, after))
    rest.frozen = rest.network.frozen
    return Parts(encoder, rest) if rest.network.names == network.names else None
