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

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..coupling.units import Ids
from ..errors import BudgetError, RatioError, SelectionError
from .budget import Budget, Search
from .cost_model import CostModel
from .latency import Meter
from .patterns import Names, Pattern, nearest
from .whole_rows import select_rows, without_rows

Scope = Literal["local", "global", "isomorphic"]
SCOPES = ("local", "global", "isomorphic")
_EPS = 1e-9


def check_ratio(ratio: Any, name: str = "ratio", what: str = "units to remove from every group") -> float:
    """Refuse a ratio outside ``0 <= ratio < 1``."""
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or not 0 <= ratio < 1:
        bound = "heads" if name == "heads" else "ratio"
        share = number and bound == "ratio" and 1 < ratio < 100
        percent = f" For {ratio:g} % give {ratio / 100:g}." if share else ""
        raise RatioError(f"{name} is the share of {what}, with 0 <= {bound} < 1; got {ratio!r}.{percent}")
    return float(ratio)


@dataclass(frozen=True)
class Selection:
    """How much is to go, and from where; the arguments of :func:`fxprune.plan`, checked.

    Attributes:
        ratio: share of units that each scope loses; None if a budget decides.
        where: only groups for which this is true.
        scope: what is ranked together.
        ratios: ratio of the groups that a pattern means.
        scopes: patterns whose groups are ranked together, and their ratio.
        max_ratio: largest share that a balanced set may lose.
        keep: patterns of groups that stay whole.
        round_to: what the number of units left in a row is a multiple of, one for all or by pattern.
        budget: what may be left.
        heads: share of the rows that go as a whole.
    """

    ratio: float | None = 0.5
    where: Callable[[Group], bool] | None = None
    scope: Scope = "local"
    ratios: Mapping[Pattern, float] = field(default_factory=dict)
    scopes: Mapping[Pattern | tuple[Pattern, ...], float] = field(default_factory=dict)
    max_ratio: float = 1.0
    keep: tuple[Pattern, ...] = ()
    round_to: int | Mapping[Pattern, int] | None = None
    budget: Budget | None = None
    heads: float = 0.0

    @staticmethod
    def checked(
        ratio: Any, where: Any, scope: Any, ratios: Any, scopes: Any, max_ratio: Any, keep: Any,
        round_to: Any, budget: Any, heads: Any,
    ) -> Selection:  # fmt: skip
        """Raises :class:`RatioError`, :class:`SelectionError` or :class:`BudgetError` for bad arguments."""
        if isinstance(ratio, Budget):
            raise BudgetError("a budget is given by name, in place of the ratio: budget=Budget(macs=0.5).")
        if budget is not None and not isinstance(budget, Budget):
            raise BudgetError(f"budget must be an fxprune.Budget, such as Budget(macs=0.5); got {budget!r}.")
        if budget is not None and ratio is not None:
            raise BudgetError(
                f"ratio={ratio!r} and a budget contradict each other: the budget decides how much goes. "
                f"Leave one of them out (max_ratio bounds what a budget takes from one group)."
            )
        if budget is None:
            ratio = check_ratio(0.5 if ratio is None else ratio)
        heads = check_ratio(heads, "heads", "rows (attention heads, convolution groups) to remove")
        if where is not None and not callable(where):
            raise SelectionError(
                f"where is a function of a group that says whether it may be narrowed, such as "
                f"lambda group: group.exact; got {where!r}. By name, use keep, ratios or scopes."
            )
        if scope not in SCOPES:
            raise SelectionError(
                f"unknown scope {scope!r}; did you mean {nearest(str(scope), SCOPES)[0]!r}? "
                f"There are {', '.join(map(repr, SCOPES))}."
            )
        tables = {"ratios": ratios or {}, "scopes": scopes or {}}
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise SelectionError(f"{name} maps names or module types to ratios; got {table!r}.")
            for key, value in table.items():
                check_ratio(value, f"{name}[{key!r}]")
        number = isinstance(max_ratio, Real) and not isinstance(max_ratio, bool)
        if not number or not 0 < max_ratio <= 1:
            raise RatioError(
                f"max_ratio is the largest share that a group may lose, 0 < max_ratio <= 1; "
                f"got {max_ratio!r}."
            )
        given = {"ratio": ratio or 0.0, "heads": heads}
        given |= {f"{name}[{key!r}]": value for name, table in tables.items() for key, value in table.items()}
        for name, value in given.items():
            if value > max_ratio:
                raise RatioError(
                    f"{name} = {value:g} cannot be met with max_ratio = {max_ratio:g}; the nearest that can "
                    f"is {name} = {max_ratio:g}."
                )
        if not isinstance(keep, (list, tuple, set, frozenset)):
            keep = (keep,)  # one pattern, or nothing that could be one
        for value in round_to.values() if isinstance(round_to, Mapping) else [round_to]:
            if value is not None and (type(value) is not int or value < 1):
                raise SelectionError(
                    f"round_to is a whole number from 1 on, or maps names or module types to such; "
                    f"got {value!r}."
                )
        if round_to is None and budget is not None and budget.latency is not None:
            round_to = 8  # other widths are slow on most devices, and not the slower the wider they are
        return Selection(
            ratio, where, scope, dict(tables["ratios"]), dict(tables["scopes"]), float(max_ratio),
            tuple(keep), round_to, budget, heads,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What is not left at its default, as plain data."""
        found: dict[str, Any] = {"ratio": self.ratio}
        if self.scope != "local":
            found["scope"] = self.scope
        for name in ("ratios", "scopes"):
            table: Mapping[Any, float] = getattr(self, name)
            if table:
                found[name] = {_text(key): float(value) for key, value in table.items()}
        if self.max_ratio < 1:
            found["max_ratio"] = self.max_ratio
        if self.keep:
            found["keep"] = [_text(pattern) for pattern in self.keep]
        if isinstance(self.round_to, Mapping):
            found["round_to"] = {_text(key): value for key, value in self.round_to.items()}
        elif self.round_to is not None:
            found["round_to"] = self.round_to
        if self.heads:
            found["heads"] = self.heads
        if self.budget is not None:
            found["budget"] = self.budget.settings()
        return found


def _text(pattern: Any) -> str:
    if isinstance(pattern, tuple):
        return ", ".join(map(_text, pattern))
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


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
) -> Selected:
    """The units to remove from each group.

    Every row keeps at least one unit, and the rows of a balanced set lose the same share. Ties are broken
    by position, so that the same scores always give the same units. A budget for the latency needs the
    ``meter``.

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
    order = _order(sets, values)
    steps = _by_ratio(sets, order)
    left: Mapping[str, float] = {}
    if selection.budget is not None:
        costs = CostModel(graph)
        gone = ~graph.alive(rows)
        search = _search(costs, sets, steps, order, values, gone, meter)
        chosen, left = search.run(selection.budget)
        steps = steps + chosen
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
    if selection.keep:
        names = Names(model, graph)
        kept.update(*(names.groups(pattern, "keep") for pattern in selection.keep))
    where = selection.where
    return lambda group: group.name not in kept and (where is None or bool(where(group)))


def _sets(
    graph: CouplingGraph, selection: Selection, model: nn.Module, gone: Mapping[str, list[int]]
) -> tuple[list[_Set], tuple[str, ...]]:
    """The balanced sets that may be narrowed, each with its scope and its steps; rows are ``gone`` before."""
    patterned = (
        selection.keep or selection.ratios or selection.scopes or isinstance(selection.round_to, Mapping)
    )
    names = Names(model, graph) if patterned else None
    assigned: dict[str, tuple[Hashable, float | None]] = {}
    notes: list[str] = []
    multiple: dict[str, int] = {}
    if names is not None:
        for place, (patterns, share) in enumerate(selection.scopes.items()):
            for pattern in patterns if isinstance(patterns, tuple) else (patterns,):
                for meant in sorted(names.narrowed(pattern, "scopes", share)):
                    if assigned.get(meant, (("scope", place), share))[0] != ("scope", place):
                        notes.append(f"{meant} is in two scopes; the latter counts, {_text(patterns)}")
                    assigned[meant] = ("scope", place), share
        by: dict[str, Pattern] = {}
        for pattern, share in selection.ratios.items():
            for meant in sorted(names.narrowed(pattern, "ratios", share)):
                if meant in by and assigned[meant][1] != share:
                    notes.append(
                        f"the ratios of {_text(by[meant])} and {_text(pattern)} both apply to {meant}; the "
                        f"latter counts, {share:g}"
                    )
                by[meant] = pattern
                assigned[meant] = ("own", meant), share
        for pattern in selection.keep:
            for meant in names.groups(pattern, "keep"):
                assigned[meant] = ("own", meant), 0.0
        if isinstance(selection.round_to, Mapping):
            for pattern, number in selection.round_to.items():
                multiple |= dict.fromkeys(names.groups(pattern, "round_to"), number)
    single = selection.round_to if isinstance(selection.round_to, int) else 1
    kinds = _kinds(graph, model) if selection.scope == "isomorphic" else {}
    sets = []
    for group in graph.groups:
        if selection.where is not None and not selection.where(group):
            continue
        common: Hashable = kinds.get(group.name, "all")
        scope, ratio = assigned.get(group.name, (("scope", common), selection.ratio))
        local = group.name not in assigned and selection.scope == "local"
        if ratio == 0:
            continue
        number = multiple.get(group.name, single)
        for place, rows in enumerate(without_rows(group, gone.get(group.name, ())).balance):
            parts = math.gcd(*(row.size for row in rows))
            levels = _levels(rows, parts, number, selection.max_ratio)
            if not levels.size and number > 1 and parts > 1:
                notes.append(
                    f"{group.name} stays whole: its rows of {', '.join(sorted({str(r.size) for r in rows}))} "
                    f"units cannot be narrowed to a multiple of {number}"
                )
            if local or (isinstance(scope, tuple) and scope[0] == "own"):
                scope = ("own", group.name, place)
            sets.append(_Set(group, rows, parts, levels, number > 1, scope, ratio))
    return sets, tuple(notes)


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
    return Search(costs, owner, step, len(sets), meter)
