"""Verify against the user's own model: the captured graph must do what ``model(x)`` does.

Copies of both run on the same inputs with the same random numbers, in each mode, in the model's own
precision; outputs and buffers (running statistics) are compared. When a model is captured this is done in the
mode that it is in, where its calls of operators do not show already that they are those of the graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .capture.twin import Twin
from .errors import CaptureError, FxpruneError, ModeError, VerificationError
from .graph_module import Interpreter
from .inputs import dense
from .nn import assign
from .nodes import describe_source, writes
from .program import Program, own_train
from .random_numbers import drawn
from .same_calls import same_calls
from .trees import flatten

MODES = {False: "evaluation", True: "training"}
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest relative error by precision; in less than these, that of a few rounded steps."""
ROUGH = 5e-2
LARGE = 1 << 30
"""Bytes of parameters from which on a model is not run where nobody asked for it."""


def is_the_model(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Check that what was captured of a model is the model; gives why that is not known, or "".

    Args:
        model: the model, which is not changed.
        program: what was captured of it as a whole.
        args: inputs; for those that have no values, numbers are made up.
        kwargs: the same by name.

    Raises:
        CaptureError: if the graph does something else than the model; names the first layer that does.
    """
    owner = program.graph.owning_module  # modules are made of the graph here
    try:
        if same_calls(model, program, args, kwargs):
            return ""
        return _compared(model, program, *_with_values((args, kwargs)))
    finally:
        program.graph.owning_module = owner


def _compared(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensors = [*model.parameters(), *model.buffers()]
    unknown = "whether the graph is all that the model does was not seen: {}"
    if any(tensor.is_meta for tensor in tensors):
        return unknown.format("there are no weights yet")
    if sum(t.numel() * t.element_size() for t in model.parameters()) > LARGE:
        return unknown.format("the model is large, so that only fxprune.verify looks")
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    limit = LIMITS.get(dtype, ROUGH)
    try:
        _, reason = compare_with_model(model, program, args, kwargs, model.training, limit)
    except VerificationError as error:
        raise CaptureError(str(error)) from error
    return unknown.format(reason) if reason else ""


def _with_values(tree: Any) -> Any:
    """The inputs, with random numbers and zeros in those that have no values."""
    generator = torch.Generator().manual_seed(0)

    def made(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    return pytree.tree_map_only(torch.Tensor, made, tree)


@dataclass(frozen=True)
class Outcome:
    """What a call came to.

    Attributes:
        output: what was returned.
        buffers: the module's buffers afterwards, by name.
        parameters: the same of its parameters, to which a forward may write as well.
        error: what was raised, or None.
    """

    output: Any = None
    buffers: Mapping[str, torch.Tensor] | None = None
    parameters: Mapping[str, torch.Tensor] | None = None
    error: Exception | None = None


def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> Outcome:
    """Run ``module`` on copies of the inputs, with random numbers that follow from ``seed``."""
    with drawn(seed), torch.no_grad():
        try:
            # Past __call__ of torch.fx, which would print a traceback of its own.
            run = module.forward if isinstance(module, fx.GraphModule) else module
            output = run(*copied(args), **copied(kwargs))
        except Exception as error:  # noqa: BLE001  whatever a user's forward raises
            return Outcome(error=error)
    return Outcome(output, dict(module.named_buffers()), dict(module.named_parameters()))


def compare_with_model(
    model: nn.Module,
    piece: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool,
    limit: float,
) -> tuple[float, str]:
    """The largest relative difference of the captured graph, and why there is none to compare, or "".

    Args:
        model: the user's model, or a submodule that was captured.
        piece: what was captured of it.
        args: real inputs.
        kwargs: the same by name.
        training: the mode to compare.
        limit: largest error allowed.

    Raises:
        VerificationError: if the graph does something else than the model; names the first layer that does.
    """
    mode = MODES[training]
    try:
        own = _twin(model, piece, training)
    except NotImplementedError as refusal:  # what torch.export.export(...).module() gives has one mode
        return 0.0, f"the model cannot be put into {mode} mode ({_short(refusal)})"
    wanted = call(own, args, kwargs)
    if wanted.error is not None:
        return 0.0, f"the model does not run in {mode} mode ({_short(wanted.error)})"
    graph = _module(piece)
    try:
        graph.train(training)
        got = call(graph, args, kwargs)
    except ModeError as refusal:
        return 0.0, str(refusal)
    if isinstance(got.error, FxpruneError):
        return 0.0, str(got.error)
    error, what = _apart(wanted, got)
    if error <= limit:
        return error, ""
    again, _ = _apart(wanted, call(_twin(model, piece, training), args, kwargs))
    if again > limit:
        return 0.0, f"in {mode} mode the model itself gives something else at each call"
    raised = f" ({_short(got.error)})" if got.error is not None else ""
    first = _first_difference(model, piece, args, kwargs, training, limit)
    raise VerificationError(
        f"what was captured is not the model: in {mode} mode {what} by {error:.1e} (relative), allowed "
        f"{limit:.0e}{raised}.{first} Code that asks whether it is traced may be the cause. Next: prune "
        f"the submodules around it."
    )


def _apart(wanted: Outcome, got: Outcome) -> tuple[float, str]:
    """How far two outcomes are apart, and what of them."""
    if got.error is not None:
        return math.inf, "the graph fails, which differs"
    a, b = (flatten(outcome.output)[0] for outcome in (wanted, got))
    error = relative_error([b, plain(got.output)], [a, plain(wanted.output)])
    what = "the outputs differ"
    ours = got.buffers or {}
    for name, buffer in (wanted.buffers or {}).items():
        if name in ours:
            apart = relative_error(ours[name], buffer, buffer_scale(wanted.buffers or {}, name))
            if apart > error:
                error, what = apart, f"the buffer {name} differs"
    ours = got.parameters or {}
    for name, parameter in (wanted.parameters or {}).items():
        if name in ours and ours[name] is not parameter:  # those that nothing writes to are shared
            apart = relative_error(ours[name], parameter)
            if apart > error:
                error, what = apart, f"the parameter {name}, which is written to, differs"
    return error, what


def _twin(model: nn.Module, piece: Program, training: bool) -> nn.Module:
    """A copy of the model whose forward may write anywhere; parameters are shared where none is written."""
    written = writes_parameters(piece) or any(map(own_train, model.modules()))  # which may merge weights
    shared = set() if written else {id(p) for p in model.parameters()}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in shared:
            return tensor
        copy = tensor.detach().clone()
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy

    return Twin(model, own).model.train(training)


def _module(piece: Program) -> fx.GraphModule:
    """The captured graph as a module with buffers of its own."""
    share = not writes_parameters(piece)
    made = {
        id(t): t if share and isinstance(t, nn.Parameter) else _like(t.detach().clone(), t)
        for t in [*piece.tensors.values(), *piece.extras.values()]
    }
    tensors = {name: made[id(t)] for name, t in piece.tensors.items()}
    extras = {name: made[id(t)] for name, t in piece.extras.items()}
    return replace(piece, tensors=tensors, extras=extras).module()


def _like(copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def writes_parameters(piece: Program) -> bool:
    """Whether the graph may write into a parameter, itself or by another name."""
    todo = [n for n in piece.graph.nodes if n.op == "get_attr" and _is_parameter(piece, str(n.target))]
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            if user.target is assign or (writes(user) and user.all_input_nodes and user.args[0] in seen):
                return True
            alias = user.op in ("call_function", "call_method") and user.args and user.args[0] in seen
            if alias and user not in seen and getattr(user.target, "__name__", user.target) in _ALIASES:
                seen.add(user)
                todo.append(user)
    return False


_ALIASES = frozenset(
    ["data", "detach", "getattr", "getitem", "view", "stop_gradient", "t", "transpose", "narrow", "select"]
)


def _is_parameter(piece: Program, name: str) -> bool:
    return isinstance(piece.tensors.get(name), nn.Parameter)


class _Recorder(Interpreter):
    """Keeps what leaf modules return, call by call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: list[tuple[str, fx.Node | None, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module":
            self.calls.append((str(n.target), n, copied(result)))
        return result


def _first_difference(
    model: nn.Module,
    piece: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool,
    limit: float,
) -> str:
    """The first layer that returns something else in the graph than in the model, for a message."""
    own, module = _twin(model, piece, training), _module(piece).train(training)
    seen: dict[str, list[Any]] = {}

    def watch(path: str, inner: nn.Module, given: Any, output: Any) -> None:
        seen.setdefault(path, []).append(copied(output))

    for path, inner in own.named_modules():
        if path in piece.modules:
            inner.register_forward_hook(partial(watch, path))
    call(own, args, kwargs)
    recorder = _Recorder(module)
    with drawn(0), torch.no_grad(), contextlib.suppress(Exception):  # said already
        recorder.run(*piece.bind(copied(args), copied(kwargs)))
    for path, node, result in recorder.calls:
        outputs = seen.get(path)
        if outputs is None:
            continue
        if not outputs or relative_error(result, outputs.pop(0)) > limit:
            source = describe_source(node)
            at = f" ({source})" if source else ""
            return f" The first layer that differs is {path}{at}, or what comes before it."
    return " No layer differs: what comes after the last does."


def second_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], int] | None:
    """The inputs with a batch of twice the size, and that size; None where they have no batch in common."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes or any(tensor.dim() < 2 for tensor in tensors):
        return None
    (size,) = sizes
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t.flip(0)]), (args, kwargs))
    return args, kwargs, 2 * size


def plain(tree: Any) -> list[Any]:
    """What of a tree is no tensor."""
    return [leaf for leaf in pytree.tree_leaves(tree) if not isinstance(leaf, torch.Tensor)]


def copied(tree: Any) -> Any:
    """The tree with copies of its tensors."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, tree)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def buffer_scale(buffers: Mapping[str, torch.Tensor], name: str) -> float:
    """The largest entry in the buffers of a module, with which a difference in one of them is compared.

    Where the mean of what a batch normalisation reads is zero, its running mean holds rounding errors alone.
    """
    prefix = name.rpartition(".")[0]
    own = [b for other, b in buffers.items() if other.rpartition(".")[0] == prefix and b.is_floating_point()]
    return max((_largest(buffer) for buffer in own), default=0.0)


def _largest(tensor: torch.Tensor) -> float:
    tensor = dense(tensor)
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def relative_error(got: Any, wanted: Any, scale: float = 0.0) -> float:
    """Largest difference of two trees of tensors, relative to the largest entry or to ``scale``."""
    gots, wanteds = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    if len(gots) != len(wanteds):
        return math.inf
    worst = 0.0
    for a, b in zip(gots, wanteds, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return math.inf
            a, b = dense(a), dense(b)
            same = (a == b) | ((a != a) & (b != b))
            if bool(same.all()):
                continue
            if not (a.is_floating_point() or a.is_complex()):
                return math.inf
            largest = max(scale, _largest(b), 1e-30)
            difference = (a - b).abs().masked_fill(same, 0).max().item()
            worst = max(worst, difference / largest if difference == difference else math.inf)
    return worst


__all__ = [
    "LARGE",
    "LIMITS",
    "ROUGH",
    "buffer_scale",
    "call",
    "compare_with_model",
    "copied",
    "is_the_model",
    "plain",
    "relative_error",
    "second_batch",
    "writes_parameters",
]
