"""Roles: which node makes the channels of an axis, and which node reads them.

A product (linear layer, convolution, matrix product, einsum, recurrent cell) sums over one axis of its
weight, the channels that it *consumes*, and has another for the channels that it *produces*. Its rule knows
which is which; what it says is kept as a :class:`Use`. All other axes *follow* (biases, norms, scales,
embeddings of positions): they hold a number for each channel that others produce.

A weight is often not the parameter itself but what is computed from it: transposed, sliced, normalised, with
another added. And what a node consumes is often not an argument of it but a view made inside of it. So each
value remembers what it was computed from (:class:`~fxprune.coupling.units.Parent`), where that can matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..nodes import describe_source
from .units import Axis, Parent, Value

Role = Literal["produces", "consumes", "follows"]

Region = tuple[slice, ...]
"""A part of a tensor: a slice for each dimension."""


@dataclass(frozen=True, eq=False)
class Use:
    """A product that uses an axis of a parameter or buffer.

    What the consumers of a group read, so that it can be observed::

        for member in group.consumers:
            for use in member.consuming:
                use.input      # the graph node that gives the value; None if it arises inside of use.node
                use.argument   # where it stands: (0,) is node.args[0], ("query",) node.kwargs["query"]
                use.dims       # its dimensions with the channels: (1,); (1, 2, 3) if they are flattened

    Attributes:
        role: "produces" or "consumes".
        node: the node of the captured graph that calls the product.
        module: path of the module that it is called in, as far as known; empty at the top.
        operator: the ATen operator, ``"addmm"`` or ``"convolution"``, say.
        region: the part of the parameter that takes part, a slice for each dimension: of the packed weight of
            ``nn.MultiheadAttention`` the rows of queries, keys or values. None if it is no such part.
        argument: where among the arguments of the node the value that is consumed stands: a position or name,
            followed by positions inside of lists. None where the value arises inside of the node (in front of
            the output projection of ``nn.MultiheadAttention``), and for what is produced. Along dimensions
            other than the channels the node may read it bit by bit (steps of a sequence).
        dims: dimensions of that argument that hold the channels, in the order in which they are flattened;
            empty without argument.
    """

    role: Role
    node: fx.Node
    module: str
    operator: str
    region: Region | None
    argument: tuple[int | str, ...] | None = None
    dims: tuple[int, ...] = ()

    @property
    def at(self) -> str:
        """Name of the node."""
        return self.node.name

    @property
    def source(self) -> str:
        """``file:line in function`` of the node, or empty."""
        return describe_source(self.node)

    @property
    def input(self) -> fx.Node | None:
        """The node whose value is consumed; None where the value arises inside of :attr:`node`."""
        if self.argument is None:
            return None
        first, *rest = self.argument
        found: Any = self.node.args[first] if isinstance(first, int) else self.node.kwargs[first]
        for place in rest:
            if isinstance(found, fx.Node):
                break  # one node gives the tree that the tensor is in, as a packed sequence is
            found = found[place]
        return found if isinstance(found, fx.Node) else None

    def same_as(self, other: Use) -> bool:
        """Whether it says nothing new: each step of a recurrent layer uses the same weights."""
        mine = (self.role, self.node, self.operator, self.argument, self.dims, self.region)
        return mine == (other.role, other.node, other.operator, other.argument, other.dims, other.region)

    def __str__(self) -> str:
        what = f"{self.role} at {self.at}"
        source = f" ({self.source})" if self.source else ""
        given = self.input
        return f"{what}{source}" + (f", of {given.name}" if given is not None else "")


def in_module(uses: Sequence[Use], path: str) -> tuple[Use, ...]:
    """Of these uses of one tensor those in the module ``path``; all, where none is known to be in it.

    A tensor with two names is used in two modules: an embedding produces by the axis by which the classifier
    that it is tied to consumes.
    """
    inside = tuple(use for use in uses if use.module == path or use.module.startswith(f"{path}."))
    return inside or tuple(uses)


def makes_outputs(uses: Sequence[Use]) -> bool:
    """Whether an axis with these uses holds a number for each channel that comes out of its module."""
    return not uses or any(use.role == "produces" for use in uses)


Factor = tuple[Value, Sequence[Any]]
"""An operand of a product, with an index name for each dimension."""


class Uses:
    """Collects the uses of axes while a graph is interpreted, by axis.

    Attributes:
        call: arguments and keyword arguments of the current node.
    """

    def __init__(self) -> None:
        self.by_axis: dict[Axis, list[Use]] = {}
        self.call: tuple[Any, Mapping[str, Any]] = ((), {})
        self._inner: dict[tuple[int, ...], list[tuple[Axis, Use]]] = {}
        """What was noted of products of weights alone, by the identities of the factors."""

    def product(
        self, node: fx.Node | None, operator: str, factors: Sequence[Factor], result: Sequence[Any]
    ) -> None:
        """Note what a product does: it sums over the index names that are not in ``result``.

        A factor computed from parameters, buffers and constants alone is a weight. If all are, the last is,
        unless the result turns out to be (part of) a weight itself.
        """
        if not any(value.fixed for value, _ in factors):
            return
        inside = [(v, n) for v, n in factors if any(x not in result for x in n)]  # the bias is no factor
        weights = [factor for factor in inside if factor[0].fixed]
        noted = None
        if len(weights) == len(inside):
            weights = weights[-1:]
            noted = self._inner.setdefault(tuple(id(value) for value, _ in factors), [])
        for weight in weights:
            value, names = weight
            for dim, name in enumerate(names):
                sharing = [f for f in inside if f is not weight and name in f[1]]
                if name not in result and sharing:
                    other = next((f for f in sharing if not f[0].fixed), sharing[0])
                    read = other[0], list(other[1]).index(name)
                    self.note("consumes", node, operator, value, dim, read, noted)
                elif name in result and not sharing:
                    self.note("produces", node, operator, value, dim, None, noted)

    def note(
        self,
        role: Role,
        node: fx.Node | None,
        operator: str,
        weight: Value,
        dim: int,
        read: tuple[Value, int] | None = None,
        noted: list[tuple[Axis, Use]] | None = None,
    ) -> None:
        """Note one use of dimension ``dim`` of a weight; ``read`` is the value and dimension it consumes.

        What is noted is appended to ``noted``.
        """
        if node is None or not weight.fixed:
            return
        argument, dims = _argument(*read, self.call) if read is not None else (None, ())
        for axis, region in self._sources(weight, dim).items():
            use = Use(role, node, module_of(node), operator, region, argument, dims)
            known = self.by_axis.setdefault(axis, [])
            if not any(use.same_as(other) for other in known):
                known.append(use)
                if noted is not None:
                    noted.append((axis, use))

    def _sources(self, weight: Value, dim: int) -> dict[Axis, Region | None]:
        """The axes of parameters and buffers that dimension ``dim`` is computed from, and the part of each.

        Scales and shifts, which have fewer entries than the weight, are left out.
        """
        found: dict[Axis, Region | None] = {}
        seen: set[tuple[int, frozenset[int]]] = set()

        def visit(value: Value, dims: frozenset[int], taken: Mapping[int, tuple[int, int]] | None) -> None:
            state = value.state
            if state is not None:
                if state.tensor is not None:
                    region = None
                    if taken is not None:
                        parts = {value.dims[d]: slice(*part) for d, part in taken.items()}
                        region = tuple(parts.get(d, slice(0, size)) for d, size in enumerate(state.shape))
                    for d in dims:
                        found.setdefault(Axis(state.name, value.dims[d]), region)
                return
            if (id(value), dims) in seen:
                return
            seen.add((id(value), dims))
            inner = self._inner.get(tuple(id(parent.value) for parent in value.parents))
            if inner is not None:  # a product of weights is a weight
                for axis, use in inner:
                    self.by_axis[axis].remove(use)
                inner.clear()
            for parent in value.parents:
                scale = not parent.same and inner is None and _entries(parent.value) < _entries(value)
                origins = _dims(value, parent)
                own = frozenset(o for d in dims for o in origins[d])
                if own and not scale:
                    visit(parent.value, own, _taken(taken, origins, parent))

        visit(weight, frozenset([dim]), {})
        return found


def _entries(value: Value) -> int:
    return math.prod(value.shape)


def module_of(node: fx.Node) -> str:
    """Path of the module that a node is called in, as far as known."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.meta.get("module", ""))


