"""Operators that treat some dimensions by position (look up, scatter, cut, solve) and all others alike.

Dimensions that are treated by position keep their widths; the others are coupled and pass on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..coupler import Coupler, ZeroRule
from ..registry import rule
from ..units import Value

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _never(zeros: Sequence[bool]) -> bool:
    return False


def _pass(
    c: Coupler,
    operands: Sequence[tuple[Any, Sequence[Any]]],
    results: Sequence[tuple[torch.Tensor, Sequence[Any]]],
    shared: Collection[Any],
    reason: str,
    zero: ZeroRule = all,
) -> None:
    """Couple dimensions that carry the same name, if it is ``shared``; all others keep their widths.

    Args:
        c: the coupler.
        operands: tensors with a name for each dimension; what is None is left out.
        results: the same for what comes out.
        shared: names of the dimensions along which all indices are treated alike.
        reason: why the other dimensions keep their widths.
        zero: how zeros at removed indices carry over, from operands to results.
    """
    values: list[tuple[Value, list[Any]]] = []
    for place, (tensor, names) in enumerate(operands):
        if not isinstance(tensor, torch.Tensor):
            continue
        value = c.value(tensor)
        for dim, name in enumerate(names):
            if name not in shared:
                c.freeze_dim(value, dim, reason, c.remedy)
        values.append((value, [name if name in shared else (place, dim) for dim, name in enumerate(names)]))
    for place, (result, names) in enumerate(results):
        own = [name if name in shared else ("result", place, dim) for dim, name in enumerate(names)]
        labels, _ = c.unify(values, own, zero)
        if result is operands[0][0] and not all(label is None or label.zero for label in labels):
            c.written(values[0][0])  # written in place
        c.put(result, labels)


def _results(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [r for r in out if isinstance(r, torch.Tensor)]


def _argument(args: Args, kwargs: Kwargs, place: int, name: str, default: Any = None) -> Any:
    return kwargs.get(name, args[place] if len(args) > place else default)


# -- looked up, scattered -------------------------------------------------------------------------


@rule("gather")
def gather(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``out[i, j] = x[i, index[i, j]]`` for ``dim = 1``: positions along ``dim`` are looked up by number."""
    x, dim, index = args[:3]
    names = list(range(x.dim()))
    shared = {d for d in names if d != dim % len(names) and x.shape[d] == index.shape[d]} if names else set()
    _pass(c, [(x, names), (index, names)], [(out, names)], shared, "looked up by index", lambda z: z[0])


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x[i, index[i, j]] = source[i, j]`` for ``dim = 1``, or added to, or otherwise joined."""
    x, dim, index = args[:3]
    source = _argument(args, kwargs, 3, "src", kwargs.get("value"))
    names = list(range(x.dim()))
    given = [t for t in (x, index, source) if isinstance(t, torch.Tensor) and t.dim() == len(names)]
    shared = {d for d in names if d != dim % len(names) and len({t.shape[d] for t in given}) == 1}
    operands = [(tensor, names) for tensor in given]
    zero: ZeroRule = lambda z: z[0] and (z[2] if len(given) == 3 else source == 0)  # noqa: E731
    _pass(c, operands, [(out, names)], shared, "written to by index", zero)


@rule("index_add", "index_copy", "index_reduce", "index_fill")
def along_index(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x[:, index] = source`` for ``dim = 1``, or added to, or otherwise joined; ``index: (entries,)``."""
    x, dim, index, source = args[:4]
    names: list[Any] = list(range(x.dim()))
    fills = c.operator.startswith("index_fill")
    operands: list[tuple[Any, list[Any]]] = [(x, names), (index, ["index"] * index.dim())]
    operands += [] if fills else [(source, names)]
    zero: ZeroRule = lambda z: z[0] and (source == 0 if fills and not isinstance(source, torch.Tensor)  # noqa: E731
                                         else not fills and z[2])  # fmt: skip
    shared = {d for d in names if d != dim % len(names)} if names else set()
    _pass(c, operands, [(out, names)], shared, "written to by index", zero)


