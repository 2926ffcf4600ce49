"""Normalisations and reductions. Over a labelled axis they are allowed, but marked inexact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..coupler import Coupler
from ..registry import module_rule, rule
from ..units import Label, Value

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_no_update",
      "cudnn_batch_norm")  # fmt: skip
def batch_norm(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``x: (N, C, *)``; weight, bias, running mean and variance ``(C)``."""
    x = c.value(args[0])
    names: list[Any] = list(range(len(x.shape)))
    vectors = [a for a in args[1:5] if isinstance(a, torch.Tensor)]
    affine = isinstance(args[1], torch.Tensor) and isinstance(args[2], torch.Tensor)
    operands: list[tuple[Value, Sequence[Any]]] = [(x, names), *((c.value(v), [1]) for v in vectors)]
    scaled = [i + 1 for i, v in enumerate(vectors) if v is args[1] or v is args[2]]
    labels, _ = c.unify(operands, names, lambda zeros: affine and all(zeros[i] for i in scaled))
    training = next((a for a in args if isinstance(a, bool)), c.operator == "_batch_norm_with_update")
    for dim, label in enumerate(labels):
        if training and dim != 1 and label is not None:
            c.mark_inexact(label, "normalised over this axis")
    c.put(out[0], labels)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Normalised over the trailing dimensions ``args[1]``; weight and bias have that shape."""
    x = c.value(args[0])
    rank, width = len(x.shape), len(args[1])
    names = list(range(rank))
    affine = [c.value(a) for a in args[2:4] if isinstance(a, torch.Tensor)]
    operands: list[tuple[Value, Sequence[Any]]] = [(x, names), *((v, names[rank - width :]) for v in affine)]
    labels, _ = c.unify(operands, names, lambda zeros: bool(affine) and all(zeros[1:]))
    for label in labels[rank - width :]:
        if label is not None:
            c.mark_inexact(label, "normalised over this axis")
    first = out[0] if isinstance(out, (tuple, list)) else out
    c.put(first, labels)


@rule("native_group_norm")
def group_norm(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``x: (N, C, *)`` in ``groups`` rows: each row keeps equally many channels."""
    x, groups = c.value(args[0]), args[6]
    c.materialize(x)
    names: list[Any] = list(range(len(x.shape)))
    vectors = [c.value(a) for a in args[1:3] if isinstance(a, torch.Tensor)]
    for dim in range(2, len(x.shape)):
        c.freeze_dim(x, dim, "normalised together with its channels")
    operands: list[tuple[Value, Sequence[Any]]] = [(x, names), *((v, [1]) for v in vectors)]
    labels, _ = c.unify(operands, names, lambda zeros: len(vectors) == 2 and all(zeros[1:]))
    label = labels[1]
    if label is not None and label.over:
        label = labels[1] = c.tie(label, label.over)
    c.depends_on_sizes()
    if label is not None and groups < label.ids.size:
        cells = label.ids.reshape(groups, -1)
        c.rectangle(c.units.fresh(groups), cells)
        by_group = Label(cells, (), label.axis)
        c.mark_inexact(by_group, f"normalised in {groups} group{'s' * (groups > 1)} of channels")
    c.put(out[0], labels)


def _same_shape(module: nn.Module, args: Args, kwargs: Kwargs) -> torch.Tensor:
    return torch.empty_like(args[0])


