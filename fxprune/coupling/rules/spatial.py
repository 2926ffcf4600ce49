"""Pooling and resampling: batch and channels pass on, the spatial dimensions are computed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..coupler import Coupler
from ..registry import rule
from ..units import Label, Value

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_RANK = {"1d": 1, "2d": 2, "3d": 3}


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d", "max_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_trilinear3d",
)  # fmt: skip
def pooling(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    x = c.value(args[0])
    n = next((rank for suffix, rank in _RANK.items() if suffix in c.operator), 2)
    lead = len(x.shape) - n
    windows = [_sliding(c, x, lead + d, out, args, n) for d in range(n)]
    for dim, window in enumerate(windows, lead):
        if window is None:
            c.freeze_dim(x, dim, "spatial axis of a pooling or resampling")
    names: list[Any] = [*range(lead), *(("in", d) for d in range(n))]
    labels, _ = c.unify([(x, names)], [*range(lead), *(("out", d) for d in range(n))])
    for result in [out] if isinstance(out, torch.Tensor) else out:
        c.put(result, [*labels[:lead], *windows])


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def fractional_pooling(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``x: (*, C, spatial)`` in windows that ``args[3]: (N, C, dimensions)``, random numbers, draws."""
    x, samples = c.value(args[0]), c.value(args[3])
    n = _RANK[c.operator[-2:]]
    lead = len(x.shape) - n
    for dim in range(lead, len(x.shape)):
        c.freeze_dim(x, dim, "spatial axis of a pooling or resampling")
    names: list[Any] = [*range(lead), *(("in", d) for d in range(n))]
    drawn = (samples, ["samples", lead - 1, "numbers"])
    result = [*range(lead), *(("out", d) for d in range(n))]
    labels, _ = c.unify([(x, names), drawn], result, lambda zeros: zeros[0])
    for pooled in out:
        c.put(pooled, labels)


def _sliding(c: Coupler, x: Value, dim: int, out: Any, args: Args, n: int) -> Label | None:
    """The label after averages over windows that slide along a labelled dimension by steps of 1.

    A local response norm is made of such averages over channels. Each stands for the index at the middle of
    its window; what is the middle of none has to stay. None where ``dim`` is no such dimension.
    """
    label = x.label(dim)
    if label is None or label.over or not c.operator.startswith("avg_pool"):
        return None
    size, stride, padding = (_along(args, place, dim - len(x.shape) + n, n) for place in (1, 2, 3))
    start = size // 2 - padding
    end = start + out.shape[dim]
    if stride != 1 or not 0 <= start < end <= x.shape[dim]:
        return None
    c.depends_on_sizes()
    for ids in (label.ids[:start], label.ids[end:]):
        c.keep_units(ids, label.axis, "at the margin of windows that slide along this axis")
    c.mark_inexact(label, "averaged over windows that slide along this axis")
    return Label(label.ids[start:end], (), c.passes_on(label, dim))


def _along(args: Args, place: int, dim: int, n: int) -> int:
    """What an argument of a pooling over ``n`` dimensions says of one of them; 0 where it is not given."""
    given = args[place] if len(args) > place else ()
    numbers = [given] * n if isinstance(given, int) else [*given] * (n if len(given) == 1 else 1)
    return numbers[dim] if numbers else 0


@rule("im2col")
def im2col(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``(N, C, H, W) -> (N, C kH kW, L)``."""
    x = c.value(args[0])
    c.materialize(x)
    for dim in range(len(x.shape) - 2, len(x.shape)):
        c.freeze_dim(x, dim, "spatial axis of an unfold")
    at = len(x.shape) - 3
    label = x.label(at)
    labels: list[Label | None] = [None] * out.dim()
    if label is not None:
        label = c.tie(label, label.over)
        ids = np.repeat(label.ids, out.shape[at] // x.shape[at])
        labels[at] = Label(ids, (), label.axis, label.zero)
    c.put(out, labels)


@rule("col2im")
def col2im(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``(N, C kH kW, L) -> (N, C, H, W)``: a channel is the sum of its shifted patches."""
    x = c.value(args[0])
    at = len(x.shape) - 2
    c.materialize(x)
    c.freeze_dim(x, at + 1, "positions of the patches of a fold")
    label = x.label(at)
    labels: list[Label | None] = [None] * out.dim()
    if label is not None:
        label = c.tie(label, label.over)
        cells = label.ids.reshape(out.shape[at], -1)
        c.merge(cells[:, :1], cells, label.axis, label.axis)
        labels[at] = Label(cells[:, 0], (), c.here(at), label.zero)
    c.put(out, labels)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """Transformed dimensions are summed over; the others pass on, and zeros stay zero."""
    x = c.value(args[0])
    names: list[Any] = list(range(len(x.shape)))
    for dim in args[1]:
        c.freeze_dim(x, dim % len(names), "transformed to or from frequencies")
        names[dim % len(names)] = ("transformed", dim)
    labels, _ = c.unify([(x, range(len(names)))], names, all)
    c.put(out, labels)
