"""The ATen calls of a run, and whether those of another run couple the same.

How a network couples at other sizes of its inputs can be seen from shapes alone, as long as no dimension with
labels is among those whose sizes differ, or is taken apart or put together with one of them. Where it is, the
labels have to be looked at again (see :mod:`.other_sizes`). In doubt, calls are not taken to be alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import FxpruneError
from .coupler import Coupler
from .groups import Mask
from .registry import CUSTOM, rule_for
from .roles import factor
from .units import FIXED, Value

Follow = Callable[[fx.Node | None, Any, Any, Any, Any], None]
"""Called as ``follow(node, operator, args, kwargs, out)`` after an ATen call; the operator is None for a
module with a rule of its own."""

_RESHAPES = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy"])
_BY_ONE = frozenset(["slice", "select"])
"""Movements along one dimension, the second argument."""
_ENTRY_BY_ENTRY = frozenset(
    ["bmm", "baddbmm", "transpose", "permute", "unsqueeze", "clone", "_to_copy", "alias", "detach",
     "_softmax", "_safe_softmax", "_log_softmax"]
)  # fmt: skip
"""What treats the entries of a batch one by one, however many there are."""
_PASSING = frozenset(["clone", "alias", "detach", "slice"])
"""What leaves labels as they are: copies, views, and some of the entries along a dimension without any."""
_TO_SIZES = ("expand", "upsample", "_upsample")
"""What is given the sizes of its result, and leaves dimensions apart."""


_Group = tuple[list[int], list[int], list[int], list[int]]
"""Dimensions before and after a reshape, and their sizes."""


class UnlikeError(FxpruneError):
    """A call couples otherwise than in the run that is followed, or may do."""


class OperatorCalls:
    """The calls of a run, with what is known of their tensors."""

    def __init__(self) -> None:
        self.made: list[tuple[fx.Node | None, Any, Any]] = []

    def note(self, node: fx.Node | None, operator: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Remember a call of this run."""
        self.made.append((node, operator, _values((args, kwargs, out))))

    def follow(self, run: Coupler) -> Follow:
        """What another run has to call: it raises UnlikeError at the first call that is not alike.

        The last one is missing if the other run makes fewer calls; nodes are the same, so it makes none.

        Args:
            run: what the noted calls have led to.
        """
        idle = functools.cache(partial(_idle, run))
        following = _Following(self.made, idle)
        return following.call


