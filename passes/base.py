"""What every pass is, and what it may ask: which indices survive."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..coupling.graph import CouplingGraph
from ..coupling.units import Ids, Label, State, Take, Value
from ..errors import RewriteError
from ..nodes import copy_graph
from ..program import Program

Mask = NDArray[np.bool_]


class Kept:
    """Surviving indices of one axis: the same for all rows, or one list a row.

    Attributes:
        index: ``(n,)``, or ``(*row sizes, n)`` if ``over`` is not empty.
        over: axes that choose the row.
        run: length of the aligned blocks that survive as a whole; 1 where there are none.
    """

    def __init__(self, mask: Mask, over: tuple[int, ...]) -> None:
        self.over = over
        self.run = 1
        self._tensors: dict[tuple[torch.device, int], torch.Tensor] = {}
        if not over:
            self.index = np.flatnonzero(mask)
            self.run = _run_length(self.index, mask.size)
            return
        counts = mask.sum(axis=-1)
        width = int(counts.max())
        # Rows that go entirely are dropped by their own axis; any index will do for them.
        self.index = np.zeros((*mask.shape[:-1], width), dtype=np.int64)
        full = counts == width
        self.index[full] = np.nonzero(mask[full])[-1].reshape(-1, width)

    def tensor(self, device: torch.device, run: int = 1) -> torch.Tensor:
        """``index`` as a tensor, counted in blocks of ``run``."""
        key = (device, run)
        if key not in self._tensors:
            index = self.index[::run] // run if run > 1 else self.index
            self._tensors[key] = torch.from_numpy(np.ascontiguousarray(index)).to(device)
        return self._tensors[key]


def _run_length(index: NDArray[np.int64], size: int) -> int:
    """The largest length such that whole aligned blocks are kept."""
    if index.size < 2 or index.size == size:
        return 1
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    if breaks.size and breaks[0] == 1:
        return 1  # the first survivor stands alone
    edges = np.concatenate([[0], breaks, [index.size]])
    return max(int(np.gcd.reduce(np.concatenate([np.diff(edges), index[edges[:-1]], [size]]))), 1)


class Narrowing:
    """Which units survive, and what follows for every value of the original graph.

    Nodes are named, not referred to, so that the same narrowing serves every stage of the rewriting.
    """

    def __init__(self, graph: CouplingGraph, removed: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        roots = graph.classes(np.arange(graph.run.coupler.units.count))
        self._alive: Mask = graph.alive(removed)[roots]  # by unit
        self._kept: dict[tuple[int, tuple[int, ...]], Kept | None] = {}
        self._masks: dict[int, tuple[Ids, Mask, bool]] = {}
        self._sizes: dict[int, int] = {}
        self._repeats: dict[int, bool] = {}
        self._values = {node.name: value for node, value in graph.run.values.items()}
        self._takes = {node.name: take for node, take in graph.run.coupler.takes.items()}
        self._origins: dict[int, list[str]] = {}
        for name, value in self._values.items():
            self._origins.setdefault(id(value), []).append(name)
        self._order = {name: number for number, name in enumerate(self._values)}

    def alive(self, label: Label) -> Mask:
        """For each index of ``label.ids`` whether it survives."""
        known = self._masks.get(id(label.ids))
        if known is None:
            mask: Mask = self._alive[label.ids]
            # The array is kept along with its mask, so that its id stays taken.
            known = self._masks[id(label.ids)] = (label.ids, mask, not bool(mask.all()))
        return known[1]

    def kept(self, label: Label | None) -> Kept | None:
        """Surviving indices along a label's dimension; None where all survive."""
        if label is None:
            return None
        key = (id(label.ids), label.over)
        if key not in self._kept:
            self._kept[key] = Kept(self.alive(label), label.over) if self.narrows(label) else None
        return self._kept[key]

    def survive(self, ids: Ids) -> Mask:
        """For each of these units whether it survives."""
        return self._alive[ids]

    def mixed(self, ids: Ids) -> bool:
        """Whether some row of ``ids``, ``(*rows, columns)``, survives in part."""
        alive = self.survive(ids)
        return bool((alive.any(axis=-1) & ~alive.all(axis=-1)).any())

    def narrows(self, label: Label | None) -> bool:
        """Whether some index of ``label`` goes."""
        if label is None:
            return False
        self.alive(label)
        return self._masks[id(label.ids)][2]

    def repeats(self, label: Label) -> bool:
        """Whether a unit occurs more than once along the dimension, as in a batch of rows ``(B H, N, D)``."""
        if id(label.ids) not in self._repeats:
            row = label.ids.reshape(-1, label.ids.shape[-1])[0]  # ones that were tied later do not count
            self._repeats[id(label.ids)] = len(set(row.tolist())) < row.size
        return self._repeats[id(label.ids)]

    def row(self, label: Label) -> Mask:
        """Survivors along the dimension itself; of the first surviving row where there are several."""
        mask = self.alive(label).reshape(-1, label.ids.shape[-1])
        if mask.shape[0] > 1:
            rows = mask.any(axis=1)
            mask = mask[int(rows.argmax())][None]
        return mask[0]

    def along(self, value: Value, dim: int) -> Mask:
        """For each row that survives, and each index of a dimension, whether it does, ``(*rows, size)``."""
        label = value.label(dim)
        if label is None:
            return np.ones(value.shape[dim], dtype=bool)
        alive = self.alive(label)
        for place, row in enumerate(label.over):
            rows = value.label(row)
            if rows is not None:
                alive = alive.compress(self.row(rows), axis=place)
        return alive

    def size(self, value: Value, dim: int) -> int:
        """Extent of a dimension after narrowing."""
        label = value.label(dim)
        if label is None or not self.narrows(label):
            return value.shape[dim]
        if id(label.ids) not in self._sizes:
            self._sizes[id(label.ids)] = int(self.row(label).sum())
        return self._sizes[id(label.ids)]

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(self.size(value, dim) for dim in range(len(value.shape)))

    def tree(self, name: str) -> Any:
        """Outputs of a node of the original graph; None for a node that it does not have."""
        return self._values.get(name)

    def value(self, node: Any) -> Value | None:
        """The value of a node with one tensor as its output, else None."""
        value = self._values.get(node.name) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Value) else None

    def changed(self, node: Any) -> bool:
        """Whether the node's (single tensor) output becomes narrower."""
        value = self.value(node)
        return value is not None and any(self.narrows(value.label(d)) for d in range(len(value.shape)))

    def state(self, name: str) -> State:
        """The parameter or buffer of the original that has ``name`` among its names."""
        states = self.graph.states
        if name in states:
            return states[name]
        tensor = self.graph.captured.program.tensors[name]
        return next(state for state in states.values() if state.tensor is tensor)

    def take(self, node: fx.Node) -> tuple[str, Take] | None:
        """How the node picks indices along a dimension, and from which node's output, if it does."""
        take = self._takes.get(node.name)
        if take is None:
            return None
        # An in-place operator puts out the very value again: the last one before the node has all writes.
        origins = self._origins.get(id(take.value), [])
        origin = next((n for n in reversed(origins) if self._order[n] < self._order[node.name]), None)
        if origin is None:  # picked after other dimensions had been sliced
            own = take.value.label(take.dim)
            for before in node.all_input_nodes:
                value = self.value(before)
                if value is not None and len(value.shape) == len(take.value.shape) and own is not None:
                    label = value.label(take.dim)
                    origin = before.name if label is not None and label.ids is own.ids else origin
        return (origin, take) if origin is not None else None


