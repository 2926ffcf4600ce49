"""Two traces of one model, in its mode and in the other, become one graph (see :mod:`fxprune.modes`).

A trace falls into calls of modules, each with the nodes and further calls in it. The calls of both traces
are laid side by side; within a call, what has a counterpart in the other trace is taken once, and the rest
runs in its mode alone. The modules whose flags decide are those that the code of this very call asked. Where
what a call was given differs too, those of the calling code decide with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from ..errors import CaptureError
from ..inputs import equal
from ..modes import Condition, either
from ..nn import Pack, TrainingFlag

Call = tuple[str, int]
"""A call of a module: its path, and the number of the call."""


@dataclass(frozen=True)
class Trace:
    """One trace.

    Attributes:
        graph: what was recorded; node metadata ``"calls"`` holds the calls that a node lies in.
        flags: training flags of the model's modules in this trace, by path.
        asked: modules whose flags the code of a call has asked for, by call; ``()`` is the model's own.
        given: what is no tensor among the arguments of a call.
        shape: shape and type of what a node gives, None where that is not known.
        added: modules that are not the model's, by path.
        constants: tensors that are not the model's, by name.
    """

    graph: fx.Graph
    flags: Mapping[str, bool]
    asked: Mapping[tuple[Call, ...], dict[str, None]]
    given: Mapping[Call, Any]
    shape: Callable[[fx.Node], Any]
    added: dict[str, nn.Module]
    constants: dict[str, torch.Tensor]


@dataclass
class _Scope:
    """A call of a module: nodes and further calls, in their order."""

    calls: tuple[Call, ...]
    items: list[fx.Node | _Scope] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.calls[-1][0] if self.calls else ""


def merge(now: Trace, then: Trace) -> tuple[fx.Graph, tuple[dict[fx.Node, Any], dict[fx.Node, Any]]]:
    """One graph for both; modules and constants that only ``then`` has are added to those of ``now``.

    Returns:
        The graph, and for each trace the nodes that stand for its own.

    Raises:
        CaptureError: if the traces differ in what no flag explains.
    """
    merger = _Merger(now, then)
    return merger.graph, merger.env


def same_in_both(now: Trace) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """As :func:`merge`, of a trace that is the same in the other mode."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    states: dict[Any, fx.Node] = {}

    def new(node: fx.Node) -> fx.Node:
        if node.op != "get_attr":
            return env[node]
        if node.target not in states:
            states[node.target] = state = graph.get_attr(str(node.target))
            state.meta = _meta(node)
        return states[node.target]

    for node in now.graph.nodes:
        if node.op == "output":
            graph.output(map_arg(node.args[0], new))
        elif node.op != "get_attr":
            args, kwargs = map_arg((node.args, node.kwargs), new)
            env[node] = graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            env[node].meta = _meta(node)
    return graph, env


