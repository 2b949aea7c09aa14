"""A computation on tensors, recorded as straight-line code and run_captured on other numbers of the same shapes.

What a cohort computes is the same in every round: the numbers change, and not the operations. A module, an inner loop
and automatic differentiation decide on them again each time, which for small layers takes longer than the operations
themselves. The recording is the list of torch's operations that they came to, differentiation included, without what
repeats or adds zeros. A replay runs the same kernels on the same layouts, so that it gives the same bits; that is
checked before one is used, and what cannot be recorded, such as random numbers, is computed as ever.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fedmeta.engines.lowrank.graph_passes import annotate_layout, optimize_graph
from fedmeta.importing import first_line
from fedmeta.models import FunctionalModel

log = logging.getLogger("fedmeta.engines")

Computation = Callable[..., list[Tensor]]
"""A function of tensors alone, but for what its key names."""

WARMUP_CALLS = 8
"""How often a computation is seen before it is recorded, which takes as long as some thirty replays save."""

CACHE_SIZE = 16
"""How many of a model's computations are known at a time: cohorts of unequal sites have many shapes."""

MAX_OPS = 8000
"""The most lines of a recording."""

SAME = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
"""Operations whose result is their argument, where nothing is differentiated any more."""

RESHAPED = frozenset({torch.ops.aten.view.default, torch.ops.aten.expand.default, torch.ops.aten._unsafe_view.default})
"""Operations whose result is their argument where that has the shape already."""

ZEROS = frozenset({torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default})
"""Operations whose results add nothing."""

_known: WeakKeyDictionary[FunctionalModel, OrderedDict[Hashable, int | Computation | None]] = WeakKeyDictionary()


_lock = RLock()

_sights: ContextVar[int] = ContextVar("sights", default=WARMUP_CALLS)


class UnrecordableError(Exception):
    """A computation depends on more than the shapes of its inputs."""


def run_captured(
    network: FunctionalModel, key: Hashable, compute: Computation, inputs: Sequence[Tensor], copies: bool = True
) -> list[Tensor]:
    """Returns compute(*inputs), by a recording of it where there is one or it is time for one.

    Args:
        network: The model that computes; recordings live as long as it does.
        key: What the computation depends on besides its inputs; one that cannot be hashed is not recorded.
        compute: The computation.
        inputs: Its tensors.
        copies: Whether the results may be differentiated; those of a recording are copied for that.
    """
    key = (key, *((value.shape, value.stride(), value.dtype, value.device) for value in inputs))
    try:
        hash(key)
    except TypeError:
        return compute(*inputs)
    with _lock:
        # A module takes one set of parameters at a time: only replays run side by side.
        known = _known.setdefault(network, OrderedDict())
        found = known.get(key, 0)
        if not callable(found):
            outputs = compute(*inputs)
            if found is not None:
                sights = found + 1
                known[key] = sights if sights < _sights.get() else _verified(network, compute, inputs, outputs)
        known.move_to_end(key)
        if len(known) > CACHE_SIZE:
            known.popitem(last=False)
    if not callable(found):
        return outputs
    return found(*inputs) if copies else found(*inputs, copies=False)


@contextmanager
def capture_immediately() -> Iterator[None]:
    """Within it a computation is recorded the first time that it is seen."""
    token = _sights.set(1)
    try:
        yield
    finally:
        _sights.reset(token)


def capture_graph(compute: Computation, inputs: Sequence[Tensor], constants: Iterable[Tensor] = ()) -> Computation:
    """Returns a function that does on tensors of the same shapes what `compute` does on these.

    Args:
        compute: The computation.
        inputs: Its tensors.
        constants: Other tensors that it may use: a model's buffers.

    Raises:
        UnrecordableError: It draws random numbers, looks at values, uses other tensors or writes into one of these.
    """
    recorder = _Recorder(inputs, constants)
    with recorder:
        outputs = compute(*inputs)
    graph = recorder.graph
    graph.output(tuple(recorder.node(value) for value in outputs))
    graph.eliminate_dead_code()
    optimize_graph(graph)
    run = _without_python(fx.GraphModule(recorder.constants, graph), inputs)

    def replay(*inputs: Tensor, copies: bool = True) -> list[Tensor]:
        # Quicker by what each operation does for differentiation; what it makes cannot be differentiated, a copy can.
        with torch.inference_mode():
            values = run(*inputs)
        return [value.clone() for value in values] if copies else list(values)

    return replay