def _argument(
    value: Value, dim: int, call: tuple[Any, Mapping[str, Any]]
) -> tuple[tuple[int | str, ...] | None, tuple[int, ...]]:
    """The argument that ``value`` is an arrangement of, and its dimensions that make up ``dim``."""
    dims: tuple[int, ...] = (dim,)
    seen: Value | None = value
    while seen is not None:
        path = _path(call, seen)
        if path is not None:
            return path, dims
        parent = next((p for p in seen.parents if p.same), None)
        if parent is None:
            return None, ()
        origins = _dims(seen, parent)
        others = {o for d, own in enumerate(origins) if d not in dims for o in own}
        found = tuple(dict.fromkeys(o for d in dims for o in origins[d]))
        part = parent.part[0] if parent.part is not None else -1
        if not found or part in found or others & set(found):  # a part of the channels only
            return None, ()
        seen, dims = parent.value, found
    return None, ()


def _path(call: tuple[Any, Mapping[str, Any]], value: Value) -> tuple[int | str, ...] | None:
    """Where an argument stands whose value is ``value``."""

    def inside(tree: Any) -> tuple[int | str, ...] | None:
        if isinstance(tree, torch.Tensor):
            return () if getattr(tree, "_fxprune_value", None) is value else None
        items: Any = ()
        if isinstance(tree, (list, tuple)):
            items = enumerate(tree)
        elif isinstance(tree, Mapping):
            items = tree.items()
        for place, item in items:
            found = inside(item)
            if found is not None:
                return (place, *found)
        return None

    args, kwargs = call
    found = inside(args)
    return inside(kwargs) if found is None else found


