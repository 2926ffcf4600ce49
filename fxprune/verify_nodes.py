"""Two networks side by side: their outputs, and where these differ, node by node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd
from torch.utils import _pytree as pytree

from .coupling.units import Ids, Label, Value
from .errors import VerificationError
from .files import told
from .graph_module import Interpreter
from .known_values import made_of_sizes
from .nodes import describe_source, operator_name
from .passes import Narrowing
from .passes.parameters import narrow, surviving
from .random_numbers import drawn
from .trees import Leaf, flatten
from .verify_masked import UNWRITTEN
from .verify_model import copied, plain, relative_error


class UnknownUnitsError(Exception):
    """Which units stand where at other sizes of the inputs is not known."""


class PrecisionError(Exception):
    """The original does not run in the precision of the comparison."""


_PICKING: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(["sort", "argsort"], (1, -1)),
    **dict.fromkeys(["topk", "kthvalue"], (2, -1)),
    **dict.fromkeys(["max", "min", "median", "argmax", "argmin"], (1, None)),
}
"""Operators that give places by size: where their dimension stands, and what it is by default."""


_AVERAGES = frozenset(
    ["mean", "sum", *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_", "_adaptive_") for n in (1, 2, 3))]
)


_AVERAGING = (_AvgPoolNd, _AdaptiveAvgPoolNd)


def compare_outputs(
    original: nn.Module,
    candidate: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labelled: Mapping[Leaf, Value],
    narrowing: Narrowing,
) -> float:
    """Largest relative error between the outputs; infinite where their structure differs.

    Of outputs that may become narrower, and of state, the surviving part of the original's is compared.
    """
    outputs = []
    for module in (original, candidate):
        with drawn(0):
            try:
                # Past __call__, which would print torch.fx's own traceback.
                outputs.append(module.forward(*copied(args), **copied(kwargs)))
            except Exception as error:
                if module is original:
                    raise PrecisionError(
                        f"the original model does not run on the example inputs in this precision: "
                        f"{told(error)}. Where only another will do, give verify its dtype."
                    ) from error
                return math.inf  # the walk will say where
    (wanted, structure), (got, other) = (flatten(tree) for tree in outputs)
    if structure.leaves != other.leaves:
        return math.inf
    expected = []
    for tensor, leaf in zip(wanted, structure.leaves, strict=True):
        value = labelled.get(leaf)
        if value is not None and any(narrowing.narrows(value.label(d)) for d in range(len(value.shape))):
            tensor = narrow(tensor, _labels(value, tensor, narrowing), narrowing)
        expected.append(tensor)
    return relative_error([got, plain(outputs[1])], [expected, plain(outputs[0])])


class Walk:
    """Runs two graphs side by side, node by node."""

    def __init__(
        self,
        original: fx.GraphModule,
        narrowing: Narrowing,
        inexact: Mapping[str, None],
        limit: float,
    ) -> None:
        self.original = original
        self.narrowing, self.inexact, self.limit = narrowing, inexact, limit
        self.compared = 0
        self.settled = False
        self.drawn: dict[str, None] = {}

    def run(self, candidate: fx.GraphModule, inputs: list[Any]) -> float:
        """Largest relative error of a node of ``candidate``; raises VerificationError above the limit."""
        worst = 0.0
        wanted = _Stepper(self.original, copied(inputs))
        places = [node for node in self.original.graph.nodes if node.op == "placeholder"]
        narrow = [self._narrowed(node, value) for node, value in zip(places, inputs, strict=True)]
        got = _Stepper(candidate, copied(narrow))
        nodes = self.original.graph.nodes
        names = {n.name for n in nodes if n.op == "output" or self.narrowing.tree(n.name) is not None}
        for node in got:
            if node.name not in names:
                continue
            reference = wanted.advance(node.name, self._settle)
            if node.op in ("placeholder", "get_attr"):
                continue
            expected = self._narrowed(node, reference)
            if node.name in self.inexact:
                got.values[node] = expected
                continue
            if self._narrowed_later(node) and shapes_of(got.values[node]) == shapes_of(reference):
                expected = reference
            ours, theirs = self._used(node, got.values[node], expected)
            error = relative_error(ours, theirs)
            if error > self.limit and made_of_sizes(node) and not any(map(_is_floating, ours)):
                continue  # of narrowed sizes: what is made by them is compared
            if error > self.limit and got.draws(node, self.limit):
                got.values[node], self.settled, self.drawn[node.name] = expected, True, None
                continue
            if error > self.limit and self._cancels(node, got, ours, theirs, worst):
                got.values[node], self.settled, error = expected, True, 0.0
            if error > self.limit and self._tied(node, got.values, expected):
                got.values[node], self.settled, error = expected, True, 0.0
            self.compared += 1
            if error > self.limit:
                original = next(n for n in self.original.graph.nodes if n.name == node.name)
                source = describe_source(original)
                where = f" ({source})" if source else ""
                raise VerificationError(
                    f"the pruned network first differs from the masked original at node "
                    f"{node.name}{where}: relative error {error:.1e}, allowed {self.limit:.0e}. "
                    f"Got {shapes_of(got.values[node])}, expected {shapes_of(expected)}. "
                    f"(A network that was trained or edited since it was pruned differs, too.)"
                )
            worst = max(worst, error)
        return worst

    def _settle(self, node: fx.Node, reference: Any) -> Any:
        """The masked original's value, with zeros where a removed channel is not finite.

        What removed channels carry does not count, since all that reads them multiplies it by zero; but zero
        times infinity, as where something is divided by a removed parameter, would count.
        """
        if node.op in ("placeholder", "get_attr", "output"):
            return reference
        values = iter(pytree.tree_leaves(self._tree(node)))

        def settled(leaf: Any) -> Any:
            value = next(values, None)
            if (
                not (isinstance(leaf, torch.Tensor) and isinstance(value, Value) and leaf.is_floating_point())
                or leaf.dim() != len(value.shape)
                or bool(leaf.isfinite().all())
            ):
                return leaf
            alive = surviving(leaf.shape, _labels(value, leaf, self.narrowing), self.narrowing)
            broken = None if alive is None else ~leaf.isfinite() & ~alive.to(leaf.device)
            if broken is None or not bool(broken.any()):
                return leaf
            self.settled = True
            return leaf.masked_fill(broken, 0)

        leaves, spec = pytree.tree_flatten(reference)
        return pytree.tree_unflatten([settled(leaf) for leaf in leaves], spec)

    @staticmethod
    def _cancels(node: fx.Node, got: _Stepper, ours: list[Any], theirs: list[Any], worst: float) -> bool:
        """Whether an average or a sum is left with the rounding errors of what it runs over.

        Behind a batch normalisation in training mode the mean over a batch of one is zero, say. What is left
        is as large as the errors that come in, of ``worst`` relative to the largest entry there.
        """
        if not node.args or not isinstance(node.args[0], fx.Node) or len(ours) != 1 or not got.averages(node):
            return False
        source = got.values[node.args[0]]
        if not isinstance(source, torch.Tensor) or not source.is_floating_point():
            return False
        entries = source.numel() // max(ours[0].numel(), 1) if operator_name(node) == "sum" else 1
        scale = float(source.abs().max()) * entries
        return relative_error(ours, theirs, scale) <= 8 * (worst + torch.finfo(source.dtype).eps)

    def _tied(self, node: fx.Node, values: Mapping[fx.Node, Any], wanted: Any) -> bool:
        """Whether a node that picks by size differs only in which ones it picks of entries that are equal.

        Entries that are equal in one network are so in the other up to rounding, which then decides. Both
        ways of picking are tried on what the pruned network picks from.
        """
        name = operator_name(node)
        if name not in _PICKING or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        source = values[node.args[0]]
        pairs = list(zip(pytree.tree_leaves(values[node]), pytree.tree_leaves(wanted), strict=True))
        (got, want), numbers = pairs[-1], pairs[:-1]
        if not source.is_floating_point() or got.is_floating_point() or got.shape != want.shape:
            return False
        at, default = _PICKING[name]
        dim: Any = node.kwargs.get("dim", node.args[at] if len(node.args) > at else default)
        if isinstance(dim, fx.Node):  # the larger of two tensors
            return False
        if dim is None:
            source, dim, got, want = source.flatten(), 0, got.reshape(1), want.reshape(1)
        elif got.dim() < source.dim():
            got, want = got.unsqueeze(dim), want.unsqueeze(dim)
        if int(want.max()) >= source.shape[dim]:
            return False
        numbers = [*numbers, (source.take_along_dim(got, dim), source.take_along_dim(want, dim))]
        return max(relative_error(a, b) for a, b in numbers) <= self.limit

    def _used(self, node: fx.Node, *trees: Any) -> list[list[Any]]:
        """The leaves of two trees that some operator reads, and that have been written."""
        if operator_name(node).startswith(UNWRITTEN):
            return [[] for _ in trees]
        unread = [
            isinstance(value, Value) and bool(value.on_use)
            for value in pytree.tree_leaves(self.narrowing.tree(node.name))
        ]
        return [
            [leaf for i, leaf in enumerate(pytree.tree_leaves(tree)) if i >= len(unread) or not unread[i]]
            for tree in trees
        ]

    def _narrowed_later(self, node: fx.Node) -> bool:
        """Whether the node makes a constant, which the rewriter narrows by a node of its own behind it."""
        value = self.narrowing.value(node)
        state = value.state if value is not None else None
        return state is not None and state.tensor is None and state.name == node.name

    def linked(self) -> bool:
        """Whether what comes in or goes out is narrower, as it may be between regions."""
        trees = [self._tree(n) for n in self.original.graph.nodes if n.op in ("placeholder", "output")]
        values = [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Value)]
        return any(self.narrowing.shape(value) != value.shape for value in values)

    def _tree(self, node: fx.Node) -> Any:
        """The labelled outputs of a node; those of the graph for its output."""
        if node.op != "output":
            return self.narrowing.tree(node.name)
        (results,) = (n.args[0] for n in self.original.graph.nodes if n.op == "output")
        graph = self.narrowing.graph
        gone = [graph.whole.branches[name] for name in graph.removed_branches]
        streams = {branch.addition: branch.stream for branch in gone}

        def tree(returned: fx.Node) -> Any:
            name = returned.name
            while name in streams:  # without the branch, the sum is the stream
                name = streams[name]
            return self.narrowing.tree(name)

        return map_arg(results, tree)

    def _narrowed(self, node: fx.Node, reference: Any) -> Any:
        values = iter(pytree.tree_leaves(self._tree(node)))

        def narrowed(leaf: Any) -> Any:
            value = next(values, None)
            if isinstance(leaf, torch.Tensor) and isinstance(value, Value):
                return narrow(leaf, _labels(value, leaf, self.narrowing), self.narrowing)
            return leaf

        leaves, spec = pytree.tree_flatten(reference)
        return pytree.tree_unflatten([narrowed(leaf) for leaf in leaves], spec)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _labels(value: Value, leaf: torch.Tensor, narrowing: Narrowing) -> list[Label | None]:
    """The labels of the dimensions of ``leaf``, which is ``value`` at perhaps other sizes of the inputs.

    Those of dimensions from which nothing goes, as of positions, are left out.
    """
    labels = [value.label(dim) for dim in range(len(value.shape))]
    labels = [label if narrowing.narrows(label) else None for label in labels]
    if len(value.shape) != leaf.dim() and any(label is not None for label in labels):
        raise UnknownUnitsError
    return [label and _at(label, dim, leaf.shape) for dim, label in enumerate(labels)]


def _at(label: Label, dim: int, shape: Sequence[int]) -> Label:
    """A label at other sizes: where units repeat along a dimension (a batch of rows), they go on doing so.

    Raises:
        UnknownUnitsError: where the example does not show how they repeat.
    """
    ids = label.ids
    for place, axis in enumerate((*label.over, dim)):
        size = ids.shape[place]
        if shape[axis] == size:
            continue
        moved = np.moveaxis(ids, place, -1)
        inner = next((n for n in range(size, 1, -1) if size % n == 0 and _runs(moved, n)), 1)
        outer = next(
            n for n in range(1, size + 1) if size % n == 0 and (moved == np.roll(moved, n, -1)).all()
        )
        units = size // inner
        if inner > 1 and shape[axis] % size == 0:  # more places, or a larger batch
            raise UnknownUnitsError
        if inner > 1 and shape[axis] % units == 0:  # each unit several times, one after the other
            ids = np.repeat(ids.take(range(0, size, inner), place), shape[axis] // units, place)
        elif outer < size and shape[axis] % outer == 0:
            ids = np.concatenate([ids.take(range(outer), place)] * (shape[axis] // outer), place)
        else:
            raise UnknownUnitsError
    return label if ids is label.ids else replace(label, ids=ids)


def _runs(ids: Ids, length: int) -> bool:
    parts = ids.reshape(*ids.shape[:-1], -1, length)
    return bool((parts == parts[..., :1]).all())


class _Stepper:
    """An fx interpreter that can be stopped after each node, and whose values can be exchanged."""

    def __init__(self, module: fx.GraphModule, inputs: list[Any]) -> None:
        self.interpreter = Interpreter(module, garbage_collect_values=False)
        self.nodes = iter(module.graph.nodes)
        self.inputs = iter(inputs)
        self.values: dict[fx.Node, Any] = self.interpreter.env
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        self.last_use: dict[int, list[fx.Node]] = {}
        for node in module.graph.nodes:
            last = max((order[user] for user in node.users), default=order[node])
            self.last_use.setdefault(last, []).append(node)
        self.place = 0

    def step(self) -> fx.Node:
        node = next(self.nodes)
        if node.op == "placeholder":
            self.values[node] = next(self.inputs)
        else:
            try:
                self.values[node] = self._seeded(node, 0)  # both networks draw the same random numbers
            except Exception as error:
                raise VerificationError(f"node {node.name} fails: {told(error)}") from error
        return node

    def _seeded(self, node: fx.Node, seed: int) -> Any:
        with drawn(seed):
            return self.interpreter.run_node(node)

    def draws(self, node: fx.Node, limit: float) -> bool:
        """Whether the node that was run last gives something else with another seed."""
        outcomes = [pytree.tree_leaves(copied(self._seeded(node, seed))) for seed in (0, 1)]
        return relative_error(outcomes[0], outcomes[1]) > limit

    def averages(self, node: fx.Node) -> bool:
        """Whether the node is a mean or a sum."""
        if node.op == "call_module":
            return isinstance(self.interpreter.module.get_submodule(str(node.target)), _AVERAGING)
        return operator_name(node) in _AVERAGES

    def _free(self) -> None:
        for node in self.last_use.get(self.place, ()):
            if node.op != "output":
                self.values.pop(node, None)
        self.place += 1

    def __iter__(self) -> Iterator[fx.Node]:
        while True:
            try:
                node = self.step()
            except StopIteration:
                return
            yield node
            self._free()

    def advance(self, name: str, settle: Callable[[fx.Node, Any], Any]) -> Any:
        """Run up to and including the node called ``name``; its value, which ``settle`` may change."""
        while True:
            try:
                node = self.step()
            except StopIteration:
                raise VerificationError(
                    f"the pruned network has other nodes than the original, or in another order (see node "
                    f"{name}). Give verify the module that plan.apply(model) returned."
                ) from None
            value = self.values[node] = settle(node, self.values[node])
            self._free()
            if node.name == name:
                return value


def shapes_of(tree: Any) -> str:
    """The shapes of the tensors of a tree, and what else is in it, for messages."""
    return ", ".join(
        str(tuple(t.shape)) if isinstance(t, torch.Tensor) else repr(t) for t in pytree.tree_leaves(tree)
    )


__all__ = ["PrecisionError", "UnknownUnitsError", "Walk", "compare_outputs", "shapes_of"]
