"""The masked original, which a narrowed network is held against: both in the precision of the comparison."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from .errors import VerificationError
from .graph_module import OwnedModule
from .inputs import equal
from .nn import MultiheadAttention, multi_head_attention
from .nodes import copy_graph, operator_name
from .passes import Narrowing
from .passes.parameters import masked, narrow
from .program import Program
from .region_program import RegionModule
from .verify_model import relative_error


def put_into_mode(module: nn.Module, training: bool) -> None:
    """Put a network into a mode, but for its dropout."""
    module.train(training)
    without_dropout(module)


def without_dropout(module: Any) -> Any:
    """Dropout off: what it draws depends on the width."""
    for inner in module.modules():
        if isinstance(inner, (_DropoutNd, nn.RReLU)):
            inner.training = False
        elif isinstance(inner, (nn.RNNBase, nn.MultiheadAttention, MultiheadAttention)):
            inner.dropout = 0.0
    return module


@contextlib.contextmanager
def restored(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Afterwards, these hold what they hold now."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                if tensor.shape == value.shape and not equal(tensor, value):
                    tensor.copy_(value)


def converted(module: nn.Module, dtype: torch.dtype, share: bool = False) -> nn.Module:
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


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Copies of the tensors of a tree, those of floating point in ``dtype``."""

    def cast_one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(_wide(tensor.dtype, dtype), copy=True)

    return pytree.tree_map_only(torch.Tensor, cast_one, tree)


def masked_original(program: Program, narrowing: Narrowing, dtype: torch.dtype) -> Program:
    """The original network with removed parameter entries set to zero."""
    made: dict[int, torch.Tensor] = {}
    left = {id(tensor) for tensor in narrowing.graph.captured.program.tensors.values()}
    tensors = {}
    extras = {name: cast(tensor, dtype) for name, tensor in program.extras.items()}
    for name, tensor in program.tensors.items():
        if id(tensor) not in made:
            new = cast(tensor, dtype)
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
        if operator_name(node).startswith(UNWRITTEN):
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


UNWRITTEN = ("empty", "new_empty")


_CASTS = frozenset(["float", "double", "half", "bfloat16"])


_DROPOUTS = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout]
)


def compare_weights(program: Program, pruned: nn.Module, narrowing: Narrowing) -> None:
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


__all__ = ["UNWRITTEN", "cast", "compare_weights", "converted", "masked_original", "put_into_mode",
           "restored", "without_dropout"]  # fmt: skip