class _Merger:
    def __init__(self, now: Trace, then: Trace) -> None:
        self.traces = (now, then)
        self.graph = fx.Graph()
        self.env: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})
        self.states: dict[str, fx.Node] = {}
        self.names = [self._own_names(side) for side in (0, 1)]
        self.everyone = tuple(
            dict.fromkeys(p for t in self.traces for asked in t.asked.values() for p in asked)
        )
        deciders = self._scope(_scopes(now.graph), _scopes(then.graph), self.everyone)
        ends = [next(n for n in reversed(t.graph.nodes) if n.op == "output") for t in self.traces]
        self.graph.output(self._unified(ends[0].args[0], ends[1].args[0], self._condition(deciders), True))

    def _own_names(self, side: int) -> dict[str, str]:
        """Names in the merged graph of modules and constants that the model does not have."""
        now, trace = self.traces[0], self.traces[side]
        names = {}
        tables: list[tuple[Any, Any, Callable[[Any, Any], bool]]] = [
            (now.added, trace.added, same_module),
            (now.constants, trace.constants, same_constant),
        ]
        for present, own, same in tables if side else ():
            for name, value in list(own.items()):
                free = name
                while free in present and not same(present[free], value):
                    free += "_"
                names[name] = free
                present.setdefault(free, value)
        return names

    # -- calls ----------------------------------------------------------------------------------

    def _scope(self, a: _Scope, b: _Scope, callers: tuple[str, ...]) -> tuple[str, ...]:
        """Merge two calls of one module; gives the modules that decide in it."""
        asked = [trace.asked.get(scope.calls, {}) for trace, scope in zip(self.traces, (a, b), strict=True)]
        deciders = tuple(dict.fromkeys([*asked[0], *asked[1]]))
        alike = not a.calls or self.traces[0].given[a.calls[-1]] == self.traces[1].given[b.calls[-1]]
        if not deciders or not alike:
            deciders = tuple(dict.fromkeys([*deciders, *callers]))
        keys = [[self._key(side, item) for item in scope.items] for side, scope in ((0, a), (1, b))]
        if keys[0] == keys[1]:
            steps = [("equal", 0, len(keys[0]), 0, len(keys[1]))]
        else:
            steps = SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes()  # type: ignore[assignment]
        for kind, i, j, k, end in steps:
            if kind == "equal":
                for one, two in zip(a.items[i:j], b.items[k:end], strict=True):
                    if isinstance(one, _Scope) and isinstance(two, _Scope):
                        self._scope(one, two, deciders)
                    elif isinstance(one, fx.Node) and isinstance(two, fx.Node):
                        self._pair(one, two, deciders)
                continue
            for side, items in ((0, a.items[i:j]), (1, b.items[k:end])):
                for item in items:
                    self._alone(side, item, self._condition(deciders, side), ())
        return deciders

    def _key(self, side: int, item: fx.Node | _Scope) -> Any:
        """What two items must have in common to be taken for one."""
        if isinstance(item, _Scope):
            return item.path

        def plain(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return type(argument).__name__, tuple(map(plain, argument))
            if isinstance(argument, dict):
                return tuple((key, plain(value)) for key, value in argument.items())
            if isinstance(argument, slice):
                return plain((argument.start, argument.stop, argument.step))
            free = argument is None or isinstance(argument, (fx.Node, bool, float))
            return None if free else repr(argument)

        target = self.names[side].get(str(item.target), item.target)
        return item.op, target, plain(item.args), plain(item.kwargs), self.traces[side].shape(item)

    def _condition(self, deciders: tuple[str, ...], side: int = 0) -> Condition:
        if not deciders:
            raise CaptureError("forward does not do the same twice")
        return tuple((path, self.traces[side].flags[path]) for path in deciders)

    # -- nodes ----------------------------------------------------------------------------------

    def _alone(self, side: int, item: fx.Node | _Scope, only: Condition, given: Condition) -> None:
        """What runs in one mode alone; modules that are asked in there must have the flags of the trace."""
        trace, env = self.traces[side], self.env[side]
        if isinstance(item, _Scope):
            more = tuple((path, trace.flags[path]) for path in trace.asked.get(item.calls, ()))
            for inner in item.items:
                self._alone(side, inner, only, (*given, *(pair for pair in more if pair not in only)))
            return
        args, kwargs = map_arg((item.args, item.kwargs), partial(self._of, side))
        env[item] = new = self.graph.create_node(item.op, self._target(side, item), args, kwargs, item.name)
        new.meta = {**_meta(item), "only": only, **({"given": given} if given else {})}

    def _pair(self, a: fx.Node, b: fx.Node, deciders: tuple[str, ...]) -> None:
        args, kwargs = self._unified((a.args, a.kwargs), (b.args, b.kwargs), deciders)
        new = self.graph.create_node(a.op, a.target, args, kwargs, a.name, a.type)
        new.meta = _meta(a)
        self.env[0][a] = self.env[1][b] = new

    def _target(self, side: int, node: fx.Node) -> Any:
        return self.names[side].get(str(node.target), node.target)

    def _of(self, side: int, node: fx.Node) -> Any:
        """The merged graph's node for one of a trace; a parameter is read when it is first needed."""
        if node.op != "get_attr":
            return self.env[side][node]
        name = self._target(side, node)
        if name not in self.states:
            self.states[name] = new = self.graph.get_attr(name)
            new.meta = _meta(node)
        return self.states[name]

    def _unified(self, a: Any, b: Any, decides: Any, output: bool = False) -> Any:
        """An argument that is ``a`` in one trace, ``b`` in the other."""
        if type(a) is type(b) and isinstance(a, (list, tuple)) and len(a) == len(b):
            items = [self._unified(x, y, decides, output) for x, y in zip(a, b, strict=True)]
            return type(a)._make(items) if hasattr(a, "_make") else type(a)(items)
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self._unified(a[key], b[key], decides, output) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            ends = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
            return slice(*(self._unified(x, y, decides, output) for x, y in ends))
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and self._of(0, a) is self._of(1, b):
            return self._of(0, a)
        if type(a) is type(b) and not isinstance(a, fx.Node) and a == b:
            return a
        condition = decides if output else self._condition(decides)
        if type(a) is type(b) is bool and len(condition) == 1:
            ((path, flag),) = condition
            if flag is a:
                return self._flag(path)
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            self._refuse_other_shapes(condition, a, b)
        both = [map_arg(value, partial(self._of, side)) for side, value in ((0, a), (1, b))]
        return self.graph.call_function(either, (condition, *both))

    def _refuse_other_shapes(self, condition: Condition, a: fx.Node, b: fx.Node) -> None:
        """Refuse what is of one shape in one mode and of another in the other, as far as shapes are known."""
        seen = [trace.shape(node) for trace, node in zip(self.traces, (a, b), strict=True)]
        if None in seen:
            return
        (these, _), (others, _) = seen
        for pair in zip(these, others, strict=False):
            if all(isinstance(leaf, tuple) for leaf in pair):  # tensors
                either(condition, *(torch.empty(s, dtype=dtype, device="meta") for s, dtype in pair))

    def _flag(self, owner: str) -> fx.Node:
        path = f"{owner}.training_flag" if owner else "training_flag"
        added = self.traces[0].added
        if path not in added:
            added[path] = TrainingFlag().train(self.traces[0].flags[owner])
        return self.graph.call_module(path)


def _scopes(graph: fx.Graph) -> _Scope:
    """The calls of a trace; parameters are left out, as it makes no difference when they are read."""
    root = _Scope(())
    stack = [root]
    for node in graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        calls = node.meta.get("calls", ())
        while stack[-1].calls != calls[: len(stack[-1].calls)]:
            stack.pop()
        for depth in range(len(stack[-1].calls), len(calls)):
            scope = _Scope(calls[: depth + 1])
            stack[-1].items.append(scope)
            stack.append(scope)
        stack[-1].items.append(node)
    return root


def _meta(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key != "calls"}


def same_module(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of ours do the same."""
    if isinstance(a, Pack) and isinstance(b, Pack):
        return a.structure == b.structure and a.state == b.state
    return type(a) is type(b) and getattr(a, "function", None) is getattr(b, "function", None)


def same_constant(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are one, or hold the same values, as far as these are known."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
                      and a.device.type != "meta" and equal(a, b))  # fmt: skip


__all__ = ["Trace", "merge", "same_constant", "same_in_both", "same_module"]
