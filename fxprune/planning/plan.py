"""The pruning plan: what goes, as data that can be printed, compared, edited and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PlanError

if TYPE_CHECKING:
    from torch import fx, nn

VERSION = 1


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) is int for item in value)


@dataclass(frozen=True)
class PruningPlan:
    """Which units of which groups are removed from one architecture.

    A plan holds names and numbers only: it pickles, compares with ``==`` and goes through JSON
    (:meth:`to_json`, :meth:`from_json`).

    Attributes:
        model: class name of the model.
        inputs: description of the example inputs (shapes, dtypes): ``{"args": [...], "kwargs": {...}}``.
        shapes: shape of every parameter and buffer: the architecture that the plan is for.
        sizes: number of units of every group, by the group's name.
        removed: positions of the units to remove, by the group's name; groups that stay are left out.
        held: names of graph nodes that could not be rewritten; nothing around them is narrowed.
        dissolved: functions that had to be traced into, as ``module.name``.
        notes: why nodes were held, for people.
        settings: how the plan was made (ratio, importance, seed); for the record only.
    """

    model: str
    inputs: Mapping[str, Any]
    shapes: Mapping[str, list[int]]
    sizes: Mapping[str, int]
    removed: Mapping[str, list[int]]
    held: tuple[str, ...] = ()
    dissolved: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> fx.GraphModule:
        """A narrowed copy of ``model``, which may be any copy of the architecture that the plan is for.

        Raises:
            PlanError: if the model is of another architecture; names the first difference.
        """
        from ..api import apply

        return apply(self, model)

    def validate(self) -> None:
        """Check that the fields are what they should be.

        Raises:
            PlanError: names the field and what is wrong with it.
        """
        for name in ("inputs", "shapes", "sizes", "removed", "settings"):
            if not isinstance(getattr(self, name), Mapping):
                raise PlanError(f"the plan's {name!r} must map names to values, got {getattr(self, name)!r}.")
        for name, shape in self.shapes.items():
            if not _whole_numbers(shape):
                raise PlanError(f"the plan's shape of {name!r} must be a list of sizes, got {shape!r}.")
        for group, gone in self.removed.items():
            size = self.sizes.get(group)
            if type(size) is not int:
                raise PlanError(f"the plan removes units of {group!r}, a group of which it knows no size.")
            if not _whole_numbers(gone):
                raise PlanError(
                    f"the plan's units of {group!r} must be a list of whole numbers, got {gone!r}."
                )
            wrong = [unit for unit in gone if not 0 <= unit < size]
            if wrong:
                raise PlanError(
                    f"the plan names units {wrong} of the group {group!r}, which has {size} units."
                )
            if len(set(gone)) == size:
                raise PlanError(
                    f"the plan removes every unit of the group {group!r}; at least one must stay."
                )

    def __repr__(self) -> str:
        gone = sum(len(units) for units in self.removed.values())
        return (
            f"PruningPlan({self.model}: removes {gone} of {sum(self.sizes.values())} units in "
            f"{len(self.removed)} of {len(self.sizes)} groups)"
        )

    def __str__(self) -> str:
        width = max((len(name) for name in self.sizes), default=0)
        lines = [repr(self)]
        for name, size in self.sizes.items():
            gone = len(self.removed.get(name, ()))
            lines.append(f"  {name:<{width}}  {size:>6} -> {size - gone:>6}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as a JSON text; equal plans give equal texts."""
        return json.dumps({"fxprune_plan": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: if the text is no such plan.
        """
        try:
            data = json.loads(text)
            if data.pop("fxprune_plan") != VERSION:
                raise PlanError(f"this plan has another version than {VERSION}, which fxprune reads.")
            sequences = {name: tuple(data[name]) for name in ("held", "dissolved", "notes")}
            plan = PruningPlan(**{**data, **sequences})
            plan.validate()
            return plan
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is no pruning plan: {type(error).__name__}: {error}") from error
