"""How two plans differ, and how two architectures do: as data, and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..repeats import joined, starred

if TYPE_CHECKING:
    from .plan import PruningPlan

__all__ = ["Change", "PlanDiff", "architectures", "diff"]

_MOST = 8
"""Differences that an error names."""


@dataclass(frozen=True)
class Change:
    """What two plans do to one group.

    Attributes:
        group: the group's name.
        sizes: number of its units in each plan; None where the plan has no such group.
        only_first: positions that only the first plan removes, ascending.
        only_second: positions that only the second plan removes, ascending.
    """

    group: str
    sizes: tuple[int | None, int | None]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]


@dataclass(frozen=True)
class PlanDiff:
    """Made by :meth:`PruningPlan.diff`; true if there is any difference; ``str()`` of it is meant to be read.

    Attributes:
        architectures: where the networks differ that the plans are for, for people; alike ones are joined.
        changes: groups of which the plans remove different units, or that only one of them has.
        others: fields in which the plans differ otherwise, with both values; of settings, each by itself.
    """

    architectures: tuple[str, ...]
    changes: tuple[Change, ...]
    others: Mapping[str, tuple[Any, Any]]

    def __bool__(self) -> bool:
        return bool(self.architectures or self.changes or self.others)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        lines = [f"architecture: {line}" for line in self.architectures]
        alike: dict[Any, list[Change]] = {}
        for change in self.changes:
            counts = len(change.only_first), len(change.only_second)
            alike.setdefault((starred(change.group), change.sizes, counts), []).append(change)
        for (_, sizes, (first, second)), same in alike.items():
            name = joined([change.group for change in same])
            if None in sizes:
                lines.append(f"{name}: only the {'second' if sizes[0] is None else 'first'} plan has it")
            elif sizes[0] != sizes[1]:
                lines.append(f"{name}: {sizes[0]} and {sizes[1]} units")
            else:
                lines.append(
                    f"{name}: {first} of {sizes[0]} units go by the first plan only, {second} by the "
                    "second only"
                )
        lines += [f"{name}: {_short(one)} and {_short(other)}" for name, (one, other) in self.others.items()]
        return "\n".join(lines)


def diff(first: PruningPlan, second: PruningPlan) -> PlanDiff:
    """See :meth:`PruningPlan.diff`."""
    changes = []
    for group in dict.fromkeys([*first.sizes, *second.sizes]):
        sizes = first.sizes.get(group), second.sizes.get(group)
        ones, others = set(first.removed.get(group, ())), set(second.removed.get(group, ()))
        if sizes[0] != sizes[1] or ones != others:
            changes.append(Change(group, sizes, tuple(sorted(ones - others)), tuple(sorted(others - ones))))
    rest: dict[str, tuple[Any, Any]] = {}
    for item in fields(first):
        one, other = getattr(first, item.name), getattr(second, item.name)
        if item.name in ("shapes", "sizes", "removed", "costs") or one == other:
            continue
        if item.name == "settings":
            for key in dict.fromkeys([*one, *other]):
                if one.get(key) != other.get(key):
                    rest[f"settings {key}"] = one.get(key), other.get(key)
        else:
            rest[item.name] = one, other
    names = "the first plan's", "the second's"
    return PlanDiff(architectures(first.shapes, second.shapes, *names), tuple(changes), rest)


def architectures(
    had: Mapping[str, Sequence[int]], has: Mapping[str, Sequence[int]], first: str, second: str
) -> tuple[str, ...]:
    """Where two networks differ, by the shapes of their tensors: a sentence for each, alike ones joined."""
    alike: dict[Any, list[str]] = {}
    for name in dict.fromkeys([*had, *has]):
        one, other = had.get(name), has.get(name)
        if one is None or other is None or list(one) != list(other):
            shapes = tuple(None if shape is None else tuple(shape) for shape in (one, other))
            alike.setdefault((starred(name), shapes), []).append(name)
    lines = []
    for (_, shapes), names in alike.items():
        said = ["no such tensor" if shape is None else f"shape {shape}" for shape in shapes]
        lines.append(f"for {joined(names)!r} {first} has {said[0]}, {second} has {said[1]}")
    return tuple(lines)


def listed(lines: Sequence[str]) -> str:
    """The first few of these sentences in one, and how many more there are."""
    more = f"; and {len(lines) - _MOST} more differences" if len(lines) > _MOST else ""
    return "; ".join(lines[:_MOST]) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]} ..."
