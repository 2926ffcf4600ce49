"""One rule per ATen operator, all in one registry, a file for each family.

A rule is a function ``(coupler, args, kwargs, out) -> None`` that says, in the words of
:class:`~fxprune.coupling.coupler.Coupler`, how the dimensions of the results follow from those of the
arguments. ``args`` and ``kwargs`` are what ATen was called with, ``out`` is what it returned (meta tensors).

Operators tagged ``torch.Tag.pointwise`` share one rule. An operator with no rule freezes what it touches.
"""

from __future__ import annotations

from ..registry import Rule, registered, rule_for
from . import (
    constants,
    contraction,
    indexed,
    movement,
    normalization,
    pointwise,
    quantization,
    spatial,
    vision,
)

__all__ = [
    "Rule",
    "constants",
    "contraction",
    "indexed",
    "movement",
    "normalization",
    "pointwise",
    "quantization",
    "registered",
    "rule_for",
    "spatial",
    "vision",
]
