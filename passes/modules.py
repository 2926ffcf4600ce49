"""Widths that leaf modules keep as attributes: ``in_channels``, ``num_features``, ``groups``, ..."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from ..graph_module import clone_module
from ..inputs import meta_like
from ..module_registry import Attributes, Shape, Shapes, leaf_for
from ..nn import MultiheadAttention
from ..program import Program, named_modules
from .base import Narrowing, Pass


@dataclass(frozen=True)
class UpdateModules(Pass):
    """Make the attributes of leaf modules agree with their narrowed tensors and inputs.

    An attention layer whose widths no longer fit ``torch.nn.MultiheadAttention`` becomes a
    :class:`fxprune.nn.MultiheadAttention` with an explicit scale.
    """

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        calls: dict[str, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(node.target, node)
        updated = ((path, self._update(program, narrowing, path, node)) for path, node in calls.items())
        return [(path, module) for path, module in updated if module is not None]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        return replace(program, modules={**program.modules, **dict(sites)})

    def _update(self, program: Program, narrowing: Narrowing, path: str, call: fx.Node) -> nn.Module | None:
        """A changed copy of the leaf module at ``path``, or None if nothing in it changes."""
        leaf = program.modules[path]
        changes = {}
        for name, module in named_modules(leaf):
            full = f"{path}.{name}" if name else path
            shapes = {
                key: tuple(program.tensors[f"{full}.{key}"].shape)
                for key, tensor in [*module._parameters.items(), *module._buffers.items()]
                if tensor is not None
            }
            own = ["weight"] if isinstance(module, _WEIGHTED) else getattr(module, "_flat_weights_names", [])
            missing = [key for key in own if key not in shapes]
            if missing:
                shapes |= _computed(module, full, program, missing)
            inputs, outputs = _ends(narrowing, call) if not name else (None, None)
            new = dict(_attributes(module, shapes, inputs, outputs))
            if isinstance(module, nn.GroupNorm) and not name:
                new["num_groups"] = _rows_left(narrowing, call, module.num_groups)
            if isinstance(module, MultiheadAttention):
                new["num_heads"] = _heads_left(narrowing, full, module, module.qk_width)
            attributes = {k: v for k, v in new.items() if getattr(module, k) != v}
            if attributes:
                changes[name] = attributes
        if not changes:
            return None
        copy = clone_module(leaf, lambda _, tensor: tensor, share=True)
        for name, attributes in changes.items():
            submodule = copy.get_submodule(name)
            if isinstance(submodule, nn.MultiheadAttention):
                prefix = f"{path}.{name}." if name else f"{path}."
                attention = free_attention(
                    submodule, {k: tuple(program.tensors[prefix + k].shape) for k in _names(submodule)}
                )
                full = f"{path}.{name}" if name else path
                attention.num_heads = _heads_left(narrowing, full, submodule, submodule.embed_dim)
                if not name:
                    return attention
                parent, _, last = name.rpartition(".")
                setattr(copy.get_submodule(parent), last, attention)
            else:
                submodule.__dict__.update(attributes)
        return copy


_WEIGHTED = (_ConvNd, nn.Linear, nn.Embedding)


def _computed(module: nn.Module, path: str, program: Program, names: list[str]) -> dict[str, Shape]:
    """The narrowed shapes of weights that a parametrization or a hook computes from others."""
    copy = clone_module(module, lambda name, _: meta_like(program.tensors[f"{path}.{name}"]))
    with torch.no_grad():
        for hook in () if is_parametrized(copy, names[0]) else copy._forward_pre_hooks.values():
            hook(copy, ())
        found = {name: getattr(copy, name, None) for name in names}
    return {name: tuple(weight.shape) for name, weight in found.items() if isinstance(weight, torch.Tensor)}


def _ends(narrowing: Narrowing, call: fx.Node) -> tuple[Shape | None, Shape | None]:
    """Narrowed shapes of the first input and of the output of a module's first call."""
    ends = [narrowing.value(end) for end in (call.args[0] if call.args else None, call)]
    into, out = (narrowing.shape(value) if value is not None else None for value in ends)
    return into, out


def _rows_left(narrowing: Narrowing, call: fx.Node, rows: int) -> int:
    """How many of ``rows`` equal parts of the channels survive in part at least."""
    value = narrowing.value(call.args[0]) if call.args else None
    label = value.label(1) if value is not None else None
    return rows if label is None else int(narrowing.row(label).reshape(rows, -1).any(axis=1).sum())


def _heads_left(narrowing: Narrowing, path: str, module: Any, qk_width: int) -> int:
    """How many heads of the attention layer at ``path`` survive, by the projection of its queries."""
    name = f"{path}.{'q_proj_weight' if module.in_proj_weight is None else 'in_proj_weight'}"
    label = narrowing.state(name).axes[0]
    heads: int = module.num_heads
    if label is None:
        return heads
    return int(narrowing.row(label)[:qk_width].reshape(heads, -1).any(axis=1).sum())


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]


