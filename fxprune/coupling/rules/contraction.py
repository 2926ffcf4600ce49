"""Matrix products and convolutions: contracted dimensions are coupled, outer ones pass on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...convolution import Convolution
from ..coupler import Coupler, ZeroRule
from ..registry import rule
from ..units import Axis, Ids, Label, Value

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _contract(
    c: Coupler,
    operands: Sequence[tuple[Value, Sequence[Any]]],
    result: Sequence[Any],
    out: torch.Tensor,
    zero: ZeroRule = any,
) -> None:
    """A product of operands whose dimensions have index names, summed over those that the result lacks."""
    c.product(operands, result)
    _unify(c, operands, result, out, zero)


def _unify(
    c: Coupler,
    operands: Sequence[tuple[Value, Sequence[Any]]],
    result: Sequence[Any],
    out: torch.Tensor,
    zero: ZeroRule,
) -> None:
    """A contracted index at which no operand is zero when masked makes the result inexact."""
    labels, gone = c.unify(operands, result, zero)
    for label, zeroed in gone.values():
        if not zeroed:
            c.mark_inexact(label, "summed over an axis whose removed entries are not zero")
    c.put(out, labels)


def _biased(zeros: list[bool]) -> bool:
    """``bias + a @ b`` is zero where the bias is, and one of the factors."""
    return zeros[0] and any(zeros[1:])


@rule("mm")
def mm(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    a, b = (c.value(t) for t in args)
    _contract(c, [(a, "mk"), (b, "kn")], "mn", out)


@rule("bmm")
def bmm(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    a, b = (c.value(t) for t in args)
    _contract(c, [(a, "bmk"), (b, "bkn")], "bmn", out)


@rule("mv")
def mv(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    a, b = (c.value(t) for t in args)
    _contract(c, [(a, "mk"), (b, "k")], "m", out)


@rule("dot", "vdot")
def dot(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    a, b = (c.value(t) for t in args)
    _contract(c, [(a, "k"), (b, "k")], "", out)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    bias, a, b = (c.value(t) for t in args[:3])
    names = {"addmm": ("mk", "kn", "mn"), "baddbmm": ("bmk", "bkn", "bmn"), "addmv": ("mk", "k", "m"),
             "addbmm": ("bmk", "bkn", "mn")}  # fmt: skip
    left, right, result = names[c.operator.rstrip("_")]
    operands = [(bias, result[len(result) - len(bias.shape) :]), (a, left), (b, right)]
    _contract(c, operands, result, out, _biased)


@rule("linear")
def linear(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    x, weight = c.value(args[0]), c.value(args[1])
    names = list(range(len(x.shape) - 1))
    operands: list[tuple[Value, Sequence[Any]]] = [(x, [*names, "k"]), (weight, "nk")]
    zero: ZeroRule = any
    if len(args) > 2 and args[2] is not None:
        operands.insert(0, (c.value(args[2]), "n"))
        zero = _biased
    _contract(c, operands, [*names, "n"], out, zero)


@rule("convolution", "_convolution")
def convolution(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x: (N, C_in, *)``, ``weight: (C_out, C_in/g, *k)``, transposed ``(C_in, C_out/g, *k)``."""
    x, weight = c.value(args[0]), c.value(args[1])
    bias = c.value(args[2]) if args[2] is not None else None
    how = Convolution.of(args)
    if args[0].dtype != args[1].dtype:
        raise RuntimeError(f"input of dtype {args[0].dtype} meets a weight of dtype {args[1].dtype}")
    c.materialize(x)
    convolve(c, x, weight, bias, how, out, _through(x, args[1], how) if how.groups == 1 else {})


def convolve(
    c: Coupler,
    x: Value,
    weight: Value,
    bias: Value | None,
    how: Convolution,
    out: torch.Tensor,
    through: dict[int, Label],
) -> None:
    """The channels of a convolution; along the dimensions in ``through`` nothing is mixed."""
    space = [("space", d) for d in range(2, out.dim())]
    kernel = [("kernel", d) for d in range(2, len(weight.shape))]
    channels = "co" if how.transposed else "oc"
    c.product([(x, ["n", "c", *space]), (weight, [*channels, *kernel])], ["n", "o", *space])
    for dim in range(2, len(x.shape)):
        if dim not in through:
            c.freeze_dim(x, dim, "spatial axis of a convolution")
        c.freeze_dim(weight, dim, "kernel axis of a convolution")
    if how.groups == 1:
        flat = Value((weight.shape[0], weight.shape[1]), weight.labels[:2], weight.state, weight.dims[:2])
        operands: list[tuple[Value, Sequence[Any]]] = [
            (flat, channels),
            (Value(x.shape[:2], _first(c, x)), "nc"),
        ]
        zero: ZeroRule = any
        if bias is not None:
            operands.insert(0, (bias, "o"))
            zero = _biased
        _unify(c, operands, ["n", "o", *space], out, zero)
        for dim, label in through.items():
            c.value(out).labels[dim] = label if bias is None else replace(label, zero=False)
        return
    _grouped(c, x, weight, bias, how, out)


