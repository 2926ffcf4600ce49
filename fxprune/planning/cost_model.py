"""The cost model: what a plan would leave, from the coupling graph alone.

Every size in a network is a constant or the number of surviving indices of a label. Parameters are
products of sizes; the multiply-accumulates of an ATen call are the formula of torch's own FLOP counter,
given the narrowed shapes. So the prediction for a plan equals :func:`fxprune.count` on the narrowed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils import _pytree as pytree

from ..coupling.branches import Branch
from ..coupling.graph import CouplingGraph
from ..coupling.interpreter import interpret
from ..coupling.roles import module_of
from ..coupling.units import Ids, Label, Value
from ..measure import Count, flop_counter

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that an ATen call is given or returns.

    Attributes:
        dims: for each dimension, where its size stands in what :meth:`CostModel.sizes` returns.
        dtype: the dtype.
    """

    dims: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Call:
    """An ATen call of the network, with an :class:`Operand` in place of each tensor.

    Attributes:
        operator: the ``OpOverload``.
        args: positional arguments.
        kwargs: keyword arguments.
        out: the result.
        dims: ``dims`` of all operands, one after the other.
        node: name of the graph node that makes the call.
    """

    operator: Any
    args: Any
    kwargs: Any
    out: Any
    dims: Ids
    node: str

    def given(self, sizes: Ids, make: Callable[[list[int], torch.dtype], Any]) -> tuple[Any, Any, Any]:
        """``(args, kwargs, out)`` with ``make(shape, dtype)`` in place of each operand."""

        def tensor(operand: Operand) -> Any:
            return make([int(sizes[d]) for d in operand.dims], operand.dtype)

        tree: tuple[Any, Any, Any] = pytree.tree_map_only(Operand, tensor, (self.args, self.kwargs, self.out))
        return tree

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Everything that is read or written."""
        leaves = pytree.tree_leaves((self.args, self.kwargs, self.out))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Operand))


class CostModel:
    """Parameters, MACs, activations and bytes of a network for any choice of surviving units.

    Calling it with the ``removed`` units of a plan gives what :func:`fxprune.count` would say about the
    narrowed model.

    Args:
        graph: the analysis; its network is interpreted once more, on shapes.
    """

    def __init__(self, graph: CouplingGraph) -> None:
        self.graph = graph
        self.prunable: Mask = np.zeros(graph.run.coupler.units.count, dtype=bool)
        for group in graph.groups:
            self.prunable[group.units] = True
        self._varies = self.prunable.copy()
        for rows in graph.rows:
            for classes in rows.classes:
                self._varies[classes] = True
        graph.cells.inherit(np.logical_or, self._varies)
        self._full: list[int] = []
        self._constants: dict[int, int] = {}
        self._labels: dict[int, tuple[Ids, int]] = {}
        self._rows: list[Ids] = []
        self._where: list[int] = []
        self.calls = tuple(self._interpret())
        self._counted = [call for call in self.calls if call.operator.overloadpacket in _formulas()]
        self._tensors()
        self._classes = np.concatenate([r.reshape(-1) for r in self._rows]) if self._rows else _NONE
        widths = np.concatenate([np.full(*r.shape) for r in self._rows]) if self._rows else _NONE
        self._row_starts = np.cumsum(widths) - widths
        heights = np.array([len(r) for r in self._rows], dtype=np.int64)
        self._label_starts = np.cumsum(heights) - heights
        self._narrow = frozenset(self._where)
        self._known: dict[tuple[int, bytes], int] = {}

    @cached_property
    def whole(self) -> CostModel:
        """That of the network with all of its residual branches; this one where none is removed."""
        return self if self.graph.whole is self.graph else CostModel(self.graph.whole)

    def _interpret(self) -> Iterable[Call]:
        seen: list[tuple[str, Any, Any]] = []

        def observe(node: fx.Node | None, operator: Any, args: Any, kwargs: Any, out: Any) -> None:
            tree = pytree.tree_map_only(torch.Tensor, self.graph.run.coupler.value, (args, kwargs, out))
            seen.append((node.name if node is not None else "", operator, tree))

        with torch.inference_mode(False):  # where a linear layer would not dissolve
            run = interpret(self.graph.captured.program, self.graph.inputs, observe=observe)
        assert run.coupler.units.count == self.graph.run.coupler.units.count  # the same numbers again
        # Axes of parameters take their labels from what they meet, so that all are known only now.
        for node, operator, tree in seen:
            dims: list[int] = []
            args, kwargs, out = pytree.tree_map_only(Value, partial(self._operand, dims=dims), tree)
            yield Call(operator, args, kwargs, out, np.array(dims, dtype=np.int64), node)

    def _operand(self, value: Value, dims: list[int]) -> Operand:
        own = tuple(self._place(value.label(d), size) for d, size in enumerate(value.shape))
        dims.extend(own)
        return Operand(own, value.dtype)

    def _place(self, label: Label | None, size: int) -> int:
        """Where the size of a dimension stands in :meth:`sizes`."""
        if label is not None and size > 1:
            if id(label.ids) not in self._labels:
                rows = self.graph.classes(label.ids).reshape(-1, label.ids.shape[-1])
                place = -1
                if self._varies[rows].any():
                    place = len(self._full)
                    self._full.append(size)
                    self._rows.append(rows)
                    self._where.append(place)
                self._labels[id(label.ids)] = label.ids, place  # kept, so that its id stays taken
            place = self._labels[id(label.ids)][1]
            if place >= 0:
                return place
        if size not in self._constants:
            self._constants[size] = len(self._full)
            self._full.append(size)
        return self._constants[size]

    def _tensors(self) -> None:
        """Sizes of parameters and of what a state dict holds; a tied tensor counts once."""
        program = self.graph.captured.program
        axes = {id(state.tensor): state.axes for state in self.graph.states.values()}
        saved = {id(t) for name, t in program.tensors.items() if program.skeleton.buffers.get(name, True)}
        tensors = {id(tensor): (name, tensor) for name, tensor in reversed([*program.tensors.items()])}
        rank = max((tensor.dim() for _, tensor in tensors.values()), default=0)
        one = self._place(None, 1)
        dims, parameter, stored = [], [], []
        for number, (_, tensor) in tensors.items():
            labels = axes.get(number, [None] * tensor.dim())
            own = [self._place(label, size) for label, size in zip(labels, tensor.shape, strict=True)]
            dims.append(own + [one] * (rank - len(own)))
            parameter.append(isinstance(tensor, torch.nn.Parameter))
            stored.append(tensor.element_size() if number in saved else 0)
        self._names = [name for name, _ in tensors.values()]
        self._dims = np.array(dims, dtype=np.int64).reshape(len(dims), rank)
        self._is_parameter = np.array(parameter, dtype=bool)
        self._stored = np.array(stored, dtype=np.int64)

    # -- what is left ---------------------------------------------------------------------------

    def alive(self, removed: Mapping[str, Sequence[int]]) -> Mask:
        """For each class of units whether it survives, ``(units,)``."""
        return self.graph.alive(removed)

    @property
    def full(self) -> Ids:
        """All sizes as they are before anything is removed."""
        return np.array(self._full, dtype=np.int64)

    def narrows(self, place: int) -> bool:
        """Whether the size at ``place`` may become smaller."""
        return place in self._narrow

    def scaled(self, share: float) -> Ids:
        """All sizes, with everything that may be narrowed at a ``share`` of its width."""
        sizes = self.full
        sizes[self._where] = np.maximum(1, np.round(sizes[self._where] * share)).astype(np.int64)
        return sizes

    def sizes(self, alive: Mask) -> Ids:
        """All sizes that occur in the network, where only the ``alive`` classes survive."""
        sizes = self.full
        if self._rows:
            alive = alive.copy()
            self.graph.cells.inherit(np.logical_and, alive)
            columns = np.add.reduceat(alive[self._classes], self._row_starts, dtype=np.int64)
            sizes[self._where] = np.maximum.reduceat(columns, self._label_starts)  # rows that go are empty
        return sizes

    def params(self, sizes: Ids, within: str = "") -> int:
        """Number of parameter entries, of those alone whose first names start with ``within``."""
        return int(sizes[self._dims].prod(axis=1)[self._is_parameter & self._within(within)].sum())

    def bytes(self, sizes: Ids, within: str = "") -> int:
        """Bytes of all tensors that a state dict holds, of those alone whose names start with ``within``."""
        return int((sizes[self._dims].prod(axis=1) * self._stored)[self._within(within)].sum())

    def _within(self, start: str) -> Mask:
        return np.array([name.startswith(start) for name in self._names], dtype=bool)

    def macs(self, sizes: Ids, within: str = "") -> int:
        """Multiply-accumulates of one forward pass over the example inputs' batch.

        Of those alone that modules make whose paths, with a dot behind, start with ``within``.
        """
        counted = self._counted
        if within:
            modules = {n.name: f"{module_of(n)}." for n in self.graph.captured.program.graph.nodes}
            counted = [call for call in counted if modules.get(call.node, "").startswith(within)]
        # torch counts a multiplication and an addition as two
        return sum(self.flops(call, sizes) for call in counted) // 2

    def flops(self, call: Call, sizes: Ids) -> int:
        """What torch counts for one call."""
        key = id(call), sizes[call.dims].tobytes()
        if key not in self._known:
            args, kwargs, out = call.given(sizes, _meta)
            formula = _formulas()[call.operator.overloadpacket]
            self._known[key] = int(formula(*args, **kwargs, out_val=out))
        return self._known[key]

    def activations(self, sizes: Ids) -> int:
        """Entries that convolutions, matrix products and attention put out."""
        return sum(_put_out(call, sizes) for call in self._counted)

    def branch(self, branch: Branch) -> Count:
        """What goes with a residual branch of the network, at its full widths."""
        sizes, nodes = self.full, set(branch.nodes)
        inside = [call for call in self._counted if call.node in nodes]
        stored = np.isin(self._names, branch.tensors) * self._stored
        return Count(
            branch.entries,
            sum(self.flops(call, sizes) for call in inside) // 2,
            sum(_put_out(call, sizes) for call in inside),
            int((sizes[self._dims].prod(axis=1) * stored).sum()),
        )

    def largest(self, sizes: Ids, n: int = 3) -> list[tuple[str, int]]:
        """The ``n`` largest parameters and their numbers of entries."""
        entries = sizes[self._dims].prod(axis=1) * self._is_parameter
        return [(self._names[i], int(entries[i])) for i in np.argsort(-entries, kind="stable")[:n].tolist()]

    def __call__(self, removed: Mapping[str, Sequence[int]]) -> Count:
        """What is left without the ``removed`` positions of each group."""
        sizes = self.sizes(self.alive(removed))
        return Count(self.params(sizes), self.macs(sizes), self.activations(sizes), self.bytes(sizes))


def _linear(x: torch.Tensor, weight: torch.Tensor, *bias: Any, out_val: torch.Tensor) -> int:
    """What torch counts for the products that a linear layer is made of."""
    return 2 * out_val.numel() * weight.shape[1]


@cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    """How many FLOPs a call of each operator takes that is counted."""
    return {**flop_counter().flop_registry, torch.ops.aten.linear: _linear}


_NONE: Ids = np.empty(0, dtype=np.int64)


def _put_out(call: Call, sizes: Ids) -> int:
    """Entries that a call puts out."""
    first = call.out if isinstance(call.out, Operand) else call.out[0]
    return int(sizes[list(first.dims)].prod())


def _meta(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
