"""Pruning in steps: plans one after the other, the one plan that they add up to, and schedules.

Plans are carried over from one network to its narrowed copy by where the indices of each parameter came
from, not by the names of groups: narrowing may join or split groups. What cannot be said as one
plan is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from .api import analyze, compensate, graph_for, graph_of, model_of, plan, resolved
from .coupling.graph import CouplingGraph
from .coupling.groups import Group
from .coupling.units import Label
from .errors import BudgetError, PlanError, RatioError
from .importance import Importance, score
from .origins import remember
from .passes import Narrowing, rewrite
from .passes.parameters import narrow, surviving
from .passes.remove_branches import without_branches
from .planning.budget import Budget
from .planning.plan import PruningPlan
from .planning.selection import AUTO, Selection

Curve = Callable[[float], float]
"""From the progress, ``0 < t <= 1``, to the share of the final ratio that is gone then; 1 at ``t = 1``."""


def agp(initial: float = 0.0) -> Curve:
    """The curve of automated gradual pruning: ``1 + (initial - 1) (1 - t)^3``.

    Fast at first, while there is much to choose from, then slower (Zhu & Gupta 2017, equation 1,
    https://arxiv.org/abs/1710.01878). With ``initial = 0`` it is ``"cubic"``.

    Args:
        initial: share of the final ratio that goes at once, ``0 <= initial <= 1``.
    """
    return lambda t: 1 + (initial - 1) * (1 - t) ** 3


CURVES: dict[str, Curve] = {"linear": lambda t: t, "cubic": agp(), "agp": agp()}


@dataclass
class Step:
    """One step of a schedule.

    Attributes:
        number: 1 for the first.
        share: how far the schedule has come, from 0 to 1; the last step is at 1.
        model: the network after this step, to be trained in place; assign another of the same shapes to go
            on with that.
        previous: the network that was narrowed in this step, as it was after its training.
        plan: what went in this step: ``plan.apply(previous)`` gave ``model``; with
            ``plan.apply_to_optimizer(optimizer, previous, model)`` the optimiser goes on.
        total: what went since the beginning, as a plan for the original.
    """

    number: int
    share: float
    model: nn.Module
    previous: nn.Module
    plan: PruningPlan
    total: PruningPlan


def schedule(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | Selection | None = None,
    steps: int = 5,
    curve: str | Curve = "linear",
    importance: Importance = AUTO,
    seed: int = 0,
    **options: Any,
) -> Iterator[Step]:
    """Prune in steps, with training in between.

        for step in fxprune.schedule(model, x, ratio=0.5, steps=5, curve="cubic"):
            train(step.model)
        pruned = step.model

    Every step scores the units of the current network and narrows it. Ratios refer to the sizes of the
    original, so that after each step the widths are those that one step with ``step.share * ratio`` would
    give, and names of layers in the options mean those of the original; ``ratios``, ``scopes``, ``heads`` and
    the shares in a ``budget`` follow the curve, too. What is gone stays gone. With calibration data
    (``calibrate``) each step's network makes up for what went in that step, as by
    :func:`fxprune.compensate`.

    Args:
        model: the original; it is not changed.
        example_inputs: as for :func:`fxprune.plan`.
        ratio: share of units to remove in the end; 0.5 unless a budget is given. Or a
            :class:`fxprune.Selection`, which is what is to be gone in the end.
        steps: number of steps.
        curve: how much is gone when: ``"linear"``, ``"cubic"`` (the same as ``"agp"``), or a function from
            the progress ``number / steps`` to the share of ``ratio``, such as ``fxprune.iterative.agp(0.2)``.
        importance: as for :func:`fxprune.plan`; evaluated on the current network in each step.
        seed: as for :func:`fxprune.plan`.
        options: further arguments of :class:`fxprune.Selection`.

    Raises:
        RatioError: for an unknown curve, or one that falls or ends elsewhere than at 1.
        BudgetError: for a budget of amounts; give shares.
        PlanError: if the network that a step was given to train has come back with other shapes.
    """
    if isinstance(ratio, Selection):
        selection = ratio
    else:
        selection = Selection(ratio, importance, seed=seed, **options)
    goals = [(share, _partly(share, selection)) for share in _shares(steps, curve)]
    return _steps(model, example_inputs, goals)


def _shares(steps: Any, curve: Any) -> list[float]:
    if type(steps) is not int or steps < 1:
        raise RatioError(f"steps is the number of steps, at least 1; got {steps!r}.")
    if isinstance(curve, str):
        if curve not in CURVES:
            close = difflib.get_close_matches(curve, CURVES, n=1, cutoff=0)
            raise RatioError(
                f"unknown curve {curve!r}, did you mean {close[0]!r}? There are "
                f"{', '.join(map(repr, CURVES))}; or give a function from progress to share."
            )
        curve = CURVES[curve]
    if not callable(curve):
        names = ", ".join(map(repr, CURVES))
        raise RatioError(f"curve is {names} or a function from progress to share; got {curve!r}.")
    shares = [float(curve(number / steps)) for number in range(1, steps + 1)]
    if abs(shares[-1] - 1) > 1e-9 or any(not a <= b for a, b in zip([0, *shares], shares, strict=False)):
        raise RatioError(
            f"the curve must rise from 0 to 1, which it has to reach at 1; over {steps} steps it gives "
            f"{shares}."
        )
    return [*shares[:-1], 1.0]


def _partly(share: float, selection: Selection) -> Selection:
    """The selection for a part of the way."""
    return replace(
        selection,
        ratio=None if selection.ratio is None else share * selection.ratio,
        heads=share * selection.heads,
        ratios={key: share * part for key, part in selection.ratios.items()},
        scopes={key: share * part for key, part in selection.scopes.items()},
        budget=None if selection.budget is None else _part_of(share, selection.budget),
    )


def _part_of(share: float, budget: Budget) -> Budget:
    if share >= 1:
        return budget
    parts = budget.settings()
    amounts = [name for name, part in parts.items() if part > 1 or name == "size_mb"]
    if amounts:
        raise BudgetError(
            f"a schedule needs the shares to keep, to go there step by step; {amounts[0]} = "
            f"{parts[amounts[0]]:g} is an amount."
        )
    return replace(budget, **{name: 1 - share * (1 - part) for name, part in parts.items()})


def _steps(
    model: nn.Module,
    example_inputs: Any,
    goals: list[tuple[float, Selection]],
) -> Iterator[Step]:
    first = goals[0][1]
    original = analyze(
        model, example_inputs, free_outputs=first.free_outputs, fill_outputs=first.fill_outputs
    )
    goals = [(share, replace(goal, free_outputs=(), fill_outputs=AUTO)) for share, goal in goals]
    current, total = model, None
    for number, (share, goal) in enumerate(goals, 1):
        if total is None:
            total = made = plan(original, goal)
            narrowed = made.apply(current)
        else:
            graph = analyze(
                current, example_inputs, free_outputs=total.free_outputs, fill_outputs=total.fill_outputs
            )
            goal = resolved(_without_gone(goal, total))
            carried = _carried(total, original, graph, goal.importance, goal.seed)
            wider, total = total, plan(original, replace(goal, importance=carried))
            total = replace(total, settings={**total.settings, "importance": wider.settings["importance"]})
            made = since(total, wider, original, graph)
            narrowed = made.apply(graph)
        if goal.calibrate is not None:
            narrowed = compensate(
                narrowed, current, goal.calibrate, pick=goal.pick, rebuild=goal.rebuild, seed=goal.seed
            )
        step = Step(number, share, narrowed, current, made, total)
        remember(step.model, model, [total])
        shapes = _shapes(step.model)
        yield step
        current = step.model
        for name, shape in shapes.items():
            if (found := _shapes(current).get(name)) != shape:
                raise PlanError(
                    f"the network of step {number} came back with another architecture: {name!r} had shape "
                    f"{tuple(shape)} and has {tuple(found) if found is not None else 'gone'}."
                )


def _without_gone(goal: Selection, total: PruningPlan) -> Selection:
    """The selection when the residual branches that ``total`` removes are gone for good."""
    depth = goal.depth
    if not isinstance(depth, bool) and isinstance(depth, int):  # they count among those that may go
        depth = max(depth - len(set(total.branches) - set(goal.branches)), 0)
    return replace(goal, branches=tuple({*goal.branches, *total.branches}), depth=depth)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: list(tensor.shape) for name, tensor in tensors}


def then(first: PruningPlan, second: PruningPlan, model: nn.Module | CouplingGraph) -> PruningPlan:
    """One plan in place of two. See :meth:`PruningPlan.then`."""
    steps = _Steps(first, model, second=second)
    dissolved = tuple(sorted({*first.dissolved, *second.dissolved}))
    graph = steps.wide
    branches = (*first.branches, *second.branches)
    if dissolved != first.dissolved or second.branches:
        graph = graph_of(replace(first, dissolved=dissolved, branches=branches), model)
    after = Narrowing(steps.narrow, second.removed)
    alive = {}
    for slab in steps.slabs(graph):
        inner = slab.alive(steps.narrow, after)
        mask = torch.zeros(slab.shape, dtype=torch.bool)
        mask.view(-1)[slab.origin[inner]] = True
        alive[slab] = mask
    both = "these two plans cannot be said as one"
    return replace(
        _plan_of(graph, alive, first, both),
        dissolved=dissolved,
        branches=graph.removed_branches,
        notes=(*first.notes, *second.notes),
        settings={"steps": [*_settings(first), *_settings(second)]},
        config={**first.config, **second.config},
    )


def _settings(made: PruningPlan) -> list[Any]:
    return list(made.settings["steps"]) if "steps" in made.settings else [dict(made.settings)]


def since(
    total: PruningPlan,
    first: PruningPlan,
    model: nn.Module | CouplingGraph,
    pruned: nn.Module | CouplingGraph | None = None,
) -> PruningPlan:
    """The inverse of :func:`then`: what is left to do of ``total`` after ``first``.

    Args:
        total: a plan for ``model``.
        first: another one, which removes part of what ``total`` removes.
        model: the original, or its analysis; only its architecture counts.
        pruned: what the plan will be for: what ``first``, or the plans that it is composed of, made of the
            original; ``first.apply(model)`` by default.

    Raises:
        PlanError: if ``total`` keeps something that ``first`` removes.
    """
    steps = _Steps(first, model, pruned, total.dissolved, total.held)
    after = Narrowing(graph_for(total, model), total.removed)
    missing = ", ".join(name for name in first.branches if name not in total.branches)
    if missing:
        raise PlanError(
            f"the second plan keeps residual branches that the first removes ({missing}), so it cannot be "
            f"reached from there. Prune the original anew."
        )
    left = without_branches(steps.narrow, [name for name in total.branches if name not in first.branches])
    alive = {}
    for slab in steps.slabs(after.graph):
        outer = slab.alive(after.graph, after)
        mask = outer.reshape(-1)[slab.origin]
        if int(mask.sum()) != int(outer.sum()):
            raise PlanError(
                f"the second plan keeps entries of {slab.name!r} that the first removes, so it cannot be "
                f"reached from there. Prune the original anew."
            )
        alive[slab] = mask
    of = PruningPlan(
        model=total.model,
        inputs=total.inputs,
        shapes=steps.narrow.tensor_names(),
        sizes={},
        removed={},
        branches=left.removed_branches,
        held=left.held,
        dissolved=total.dissolved,
        free_outputs=total.free_outputs,
        fill_outputs=total.fill_outputs,
        regions=total.regions,
        notes=total.notes,
        settings=total.settings,
        config=total.config,
    )
    return _plan_of(left, alive, of, "the second plan cannot be reached from the first")


def _carried(
    total: PruningPlan,
    original: CouplingGraph,
    graph: CouplingGraph,
    importance: Importance,
    seed: int,
) -> Callable[[Group], Any]:
    """The scores of the current network's units, as scores of the original's; what is gone scores least.

    ``original`` and ``graph`` are the analyses of the two.
    """
    scores = score(graph, importance, seed, graph.model)
    by_class = np.full(graph.run.coupler.units.count, np.nan)
    for group in graph.groups:
        by_class[group.units] = scores(group)
    graph.cells.inherit(np.fmin, by_class)
    found = by_class[~np.isnan(by_class)]
    low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 0.0)
    far = 1e6 * (high - low + 1)
    known = {}
    for slab in _Steps(total, original, graph).slabs(graph):
        table = np.full(slab.shape, low - far)
        classes = slab.classes(graph)
        left = np.nan_to_num(by_class[classes], nan=high + far) if classes is not None else high + far
        table.reshape(-1)[slab.origin.numpy()] = left  # what is left but cannot go scores most
        known[slab.name, slab.axis] = table

    def carried(group: Group) -> Any:
        result = np.full(group.size, low - far)
        for member in group.members:
            table = known.get((member.axis.name, member.axis.dim))
            if table is not None:
                order = [*member.over, member.axis.dim]
                others = tuple(d for d in range(table.ndim) if d not in order)
                table = table.max(axis=others).transpose(np.argsort(np.argsort(order)))
                units = member.units
                np.maximum.at(result, units[units >= 0], np.broadcast_to(table, units.shape)[units >= 0])
        return result

    return carried


@dataclass(frozen=True, eq=False)
class _Slab:
    """One axis of a parameter or buffer, with the axes that choose its rows; all others have size 1.

    Attributes:
        name: of the tensor.
        axis: the axis.
        dims: the axis and those that choose its rows, in either network.
        shape: in the original.
        origin: for each position in the narrowed tensor its flat position in the original.
    """

    name: str
    axis: int
    dims: frozenset[int]
    shape: tuple[int, ...]
    origin: Tensor

    def labels(self, graph: CouplingGraph) -> list[Label | None]:
        return [label if d in self.dims else None for d, label in enumerate(_labels(graph, self.name))]

    def alive(self, graph: CouplingGraph, narrowing: Narrowing) -> Tensor:
        """True for what survives, in the shape that the tensor has in ``graph``."""
        tensor = graph.captured.program.tensors[self.name]
        shape = [size if d in self.dims else 1 for d, size in enumerate(tensor.shape)]
        mask = surviving(shape, self.labels(graph), narrowing)
        return torch.ones(shape, dtype=torch.bool) if mask is None else mask

    def classes(self, graph: CouplingGraph) -> NDArray[np.int64] | None:
        """The class of each position along the axis, in the shape that the tensor has in ``graph``."""
        label = _labels(graph, self.name)[self.axis]
        if label is None:
            return None
        tensor = graph.captured.program.tensors[self.name]
        shape = [size if d in self.dims else 1 for d, size in enumerate(tensor.shape)]
        order = [*label.over, self.axis]
        ids = graph.classes(label.ids).transpose(np.argsort(order))
        return np.broadcast_to(ids.reshape([n if d in order else 1 for d, n in enumerate(shape)]), shape)


def _labels(graph: CouplingGraph, name: str) -> list[Label | None]:
    return graph.labels(graph.captured.program.tensors[name])


class _Steps:
    """Two networks, of which the narrow one is what a plan makes of the wide one."""

    def __init__(
        self,
        first: PruningPlan,
        model: nn.Module | CouplingGraph,
        pruned: nn.Module | CouplingGraph | None = None,
        dissolved: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
        second: PruningPlan | None = None,
    ) -> None:
        self.wide = graph_for(first, model)
        self.narrowing = Narrowing(self.wide, first.removed)
        given = pruned if pruned is not None else first.apply(model)
        self.pruned = model_of(given)
        shapes = _shapes(self.pruned)
        if second is not None:
            # Constants that rewriting inserts may differ if it was done in more or in fewer steps.
            own = {name: shape for name, shape in second.shapes.items() if name in first.shapes}
            inserted = {name: shape for name, shape in shapes.items() if name not in first.shapes}
            self.narrow = graph_for(replace(second, shapes={**own, **inserted}), given)
        else:
            nodes = self.pruned.graph.nodes if isinstance(self.pruned, fx.GraphModule) else ()
            names = {node.name for node in nodes}
            held = tuple(name for name in held if name in names)
            like = replace(first, removed={}, branches=(), sizes={}, shapes=shapes, held=held)
            like = replace(like, dissolved=dissolved)
            self.narrow = graph_of(like, given)

    def slabs(self, other: CouplingGraph) -> Iterator[_Slab]:
        """Every axis of ``other`` that has a label there, or in one of the networks."""
        graphs = [self.wide, self.narrow, other]
        for name, tensor in self.wide.captured.program.tensors.items():
            if name not in other.captured.program.tensors:  # it goes with a residual branch
                continue
            tables = [_labels(graph, name) for graph in graphs if name in graph.captured.program.tensors]
            for axis in range(tensor.dim()):
                if all(table[axis] is None for table in tables):
                    continue
                dims, more = {axis}, {axis}
                while more:
                    labels = [table[d] for table in tables for d in more]
                    more = {d for label in labels if label is not None for d in label.over} - dims
                    dims |= more
                shape = tuple(size if d in dims else 1 for d, size in enumerate(tensor.shape))
                flat = torch.arange(int(np.prod(shape))).reshape(shape)
                labels = [label if d in dims else None for d, label in enumerate(tables[0])]
                yield _Slab(name, axis, frozenset(dims), shape, narrow(flat, labels, self.narrowing))


def _plan_of(
    graph: CouplingGraph, alive: dict[_Slab, Tensor], like: PruningPlan, problem: str
) -> PruningPlan:
    """The plan for ``graph`` after which exactly the ``alive`` entries are left."""
    seen, left = np.zeros((2, graph.run.coupler.units.count), dtype=bool)
    for slab, mask in alive.items():
        classes = slab.classes(graph)
        if classes is not None:
            seen[classes] = True
            left[classes[mask.numpy()]] = True  # a unit goes when none of its entries is left
    for known in (seen, left):
        graph.cells.collect(np.logical_or, known)
    removed = {}
    for group in graph.groups:
        gone = np.flatnonzero(seen[group.units] & ~left[group.units]).tolist()
        if gone:
            removed[group.name] = gone
    narrowing = Narrowing(graph, removed)
    for slab, mask in alive.items():
        if not torch.equal(slab.alive(graph, narrowing), mask):
            raise PlanError(
                f"{problem}: axis {slab.axis} of {slab.name!r} would have to be narrowed in a way that no "
                f"group of this network allows. Apply them one after the other."
            )
    violations = rewrite(graph, removed).violations
    if violations:
        reason = violations[0].reason.partition("\n")[0]
        raise PlanError(
            f"{problem}, as node {violations[0].node} of the network could not be rewritten at once: "
            f"{reason} Apply them one after the other."
        )
    return replace(like, removed=removed, sizes={group.name: group.size for group in graph.groups})


__all__ = ["CURVES", "Curve", "Step", "agp", "schedule", "since", "then"]