def editable(program: Program, narrowing: Narrowing) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A graph that a pass may edit, and its nodes by name.

    The graph that was analysed is copied, once in a pipeline; the passes that follow go on with that copy.
    """
    if program.graph is narrowing.graph.captured.program.graph:
        return copy_graph(program.graph)
    return program.graph, {node.name: node for node in program.graph.nodes}


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are their options."""

    edits_graph: ClassVar[bool] = True
    """Whether it changes nodes: in a graph that :func:`editable` gave it."""

    @abc.abstractmethod
    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        """The sites (nodes, module paths, tensor names) that must be rewritten; may be empty."""

    @abc.abstractmethod
    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        """A new program in which the sites are rewritten; its graph may be that of ``program``, edited."""

    def ensures(self, before: Program, after: Program) -> None:
        """Raise :class:`RewriteError` if the pass broke the contract that all passes share."""
        if after.skeleton != before.skeleton:
            raise RewriteError(f"{self} changed the module tree or a training flag.")
        if list(after.tensors) != list(before.tensors):
            raise RewriteError(f"{self} added, dropped or reordered parameters.")
        if after.graph is not before.graph or self.edits_graph:
            owner, after.graph.owning_module = after.graph.owning_module, None  # which may have old widths
            after.graph.lint()
            after.graph.owning_module = owner

    def __call__(self, program: Program, narrowing: Narrowing) -> Program:
        sites = self.requires(program, narrowing)
        if not sites:
            return program
        after = self.run(program, narrowing, sites)
        self.ensures(program, after)
        return after