class _Following:
    """Holds the calls of a run against those of another one, ``made``."""

    def __init__(
        self, made: Sequence[tuple[fx.Node | None, Any, Any]], idle: Callable[[], Mask | None]
    ) -> None:
        self.made = made
        self.next = 0
        self.idle = idle
        self.writes = any(operator is not None and operator._schema.is_mutable for _, operator, _ in made)

    def call(self, node: fx.Node | None, operator: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A call of the run that follows."""
        place = self.next
        while not self._is_next(place, node, operator) and self._left(place):
            place += 1
        if not self._is_next(place, node, operator):
            if self._leaves(operator, args, out):
                return
            raise UnlikeError("another operator")
        _, _, known = self.made[place]
        self.next = place + 1
        _Pair(operator, known, (args, kwargs, out), self.idle).check()

    def _is_next(self, place: int, node: fx.Node | None, operator: Any) -> bool:
        """Whether the first run made the same call there."""
        if place >= len(self.made) or self.made[place][0] is not node:
            return False
        called = self.made[place][1]
        return operator is called or (_name(operator) in _RESHAPES and _name(called) in _RESHAPES)

    def _leaves(self, operator: Any, args: Any, out: Any) -> bool:
        """Whether a call of this run leaves labels as they are; then its result has those of its input."""
        if not _may_pass(operator):
            return False
        value = getattr(args[0], "_fxprune_like", None)
        if value is None or (_name(operator) == "slice" and not self._is_plain_slice(value, args)):
            return False
        if out is not args[0]:
            labels = [value.label(dim) for dim in range(len(value.shape))]
            out._fxprune_like = Value(tuple(out.shape), labels, dtype=value.dtype)
        return True

    def _left(self, place: int) -> bool:
        """Whether a call of the first run, which this one does not make, leaves labels as they are.

        Into a copy one may write, without writing into what it is of.
        """
        if place >= len(self.made):
            return False
        _, operator, known = self.made[place]
        name = _name(operator)
        if not _may_pass(operator) or (name == "clone" and self.writes):
            return False
        return name != "slice" or self._is_plain_slice(known[0][0], known[0])

    def _is_plain_slice(self, value: Value, args: Sequence[Any]) -> bool:
        dim = args[1] if len(args) > 1 else 0
        return value.state is None and not _labelled(_without_idle(value, self.idle), dim)


@functools.cache
def _name(operator: Any) -> str:
    """The operator's name without its library's; "" for a module with a rule of its own."""
    return "" if operator is None else str(operator._schema.name).partition("::")[2]


def _may_pass(operator: Any) -> bool:
    """Whether an operator may leave labels as they are, if no rule of a user's says otherwise."""
    rule = rule_for(operator) if _name(operator) in _PASSING else None
    return rule is not None and rule.family != CUSTOM


def _idle(run: Coupler) -> Mask | None:
    """For each unit whether it is of tables alone that stay as they are, and that meet nothing narrower.

    A dimension of such units, with or without some that are fixed, might as well have no label. None where
    there are no tables.
    """
    if not run.whole.size:
        return None
    idle: Mask = np.zeros(run.units.count, dtype=bool)
    roots = run.units.roots()
    idle[roots[run.whole]] = True
    for use in (use for noted in run.table_uses.values() for use in noted):
        idle[roots[use.units]] = False
    idle[FIXED] = True
    return idle[roots]


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

    def __init__(self, operator: Any, known: Any, tree: Any, idle: Callable[[], Mask | None]) -> None:
        self.operator = operator
        self.idle = idle
        self.tensors: list[tuple[Value, torch.Tensor]] = []
        self.same_rest = True
        self.known, self.tree = known, tree
        self._walk(known, tree)

    def _walk(self, a: Any, b: Any) -> None:
        if isinstance(a, Value):
            if not isinstance(b, torch.Tensor) or len(a.shape) != b.dim():
                raise UnlikeError("another number of dimensions")
            b._fxprune_like = a  # type: ignore[attr-defined]
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
        name = _name(self.operator)
        self.tensors = [(_without_idle(value, self.idle), tensor) for value, tensor in self.tensors]
        repeated = False
        for value, tensor in self.tensors:
            for dim, size in enumerate(value.shape):
                if size != tensor.shape[dim] and _labelled(value, dim):
                    if not _repeats(value, dim, math.gcd(size, tensor.shape[dim])):
                        raise UnlikeError("a dimension with labels has another size")
                    repeated = True
        if repeated and rule.family != "pointwise" and name not in _RESHAPES | _ENTRY_BY_ENTRY:
            raise UnlikeError("labels that are repeated more often")
        if rule.family == "pointwise":
            self._broadcast()
        elif not all(tensor.is_meta for _, tensor in self.tensors):
            raise UnlikeError("values that may depend on sizes")
        if name in _RESHAPES:
            self._reshaped()
        elif name in _BY_ONE:
            self._along_one()
        elif name == "constant_pad_nd":
            self._padded()
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
        """Labels may be put together with, and taken apart into, the same dimensions alone; or be repeated
        for each entry of one in front of them, as heads are for each sample.
        """
        (value, tensor), (result, out) = self.tensors
        same = _groups(value, value.shape, result.shape)
        apart = [(ins, outs) for ins, outs, *_ in same]
        for group in _groups(value, tensor.shape, out.shape):
            ins = [d for d in group[0] if value.shape[d] != 1]
            outs = [d for d in group[1] if result.shape[d] != 1]
            if group not in same and ((ins, outs) not in apart or not _in_front(value, result, group)):
                raise UnlikeError("labels together with other dimensions")

    def _along_one(self) -> None:
        """A slice with other ends, or another index, may not be one of labels."""
        value, tensor = self.tensors[0]
        dim = (*self.known[0], 0)[1]
        at = dim % max(len(value.shape), 1)
        same = self.same_rest and value.shape[at] == tensor.shape[at]
        if not same and (_labelled(value, at) or value.state is not None):
            raise UnlikeError("another part of labels")

    def _padded(self) -> None:
        """Labels may be padded by the same, and with the same."""
        (_, before, *filled), (_, after, *number) = self.known[0], self.tree[0]
        value = self.tensors[0][0]
        places = range(len(value.shape))
        amounts = [[(*given, *[0] * 2 * len(places))[2 * k : 2 * k + 2] for k in places]
                   for given in (before, after)]  # fmt: skip
        changed = [at for at in places if amounts[0][~at] != amounts[1][~at]]
        if filled != number or any(_labelled(value, at) for at in changed):
            raise UnlikeError("other padding")


def _without_idle(value: Value, idle: Callable[[], Mask | None]) -> Value:
    """What is known of a tensor but for idle labels; all, where it may still meet something."""
    mask = idle()
    if mask is None:
        return value
    dims = range(len(value.shape))
    labels = [value.label(d) for d in dims]
    alone = [label is not None and bool(mask[label.ids].all()) for label in labels]
    if not any(alone) or any(map(value.is_open, dims)):
        return value
    left = [None if out else label for label, out in zip(labels, alone, strict=True)]
    return Value(value.shape, left, dtype=value.dtype)


def _labelled(value: Value, dim: int) -> bool:
    """Whether a dimension has a label, or chooses the row of one."""
    dims = range(len(value.shape))
    dim %= len(value.shape)
    return value.label(dim) is not None or any(
        label is not None and dim in label.over for label in map(value.label, dims)
    )


def _repeats(value: Value, dim: int, period: int) -> bool:
    """Whether the labels of a dimension, and those that are over it, are the same again every ``period``."""
    for place in range(len(value.shape)):
        label = value.label(place)
        if label is None or not (place == dim or dim in label.over):
            continue
        ids = np.moveaxis(label.ids, -1 if place == dim else label.over.index(dim), 0)
        blocks = ids.reshape(-1, period, *ids.shape[1:])
        if (blocks != blocks[:1]).any():
            return False
    return True


def _in_front(value: Value, result: Value, group: _Group) -> bool:
    """Whether in a group of dimensions of a reshape only the first ones have other sizes than in ``group``,
    along which labels repeat themselves, before and after.

    Such labels are the same, more often or less. The group is that of the other run: dimensions of ``value``
    and of ``result``, and their sizes there.
    """
    ins, outs, before, after = group
    rest, made = ([shape[d] for d in dims[1:]] for shape, dims in ((value.shape, ins), (result.shape, outs)))
    if rest != before[1:] or made != after[1:] or value.state is not None or any(map(value.is_open, ins)):
        return False
    inner, columns = math.prod(rest), math.prod(made)
    size, other = value.shape[ins[0]], before[0]
    period = 1
    if _labelled(value, ins[0]):
        row = columns // inner  # of the first dimension, in one entry of the first one of the result
        whole = row * inner == columns and size % row == 0 and other % row == 0
        period = row if whole and _repeats(value, ins[0], row) else math.gcd(size, other)
        if not _repeats(value, ins[0], period):
            return False
    return (period * inner) % columns == 0 or columns % (period * inner) == 0


def _groups(value: Value, before: Sequence[int], after: Sequence[int]) -> list[_Group]:
    """The groups of dimensions with labels that a reshape factors into, with their sizes."""
    return [
        (ins, outs, [before[d] for d in ins], [after[d] for d in outs])
        for ins, outs in factor(before, after)
        if any(_labelled(value, d) for d in ins)
    ]


__all__ = ["Follow", "OperatorCalls", "UnlikeError"]
