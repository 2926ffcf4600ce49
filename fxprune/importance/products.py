"""What can be seen of a model while it runs: every product of a parameter with a value.

Whatever the model's modules and functions are called, the ATen calls that they come down to are looked at, on
the user's own model, so that batches may have other shapes than the example inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..capture.patches import switched
from ..convolution import Convolution
from .calibration import Sums


@dataclass(frozen=True, eq=False)
class Site:
    """A linear layer, a convolution or a matrix product of which one factor is (part of) a parameter.

    Attributes:
        name: the parameter.
        shape: its shape.
        region: the part of the parameter that takes part, a slice for each dimension.
        inner: dimension of the parameter that is contracted with the input's channels.
        outer: dimension of the parameter that becomes the output's channels.
        rows: dimension of the parameter that is a batch of matrices, or None.
        channel: dimension of input and output in which the channels are.
        batched: the first dimension of input and output is a batch of matrices.
        convolution: how it goes over its input; None for other products.
    """

    name: str
    shape: torch.Size
    region: tuple[slice, ...]
    inner: int
    outer: int
    rows: int | None
    channel: int
    batched: bool
    convolution: Convolution | None = None

    @property
    def groups(self) -> int:
        """Parts of the channels that are multiplied by themselves."""
        return self.convolution.groups if self.convolution is not None else 1

    def folded(self, value: torch.Tensor) -> torch.Tensor:
        """The input, the output or the derivative by either as ``(groups or batch, channels, positions)``."""
        value = value.detach()
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.batched:
            return value.movedim(self.channel, 1).flatten(2)
        value = value.movedim(self.channel, 0)
        return value.reshape(self.groups, value.shape[0] // self.groups, -1)

    def spread(self, statistic: torch.Tensor, dim: int, once: bool = False) -> torch.Tensor:
        """``(groups or batch, channels)`` of input (``dim`` is ``inner``) or output, laid onto the region.

        The result has the parameter's dimensions, of size 1 where all indices are alike. A number that is
        laid onto several places of the region is divided by their number if it is to count ``once``.
        """
        if self.groups == 1 and (self.rows is None or not self.batched):
            statistic = statistic.sum(0, keepdim=True)
        distinct = statistic.numel()
        dims: tuple[int, ...]
        if self.groups > 1:  # dimension 0 runs over the channels of all groups, dimension 1 over those of one
            if dim == 0:
                statistic, dims = statistic.reshape(-1), (0,)
            else:
                per_group = self.shape[0] // self.groups
                statistic, dims = statistic.repeat_interleave(per_group, 0), (0, 1)
        elif self.batched and self.rows is not None:
            dims = (self.rows, dim)
        else:
            statistic, dims = statistic[0], (dim,)
        order = sorted(dims)
        statistic = statistic.permute([dims.index(d) for d in order])
        laid = statistic.reshape(
            [statistic.shape[order.index(d)] if d in dims else 1 for d in range(len(self.shape))]
        )
        sizes = [part.stop - part.start for part in self.region]
        laid = laid.expand([size if self._partial(d) else laid.shape[d] for d, size in enumerate(sizes)])
        return laid * (distinct / laid.numel()) if once else laid

    def _partial(self, dim: int) -> bool:
        return self.region[dim] != slice(0, self.shape[dim])

    def add(self, sums: Sums, key: Any, laid: torch.Tensor) -> None:
        """Add what :meth:`spread` gave to the sum under ``key``, at the site's region."""
        wide = [laid.shape[d] > 1 or self._partial(d) for d in range(laid.dim())]
        shape = [size if wide[d] else 1 for d, size in enumerate(self.shape)]
        if key not in sums:
            sums[key] = laid.new_zeros(shape)
        both = torch.broadcast_shapes(sums[key].shape, shape)
        if sums[key].shape != both:
            sums[key] = sums[key].expand(both).clone()
        sums[key][tuple(part if wide[d] else slice(None) for d, part in enumerate(self.region))] += laid


