"""Narrow parameters and buffers: plain slices of the originals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..coupling.units import Label
from ..program import Program
from .base import Kept, Narrowing, Pass

_CHUNK = 1 << 19
"""Entries of a tensor that are moved at once."""

_LARGE, _ALIGNMENT = 1 << 22, 64
"""Bytes from which on NumPy asks for large pages, and the alignment of PyTorch's own memory."""


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
        make = _shrink if self.shapes_only else narrow
        made: dict[int, torch.Tensor] = {}
        for tensor in [*program.tensors.values(), *program.extras.values()]:
            if id(tensor) not in made:
                made[id(tensor)] = make(tensor, narrowing.graph.labels(tensor), narrowing)
        tensors = {name: made[id(tensor)] for name, tensor in program.tensors.items()}
        extras = {name: made[id(tensor)] for name, tensor in program.extras.items()}
        return replace(program, tensors=tensors, extras=extras)


def _shrink(tensor: torch.Tensor, labels: Sequence[Label | None], narrowing: Narrowing) -> torch.Tensor:
    """A meta tensor of the narrowed shape, or a buffer that stays as it is."""
    shape = narrowed_shape(tensor.shape, labels, narrowing)
    if shape == tensor.shape and not isinstance(tensor, nn.Parameter):
        return tensor  # a number that is read off it stays known
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def narrowed_shape(
    shape: Sequence[int], labels: Sequence[Label | None], narrowing: Narrowing
) -> tuple[int, ...]:
    """The shape that a tensor of this ``shape`` will have."""
    new = list(shape)
    for axis, label in enumerate(labels):
        kept = narrowing.kept(label)
        if kept is not None:
            new[axis] = kept.index.shape[-1]
    return tuple(new)


def narrow(tensor: torch.Tensor, labels: Sequence[Label | None], narrowing: Narrowing) -> torch.Tensor:
    """The entries of ``tensor`` that survive, ``labels`` being those of its dimensions.

    Always a copy; parameter or not, dtype, device and memory format are kept.
    """
    return pick(tensor, {d: k for d, label in enumerate(labels) if (k := narrowing.kept(label)) is not None})


def pick(tensor: torch.Tensor, kept: Mapping[int, Kept]) -> torch.Tensor:
    """A copy of ``tensor`` with the ``kept`` indices along each of these axes; else as :func:`narrow`."""
    data = tensor.detach()
    new = data if kept else data.clone()
    flat = {axis: k for axis, k in kept.items() if not k.over}
    if len(flat) < len(kept):
        for axis, k in sorted(kept.items(), key=lambda item: -len(item[1].over)):  # columns before their rows
            if k.over:
                new = _gather(new, axis, k)
    if flat:
        new = _pick(new, flat)
    if data.dim() > 1:
        new = restride(new, data)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def surviving(
    shape: Sequence[int], labels: Sequence[Label | None], narrowing: Narrowing
) -> torch.Tensor | None:
    """True where the entries of a tensor of this ``shape`` survive; None where all do."""
    mask = None
    for axis, label in enumerate(labels):
        if label is not None and narrowing.narrows(label):
            order = [*label.over, axis]
            alive = torch.from_numpy(narrowing.alive(label))
            alive = alive.permute([order.index(d) for d in sorted(order)])
            alive = alive.reshape([size if d in order else 1 for d, size in enumerate(shape)])
            mask = alive if mask is None else mask & alive
    return None if mask is None else mask.expand(*shape)


def masked(tensor: torch.Tensor, narrowing: Narrowing) -> torch.Tensor | None:
    """False where the masked original holds zeros; None where it holds what the original does."""
    if not isinstance(tensor, nn.Parameter):
        return None
    labels = narrowing.graph.labels(tensor)
    zeroed = [label if label is not None and label.zero else None for label in labels]
    mask = surviving(tensor.shape, zeroed, narrowing)
    kept = [None if label is zero else label for label, zero in zip(labels, zeroed, strict=True)]
    gone = surviving(tensor.shape, kept, narrowing)
    return mask if mask is None or gone is None else mask | ~gone  # where a row goes, nothing is masked


def restride(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new`` in the memory format of ``old``: channels last, or contiguous; sparse tensors have none."""
    if old.layout is not torch.strided:
        return new
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(old.dim())
    if (
        memory_format is not None
        and not old.is_contiguous()
        and old.is_contiguous(memory_format=memory_format)
    ):
        return new.contiguous(memory_format=memory_format)
    return new.contiguous()


def _gather(data: torch.Tensor, axis: int, kept: Kept) -> torch.Tensor:
    """Each row along ``axis`` keeps its own indices."""
    order = [*kept.over, axis]
    shape = [1] * data.dim()
    for place, d in enumerate(order):
        shape[d] = kept.index.shape[place]
    index = torch.from_numpy(kept.index.transpose(np.argsort(order)).reshape(shape)).to(data.device)
    sizes = list(data.shape)
    sizes[axis] = kept.index.shape[-1]
    return torch.gather(data, axis, index.expand(sizes), out=_memory(sizes, data))


def _memory(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A new tensor of this shape, with the dtype and on the device of ``like``.

    For large arrays NumPy asks Linux for large pages, PyTorch does not; most of the time that it takes to
    write a large tensor goes into page faults. The storage of such a tensor cannot be resized in place.
    """
    size = math.prod(shape) * like.element_size()
    if size < _LARGE or like.device.type != "cpu" or type(like) is not torch.Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    array = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -array.__array_interface__["data"][0] % _ALIGNMENT
    return torch.from_numpy(array[start : start + size]).view(like.dtype).view(*shape)


def _pick(data: torch.Tensor, flat: dict[int, Kept]) -> torch.Tensor:
    """Pick along several axes at once; runs of equal length (a flattened map) move as one.

    Chunks of the first axis are small enough that what lies between two picks stays in the cache.
    """
    shape: list[int] = []
    final = list(data.shape)
    axes: dict[int, torch.Tensor] = {}
    for axis, size in enumerate(data.shape):
        kept = flat.get(axis)
        if kept is None:
            shape.append(size)
            continue
        axes[len(shape)] = kept.tensor(data.device, kept.run)
        shape += [size // kept.run, kept.run] if kept.run > 1 else [size]
        final[axis] = kept.index.size
    view = data.reshape(shape) if len(shape) > len(final) else data
    (first, chosen), *others = axes.items()
    if data.numel() <= _CHUNK:
        for axis, index in axes.items():
            view = view.index_select(axis, index)
        return view.view(final) if len(shape) > len(final) else view
    rows = max(1, _CHUNK * shape[0] // data.numel()) if others and first == 0 else len(chosen)
    for axis, index in axes.items():
        shape[axis] = len(index)
    new = _memory(shape, data)
    for start in range(0, len(chosen), rows):
        part, target = view, new.narrow(first, start, min(rows, len(chosen) - start))
        *picks, (last, index) = (first, chosen[start : start + rows]), *others
        for axis, i in picks:
            part = part.index_select(axis, i)
        torch.index_select(part, last, index, out=target)
    return new.view(final)
