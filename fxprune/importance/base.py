"""What all criteria share: from numbers at the indices of member axes to one score a unit."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group, Member
from ..errors import ImportanceError

Scores = NDArray[np.float64]

PerUnit = tuple[Scores, NDArray[np.bool_]]
"""One number for each unit of a group, ``(size,)``, and which units a member holds at all."""

Measure = Callable[[Member, int], "PerUnit | None"]
"""Gives for a member of a group of so many units what it says of each; None if the criterion does not look
at this member."""

REDUCTIONS = ("sum", "mean", "max", "product")
NORMALIZERS = ("sum", "mean", "max", "standardize")


class Criterion(ABC):
    """What decides which units matter. An instance is given as ``importance=``."""

    @abstractmethod
    def prepare(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Callable[[Group], Scores]:
        """Measure what has to be measured; the result gives each group's scores, ``(group.size,)``.

        The result may read nothing of a group but its size and its members, so that it is good for every
        analysis of the same model.

        Args:
            graph: an analysis of ``model``.
            model: the model itself; it is left as it was found.
            seed: for everything random.

        Raises:
            ImportanceError: for what cannot be measured.
        """

    def __str__(self) -> str:
        """The criterion with those of its options that say something, as in Python."""
        shown = []
        options: Any = fields(self) if is_dataclass(self) else ()  # type: ignore[redundant-expr]
        for field in options:
            value = getattr(self, field.name)
            if field.name not in ("loss", "data", "forward") and value != field.default:
                text = getattr(value, "__name__", None) if callable(value) else None
                shown.append(
                    f"{field.name}={text or value!s}" if callable(value) else f"{field.name}={value!r}"
                )
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class MemberCriterion(Criterion):
    """A criterion that measures members, and joins those of a group.

    ``score(u) = normalize(reduce over the members m that hold u of s_m(u))``. Where a criterion gives a
    number for each parameter entry, ``s_m(u)`` is the sum over the entries of ``m`` that go with ``u``.

    Attributes:
        reduce: how the members of a group are joined: ``"sum"``, ``"mean"``, ``"max"`` or ``"product"``.
        normalize: what a group's scores ``s`` are divided by, so that groups can be compared: ``"sum"``,
            ``"mean"`` or ``"max"`` of them; ``"standardize"`` gives ``(s - mean) / standard deviation``
            (over the ``n`` units, ``n - 1`` in the denominator); a function of the scores; or None.
        members: which members count: ``"all"`` of the group; ``"root"``, the first one that the criterion
            measures, which is the axis that the group is named after; or a predicate on members,
            ``lambda member: member.tensor.dim() > 1`` say.
    """

    _: KW_ONLY
    reduce: str = "sum"
    normalize: str | Callable[[Scores], Any] | None = None
    members: Literal["all", "root"] | Callable[[Member], bool] = "all"

    def __post_init__(self) -> None:
        one_of("reduce", self.reduce, REDUCTIONS)
        if self.normalize is not None and not callable(self.normalize):
            one_of("normalize", self.normalize, NORMALIZERS, ", a function of the scores, or None")
        if not callable(self.members):
            one_of("members", self.members, ("all", "root"), ", or a predicate on members")

    @abstractmethod
    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """Go through weights or data once; the result is asked member by member."""

    def prepare(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Callable[[Group], Scores]:
        """See :meth:`Criterion.prepare`."""
        measure = self.measure(graph, model, seed)
        return lambda group: self.scored(group, self.joined(group, measure))

    def joined(self, group: Group, measure: Measure) -> PerUnit:
        """What the measured members of a group say together, and of which units they say it."""
        found = []
        for member in group.members:
            if callable(self.members) and not self.members(member):
                continue
            values = measure(member, group.size)
            if values is not None:
                found.append(values)
                if self.members == "root":
                    break
        return reduced(self.reduce, found, group.size)

    def scored(self, group: Group, found: PerUnit) -> Scores:
        """The scores; refuses a group of which not all units were measured."""
        values, held = found
        if not held.all():
            names = ", ".join(str(member.axis) for member in group.members[:4])
            what = f"only {held.sum()} of {held.size} units" if held.any() else "no unit"
            raise ImportanceError(
                f"{self} measures {what} of {group!r} (its members: {names}). Leave the group out with "
                f"where=, or choose a criterion that looks at all weights, such as 'l2'."
            )
        return normalized(self.normalize, self.finish(values))

    def finish(self, values: Scores) -> Scores:
        """What is still to be done with a group's values before they are normalised."""
        return values


