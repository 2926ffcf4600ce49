"""Verify: the exactness contract.

``pruned(x)`` equals ``original(x)`` with all removed parameter entries set to zero, to rounding, wherever
no inexact operator (a normalisation or a reduction) runs over a narrowed axis. The entries of a unit are
removed on both sides of each coupling, so consumers multiply by zero whatever a removed channel carries.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd
from torch.utils import _pytree as pytree

from .api import graph_for, model_of
from .calls import as_one
from .capture.regions import real_inputs
from .coupling.graph import CouplingGraph
from .coupling.units import Ids, Label, Value
from .errors import ExampleInputsError, ModeError, VerificationError
from .graph_module import Interpreter, OwnedModule
from .inputs import normalize
from .known_values import made_of_sizes
from .nn import MultiheadAttention, multi_head_attention
from .nodes import copy_graph, describe_source, operator_name
from .passes import Narrowing
from .passes.parameters import masked, narrow, surviving
from .planning.plan import PruningPlan
from .program import Program, named_tensors
from .region_program import RegionModule, RegionProgram
from .sizes import resized
from .trees import Leaf, flatten
from .verify_class import as_graph, compare_classes
from .verify_model import (
    LARGE,
    LIMITS,
    ROUGH,
    Outcome,
    buffer_scale,
    call,
    compare_with_model,
    copied,
    plain,
    relative_error,
    second_batch,
    writes_parameters,
)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification that found no difference.

    Attributes:
        error: largest difference, relative to the largest magnitude of the value it was found in.
        compared: number of graph nodes whose values were compared one by one; 0 where the outputs of
            the whole networks were.
        skipped: inexact nodes, whose values may differ; what follows them was compared from there on.
        dtype: the precision of the comparison.
        modes: the modes in which the networks were compared, "evaluation" and "training".
        inputs: how many sets of inputs they were compared on, other sizes among them where these are free.
        notes: what could not be compared, and why.
    """

    error: float
    compared: int
    skipped: tuple[str, ...]
    dtype: torch.dtype
    modes: tuple[str, ...] = ("evaluation",)
    inputs: int = 1
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the networks are equal as a whole."""
        return not self.skipped

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        sizes = f", on {self.inputs} sizes of inputs" if self.inputs > 1 else ""
        measured = f"(relative error {self.error:.1e} in {precision}; {' and '.join(self.modes)} mode{sizes})"
        if self.exact:
            said = f"exact: the pruned network equals the masked original {measured}"
        else:
            said = (
                f"exact but for {len(self.skipped)} normalisations and reductions over narrowed axes: all "
                f"other {self.compared} nodes equal those of the masked original {measured}"
            )
        return "\n".join([said, *(f"not compared: {note}" for note in self.notes)])


def verify(
    model: nn.Module | CouplingGraph,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    more_inputs: Sequence[Any] = (),
    low_memory: bool = False,
) -> Verdict:
    """Check that ``pruned`` computes what ``model`` computes with the removed entries set to zero.

    First the captured graph is compared with a copy of ``model``, which runs its own ``forward``. Then the
    masked original is with ``pruned``, both as copies in ``dtype``. If an inexact group was narrowed, these
    differ legitimately from there on; then the graphs are run side by side, each node on the masked
    original's narrowed values wherever an inexact node came before. Of a result in the model's own
    class, its own ``forward`` is compared as well where the plan is exact. All of it is done in
    evaluation mode and in training mode (with dropout off, batch statistics included), and in evaluation mode
    again at other sizes (batch, height, width, length) where the model takes them.

    Of a compensated network the narrowing is compared: a copy of it with the weights that the plan gives.

    Args:
        model: the original model, or its analysis; not changed.
        pruned: what ``plan.apply(model)`` gave.
        plan: the plan.
        example_inputs: real inputs, as for :func:`fxprune.analyze`.
        dtype: precision of the comparison of the two networks. By default float64; for networks of more than
            a gigabyte, and those that do not run in float64, their own.
        tolerance: largest relative error allowed; by default 1e-8 in float64, 1e-3 in float32, 5e-2 in less.
        more_inputs: further inputs, of other sizes say, to compare on in evaluation mode; in place of those
            that are made from the example.
        low_memory: compare in the networks' own precision, so that weights are copied once at most.

    Raises:
        VerificationError: where the networks differ; names the first node, its source line and the error.
        PlanError: if the plan does not belong to the model.
    """
    given, model = model, model_of(model)
    if "compensation" in getattr(pruned, "meta", {}):
        said = "the weights of a compensated network: those that the plan narrows stood in their place"
        verdict = verify(
            given,
            _uncompensated(given, pruned, plan),
            plan,
            example_inputs,
            dtype=dtype,
            tolerance=tolerance,
            more_inputs=more_inputs,
            low_memory=low_memory,
        )
        return replace(verdict, notes=(*verdict.notes, said))
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        raise VerificationError("the model is on the meta device, so there are no weights to verify.")
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    choice = dtype or (own if low_memory or size > LARGE else torch.float64)
    try:
        return _verify(given, pruned, plan, example_inputs, choice, own, tolerance, more_inputs)
    except _Precision as error:
        if dtype is not None or choice == own:
            raise ExampleInputsError(str(error)) from error.__cause__
    try:
        return _verify(given, pruned, plan, example_inputs, own, own, tolerance, more_inputs)
    except _Precision as error:
        raise ExampleInputsError(str(error)) from error.__cause__


def _uncompensated(given: nn.Module | CouplingGraph, pruned: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of a compensated network with the weights that the plan gives it.

    Raises:
        VerificationError: if it has other tensors than what the plan gives.
    """
    plain = copy.deepcopy(pruned)
    del plain.meta["compensation"]  # type: ignore[union-attr, operator]
    mine, wanted = (dict(named_tensors(module)) for module in (plain, plan.apply(given)))
    for name in {**wanted, **mine}:
        shapes = [tuple(own[name].shape) if name in own else None for own in (mine, wanted)]
        if shapes[0] != shapes[1]:
            raise VerificationError(
                f"the pruned network holds {name} of shape {shapes[0]}, and the plan gives {shapes[1]}."
            )
        mine[name].detach().copy_(wanted[name])
    return plain