def _taken(
    taken: Mapping[int, tuple[int, int]] | None, origins: Sequence[tuple[int, ...]], parent: Parent
) -> Mapping[int, tuple[int, int]] | None:
    """The part of the parent that a part of a value comes from, by dimension; None if it is no block."""
    if taken is None:
        return None
    result = {}
    for dim, part in taken.items():
        if len(origins[dim]) != 1 or sum(origins[dim] == other for other in origins) > 1:
            return None
        result[origins[dim][0]] = part
    if parent.part is not None:
        dim, start, stop = parent.part
        if start < 0:
            return None
        first, last = result.get(dim, (0, stop - start))
        result[dim] = start + first, start + last
    return result


def _dims(value: Value, parent: Parent) -> list[tuple[int, ...]]:
    """For each dimension of ``value`` those of the parent that it consists of."""
    if parent.dims is not None:
        return [() if d < 0 else (d,) for d in parent.dims]
    before, after = parent.value.shape, value.shape
    origins: list[tuple[int, ...]] = [()] * len(after)
    if _entries(parent.value) == _entries(value) > 0:
        for ins, outs in factor(before, after):
            for d in outs:
                origins[d] = tuple(ins)
    return origins


def factor(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal product into the finest groups of dimensions with equal products.

    Dimensions of size 1 are left out.
    """
    ins = [d for d, size in enumerate(before) if size != 1]
    outs = [d for d, size in enumerate(after) if size != 1]
    groups = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        a, b = [ins[i]], [outs[j]]
        p, q = before[ins[i]], after[outs[j]]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                a.append(ins[i])
                p, i = p * before[ins[i]], i + 1
            else:
                b.append(outs[j])
                q, j = q * after[outs[j]], j + 1
        groups.append((a, b))
    return groups


__all__ = ["Region", "Role", "Use", "Uses", "factor", "in_module", "makes_outputs", "module_of"]
