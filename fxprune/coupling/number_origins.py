"""What the numbers that a graph computes from sizes depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..nodes import operator_name
from .units import Value

NUMBERS = (int, float)
FREE = "free"
"""What a size is that may vary between runs."""


class NumberOrigins:
    """Says of numbers in a graph, and of the shapes that it reads, which sizes they are computed from.

    Args:
        tree: what a node gives, a tree of :class:`Value` and numbers; None where that is not known.
        kind: what a dimension of a value is: :data:`FREE`, or another word.
    """

    def __init__(self, tree: Callable[[fx.Node], Any], kind: Callable[[Value, int], str]) -> None:
        self._tree = tree
        self._kind = kind
        self._known: dict[str, tuple[str, ...]] = {}

    def of(self, node: fx.Node) -> tuple[str, ...] | None:
        """The kinds of size behind a number, or behind each entry of a shape; None for anything else."""
        if node.name not in self._known:
            result = self._tree(node)
            kinds = self._of_shape(node)
            if kinds is None:
                if not isinstance(result, NUMBERS) or isinstance(result, bool):
                    return None
                inputs = node.all_input_nodes
                of_inputs = [self.of(n) for n in inputs]
                if node.op == "placeholder":
                    kinds = (FREE,)
                elif operator_name(node) == "getitem" and of_inputs[0] and isinstance(node.args[1], int):
                    kinds = (of_inputs[0][node.args[1]],)
                else:
                    kinds = tuple(k for found in of_inputs for k in found or (FREE,))
            self._known[node.name] = kinds
        return self._known[node.name]

    def _of_shape(self, node: fx.Node) -> tuple[str, ...] | None:
        """Of the sizes that a node reads off a tensor."""
        name = operator_name(node)
        if name not in ("size", "sym_size", "getattr", "numel", "sym_numel", "len") or not node.args:
            return None
        read: Any = node.args[0]
        value = self._tree(read) if isinstance(read, fx.Node) else None
        if not isinstance(value, Value) or (name == "getattr" and node.args[1] != "shape"):
            return None
        kinds = [self._kind(value, dim) for dim in range(len(value.shape))]
        if name in ("size", "sym_size") and len(node.args) > 1 and isinstance(node.args[1], int):
            return (kinds[node.args[1]],)
        return tuple(kinds[:1] if name == "len" else kinds)


__all__ = ["FREE", "NUMBERS", "NumberOrigins"]
