"""Narrow parameters and buffers: plain slices of the originals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..coupling.units import Label
from ..program import Program
from .base import Narrowing, Pass


@dataclass(frozen=True)
class NarrowParameters(Pass):
    """Pick the surviving indices along every labelled axis of every parameter and buffer.

    Args:
        shapes_only: make meta tensors, for a rehearsal.
    """

    shapes_only: bool = False

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return list(program.tensors)

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        axes = {id(state.tensor): state.axes for state in narrowing.graph.states.values()}
        made: dict[int, torch.Tensor] = {}
        tensors = {}
        for name, tensor in program.tensors.items():
            if id(tensor) not in made:
                labels = axes.get(id(tensor), [])
                made[id(tensor)] = (_shrink if self.shapes_only else narrow)(tensor, labels, narrowing)
            tensors[name] = made[id(tensor)]
        return replace(program, tensors=tensors)


@dataclass(frozen=True)
class _Kept:
    """Surviving indices of one axis: the same for all rows, or one list a row.

    Attributes:
        index: ``(n,)``, or ``(*row sizes, n)`` if ``over`` is not empty.
        over: axes that choose the row.
    """

    index: np.ndarray[Any, np.dtype[np.int64]]
    over: tuple[int, ...]

    @staticmethod
    def of(narrowing: Narrowing, label: Label | None) -> _Kept | None:
        if label is None or not narrowing.narrows(label):
            return None
        mask = narrowing.alive(label)
        if not label.over:
            return _Kept(np.flatnonzero(mask), ())
        counts = mask.sum(axis=-1)
        width = int(counts.max())
        # Rows that go entirely are dropped by their own axis; any index will do for them.
        index = np.zeros((*mask.shape[:-1], width), dtype=np.int64)
        full = counts == width
        index[full] = np.nonzero(mask[full])[-1].reshape(-1, width)
        return _Kept(index, label.over)


def _shrink(tensor: torch.Tensor, labels: Sequence[Label | None], narrowing: Narrowing) -> torch.Tensor:
    """A meta tensor of the narrowed shape."""
    shape = list(tensor.shape)
    for axis, label in enumerate(labels):
        kept = _Kept.of(narrowing, label)
        if kept is not None:
            shape[axis] = kept.index.shape[-1]
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def narrow(tensor: torch.Tensor, labels: Sequence[Label | None], narrowing: Narrowing) -> torch.Tensor:
    """The entries of ``tensor`` that survive, ``labels`` being those of its dimensions.

    Always a copy; parameter or not, dtype, device and memory format are kept.
    """
    data = tensor.detach()
    kept = {axis: k for axis, label in enumerate(labels) if (k := _Kept.of(narrowing, label)) is not None}
    flat = {axis: k.index for axis, k in kept.items() if not k.over}
    new = data if kept else data.clone()
    for axis, k in kept.items():
        if k.over:
            new = _gather(new, axis, k)
    new = _restride(_pick(new, flat), data)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _restride(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(old.dim())
    if memory_format is not None and not old.is_contiguous() and old.is_contiguous(memory_format=memory_format):
        return new.contiguous(memory_format=memory_format)
    return new.contiguous()


def _gather(data: torch.Tensor, axis: int, kept: _Kept) -> torch.Tensor:
    """Each row along ``axis`` keeps its own indices."""
    order = [*kept.over, axis]
    shape = [1] * data.dim()
    for place, d in enumerate(order):
        shape[d] = kept.index.shape[place]
    index = torch.from_numpy(kept.index.transpose(np.argsort(order)).reshape(shape)).to(data.device)
    sizes = list(data.shape)
    sizes[axis] = kept.index.shape[-1]
    return data.gather(axis, index.expand(sizes))


def _pick(data: torch.Tensor, flat: dict[int, Any]) -> torch.Tensor:
    """Pick along several axes at once; runs of equal length (a flattened map) move as one."""
    if not flat:
        return data
    shape: list[int] = []
    axes: dict[int, Any] = {}
    for axis, size in enumerate(data.shape):
        index = flat.get(axis)
        run = _run_length(index, size) if index is not None else 1
        if index is not None:
            axes[len(shape)] = index[::run] // run if run > 1 else index
        shape += [size // run, run] if run > 1 else [size]
    final = [flat[a].size if a in flat else size for a, size in enumerate(data.shape)]
    view = data.reshape(shape)
    if len(axes) == 1:
        ((axis, index),) = axes.items()
        return view.index_select(axis, _tensor(index, data)).reshape(final)
    grid: list[Any] = [slice(None)] * len(shape)
    last = max(axes)
    for place, (axis, index) in enumerate(axes.items()):
        grid[axis] = _tensor(index, data).reshape(-1, *[1] * (len(axes) - 1 - place))
    if sorted(axes) != list(range(min(axes), last + 1)):  # axes apart: one after the other
        for axis, index in axes.items():
            view = view.index_select(axis, _tensor(index, data))
        return view.reshape(final)
    return view[tuple(grid)].reshape(final)


def _run_length(index: Any, size: int) -> int:
    """The largest block length such that whole aligned blocks are kept; 1 if there is none."""
    if index.size < 2 or index.size == size:
        return 1
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    edges = np.concatenate([[0], breaks, [index.size]])
    run = int(np.gcd.reduce(np.concatenate([np.diff(edges), index[edges[:-1]], [size]])))
    return max(run, 1)


def _tensor(index: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)
