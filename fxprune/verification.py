"""Verify: the exactness contract.

``pruned(x)`` equals ``original(x)`` with all removed parameter entries set to zero, to rounding, wherever
no inexact operator (a normalisation or a reduction) runs over a narrowed axis. The entries of a unit are
removed on both sides of each coupling, so consumers multiply by zero whatever a removed channel carries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .api import graph_for, model_of
from .capture.regions import real_inputs
from .coupling.graph import CouplingGraph
from .coupling.units import Value
from .errors import ExampleInputsError, VerificationError
from .inputs import normalize
from .nn import multi_head_attention
from .nodes import copy_graph, describe_source, mutable, operator_name
from .passes import Narrowing
from .passes.parameters import masked, narrow, surviving
from .planning.plan import PruningPlan
from .program import Program
from .region_program import RegionModule, RegionProgram
from .trees import Leaf, flatten
from .verify_class import as_graph, compare_classes


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification that found no difference.

    Attributes:
        error: largest difference, relative to the largest magnitude of the value it was found in.
        compared: number of graph nodes whose values were compared one by one; 0 where the outputs of
            the whole networks were.
        skipped: inexact nodes, whose values may differ; what follows them was compared from there on.
        dtype: the precision of the comparison.
    """

    error: float
    compared: int
    skipped: tuple[str, ...]
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """Whether the networks are equal as a whole."""
        return not self.skipped

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        measured = f"(relative error {self.error:.1e} in {precision})"
        if self.exact:
            return f"exact: the pruned network equals the masked original {measured}"
        return (
            f"exact but for {len(self.skipped)} normalisations and reductions over narrowed axes: all other "
            f"{self.compared} nodes equal those of the masked original {measured}"
        )


def verify(
    model: nn.Module | CouplingGraph,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
) -> Verdict:
    """Check that ``pruned`` computes what ``model`` computes with the removed entries set to zero.

    Both are run in evaluation mode, as copies in ``dtype``. If an inexact group was narrowed, the
    networks differ legitimately from there on; then the graphs are run side by side, each node on the
    masked original's narrowed values wherever an inexact node came before. Of a result in the model's own
    class, its own ``forward`` is compared as well, in both modes (with dropout off) where the plan is exact.

    Args:
        model: the original model, or its analysis; not changed.
        pruned: what ``plan.apply(model)`` gave.
        plan: the plan.
        example_inputs: real inputs, as for :func:`fxprune.analyze`.
        dtype: precision of the comparison.
        tolerance: largest relative error allowed; by default 1e-8 in float64, 1e-3 in less.

    Raises:
        VerificationError: where the networks differ; names the first node, its source line and the error.
        PlanError: if the plan does not belong to the model.
    """
    args, kwargs = normalize(example_inputs)
    given, model = model, model_of(model)
    if any(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()]):
        raise VerificationError("the model is on the meta device, so there are no weights to verify.")
    limit = tolerance if tolerance is not None else 1e-8 if dtype == torch.float64 else 1e-3
    if plan.into == "module":
        form, made = as_graph(model, pruned, plan), replace(plan, into="graph")
        verdict = verify(model, form, made, example_inputs, dtype=dtype, tolerance=tolerance)
        error = compare_classes(
            model,
            pruned,
            plan,
            form,
            verdict.exact,
            example_inputs,
            lambda module: _converted(module, dtype),
            lambda tree: _cast(tree, dtype),
            limit,
        )
        return replace(verdict, error=max(verdict.error, error))
    graph = graph_for(plan, given)
    narrowing = Narrowing(graph, plan.removed)
    program = graph.captured.program
    originals = _masked(program, narrowing, dtype).pieces()
    candidate = _converted(pruned, dtype).eval()
    inexact = {
        event.node.name: None
        for event in graph.run.coupler.inexact
        if event.node is not None and narrowing.mixed(event.ids)
    }
    calls = real_inputs(model, program, args, kwargs)
    if originals.keys() != calls.keys():
        missed = ", ".join(sorted(originals.keys() - calls.keys()))
        raise VerificationError(f"{missed} is not called in evaluation mode on these inputs.")
    worst, compared = 0.0, 0
    for path, piece in originals.items():
        args, kwargs = (_cast(tree, dtype) for tree in calls[path])
        original = piece.module().eval()
        part = candidate.get_submodule(path)
        walk = _Walk(original, narrowing, inexact, limit)
        with torch.no_grad():
            linked = isinstance(program, RegionProgram) and walk.linked()
            if not inexact and not linked:
                difference = _whole(original, part, args, kwargs, graph.run.outputs[path], narrowing)
                if difference <= limit:
                    worst = max(worst, difference)
                    continue
            try:
                inputs = piece.bind(args, kwargs)
            except TypeError as error:
                raise ExampleInputsError(f"the captured {plan.model} {error}.") from error
            if isinstance(program, RegionProgram):
                part = program.graph_module(candidate, path) or part
            if not isinstance(part, fx.GraphModule):
                differs = (
                    "" if inexact or linked else f"the outputs differ by {difference:.1e} (relative), and "
                )
                raise VerificationError(
                    f"{differs}{type(part).__name__} is no GraphModule, so it cannot be compared with the "
                    f"masked original node by node. Give verify the module that plan.apply(model) returned."
                )
            worst = max(worst, walk.run(part, inputs))
            compared += walk.compared
        if not inexact and not linked and not walk.settled:
            raise VerificationError(
                f"the outputs differ from the masked original's by {difference:.1e} (relative), though no "
                f"single node of the graph differs: was {type(part).__name__} changed since it was pruned?"
            )
    if inexact:
        _compare_weights(program, pruned, narrowing)  # the skipped nodes' own weights, too
    return Verdict(worst, compared, tuple(inexact), dtype)