def _through(x: Value, weight: torch.Tensor, how: Convolution) -> dict[int, Label]:
    """Labels of spatial dimensions along which nothing is mixed: a kernel of 1, taken step by step."""
    through = {}
    for dim in range(2, len(x.shape)):
        label = x.label(dim)
        if label is None or label.over or label.row:
            continue
        if (weight.shape[dim], how.stride[dim - 2], how.padding[dim - 2]) == (1, 1, 0):
            through[dim] = label
    return through


def _first(c: Coupler, x: Value) -> list[Label | None]:
    """Labels of batch and channel, independent of the spatial dimensions."""
    c.materialize(x)
    labels = []
    for dim in (0, 1):
        label = x.label(dim)
        late = [o for o in label.over if o > 1] if label is not None else []
        labels.append(c.tie(label, late) if label is not None and late else label)
    return labels


@dataclass(frozen=True)
class _InputGroups:
    """The input channels of a grouped convolution.

    Attributes:
        cells: their units, ``(groups, channels of a group)``; zeros where none can go.
        rows: a unit for each group.
        axis: where they are from.
        whole: whether a group goes only as a whole, with all that it computes.
    """

    cells: Ids
    rows: Ids
    axis: Axis
    whole: bool


def _grouped(
    c: Coupler,
    x: Value,
    weight: Value,
    bias: Value | None,
    how: Convolution,
    out: torch.Tensor,
) -> None:
    """A grouped convolution: rows are groups, columns the channels of a group.

    Input and output channels of a group form two rectangles with the same rows. Each group chooses its
    own columns, so the in-group axis of the weight is labelled over the grouped axis. Where all groups have
    the same units, they are a batch: each has a kernel of its own that is computed (a cross-correlation).
    """
    n_in, n_out = x.shape[1] // how.groups, out.shape[1] // how.groups
    batch, channels = _first(c, x)
    if channels is not None and channels.over:
        channels = c.tie(channels, [0])
    inputs = _input_groups(c, x, weight, channels, how.groups, n_out)
    if inputs.whole:  # an output channel lives and dies with its group
        outputs = np.repeat(inputs.rows[:, None], n_out, axis=1)
    else:
        outputs = _open_cells(c, weight, how.outer, how.groups, n_out, n_in, how.inner == 0)
        c.rectangle(inputs.rows, outputs)
    _couple_grouped_weight(c, weight, how, inputs, outputs)
    flat = Label(outputs.reshape(-1), (), inputs.axis, True)
    zero = True
    if bias is not None:
        c.unify([(bias, "c"), (Value((flat.ids.size,), [flat]), "c")], "")
        zero = bias.is_zero(0)
    given = Label(flat.ids, (), inputs.axis, zero) if (flat.ids != 0).any() else None
    c.put(out, [batch, given, *[None] * (out.dim() - 2)])


def _input_groups(
    c: Coupler, x: Value, weight: Value, channels: Label | None, groups: int, n_out: int
) -> _InputGroups:
    """Rows and columns of the input ``x``; ``n_out`` are the output channels of a group."""
    n_in = x.shape[1] // groups
    if channels is None:
        cells: Ids = np.zeros((groups, n_in), dtype=np.int64)
        return _InputGroups(cells, cells[:, 0], c.here(1), c.is_one_cell(n_out))
    cells, axis = channels.ids.reshape(groups, n_in), channels.axis
    whole = c.is_one_cell(n_out) or c.is_one_cell(n_in)
    roots = c.units.find(cells)
    if whole and n_in > 1 and weight.state is None and (roots == roots[:1]).all():
        whole = False
    if whole:
        c.produces(weight, 0)
        c.consumes(weight, 0, x, 1)
        c.merge(cells[:, :1], cells, axis, axis)
        return _InputGroups(cells, cells[:, 0], axis, True)
    rows = c.units.fresh(groups)
    c.rectangle(rows, cells)
    return _InputGroups(cells, rows, axis, False)


