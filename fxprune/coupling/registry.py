"""The registry of operator rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RuleError
from .coupler import Coupler

Apply = Callable[[Coupler, tuple[Any, ...], dict[str, Any], Any], None]


@dataclass(frozen=True)
class Rule:
    """How one operator couples dimensions.

    Attributes:
        operator: name of the operator, ``aten.convolution`` or ``aten.view.default``.
        family: the file that it stands in.
        apply: the rule itself.
        site: ``file:line`` of the registration.
    """

    operator: str
    family: str
    apply: Apply
    site: str


_RULES: dict[str, Rule] = {}
_FOUND: dict[Any, Rule | None] = {}


def rule(*operators: str) -> Callable[[Apply], Apply]:
    """Register the decorated function for ATen operators by name (``"mm"``, ``"max.dim"``).

    A name without an overload stands for all overloads that have no rule of their own.

    Raises:
        RuleError: where a name has a rule already; names both places.
    """

    def register(apply: Apply) -> Apply:
        code = inspect.unwrap(apply).__code__
        site = f"{code.co_filename}:{code.co_firstlineno}"
        for operator in operators:
            name = f"aten.{operator}"
            if name in _RULES:
                raise RuleError(f"{name} has two rules: {_RULES[name].site} and {site}. Remove one.")
            _RULES[name] = Rule(name, apply.__module__.rpartition(".")[2], apply, site)
        return apply

    return register


def rule_for(operator: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator: its overload's, its own, the pointwise one, or None."""
    try:
        return _FOUND[operator]
    except KeyError:
        pass
    found = _lookup(operator)
    name = operator._schema.name.partition("::")[2]
    if found is None and name.endswith("_"):  # the in-place form of an operator
        overload = getattr(getattr(torch.ops.aten, name[:-1], None), operator._overloadname, None)
        found = _lookup(overload) if overload is not None else _RULES.get(f"aten.{name[:-1]}")
    _FOUND[operator] = found
    return found


def _lookup(operator: torch._ops.OpOverload) -> Rule | None:
    full = str(operator)
    found = _RULES.get(full) or _RULES.get(full.rpartition(".")[0])
    if found is None and torch.Tag.pointwise in operator.tags:
        found = _RULES["aten.<pointwise>"]
    return found


def registered() -> dict[str, Rule]:
    """All rules by operator name, sorted."""
    return dict(sorted(_RULES.items()))