See = Callable[[Site, torch.Tensor, torch.Tensor, "torch.Tensor | None"], "Callable[[Any, Any], None] | None"]
"""``see(site, input, output, bias)``. If it returns a function, that is called in the backward pass with the
derivatives by the output and by the input (None if nobody asked for it)."""


class Products(TorchDispatchMode):
    """While it lasts, shows every :class:`Site` that a run of the model comes to, in the order of the run.

    Parameters are recognised by the memory that they lie in, also transposed, in slices, and in copies of
    another precision (autocast). A weight that is computed from parameters is not recognised.
    """

    def __init__(self, model: nn.Module, see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see
        self.sources: dict[int, list[_Source]] = {}
        self.copies: set[int] = set()
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            dims = tuple((d, 0) for d in range(parameter.dim()))
            self._register(parameter, name, dims)
        self.pending: tuple[torch.Tensor, Callable[[Any, Any], None], int] | None = None
        # Opaque kernels of recurrent layers dissolve without these libraries.
        self.dissolved = any(isinstance(module, nn.RNNBase) for module in model.modules())

    def __enter__(self) -> Products:
        self.stack = contextlib.ExitStack()
        if self.dissolved:
            libraries = (torch.backends.mkldnn, torch.backends.cudnn)
            self.stack.enter_context(switched(*(library.flags(enabled=False) for library in libraries)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.stack.close()
        self._settle()
        for key in self.copies:
            self.sources[key] = [source for source in self.sources[key] if source.keep is None]
        self.copies.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._settle()
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _COPIES:
            part = self._part(args[0])
            if part is not None and isinstance(out, torch.Tensor) and out.shape == args[0].shape:
                dims = [(d, part.region[d].start) if d is not None else None for d in part.dims]
                self._register(out, part.name, tuple(dims), keep=out)
        elif packet in _READERS and not kwargs:
            for operand in _READERS[packet](args):
                site = self._site(operand)
                if site is not None:
                    callback = self.see(site, operand.input, out, operand.bias)
                    if callback is not None:
                        self.pending = out, callback, operand.place
                    break
        return out

    def _settle(self) -> None:
        """The last product's output has its place in the autograd graph by now."""
        if self.pending is not None:
            output, callback, place = self.pending
            self.pending = None
            if output.grad_fn is not None:
                output.grad_fn.register_hook(lambda gone, come: callback(come[0], gone[place]))

    def _register(self, tensor: torch.Tensor, name: str, dims: tuple[Any, ...], keep: Any = None) -> None:
        axes = tuple(
            (tensor.shape[place], tensor.stride(place), *dim)
            for place, dim in enumerate(dims)
            if dim is not None and tensor.shape[place] > 1
        )
        key = tensor.untyped_storage()._cdata
        self.sources.setdefault(key, []).append(_Source(name, int(tensor.storage_offset()), axes, keep))
        if keep is not None:
            self.copies.add(key)

    def _part(self, tensor: Any) -> _Part | None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            return None
        for source in self.sources.get(tensor.untyped_storage()._cdata, ()):
            part = source.part(tensor, self.shapes[source.name])
            if part is not None:
                return part
        return None

    def _site(self, operand: _ProductOperand) -> Site | None:
        part = self._part(operand.weight)
        if part is None:
            return None
        inner, outer = part.dims[operand.inner], part.dims[operand.outer]
        rows = part.dims[operand.rows] if operand.rows is not None else None
        if inner is None or outer is None:
            return None
        batched = operand.rows is not None
        shape = self.shapes[part.name]
        groups = operand.convolution.groups if operand.convolution is not None else 1
        if groups > 1 and any(part.region[d] != slice(0, shape[d]) for d in (0, 1)):
            return None  # groups of a part of a parameter
        return Site(
            part.name, shape, part.region, inner, outer, rows, operand.channel, batched, operand.convolution
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor as part of a parameter: the parameter's dimension for each of its own, and what it covers."""

    name: str
    dims: tuple[int | None, ...]
    region: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class _Source:
    """Memory in which (a copy of) a parameter lies.

    Attributes:
        name: the parameter.
        offset: where it begins.
        axes: size, stride, the parameter's dimension, and the index with which the copy begins there; only of
            dimensions that are larger than 1.
        keep: a copy, which must stay alive while its memory is known by its address.
    """

    name: str
    offset: int
    axes: tuple[tuple[int, int, int, int], ...]
    keep: Any

    def part(self, tensor: torch.Tensor, shape: torch.Size) -> _Part | None:
        """What a view of this memory is of the parameter; None if it is no block with axes of its own."""
        taken: dict[int, int] = {}
        dims: list[int | None] = []
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            axis = next((a for a in self.axes if a[1] == stride and size <= a[0]), None)
            if size == 1 or stride == 0:
                dims.append(None)
            elif axis is None or axis[2] in taken:
                return None
            else:
                taken[axis[2]] = size
                dims.append(axis[2])
        rest = int(tensor.storage_offset()) - self.offset
        region = [slice(0, 1)] * len(shape)
        for size, stride, dim, first in sorted(self.axes, key=lambda a: -a[1]):
            start, rest = divmod(rest, stride)
            stop = start + taken.get(dim, 1)
            if not 0 <= start < stop <= size:
                return None
            region[dim] = slice(first + start, first + stop)
        if rest:
            return None
        free = [d for d in range(len(shape)) if d not in taken]
        single = [place for place, dim in enumerate(dims) if dim is None and tensor.shape[place] == 1]
        if len(free) == len(single):
            for place, dim in zip(single, free, strict=True):
                dims[place] = dim
        return _Part(self.name, tuple(dims), tuple(region))


@dataclass(frozen=True, eq=False)
class _ProductOperand:
    """A factor of a call that may be a parameter.

    Attributes:
        weight: the factor.
        inner: its contracted dimension.
        outer: its other one.
        rows: its batch dimension, or None.
        input: the other factor.
        channel: the dimension of the other factor, and of the result, that holds the channels.
        place: the place of the other factor among the call's inputs.
        bias: what is added, of a shape that broadcasts to the result's.
        groups: number of groups.
        window: see :class:`Site`.
    """

    weight: Any
    inner: int
    outer: int
    rows: int | None
    input: Any
    channel: int
    place: int
    bias: Any = None
    convolution: Convolution | None = None


def _matrices(args: Any, bias: Any = None) -> list[_ProductOperand]:
    a, b = args
    first = 0 if bias is None else 1
    return [
        _ProductOperand(b, 0, 1, None, a, 1, first, bias),
        _ProductOperand(a, 1, 0, None, b, 0, first + 1, bias),
    ]


def _batches(args: Any, bias: Any = None) -> list[_ProductOperand]:
    a, b = args
    first = 0 if bias is None else 1
    return [
        _ProductOperand(b, 1, 2, 0, a, 2, first, bias),
        _ProductOperand(a, 2, 1, 0, b, 1, first + 1, bias),
    ]


def _linear(args: Any) -> list[_ProductOperand]:
    x, weight, bias = (*args, None)[:3]
    return [_ProductOperand(weight, 1, 0, None, x, x.dim() - 1, 0, bias)]


def _convolution(args: Any) -> list[_ProductOperand]:
    x, weight, bias = args[:3]
    how = Convolution.of(args)
    if bias is not None:
        bias = bias.reshape(-1, *[1] * (x.dim() - 2))
    return [_ProductOperand(weight, how.inner, how.outer, None, x, 1, 0, bias, how)]


_READERS: dict[Any, Callable[[Any], list[_ProductOperand]]] = {
    torch.ops.aten.mm: _matrices,
    torch.ops.aten.addmm: lambda args: _matrices(args[1:3], args[0]),
    torch.ops.aten.bmm: _batches,
    torch.ops.aten.baddbmm: lambda args: _batches(args[1:3], args[0]),
    torch.ops.aten.linear: _linear,
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten._convolution: _convolution,
}

_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.clone)
