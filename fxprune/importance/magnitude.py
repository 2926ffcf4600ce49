"""Criteria made of the sizes of weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..coupling.units import Axis, Label
from ..errors import ImportanceError
from ..nodes import operator_name
from ..program import Program
from .base import Entries, Measure, MemberCriterion, Scores

_CHUNK = 1 << 20
"""Entries of a weight that are handled at once: few enough to stay in the processor's cache."""


def magnitude(graph: CouplingGraph, p: float) -> NDArray[np.float64]:
    """The Lp norm of all parameter entries that go with a unit, by class.

    ``score(u) = (sum over entries w removed with u of |w|^p)^(1/p)``, over all members of the group, as
    in the group norm of DepGraph (Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900); on a single
    filter it is the criterion of Li et al. (ICLR 2017, https://arxiv.org/abs/1608.08710). Buffers do
    not count.
    """
    count = graph.run.coupler.units.count
    by_unit = np.zeros(count)
    for _, label, powers in _axes(graph, p):
        np.add.at(by_unit, label.ids.ravel(), powers.ravel())
    by_class = np.bincount(graph.classes(np.arange(count)), by_unit, count)
    graph.cells.collect(np.add, by_class)  # an entry counts for both axes that it goes with
    return np.float_power(by_class, 1 / p)


def _axes(graph: CouplingGraph, p: float) -> Iterator[tuple[Axis, Label, NDArray[np.float64]]]:
    """All labelled axes of parameters; the sums of ``|w|^p`` at their indices have the shape of the ids."""
    scratch = torch.empty(_CHUNK)
    for state in graph.states.values():
        if not isinstance(state.tensor, torch.nn.Parameter):
            continue
        labels = [(dim, label) for dim, label in enumerate(state.axes) if label is not None]
        if labels:
            found = _powers(state.tensor, labels, p, scratch)
            for (dim, label), powers in zip(labels, found, strict=True):
                yield Axis(state.name, dim), label, powers


def random(graph: CouplingGraph, seed: int) -> NDArray[np.float64]:
    """Uniform scores that depend on ``seed`` and the architecture only."""
    return np.random.default_rng(seed).random(graph.run.coupler.units.count)