def free_attention(source: nn.MultiheadAttention, shapes: Shapes) -> MultiheadAttention:
    """Attention with the parameters of ``source``, which have these shapes, and with its scale."""
    v_width = shapes["out_proj.weight"][1]
    packed = shapes.get("in_proj_weight")
    qk_width = (packed[0] - v_width) // 2 if packed else shapes["q_proj_weight"][0]
    new = MultiheadAttention(source, qk_width, v_width, source.head_dim**-0.5)
    out = shapes["out_proj.weight"]
    new.out_proj.__dict__.update(in_features=out[1], out_features=out[0])
    return new


def _conv(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    first, second = shapes["weight"][:2]
    transposed = isinstance(module, _ConvTransposeNd)
    n_in = module.in_channels // module.groups
    n_out = module.out_channels // module.groups
    groups = module.groups
    grouped = outputs if transposed else inputs
    if groups > 1 and grouped is not None:
        groups = grouped[len(grouped) - len(module.kernel_size) - 1] // second
    elif groups > 1 and 1 in (n_in, n_out):
        groups = first // (n_in if transposed else n_out)
    other = second * groups
    into, out = (first, other) if transposed else (other, first)
    return {"in_channels": into, "out_channels": out, "groups": groups}


def _linear(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    out, into = shapes["weight"]
    return {"in_features": into, "out_features": out}


def _batch_norm(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    vector = next(iter(shape for shape in shapes.values() if shape), None)
    if vector is not None:
        return {"num_features": vector[0]}
    return {"num_features": inputs[1]} if inputs is not None and len(inputs) > 1 else {}


def _layer_norm(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    if "weight" in shapes:
        return {"normalized_shape": shapes["weight"]}
    width = len(module.normalized_shape)
    return {"normalized_shape": inputs[-width:]} if inputs is not None else {}


def _group_norm(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    width = (
        shapes["weight"][0]
        if "weight" in shapes
        else inputs[1]
        if inputs is not None
        else module.num_channels
    )
    groups = width if module.num_groups == module.num_channels else module.num_groups
    return {"num_channels": width, "num_groups": groups}


def _embedding(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    entries, features = shapes["weight"]
    return {"num_embeddings": entries, "embedding_dim": features}


def _unflatten(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    sizes = module.unflattened_size
    if inputs is None or outputs is None or not all(isinstance(size, int) for size in sizes):
        return {}
    dim = module.dim % len(inputs)
    new = outputs[dim : dim + len(sizes)]
    return {
        "unflattened_size": type(sizes)(-1 if old == -1 else n for old, n in zip(sizes, new, strict=True))
    }


def _bilinear(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    return dict(zip(("out_features", "in1_features", "in2_features"), shapes["weight"], strict=True))


def _prelu(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    return {"num_parameters": shapes["weight"][0]}


def _recurrent(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    changes = {"hidden_size": shapes["weight_hh_l0"][0] // gates, "input_size": shapes["weight_ih_l0"][1]}
    if module.proj_size:
        changes["proj_size"] = shapes["weight_hr_l0"][0]
    return changes


def _cell(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}


def _multihead(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    """Only tells whether anything changed: the module is replaced as a whole."""
    new = dict(shapes)
    old = {key: tuple(p.shape) for key, p in module._parameters.items() if p is not None}
    return {} if new == old else {"embed_dim": -1}


def _narrowed_multihead(
    module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None
) -> dict[str, Any]:
    """The query, key and value widths; those of ``out_proj`` follow as its own."""
    q = shapes.get("q_proj_weight")
    if q is not None:
        return {"qk_width": q[0], "v_width": shapes["v_proj_weight"][0]}
    # The three parts of a packed projection form one rectangle, so they keep their proportion.
    parts, old = shapes["in_proj_weight"][0], 2 * module.qk_width + module.v_width
    return {"qk_width": parts * module.qk_width // old, "v_width": parts * module.v_width // old}


def _transformer(module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None) -> dict[str, Any]:
    return {"d_model": inputs[-1]} if inputs is not None else {}


_RULES: list[tuple[type, Attributes]] = [
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (_NormBase, _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.Unflatten, _unflatten),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
    (nn.Transformer, _transformer),
    (nn.MultiheadAttention, _multihead),
    (MultiheadAttention, _narrowed_multihead),
]


def narrowed_attributes(module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    """What a layer remembers of its widths, for these shapes of its own tensors."""
    rule = _rule_for(type(module))  # type: ignore[arg-type]  # a class is hashable
    return dict(rule(module, shapes, None, None)) if rule is not None and shapes else {}


def _attributes(
    module: nn.Module, shapes: Shapes, inputs: Shape | None, outputs: Shape | None
) -> Mapping[str, Any]:
    leaf = leaf_for(module)
    if leaf is not None and leaf.attributes is not None:
        return leaf.attributes(module, shapes, inputs, outputs)
    rule = _rule_for(type(module))  # type: ignore[arg-type]  # a class is hashable
    return rule(module, shapes, inputs, outputs) if rule is not None else {}


@functools.cache
def _rule_for(module_class: type) -> Attributes | None:
    return next((rule for kind, rule in _RULES if issubclass(module_class, kind)), None)


__all__ = ["UpdateModules", "free_attention", "narrowed_attributes"]
