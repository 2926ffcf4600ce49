"""The result of the analysis: groups, the ``networkx`` graph of couplings, and explanations."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..capture import RUNGS, Captured
from ..errors import FxpruneError, PlanError
from ..inputs import to_meta
from ..nodes import describe_source
from ..program import Program
from ..repeats import joined, starred
from ..sizes import Change, InputSizes, resized
from ..trees import Leaf
from . import pickling
from .branches import Branch, Branches, find_branches
from .coupler import Coupler
from .grouping import form_groups
from .groups import Group, Grouping, RowSet
from .input_sizes import input_sizes, pin_folded, refusal, running
from .interpreter import Run, interpret
from .operator_calls import OperatorCalls
from .other_sizes import differing, run_at, same_batch
from .outputs import beside, fill, fills, holding, short_names
from .products import Cells
from .roles import Use
from .units import FIXED, NONE, Axis, Event, Ids, Label, Rectangle, State, Value

if TYPE_CHECKING:
    import networkx as nx

    from ..report import Report

_DIM = re.compile(r"(.+)\[(\d+)\]")

WHOLE_ROWS = "*[rows]"
"""Held, it lets rows (attention heads, groups of a convolution) go as a whole only, none of their columns."""

_IN_CLASS = "the model's own code keeps this extent"

_MUCH = 0.1
"""Share of the parameters that is worth a word."""


@dataclass(frozen=True)
class Frozen:
    """An axis that cannot be narrowed.

    Attributes:
        axis: name of the parameter and dimension.
        reason: why.
        node: name of the graph node that froze it.
        source: ``file:line in function`` of that node, or empty.
        remedy: what would free it, or empty.
    """

    axis: Axis
    reason: str
    node: str
    source: str
    remedy: str

    def __str__(self) -> str:
        at = f" at {self.node}" if self.node else ""
        source = f" ({self.source})" if self.source else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.axis}: {self.reason}{at}{source}{remedy}"


@dataclass(frozen=True)
class Link:
    """One step of an explanation: ``axis`` goes with ``via`` because of a graph node."""

    axis: Axis
    via: Axis
    node: str
    source: str

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"{self.axis} <- {self.via} through {self.node}{source}"


@dataclass(frozen=True)
class Explanation:
    """What goes with an axis, and why. ``str()`` of it is meant to be read.

    Where that are many steps, those that differ by numbers alone (in repeated blocks) share a line:
    ``blocks.*.fc.weight[1] <- ... (x24)``. ``paths`` has them all.

    Attributes:
        axis: the axis asked for.
        groups: the groups that its indices belong to.
        paths: for each other axis that goes with it, the steps that lead there.
        frozen: why (part of) the axis cannot go, or None.
        branches: residual branches that hold the axis, and that can go as a whole.
    """

    axis: Axis
    groups: tuple[Group, ...]
    paths: Mapping[Axis, tuple[Link, ...]]
    frozen: Frozen | None
    branches: tuple[Branch, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.axis)]
        lines += [f"  in {group!r}" for group in self.groups]
        if self.frozen is not None:
            lines.append(
                f"  frozen: {self.frozen.reason} at {self.frozen.node} {self.frozen.source}".rstrip()
            )
        steps = {link: None for path in self.paths.values() for link in path}  # many paths begin alike
        alike: dict[Any, list[str]] = {}
        for link in steps:
            key = starred(f"{link.axis} {link.via} {link.node}"), link.source
            alike.setdefault(key if len(steps) > _MOST_STEPS else link, []).append(str(link))
        lines += [f"  {joined(texts)}" for texts in alike.values()]
        lines += [f"  {axis} goes with it" for axis, path in self.paths.items() if not path]
        for branch in self.branches:
            more = f" and {len(branch.tensors) - 6} more" if len(branch.tensors) > 6 else ""
            lines.append(f"  in the residual branch {branch}")
            lines.append(f"    which takes along {', '.join(branch.tensors[:6])}{more}")
        return "\n".join(lines)


_MOST_STEPS = 40
"""From how many on the steps of an explanation share lines."""


@dataclass(frozen=True)
class Source:
    """What an analysis was made of.

    Attributes:
        model: gives the model, None if it is gone.
        args: its positional inputs, possibly on the meta device.
        kwargs: its keyword inputs.
        dissolved: functions that were traced into.
    """

    model: Callable[[], nn.Module | None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dissolved: frozenset[str] = frozenset()


class CouplingGraph:
    """What can be removed from a network together, and what cannot be removed at all.

    Iterating gives the groups. Made by :func:`fxprune.analyze`. It can be pickled, with the model.
    """

    def __init__(
        self,
        captured: Captured,
        source: Source,
        held: tuple[str, ...] = (),
        before: CouplingGraph | None = None,
        removed_branches: tuple[str, ...] = (),
    ) -> None:
        """``held``: see :meth:`hold`; ``before``: see :attr:`whole`."""
        self._before = before
        self.removed_branches = removed_branches
        self.captured = captured
        self.source = source
        self.held = held
        calls = OperatorCalls()
        self._run: Run = interpret(captured.program, self.inputs, follow=calls.note)
        self._refusals: dict[str, str] = {}
        self.other_sizes = self._look_at_other_sizes(calls)
        if WHOLE_ROWS in held:
            self.held = ()
            self._regroup()
            self._tie_rows(self.rows)
            self.held = held
        if held:
            self._hold_dims(held)
        self._regroup()

    def _look_at_other_sizes(self, calls: OperatorCalls) -> Change:
        """Freeze what is coupled otherwise where the inputs have other sizes, if the graph takes any.

        Args:
            calls: those of the run at the sizes of the example.

        Returns:
            Which sizes were others (see :mod:`fxprune.sizes`).
        """
        folded: dict[str, str] = {}
        seen: Change = {}
        for trial in self.captured.trials:
            if self._is_for(trial.change, trial.inputs, calls, folded):
                seen = trial.change
                break
        sizeless = self.captured.rung == next(iter(RUNGS))  # its code asks for none, so does the same at all
        for kind, how in running(self.captured, seen):
            change = {**seen, kind: how}
            folded[kind] = "the model's code may do something else at another"
            if sizeless and self._is_for(change, resized(self.inputs, change), calls, folded):
                seen = change
        for kind in seen:
            folded.pop(kind, None)
        self._refusals |= folded
        pin_folded(self.captured, folded)
        return seen

    def _is_for(
        self, change: Change, inputs: list[Any], calls: OperatorCalls, folded: dict[str, str]
    ) -> bool:
        """Freeze what is coupled otherwise for ``inputs``; whether the graph takes them, and is right.

        Args:
            change: of which sizes they are.
            inputs: meta tensors and values for the placeholders.
            calls: those of the run at the sizes of the example.
            folded: gets the reason, by kind of a size, where the graph runs and is not right.
        """
        try:
            other = run_at(self.captured.program, inputs, calls, self._run)
        except FxpruneError as error:  # the model takes no such size
            self._refusals |= dict.fromkeys(change, refusal(error))
            return False
        if not same_batch(self._run, self.inputs, other, inputs):
            folded |= dict.fromkeys(change, "numbers in the code fold other sizes into the batch")
            return False  # the model is for these sizes alone
        self._run.coupler.frozen.extend(differing(self._run, other))
        return True

    def _regroup(self) -> None:
        run, program = self._run, self.captured.program
        order = {name: i for i, name in enumerate(program.skeleton.names)}
        states = sorted(run.states.values(), key=lambda state: order.get(state.name, len(order)))
        self._states = {state.name: state for state in states}
        self._axes: dict[int, list[Label | None]] | None = None
        trainable = {s.name: isinstance(s.tensor, torch.nn.Parameter) for s in states}
        extra = tuple(event for name in self.held for event in self._hold(name))
        self._grouping: Grouping = form_groups(run.coupler, states, trainable, extra)
        for name in ("frozen", "rows"):
            self.__dict__.pop(name, None)

    def hold(self, names: set[str]) -> CouplingGraph:
        """The same analysis with nothing narrowed around the nodes ``names``.

        ``"view_3[2]"`` stands for dimension 2 of what ``view_3`` puts out (or of a parameter or buffer of
        that name): it keeps its extent. Where it has rows (as the columns of attention heads have), whole
        rows may go. :data:`WHOLE_ROWS` stands for all columns of rows that can go as a whole.
        """
        other = object.__new__(CouplingGraph)
        other.captured, other._run, other.source = self.captured, self._run, self.source
        other._before, other.removed_branches = self._before, self.removed_branches
        other.other_sizes, other._refusals = self.other_sizes, self._refusals
        other.held = tuple(sorted({*self.held, *names}))
        if WHOLE_ROWS in names:
            other._tie_rows(self.rows)
        other._hold_dims(sorted(names - set(self.held)))
        other._regroup()
        return other

    def _fork(self) -> Coupler:
        """A copy of what was found out, to change."""
        coupler = copy.copy(self._run.coupler)
        coupler.units = coupler.units.copy()
        coupler.frozen, coupler.edges = list(coupler.frozen), list(coupler.edges)
        self._run = replace(self._run, coupler=coupler)
        return coupler

    def _tie_rows(self, rows: Sequence[RowSet]) -> None:
        """Let rows that can go as a whole go only so."""
        units = self._fork().units
        for classes in (classes for found in rows for classes in found.classes):
            units.merge(classes[:1], classes)

    def _hold_dims(self, names: Sequence[str]) -> None:
        """Freeze single dimensions, in a copy of the analysis that it was made from."""
        dims = [match for name in names if (match := _DIM.fullmatch(name))]
        if not dims:
            return
        coupler = self._fork()
        nodes = {node.name: node for node in self.captured.program.graph.nodes}
        for match in dims:
            name, dim = match[1], int(match[2])
            values = list(tree_values(self._run.values.get(nodes[name]))) if name in nodes else []
            if name in self._run.states:
                state = self._run.states[name]
                values = [Value(state.shape, [], state, tuple(range(len(state.shape))))]
            if not values:
                raise PlanError(f"the plan holds {match[0]!r}, which this model does not have.")
            coupler.node = nodes.get(name)
            for value in values:
                label = value.label(dim) if dim < len(value.shape) else None
                if label is not None:
                    coupler.freeze(label, _IN_CLASS, 'into="graph" narrows it')
        _tie_beside(coupler)

    def _hold(self, name: str) -> Iterator[Event]:
        if name == WHOLE_ROWS or _DIM.fullmatch(name):
            return
        node = next((n for n in self.captured.program.graph.nodes if n.name == name), None)
        if node is None:
            raise PlanError(f"the plan holds the graph node {name!r}, which this model does not have.")
        if node.op == "call_module":
            for state in self._states.values():
                for label in state.axes if state.name.startswith(f"{node.target}.") else []:
                    if label is not None:
                        yield Event(
                            label.ids.reshape(-1), label.axis, node, "this module could not be rewritten"
                        )
        for near in (node, *node.all_input_nodes):
            for value in tree_values(self._run.values.get(near)):
                for dim in range(len(value.shape)):
                    label = value.label(dim)
                    if label is not None:
                        yield Event(
                            label.ids.reshape(-1), label.axis, node, "this node could not be rewritten"
                        )

    def freed(self) -> CouplingGraph:
        """The same analysis with all outputs allowed to become narrower that keep several layers wide."""
        graph = self
        while names := graph._held_by_outputs()[0]:
            program = graph.captured.program
            graph = graph._with(replace(program, free_outputs=(*program.free_outputs, *names)))
        return graph

    def filled(self) -> CouplingGraph:
        """The same analysis, with zeros in outputs beside the result that keep several layers wide."""
        program = self.captured.program
        names = self._held_by_outputs(beside(program, self._run))[0] if self._run.outputs.get("") else ()
        return self._with(fill(program, names)) if names else self

    def _with(self, program: Program) -> CouplingGraph:
        captured = replace(self.captured, program=program)
        return CouplingGraph(captured, self.source, self.held, self._before, self.removed_branches)

    def keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CouplingGraph:
        """The same analysis, which keeps ``model`` and the inputs alive that it was made of."""
        return self._shell(Source(lambda: model, args, kwargs, self.source.dissolved))

    def without_model(self) -> CouplingGraph:
        """The same analysis, which does not keep the model alive, nor its inputs."""
        source = self.source
        args, kwargs = to_meta(source.args), to_meta(source.kwargs)
        copied = self._shell(Source(weakref.ref(self.model), args, kwargs, source.dissolved))
        copied._before = self._before.without_model() if self._before is not None else None
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        source = self.source
        state = {
            "captured": self.captured,
            "held": self.held,
            "other_sizes": (self.other_sizes, self._refusals),
            "run": self._run,
            "source": (source.model(), source.args, source.kwargs, source.dissolved),
            "before": self._before,
            "removed_branches": self.removed_branches,
        }
        return _unpickled, (pickling.dumps(state),)

    def _shell(self, source: Source) -> CouplingGraph:
        other = object.__new__(CouplingGraph)
        other.__dict__.update(self.__dict__)
        other.source = source
        return other

    def __copy__(self) -> CouplingGraph:
        return self._shell(self.source)

    @property
    def model(self) -> nn.Module:
        """The model that was analysed.

        Raises:
            PlanError: if it is gone, as is that of a graph that a plan remembers once nobody else has it.
        """
        model = self.source.model()
        if model is None:
            raise PlanError("the model that was analysed is gone; analyse it again.")
        return model

    @property
    def whole(self) -> CouplingGraph:
        """The analysis of the network with all of its residual branches; this one where none is removed."""
        return self if self._before is None else self._before

    # -- what users read ------------------------------------------------------------------------

    @cached_property
    def branches(self) -> Mapping[str, Branch]:
        """By name the residual branches that can be removed as a whole: ``f`` in ``y = x + f(x)``."""
        return self._branches.found

    @cached_property
    def kept_additions(self) -> Mapping[str, str]:
        """By node, additions of something that is made of what it is added to, and why it cannot go."""
        return self._branches.refused

    @cached_property
    def _branches(self) -> Branches:
        return find_branches(self)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order of their first axis in the state dict."""
        return self._grouping.groups

    @cached_property
    def rows(self) -> tuple[RowSet, ...]:
        """What can be removed row by row: attention heads, groups of convolutions and group norms."""
        return self._grouping.rows

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        exact = sum(group.exact for group in self.groups)
        return (
            f"CouplingGraph({self.captured.class_name}: {len(self.groups)} groups ({exact} exact) of {units} "
            f"units, {len(self.frozen)} frozen axes)"
        )

    @cached_property
    def networkx(self) -> nx.Graph:
        """Axes and their couplings; edge attribute ``nodes`` lists the graph nodes that cause one."""
        import networkx as nx

        graph = nx.Graph()
        for state in self._states.values():
            for dim, label in enumerate(state.axes):
                if label is not None:
                    graph.add_node(Axis(state.name, dim), parameter=True, size=state.shape[dim])
        for a, b, node in self._run.coupler.edges:
            if a == b:
                continue
            if not graph.has_edge(a, b):
                graph.add_edge(a, b, nodes=[])
            if node is not None and node not in graph.edges[a, b]["nodes"]:
                graph.edges[a, b]["nodes"].append(node)
        return graph

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """Axes of parameters of which no index can be removed by itself, each with the reason.

        Axes of one index are left out; every other axis of a parameter is here or in a group.
        """
        grouping, coupler = self._grouping, self._run.coupler
        events = (*grouping.events, *grouping.row_events, *coupler.by_row)
        first = np.full(grouping.roots.size, -1, dtype=np.int64)
        for number in range(len(events) - 1, -1, -1):
            first[grouping.roots[events[number].ids]] = number
        by_row = {m.axis for rows in grouping.rows for m in rows.members if (m.units >= 0).any()}

        def why(state: State, dim: int) -> Event | None:
            """What keeps an axis, None where something of it can go."""
            axis, label = Axis(state.name, dim), state.axes[dim]
            if label is None:
                kept = state.kept.get(dim)
                return kept[0] if kept else Event(NONE, axis, None, "nothing reads it, or its size alone")
            classes = grouping.roots[label.ids]
            if grouping.prunable[classes].any():
                return None
            numbers = first[classes]
            numbers = numbers[numbers >= 0]
            event = events[int(np.bincount(numbers).argmax())] if numbers.size else None
            if axis in by_row:
                because = f": {event.reason}" if event is not None else ""
                reason = f"goes by whole rows alone (heads, groups; heads= removes them){because}"
                return Event(NONE, axis, event.node if event is not None else None, reason)
            return event or Event(NONE, axis, None, "meets an axis that cannot be narrowed")

        found = []
        for state in self._states.values():
            if isinstance(state.tensor, torch.nn.Parameter):
                for dim, size in enumerate(state.shape):
                    event = why(state, dim) if size > 1 else None
                    if event is not None:
                        at = event.node.name if event.node is not None else ""
                        source = describe_source(event.node)
                        found.append(Frozen(Axis(state.name, dim), event.reason, at, source, event.remedy))
        used = {id(state.tensor) for state in self._states.values()}
        for name, tensor in self.captured.program.tensors.items():
            if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in used:
                used.add(id(tensor))
                axes = [Axis(name, dim) for dim, size in enumerate(tensor.shape) if size > 1]
                found += [Frozen(axis, "no graph node uses this parameter", "", "", "") for axis in axes]
        return tuple(found)

    @cached_property
    def sizes(self) -> InputSizes:
        """Which sizes of the inputs are free, and which are pinned to those of the example, and why.

        Of batch, length, height and width; other sizes are those that the weights ask for. A result of
        this analysis raises :class:`~fxprune.errors.PinnedError` for other sizes than these, or
        fails as the model itself does.
        """
        return input_sizes(self.captured, self.other_sizes, self._refusals)

    @property
    def fill_outputs(self) -> Mapping[str, fx.Node]:
        """By name the outputs that hold zeros in place of what is removed, and the nodes that fill them."""
        outputs = self._run.outputs.get("", {})
        return {str(leaf): node for leaf, node in fills(self.captured.program).items() if leaf in outputs}

    @property
    def advice(self) -> str:
        """What would make much more removable, for people; empty where nothing is known that would.

        It names the outputs that keep layers wide which hold a tenth of the parameters or more; of several
        outputs not the first, which is taken for the result.
        """
        shaped = [leaf for leaf, value in self._run.outputs.get("", {}).items() if value.shape]
        beside = [leaf for leaf in shaped if leaf.path[:1] != shaped[0].path[:1]]
        outputs, entries = self._held_by_outputs(beside or shaped)
        parameters = {
            id(t): t.numel()
            for t in self.captured.program.tensors.values()
            if isinstance(t, torch.nn.Parameter)
        }
        share = entries / max(sum(parameters.values()), 1)
        if share < _MUCH:
            return ""
        given = repr(outputs[0] if len(outputs) == 1 else outputs).replace("'", '"')
        return (
            f"{share:.0%} of the parameters are in layers that stay as wide as what the model returns; "
            f"free_outputs={given} (--free-output, or auto) lets these outputs, and the layers with them, "
            f"become narrower, for code that can do with that; named in fill_outputs they hold zeros instead"
        )

    def _held_by_outputs(self, among: Collection[Leaf] | None = None) -> tuple[tuple[str, ...], int]:
        """Names of the outputs that keep several layers wide, and how many entries these layers have."""
        free = self.captured.program.free_outputs
        wide = {k: v for k, v in self._run.outputs.get("", {}).items() if not k.named(free)}
        among = wide if among is None else among
        found, entries = holding(wide, self._grouping, self._states.values(), among)
        return short_names(found, wide), entries

    def explain(self, name: str, dim: int) -> Explanation:
        """What goes with axis ``dim`` of the parameter ``name``, and which graph nodes cause it.

        To name the residual branches that hold it, the network is run on shapes once more, the first time.

        Raises:
            KeyError: if the graph uses no such parameter; suggests names that it does use.
        """
        found = self.goes_with(name, dim)
        tensors = self.captured.program.tensors
        held = {key for key, tensor in tensors.items() if tensor is tensors[name]}
        branches = tuple(branch for branch in self.branches.values() if held & set(branch.tensors))
        return replace(found, branches=branches)

    def goes_with(self, name: str, dim: int) -> Explanation:
        """As :meth:`explain`, without residual branches."""
        import difflib

        import networkx as nx

        aliases = {id(state.tensor): state.name for state in self._states.values()}
        tensor = self.captured.program.tensors.get(name)
        known = aliases.get(id(tensor)) if tensor is not None else None
        if known is None:
            close = difflib.get_close_matches(name, self._states, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise KeyError(f"no parameter or buffer named {name!r} is used by the graph{hint}")
        state = self._states[known]
        if not -len(state.shape) <= dim < len(state.shape):
            raise KeyError(f"{name} has {len(state.shape)} axes, so there is no axis {dim}")
        axis = Axis(known, dim % len(state.shape))
        groups = tuple(g for g in self.groups if any(m.axis == axis for m in g.members))
        paths: dict[Axis, tuple[Link, ...]] = {}
        reach = nx.single_source_shortest_path(self.networkx, axis) if axis in self.networkx else {}
        for group in groups:
            for member in group.members:
                if member.axis != axis and member.axis not in paths:
                    paths[member.axis] = self._links(reach.get(member.axis, []))
        frozen = next((f for f in self.frozen if f.axis == axis), None)
        return Explanation(axis, groups, paths, frozen)

    def _links(self, path: list[Axis]) -> tuple[Link, ...]:
        links = []
        for a, b in itertools.pairwise(path):
            nodes = self.networkx.edges[a, b]["nodes"]
            node = nodes[0] if nodes else None
            links.append(Link(b, a, node.name if node is not None else "", describe_source(node)))
        return tuple(links)

    def draw(self, path: str | Path) -> None:
        """Write a drawing of the network to an ``.svg`` file: its nodes, coloured by the groups that they
        carry.

        Raises:
            OutputError: if it cannot be written.
        """
        from ..pages import draw

        draw(self, path)

    def _repr_html_(self) -> str:
        from ..pages import graph_html

        return graph_html(self)

    def report(self) -> Report:
        """What can be removed and what cannot, with reasons and shares of the costs; printing it shows it."""
        from ..report import report

        return report(self)

    # -- what the later stages read -------------------------------------------------------------

    @property
    def inputs(self) -> list[Any]:
        """Meta tensors and values for the graph's placeholders, in order."""
        return self.captured.inputs

    @property
    def run(self) -> Run:
        return self._run

    def alive(self, removed: Mapping[str, Sequence[int]]) -> NDArray[np.bool_]:
        """For each class whether it survives the removal of these units, by group, ``(units,)``.

        A row goes when all of its units go, and what is indexed by row goes with it.
        """
        mask = np.ones(self._run.coupler.units.count, dtype=bool)
        loses_row = False
        for group in self.groups:
            gone = removed.get(group.name, ())
            if len(gone):
                mask[group.units[list(gone)]] = False
                left = mask[group.units]
                rows = [row for atoms in group.balance if len(atoms) > 1 for row in atoms]
                if rows and not loses_row:
                    starts = np.cumsum([0, *(row.size for row in rows[:-1])])
                    loses_row = not np.logical_or.reduceat(left[np.concatenate(rows)], starts).all()
        if loses_row:
            units = {group.name: group.units for group in self.groups}
            for row_set in self.rows:
                for row, classes in zip(row_set.rows, row_set.classes, strict=True):
                    if not any(mask[units[name][own]].any() for name, own in row.items()):
                        mask[classes] = False
        self._grouping.cells.inherit(np.logical_and, mask)
        return mask

    @property
    def cells(self) -> Cells:
        """Classes that go as soon as one of two others goes."""
        return self._grouping.cells

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """The rectangles that a removal has to respect."""
        return self._grouping.rectangles

    @property
    def states(self) -> Mapping[str, State]:
        """Parameters and buffers that the graph uses, by their first name."""
        return self._states

    def labels(self, tensor: torch.Tensor) -> list[Label | None]:
        """The labels of a tensor's axes; None where the graph does not use it."""
        if self._axes is None:
            self._axes = {id(state.tensor): state.axes for state in self._states.values()}
        known = self._axes.get(id(tensor))
        return [None] * tensor.dim() if known is None else known

    def uses(self, axis: Axis) -> tuple[Use, ...]:
        """The products that use an axis of a parameter or buffer, named as in :attr:`states`."""
        return tuple(self._run.coupler.uses.by_axis.get(axis, ()))

    def classes(self, ids: Ids) -> Ids:
        """The class of each unit."""
        found: Ids = self._grouping.roots[ids]
        return found

    def along(self, name: str) -> Ids:
        """Classes of the units that go where the dimension ``"view_3[2]"`` of a node becomes narrower."""
        match = _DIM.fullmatch(name)
        assert match is not None
        nodes = [node for node in self.captured.program.graph.nodes if node.name == match[1]]
        labels = [
            label
            for value in tree_values([self._run.values.get(node) for node in nodes])
            if int(match[2]) < len(value.shape)
            if (label := value.label(int(match[2]))) is not None
        ]
        classes = self.classes(np.concatenate([np.empty(0, np.int64), *(x.ids.reshape(-1) for x in labels)]))
        cells = [r.cells[np.isin(self.classes(r.rows), classes)].reshape(-1) for r in self.rectangles]
        return np.unique(np.concatenate([classes, *map(self.classes, cells)]))

    def tensor_names(self) -> dict[str, list[int]]:
        """Shape of every parameter and buffer, by name: the architecture as plain data."""
        return {name: list(tensor.shape) for name, tensor in self.captured.program.tensors.items()}


def _tie_beside(coupler: Coupler) -> None:
    """Where one row of a rectangle goes as a whole or not at all, so do all others: they stay as long."""
    tied = True
    while tied:
        tied = False
        for rectangle in coupler.rectangles:
            cells = coupler.units.find(rectangle.cells)
            whole = (cells == cells[:, :1]).all(axis=1)
            if cells.shape[1] > 1 and whole.any() and not whole.all():
                coupler.units.merge(rectangle.cells[:, :1], rectangle.cells)
                tied = bool((cells[~whole] != FIXED).any())


def _unpickled(data: bytes) -> CouplingGraph:
    state = pickle.loads(data)
    graph = object.__new__(CouplingGraph)
    graph.captured, graph.held, graph._run = state["captured"], state["held"], state["run"]
    graph.other_sizes, graph._refusals = state["other_sizes"]
    model, *rest = state["source"]
    graph.source = Source(lambda: model, *rest)
    graph._before, graph.removed_branches = state["before"], state["removed_branches"]
    graph._regroup()
    return graph


def tree_values(tree: Any) -> Iterator[Value]:
    """All :class:`Value` leaves of a node's outputs."""
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Value):
            yield leaf


__all__ = ["CouplingGraph", "Explanation", "Frozen", "Link", "tree_values"]