def _converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` in ``dtype``."""
    new = copy.deepcopy(module)._apply(lambda tensor: tensor.to(_wide(tensor.dtype, dtype)))
    for inner in new.modules():
        if isinstance(inner, RegionModule):
            RegionModule.take_over(inner, _recast(inner.graph, dtype))
        elif isinstance(inner, fx.GraphModule):
            inner.graph = _recast(inner.graph, dtype)
    return new


def _wide(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` in place of a floating-point type, its complex counterpart in place of a complex one."""
    return dtype if own.is_floating_point else dtype.to_complex() if own.is_complex else own


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(_wide(tensor.dtype, dtype), copy=True)

    return pytree.tree_map_only(torch.Tensor, cast, tree)


def _masked(program: Program, narrowing: Narrowing, dtype: torch.dtype) -> Program:
    """The original network with removed parameter entries set to zero."""
    made: dict[int, torch.Tensor] = {}
    tensors = {}
    extras = {name: _cast(tensor, dtype) for name, tensor in program.extras.items()}
    for name, tensor in program.tensors.items():
        if id(tensor) not in made:
            new = _cast(tensor, dtype)
            if isinstance(tensor, nn.Parameter):
                alive = masked(tensor, narrowing)
                if alive is not None:
                    new.masked_fill_(~alive.to(new.device), 0)
                new = nn.Parameter(new, requires_grad=False) if new.is_floating_point() else new
            made[id(tensor)] = new
        tensors[name] = made[id(tensor)]
    return replace(program, graph=_recast(program.graph, dtype), tensors=tensors, extras=extras)


def _recast(graph: fx.Graph, dtype: torch.dtype) -> fx.Graph:
    """A copy of ``graph`` with ``dtype`` for every floating-point type that is written down.

    Dropout that is written down is off: what it draws depends on the width. Memory that is not written yet
    holds zeros, so that slices of it can be compared.
    """
    new, nodes = copy_graph(graph)

    def recast(argument: Any) -> Any:
        return _wide(argument, dtype) if isinstance(argument, torch.dtype) else argument

    for node in nodes.values():
        if node.op == "call_method" and node.target in _CASTS:
            node.target, node.args = "to", (node.args[0], dtype)
        elif node.op != "get_attr":
            node.args, node.kwargs = map_aggregate(node.args, recast), map_aggregate(node.kwargs, recast)
        if operator_name(node).startswith(_UNWRITTEN):
            with new.inserting_after(node):
                new.create_node("call_method", "zero_", (node,), name=f"{node.name}_zeroed")
        if node.op != "call_function":
            continue
        if node.target in _DROPOUTS:
            node.args, node.kwargs = node.args[:2], {**node.kwargs, "training": False}
        elif node.target is multi_head_attention:
            node.kwargs = {**node.kwargs, "training": False}
        elif node.target is F.scaled_dot_product_attention and "dropout_p" in node.kwargs:
            node.kwargs = {**node.kwargs, "dropout_p": 0.0}
    return new


_UNWRITTEN = ("empty", "new_empty")
_PICKING: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(["sort", "argsort"], (1, -1)),
    **dict.fromkeys(["topk", "kthvalue"], (2, -1)),
    **dict.fromkeys(["max", "min", "median", "argmax", "argmin"], (1, None)),
}
"""Operators that give places by size: where their dimension stands, and what it is by default."""
_CASTS = frozenset(["float", "double", "half", "bfloat16"])
_DROPOUTS = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout]
)


def _compare_weights(program: Program, pruned: nn.Module, narrowing: Narrowing) -> None:
    """Refuse a network whose parameters and buffers are not the surviving slices of the original's."""
    state = dict(
        [*pruned.named_parameters(remove_duplicate=False), *pruned.named_buffers(remove_duplicate=False)]
    )
    for name, tensor in program.tensors.items():
        if name in state:
            wanted = narrow(tensor, narrowing.graph.labels(tensor), narrowing)
            error = _error(state[name].detach().to(wanted), wanted.detach())
            if error > 0:
                users = [
                    n.name for n in program.graph.nodes if name.startswith(f"{n.target}.") or n.target == name
                ]
                raise VerificationError(
                    f"the pruned network first differs from the masked original at node "
                    f"{users[0] if users else '?'}: {name} is not the surviving slice of the "
                    f"original's (shape {tuple(state[name].shape)}, expected {tuple(wanted.shape)}; "
                    f"relative error {error:.1e}). Verify before training on."
                )


