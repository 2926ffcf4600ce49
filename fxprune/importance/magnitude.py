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
"""Entries of a weight that are handled at once: small enough for the processor's cache."""


def magnitude(graph: CouplingGraph, p: int) -> NDArray[np.float64]:
    """The Lp norm of all parameter entries that go with a unit, by class.

    ``score(u) = (sum over entries w removed with u of |w|^p)^(1/p)``, over all members of the group, as
    in the group norm of DepGraph (Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900); on a single
    filter it is the criterion of Li et al. (ICLR 2017, https://arxiv.org/abs/1608.08710). Buffers do
    not count.
    """
    total = np.zeros(graph.run.coupler.units.count)
    buffers = graph.captured.program.skeleton.buffers
    for state in graph.states.values():
        labels = [(dim, label) for dim, label in enumerate(state.axes) if label is not None]
        if state.name in buffers or state.tensor is None or not labels:
            continue
        for (_, label), powers in zip(labels, _powers(state, labels, p), strict=True):
            classes = graph.classes(label.ids).reshape(-1)
            total += np.bincount(classes, powers.reshape(-1).numpy(), minlength=total.size)
    scores: NDArray[np.float64] = total ** (1 / p)
    return scores


def random(graph: CouplingGraph, seed: int) -> NDArray[np.float64]:
    """Uniform scores that depend on ``seed`` and the architecture only."""
    return np.random.default_rng(seed).random(graph.run.coupler.units.count)


def _powers(state: State, labels: list[tuple[int, Label]], p: int) -> Iterator[torch.Tensor]:
    """For each label the sum of ``|w|^p`` over the dimensions that it does not have, in the order of its ids."""
    tensor = state.tensor
    assert tensor is not None
    tensor = tensor.detach()
    kept = [sorted((*label.over, dim)) for dim, label in labels]
    inner = max(max(dims) for dims in kept) + 1  # dimensions from here on belong to no label
    shape = tensor.shape[:inner]
    results = [torch.zeros([shape[d] for d in dims], dtype=torch.float64) for dims in kept]
    rows = max(1, _CHUNK * shape[0] // max(tensor.numel(), 1))
    start = 0
    for chunk in tensor.split(rows):
        powers = chunk.abs() if p == 1 else chunk.square()
        powers = powers.to("cpu").float() if powers.dtype in (torch.float16, torch.bfloat16) else powers.to("cpu")
        powers = powers.reshape(*powers.shape[:inner], math.prod(tensor.shape[inner:])).sum(-1)
        for dims, result in zip(kept, results, strict=True):
            gone = [d for d in range(inner) if d not in dims]
            part = powers.sum(gone) if gone else powers
            if dims[0] == 0:
                result[start : start + chunk.shape[0]] = part
            else:
                result += part
        start += chunk.shape[0]
    for (dim, label), dims, result in zip(labels, kept, results, strict=True):
        yield result.permute([dims.index(d) for d in (*label.over, dim)])