@module_rule("torch.nn.modules.normalization.CrossMapLRN2d", _same_shape)
def local_response_norm(c: Coupler, module: nn.Module, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``x: (N, C, H, W)``, each channel divided by a norm of those around it; written in place, in parts."""
    x = c.value(args[0])
    labels, _ = c.unify([(x, range(4))], range(4), all)
    if labels[1] is not None:
        c.mark_inexact(labels[1], "normalised over windows of this axis")
    c.put(out, labels)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``v * g / |v|``, with a norm and a ``g`` for each index along ``dim``, by default the first.

    Along that dimension the masked original has zeros in ``g`` alone: a row of zeros has no direction.
    The norm of the rest runs over the other dimensions, whose removed indices count no longer.
    """
    v, g = c.value(args[0]), c.value(args[1])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(v.shape)
    names = list(range(len(v.shape)))
    labels, _ = c.unify([(v, names), (g, names[len(names) - len(g.shape) :])], names, any)
    for own, label in enumerate(labels):
        if label is not None and own != dim:
            c.mark_inexact(label, "normalised over this axis by a weight norm")
    row = v.label(dim)
    if v.state is not None and row is not None:
        v.state.axes[v.dims[dim]] = replace(row, zero=False)
    results = out if isinstance(out, (tuple, list)) else (out,)
    c.put(results[0], labels)
    for norms in results[1:]:
        c.put(norms, [label if own == dim else None for own, label in enumerate(labels)])


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    _along(c, args, out, "normalised over this axis by a softmax")


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulative(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    _along(c, args, out, "accumulated along this axis")


def _along(c: Coupler, args: Args, out: torch.Tensor, reason: str) -> None:
    x = c.value(args[0])
    names = list(range(len(x.shape)))
    labels, _ = c.unify([(x, names)], names, lambda zeros: False)
    label = labels[args[1] % len(names)] if names else None
    if label is not None:
        c.mark_inexact(label, reason)
    c.put(out, labels)


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "norm", "logsumexp", "any",
      "all", "linalg_vector_norm", "max.dim", "min.dim", "max.default", "min.default", "aminmax", "argmax",
      "argmin", "nansum", "count_nonzero")  # fmt: skip
def reduction(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Reduced dimensions vanish or become 1. A sum of zeros at removed indices is exact."""
    x = c.value(args[0])
    rank = len(x.shape)
    dims = _reduced(c.operator, args, kwargs, rank)
    results = [out] if isinstance(out, torch.Tensor) else [r for r in out if isinstance(r, torch.Tensor)]
    keepdim = results[0].dim() == rank and rank > 0
    names: list[Any] = list(range(rank))
    kept = [d for d in names if d not in dims]
    zero = c.operator in ("sum", "nansum", "count_nonzero", "mean", "amax", "amin", "max", "min")
    labels, gone = c.unify([(x, names)], kept, all if zero else (lambda zeros: False))
    kept_rows: list[tuple[Label, str]] = []
    inexact: list[tuple[Label, str]] = []
    numbered = [(label, "its indices are the result") for label, _ in gone.values()]
    for label, zeroed in gone.values():
        if label.row:
            kept_rows.append((label, "whole rows are reduced over"))
        elif c.operator in ("argmax", "argmin"):
            c.freeze(label, "its indices are the result")
        elif not (zeroed and c.operator in ("sum", "nansum", "count_nonzero")):
            inexact.append((label, f"reduced over this axis by {c.operator}"))
    if keepdim:
        labels = _spread(labels, kept, rank)
    for place, result in enumerate(results):
        c.put(result, labels)
        if place == 1 and c.operator in ("max", "min"):
            c.once_used(result, numbered, ())
        else:
            c.once_used(result, kept_rows, inexact)


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
def loss(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """A pointwise function of two tensors and of weights, then a mean, a sum or neither."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    rank = max(tensor.dim() for tensor in tensors)
    names = list(range(rank))
    keeps = "cross" not in c.operator
    zero = all if keeps else (lambda zeros: False)
    operands = [(c.value(tensor), names[rank - tensor.dim() :]) for tensor in tensors]
    labels, gone = c.unify(operands, names if out.dim() else [], zero)
    c.put(out, labels)
    sums = kwargs.get("reduction", next((a for a in args if type(a) is int), 1)) == 2
    exact = sums and keeps and all(value.is_zero(d) for value, _ in operands for d in range(len(value.shape)))
    if gone and not exact:
        reason = f"reduced over this axis by {c.operator}"
        c.once_used(out, (), [(label, reason) for label, _ in gone.values()])


def _spread(labels: list[Label | None], kept: list[int], rank: int) -> list[Label | None]:
    spread: list[Label | None] = [None] * rank
    for dim, label in zip(kept, labels, strict=True):
        if label is not None:
            over = tuple(kept[o] for o in label.over)
            spread[dim] = Label(label.ids, over, label.axis, label.zero, label.row)
    return spread


def _reduced(operator: str, args: Args, kwargs: Kwargs, rank: int) -> list[int]:
    """Dimensions that a reduction runs over."""
    at = {"norm": 2, "linalg_vector_norm": 2, "aminmax": 9}.get(operator, 1)
    dims = kwargs.get("dim", args[at] if len(args) > at else None)
    if isinstance(dims, bool):  # var(x, unbiased)
        dims = None
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    if isinstance(dims, int):
        dims = [dims]
    return [int(d) % rank for d in np.asarray(dims).tolist()]


@rule("topk", "sort", "kthvalue", "median.dim", "mode")
def ranking(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Entries along one dimension are ranked by their values; the other dimensions pass on."""
    x = c.value(args[0])
    at = 2 if c.operator in ("topk", "kthvalue") else 1
    dim: Any = kwargs.get("dim", args[at] if len(args) > at else -1)
    names: list[Any] = list(range(len(x.shape)))
    results = [out] if isinstance(out, torch.Tensor) else [r for r in out if isinstance(r, torch.Tensor)]
    if not names:
        return
    dim %= len(names)
    c.freeze_dim(x, dim, "ranked by value")
    keeps = results[0].dim() == len(names)
    kept = [name if name != dim else "rank" for name in names if keeps or name != dim]
    labels, _ = c.unify([(x, names)], kept, lambda zeros: False)
    for result in results:
        c.put(result, labels)
