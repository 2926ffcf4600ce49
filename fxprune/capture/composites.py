"""Functions of ``torch`` that compute a whole layer, in terms of what can be rewritten.

A graph may hold attention, or a whole layer of ``nn.TransformerEncoder``, as one function with the widths
among its arguments: where ``forward`` calls it, and in Dynamo's graphs of modules that do.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..nn import multi_head_attention

__all__ = ["dissolve"]

Shapes = Callable[[Any], tuple[int, ...] | None]
"""The shape of a parameter or buffer that a node reads; None for any other argument."""


def dissolve(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace such functions in ``graph``, whose parameters and buffers are ``tensors``.

    Where the widths cannot be told from the parameters, a function stays.
    """

    def shape(argument: Any) -> tuple[int, ...] | None:
        known = isinstance(argument, fx.Node) and argument.op == "get_attr"
        return tuple(tensors[str(argument.target)].shape) if known and argument.target in tensors else None

    for node in list(graph.nodes):
        make = _COMPOSITES.get(node.target) if node.op == "call_function" else None
        if make is None:
            continue
        before = node.prev
        with graph.inserting_before(node):
            new = make(graph, node, shape)
        if new is not None:
            made = node.prev
            while made is not before:
                made.meta, made = dict(node.meta), made.prev
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _attention(graph: fx.Graph, given: Mapping[str, Any], shape: Shapes) -> fx.Node | None:
    """A call of :func:`fxprune.nn.multi_head_attention` with these arguments; None without widths."""
    out, heads = shape(given["out_weight"]), given["num_heads"]
    first = shape(given["projections"][0])
    if out is None or first is None or not isinstance(heads, int):
        return None
    width = first[0] if len(given["projections"]) > 1 else (first[0] - out[1]) // 2
    names = ("query", "key", "value", "projections", "in_bias", "out_weight", "out_bias")
    widths = {"qk_width": width, "v_width": out[1], "scale": (width // heads) ** -0.5}
    options = {name: value for name, value in given.items() if name not in names}
    return graph.call_function(
        multi_head_attention, tuple(given[name] for name in names), {**options, **widths}
    )


_FORWARD = inspect.signature(F.multi_head_attention_forward)


def _forward(graph: fx.Graph, node: fx.Node, shape: Shapes) -> fx.Node | None:
    """``F.multi_head_attention_forward``."""
    bound = _FORWARD.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    if a["static_k"] is not None or a["static_v"] is not None:
        return None
    separate = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    given = {
        "projections": separate if a["use_separate_proj_weight"] else [a["in_proj_weight"]],
        "in_bias": a["in_proj_bias"],
        "out_weight": a["out_proj_weight"],
        "out_bias": a["out_proj_bias"],
        "dropout": a["dropout_p"],
    }
    same = ("query", "key", "value", "num_heads", "bias_k", "bias_v", "add_zero_attn", "training",
            "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")  # fmt: skip
    return _attention(graph, {**{name: a[name] for name in same}, **given}, shape)


def _masks(graph: fx.Graph, mask: Any, kind: Any) -> dict[str, Any]:
    """The mask of a fused function, true (or not zero) where nothing may look."""
    if mask is None:
        return {}
    return {"key_padding_mask" if kind == 1 else "attn_mask": graph.call_function(torch.ne, (mask, 0))}


def _encoder_layer(graph: fx.Graph, node: fx.Node, shape: Shapes) -> fx.Node | None:
    """``torch._transformer_encoder_layer_fwd``, what ``nn.TransformerEncoderLayer`` calls in evaluation."""
    names = ("x", "embed_dim", "num_heads", "in_weight", "in_bias", "out_weight", "out_bias", "use_gelu",
             "norm_first", "eps", "w1", "b1", "w2", "b2", "up", "up_bias", "down", "down_bias", "mask",
             "mask_type")  # fmt: skip
    a: dict[str, Any] = {"mask": None, "mask_type": None, **dict(zip(names, node.args, strict=False))}
    if len(node.args) < len(names) - 2 or None in (shape(a["in_weight"]), shape(a["out_weight"])):
        return None
    masks = _masks(graph, a["mask"], a["mask_type"])
    width = (a["embed_dim"],)

    def attend(x: fx.Node) -> fx.Node:
        given: dict[str, Any] = {
            "query": x,
            "key": x,
            "value": x,
            "projections": [a["in_weight"]],
            "in_bias": a["in_bias"],
        }
        given |= {name: a[name] for name in ("out_weight", "out_bias", "num_heads")}
        given |= {**masks, "batch_first": True, "need_weights": False}
        made = _attention(graph, given, shape)
        return graph.call_function(operator.getitem, (made, 0))

    def feed(x: fx.Node) -> fx.Node:
        x = graph.call_function(F.linear, (x, a["up"], a["up_bias"]))
        x = graph.call_function(F.gelu if a["use_gelu"] else F.relu, (x,))
        return graph.call_function(F.linear, (x, a["down"], a["down_bias"]))

    def norm(x: fx.Node, place: int) -> fx.Node:
        return graph.call_function(F.layer_norm, (x, width, a[f"w{place}"], a[f"b{place}"], a["eps"]))

    x: fx.Node = a["x"]
    for place, part in ((1, attend), (2, feed)):
        y = part(norm(x, place)) if a["norm_first"] else part(x)
        x = graph.call_function(operator.add, (x, y))
        x = x if a["norm_first"] else norm(x, place)
    return x


_COMPOSITES: dict[Any, Callable[[fx.Graph, fx.Node, Shapes], fx.Node | None]] = {
    F.multi_head_attention_forward: _forward,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
