"""Criteria that compare units with each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Member
from .base import Measure, MemberCriterion, PerUnit, Scores, measurable, slices

_DISTANCES = 1 << 24
"""How many distances are held at once."""


@dataclass(frozen=True)
class FPGM(MemberCriterion):
    """How far a unit's weights are from those of all other units: what lies near the geometric median goes.

    ``s_m(u) = sum over units v of || w_m(u) - w_m(v) ||_2``, where ``w_m(u)`` are the entries of the member
    ``m`` at ``u`` as one vector; members are joined by ``reduce``. Filter pruning via geometric median (He et
    al., CVPR 2019, https://arxiv.org/abs/1811.00250), for which ``members="root"`` compares filters only.
    Vectors (biases, scales of normalisations) do not count. Units that take up different numbers of
    indices on a member are compared among their likes.
    """

    reduce: str = field(default="mean", kw_only=True)

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """Sums of distances within a member."""
        return _from_the_others


def _from_the_others(member: Member, size: int) -> PerUnit | None:
    if not measurable(member) or member.tensor.dim() < 2:
        return None
    total, held = np.zeros(size), np.zeros(size, dtype=bool)
    for units, rows in slices(member.tensor, member, size):
        total[units], held[units] = _distances(rows), True
    return total, held


def _distances(rows: torch.Tensor) -> Scores:
    """The sum of the Euclidean distances of each row ``(n, width)`` from all others, ``(n,)``."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    chunks = rows.split(max(1, _DISTANCES // max(rows.shape[0], 1)))
    sums = torch.cat([torch.cdist(chunk, rows).sum(1) for chunk in chunks])
    return sums.to("cpu").to(torch.float64).numpy()
