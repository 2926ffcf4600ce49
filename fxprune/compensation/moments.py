"""Second moments of what a product reads, and the least-squares problem that they pose.

A product is ``y = W u``, with ``u`` the entries that one output position reads: the channels of a linear
layer's input, those of a convolution's window. With the wanted outputs ``t`` and the residual ``r = t - y``
the change ``D`` of the weights (and of the bias, for which ``u`` ends in a one) minimises

    ``mean |r - D u|^2 + ridge * |D|^2``,  so  ``D = E[r u'] (E[u u'] + ridge)^-1``.

Only the moments ``E[u u']``, ``E[r u']`` and ``E[r^2]`` are kept, so that memory does not grow with the data,
and the error of any change on held-out data follows from the moments of those data.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ..importance.products import Site

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Strengths that are tried, as shares of the mean square of what is read."""

FIRST = 3e-2
"""The strength that is tried first, one in the middle."""

_MANY, _STRONG = 1024, 1e-3
"""With more entries than this, strengths from this one on are tried in single precision, which does not see
weaker ones."""

BIAS_ONLY = 1e9
"""A strength with which nothing but the bias changes."""


_QUANTILE, _MOST = 0.9, 10.0
"""No position counts for more than this many times that which has this share of all below it."""


@dataclass
class Sums:
    """Moments of one product over some data.

    Attributes:
        second: ``(groups, n + 1, n + 1)`` sums of ``u u'``, a one being the last entry of ``u``.
        cross: ``(groups, outputs, n + 1)`` sums of ``r u'``.
        square: sum of ``r^2``.
        wanted: sum of ``t^2``.
        count: number of positions; each with its weight.
    """

    second: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    square: float = 0.0
    wanted: float = 0.0
    count: float = 0.0

    def add(self, u: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> None:
        """``u (groups, n, positions)``, ``r`` and ``t (groups, outputs, positions)``."""
        if not u.shape[2]:
            return
        factors = evened(u, t)
        u = torch.cat([u, u.new_ones(u.shape[0], 1, u.shape[2])], 1) * factors
        r, t = r * factors, t * factors
        second = (u @ u.mT).double()
        cross = (r @ u.mT).double()
        self.second = second if self.second is None else self.second + second
        self.cross = cross if self.cross is None else self.cross + cross
        self.square += float(r.double().square().sum())
        self.wanted += float(t.double().square().sum())
        self.count += float(factors.double().square().sum())

    def plus(self, other: Sums) -> Sums:
        """Moments over both."""
        if other.second is None or other.cross is None:
            return self
        if self.second is None or self.cross is None:
            return other
        return Sums(
            self.second + other.second, self.cross + other.cross, self.square + other.square,
            self.wanted + other.wanted, self.count + other.count,
        )  # fmt: skip

    def error(self, change: torch.Tensor | None) -> float:
        """Mean square of what is missing from the wanted outputs after a change of the weights."""
        found = self.square
        if change is not None and self.second is not None and self.cross is not None:
            second, cross = self.second.to(change), self.cross.to(change)
            found += float(((change @ second - 2 * cross) * change).sum(dtype=torch.float64))
        return max(found, 0.0) / max(self.count, 1.0)

    def solve(self, ridge: float, bias: bool, quick: bool = False) -> torch.Tensor | None:
        """The change ``(groups, outputs, n + 1)``; None where it cannot be computed.

        Args:
            ridge: the strength.
            bias: whether there is a bias to change.
            quick: single precision will do, where that is faster and sees the ridge.
        """
        if self.second is None or self.cross is None:
            return None
        n = self.second.shape[1] - 1
        size = n + 1 if bias else n
        second = self.second[:, :size, :size].clone()
        diagonal = second.diagonal(dim1=1, dim2=2)
        scale = diagonal[:, :n].mean(1, keepdim=True)
        if bias:  # the ridge counts for the deviations from the mean
            mean = second[:, :n, n] / max(self.count, 1.0)
            scale = (diagonal[:, :n] - self.count * mean.square()).mean(1, keepdim=True)
        floor = 1e-9 * diagonal[:, :n].mean(1, keepdim=True) + 1e-30
        diagonal[:, :n] += ridge * scale.clamp(min=0) + floor
        if quick and n > _MANY and ridge >= _STRONG:
            second = second.float()
        factor, failed = torch.linalg.cholesky_ex(second)
        if bool(failed.any()):
            return None
        change = torch.cholesky_solve(self.cross[:, :, :size].mT.to(factor).contiguous(), factor).mT
        if not bool(torch.isfinite(change).all()):
            return None
        return change if bias else F.pad(change, (0, 1))


@dataclass
class Problem:
    """A least-squares problem, with data set aside to judge its solutions."""

    fit: Sums = field(default_factory=Sums)
    held: Sums = field(default_factory=Sums)

    def add(self, u: torch.Tensor, r: torch.Tensor, t: torch.Tensor, number: int, batches: int) -> None:
        """Add what was seen of batch ``number``; arguments as for :meth:`Sums.add`.

        Every fourth batch is held out; where there are fewer, the last quarter of the positions of each.
        """
        if batches >= 4:
            (self.held if number % 4 == 3 else self.fit).add(u, r, t)
            return
        cut = u.shape[2] - u.shape[2] // 4
        self.fit.add(u[:, :, :cut], r[:, :, :cut], t[:, :, :cut])
        self.held.add(u[:, :, cut:], r[:, :, cut:], t[:, :, cut:])

    def best(
        self, bias: bool, ridges: Sequence[float] = RIDGES, first: float = FIRST
    ) -> tuple[torch.Tensor | None, float, float, float]:
        """``(change, ridge, error before, error after)``, errors on held-out data, relative to the outputs.

        The strength of the ridge is that with the least error on held-out data; with it the change is solved
        for once more on all data. None where no change is better than none there. Each trial costs the
        cube of the entries that are read, so strengths are tried from ``first`` downhill, to the bottom of
        the valley of errors in which that lies.
        """
        strengths = sorted({*ridges, *([BIAS_ONLY] if bias else [])})
        before = self.held.error(None)

        @functools.cache
        def error(place: int) -> float:
            change = self.fit.solve(strengths[place], bias, quick=True)
            return math.inf if change is None else self.held.error(change)

        place = min(bisect.bisect_left(strengths, first), len(strengths) - 1)
        while error(place) == math.inf and place < len(strengths) - 1:  # too weak to be solved for
            place += 1
        while True:
            beside = [p for p in (place - 1, place + 1) if 0 <= p < len(strengths)]
            lower = min(beside, key=error, default=place)
            if error(lower) >= error(place):
                break
            place = lower
        scale = max(self.held.wanted / max(self.held.count, 1.0), 1e-30)
        if not error(place) < before:
            return None, 0.0, before / scale, before / scale
        change = self.fit.plus(self.held).solve(strengths[place], bias)
        return change, strengths[place], before / scale, error(place) / scale


def evened(*values: torch.Tensor) -> torch.Tensor:
    """Factors of positions, ``(positions,)``, with which no position counts for very much more than the rest.

    The moments are sums of squares, and a network may hold a few values that are a thousand times larger than
    all others (the first token of a language model: Sun et al., Massive Activations in Large Language Models,
    2024, https://arxiv.org/abs/2402.17762). Nothing but these would be fitted.

    Args:
        values: ``(groups, entries, positions)`` each.
    """
    factors = values[0].new_ones(values[0].shape[2])
    for value in values:
        squares = value.square().sum((0, 1))
        if squares.numel():
            most = _MOST * squares.kthvalue(max(1, int(_QUANTILE * squares.numel()))).values
            even = torch.where((squares > most) & (most > 0), (most / squares).sqrt(), 1.0)
            factors = torch.minimum(factors, even)
    return factors


def matrix(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """The weights of a product as ``(groups or rows, outputs, entries read)``, a view where that can be."""
    part = weight[site.region]
    if site.convolution is not None and site.convolution.transposed:
        part = part.reshape(site.groups, part.shape[0] // site.groups, part.shape[1], -1)
        return part.permute(0, 2, 1, 3).flatten(2)
    if site.convolution is not None:
        return part.reshape(site.groups, part.shape[0] // site.groups, -1)
    if site.batched and site.rows is not None:
        return part.permute(site.rows, site.outer, site.inner)
    return part.movedim((site.outer, site.inner), (0, 1)).reshape(1, part.shape[site.outer], -1)


def write(site: Site, weight: torch.Tensor, change: torch.Tensor) -> None:
    """Add ``change``, laid out as by :func:`matrix`, to the weights in place."""
    part = weight[site.region]
    if site.convolution is not None and site.convolution.transposed:
        groups, inner = site.groups, part.shape[0] // site.groups
        change = change.reshape(groups, part.shape[1], inner, -1).permute(0, 2, 1, 3).reshape(part.shape)
    elif site.convolution is not None:
        change = change.reshape(part.shape)
    elif site.batched and site.rows is not None:
        change = change.permute([(site.rows, site.outer, site.inner).index(d) for d in range(3)])
    else:
        moved = part.movedim((site.outer, site.inner), (0, 1))
        change = change.reshape(moved.shape).movedim((0, 1), (site.outer, site.inner))
    part += change.to(part)


def places(site: Site, output: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor | None:
    """Positions of the output to look at, ascending; None for all of them."""
    count = output.numel() // output.shape[site.channel]
    if site.batched:
        count //= output.shape[0]
    if count <= most:
        return None
    return torch.randperm(count, generator=generator)[:most].sort().values


def outputs(site: Site, y: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """The outputs of a product as ``(groups or rows, outputs, positions)``."""
    y = y.movedim(site.channel, 1).flatten(2) if site.batched else y.movedim(site.channel, 0)
    if site.batched:
        folded = y
    else:
        folded = y.reshape(site.groups, y.shape[0] // site.groups, -1)
    return _wide(folded if at is None else folded[:, :, at])


def inputs(site: Site, x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """What a product reads as ``(groups or rows, entries read, positions)``; see :func:`matrix`."""
    if site.convolution is None:
        folded = x.movedim(site.channel, 1).flatten(2) if site.batched else x.movedim(site.channel, 0)
        folded = folded if site.batched else folded.reshape(1, folded.shape[0], -1)
        return _wide(folded if at is None else folded[:, :, at])
    how, space = site.convolution, x.dim() - 2
    sizes = [part.stop - part.start for part in site.region[2:]]
    padding = list(how.padding)
    stride = list(how.stride)
    ends = [0] * space
    if how.transposed:
        spread = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *spread)
        at_inputs = [slice(None), slice(None)] + [slice(None, None, step) for step in stride]
        wide[tuple(at_inputs)] = x
        x, stride, ends = wide, [1] * space, list(how.more)
        padding = [d * (k - 1) - p for d, k, p in zip(how.dilation, sizes, padding, strict=True)]
    x = F.pad(x, [n for p, more in reversed([*zip(padding, ends, strict=True)]) for n in (p, p + more)])
    for d in range(space):
        reach = how.dilation[d] * (sizes[d] - 1) + 1
        x = x.unfold(2 + d, reach, stride[d])[..., :: how.dilation[d]]
    if how.transposed:
        x = x.flip(list(range(2 + space, 2 + 2 * space)))
    x = x.movedim(1, 1 + space)  # (batch, *positions, channels, *window)
    if at is not None:
        x = x[torch.unravel_index(at.to(x.device), x.shape[: 1 + space])]
    else:
        x = x.flatten(0, space)
    count = x.shape[0]
    return _wide(x.reshape(count, site.groups, -1).permute(1, 2, 0))


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
