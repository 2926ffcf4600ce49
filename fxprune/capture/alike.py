"""Whether two captured graphs of one model, made from inputs of different sizes, do the same.

Both are read backwards from what they return and from what they write; calls whose results nobody uses do
not count. A constant or a buffer of one graph may stand where the other computes a tensor of sizes alone: so
it is where a model keeps what it made for the sizes of its last call. It is the same if the values are. The
second graph may also hold an ``expand`` that the first one lacks, as long as it changes no size. On request,
calls that differ in flags alone are the same where random tensors show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..guards import CHECKS
from ..known_values import FROM_SHAPE
from ..modes import either
from ..nodes import mutable, operator_name, writes
from ..program import Program
from ..random_numbers import drawn


@dataclass(frozen=True)
class Alike:
    """The outcome of a comparison.

    Attributes:
        same: whether both graphs do the same.
        computed: whether the second graph computes from sizes what the first one takes as it is.
        node: a node of the first graph at which they part; None where they do not.
    """

    same: bool
    computed: bool = False
    node: fx.Node | None = None


def compare(a: Program, b: Program, sampled: bool = False) -> Alike:
    """Whether ``b``, made from inputs of other sizes, does what ``a`` does: the same calls and numbers.

    Args:
        a: the first one.
        b: the second one.
        sampled: whether calls may have other flags (true or false) that make no difference at the sizes of
            ``b``: attention of one query to one key is the same if it is causal. Both are tried on random
            tensors.
    """
    try:
        comparison = _Comparison(a, b, sampled)
        comparison.run()
    except _Apart as apart:
        return Alike(False, node=apart.node)
    return Alike(True, bool(comparison.made or comparison.idle))


class _Apart(Exception):
    """The graphs differ at ``node``."""

    def __init__(self, node: fx.Node | None) -> None:
        super().__init__()
        self.node = node


class _Comparison:
    def __init__(self, a: Program, b: Program, sampled: bool) -> None:
        self.a, self.b, self.sampled = a, b, sampled
        self.pairs: dict[fx.Node, fx.Node] = {}
        self.back: dict[fx.Node, fx.Node] = {}
        self.made: list[tuple[fx.Node, fx.Node]] = []
        self.idle: list[fx.Node] = []
        self.otherwise: dict[fx.Node, None] = {}
        self.todo: list[tuple[fx.Node, fx.Node]] = []
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> None:
        roots, others = _roots(self.a.graph), _roots(self.b.graph)
        for x, y in zip(reversed(roots), reversed(others), strict=False):
            self._pair(x, y, x)
        if len(roots) != len(others):
            raise _Apart((roots if len(roots) > len(others) else [None])[0])
        while self.todo:
            x, y = self.todo.pop()
            self._nodes(x, y)
        order = {node: place for place, node in enumerate(self.b.graph.nodes)}
        last = -1
        for node in self.a.graph.nodes:
            if node in self.pairs and node.op not in ("placeholder", "get_attr"):
                if order[self.pairs[node]] < last:
                    raise _Apart(node)  # what is written and read may come in another order
                last = order[self.pairs[node]]
        for x, y in self.made:
            kept = {**self.a.tensors, **self.a.extras}[str(x.target)]
            if not _equal(kept, self._value(y)):
                raise _Apart(next(iter(x.users), x))
        for y in self.idle:
            if self._value(y).shape != self._value(y.args[0]).shape:  # type: ignore[arg-type]
                raise _Apart(None)
        for x in self.otherwise:
            if writes(x) or not all(self._agree(x, self.pairs[x], trial) for trial in range(_TRIALS)):
                raise _Apart(x)

    def _pair(self, x: fx.Node, y: fx.Node, at: fx.Node) -> None:
        while _expands(y) and not _expands(x):
            self.idle.append(y)
            y = y.args[0]  # type: ignore[assignment]
        known, back = self.pairs.get(x), self.back.get(y)
        if known is None and back is None:
            self.pairs[x], self.back[y] = y, x
            self.todo.append((x, y))
        elif known is not y:
            raise _Apart(at)

    def _nodes(self, x: fx.Node, y: fx.Node) -> None:
        constant = x.op == "get_attr" and x.target in self.a.extras
        if constant and y.op == "get_attr" and y.target in self.b.extras:
            if not _equal(self.a.extras[str(x.target)], self.b.extras[str(y.target)]):
                raise _Apart(next(iter(x.users), x))
        elif constant or (self._is_buffer(x) and y.op != "get_attr"):
            self.made.append((x, y))
        elif not _same_call(x, y):
            raise _Apart(x)
        else:
            self._trees((x.args, x.kwargs), (y.args, y.kwargs), x)

    def _is_buffer(self, x: fx.Node) -> bool:
        tensor = self.a.tensors.get(str(x.target)) if x.op == "get_attr" else None
        return tensor is not None and not isinstance(tensor, torch.nn.Parameter)

    def _trees(self, a: Any, b: Any, at: fx.Node) -> None:
        if isinstance(a, fx.Node):
            if not isinstance(b, fx.Node):
                raise _Apart(at)
            self._pair(a, b, at)
        elif self.sampled and isinstance(a, bool) and isinstance(self._number(b), bool):
            if a is not b:
                self.otherwise[at] = None
        elif isinstance(a, (tuple, list)):
            if not isinstance(b, (tuple, list)) or len(a) != len(b):
                raise _Apart(at)
            for x, y in zip(a, b, strict=True):
                self._trees(x, y, at)
        elif isinstance(a, Mapping):
            if not isinstance(b, Mapping) or a.keys() != b.keys():
                raise _Apart(at)
            for key in a:
                self._trees(a[key], b[key], at)
        elif isinstance(a, slice):
            if not isinstance(b, slice):
                raise _Apart(at)
            self._trees((a.start, a.stop, a.step), (b.start, b.stop, b.step), at)
        elif not (a is b or (type(a) is type(b) and (a == b or a != a))):
            raise _Apart(at)

    def _number(self, b: Any) -> Any:
        """What an argument of the second graph is, where that is a number."""
        return self.b.seen.get(b) if isinstance(b, fx.Node) else b

    def _agree(self, x: fx.Node, y: fx.Node, trial: int) -> bool:
        """Whether both calls give the same for random tensors of the sizes in the second graph.

        Args:
            x: the call in the first graph.
            y: the call in the second one.
            trial: number of the trial. Masks are all false in the first, all true in the second, random in
                the third. Where a number depends on the mode, it is that of either in turns.
        """

        @functools.cache
        def sample(node: fx.Node) -> Any:
            seen = self.b.seen.get(node)
            if seen is None and node.target is either:
                seen = node.args[1 + trial % 2]
            if isinstance(seen, torch.Tensor) and seen.is_floating_point():
                return torch.randn(seen.shape, dtype=torch.float64)
            if isinstance(seen, torch.Tensor) and seen.dtype is torch.bool:
                return torch.rand(seen.shape) < (0.0, 1.0, 0.5)[trial]
            if not isinstance(seen, _NUMBERS):
                raise _Apart(x)
            return seen

        def result(node: fx.Node, partner: Callable[[fx.Node], fx.Node]) -> Any:
            args: Any = map_arg((node.args, dict(node.kwargs)), lambda part: sample(partner(part)))
            with drawn(0):
                return self._call(node, *args)

        with drawn(0), torch.no_grad():
            return _equal(result(y, lambda node: node), result(x, self.pairs.__getitem__))

    def _value(self, node: fx.Node) -> Any:
        """What a node of the second graph gives at the sizes of the first one, made of sizes alone.

        Where its value is not known a tensor is on the meta device.
        """
        needed, todo = {node}, [node]
        while todo:
            for part in todo.pop().all_input_nodes:
                if part not in needed:
                    needed.add(part)
                    todo += [part] if self._seen(part) is None else []
        for part in self.b.graph.nodes:
            if part in needed and part not in self.values:
                seen = self._seen(part)
                self.values[part] = self._run(part) if seen is None else seen
        return self.values[node]

    def _seen(self, node: fx.Node) -> Any:
        """What the counterpart of a node is on shapes alone."""
        if node.op == "placeholder":
            return next((self.a.seen.get(n) for n in self.a.placeholders() if n.target == node.target), None)
        other = self.back.get(node)
        made = any(y is node for _, y in self.made)
        return None if other is None or made or node.op == "get_attr" else self.a.seen.get(other)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            tensor = self.b.tensors.get(str(node.target), self.b.extras.get(str(node.target)))
            if tensor is None or isinstance(tensor, torch.nn.Parameter):
                raise _Apart(None)
            return tensor.detach().cpu()
        args: Any = map_arg(node.args, self.values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self.values.__getitem__)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        args, kwargs = mutable(args), mutable(kwargs)
        if operator_name(node) in FROM_SHAPE and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            args = (torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
        if operator_name(node) in ("type_as", "to") and isinstance(args[1], torch.Tensor):
            args = (args[0], torch.empty((), dtype=args[1].dtype), *args[2:])  # its type alone counts
        return self._call(node, args, kwargs)

    @staticmethod
    def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        try:
            if node.op == "call_method":
                return getattr(args[0], str(target))(*args[1:], **kwargs)
            if node.op == "call_function":
                return target(*args, **kwargs)
        except Exception:  # noqa: BLE001  what has values meets what has none
            raise _Apart(None) from None
        raise _Apart(None)


def _same_call(x: fx.Node, y: fx.Node) -> bool:
    """Whether two nodes call the same; of a constant, ``a - b`` is a call of its method."""
    if x.op == y.op and x.target == y.target:
        return True
    names = {_OPERATORS.get(name := operator_name(node), name) for node in (x, y)}
    calls = ("call_function", "call_method")
    return x.op in calls and y.op in calls and len(names) == 1 and names <= set(_OPERATORS.values())


_NUMBERS = (bool, int, float)
_TRIALS = 3
_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "truediv": "div", "pow": "pow"}


def _expands(node: fx.Node) -> bool:
    return node.target == "expand" and bool(node.args) and isinstance(node.args[0], fx.Node)


def _roots(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns, and what it does beside."""
    found = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or node.users or node.target in CHECKS:
            continue
        if node.op in ("output", "call_module") or writes(node) or node.is_impure():
            found.append(node)
    return found


def _equal(a: torch.Tensor, b: Any) -> bool:
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point() or a.is_complex():
        exact = a.dtype in (torch.float64, torch.complex128)
        return torch.allclose(a, b, *((1e-9, 1e-10) if exact else (1e-5, 1e-6)), equal_nan=True)
    return bool(torch.equal(a, b))


__all__ = ["Alike", "compare"]
