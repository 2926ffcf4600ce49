"""Operators that move data: the same movement is made on the units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..coupler import Coupler
from ..registry import rule
from ..units import Label, Value

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _dim(value: Value, dim: int) -> int:
    return dim % max(len(value.shape), 1)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy")
def view(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    if value.shape == tuple(out.shape):
        c.permute(out, value, range(len(value.shape)))
    elif isinstance(args[1], torch.dtype):
        c.freeze_value(value, "its bytes are reinterpreted as another dtype")
    else:
        c.put_view(out, value, c.reshape(value, tuple(out.shape)))


@rule("as_strided", "as_strided_")
def as_strided(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Followed where it changes only the strides of dimensions of size 1 (a memory format, say)."""
    value = c.value(args[0])
    before = c.strides if out is args[0] else args[0].stride()
    size, stride = tuple(args[1]), tuple(args[2])
    same = size == value.shape and all(a == b for a, b, n in zip(before, stride, size, strict=True) if n > 1)
    if not same or (len(args) > 3 and args[3]):
        c.freeze_value(
            value, "its memory is viewed with other strides", "use view, permute or reshape instead"
        )
    elif out is not args[0]:
        c.permute(out, value, range(len(size)))


@rule("t")
def t(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    c.permute(out, value, range(len(value.shape))[::-1])


@rule("transpose", "transpose_copy", "swapaxes")
def transpose(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    order = list(range(len(value.shape)))
    if order:
        a, b = _dim(value, args[1]), _dim(value, args[2])
        order[a], order[b] = order[b], order[a]
    c.permute(out, value, order)


@rule("permute", "permute_copy")
def permute(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    c.permute(out, value, [_dim(value, d) for d in args[1]])


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    order = list(range(len(value.shape)))
    order.insert(args[1] % (len(order) + 1), -1)
    c.permute(out, value, order)


@rule("squeeze", "squeeze_copy")
def squeeze(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    dims = args[1] if len(args) > 1 else range(len(value.shape))
    gone = {_dim(value, d) for d in (dims if not isinstance(dims, int) else [dims])}
    if any(value.label(d) is not None or value.is_open(d) for d in gone):
        c.depends_on_sizes()  # it may be 1 wide afterwards
    c.permute(out, value, [d for d, size in enumerate(value.shape) if d not in gone or size != 1])


@rule("expand", "expand_copy")
def expand(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    new = out.dim() - len(value.shape)
    if value.shape == tuple(out.shape):
        c.permute(out, value, range(out.dim()))
        return
    labels, _ = c.unify([(value, range(new, out.dim()))], range(out.dim()))
    c.put_view(out, value, labels)
    _open_alike(c, value, out)


def _open_alike(c: Coupler, value: Value, out: torch.Tensor) -> None:
    """Dimensions of a result along which one entry of ``value`` is repeated may follow what they meet."""
    new = out.dim() - len(value.shape)
    for dim in range(out.dim()):
        if out.shape[dim] > 1 and (dim < new or value.shape[dim - new] == 1):
            c.open(out, dim)
            c.depends_on_sizes()


@rule("slice", "slice_copy")
def slice_(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, end, step = given
    dim = _dim(value, dim)
    index = np.arange(value.shape[dim])[slice(start, end, step)]
    if index.size == value.shape[dim]:
        c.alias(out, value)
    elif not index.size:
        c.materialize(value)
        labels = [value.label(d) if d != dim else None for d in range(out.dim())]
        c.put(out, [label if label is not None and dim not in label.over else None for label in labels])
    else:
        label = value.label(dim)
        if label is not None and label.over and index[0] > 0 and step == 1:
            # What lies before must be balanced, too, for the bound to be one number.
            c.rectangle(c.rows_of(value, label), label.ids[..., : index[0]])
        pick = c.take if step == 1 else c.pick
        c.put_view(out, value, pick(value, dim, index))


@rule("select", "select_copy")
def select(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    dim = _dim(value, args[1])
    c.put_view(out, value, c.select(value, dim, args[2] % value.shape[dim]))


@rule("unbind", "unbind_copy")
def unbind(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    value = c.value(args[0])
    dim = _dim(value, args[1] if len(args) > 1 else 0)
    for index, part in enumerate(out):
        c.put_view(part, value, c.select(value, dim, index))


@rule("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "unsafe_split",
      "unsafe_split_with_sizes")  # fmt: skip
def split(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    value = c.value(args[0])
    dim = _dim(value, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    start = 0
    for part in out:
        index = np.arange(start, start + part.shape[dim])
        start += part.shape[dim]
        c.put_view(part, value, c.take(value, dim, index))


@rule("flip")
def flip(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    for d in args[1]:
        dim = _dim(value, d)
        value = Value(value.shape, c.pick(value, dim, np.arange(value.shape[dim])[::-1]))
    c.put(out, value.labels)


@rule("roll")
def roll(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    dims = args[2] if len(args) > 2 else []
    if not dims:
        c.freeze_value(value, "rolled as one flat sequence")
        return
    for shift, d in zip(args[1], dims, strict=True):
        dim = _dim(value, d)
        value = Value(value.shape, c.pick(value, dim, np.roll(np.arange(value.shape[dim]), shift)))
    c.put(out, value.labels)


@rule("repeat")
def repeat(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    new = len(args[1]) - len(value.shape)
    for dim, times in enumerate(args[1][new:]):
        if times != 1 and value.shape[dim] != 1:
            index = np.tile(np.arange(value.shape[dim]), times)
            shape = (*value.shape[:dim], index.size, *value.shape[dim + 1 :])
            value = Value(shape, c.take(value, dim, index))
    labels, _ = c.unify([(value, range(new, out.dim()))], range(out.dim()))
    c.put(out, labels)
    _open_alike(c, value, out)


@rule("index_select")
def index_select(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    value = c.value(args[0])
    _pick(c, value, _dim(value, args[1]), args[2], out)


@rule("index", "_unsafe_index")
def index(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Indexing with tensors. Only one index along a known permutation can be followed."""
    value, indices = c.value(args[0]), list(args[1])
    used: list[int] = []
    place = 0
    for given in indices:
        width = given.dim() if given is not None and given.dtype == torch.bool else 1
        if given is not None:
            c.freeze_value(c.value(given), "used as an index")
            used += range(place, place + width)
        place += width
    single = [given for given in indices if given is not None]
    if len(single) == 1 and single[0].dim() == 1 and single[0].dtype != torch.bool:
        _pick(c, value, used[0], single[0], out)
        return
    for d in used:
        c.freeze_dim(value, d, "looked up by index")
    kept = [d for d in range(len(value.shape)) if d not in used]
    width = out.dim() - len(kept)
    at = used[0] if used[-1] - used[0] + 1 == len(used) else 0
    names: list[Any] = list(range(len(value.shape)))
    before = [d for d in kept if d < at]
    result = [*before, *(("index", k) for k in range(width)), *(d for d in kept if d >= at)]
    labels, _ = c.unify([(value, names)], result)
    c.put(out, labels)


@rule("nonzero")
def nonzero(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x -> (places, dimensions of x)``: where it is not zero."""
    c.freeze_value(c.value(args[0]), "the places of its entries are the result")


def _pick(c: Coupler, value: Value, dim: int, index: torch.Tensor, out: torch.Tensor) -> None:
    """One-dimensional index along ``dim``; followed where the index values are known."""
    state = c.value(index).state
    known = state.tensor if state is not None else (index if index.device.type != "meta" else None)
    if known is None or known.device.type == "meta" or known.shape != index.shape:
        c.freeze_dim(value, dim, "looked up by an index that is computed at run time")
        names = list(range(len(value.shape)))
        labels, _ = c.unify([(value, names)], [n if n != dim else "index" for n in names])
        c.put(out, labels)
        return
    if known.numel() and int(known.max()) >= value.shape[dim]:
        raise IndexError(
            f"index {int(known.max())} is out of range for a dimension of size {value.shape[dim]}"
        )
    c.put(out, c.pick(value, dim, known.cpu().numpy() % value.shape[dim]))


@rule("take_along_dim")
def take_along_dim(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Entries along one dimension, picked by an index that broadcasts along the others.

    From a table, what becomes narrower is the index, where it is a buffer.
    """
    value, index = c.value(args[0]), c.value(args[1])
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is None:  # both are flattened
        c.freeze_value(value, "looked up by index")
        c.freeze_value(index, "used as an index")
        return
    names: list[Any] = list(range(out.dim()))
    dim = names[dim]
    from_table = c.picks_from_table(index, value, dim)
    if not from_table:
        c.freeze_dim(value, dim, "looked up by index")
        for d in names:
            c.freeze_dim(index, d, "used as an index")
    else:
        c.keep(value, dim, "looked up by index")
    operands = [(value, [name if name != dim else "looked up" for name in names])]
    if from_table:
        operands.append((index, names))
        if all(index.is_open(d) or index.shape[d] == 1 for d in names):
            c.depends_on_sizes()
            ids = c.units.fresh(math.prod(index.shape), of_table=True)
            flat = Value((ids.size,), [Label(ids, (), c.here(dim))])
            for d, label in enumerate(c.reshape(flat, index.shape)):
                if label is not None:
                    c.adopt(index, d, label.ids, label.over)
    labels, _ = c.unify(operands, names)
    c.put(out, labels)


@rule("cat", "concat")
def cat(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    values = [c.value(t) for t in args[0] if t.dim() == out.dim()]  # others are empty, and left out
    c.put(out, c.cat(values, dim))


@rule("stack")
def stack(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    names = [i for i in range(out.dim()) if i != dim]
    labels, _ = c.unify([(c.value(t), names) for t in args[0]], range(out.dim()))
    c.put(out, labels)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Padded positions of a labelled dimension are constants, free to follow what they meet."""
    value, amounts = c.value(args[0]), args[1]
    zeros = c.operator == "constant_pad_nd" and (len(args) < 3 or args[2] == 0)
    c.materialize(value)
    labels = [value.label(d) for d in range(out.dim())]
    for k in range(len(amounts) // 2):
        dim = out.dim() - 1 - k
        label = labels[dim]
        left, right = amounts[2 * k], amounts[2 * k + 1]
        if (left, right) == (0, 0) or value.shape[dim] == 1:
            continue
        if label is None:
            for d, other in enumerate(labels):
                if other is not None and dim in other.over:
                    labels[d] = c.tie(other, [dim])
            continue
        if label.over or left < 0 or right < 0 or c.operator != "constant_pad_nd":
            c.freeze(label, "padded by other than constants")
            labels[dim] = None
            continue
        c.depends_on_sizes()
        ids = np.concatenate([c.units.fresh(left), label.ids, c.units.fresh(right)])
        labels[dim] = Label(ids, (), label.axis, label.zero and zeros, label.row)
    c.put(out, labels)


@rule("pixel_shuffle")
def pixel_shuffle(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``(*, C r r, H, W) -> (*, C, H r, W r)``: a channel of the result is ``r r`` of the input."""
    value, r = c.value(args[0]), args[1]
    *batch, channels, h, w = value.shape
    k = len(batch)
    _shuffle(c, value, out, (*batch, channels // r // r, r, r, h, w), (k, k + 3, k + 1, k + 4, k + 2), k)
    for dim in (k + 1, k + 2):
        c.freeze_dim(c.value(out), dim, "spatial axis of a pixel shuffle")


@rule("pixel_unshuffle")
def pixel_unshuffle(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``(*, C, H r, W r) -> (*, C r r, H, W)``."""
    value, r = c.value(args[0]), args[1]
    *batch, channels, h, w = value.shape
    k = len(batch)
    _shuffle(c, value, out, (*batch, channels, h // r, r, w // r, r), (k, k + 2, k + 4, k + 1, k + 3), k)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``(N, g c, *) -> (N, c g, *)``: a permutation of channels."""
    value, groups = c.value(args[0]), args[1]
    index = np.arange(value.shape[1]).reshape(groups, -1).T.reshape(-1)
    c.put(out, c.pick(value, 1, index))


def _shuffle(
    c: Coupler, value: Value, out: torch.Tensor, split: tuple[int, ...], order: tuple[int, ...], k: int
) -> None:
    parts = Value(split, c.reshape(value, split))
    step = torch.empty(split, device="meta").permute(*range(k), *order)
    c.permute(step, parts, (*range(k), *order))
    c.put(out, c.reshape(c.value(step), tuple(out.shape)))


@rule("glu")
def glu(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """The first half times a function of the second."""
    value = c.value(args[0])
    dim = _dim(value, args[1] if len(args) > 1 else -1)
    half = value.shape[dim] // 2
    halves = [
        Value(tuple(out.shape), c.take(value, dim, np.arange(k * half, (k + 1) * half))) for k in (0, 1)
    ]
    names = range(out.dim())
    labels, _ = c.unify([(part, names) for part in halves], names, lambda zeros: zeros[0])
    c.put(out, labels)


@rule("slice_scatter", "select_scatter")
def scatter(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """A copy of the first argument with a slice overwritten by the second."""
    value, source = c.value(args[0]), c.value(args[1])
    dim = _dim(value, args[2] if len(args) > 2 else 0)
    rank = len(value.shape)
    if c.operator == "select_scatter":
        labels = c.select(value, dim, args[3] % value.shape[dim])
    else:
        given: list[Any] = [*args[3:], *(None, None, 1)[max(len(args) - 3, 0) :]]
        start, end, step = given
        labels = c.take(value, dim, np.arange(value.shape[dim])[slice(start, end, step)])
        if source.shape[dim] != len(range(value.shape[dim])[slice(start, end, step)]):
            raise RuntimeError(f"a slice is overwritten by a tensor of another size ({source.shape[dim]})")
    part = Value(source.shape, labels)
    c.unify([(part, range(len(source.shape))), (source, range(len(source.shape)))], ())
    whole, _ = c.unify([(value, range(rank))], range(rank), lambda zeros: False)
    c.put(out, whole)


@rule("view_as_complex", "view_as_real")
def complex_pairs(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Real and imaginary parts are a last dimension of two, which must stay."""
    value = c.value(args[0])
    if c.operator == "view_as_complex":
        c.freeze_dim(value, len(value.shape) - 1, "pairs of a real and an imaginary part")
    rank = min(len(value.shape), out.dim())
    labels, _ = c.unify([(value, range(len(value.shape)))], range(rank), all)
    c.put(out, [*labels, *[None] * (out.dim() - rank)])