class _UnknownUnits(Exception):
    """Which units stand where at other sizes of the inputs is not known."""


class _Precision(Exception):
    """The original does not run in the precision of the comparison."""


def _limit(dtype: torch.dtype, tolerance: float | None) -> float:
    return tolerance if tolerance is not None else LIMITS.get(dtype, ROUGH)


def _verify(
    given: nn.Module | CouplingGraph,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    dtype: torch.dtype,
    own: torch.dtype,
    tolerance: float | None,
    more_inputs: Sequence[Any],
) -> Verdict:
    model = model_of(given)
    limit = _limit(dtype, tolerance)
    if plan.into == "module":
        form, made = as_graph(model, pruned, plan), replace(plan, into="graph")
        verdict = _verify(model, form, made, example_inputs, dtype, own, tolerance, more_inputs)
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
    program = graph.whole.captured.program
    args, kwargs = normalize(example_inputs, several=True)
    model, pruned = as_one(model, kwargs), as_one(pruned, kwargs)
    calls = real_inputs(model, program, args, kwargs)
    pieces = program.pieces()
    if pieces.keys() != calls.keys():
        missed = ", ".join(sorted(pieces.keys() - calls.keys()))
        raise VerificationError(f"{missed} is not called in evaluation mode on these inputs.")
    others = [] if isinstance(program, RegionProgram) else _others(graph, args, kwargs, more_inputs)
    notes: list[str] = []
    taken: list[Any] = []
    for path, piece in pieces.items():
        for training in (False, True):
            runs = [(*calls[path], "")] + ([] if training else others)
            for run_args, run_kwargs, size in runs:
                if size and taken and not more_inputs:
                    break
                _, note = compare_with_model(
                    model.get_submodule(path), piece, run_args, run_kwargs, training, _limit(own, tolerance)
                )
                if not size:
                    notes += [f"{path}: {note}" if path else note] if note else []
                elif not note:
                    taken.append((run_args, run_kwargs))
                elif more_inputs:
                    notes.append(f"{size}: {note}")
    comparison = _Comparison(graph, Narrowing(graph, plan.removed), pruned, dtype, limit)
    comparison.run(calls, False)
    compared = 1
    for more in taken:
        try:
            comparison.run({"": more}, False)
            compared += 1
        except _UnknownUnits:
            notes.append("at other sizes, where a dimension holds channels together with a size that changes")
    trained, note = comparison.trains(calls)
    if trained:
        comparison.run(calls, True)
    notes += [note] if note and note not in notes else []
    if comparison.drawn:
        notes.append(f"{', '.join(comparison.drawn)}: random numbers, as many as there are channels")
    if comparison.inexact or comparison.drawn:
        # the skipped nodes' own weights, too
        _compare_weights(graph.captured.program, pruned, comparison.narrowing)
    modes = ("evaluation", "training") if trained else ("evaluation",)
    return Verdict(
        comparison.worst,
        comparison.compared,
        tuple(comparison.inexact),
        dtype,
        modes,
        compared,
        tuple(dict.fromkeys(notes)),
    )


