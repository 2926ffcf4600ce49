"""Criteria that need only the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ..coupling.graph import CouplingGraph
from ..coupling.units import Label, State

_CHUNK = 1 << 20
"""Entries of a weight that are handled at once: few enough to stay in the processor's cache."""


def magnitude(graph: CouplingGraph, p: int) -> NDArray[np.float64]:
    """The Lp norm of all parameter entries that go with a unit, by class.

    ``score(u) = (sum over entries w removed with u of |w|^p)^(1/p)``, over all members of the group, as
    in the group norm of DepGraph (Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900); on a single
    filter it is the criterion of Li et al. (ICLR 2017, https://arxiv.org/abs/1608.08710). Buffers do
    not count.
    """
    total = np.zeros(graph.run.coupler.units.count)
    scratch = torch.empty(_CHUNK)
    for state in graph.states.values():
        labels = [(dim, label) for dim, label in enumerate(state.axes) if label is not None]
        if not isinstance(state.tensor, torch.nn.Parameter) or not labels:
            continue
        for (_, label), powers in zip(labels, _powers(state, labels, p, scratch), strict=True):
            np.add.at(total, graph.classes(label.ids).reshape(-1), powers.reshape(-1))
    scores: NDArray[np.float64] = total ** (1 / p)
    return scores


def random(graph: CouplingGraph, seed: int) -> NDArray[np.float64]:
    """Uniform scores that depend on ``seed`` and the architecture only."""
    return np.random.default_rng(seed).random(graph.run.coupler.units.count)


def _powers(
    state: State, labels: list[tuple[int, Label]], p: int, scratch: torch.Tensor
) -> Iterator[NDArray[np.float64]]:
    """For each label the sum of ``|w|^p`` over the dimensions that it does not have, in the order of its ids.

    The weight is read once, in chunks of rows through ``scratch``.
    """
    assert state.tensor is not None
    tensor = state.tensor.detach()
    if tensor.dim() == 1:
        vector = tensor.to("cpu", torch.float64).numpy()
        yield np.abs(vector) ** p
        return
    kept = [sorted((*label.over, dim)) for dim, label in labels]
    inner = max(max(dims) for dims in kept) + 1  # dimensions from here on belong to no label
    shape = (*tensor.shape[:inner], math.prod(tensor.shape[inner:]))
    results = [np.zeros([shape[d] for d in dims]) for dims in kept]
    row = max(tensor.numel() // max(shape[0], 1), 1)
    start = 0
    for chunk in tensor.reshape(shape).split(max(1, _CHUNK // row)):
        powers = scratch[: chunk.numel()].view(chunk.shape) if chunk.numel() <= scratch.numel() else None
        if chunk.dtype != scratch.dtype or chunk.device != scratch.device:
            chunk, powers = chunk.to(scratch.device, torch.promote_types(chunk.dtype, scratch.dtype)), None
        powers = torch.abs(chunk, out=powers) if p == 1 else torch.mul(chunk, chunk, out=powers)
        powers = powers.sum(-1) if shape[-1] > 1 else powers.squeeze(-1)
        for dims, result in zip(kept, results, strict=True):
            gone = [d for d in range(inner) if d not in dims]
            part = (powers.sum(gone) if gone else powers).numpy()
            if dims[0] == 0:
                result[start : start + chunk.shape[0]] = part
            else:
                result += part
        start += chunk.shape[0]
    for (dim, label), dims, result in zip(labels, kept, results, strict=True):
        yield result.transpose([dims.index(d) for d in (*label.over, dim)])