def _without_python(lines: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Returns straight-line code as TorchScript; where torch cannot make it that, as it is.

    Between two operations Python takes as long as a small one of them does. Torch recommends its compiler in place of
    TorchScript, but that needs one for C++, and half a minute.
    """
    script: Any = torch.jit
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            traced = script.trace(_traceable(lines), tuple(inputs), check_trace=False).forward
    except Exception as error:  # whatever an operation that it does not know makes it raise
        log.info(
            "%d operations run as a list in Python: TorchScript refuses: %s", len(lines.graph.nodes), first_line(error)
        )
        return lines.forward
    log.info("%d operations run as TorchScript", len(lines.graph.nodes))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # What TorchScript would make quicker is so already, and other ways of adding up have other last bits.
        with script.optimized_execution(False):
            values: tuple[Tensor, ...] = traced(*inputs)
        return values

    return run


def _traceable(lines: fx.GraphModule) -> fx.GraphModule:
    """Returns straight-line code whose operations with truth values in a list are scripted functions.

    `torch.jit.trace` refuses such arguments, which state what derivatives of a convolution or a norm are wanted.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(lines.graph, {}))
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and any(str(each.type) == "List[bool]" for each in schema.arguments):
            node.target, node.args = _scripted(schema.name, node.args), tuple(filter(_is_node, node.args))
    return fx.GraphModule(lines, graph)


