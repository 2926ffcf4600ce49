"""The check of a rewritten program: every node must do what the narrowing predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import fx
from torch.utils import _pytree as pytree

from ..coupling.checking import CheckingCoupler
from ..coupling.interpreter import Run, interpret
from ..coupling.units import NOWHERE, Ids, Label, Product, Units, Value, aligned
from ..errors import CaptureError, ExampleInputsError, RuleError
from ..program import Program
from ..sizes import resized
from .base import Narrowing


@dataclass(frozen=True)
class Violation:
    """A node of the rewritten graph that does not do what the narrowing predicts.

    Attributes:
        node: its name.
        reason: what it does instead.
        dims: the dimensions of its output in which it shows; empty where that is not known.
        ties: dimensions (``view_3[2]``) that may have to lose the same share each, so that it goes away.
    """

    node: str
    reason: str
    dims: tuple[int, ...] = ()
    ties: tuple[str, ...] = ()


def check(program: Program, narrowing: Narrowing) -> list[Violation]:
    """Repeat the analysis on the rewritten program, with the surviving units as known labels.

    Every value must have the predicted shape, every labelled dimension the surviving units in the
    predicted order, no two different units may meet, and no number may have changed. Nodes that never
    look at sizes do to narrowed values what they did before, so only the others are run, each on the
    predicted values of its inputs.
    """
    graph = narrowing.graph
    compact = _compact(narrowing)
    sized = {node.name for node in graph.run.coupler.by_size}

    def seed(name: str) -> list[Label | None] | None:
        state = graph.states.get(name)
        if state is None:
            return None
        return [
            None if label is None else _survivors(narrowing, state.axes.__getitem__, label, compact)
            for label in state.axes
        ]

    def known(node: fx.Node) -> Callable[[], Any] | None:
        tree = narrowing.tree(node.name)
        if node.op not in ("call_module", "call_function", "call_method") or node.name in sized:
            return None
        leaves = [tree] if isinstance(tree, Value) else pytree.tree_leaves(tree)
        values = [leaf for leaf in leaves if isinstance(leaf, Value)]
        if not values or any(value.state is not None for value in values):
            return None
        given = [narrowing.tree(n.name) for n in node.all_input_nodes]
        if any(value is None or isinstance(value, (int, float, tuple)) for value in given):
            return None  # given a number that may have changed, or what a pass has inserted
        return lambda: pytree.tree_map_only(Value, lambda value: _predicted(narrowing, value, compact), tree)

    whole = graph.run.coupler.whole
    for user, tables in graph.run.coupler.tables.items():
        for value in filter(None, map(narrowing.value, tables)):
            for dim in range(len(value.shape)):
                label = value.label(dim)
                picked = label is not None and np.isin(label.ids, whole).any()
                if picked and not narrowing.along(value, dim).all():
                    return [Violation(user.name, "picks from a table that became narrower itself")]
    try:
        found = _misshapen(interpret(program, graph.inputs, labels=False), narrowing)
        if found:
            return found
        if graph.other_sizes and _has_picks_by_row(program, narrowing):
            interpret(program, resized(graph.inputs, graph.other_sizes), labels=False)
        units = Units(anchors=int(compact.max()))
        units.mark_tables(compact[whole])
        if graph.cells.cells.size:
            cells, rows, columns = (
                compact[ids] for ids in (graph.cells.cells, graph.cells.rows, graph.cells.columns)
            )
            several = cells != columns  # of one row that is left, each cell stands for its column
            units.multiply(Product(cells[several], rows[several], columns[several], NOWHERE, None))
        run = interpret(program, graph.inputs, CheckingCoupler(units), seed, known)
    except (ExampleInputsError, CaptureError, RuleError) as error:
        node = getattr(error, "node", None)
        return [Violation(node.name if node is not None else "", str(error))]
    return list(_compare(run, narrowing, compact))


def _has_picks_by_row(program: Program, narrowing: Narrowing) -> bool:
    """Whether a constant with several dimensions was put in: some may be as long as the example is."""
    before = narrowing.graph.captured.program.extras
    new = (extra for name, extra in program.extras.items() if name not in before)
    return any(extra.dim() > 1 for extra in new)


def _misshapen(run: Run, narrowing: Narrowing) -> list[Violation]:
    """Where the rewritten program, run on shapes alone, does not give what the narrowing predicts.

    Whatever the labels say, an output has the shape that it had, unless it is one that may become narrower.
    """
    found = []
    for node, new in run.values.items():  # parts of tuples are looked at where they are read
        old = narrowing.tree(node.name)
        if isinstance(old, Value) and isinstance(new, Value):
            constant = old.state is not None and old.state.tensor is None
            expected = old.shape if constant and new.shape == old.shape else narrowing.shape(old)
            if new.shape != expected:
                found.append(Violation(node.name, f"has shape {new.shape}, expected {expected}"))
    before = narrowing.graph.run
    for region, leaf in sorted(before.whole, key=str):
        shape, other = before.outputs[region][leaf].shape, run.outputs[region][leaf].shape
        if other != shape:
            found.append(
                Violation("output", f"gives the output {leaf} the shape {other} in place of {shape}")
            )
    return found


def _predicted(narrowing: Narrowing, value: Value, compact: Any) -> Value:
    """What a value of the original graph is to become."""
    labels = [
        None if label is None else _survivors(narrowing, value.label, label, compact)
        for label in map(value.label, range(len(value.shape)))
    ]
    for dim, label in enumerate(labels):
        if label is not None and label.ids.shape[-1] == 1:
            labels[dim] = None
            if label.over:  # a row of one column is its only cell
                labels[label.over[-1]] = replace(label, ids=label.ids[..., 0], over=label.over[:-1])
    return Value(narrowing.shape(value), labels, dtype=value.dtype)


def _squeezed(label: Label, dims: Sequence[int]) -> Label:
    """The label without rows along ``dims``, of which one row each is left."""
    ids, over = label.ids, list(label.over)
    for dim in dims:
        ids = ids.take([0], axis=over.index(dim)).squeeze(over.index(dim))
        over.remove(dim)
    return replace(label, ids=ids, over=tuple(over))


def _compact(narrowing: Narrowing) -> Any:
    """Numbers 1.. for the classes on states; 0 for FIXED and for classes on no state."""
    graph = narrowing.graph
    roots = graph.classes(np.arange(graph.run.coupler.units.count))
    single = Units()
    for rectangle in graph.rectangles:
        if narrowing.survive(rectangle.cells[0]).sum() > 1:
            continue
        survive = narrowing.survive(rectangle.cells)
        if survive.sum(axis=1).max(initial=0) == 1:  # a row of one column is its only cell
            if single.count == 1:
                single.fresh(roots.size)
            rows = survive.any(axis=1)
            single.merge(roots[rectangle.rows[rows]], roots[rectangle.cells[rows][survive[rows]]])
    for product in graph.run.coupler.units.products:
        left = narrowing.survive(product.cells)
        if left.any() and np.unique(roots[product.rows[left]]).size == 1:  # so is a column of one row
            if single.count == 1:
                single.fresh(roots.size)
            single.merge(roots[product.columns[left]], roots[product.cells[left]])
    if single.count > 1:
        roots = single.find(roots)
    on_state = np.zeros(roots.size, dtype=bool)
    labels = (label for state in graph.states.values() for label in state.axes if label is not None)
    for ids in {id(label.ids): label.ids for label in labels}.values():
        on_state[ids] = True
    on_state[graph.run.coupler.whole] = True
    for ids in (graph.cells.cells, graph.cells.rows, graph.cells.columns):
        on_state[ids] = True
    known = np.zeros(roots.size, dtype=bool)
    known[roots[on_state]] = True
    known[0] = False
    numbers = np.cumsum(known)
    return np.where(known[roots], numbers[roots], 0)


def _survivors(
    narrowing: Narrowing, label_of: Callable[[int], Label | None], label: Label, compact: Any
) -> Label | None:
    """A label after narrowing, ``ids: (*surviving rows, survivors)``.

    ``label_of`` gives the labels of its rows.
    """
    ids: Ids = label.ids
    mask = narrowing.alive(label)
    if not label.over:
        return Label(compact[ids[mask]], (), label.axis, label.zero, label.row)
    sizes = []
    for size, dim in zip(ids.shape, label.over, strict=False):
        rows = label_of(dim)
        if rows is not None and set(rows.over) <= set(label.over):
            mask = mask & aligned(narrowing.alive(rows)[..., None], (*rows.over, dim), label.over)
        sizes.append(size if rows is None else int(narrowing.row(rows).sum()))
    width = int(mask.sum(axis=-1).max())
    survivors = ids[mask]
    if survivors.size == math.prod(sizes) * width:
        ids = survivors.reshape(*sizes, width)
    else:
        ids = ids[..., :width]  # not a rectangle; the shapes will tell
    single = [dim for dim, size in zip(label.over, sizes, strict=True) if size == 1]
    return _squeezed(replace(label, ids=compact[ids]), single)


def _compare(run: Run, narrowing: Narrowing, compact: Any) -> list[Violation]:
    found = []
    for node in run.coupler.collisions:
        if node is not None:
            found.append(Violation(node.name, "indices of different units meet"))
    rerun = {node.name: node for node in run.values}
    for node in narrowing.graph.run.coupler.picked:
        if node.name in rerun and _picks_others(node, rerun[node.name], run, narrowing, compact):
            found.append(Violation(node.name, "picks another unit by its number"))
    old_scalars = {node.name: numbers for node, numbers in narrowing.graph.run.scalars.items()}
    for node, tree in run.values.items():
        before = narrowing.tree(node.name)
        if before is None:
            continue
        olds, news = pytree.tree_leaves(before), pytree.tree_leaves(tree)
        for old, new in zip(olds, news, strict=False):
            if isinstance(old, Value) and isinstance(new, Value):
                if new.shape == old.shape and old.state is not None and old.state.tensor is None:
                    continue  # a constant that is narrowed by the node that follows
                reason, dims = _differs(old, new, run, narrowing, compact)
                if reason:
                    found.append(Violation(node.name, reason, dims))
                    break
        if not _same(run.scalars.get(node, ()), old_scalars.get(node.name, ())):
            found.append(Violation(node.name, "a number in a pointwise operator changed with the width"))
    order = {node.name: i for i, node in enumerate(narrowing.graph.captured.program.graph.nodes)}
    return sorted(found, key=lambda violation: order.get(violation.node, len(order)))


def _picks_others(old: fx.Node, new: fx.Node, run: Run, narrowing: Narrowing, compact: Any) -> bool:
    """Whether a node that picks single units does not pick the same ones, as far as that is known."""
    before = narrowing.graph.run.coupler.picked[old]
    if not any(narrowing.narrows(label) and narrowing.row(label).sum() > 1 for label, _ in before):
        return False
    after = run.coupler.picked.get(new)
    if after is None:  # a pass may pick in front of the node
        return narrowing.take(old) is None
    wanted, got = ([label.ids[index : index + 1] for label, index in picks] for picks in (before, after))
    return len(wanted) != len(got) or any(
        _are_others(run.coupler.units.find(ids), compact[units], run)
        for ids, units in zip(got, wanted, strict=True)
    )


def _are_others(got: Ids, wanted: Ids, run: Run) -> bool:
    """Whether one of the units, where both are known, is another than is wanted."""
    both = (wanted != 0) & (got != 0) & (got <= run.coupler.units.anchors)
    return got.shape != wanted.shape or bool((got[both] != wanted[both]).any())


def _alike(value: Value, dim: int, narrowing: Narrowing, compact: Any) -> bool:
    """Whether the rows that survive along a dimension hold the same units (heads that share one key head)."""
    for label in map(value.label, range(len(value.shape))):
        if label is not None and dim in label.over:
            left = _survivors(narrowing, value.label, label, compact)
            if left is not None and dim in left.over:
                first = left.ids.take([0], axis=left.over.index(dim))
                return bool((left.ids == first).all())
    return False


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Equal operators and numbers, to the last bit or so."""
    return len(a) == len(b) and all(
        len(x) == len(y)
        and x[0] == y[0]
        and all(math.isclose(p, q, rel_tol=1e-12) for p, q in zip(x[1:], y[1:], strict=True))
        for x, y in zip(a, b, strict=True)
    )


def _differs(
    old: Value, new: Value, run: Run, narrowing: Narrowing, compact: Any
) -> tuple[str, tuple[int, ...]]:
    """Why a value is not the predicted one, or an empty string; and in which dimensions."""
    expected = narrowing.shape(old)
    if new.shape != expected:
        same = len(new.shape) == len(expected)
        dims = tuple(d for d, size in enumerate(expected) if new.shape[d] != size) if same else ()
        return f"has shape {new.shape}, expected {expected}", dims
    for dim in range(len(expected)):
        label, other = old.label(dim), new.label(dim)
        if label is None or label.over or expected[dim] == 1 or not narrowing.narrows(label):
            continue
        wanted = compact[label.ids[narrowing.alive(label)]]
        if not wanted.any():
            continue
        if new.is_open(dim):
            continue
        if other is None and (_alike(old, dim, narrowing, compact) or (wanted == wanted[0]).all()):
            continue  # of one unit alone (a head that goes as a whole) there is no order
        if other is None:
            return f"lost track of dimension {dim}", (dim,)
        if other.over:
            continue
        if _are_others(run.coupler.units.find(other.ids), wanted, run):
            return f"has other units, or in another order, along dimension {dim}", (dim,)
    return "", ()
