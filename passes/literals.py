"""Numbers that are written into the graph: sizes of views, bounds of slices, parts of splits.

The narrowed shapes are known from the labels, so literals are read off, not guessed. Each function below
takes a node of one operator and returns its new ``(args, kwargs)``, or None to leave it as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

from .. import convolution
from ..coupling.number_origins import FREE
from ..coupling.units import Label, Value
from ..nn import multi_head_attention
from ..nodes import operator_name
from ..program import Program
from .base import Narrowing, Pass, editable
from .constants import computed, origins, scale

Call = tuple[tuple[Any, ...], dict[str, Any]]
Edit = Callable[[fx.Node, Narrowing], Call | None]
_EDITS: dict[str, Edit] = {}
_AS_SPLIT = frozenset(["chunk", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"])
"""Operators that become a plain split with sizes."""


@dataclass(frozen=True)
class RewriteLiterals(Pass):
    """Replace literals that no longer hold."""

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return [node.name for node in program.graph.nodes if _edited(node, narrowing) is not None]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = editable(program, narrowing)
        for site in sites:
            node = nodes[site]
            edited = _edited(node, narrowing)
            if edited is None:
                continue
            with graph.inserting_before(node):
                args, kwargs = map_aggregate(edited, lambda item: _number(item, graph))
            node.args, node.kwargs = args, kwargs
            name, overload = operator_name(node), isinstance(node.target, torch._ops.OpOverload)
            if name in _AS_SPLIT or (overload and name == "split"):  # parts of unequal width are a split
                node.target = "split" if node.op == "call_method" else torch.split
            elif overload and name == "squeeze":  # one or all dimensions become several
                node.target = torch.squeeze
        return replace(program, graph=graph)


@dataclass(frozen=True)
class _Scaled:
    """The number that ``node`` computes (batch x heads, say), times ``new / old``."""

    node: fx.Node
    new: int
    old: int


@dataclass(frozen=True)
class _Entry:
    """One of the sizes that ``node`` computes."""

    node: fx.Node
    place: int

    def varies(self, narrowing: Narrowing) -> bool:
        """Whether it may be another one in each run."""
        kinds = origins(narrowing).of(self.node)
        return kinds is None or kinds[self.place] == FREE


def _number(item: Any, graph: fx.Graph) -> Any:
    """A node for a :class:`_Scaled` number or an :class:`_Entry`; anything else as it is."""
    if isinstance(item, _Entry):
        return graph.call_function(operator.getitem, (item.node, item.place))
    return scale(graph, item.node, item.new, item.old) if isinstance(item, _Scaled) else item


def _edited(node: fx.Node, narrowing: Narrowing) -> Call | None:
    edit = _EDITS.get(operator_name(node))
    if edit is None:
        return None
    call = edit(node, narrowing)
    return None if call is None or call == (node.args, dict(node.kwargs)) else call


def _edits(*names: str) -> Callable[[Edit], Edit]:
    def register(edit: Edit) -> Edit:
        for name in names:
            _EDITS[name] = edit
        return edit

    return register


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _with(node: fx.Node, position: int, name: str, value: Any) -> Call:
    """The node's call with one argument replaced (given by position or by name)."""
    if len(node.args) > position:
        return (*node.args[:position], value, *node.args[position + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: value}


def _numbers(node: fx.Node, *names: str) -> tuple[Any, Callable[[Sequence[Any]], Call]]:
    """The numbers after a node's tensor, by name, in one sequence or one by one; and the call with others."""
    first, rest, kwargs = node.args[:1], node.args[1:], dict(node.kwargs)
    named = [name for name in names if name in kwargs]
    if named:
        return kwargs[named[0]], lambda new: (node.args, {**kwargs, named[0]: tuple(new)})
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        return rest[0], lambda new: ((*first, tuple(new)), kwargs)
    return rest, lambda new: ((*first, *new), kwargs)


def _sizes(old: Sequence[Any], value: Value, narrowing: Narrowing, first: int = 0) -> list[Any]:
    """``old`` with the extent of every narrowed dimension of ``value`` filled in; -1 stays."""
    new = list(old)
    for place, size in enumerate(old):
        label = value.label(first + place)
        if isinstance(size, _Entry) and size.varies(narrowing):
            continue
        if label is not None and size != -1 and narrowing.narrows(label):
            new[place] = wanted = narrowing.size(value, first + place)
            if isinstance(size, fx.Node) and FREE in (origins(narrowing).of(size) or ()):
                given = computed(size, narrowing, {})  # it may vary between runs, so it stays computed
                if isinstance(given, int) and given > 0:
                    new[place] = size if given == wanted else _Scaled(size, wanted, given)
    return new


@_edits("view", "reshape", "expand", "_unsafe_view", "broadcast_to", "view_copy", "_reshape_copy")
def _view(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node)
    if value is None or not narrowing.changed(node):
        return None
    sizes, given = _numbers(node, "shape", "size")
    whole = sizes[0] if isinstance(sizes, (list, tuple)) and len(sizes) == 1 else sizes
    if isinstance(whole, fx.Node) and isinstance(narrowing.tree(whole.name), tuple):
        if computed(whole, narrowing, {}) == narrowing.shape(value):
            return None  # follows by itself
        sizes = _entries(whole, narrowing)
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(value.shape):
        return None  # a dtype
    return given(_sizes(sizes, value, narrowing))


def _entries(sizes: Any, narrowing: Narrowing) -> list[Any]:
    """The entries of a shape that is put together in the graph: ``x.size()[:-1] + (192,)``."""
    if not isinstance(sizes, fx.Node):
        return list(sizes)
    name = operator_name(sizes)
    if name == "add":
        return _entries(sizes.args[0], narrowing) + _entries(sizes.args[1], narrowing)
    if name == "getitem" and isinstance(sizes.args[1], slice):
        return _entries(sizes.args[0], narrowing)[sizes.args[1]]
    return [_Entry(sizes, place) for place in range(len(narrowing.tree(sizes.name)))]


@_edits("unflatten")
def _unflatten(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node)
    source = narrowing.value(node.args[0])
    dim, sizes = _argument(node, 1, "dim"), _argument(node, 2, "sizes")
    if value is None or source is None or not isinstance(sizes, (list, tuple)) or not isinstance(dim, int):
        return None
    return _with(node, 2, "sizes", tuple(_sizes(sizes, value, narrowing, dim % len(source.shape))))


@_edits("zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty", "full", "new_full")
def _factory(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node)
    if value is None or not narrowing.changed(node):
        return None
    at = 1 if node.op == "call_method" or operator_name(node).startswith("new_") else 0
    sizes = _argument(node, at, "size")
    if isinstance(sizes, (list, tuple)):
        return _with(node, at, "size", tuple(_sizes(sizes, value, narrowing)))
    count = len(value.shape)
    new = _sizes(node.args[at : at + count], value, narrowing)
    return (*node.args[:at], *new, *node.args[at + count :]), dict(node.kwargs)


@_edits("new")
def _new(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """The ``new_empty`` of old, to which a list is no sizes but entries."""
    return None if isinstance(_argument(node, 1, "size"), (list, tuple)) else _factory(node, narrowing)


@_edits("repeat", "tile")
def _repeat(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """How often: one entry that stands for all channels, as often as some are left."""
    source, value = narrowing.value(node.args[0]), narrowing.value(node)
    if source is None or value is None:
        return None
    times, given = _numbers(node, "repeats", "dims")
    if not isinstance(times, (list, tuple)):
        return None
    places = range(-len(times), 0)
    return given([_times(times[place], source, value, place, narrowing) for place in places])


@_edits("repeat_interleave")
def _repeat_interleave(node: fx.Node, narrowing: Narrowing) -> Call | None:
    source, value = narrowing.value(node.args[0]), narrowing.value(node)
    dim, total = _argument(node, 2, "dim"), _argument(node, 3, "output_size")
    if source is None or value is None or not isinstance(dim, int):
        return None
    place = dim % len(value.shape) - len(value.shape)
    times = _times(_argument(node, 1, "repeats"), source, value, place, narrowing)
    args, kwargs = _with(node, 1, "repeats", times)
    if isinstance(total, int):
        kwargs["output_size"] = narrowing.size(value, place)
    return args[:3], kwargs


def _times(times: Any, source: Value, value: Value, place: int, narrowing: Narrowing) -> Any:
    """The number that says how often a dimension, counted from the last, is repeated."""
    old = narrowing.size(source, place) if len(source.shape) >= -place else 1
    new = narrowing.size(value, place)
    return new // old if isinstance(times, int) and old and new % old == 0 else times


@_edits("split", "split_with_sizes", "tensor_split", *_AS_SPLIT, "split_copy",
        "split_with_sizes_copy")  # fmt: skip
def _split(node: fx.Node, narrowing: Narrowing) -> Call | None:
    source, parts = narrowing.value(node.args[0]), narrowing.tree(node.name)
    if source is None or not isinstance(parts, (list, tuple)):
        return None
    dim = _argument(node, 2, "dim", 0)
    if not isinstance(dim, int) or not narrowing.narrows(source.label(dim % len(source.shape))):
        return None
    sizes = [narrowing.size(part, dim % len(source.shape)) for part in parts]
    name = next((k for k in ("split_size_or_sections", "split_size", "split_sizes", "chunks", "sections",
                             "indices_or_sections") if k in node.kwargs), "split_size")  # fmt: skip
    if operator_name(node) == "tensor_split":
        return _with(node, 1, name, tuple(np.cumsum(sizes)[:-1].tolist()))
    if operator_name(node) in _AS_SPLIT:
        return (node.args[0], sizes), {"dim": dim}
    return _with(node, 1, name, sizes)


def _before(narrowing: Narrowing, label: Label | None, index: int) -> int:
    """How many indices before ``index`` survive."""
    if label is None or not narrowing.narrows(label):
        return index
    return int(narrowing.row(label)[:index].sum())


def _bounds(narrowing: Narrowing, value: Value, dim: int, item: slice) -> slice:
    label = value.label(dim)
    if label is None or item.step not in (None, 1) or narrowing.row(label).all():
        return item  # where whole rows go, this dimension stays as wide as the inputs make it
    if isinstance(item.start, fx.Node) or isinstance(item.stop, fx.Node):
        numbers = [narrowing.tree(b.name) if isinstance(b, fx.Node) else b for b in (item.start, item.stop)]
        item = slice(*numbers)
    start, stop, _ = item.indices(value.shape[dim])
    new_start = None if item.start is None else _before(narrowing, label, start)
    new_stop = None if item.stop is None else _before(narrowing, label, max(stop, start))
    return slice(new_start, new_stop, item.step)


@_edits("getitem", "setitem")
def _getitem(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node.args[0])
    if value is None:
        return None
    index = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(_consumes(item, narrowing) for item in items)
    dim = 0
    new: list[Any] = []
    for item in items:
        if item is Ellipsis:
            dim += len(value.shape) - used
        elif isinstance(item, slice):
            item = _bounds(narrowing, value, dim, item)
            dim += 1
        elif isinstance(item, int) and not isinstance(item, bool):
            label = value.label(dim)
            if narrowing.narrows(label):
                item = _before(narrowing, label, item % value.shape[dim])
            dim += 1
        else:
            dim += _consumes(item, narrowing)
        new.append(item)
    return (node.args[0], tuple(new) if isinstance(index, tuple) else new[0], *node.args[2:]), dict(
        node.kwargs
    )


def _consumes(item: Any, narrowing: Narrowing) -> int:
    """How many dimensions an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, fx.Node):
        value = narrowing.value(item)
        return len(value.shape) if value is not None and item.meta.get("mask") else 1
    return 1


@_edits("squeeze")
def _squeeze(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """Dimensions that become 1 wide are no longer meant."""
    value = narrowing.value(node.args[0])
    given = _argument(node, 1, "dim")
    if value is None:
        return None
    rank = len(value.shape)
    dims = range(rank) if given is None else [given] if isinstance(given, int) else given
    meant = [d for d in dims if value.shape[d] == 1 or narrowing.size(value, d % rank) > 1]
    return None if len(meant) == len(dims) else ((node.args[0], tuple(meant)), {})


@_edits("narrow")
def _narrow(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node.args[0])
    numbers = [_argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length"))]
    if value is None or not all(isinstance(number, int) for number in numbers):
        return None
    dim, start, length = numbers[0] % len(value.shape), numbers[1] % value.shape[numbers[0]], numbers[2]
    label = value.label(dim)
    if not narrowing.narrows(label):
        return None
    first = _before(narrowing, label, start)
    return (node.args[0], dim, first, _before(narrowing, label, start + length) - first), {}


@_edits("select")
def _select(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node.args[0])
    dim, index = _argument(node, 1, "dim"), _argument(node, 2, "index")
    if value is None or not isinstance(dim, int) or not isinstance(index, int):
        return None
    label = value.label(dim % len(value.shape))
    if not narrowing.narrows(label):
        return None
    return (node.args[0], dim, _before(narrowing, label, index % value.shape[dim])), {}


@_edits("slice", "slice_copy")
def _slice(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node.args[0])
    if value is None:
        return None
    dim = _argument(node, 1, "dim", 0) % len(value.shape)
    bounds = slice(*(_argument(node, i, name) for i, name in ((2, "start"), (3, "end"), (4, "step"))))
    new = _bounds(narrowing, value, dim, bounds)
    return None if new == bounds else ((node.args[0], dim, new.start, new.stop), {})


@_edits("slice_scatter", "select_scatter")
def _scatter(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node.args[0])
    if value is None:
        return None
    dim = _argument(node, 2, "dim", 0) % len(value.shape)
    if operator_name(node) == "select_scatter":
        index = _argument(node, 3, "index") % value.shape[dim]
        return (*node.args[:2], dim, _before(narrowing, value.label(dim), index)), {}
    bounds = slice(*(_argument(node, i, name) for i, name in ((3, "start"), (4, "end"), (5, "step"))))
    new = _bounds(narrowing, value, dim, bounds)
    return None if new == bounds else ((*node.args[:2], dim, new.start, new.stop), {})


@_edits("pad", "constant_pad_nd")
def _pad(node: fx.Node, narrowing: Narrowing) -> Call | None:
    source, value = narrowing.value(node.args[0]), narrowing.value(node)
    amounts = _argument(node, 1, "pad")
    if source is None or value is None or not isinstance(amounts, (list, tuple)):
        return None
    new = list(amounts)
    for k in range(len(amounts) // 2):
        dim = len(value.shape) - 1 - k
        label = value.label(dim)
        if amounts[2 * k] or amounts[2 * k + 1]:
            if not narrowing.narrows(label) or label is None:
                continue
            mask = narrowing.row(label)
            new[2 * k] = int(mask[: amounts[2 * k]].sum())
            new[2 * k + 1] = int(mask[mask.size - amounts[2 * k + 1] :].sum())
    return _with(node, 1, "pad", new if isinstance(amounts, list) else tuple(new))


@_edits("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(node: fx.Node, narrowing: Narrowing) -> Call | None:
    value = narrowing.value(node.args[0])
    shape = _argument(node, 1, "normalized_shape")
    if value is None or not isinstance(shape, (list, tuple)):
        return None
    return _with(
        node, 1, "normalized_shape", tuple(_sizes(shape, value, narrowing, len(value.shape) - len(shape)))
    )


@_edits(*convolution.FUNCTIONS)
def _conv(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """The groups of a functional convolution: its channels by those of one group."""
    x, weight = narrowing.value(node.args[0]), narrowing.value(_argument(node, 1, "weight"))
    out, at = narrowing.value(node), convolution.groups_argument(node)
    groups = _argument(node, *at, 1)
    if x is None or weight is None or out is None or not isinstance(groups, int) or groups == 1:
        return None
    channel = len(x.shape) - len(weight.shape) + 1
    channels = narrowing.size(out if convolution.is_transposed(node) else x, channel)
    return _with(node, *at, channels // narrowing.size(weight, 1))


@_edits("group_norm")
def _group_norm(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """The groups of which some channel survives."""
    x, groups = narrowing.value(node.args[0]), _argument(node, 1, "num_groups")
    label = x.label(1) if x is not None else None
    if label is None or not narrowing.narrows(label) or not isinstance(groups, int):
        return None
    left = narrowing.row(label).reshape(groups, -1).any(axis=1)
    return _with(node, 1, "num_groups", int(left.sum()))


@_edits("scaled_dot_product_attention")
def _attention(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """The implied scale ``1 / sqrt(E)`` stays what it was."""
    query = narrowing.value(_argument(node, 0, "query"))
    if query is None or not narrowing.narrows(query.label(len(query.shape) - 1)):
        return None
    if node.kwargs.get("scale") is not None:
        return None
    return node.args, {**node.kwargs, "scale": query.shape[-1] ** -0.5}


@_edits("multi_head_attention")
def _heads(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """The widths of :func:`fxprune.nn.multi_head_attention`, and how many of its heads survive."""
    if node.target is not multi_head_attention:
        return None
    projections: Any = node.args[3]
    first, out_weight = narrowing.value(projections[0]), narrowing.value(node.args[5])
    label = first.label(0) if first is not None else None
    if first is None or out_weight is None or label is None or not narrowing.narrows(label):
        return None
    heads: Any = node.kwargs["num_heads"]
    width: Any = node.kwargs["qk_width"]
    alive = narrowing.row(label)[:width].reshape(heads, -1)
    v_width = narrowing.size(out_weight, 1)
    new = {"num_heads": int(alive.any(axis=1).sum()), "qk_width": int(alive.sum()), "v_width": v_width}
    return node.args, {**node.kwargs, **new}


@_edits("_assert")
def _assertion(node: fx.Node, narrowing: Narrowing) -> Call | None:
    """What was true of the original sizes, whatever the batch, need not be true of the narrowed ones."""
    condition = _argument(node, 0, "condition")
    if not isinstance(condition, fx.Node) or narrowing.tree(condition.name) is not True:
        return None
    sizes = origins(narrowing)
    kinds = [k for n in condition.all_input_nodes for k in sizes.of(n) or (FREE,)]
    if "narrowed" not in kinds or FREE in kinds:
        return None
    return _with(node, 0, "condition", True)


__all__ = ["RewriteLiterals"]