def _whole(
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
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                # Past __call__, which would print torch.fx's own traceback.
                outputs.append(module.forward(*_copied(args), **_copied(kwargs)))
            except Exception as error:
                if module is original:
                    raise ExampleInputsError(
                        f"the original model does not run on the example inputs in this precision: "
                        f"{type(error).__name__}: {error}. Where only another will do, give verify its dtype."
                    ) from error
                return math.inf  # the walk will say where
    (wanted, structure), (got, other) = (flatten(tree) for tree in outputs)
    if structure.leaves != other.leaves:
        return math.inf
    expected = []
    for tensor, leaf in zip(wanted, structure.leaves, strict=True):
        value = labelled.get(leaf)
        labels = [value.label(dim) for dim in range(len(value.shape))] if value is not None else None
        expected.append(tensor if labels is None else narrow(tensor, labels, narrowing))
    return _error([got, _plain(outputs[1])], [expected, _plain(outputs[0])])


def _plain(tree: Any) -> list[Any]:
    """What of a tree is no tensor."""
    return [leaf for leaf in pytree.tree_leaves(tree) if not isinstance(leaf, torch.Tensor)]


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, tree)


def _error(got: Any, wanted: Any) -> float:
    """Largest relative difference of two trees of tensors."""
    gots, wanteds = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    if len(gots) != len(wanteds):
        return math.inf
    worst = 0.0
    for a, b in zip(gots, wanteds, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return math.inf
            same = (a == b) | ((a != a) & (b != b))
            if bool(same.all()):
                continue
            if not (a.is_floating_point() or a.is_complex()):
                return math.inf
            scale = b[torch.isfinite(b)].abs().max().item() if bool(torch.isfinite(b).any()) else 0.0
            difference = (a - b).abs().masked_fill(same, 0).max().item()
            worst = max(worst, difference / max(scale, 1e-30) if difference == difference else math.inf)
    return worst


class _Walk:
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

    def run(self, candidate: fx.GraphModule, inputs: list[Any]) -> float:
        """Largest relative error of a node of ``candidate``; raises VerificationError above the limit."""
        worst = 0.0
        wanted = _Stepper(self.original, _copied(inputs))
        places = [node for node in self.original.graph.nodes if node.op == "placeholder"]
        narrow = [self._narrowed(node, value) for node, value in zip(places, inputs, strict=True)]
        got = _Stepper(candidate, _copied(narrow))
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
            if self._narrowed_later(node) and _shapes(got.values[node]) == _shapes(reference):
                expected = reference
            error = _error(*self._used(node, got.values[node], expected))
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
                    f"Got {_shapes(got.values[node])}, expected {_shapes(expected)}."
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
                or tuple(leaf.shape) != value.shape
                or bool(leaf.isfinite().all())
            ):
                return leaf
            labels = [value.label(d) for d in range(len(value.shape))]
            alive = surviving(leaf.shape, labels, self.narrowing)
            broken = None if alive is None else ~leaf.isfinite() & ~alive.to(leaf.device)
            if broken is None or not bool(broken.any()):
                return leaf
            self.settled = True
            return leaf.masked_fill(broken, 0)

        leaves, spec = pytree.tree_flatten(reference)
        return pytree.tree_unflatten([settled(leaf) for leaf in leaves], spec)

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
        return max(_error(a, b) for a, b in numbers) <= self.limit

    def _used(self, node: fx.Node, *trees: Any) -> list[list[Any]]:
        """The leaves of two trees that some operator reads, and that have been written."""
        if operator_name(node).startswith(_UNWRITTEN):
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
        return map_arg(results, lambda n: self.narrowing.tree(n.name))

    def _narrowed(self, node: fx.Node, reference: Any) -> Any:
        values = iter(pytree.tree_leaves(self._tree(node)))

        def narrowed(leaf: Any) -> Any:
            value = next(values, None)
            if isinstance(leaf, torch.Tensor) and isinstance(value, Value):
                labels = [value.label(d) for d in range(len(value.shape))]
                return narrow(leaf, labels, self.narrowing)
            return leaf

        leaves, spec = pytree.tree_flatten(reference)
        return pytree.tree_unflatten([narrowed(leaf) for leaf in leaves], spec)


class _Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, mutable(args), mutable(kwargs))


class _Stepper:
    """An fx interpreter that can be stopped after each node, and whose values can be exchanged."""

    def __init__(self, module: fx.GraphModule, inputs: list[Any]) -> None:
        self.interpreter = _Interpreter(module, garbage_collect_values=False)
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
                self.values[node] = self.interpreter.run_node(node)
            except Exception as error:
                raise VerificationError(f"node {node.name} fails: {type(error).__name__}: {error}") from error
        return node

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


def _shapes(tree: Any) -> str:
    return ", ".join(
        str(tuple(t.shape)) if isinstance(t, torch.Tensor) else repr(t) for t in pytree.tree_leaves(tree)
    )


__all__ = ["Verdict", "verify"]