@rule("index_put", "_index_put_impl_")
def index_put(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x[indices] = source``: by position along indexed dimensions, entry by entry under a mask."""
    x, indices, source = args[:3]
    names: list[Any] = list(range(x.dim()))
    used = {d: index for d, index in enumerate(indices) if index is not None}
    masks = [index for index in used.values() if index.dtype == torch.bool]
    if len(used) == len(masks) == 1 and masks[0].dim() == x.dim() and source.numel() == 1:
        _pass(c, [(x, names), (masks[0], names)], [(out, names)], names, "", _never)
        return
    written, shift = [], 0
    for d, index in used.items():
        count = index.dim() if index.dtype == torch.bool else 1
        written += [d + shift + k for k in range(count)]
        shift += count - 1
    kept = [d for d in names if d not in written]
    width = max((1 if index.dtype == torch.bool else index.dim() for index in used.values()), default=0)
    together = written == list(range(written[0], written[-1] + 1)) if written else True
    at = sum(d < written[0] for d in kept) if written and together else 0
    picked = [
        *kept[:at],
        *(("index", k) for k in range(width)),
        *kept[at:],
    ]  # of x[indices], like which source is
    own = picked[len(picked) - source.dim() :]
    others = [(index, [("by", d, k) for k in range(index.dim())]) for d, index in used.items()]
    zero: ZeroRule = lambda zeros: zeros[0] and zeros[1]  # noqa: E731
    _pass(c, [(x, names), (source, own), *others], [(out, names)], kept, "written to by index", zero)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x: (N, C, H, W)`` at the positions ``grid: (N, P, Q, 2)``: ``(N, C, P, Q)``; also in 3 dimensions."""
    x, grid = args[:2]
    places = [("place", d) for d in range(grid.dim() - 2)]
    spatial = [("in", d) for d in range(grid.dim() - 2)]
    operands = [(x, ["n", "c", *spatial]), (grid, ["n", *places, "coordinate"])]
    _pass(c, operands, [(out, ["n", "c", *places])], {"n", "c"}, "looked up by position", lambda z: z[0])


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``x`` and ``index: (N, C, H, W)`` to ``(N, C, 2 H, 2 W)``; also in 3 dimensions."""
    lead = args[0].dim() - int(c.operator[len("max_unpool")])
    names = list(range(args[0].dim()))
    operands = [(args[0], names), (args[1], names)]
    _pass(c, operands, [(out, names)], set(range(lead)), "spatial axis of an unpooling", lambda z: z[0])


@rule("bucketize", "searchsorted")
def buckets(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """The number of the interval between ``boundaries`` in which each entry lies."""
    x, boundaries = args[:2] if c.operator == "bucketize" else args[1::-1]
    alone = isinstance(x, torch.Tensor) and boundaries.dim() == 1
    names = list(range(out.dim()))
    others = [("boundary", d) for d in range(boundaries.dim())]
    shared = set(names) if alone else set()
    _pass(c, [(x, names), (boundaries, others)], [(out, names)], shared, "boundaries of intervals", _never)


# -- cut and rearranged by position ---------------------------------------------------------------


@rule("tril", "triu")
def triangle(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    names = list(range(out.dim()))
    _pass(c, [(args[0], names)], [(out, names)], set(names[:-2]), "a triangle is cut out of it")


@rule("diagonal")
def diagonal(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """The diagonal of two dimensions becomes the last one."""
    names = list(range(args[0].dim()))
    gone = [_argument(args, kwargs, 2, "dim1", 0), _argument(args, kwargs, 3, "dim2", 1)]
    kept = [d for d in names if d not in [g % len(names) for g in gone]]
    _pass(c, [(args[0], names)], [(out, [*kept, "diagonal"])], set(kept), "its diagonal is taken")


@rule("diag_embed")
def diag_embed(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """The last dimension becomes the diagonal of two."""
    new = [_argument(args, kwargs, 2, "dim1", -2), _argument(args, kwargs, 3, "dim2", -1)]
    kept = list(range(args[0].dim() - 1))
    names: list[Any] = list(kept)
    for d in sorted(n % out.dim() for n in new):
        names.insert(d, ("diagonal", d))
    _pass(c, [(args[0], [*kept, "last"])], [(out, names)], set(kept), "made a diagonal")


@rule("rot90")
def rotate(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    names = list(range(out.dim()))
    turned = {d % len(names) for d in _argument(args, kwargs, 2, "dims", (0, 1))}
    _pass(c, [(args[0], names)], [(out, names)], set(names) - turned, "rotated by 90 degrees")


@rule("unfold")
def windows(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Windows along a dimension; what is in them becomes a new last dimension."""
    names: list[Any] = list(range(args[0].dim()))
    shared = set(names) - {args[1] % len(names)} if names else set()
    _pass(c, [(args[0], names)], [(out, [*names, "window"])], shared, "cut into windows")


@rule("cummax", "cummin")
def running(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    names = list(range(args[0].dim()))
    shared = set(names) - {args[1] % len(names)} if names else set()
    _pass(c, [(args[0], names)], [(r, names) for r in _results(out)], shared, "accumulated by number", _never)


# -- matrices -------------------------------------------------------------------------------------


@rule("linalg_inv_ex", "_linalg_solve_ex", "linalg_matrix_exp", "_linalg_det", "_linalg_slogdet",
      "_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex")  # fmt: skip
def matrices(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Matrices ``(..., M, N)``, each treated as a whole; the dimensions before them broadcast.

    The right side of an equation may be a batch of vectors, ``(..., M)``.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    lead = max(tensor.dim() for tensor in tensors) - 2
    batch = list(range(-lead, 0))
    operands = []
    for tensor in tensors:
        own = 1 if tensor.shape == tensors[0].shape[:-1] else 2
        operands.append((tensor, [*batch[lead + own - tensor.dim() :], *("m", "n")[:own]]))
    results = [(r, [*batch, *("m", "n")][: r.dim()]) for r in _results(out)]
    _pass(c, operands, results, set(batch), "the dimension of a matrix that is factored as a whole", _never)


@rule("_linalg_check_errors")
def errors(c: Coupler, args: Args, kwargs: Kwargs, out: None) -> None:
    """Raises where a matrix could not be factored."""


@rule("linalg_cross")
def cross(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    names = list(range(out.dim()))
    shared = set(names) - {kwargs.get("dim", -1) % len(names)}
    operands = [(tensor, names) for tensor in args[:2]]
    _pass(c, operands, [(out, names)], shared, "coordinates of a cross product", any)


@rule("_cdist_forward")
def distances(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``(..., P, M), (..., R, M) -> (..., P, R)``: norms of differences, to which zeros add nothing."""
    batch = list(range(-out.dim(), -2))
    left, right = (c.value(tensor) for tensor in args[:2])
    operands = [
        (value, [*batch[len(batch) + 2 - len(value.shape) :], row, "m"])
        for value, row in ((left, "p"), (right, "r"))
    ]
    labels, gone = c.unify(operands, [*batch, "p", "r"], _never)
    for label, _ in gone.values():
        if label.row:
            c.freeze(label, "whole rows are reduced over")
        elif not all(value.is_zero(len(value.shape) - 1) for value in (left, right)):
            c.mark_inexact(label, "distances are taken over this axis")
    c.put(out, labels)
