"""A ``torch.fx`` graph as plain data, which is how a result is pickled.

``torch.fx`` itself pickles a graph as source code and traces that code to read it back; what the code
computes from buffers or numbers alone would then be computed once and for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import _get_qualified_name, map_aggregate


@dataclass(frozen=True)
class _Place:
    """Stands for a node among the arguments of another one."""

    name: str


@dataclass(frozen=True)
class _Named:
    """Stands for a function that is found under a name, as operators and overloaded functions are."""

    name: str

    def find(self) -> Callable[..., Any]:
        path, _, rest = self.name.rpartition(".")
        attributes = [rest]
        while path:
            try:
                found: Any = importlib.import_module(path)
                break
            except ImportError:
                path, _, attribute = path.rpartition(".")
                attributes.insert(0, attribute)
        else:
            found = importlib.import_module("builtins")
        for attribute in attributes:
            found = getattr(found, attribute)
        return found

    @classmethod
    def of(cls, function: Any) -> Any:
        """``function`` itself where it has no such name: it is then pickled as Python pickles functions."""
        try:
            named = cls(_get_qualified_name(function))
            return named if named.find() is function else function
        except (AttributeError, ImportError, RuntimeError, TypeError):
            return function


MODES = ("only", "given", "because")
"""Node metadata that says in which mode a node runs (see :mod:`fxprune.modes`)."""


def record(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes as ``(op, name, target, args, kwargs, modes)``; :func:`replay` makes a graph of them."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return _Place(argument.name)
        return _Named.of(argument) if callable(argument) else argument

    return [
        (
            node.op,
            node.name,
            plain(node.target),
            map_aggregate(node.args, plain),
            map_aggregate(node.kwargs, plain),
            {key: node.meta[key] for key in MODES if key in node.meta},
        )
        for node in graph.nodes
    ]


def replay(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph of which ``nodes`` is the :func:`record`."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def live(argument: Any) -> Any:
        if isinstance(argument, _Place):
            return made[argument.name]
        return argument.find() if isinstance(argument, _Named) else argument

    for op, name, target, args, kwargs, modes in nodes:
        made[name] = graph.create_node(
            op, live(target), map_aggregate(args, live), map_aggregate(kwargs, live), name
        )
        made[name].meta.update(modes)
    return graph


__all__ = ["record", "replay"]