def reduced(how: str, found: list[PerUnit], size: int) -> PerUnit:
    """Join the members of a group, unit by unit; a member counts where it holds the unit."""
    if not found:
        return np.zeros(size), np.zeros(size, dtype=bool)
    values = np.stack([value for value, _ in found])
    held = np.stack([mask for _, mask in found])
    count = held.sum(0)
    if how in ("sum", "mean"):
        total = np.where(held, values, 0.0).sum(0)
        result = total / np.maximum(count, 1) if how == "mean" else total
    elif how == "max":
        result = np.where(held, values, -np.inf).max(0)
    else:
        with np.errstate(over="ignore"):  # infinity is refused with the other scores
            result = np.where(held, values, 1.0).prod(0)
    return result, count > 0


def normalized(how: str | Callable[[Scores], Any] | None, scores: Scores) -> Scores:
    """A group's scores made comparable with those of other groups; zeros stay zeros."""
    if how is None:
        return scores
    if not isinstance(how, str):
        own: Scores = how(scores)
        return own
    if how == "standardize":
        deviation = scores.std(ddof=1) if scores.size > 1 else 0.0
        return (scores - scores.mean()) / deviation if deviation > 0 else np.zeros_like(scores)
    divisor = float(getattr(scores, how)())
    return scores / divisor if divisor else np.zeros_like(scores)


def one_of(field: str, value: Any, known: Iterable[str], otherwise: str = "") -> None:
    """Refuse a value that is none of ``known``; names the nearest."""
    if value in tuple(known):
        return
    close = difflib.get_close_matches(str(value), known, n=1)
    nearest = f" Did you mean {close[0]!r}?" if close else ""
    names = ", ".join(map(repr, known))
    raise ImportanceError(f"{field}={value!r} is unknown; use {names}{otherwise}.{nearest}")


class Entries:
    """The measure of criteria that give a number for each parameter entry.

    Args:
        entries: gives these numbers for a member, of the shape of its tensor; None if the tensor is not
            measured. Asked once for each axis.
    """

    def __init__(self, entries: Callable[[Member], torch.Tensor | None]) -> None:
        self.entries = entries
        self.sums: dict[Any, Scores | None] = {}

    def __call__(self, member: Member, size: int) -> PerUnit | None:
        """The sums over the entries that go with each unit."""
        if not measurable(member):
            return None
        key = (member.axis, member.over)
        if key not in self.sums:
            entries = self.entries(member)
            self.sums[key] = None if entries is None else axis_sums(entries, member)
        sums = self.sums[key]
        return None if sums is None else gathered(sums, member, size)


def gathered(values: Scores, member: Member, size: int) -> PerUnit:
    """Numbers at the indices of a member, shape as ``units``, added up by unit."""
    inside = member.units >= 0
    units = member.units[inside]
    total: Scores = np.bincount(units, weights=values[inside], minlength=size).astype(np.float64)
    return total, np.bincount(units, minlength=size) > 0


def measurable(member: Member) -> bool:
    """Whether a member is a parameter of real or complex numbers: no buffer, no table of integers."""
    return member.trainable and (member.tensor.is_floating_point() or member.tensor.is_complex())


def axis_sums(entries: torch.Tensor, member: Member) -> Scores:
    """``entries``, of the member's shape, summed over all dimensions but the member's; shape as ``units``."""
    kept = (*member.over, member.axis.dim)
    gone = [d for d in range(entries.dim()) if d not in kept]
    sums = entries.detach()
    sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
    if gone:
        sums = sums.sum(gone)
    order = sorted(kept)
    sums = sums.permute([order.index(d) for d in kept])
    return sums.to("cpu").to(torch.float64).numpy()


def slices(tensor: torch.Tensor, member: Member, size: int) -> list[tuple[NDArray[np.int64], torch.Tensor]]:
    """What a member holds of each unit, as rows of a matrix.

    Units that take up different numbers of indices (as none or one) cannot be compared with each other
    and come in separate matrices: ``(units (n,), rows (n, indices of a unit * entries at an index))``.
    """
    kept = (*member.over, member.axis.dim)
    rest = [d for d in range(tensor.dim()) if d not in kept]
    flat = (
        tensor.detach()
        .permute(*kept, *rest)
        .reshape(member.units.size, math.prod(tensor.shape[d] for d in rest))
    )
    units = member.units.reshape(-1)
    inside = np.flatnonzero(units >= 0)
    order = inside[np.argsort(units[inside], kind="stable")]
    counts = np.bincount(units[inside], minlength=size)
    found = []
    for count in np.unique(counts[counts > 0]).tolist():
        chosen = np.flatnonzero(counts == count)
        positions = order[np.isin(units[order], chosen)]
        rows = flat[torch.from_numpy(positions).to(flat.device)].reshape(chosen.size, -1)
        found.append((chosen, rows))
    return found
