"""How an analysis is pickled: with the model that it was made of, and its graph as plain data."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import fx

from ..graph_record import record, replay

_META = ("source", "origins", "region", "linked", "reason", "number", "module")
"""What of the nodes' metadata the analysis, and what follows it, look at."""


def dumps(state: Mapping[str, Any]) -> bytes:
    """The attributes of an analysis as bytes.

    Raises:
        PicklingError, AttributeError: for what cannot be pickled, such as modules of a class in a function.
    """
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(dict(state))
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Nodes go by name, with their graph; the graph goes without its source code."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, fx.Graph):
            metas = {
                node.name: {key: node.meta[key] for key in _META if key in node.meta} for node in value.nodes
            }
            return replay, (record(value),), metas, None, None, _set_metas
        if isinstance(value, fx.Node):
            return _node, (value.graph, value.name)
        return NotImplemented


def _set_metas(graph: fx.Graph, metas: Mapping[str, Mapping[str, Any]]) -> None:
    for node in graph.nodes:
        node.meta.update(metas.get(node.name, {}))


def _node(graph: fx.Graph, name: str) -> fx.Node:
    known: dict[str, fx.Node] = graph.__dict__.setdefault("_fxprune_nodes", {})
    if not known:
        known.update((node.name, node) for node in graph.nodes)
    return known[name]


__all__ = ["dumps"]
