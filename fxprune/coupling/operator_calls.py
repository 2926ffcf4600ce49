"""The ATen calls of a run, and whether those of another run couple the same.

How a network couples at other sizes of its inputs can be seen from shapes alone, as long as no dimension with
labels is among those whose sizes differ, or is taken apart or put together with one of them. Where it is, the
labels have to be looked at again (see :mod:`.other_sizes`). In doubt, calls are not taken to be alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import FxpruneError
from .registry import CUSTOM, rule_for
from .roles import factor
from .units import Value

Follow = Callable[[fx.Node | None, Any, Any, Any, Any], None]
"""Called as ``follow(node, operator, args, kwargs, out)`` after an ATen call; the operator is None for a
module with a rule of its own."""

_RESHAPES = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy"])
_BY_ONE = frozenset(["slice", "select"])
"""Movements along one dimension, the second argument."""
_TO_SIZES = ("expand", "upsample", "_upsample")
"""What is given the sizes of its result, and leaves dimensions apart."""


class UnlikeError(FxpruneError):
    """A call couples otherwise than in the run that is followed, or may do."""


class OperatorCalls:
    """The calls of a run, with what is known of their tensors."""

    def __init__(self) -> None:
        self.made: list[tuple[fx.Node | None, Any, Any]] = []

    def note(self, node: fx.Node | None, operator: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Remember a call of this run."""
        self.made.append((node, operator, _values((args, kwargs, out))))

    def follow(self) -> Follow:
        """What another run has to call: it raises UnlikeError at the first call that is not alike.

        The last one is missing if the other run makes fewer calls; nodes are the same, so it makes none.
        """
        rest = iter(self.made)

        def follow(node: fx.Node | None, operator: Any, args: Any, kwargs: Any, out: Any) -> None:
            before, called, known = next(rest, (None, None, None))
            if node is not before or operator is not called or known is None:
                raise UnlikeError("another operator")
            _Pair(operator, known, (args, kwargs, out)).check()

        return follow


def _values(tree: Any) -> Any:
    """A tree of arguments with what is known of each tensor in its place."""
    if isinstance(tree, torch.Tensor):
        known = getattr(tree, "_fxprune_value", None)
        return Value(tuple(tree.shape), [None] * tree.dim()) if known is None else known
    if isinstance(tree, (tuple, list)):
        return [_values(part) for part in tree]
    if isinstance(tree, dict):
        return {key: _values(part) for key, part in tree.items()}
    return tree


class _Pair:
    """One call, as it was in the first run, and as it is in the other."""

    def __init__(self, operator: Any, known: Any, tree: Any) -> None:
        self.operator = operator
        self.tensors: list[tuple[Value, torch.Tensor]] = []
        self.same_rest = True
        self.known = known
        self._walk(known, tree)

    def _walk(self, a: Any, b: Any) -> None:
        if isinstance(a, Value):
            if not isinstance(b, torch.Tensor) or len(a.shape) != b.dim():
                raise UnlikeError("another number of dimensions")
            self.tensors.append((a, b))
        elif isinstance(a, (list, dict)):
            if len(a) != len(b):
                self.same_rest = False
                return
            parts = zip(a, b, strict=True) if isinstance(a, list) else ((a[key], b.get(key)) for key in a)
            for x, y in parts:
                self._walk(x, y)
        else:
            self.same_rest &= a is b or (type(a) is type(b) and bool(a == b))

    def check(self) -> None:
        """Raises UnlikeError unless labels go the same way in both."""
        sized = any(value.shape != tuple(tensor.shape) for value, tensor in self.tensors)
        if not sized and self.same_rest:
            return
        rule = rule_for(self.operator) if self.operator is not None else None
        if rule is None or rule.family == CUSTOM:
            raise UnlikeError("an operator of which nothing is known")
        name = self.operator._schema.name.partition("::")[2]
        for value, tensor in self.tensors:
            for dim, size in enumerate(value.shape):
                if size != tensor.shape[dim] and _labelled(value, dim):
                    raise UnlikeError("a dimension with labels has another size")
        if rule.family == "pointwise":
            self._broadcast()
        elif not all(tensor.is_meta for _, tensor in self.tensors):
            raise UnlikeError("values that may depend on sizes")
        if name in _RESHAPES:
            self._reshaped()
        elif name in _BY_ONE:
            self._along_one()
        elif not self.same_rest and rule.family != "constants" and not name.startswith(_TO_SIZES):
            raise UnlikeError("another number")

    def _broadcast(self) -> None:
        """Where a dimension is 1 in one run and more in the other, it may not meet labels."""
        result = max((value for value, _ in self.tensors), key=lambda value: len(value.shape))
        for value, tensor in self.tensors:
            shift = len(result.shape) - len(value.shape)
            for dim, size in enumerate(value.shape):
                if size != tensor.shape[dim] and 1 in (size, tensor.shape[dim]):
                    met = [(other, dim + shift - len(result.shape)) for other, _ in self.tensors]
                    if any(-at <= len(other.shape) and _labelled(other, at) for other, at in met):
                        raise UnlikeError("an entry that is spread over labels")

    def _reshaped(self) -> None:
        """Labels may be put together with, and taken apart into, the same dimensions alone."""
        (value, tensor), (result, out) = self.tensors
        if _groups(value, value.shape, result.shape) != _groups(value, tensor.shape, out.shape):
            raise UnlikeError("labels together with other dimensions")

    def _along_one(self) -> None:
        """A slice with other ends, or another index, may not be one of labels."""
        value, tensor = self.tensors[0]
        dim = (*self.known[0], 0)[1]
        at = dim % max(len(value.shape), 1)
        same = self.same_rest and value.shape[at] == tensor.shape[at]
        if not same and (_labelled(value, at) or value.state is not None):
            raise UnlikeError("another part of labels")


def _labelled(value: Value, dim: int) -> bool:
    """Whether a dimension has a label, or chooses the row of one."""
    dim %= len(value.shape)
    labels = [value.label(d) for d in range(len(value.shape))]
    return labels[dim] is not None or any(label is not None and dim in label.over for label in labels)


def _groups(value: Value, before: Sequence[int], after: Sequence[int]) -> list[Any]:
    """The groups of dimensions with labels that a reshape factors into, with their sizes."""
    return [
        (ins, outs, [before[d] for d in ins], [after[d] for d in outs])
        for ins, outs in factor(before, after)
        if any(_labelled(value, d) for d in ins)
    ]


__all__ = ["Follow", "OperatorCalls", "UnlikeError"]