def _scripted(name: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """Returns an operation as a scripted function of its tensors, whose other arguments are constants.

    Args:
        name: The operation's name, with its namespace.
        arguments: All of its arguments, a node for each tensor; the last is what derivatives are wanted.
    """
    *_, wanted = arguments
    places = [place for place, wants in enumerate(wanted) if wants]
    named = [f"t{place}" if _is_node(each) else repr(_plain(each)) for place, each in enumerate(arguments)]
    tensors = ", ".join(f"{text}: Tensor" for text, each in zip(named, arguments, strict=True) if _is_node(each))
    called = f"torch.ops.{name.replace('::', '.')}({', '.join(named)})"
    returned = ", ".join(f"r[{place}]" for place in places)
    function = _compiled(f"def f({tensors}):\n    r = {called}\n    return {returned}\n")

    def call(*tensors: Tensor) -> list[Tensor | None]:
        result = function(*tensors)
        found = dict(zip(places, [result] if len(places) == 1 else result, strict=True))
        return [found.get(place) for place in range(len(wanted))]

    return call


@cache
def _compiled(source: str) -> Callable[..., Any]:
    """Returns a scripted function by its source.

    It is kept for good: a trace refers to the functions that it calls, and does not keep them.
    """
    script: Any = torch.jit
    function: Callable[..., Any] = script.CompilationUnit(source).f
    return function


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _plain(value: Any) -> Any:
    """Returns an argument's constant as what Python writes it as."""
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _verified(
    network: FunctionalModel, compute: Computation, inputs: Sequence[Tensor], outputs: list[Tensor]
) -> Computation | None:
    """Returns a recording, or None where there can be none or its results are not bit for bit those known."""
    module = network.module
    try:
        replay = capture_graph(compute, inputs, [*module.buffers(), *module.parameters()])
    except UnrecordableError:
        return None
    try:
        found = replay(*inputs)
    except Exception as error:  # an operation whose arguments torch does not take back, as of recurrent layers
        log.info("no recording: %s", first_line(error))
        return None
    pairs = zip(found, outputs, strict=True)
    return replay if all(_equal(value, expected) for value, expected in pairs) else None


def _equal(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same layout; what is not a number equals itself."""
    return _alike(value, expected) and torch.equal(value.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


class _Recorder(TorchDispatchMode):
    """Within it, every operation of torch that is run becomes a line of the graph, once."""

    def __init__(self, inputs: Sequence[Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self.nodes = WeakTensorKeyDictionary()
        self.lines: dict[Hashable, fx.Node] = {}
        self.zeros: set[fx.Node] = set()
        # What stands for several tensors, or comes from outside, must not be written into.
        self.kept: set[fx.Node] = set()
        self.used: set[fx.Node] = set()
        self.known_constants = {id(value): value for value in constants}
        for place, value in enumerate(inputs):
            self._stands_for(value, self.graph.placeholder(f"input_{place}"))
            self.kept.add(self.nodes[value])

    def node(self, value: Any) -> Any:
        """Returns the node that stands for a tensor; any other value as it is."""
        if not isinstance(value, Tensor):
            return value
        if value not in self.nodes:
            if id(value) not in self.known_constants:
                raise UnrecordableError("a tensor from elsewhere is used")
            name = f"constant_{len(self.kept)}"
            self.constants.register_buffer(name, value.detach())
            self._stands_for(value, self.graph.get_attr(name))
            self.kept.add(self.nodes[value])
        return self.nodes[value]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnrecordableError("random numbers are drawn")
        operands = map_aggregate(args, self.node), map_aggregate(kwargs, self.node)
        result = func(*args, **kwargs)
        values = [result] if isinstance(result, Tensor) else result
        # A derivative that is not wanted is None.
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, Tensor | None) for value in values):
            raise UnrecordableError("a value is looked at")
        same = self._same(func, args, kwargs, result)
        if same is not None:
            self._stands_for(result, self.node(same))
        elif func._schema.is_mutable:
            self._write(func, args, kwargs, operands, result)
        else:
            line = self._line(func, operands)
            if func in ZEROS:
                self.zeros.add(line)
            for place, value in enumerate(values):
                if value is not None:
                    own = line if value is result else self._line(operator.getitem, ((line, place), {}))
                    self._stands_for(value, own, self._viewed(value, (args, kwargs)))
        return result

    def _viewed(self, value: Tensor, arguments: Any) -> fx.Node | None:
        """Returns the node in whose memory a result lies, or None where it has its own."""
        found: list[fx.Node] = []

        def look(argument: Any) -> Any:
            if isinstance(argument, Tensor) and _one_memory(argument, value):
                found.append(self.node(argument).meta["memory"])
            return argument

        map_aggregate(arguments, look)
        return found[0] if found else None

    def _line(self, func: Any, operands: tuple[Any, Any]) -> fx.Node:
        """Returns the node of an operation on these operands, the earlier one where it was done before."""
        key = (func, repr(operands))
        if key not in self.lines:
            if len(self.used) > MAX_OPS:
                raise UnrecordableError("it is so long that deciding on it takes no time beside doing it")
            self.lines[key] = self.graph.call_function(func, *operands)
        return self.lines[key]

    def _stands_for(self, value: Tensor, node: fx.Node, memory: fx.Node | None = None) -> None:
        if node in self.used:
            self.kept.add(node)
        else:
            annotate_layout(node, value, memory or node)
        self.used.add(node)
        self.nodes[value] = node

    def _write(self, func: Any, args: Any, kwargs: Any, operands: tuple[Any, Any], result: Any) -> None:
        """Notes an operation that writes into one of its arguments and returns it."""
        written = self.nodes.get(result) if isinstance(result, Tensor) else None
        if written is None or written in self.kept:
            raise UnrecordableError("an operation writes into a tensor that is used elsewhere")
        self.lines.clear()
        self.nodes[result] = self.graph.call_function(func, *operands)
        annotate_layout(self.nodes[result], result, written.meta["memory"])

    def _same(self, func: Any, args: Any, kwargs: Any, result: Any) -> Tensor | None:
        """Returns the argument that a result equals by the operation's nature, or None."""
        candidates: list[Tensor] = []
        if func in SAME or func in RESHAPED:
            candidates = [args[0]]
        elif func is torch.ops.aten.add.Tensor and not kwargs:
            candidates = [one for one, other in (args, args[::-1]) if self.node(other) in self.zeros]
        return next((one for one in candidates if isinstance(one, Tensor) and _alike(one, result)), None)


def _one_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


def _alike(one: Tensor, other: Tensor) -> bool:
    layouts = [(each.shape, each.stride(), each.dtype, each.device) for each in (one, other)]
    return layouts[0] == layouts[1]
