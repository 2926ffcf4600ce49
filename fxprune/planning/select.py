"""Selection: from scores to the units that go.

What may go is cut into *steps*. A step takes the same share from every row of one balanced set, the
lowest-scored units of each row; steps of a set come in a fixed order, lowest first. A *scope* is a number
of sets that are ranked together: its steps are ordered by score, and it loses those at the front. Every
way to select is a choice of scopes and of where to stop:

- per group, every set is a scope of its own; global, all are one; isomorphic, one a kind of structure;
- a ratio stops each scope at that share of its units, a budget stops all scopes at the same share, the
  first that costs no more than the budget allows.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..coupling.units import Ids
from .budget import Search, equal_steps
from .cost_model import CostModel
from .latency import Meter
from .patterns import Names, Pattern, spelled
from .selection import Selection
from .whole_rows import select_rows, without_rows

_EPS = 1e-9


@dataclass(frozen=True)
class Selected:
    """Outcome of a selection.

    Attributes:
        removed: positions of the units that go, by the group's name.
        notes: what could not be had as asked, for people.
        left: what is left, by the budget's metrics; empty without a budget.
    """

    removed: dict[str, list[int]]
    notes: tuple[str, ...] = ()
    left: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Set:
    """A balanced set that may be narrowed.

    Attributes:
        group: whose set it is.
        rows: positions in the group, one array a row.
        parts: number of equal shares into which the rows can be cut.
        levels: ``(steps,)`` how many parts are gone after each step, ascending.
        rounded: whether the steps are longer than one part.
        scope: sets with the same one are ranked together.
        ratio: share of units that the scope loses; None if a budget decides.
    """

    group: Group
    rows: tuple[Ids, ...]
    parts: int
    levels: Ids
    rounded: bool
    scope: Hashable
    ratio: float | None

    @property
    def units(self) -> int:
        return sum(row.size for row in self.rows)

    def ranked(self, scores: NDArray[np.float64]) -> list[Ids]:
        """Each row's positions, lowest score first; ties go by position."""
        sizes = {row.size for row in self.rows}
        if len(sizes) == 1:
            grid = np.stack(self.rows)
            return list(np.take_along_axis(grid, np.argsort(scores[grid], axis=1, kind="stable"), axis=1))
        return [row[np.argsort(scores[row], kind="stable")] for row in self.rows]

    def steps(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean score of the units that each step takes, ``(steps,)``; it never falls."""
        part = np.zeros(self.parts)
        for row in self.ranked(scores):
            part += scores[row].reshape(self.parts, -1).sum(axis=1)
        ends = np.concatenate([[0], self.levels])
        sums = np.concatenate([[0.0], np.cumsum(part)])[ends]
        means = np.diff(sums) / (np.diff(ends) * (self.units // self.parts))
        lowest: NDArray[np.float64] = np.maximum.accumulate(means)
        return lowest

    def taken(self, ranked: Iterable[Ids], start: int, stop: int) -> Ids:
        """Positions that go with the parts from ``start`` to ``stop``."""
        return np.concatenate(
            [row[start * (row.size // self.parts) : stop * (row.size // self.parts)] for row in ranked]
        )


def select(
    graph: CouplingGraph,
    selection: Selection,
    scores: Callable[[Group], NDArray[np.float64]],
    model: nn.Module,
    meter: Meter | None = None,
    ties: Iterable[Sequence[str]] = (),
) -> Selected:
    """The units to remove from each group.

    Every row keeps at least one unit, and the rows of a balanced set lose the same share. Ties are broken
    by position, so that the same scores always give the same units. A budget for the latency needs the
    ``meter``. The dimensions of nodes in one of the ``ties`` (``"view_3[2]"``) lose the same share each.

    Raises:
        SelectionError: for a pattern that matches nothing in the model.
        BudgetError: if the budget cannot be met.
    """
    known: dict[str, NDArray[np.float64]] = {}

    def values(group: Group) -> NDArray[np.float64]:
        if group.name not in known:
            known[group.name] = np.asarray(scores(group), dtype=np.float64)
        return known[group.name]

    rows: dict[str, list[int]] = {}
    few: list[str] = []
    if selection.heads:
        rows = select_rows(graph, selection.heads, _allowed(graph, selection, model), values)
        if not rows:
            most = max((found.total for found in graph.rows), default=0)
            few.append(
                f"heads = {selection.heads:g} takes nothing: "
                + (
                    f"it is less than one of the rows of each set (the largest has {most}), or they are kept"
                    if most
                    else "no attention heads or groups of channels can go as a whole (graph.rows is empty)"
                )
            )
    sets, notes = _sets(graph, selection, model, rows)
    together = _together(_tied(graph, sets, ties), _repeating(sets) if selection.uniform else [])
    order = _order(sets, values)
    steps = _by_ratio(sets, order)
    left: Mapping[str, float] = {}
    if selection.budget is not None:
        costs = CostModel(graph)
        gone = ~graph.alive(rows)
        search = _search(costs, sets, steps, order, values, gone, meter, together)
        chosen, left = search.run(selection.budget)
        notes = (*notes, *search.notes)
        steps = steps + chosen
    steps = equal_steps(together, steps)
    removed: dict[str, list[int]] = defaultdict(list, rows)
    for number, own in enumerate(sets):
        if steps[number]:
            ranked = own.ranked(values(own.group))
            removed[own.group.name] += own.taken(ranked, 0, int(own.levels[steps[number] - 1])).tolist()
    in_order = {g.name: sorted(removed[g.name]) for g in graph.groups if g.name in removed}
    return Selected(in_order, (*notes, *few), left)


def _allowed(graph: CouplingGraph, selection: Selection, model: nn.Module) -> Callable[[Group], bool]:
    """Whether rows of a group may go as a whole."""
    kept: set[str] = set()
    if selection.kept:
        names = Names(model, graph)
        kept.update(*(names.groups(pattern, "keep") for pattern in selection.kept))
    where = selection.where
    return lambda group: group.name not in kept and (where is None or bool(where(group)))


class _Assigned:
    """What the patterns of a selection say of single groups.

    Attributes:
        shares: by name of the group its scope and its ratio, where a pattern means it; the last counts.
        multiples: by name of the group what its rows are rounded to, where a pattern means it.
        notes: where two patterns mean one group, for people.
    """

    def __init__(self, graph: CouplingGraph, selection: Selection, model: nn.Module) -> None:
        self.shares: dict[str, tuple[Hashable, float | None]] = {}
        self.multiples: dict[str, int] = {}
        self.notes: list[str] = []
        if not selection.patterned:
            return
        names = Names(model, graph)
        self._scopes(names, selection.scopes)
        self._ratios(names, selection.ratios)
        for pattern in selection.kept:
            for meant in names.groups(pattern, "keep"):
                self.shares[meant] = ("own", meant), 0.0
        if isinstance(selection.round_to, Mapping):
            for pattern, number in selection.round_to.items():
                self.multiples |= dict.fromkeys(names.groups(pattern, "round_to"), number)

    def _scopes(self, names: Names, scopes: Mapping[Pattern | tuple[Pattern, ...], float]) -> None:
        for place, (patterns, share) in enumerate(scopes.items()):
            own = ("scope", place)
            for pattern in patterns if isinstance(patterns, tuple) else (patterns,):
                for meant in sorted(names.narrowed(pattern, "scopes", share)):
                    if self.shares.get(meant, (own, share))[0] != own:
                        self.notes.append(f"{meant} is in two scopes; the latter counts, {spelled(patterns)}")
                    self.shares[meant] = own, share

    def _ratios(self, names: Names, ratios: Mapping[Pattern, float]) -> None:
        by: dict[str, Pattern] = {}
        for pattern, share in ratios.items():
            for meant in sorted(names.narrowed(pattern, "ratios", share)):
                if meant in by and self.shares[meant][1] != share:
                    self.notes.append(
                        f"the ratios of {spelled(by[meant])} and {spelled(pattern)} both apply to {meant}; "
                        f"the latter counts, {share:g}"
                    )
                by[meant] = pattern
                self.shares[meant] = ("own", meant), share


def _sets(
    graph: CouplingGraph, selection: Selection, model: nn.Module, gone: Mapping[str, list[int]]
) -> tuple[list[_Set], tuple[str, ...]]:
    """The balanced sets that may be narrowed, each with its scope and its steps; rows are ``gone`` before."""
    assigned = _Assigned(graph, selection, model)
    single = selection.round_to if isinstance(selection.round_to, int) else 1
    kinds = _kinds(graph, model) if selection.scope == "isomorphic" else {}
    sets: list[_Set] = []
    for group in graph.groups:
        if selection.where is not None and not selection.where(group):
            continue
        common = "scope", kinds.get(group.name, "all")
        scope, ratio = assigned.shares.get(group.name, (common, selection.ratio))
        if ratio == 0:
            continue
        if (group.name not in assigned.shares and selection.scope == "local") or scope == ("own", group.name):
            scope = None  # each set is one of its own
        number = math.lcm(assigned.multiples.get(group.name, single), group.multiple)
        for place, rows in enumerate(without_rows(group, gone.get(group.name, ())).balance):
            parts = math.gcd(*(row.size for row in rows))
            levels = _levels(rows, parts, number, selection.max_ratio)
            if not levels.size and number > 1 and parts > 1:
                assigned.notes.append(
                    f"{group.name} stays whole: its rows of {', '.join(sorted({str(r.size) for r in rows}))} "
                    f"units cannot be narrowed to a multiple of {number}"
                )
            own = ("own", group.name, place) if scope is None else scope
            sets.append(_Set(group, rows, parts, levels, number > 1, own, ratio))
    return sets, tuple(assigned.notes)


def _levels(rows: tuple[Ids, ...], parts: int, multiple: int, max_ratio: float) -> Ids:
    """Numbers of parts that may be gone: one stays, and what stays is a multiple.

    Of each row where the rows are at least as long as the multiple; else of all rows together.
    """
    gone = np.arange(1, min(parts - 1, int(max_ratio * parts + _EPS)) + 1, dtype=np.int64)
    if multiple > 1:
        sizes = np.array([row.size for row in rows]) // parts
        widths = sizes if sizes.min() * parts >= multiple else np.array([sizes.sum()])
        gone = gone[((parts - gone)[:, None] * widths % multiple == 0).all(axis=1)]
    return gone


def repeated(group: Group) -> Hashable:
    """The same for groups of layers that repeat: their members' names but for numbers."""
    return tuple(sorted((re.sub(r"\d+", "*", m.axis.name), m.axis.dim) for m in group.members))


def _repeating(sets: list[_Set]) -> list[list[int]]:
    """Numbers of the sets of layers that repeat, kind by kind."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for number, own in enumerate(sets):
        sizes = tuple(sorted(row.size for row in own.rows))
        alike[repeated(own.group), sizes, own.levels.tobytes()].append(number)
    return list(alike.values())


def _together(*kinds: Iterable[list[int]]) -> list[list[int]]:
    """Numbers of the sets that lose equally many steps, for one reason or several in a chain."""
    several = [numbers for numbers in itertools.chain(*kinds) if len(numbers) > 1]
    if not several:
        return []
    import networkx as nx  # which takes long to import, and most plans need not

    found = nx.Graph()
    for numbers in several:
        nx.add_path(found, numbers)
    return [sorted(numbers) for numbers in nx.connected_components(found)]


def _tied(graph: CouplingGraph, sets: list[_Set], ties: Iterable[Sequence[str]]) -> list[list[int]]:
    """Numbers of the sets that have to lose the same share; they are cut into steps of the same shares."""
    found = []
    for tie in ties:
        classes = np.unique(np.concatenate([graph.along(name) for name in tie]))
        found.append([n for n, s in enumerate(sets) if np.isin(s.group.units[s.rows[0]], classes).any()])
    together = _together(found)
    for numbers in together:
        common = math.gcd(*(sets[n].parts for n in numbers))
        shares = set(range(1, common))
        for n in numbers:
            each = sets[n].parts // common
            shares &= {level // each for level in sets[n].levels.tolist() if level % each == 0}
            sets[n].parts = common
        for n in numbers:
            sets[n].levels = np.array(sorted(shares), dtype=np.int64)
    return together


def _kinds(graph: CouplingGraph, model: nn.Module) -> dict[str, Hashable]:
    """For each group the kind of its structure: the layers, axes and kernels that it is made of.

    Two groups are isomorphic if they couple the same axes of the same kinds of layers, whatever their
    widths (Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024,
    https://arxiv.org/abs/2407.04616).
    """
    modules = dict(model.named_modules())
    kinds: dict[str, Hashable] = {}
    for group in graph.groups:
        members = []
        for member in group.members:
            path, _, attribute = member.axis.name.rpartition(".")
            kernel = tuple(member.tensor.shape[2:]) if member.tensor.dim() > 2 else ()
            members.append((type(modules.get(path)).__name__, attribute, member.axis.dim, kernel))
        kinds[group.name] = tuple(sorted(members))
    return kinds


@dataclass(frozen=True)
class _Order:
    """All steps, in the order in which their scopes lose them.

    Attributes:
        owner: ``(steps,)`` number of the set of each step.
        before: ``(steps,)`` share of the scope's units that is gone before the step.
        after: ``(steps,)`` the same after it.
    """

    owner: Ids
    before: NDArray[np.float64]
    after: NDArray[np.float64]


def _order(sets: list[_Set], values: Callable[[Group], NDArray[np.float64]]) -> _Order:
    by_scope: dict[Hashable, list[int]] = defaultdict(list)
    for number, own in enumerate(sets):
        by_scope[own.scope].append(number)
    owners: list[Any] = [np.empty(0, dtype=np.int64)]
    befores: list[Any] = [np.empty(0)]
    afters: list[Any] = [np.empty(0)]
    for numbers in by_scope.values():
        owner = np.concatenate([np.full(sets[n].levels.size, n) for n in numbers])
        units = np.concatenate(
            [np.diff(sets[n].levels, prepend=0) * (sets[n].units // sets[n].parts) for n in numbers]
        )
        if len(numbers) > 1:
            score = np.concatenate([sets[n].steps(values(sets[n].group)) for n in numbers])
            rank = np.argsort(score, kind="stable")
            owner, units = owner[rank], units[rank]
        after = np.cumsum(units)
        total = sum(sets[n].units for n in numbers)
        owners.append(owner)
        befores.append((after - units) / total)
        afters.append(after / total)
    owner, before, after = (np.concatenate(parts) for parts in (owners, befores, afters))
    rank = np.argsort(after, kind="stable")
    return _Order(owner[rank], before[rank], after[rank])


def _by_ratio(sets: list[_Set], order: _Order) -> Ids:
    """Number of steps that each set with a ratio loses."""
    ratio = np.array([0.0 if own.ratio is None else own.ratio for own in sets])[order.owner]
    rounded = np.array([own.rounded for own in sets], dtype=bool)[order.owner]
    # Rounding goes to the nearest multiple, so a step is taken if its middle lies within the ratio.
    reached = np.where(rounded, (order.before + order.after) / 2, order.after)
    return np.bincount(order.owner[reached <= ratio + _EPS], minlength=len(sets))


def _search(
    costs: CostModel,
    sets: list[_Set],
    fixed: Ids,
    order: _Order,
    values: Callable[[Group], NDArray[np.float64]],
    gone: NDArray[np.bool_],
    meter: Meter | None,
    together: list[list[int]],
) -> Search:
    """The search over the steps of the sets that have no ratio; what the others lose is gone already."""
    free = np.array([own.ratio is None for own in sets], dtype=bool)
    owner = order.owner[free[order.owner]]
    step = np.where(gone, -1, owner.size)  # which step takes a class
    places = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=len(sets))))
    for number, own in enumerate(sets):
        ranked = own.ranked(values(own.group)) if own.levels.size else []
        ends = [0, *own.levels.tolist()]
        for place in range(int(own.levels.size) if free[number] else int(fixed[number])):
            classes = own.group.units[own.taken(ranked, ends[place], ends[place + 1])]
            step[classes] = places[number][place] if free[number] else -1
    return Search(costs, owner, step, len(sets), meter, together)
