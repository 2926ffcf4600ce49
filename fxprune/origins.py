"""What a pruned network knows about how it was made: in its ``meta``, which copies and pickles keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .planning.plan import PruningPlan

__all__ = ["made_in_training", "plans_of", "remember"]

_LAST, _ALL, _MODE = "fxprune", "fxprune_plans", "fxprune_training"


def remember(pruned: nn.Module, model: nn.Module, plans: Sequence[PruningPlan]) -> None:
    """Note in ``pruned`` that ``plans`` made it of ``model``, which may itself be a pruned network."""
    meta = getattr(pruned, "meta", {})
    if isinstance(meta, dict):  # else a model that was pruned by regions uses the name itself
        known = plans_of(model)
        pruned.meta = {  # type: ignore[assignment]
            **meta,
            _LAST: plans[-1],
            _ALL: (*known, *plans),
            _MODE: made_in_training(model) if known else model.training,
        }


def plans_of(pruned: nn.Module) -> tuple[PruningPlan, ...]:
    """The plans that made ``pruned`` of the user's own model, in order; none for what fxprune has not
    made.
    """
    found = _meta(pruned).get(_ALL, ())
    return tuple(plan for plan in found if isinstance(plan, PruningPlan))


def made_in_training(pruned: nn.Module) -> bool:
    """Whether the user's own model was in training mode when it was captured."""
    return _meta(pruned).get(_MODE) is True


def _meta(module: nn.Module) -> Mapping[str, Any]:
    meta = getattr(module, "meta", {})
    return meta if isinstance(meta, Mapping) else {}