def _couple_grouped_weight(
    c: Coupler, weight: Value, how: Convolution, inputs: _InputGroups, outputs: Ids
) -> None:
    """Couple both channel axes of a weight: one lies in groups, the other holds the channels of each group.

    In groups are the output channels, or the input channels when transposed.
    """
    axis = inputs.axis
    if how.inner == 0:
        across, within, cells, grouped = how.inner, how.outer, outputs, inputs.cells
    else:
        across, within, cells, grouped = how.outer, how.inner, inputs.cells, outputs
    along = Value((grouped.size,), [Label(grouped.reshape(-1), (), axis, True)])
    c.unify([(_column(weight, across), "c"), (along, "c")], "")
    if weight.shape[within] == 1:
        return
    per_index = np.repeat(cells, grouped.shape[1], axis=0)
    if inputs.whole:
        c.freeze_dim(weight, within, "goes with its group of the convolution as a whole")
        return
    if weight.is_open(within):
        c.adopt(weight, within, per_index, (across,), axis)
        return
    label, rows = weight.label(within), weight.label(across)
    if label is None:
        c.freeze(Label(cells.reshape(-1), (), axis), "meets a weight that cannot be narrowed")
    elif label.over == (across,) and rows is not None and not rows.over and c.is_row(rows):
        c.multiply(label.ids, rows.ids[:, None], per_index, axis)
    else:
        c.merge(per_index, label.ids if label.over else label.ids[None], axis, label.axis)


def _column(weight: Value, dim: int) -> Value:
    """One axis of a weight as a value of its own."""
    if weight.state is not None:
        return Value((weight.shape[dim],), [], weight.state, (weight.dims[dim],))
    return Value((weight.shape[dim],), [weight.labels[dim]])


def _open_cells(
    c: Coupler, weight: Value, outof: int, groups: int, n_out: int, n_in: int, grouped_in: bool
) -> Ids:
    """Units of the output channels, ``(groups, n_out)``."""
    if grouped_in:
        label = weight.label(outof)
        if label is not None and label.over:
            return label.ids[::n_in].copy()
        return c.units.fresh(groups, n_out)
    if weight.is_open(outof):
        return c.adopt(weight, outof, c.units.fresh(groups * n_out), ()).ids.reshape(groups, n_out)
    label = weight.label(outof)
    if label is None:
        return np.zeros((groups, n_out), dtype=np.int64)
    return label.ids.reshape(groups, n_out)


@rule("embedding")
def embedding(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``weight: (entries, features)``: entries are looked up by number, features pass on."""
    weight, index = c.value(args[0]), c.value(args[1])
    c.produces(weight, 1)
    c.freeze_dim(weight, 0, "entries of an embedding are looked up by number")
    c.freeze_value(index, "used as an index")
    names = list(range(len(index.shape)))
    labels, _ = c.unify([(weight, ["entry", "feature"])], [*names, "feature"])
    c.put(out, labels)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``weight: (entries, features)``: the looked-up entries of each bag are joined, ``(bags, features)``."""
    weight = c.value(args[0])
    c.produces(weight, 1)
    c.freeze_dim(weight, 0, "entries of an embedding are looked up by number")
    scales = args[6] if len(args) > 6 else None
    for tensor in (args[1], args[2], scales):
        if tensor is not None:
            c.freeze_value(c.value(tensor), "used as an index, or for single entries")
    labels, _ = c.unify([(weight, ["entry", "feature"])], ["bag", "feature"])
    c.put(out[0], labels)


@rule("embedding_renorm_")
def embedding_renorm(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Entries of ``weight: (entries, features)`` are shortened, in place, to a largest norm."""
    weight = c.value(args[0])
    c.materialize(weight)
    c.freeze_value(c.value(args[1]), "used as an index")
    label = weight.label(1)
    if label is not None:
        c.mark_inexact(label, "normalised over this axis by an embedding")


@rule("_trilinear")
def trilinear(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """A product of three tensors that broadcast, summed over some dimensions (``nn.Bilinear``).

    Each tensor lacks the dimensions in its list of ``expand``.
    """
    values = [c.value(tensor) for tensor in args[:3]]
    names = range(len(values[0].shape) + len(args[3]))
    operands = [(v, [n for n in names if n not in gone]) for v, gone in zip(values, args[3:6], strict=True)]
    _contract(c, operands, [n for n in names if n not in args[6]], out)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Rows ``(S, K)`` sorted by expert, times one matrix of ``(E, K, N)`` for each expert: ``(S, N)``.

    The kernels refuse rows that do not begin at multiples of 16 bytes, which are eight numbers in half
    precision (https://docs.pytorch.org/docs/main/generated/torch.nn.functional.grouped_mm.html speaks of
    their layout).
    """
    x, weight = c.value(args[0]), c.value(args[1])
    if len(x.shape) != 2 or len(weight.shape) != 3 or (len(args) > 3 and args[3] is not None):
        for value in (x, weight):
            c.freeze_value(value, "a grouped matrix product of another form than rows times experts")
        return
    c.freeze_dim(weight, 0, "experts are chosen at run time")
    _contract(c, [(x, "sk"), (weight, "ekn")], "sn", out)
    for dim in (1, 2):
        label = weight.label(dim)
        if label is not None:
            c.keep_multiple(label, math.gcd(_ALIGNED, weight.shape[dim]))


_ALIGNED = 8
"""Numbers in 16 bytes of half precision."""
