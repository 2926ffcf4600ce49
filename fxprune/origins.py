"""What a pruned network knows about how it was made: in its ``meta``, which copies and pickles keep."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .files import few
from .planning.plan import PruningPlan

__all__ = ["config_before", "keep_config", "made_in_training", "plans_of", "remember", "reshaped"]

_CONFIG = "fxprune_config"
_LAST, _ALL, _MODE, _SHAPES = "fxprune", "fxprune_plans", "fxprune_training", "fxprune_shapes"


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
            _SHAPES: {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters()},
        }


def plans_of(pruned: nn.Module) -> tuple[PruningPlan, ...]:
    """The plans that made ``pruned`` of the user's own model, in order; none for what fxprune has not
    made.
    """
    found = _meta(pruned).get(_ALL, ())
    return tuple(plan for plan in found if isinstance(plan, PruningPlan))


def reshaped(pruned: nn.Module) -> str:
    """How the parameters of ``pruned`` differ from those that it was made with, for people; empty if not."""
    then: Mapping[str, tuple[int, ...]] = _meta(pruned).get(_SHAPES, {})
    if not then:
        return ""
    now = {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters()}
    differ = (
        ([f"{n} {now[n]} (was {s})" for n, s in then.items() if n in now and now[n] != s], "other shapes"),
        ([name for name in now if name not in then], "no place in what the plan gives"),
        ([name for name in then if name not in now], "gone"),
    )
    return "; ".join(
        f"{few(names)} {'are' if what == 'gone' else 'have'} {what}" for names, what in differ if names
    )


def keep_config(pruned: nn.Module, config: Any) -> None:
    """Note in ``pruned`` the configuration that its class was built from, where its own has changed.

    One that is known already stays.
    """
    meta = getattr(pruned, "meta", {})
    if isinstance(meta, dict) and _CONFIG not in meta:
        pruned.meta = {**meta, _CONFIG: copy.deepcopy(config)}  # type: ignore[assignment]


def config_before(pruned: nn.Module) -> Any:
    """The configuration that the original of ``pruned`` was built from."""
    return _meta(pruned).get(_CONFIG, getattr(pruned, "config", None))


def made_in_training(pruned: nn.Module) -> bool:
    """Whether the user's own model was in training mode when it was captured."""
    return _meta(pruned).get(_MODE) is True


def _meta(module: nn.Module) -> Mapping[str, Any]:
    meta = getattr(module, "meta", {})
    return meta if isinstance(meta, Mapping) else {}