def _others(
    graph: CouplingGraph, args: tuple[Any, ...], kwargs: dict[str, Any], more_inputs: Sequence[Any]
) -> list[Any]:
    """Further inputs to compare on, and what they are; of those that are made, one is enough."""
    if more_inputs:
        return [(*normalize(more, True), f"inputs {number}") for number, more in enumerate(more_inputs, 2)]
    other = resized((args, kwargs), graph.other_sizes) if graph.other_sizes else None
    doubled = second_batch(args, kwargs)
    found = [(*other, f"another {' and '.join(graph.other_sizes)}")] if other is not None else []
    return [*found, *([(*doubled[:2], f"a batch of {doubled[2]}")] if doubled is not None else [])]


class _Comparison:
    """The masked original and the pruned network, side by side."""

    def __init__(
        self, graph: CouplingGraph, narrowing: Narrowing, pruned: nn.Module, dtype: torch.dtype, limit: float
    ) -> None:
        self.graph, self.narrowing, self.limit, self.dtype = graph, narrowing, limit, dtype
        self.program = graph.whole.captured.program
        self.pieces = graph.captured.program.pieces()
        self.originals = {
            path: (piece, _without_dropout(piece.module()))
            for path, piece in _masked(self.program, narrowing, dtype).pieces().items()
        }
        self.written = any(map(writes_parameters, self.pieces.values()))
        self.candidate = _without_dropout(_converted(pruned, dtype, not self.written))
        self.inexact = {
            event.node.name: None
            for event in graph.run.coupler.inexact
            if event.node is not None and narrowing.mixed(event.ids)
        }
        self.worst, self.compared = 0.0, 0
        self.drawn: dict[str, None] = {}

    def trains(self, calls: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether the networks can be compared in training mode, and if not, why."""
        for path, (_, original) in self.originals.items():
            args, kwargs = (_cast(tree, self.dtype) for tree in calls[path])
            try:
                _mode(original, True)
                outcomes = self._seeds(original, args, kwargs)
            except ModeError as error:
                return False, str(error)
            failed = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
            if failed is not None:
                return (
                    False,
                    f"the masked original does not run in training mode ({type(failed).__name__}: {failed})",
                )
            first, second = (flatten(outcome.output)[0] for outcome in outcomes)
            if relative_error(first, second) > self.limit:
                return False, "in training mode, what is drawn at random depends on widths"
        return True, ""

    def _restored(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Afterwards, buffers hold what they hold now, and parameters where the forward writes to some."""
        return _restored([*module.buffers(), *(module.parameters() if self.written else ())])

    def _seeds(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Outcome]:
        """What the masked original gives with two seeds; its tensors are what they were."""
        outcomes = []
        for seed in (0, 1):
            with self._restored(original):
                outcomes.append(call(original, args, kwargs, seed))
        return outcomes

    def _draws(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether random numbers have a part in what the masked original gives."""
        first, second = (flatten(outcome.output)[0] for outcome in self._seeds(original, args, kwargs))
        return relative_error(first, second) > self.limit

    def run(self, calls: Mapping[str, Any], training: bool) -> None:
        """Compare on these inputs of each piece; raises VerificationError."""
        try:
            _mode(self.candidate, training)
        except ModeError as error:
            raise VerificationError(
                f"the original runs in training mode, the result does not: {error}"
            ) from error
        for path, (piece, original) in self.originals.items():
            _mode(original, training)
            part = self.candidate.get_submodule(path)
            with self._restored(original), self._restored(part):
                self._piece(path, piece, original, part, calls[path])

    def _piece(self, path: str, piece: Program, original: Any, part: nn.Module, inputs: Any) -> None:
        args, kwargs = (_cast(tree, self.dtype) for tree in inputs)
        walk = _Walk(original, self.narrowing, self.inexact, self.limit)
        with torch.no_grad():
            linked = isinstance(self.program, RegionProgram) and walk.linked()
            whole = not self.inexact and not linked
            if whole:
                outputs = self.graph.run.outputs[path]
                with self._restored(original), self._restored(part):
                    difference = _whole(original, part, args, kwargs, outputs, self.narrowing)
                    if difference <= self.limit:
                        difference = max(difference, self._left(self.pieces[path], original, part))
                if difference <= self.limit:
                    self.worst = max(self.worst, difference)
                    return
            else:
                with self._restored(original):
                    failed = call(original, args, kwargs).error
                if failed is not None:
                    raise _Precision(
                        f"the original does not run in {self.dtype}: {failed}. Next: leave dtype out, and it "
                        f"is compared in its own."
                    ) from failed
            try:
                values = piece.bind(args, kwargs)
            except TypeError as error:
                raise ExampleInputsError(f"the captured {self.graph.captured.class_name} {error}.") from error
            if isinstance(self.program, RegionProgram):
                part = self.program.graph_module(self.candidate, path) or part
            if not isinstance(part, fx.GraphModule):
                differs = f"the outputs differ by {difference:.1e} (relative), and " if whole else ""
                raise VerificationError(
                    f"{differs}{type(part).__name__} is no GraphModule, so it cannot be compared with the "
                    f"masked original node by node. Give verify the module that plan.apply(model) returned."
                )
            try:
                self.worst = max(self.worst, walk.run(part, values))
            except _UnknownUnits:
                if not whole or (difference < math.inf and self._draws(original, args, kwargs)):
                    raise
                raise VerificationError(
                    f"on inputs of the shapes {_shapes((args, kwargs))} the pruned network fails, or gives "
                    f"something else than the masked original (relative error {difference:.1e})."
                ) from None
            self.compared += walk.compared
            self.drawn |= walk.drawn
        if whole and not walk.settled:
            raise VerificationError(
                f"the outputs differ from the masked original's by {difference:.1e} (relative), though no "
                f"single node of the graph differs: was {type(part).__name__} changed since it was pruned?"
            )

    def _left(self, own: Program, original: nn.Module, part: nn.Module) -> float:
        """Largest relative error of what is left in buffers, and in parameters where some are written to."""
        wanted, got = (dict(m.named_buffers(remove_duplicate=False)) for m in (original, part))
        scales = {name: buffer_scale(wanted, name) for name in wanted}
        if self.written:
            wanted |= dict(original.named_parameters(remove_duplicate=False))
            got |= dict(part.named_parameters(remove_duplicate=False))
        worst = 0.0
        for name, value in wanted.items():
            tensor = own.tensors.get(name)
            if tensor is not None and name in got:
                expected = narrow(value, self.graph.labels(tensor), self.narrowing)
                worst = max(worst, relative_error(got[name], expected, scales.get(name, 0.0)))
        return worst


def _mode(module: nn.Module, training: bool) -> None:
    """Put a network into a mode, but for its dropout."""
    module.train(training)
    _without_dropout(module)


def _without_dropout(module: Any) -> Any:
    """Dropout off: what it draws depends on the width."""
    for inner in module.modules():
        if isinstance(inner, (_DropoutNd, nn.RReLU)):
            inner.training = False
        elif isinstance(inner, (nn.RNNBase, nn.MultiheadAttention, MultiheadAttention)):
            inner.dropout = 0.0
    return module


@contextlib.contextmanager
def _restored(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Afterwards, these hold what they hold now."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                if tensor.shape == value.shape and not torch.equal(tensor, value):
                    tensor.copy_(value)


def _converted(module: nn.Module, dtype: torch.dtype, share: bool = False) -> nn.Module:
    """A copy of ``module`` in ``dtype``; given ``share``, with the very parameters that have it already."""
    shared = {id(p): p for p in module.parameters() if share and p.dtype == _wide(p.dtype, dtype)}
    new = copy.deepcopy(module, dict(shared))._apply(lambda tensor: tensor.to(_wide(tensor.dtype, dtype)))
    for inner in new.modules():
        if isinstance(inner, RegionModule):
            RegionModule.take_over(inner, _recast(inner.graph, dtype))
        elif isinstance(inner, fx.GraphModule):
            inner.graph = _recast(inner.whole if isinstance(inner, OwnedModule) else inner.graph, dtype)
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
    left = {id(tensor) for tensor in narrowing.graph.captured.program.tensors.values()}
    tensors = {}
    extras = {name: _cast(tensor, dtype) for name, tensor in program.extras.items()}
    for name, tensor in program.tensors.items():
        if id(tensor) not in made:
            new = _cast(tensor, dtype)
            if isinstance(tensor, nn.Parameter):
                alive = masked(tensor, narrowing)
                if id(tensor) not in left:  # of a residual branch that goes as a whole
                    new.zero_()
                elif alive is not None:
                    new.masked_fill_(~alive.to(new.device), 0)
                new = nn.Parameter(new, requires_grad=False)
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
_AVERAGES = frozenset(
    ["mean", "sum", *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_", "_adaptive_") for n in (1, 2, 3))]
)
_AVERAGING = (_AvgPoolNd, _AdaptiveAvgPoolNd)
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
            error = relative_error(state[name].detach().to(wanted), wanted.detach())
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
                outputs.append(module.forward(*copied(args), **copied(kwargs)))
            except Exception as error:
                if module is original:
                    raise _Precision(
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
        if value is not None and any(narrowing.narrows(value.label(d)) for d in range(len(value.shape))):
            tensor = narrow(tensor, _labels(value, tensor, narrowing), narrowing)
        expected.append(tensor)
    return relative_error([got, plain(outputs[1])], [expected, plain(outputs[0])])


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
            if self._narrowed_later(node) and _shapes(got.values[node]) == _shapes(reference):
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
                    f"Got {_shapes(got.values[node])}, expected {_shapes(expected)}. "
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
        raise _UnknownUnits
    return [label and _at(label, dim, leaf.shape) for dim, label in enumerate(labels)]


def _at(label: Label, dim: int, shape: Sequence[int]) -> Label:
    """A label at other sizes: where units repeat along a dimension (a batch of rows), they go on doing so.

    Raises:
        _UnknownUnits: where the example does not show how they repeat.
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
            raise _UnknownUnits
        if inner > 1 and shape[axis] % units == 0:  # each unit several times, one after the other
            ids = np.repeat(ids.take(range(0, size, inner), place), shape[axis] // units, place)
        elif outer < size and shape[axis] % outer == 0:
            ids = np.concatenate([ids.take(range(outer), place)] * (shape[axis] // outer), place)
        else:
            raise _UnknownUnits
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
                raise VerificationError(f"node {node.name} fails: {type(error).__name__}: {error}") from error
        return node

    def _seeded(self, node: fx.Node, seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
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


def _shapes(tree: Any) -> str:
    return ", ".join(
        str(tuple(t.shape)) if isinstance(t, torch.Tensor) else repr(t) for t in pytree.tree_leaves(tree)
    )


__all__ = ["Verdict", "verify"]
