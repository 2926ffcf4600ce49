"""Plans as text: a JSON object with one entry in a line, and positions as ranges (``"0-3, 7"``).

Whoever sends a plan file decides about every byte of it, so that reading one is bounded: by the length of the
text, by the positions that its ranges stand for, and by the sizes that tensors may have.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import PlanError

if TYPE_CHECKING:
    from .plan import PruningPlan

__all__ = ["MOST_BYTES", "read", "write"]

VERSION = 2
_READS = (1, 2)  # version 1 had lists of positions only

MOST_BYTES = 1 << 28
"""Length of a plan file from which on it is not read; the plan of a network of 70 B parameters has a few
MB."""
_MOST_POSITIONS, _FEW_POSITIONS, _POSITIONS_PER_BYTE = 1 << 23, 1 << 20, 1 << 7
"""What the ranges of a plan may stand for: in all, in any text, and for each byte of a long one. Half of the
feed-forward units of a network of 400 B parameters are 3 M positions, 50 for each byte of its plan."""
_MOST_ENTRIES, _MOST_INPUT_ENTRIES = 1 << 40, 1 << 30
"""Of one tensor; of an example input, which the analysis may have to make."""

_LINES = ("shapes", "sizes", "removed")
"""Fields with an entry in a line."""
_NEEDED = ("model", "inputs", "shapes", "sizes", "removed", "held", "dissolved", "notes")
"""Fields without which a text is no plan; the others came later."""
_TEXTS = ("held", "dissolved", "notes", "free_outputs", "fill_outputs", "branches")
"""Fields that are lists of texts."""
_WHERE_ANY = ("branches", "costs", "config")
"""Fields that are only written where there is something in them."""


def write(plan: PruningPlan) -> str:
    """See :meth:`PruningPlan.to_json`."""
    parts = [f'"fxprune_plan": {VERSION}']
    for item in fields(plan):
        value = getattr(plan, item.name)
        if item.name in _WHERE_ANY and not value:
            continue
        if item.name == "removed":
            value = {name: _ranges(units) for name, units in value.items()}
        if item.name in _LINES and value:
            lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f'"{item.name}": {{\n' + ",\n".join(lines) + "\n }")
        else:
            parts.append(f'"{item.name}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(parts) + "\n}"


def read(text: str) -> PruningPlan:
    """See :meth:`PruningPlan.from_json`."""
    from .plan import PruningPlan

    if len(text) > MOST_BYTES:
        raise PlanError(f"this is no pruning plan: it is longer than {MOST_BYTES:,} characters.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"this is no pruning plan: {type(error).__name__}: {_short(str(error))}") from error
    if not isinstance(data, dict) or "fxprune_plan" not in data:
        raise PlanError(
            "this is no pruning plan: a plan is a JSON object with the key 'fxprune_plan', as plan.save "
            "writes"
        )
    version = data.pop("fxprune_plan")
    if version not in _READS:
        raise PlanError(
            f"this plan has version {_short(repr(version))}, and this fxprune reads "
            f"{' and '.join(map(str, _READS))}: install the fxprune that wrote it, or plan again."
        )
    known = {item.name: item for item in fields(PruningPlan)}
    unknown = [name for name in data if name not in known]
    if unknown:
        raise PlanError(f"this is no pruning plan: it has no field {_short(repr(unknown[0]))}.")
    missing = [name for name in _NEEDED if name not in data]
    if missing:
        raise PlanError(f"this is no pruning plan: it has no field {missing[0]!r}.")
    for name in _TEXTS:
        value = data.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise PlanError(f"the plan's {name!r} must be a list of texts, got {_short(repr(value))}.")
        if name in data:
            data[name] = tuple(value)
    if isinstance(data.get("removed"), dict):
        data["removed"] = _positions(data["removed"], data.get("sizes"), len(text))
    plan = PruningPlan(**data)
    plan.validate()
    return plan


def _ranges(units: Iterable[int]) -> str | list[int]:
    """``"0-3, 7"`` for 0, 1, 2, 3, 7; positions in another order than the ascending one as they are."""
    listed = list(units)
    if any(a >= b for a, b in itertools.pairwise(listed)):
        return listed
    words: list[str] = []
    for _, run in itertools.groupby(enumerate(listed), lambda item: item[1] - item[0]):
        found = [unit for _, unit in run]
        words.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ", ".join(words)


_WORD = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")


def _positions(removed: Mapping[str, Any], sizes: Any, length: int) -> dict[str, Any]:
    """``removed`` with lists in place of ranges.

    Raises:
        PlanError: for what is no range, or stands for more positions than the group has.
    """
    left = min(_MOST_POSITIONS, max(_FEW_POSITIONS, _POSITIONS_PER_BYTE * length))
    found: dict[str, Any] = {}
    for group, text in removed.items():
        if not isinstance(text, str):
            found[group] = text  # which ``validate`` looks at
            continue
        size = sizes.get(group) if isinstance(sizes, dict) else None
        units: list[int] = []
        for word in filter(None, (part.strip() for part in text.split(","))):
            match = _WORD.fullmatch(word)
            if match is None:
                raise PlanError(
                    f"the plan's units of {group!r} must be a list of whole numbers or ranges such as "
                    f"'0-3, 7', got {_short(repr(word))}."
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if type(size) is int and last >= size:
                raise PlanError(f"the plan names unit {last} of the group {group!r}, which has {size} units.")
            left -= last - first + 1
            if left < 0 or last < first:
                raise PlanError(f"the plan's units of {group!r} are no list of units: {_short(repr(word))}.")
            units += range(first, last + 1)
        found[group] = units
    return found


def check_sizes(plan: PruningPlan) -> None:
    """See :meth:`PruningPlan.validate`: the numbers that nothing else looks at."""
    from ..inputs import restore_inputs

    for name, shape in plan.shapes.items():
        if not _fits(shape, _MOST_ENTRIES):
            raise PlanError(f"the plan's shape of {name!r} is that of no tensor: {_short(repr(shape))}.")
    for name, size in plan.sizes.items():
        if type(size) is not int or not 0 < size <= _MOST_ENTRIES:
            raise PlanError(
                f"the plan's size of the group {name!r} is no number of units: {_short(repr(size))}."
            )
    try:
        for inputs in (plan.inputs, *(region["inputs"] for region in plan.regions.values())):
            _check_tensors(inputs)
            restore_inputs(inputs)
    except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise PlanError(
            f"the plan's description of the example inputs is malformed: {_short(str(error))}"
        ) from error


def _fits(shape: Iterable[Any], most: int) -> bool:
    """Whether a shape is one, with at most so many entries; no product becomes longer than that."""
    entries = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= most:
            return False
        entries *= size
        if entries > most:
            return False
    return True


def _check_tensors(tree: Any) -> None:
    if isinstance(tree, Mapping):
        shape = tree.get("tensor")
        if shape is not None and (
            not isinstance(shape, (list, tuple)) or not _fits(shape, _MOST_INPUT_ENTRIES)
        ):
            raise PlanError(f"the plan's example inputs hold no tensor of the shape {_short(repr(shape))}.")
    items = tree.values() if isinstance(tree, Mapping) else tree
    for item in items:
        if isinstance(item, (Mapping, list, tuple)):
            _check_tensors(item)


def _short(text: str) -> str:
    line = text.splitlines()[0] if text else text
    return line if len(line) <= 80 else f"{line[:80]} ..."
