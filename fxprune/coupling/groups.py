"""What a plan decides on: groups of units, their members, and rows of units that go as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .products import Cells
from .roles import Role, Use
from .units import Axis, Event, Ids, Rectangle

Mask = NDArray[np.bool_]

BalancedSet = tuple[Ids, ...]
"""Atoms (arrays of classes) that take up equally many columns, and lose the same share of their units."""


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter or buffer, some of whose indices belong to the units of a group.

    Attributes:
        axis: name of the tensor and dimension.
        tensor: the tensor itself.
        over: dimensions of the tensor that choose the row of ``units``.
        units: position within ``group.units`` for each index, -1 where the index belongs to none;
            ``(*sizes of over, size of the axis)``.
        trainable: a parameter, not a buffer.
        masked: the masked original holds zeros at removed indices; not in buffers, nor where a weight
            norm divides by the size of what is removed.
        uses: the products that sum over this axis, or make channels by it; see :class:`~.roles.Use`.
    """

    axis: Axis
    tensor: torch.Tensor
    over: tuple[int, ...]
    units: Ids
    trainable: bool
    masked: bool
    uses: tuple[Use, ...] = ()

    @property
    def producing(self) -> tuple[Use, ...]:
        """The products that make the group's channels by this axis."""
        return tuple(use for use in self.uses if use.role == "produces")

    @property
    def consuming(self) -> tuple[Use, ...]:
        """The products that read the group's channels by this axis; where, see :class:`~.roles.Use`."""
        return tuple(use for use in self.uses if use.role == "consumes")

    @property
    def roles(self) -> frozenset[Role]:
        """What the axis does for the group's channels; a tensor that is used twice may do both.

        An axis of no product *follows*: biases, norms, scales, embeddings of positions.
        """
        return frozenset(use.role for use in self.uses) or frozenset(["follows"])

    def __repr__(self) -> str:
        shape = tuple(self.tensor.shape)
        return (
            f"Member({self.axis}, shape={shape}, {int((self.units >= 0).sum())} of {self.units.size} indices)"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Units that live and die with the same members.

    Attributes:
        name: the first axis of the group, as ``parameter[dim]``; the same in every run. Further groups
            with the same first axis are ``parameter[dim]:2``, ``:3``, ...
        units: unit numbers, in the order in which they appear on the first axis, ``(size,)``.
        balance: balanced sets; each is a tuple of rows, each row an array of positions in ``units``.
            Every row of a set loses the same share of its units (rows differ in size where a unit takes
            up several columns, as with a rotary table).
        exact: no normalisation or reduction runs over the group's axes, so that the pruned network
            equals the masked one.
        inexact_because: what makes it inexact, with the node; empty if exact.
        multiple: the units that are left are a multiple of this, which an operator asks for.
    """

    name: str
    units: Ids
    balance: tuple[tuple[Ids, ...], ...]
    exact: bool
    inexact_because: str
    multiple: int
    _build: Any = field(repr=False)
    _find_rows: Callable[[], tuple[RowSet, ...]] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.units.size)

    @cached_property
    def rows(self) -> tuple[Ids, ...]:
        """Positions in ``units`` of each row (attention head, convolution group) that can go as a whole.

        A row that lies in several groups goes from all of them or from none: see :class:`RowSet`.
        """
        return tuple(row[self.name] for rows in self._find_rows() for row in rows.rows if self.name in row)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Axes of parameters and buffers that are narrowed with this group, in state-dict order."""
        members: tuple[Member, ...] = self._build(self)
        return members

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that make the group's channels: output axes of weights, features of embeddings."""
        return tuple(member for member in self.members if "produces" in member.roles)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read them: input axes of weights. ``member.consuming`` says at which nodes::

        for member in group.consumers:
            for use in member.consuming:
                print(member.axis, use.at, use.source, use.input)
        """
        return tuple(member for member in self.members if "consumes" in member.roles)

    def __len__(self) -> int:
        return self.size

    def _repr_html_(self) -> str:
        from ..pages import group_html

        return group_html(self)

    def __repr__(self) -> str:
        rows = len(self.rows) or sum(len(rows) for rows in self.balance)
        shape = f"{self.size} units" + (f" in {rows} rows" if rows > 1 else "")
        kind = "exact" if self.exact else f"inexact: {self.inexact_because}"
        return f"Group({self.name}: {shape}, {len(self.members)} members, {kind})"


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows that can be removed as a whole, one by one: the heads of an attention, groups of a convolution.

    A row goes when all of its units go, from all of its groups. Axes that are indexed by row alone (a bias
    for each head) follow.

    Attributes:
        rows: for each row its units, as positions by the name of the group.
        total: number of rows, with those that have to stay.
        together: sets of rows (as positions in ``rows``), of each of which one at least has to stay.
        classes: for each row every class that dies with it.
        members: axes indexed by row alone; ``units`` are positions in ``rows``.
    """

    rows: tuple[Mapping[str, Ids], ...]
    total: int
    together: tuple[Ids, ...]
    classes: tuple[Ids, ...]
    members: tuple[Member, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that the rows have units in."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"RowSet({len(self)} of {self.total} rows can go from {', '.join(self.groups)})"


@dataclass(frozen=True)
class Grouping:
    """The groups of a network, and what the axes are made of.

    Attributes:
        groups: in the order of their first axis.
        roots: class of each unit number.
        prunable: whether a class belongs to a group, by class.
        events: why classes are frozen, in order of discovery.
        rectangles: those whose rows do not live and die as one.
        cells: classes that go with others, row or column.
    """

    groups: tuple[Group, ...]
    roots: Ids
    prunable: Mask
    events: tuple[Event, ...]
    rectangles: tuple[Rectangle, ...]
    cells: Cells
    _find_rows: Callable[[], tuple[tuple[RowSet, ...], tuple[Event, ...]]] = field(repr=False)

    @property
    def rows(self) -> tuple[RowSet, ...]:
        """Rows that can be removed, structure by structure."""
        return self._find_rows()[0]

    @property
    def row_events(self) -> tuple[Event, ...]:
        """Why other rows cannot."""
        return self._find_rows()[1]
