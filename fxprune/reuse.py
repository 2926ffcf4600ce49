"""Which analysis a plan came from, so that what follows (apply, verify, masks, ...) need not repeat it.

The last few analyses are kept as long as their models live, and are used again only while the model is what
it was: a number in a module that has changed, another parameter in place of one, a hook or a rule more, and
it is analysed anew.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .coupling.graph import CouplingGraph
from .coupling.registry import custom_rules
from .module_registry import leaf_registrations
from .passes import Rewritten
from .planning.plan import PruningPlan
from .program import named_modules
from .region_program import RegionProgram

_MOST = 4
"""How many analyses are kept."""


@dataclass(eq=False)
class _Analysis:
    """An analysis, what the model looked like then, and what was last rewritten by it."""

    graph: CouplingGraph
    state: Any
    rewritten: Rewritten | None
    removed: Mapping[str, list[int]]


@dataclass
class _Analyses:
    lock: threading.Lock = field(default_factory=threading.Lock)
    by_graph: dict[int, tuple[weakref.ref[nn.Module], _Analysis]] = field(default_factory=dict)
    """By the identity of an analysis its model, and itself: other plans of the model may have others."""


_analyses = _Analyses()


def link(made: PruningPlan, model: nn.Module, graph: CouplingGraph, rewritten: Rewritten) -> None:
    """Note that ``made`` came from ``graph``, the analysis of ``model``."""
    if isinstance(graph.captured.program, RegionProgram):
        return  # it holds the model, which would live as long as its analysis
    analysis = _Analysis(graph, _state(model), rewritten, made.removed)
    key = id(graph)

    def forget(gone: weakref.ref[nn.Module]) -> None:
        entry = _analyses.by_graph.get(key)
        if entry is not None and entry[0] is gone:
            del _analyses.by_graph[key]

    with _analyses.lock:
        _analyses.by_graph.pop(key, None)
        _analyses.by_graph[key] = weakref.ref(model, forget), analysis
        while len(_analyses.by_graph) > _MOST:
            del _analyses.by_graph[next(iter(_analyses.by_graph))]
    made.come_from(weakref.ref(graph))


def analysis_of(made: PruningPlan, model: nn.Module) -> CouplingGraph | None:
    """The analysis of ``model`` that ``made`` came from, if it is there and still holds."""
    found = _found(made, model)
    return found.graph if found is not None else None


def rewritten_by(made: PruningPlan, model: nn.Module) -> Rewritten | None:
    """What ``made`` rewrote when it was made, as :func:`analysis_of`. It is given once."""
    found = _found(made, model)
    if found is None or found.removed != made.removed:
        return None
    rewritten, found.rewritten = found.rewritten, None
    return rewritten


def _found(made: PruningPlan, model: nn.Module) -> _Analysis | None:
    entry = _analyses.by_graph.get(id(made.came_from()))
    if entry is None or entry[0]() is not model:
        return None
    return entry[1] if entry[1].state == _state(model) else None


def _state(model: nn.Module) -> Any:
    """All that a capture of ``model`` may depend on, but for the values of its parameters."""
    look = _Look()
    modules = [(path, id(module), look.attributes(module)) for path, module in named_modules(model)]
    return modules, look.seen, custom_rules(), leaf_registrations()


_PLAIN = frozenset([type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size])
_DEEPEST = 8


class _Look:
    """Describes objects by their identity and by what is in them."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        """By identity of an object what is in it, so that what many modules share is looked at once."""

    def attributes(self, module: nn.Module) -> Any:
        """What a module holds itself."""
        own = module.__dict__
        found: list[Any] = [type(module), *own]
        for name, value in own.items():
            if value.__class__ in _PLAIN:
                found.append(value)
            elif value.__class__ in (dict, OrderedDict, set, tuple) and not value:  # most tables of hooks
                found.append(None)
            elif name in ("_parameters", "_buffers"):
                found += [(key, self._tensor(t, name == "_buffers")) for key, t in value.items()]
            elif name == "_modules":
                found += [(key, id(child)) for key, child in value.items()]
            elif name != "meta" or not isinstance(module, fx.GraphModule):
                found.append(self._value(value, 0))
        return found

    @staticmethod
    def _tensor(tensor: torch.Tensor | None, values: bool) -> Any:
        if tensor is None:
            return None
        version = tensor._version if values and not tensor.is_inference() else 0
        return id(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, version

    def _value(self, value: Any, depth: int) -> Any:
        kind = value.__class__
        if kind in _PLAIN:
            return value
        if kind is tuple and all(item.__class__ in _PLAIN for item in value):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, True)
        if isinstance(value, (nn.Module, type)) or depth > _DEEPEST:
            return id(value)
        if id(value) not in self.seen:
            self.seen[id(value)] = None
            self.seen[id(value)] = self._inside(value, depth + 1)
        return id(value)

    def _inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, fx.Graph):
            return [(n.name, n.op, id(n.target), id(n.args), id(n.kwargs)) for n in value.nodes]
        if isinstance(value, dict):
            return [(self._value(k, depth), self._value(v, depth)) for k, v in value.items()]
        if isinstance(value, (list, tuple)):
            return [self._value(item, depth) for item in value]
        if isinstance(value, (set, frozenset)):
            return {item if item.__class__ in _PLAIN else id(item) for item in value}
        own = getattr(value, "__dict__", None)
        return self._inside(own, depth) if isinstance(own, dict) else None


__all__ = ["analysis_of", "link", "rewritten_by"]