def _powers(
    parameter: torch.Tensor, labels: list[tuple[int, Label]], p: float, scratch: torch.Tensor
) -> Iterator[NDArray[np.float64]]:
    """For each label the sum of ``|w|^p`` over the dimensions that it does not have, in the order of its ids.

    The weight is read once, in chunks of rows; ``scratch`` is memory for one. Dimensions at the end that have
    no label (a kernel) count as part of the last that has one, as long rows are summed up fastest.
    """
    tensor = parameter.detach()
    if tensor.dim() == 1:
        yield np.abs(tensor.to("cpu", torch.float64).numpy()) ** p
        return
    if tensor.is_complex():
        tensor = tensor.abs()
    kept = [sorted((*label.over, dim)) for dim, label in labels]
    inner = max(max(dims) for dims in kept) + 1  # dimensions from here on belong to no label
    shape = (*tensor.shape[:inner], math.prod(tensor.shape[inner:]))
    long = inner > 1 and all(len(dims) < inner for dims in kept)
    if long:
        shape = (*shape[:-2], shape[-2] * shape[-1])
    row = math.prod(shape[1:])
    rows = max(1, _CHUNK // max(row, 1))
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if (scratch.dtype, scratch.device) != (dtype, tensor.device) or rows * row > scratch.numel():
        scratch = torch.empty(rows * row, dtype=dtype, device=tensor.device)
    results = [np.zeros([shape[d] for d in dims]) for dims in kept]
    start = 0
    for chunk in tensor.reshape(shape).split(rows):
        chunk = chunk.to(dtype)
        powers = scratch[: chunk.numel()].view(chunk.shape)
        powers = torch.mul(chunk, chunk, out=powers) if p == 2 else torch.abs(chunk, out=powers).pow_(p)
        for dims, result in zip(kept, results, strict=True):
            part = powers.sum([d for d in range(len(shape)) if d not in dims]).cpu().numpy()
            if dims[0] == 0:
                result[start : start + chunk.shape[0]] = part
            else:
                result += part
        start += chunk.shape[0]
    for (dim, label), dims, result in zip(labels, kept, results, strict=True):
        if long and dims[-1] == inner - 1:
            result = result.reshape(*result.shape[:-1], tensor.shape[inner - 1], -1).sum(-1)
        yield result.transpose([dims.index(d) for d in (*label.over, dim)])


@dataclass(frozen=True)
class Magnitude(MemberCriterion):
    """The Lp norm of the parameter entries that go with a unit.

    ``score(u) = (reduce over members m of sum over entries w of m at u of |w|^p)^(1/p)``, then normalised.
    With ``reduce="sum"`` this is the group norm of DepGraph (Fang et al., CVPR 2023,
    https://arxiv.org/abs/2301.12900), what ``importance="l2"`` stands for; with ``members="root"`` and
    ``p=1`` the filter norm of Li et al. (ICLR 2017, https://arxiv.org/abs/1608.08710). Torch-Pruning leaves
    out the root ``1/p``, which orders the units of a group in the same way.

    Attributes:
        p: degree of the norm, ``p > 0``.
    """

    p: float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        p: Any = self.p
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p < math.inf:
            raise ImportanceError(
                f"p={self.p!r} is no degree of a norm; use a number above 0, such as 1 or 2."
            )

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """Sums of ``|w|^p``; every weight is read once."""
        sums = Entries(lambda member: member.tensor.detach().abs() ** self.p)
        for axis, label, powers in _axes(graph, self.p):
            sums.sums[axis, label.over] = powers
        return sums

    def finish(self, values: Scores) -> Scores:
        """Take the root."""
        root: Scores = values ** (1 / self.p)
        return root


@dataclass(frozen=True)
class LAMP(Magnitude):
    """Layer-adaptive magnitude: the share of a unit in all units of its group that are no smaller.

    ``score(u) = s(u) / sum over v with s(v) >= s(u) of s(v)``, where ``s(u) = reduce over members of
    sum |w|^p`` without the root; equal ones count in the order of their positions. Lee et al., ICLR 2021,
    https://arxiv.org/abs/2010.07611, for single weights and ``p=2``; here for the units of a group. It orders
    the units of one group as :class:`Magnitude` does, and makes groups comparable: the largest unit of each
    scores 1.
    """

    def finish(self, values: Scores) -> Scores:
        """The share in what is no smaller."""
        order = np.argsort(values, kind="stable")
        ranked = values[order]
        above = np.cumsum(ranked[::-1])[::-1]
        shares = np.zeros_like(values)
        shares[order] = np.divide(ranked, above, out=np.zeros_like(ranked), where=above != 0)
        return shares


@dataclass(frozen=True)
class BNScale(MemberCriterion):
    """The scale of the batch normalisations that a unit passes through.

    ``score(u) = reduce over batch norms of |gamma_u|``: Network Slimming (Liu et al., ICCV 2017,
    https://arxiv.org/abs/1708.06519). Groups without a batch normalisation are scored by ``otherwise``;
    both are divided by their mean, so that groups can be compared.
    """

    reduce: str = field(default="mean", kw_only=True)
    normalize: Any = field(default="mean", kw_only=True)
    otherwise: MemberCriterion = field(default=Magnitude(reduce="mean", normalize="mean"), kw_only=True)

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """Sizes of the scales; None for any other parameter."""
        scales = _batch_norm_scales(graph.captured.program)
        return Entries(lambda member: member.tensor.detach().abs() if id(member.tensor) in scales else None)

    def prepare(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Any:
        """Scores by the scales; those of ``otherwise`` where there are none."""
        measure = self.measure(graph, model, seed)
        otherwise = self.otherwise.prepare(graph, model, seed)

        def scores(group: Group) -> Scores:
            found = self.joined(group, measure)
            return self.scored(group, found) if found[1].all() else otherwise(group)

        return scores


def _batch_norm_scales(program: Program) -> set[int]:
    """Which tensors are scales of batch normalisations, as ``id``."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_module":
            name = f"{node.target}.weight"
            norm = isinstance(program.modules[str(node.target)], nn.modules.batchnorm._BatchNorm)
        else:
            scale = _argument(node, "weight") if "batch_norm" in operator_name(node) else None
            norm = isinstance(scale, fx.Node) and scale.op == "get_attr"
            name = str(scale.target) if isinstance(scale, fx.Node) else ""
        if norm and name in program.tensors:
            found.add(id(program.tensors[name]))
    return found


def _argument(node: fx.Node, name: str) -> Any:
    """The argument called ``name`` of a call of a function or an ATen operator."""
    if name in node.kwargs:
        return node.kwargs[name]
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    try:
        names = [a.name for a in schema.arguments] if schema else list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a function without a signature
        return None
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else None
