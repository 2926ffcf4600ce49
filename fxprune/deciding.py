"""What is removed is decided in a loop: choose units, rewrite, look at the result, hold what does not hold.

A choice can fail for what only the rewritten graph shows: a number in a function that is called as a whole,
a line of the own class that wants the old width, a configuration that cannot say the new ones. Then the
nodes or axes that it failed at are held, or the function is traced into, and it is decided again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .analysis import analyzed
from .branches_in_class import StandIns, decodes_alike, find_stand_ins, same_graph, without_zeros
from .capture import recapture
from .capture.dynamo import takes_tensors
from .capture.numbers import Comparison
from .capture.symbolic import function_name
from .configurations import has_config, put_into_config, shapes_of, solve_configs
from .coupling.branches import Branch
from .coupling.graph import CouplingGraph
from .coupling.groups import Group
from .coupling.outputs import hold_zeros
from .errors import CaptureError, FxpruneError, PlanError, RewriteError, SelectionError
from .importance import score
from .importance.base import Scores
from .inputs import describe_inputs
from .own_class import Generation, InOwnClass, holds, left_behind, line_notes, marked_copy, rewrite_in_class
from .passes import Rewritten, rewrite
from .passes.check import Violation
from .passes.remove_branches import remove_branches, without_branches
from .planning.latency import Meter
from .planning.plan import PruningPlan
from .planning.select import Selected, repeated, select
from .planning.selection import Selection
from .planning.validate import unequal_rows
from .pretrained import computes_the_same, said_by_config
from .program import let_go, named_tensors

_ATTEMPTS = 100
_NO_MODULE = "no module that serves this branch alone gives what the code{} adds"
_COUNTED = "the decode step of generate() reads what this branch has put into the cache"


@dataclass(frozen=True)
class OwnClass:
    """What it takes to decide on a result in the model's own class.

    Attributes:
        model: the original.
        marked: a copy whose numbers remember their attributes; None where the result is a graph.
        questions: what the copy's code asks while it is captured.
        found: what :meth:`without` has found.
    """

    model: nn.Module
    marked: nn.Module | None
    questions: list[Comparison]
    found: dict[tuple[Branch, ...], tuple[StandIns, dict[str, str]]] = field(default_factory=dict)

    @staticmethod
    def of(into: str, model: nn.Module) -> OwnClass:
        if into == "graph" or not isinstance(model, nn.Module):
            return OwnClass(model, None, [])
        if takes_tensors(model):
            raise SelectionError(
                'into="module" needs the model that the graph was made from; a graph that takes its '
                "parameters as inputs has no class of its own. Prune that model instead."
            )
        return OwnClass(model, *marked_copy(model))

    @property
    def source(self) -> nn.Module:
        """What is captured."""
        return self.marked if self.marked is not None else self.model

    def rewritten(
        self, rewritten: Rewritten, args: tuple[Any, ...], kwargs: dict[str, Any], dissolved: frozenset[str]
    ) -> Rewritten:
        """``rewritten`` in the form that is asked for.

        Raises:
            PlanError: for a residual branch that cannot go in this form.
        """
        if self.marked is None:
            return rewritten
        graph = rewritten.narrowing.graph
        stand_ins, lost = self.without(graph, graph.removed_branches, args, kwargs, dissolved)
        if lost:
            raise PlanError(self.stays(*next(iter(lost.items()))))
        return rewrite_in_class(self.model, self.questions, rewritten, args, kwargs, dissolved, stand_ins)

    def without(
        self,
        graph: CouplingGraph,
        names: Collection[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dissolved: frozenset[str],
    ) -> tuple[StandIns, dict[str, str]]:
        """What takes the place of these branches in a copy of the model; why others of them stay."""
        if not names or self.marked is None:
            return StandIns(), {}
        captured = graph.whole.captured
        branches = tuple(branch for name, branch in graph.whole.branches.items() if name in names)

        def right(stand_ins: StandIns, gone: Sequence[Branch]) -> bool:
            reference = remove_branches(captured.program, gone)
            copied = marked_copy(self.model)[0]
            stand_ins.put_into(copied)
            names = {name for name, _ in named_tensors(copied)}
            if names.difference(stand_ins.tensors) != reference.tensors.keys():
                return False
            try:
                program = recapture(captured, copied, args, kwargs, dissolved)
                program = without_zeros(program, reference, graph.whole.inputs)
            except FxpruneError:
                return False
            return same_graph(program.graph, reference.graph)

        if branches not in self.found:
            found, lost = find_stand_ins(self.model, branches, args, kwargs, right)
            reasons = {
                branch.name: _NO_MODULE.format(f" at {branch.source}" if branch.source else "")
                for branch in lost
            }
            if not decodes_alike(self.model, found, args, kwargs):
                for branch in branches:
                    alone, _ = find_stand_ins(self.model, [branch], args, kwargs, lambda *_: True)
                    if not decodes_alike(self.model, alone, args, kwargs):
                        reasons[branch.name] = _COUNTED
            self.found[branches] = found, reasons
        return self.found[branches]

    def stays(self, name: str, reason: str) -> str:
        """What to say of a residual branch that cannot go from the model's own class."""
        form = f"{type(self.model).__name__} in its own class"
        return f'{name} cannot go from {form}: {reason}. into="graph" removes it.'


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for.

    Attributes:
        selection: what is to go.
        own: the form of the result.
        model: the user's model.
        args: positional inputs of the example.
        kwargs: keyword inputs of the example.
    """

    selection: Selection
    own: OwnClass
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def meter(self, owner: nn.Module) -> Meter | None:
        """What holds a latency against the clock, where the budget has one."""
        budget = self.selection.budget
        if budget is None or budget.latency is None:
            return None
        return Meter(owner, self.args, self.kwargs, budget.latency, budget.compiled, budget.table)


Decided = tuple[PruningPlan, CouplingGraph, Rewritten]
"""A plan, the analysis that it is for, and what it rewrites."""


class Decision:
    """The loop for one network.

    Args:
        asked: what the plan is asked for.
        graph: the analysis to decide with.
        earlier: scores for another analysis of the same network, so that data are gone through once.
    """

    def __init__(
        self, asked: Asked, graph: CouplingGraph, earlier: Callable[[Group], Scores] | None = None
    ) -> None:
        self.asked, self.graph = asked, graph
        self.selection, self.own = asked.selection, asked.own
        self.dissolved = graph.source.dissolved
        self.owner = owner_of(graph, asked.model)
        self.meter = asked.meter(self.owner)
        removed = graph.removed_branches
        program = graph.captured.program
        self.scored = program.module().train(asked.model.training) if removed else self.owner
        self.scores = self._score(earlier)
        self.generating: Generation | None = None
        self.notes: list[str] = []
        if self.own.marked is not None:
            self.generating, note = Generation.of(asked.model, asked.args, asked.kwargs)
            self.notes += [note] if note else []
        self.config: dict[str, int] = {}
        self.ties: set[tuple[str, ...]] = set()
        self.failed = Violation("", "")  # the last thing that did not hold

    def run(self) -> Decided:
        """Decide until all holds.

        Raises:
            RewriteError: if it does not, however much is held.
            RatioError, SelectionError, BudgetError, ImportanceError: for what cannot be met.
        """
        for _ in range(_ATTEMPTS):
            selected = select(
                self.graph, self.selection, self.scores, self.owner, self.meter, sorted(self.ties)
            )
            narrows = any(selected.removed.values())
            rewritten = self._rewritten(selected)
            if self.own.marked is not None and not rewritten.violations:
                rewritten = self._in_class(rewritten)
                if self._tie(rewritten):
                    continue
                if narrows and rewritten.violations:
                    self._hold_lines(rewritten)
                    continue
                if self._hold_unfit(selected, rewritten):
                    continue
            if narrows and rewritten.violations:
                self.failed = rewritten.violations[0]
                if not self._open(rewritten):
                    self._hold(self.failed)
            elif self._fast_enough(selected, rewritten):
                return self._plan(selected, rewritten), self.graph, rewritten
        raise RewriteError(
            f"the graph could not be rewritten at node {self.failed.node}: {self.failed.reason}."
        )

    def _fast_enough(self, selected: Selected, rewritten: Rewritten) -> bool:
        if self.meter is None:
            return True
        with rewritten.materialized() as narrow:
            return self.meter.accepts(selected.left["latency"], narrow)

    def _score(self, earlier: Callable[[Group], Scores] | None) -> Callable[[Group], Scores]:
        return score(self.graph, self.selection.importance, self.selection.seed, self.scored, earlier)

    def _rewritten(self, selected: Selected) -> Rewritten:
        """The graph without what is removed; rows that are not equally long any more are a violation."""
        rewritten = rewrite(self.graph, selected.removed)
        unequal = unequal_rows(self.graph, selected.removed) if not rewritten.violations else None
        return replace(rewritten, violations=(Violation(*unequal[:2]),)) if unequal is not None else rewritten

    def _in_class(self, rewritten: Rewritten) -> Rewritten:
        """The same in the model's own class."""
        return self.own.rewritten(rewritten, self.asked.args, self.asked.kwargs, self.dissolved)

    def _tie(self, rewritten: Rewritten) -> bool:
        """Let groups that the code links lose the same share; whether there are any that do not yet."""
        new = {v.ties: v for v in rewritten.violations if v.ties and v.ties not in self.ties}
        if not new:
            return False
        self.ties |= new.keys()
        tied = {name: violation for names, violation in new.items() for name in names}
        self.notes += line_notes(self.graph.captured.program, tied, tied=True)
        return True

    def _hold_lines(self, rewritten: Rewritten) -> None:
        """Hold what the lines at fault read; where all that may stay does, the nodes themselves."""
        program = self.graph.captured.program
        found = holds(program, rewritten.narrowing, rewritten.violations)
        held = found.keys() - set(self.graph.held)
        if not held:
            held = set().union(*(_around(self.graph, name.partition("[")[0]) for name in found))
        self.notes += line_notes(program, {name: v for name, v in found.items() if name in held} or found)
        self.graph, self.failed = self.graph.hold(set(held)), rewritten.violations[0]

    def _hold_unfit(self, selected: Selected, rewritten: Rewritten) -> bool:
        """Hold what the class, or its configuration, does not take; whether there is anything."""
        unfit, why = self._unfit(selected.removed, rewritten)
        if not unfit:
            return False
        self.notes.append(f"{', '.join(sorted(unfit)[:3])} and all alike stay whole: {why}")
        self.graph, self.failed = self.graph.hold(unfit), Violation("", why)
        return True

    def _unfit(self, removed: Mapping[str, Sequence[int]], rewritten: Rewritten) -> tuple[set[str], str]:
        """Axes of the groups that fail by themselves, and why. None where all of what is removed passes."""
        self.config = {}
        reason = self._wrong(rewritten) if any(removed.values()) else ""
        if not reason:
            return set(), ""
        alike = {group.name: repeated(group) for group in self.graph.groups}
        unfit = set()
        for kind in {alike[name] for name, units in removed.items() if units}:
            part = {name: units for name, units in removed.items() if alike[name] == kind}
            alone = self._in_class(rewrite(self.graph, part))
            failed = alone.violations[0].reason if alone.violations else self._wrong(alone)
            if failed:
                unfit |= {name.rpartition("]")[0] + "]" for name in part}
                reason = failed
        if not unfit:  # each passes, but not all of them together
            unfit = {name.rpartition("]")[0] + "]" for name, units in removed.items() if units}
        return unfit, reason

    def _wrong(self, found: Rewritten) -> str:
        """What is wrong with a result in the model's own class, or nothing."""
        assert isinstance(found, InOwnClass)
        said = self.generating.fails(found) if self.generating is not None else ""
        if not said and self.selection.uniform:
            said, self.config = _by_config(self.own.model, self.asked.args, self.asked.kwargs, found)
        return said

    def _open(self, rewritten: Rewritten) -> bool:
        """Trace into the functions at fault, in which the widths are numbers; whether that is possible."""
        whole = {name for v in rewritten.violations if (name := called_function(self.graph, v.node))}
        whole -= self.dissolved
        if not whole:
            return False
        graph = self.graph
        try:
            opened = analyzed(
                self.own.source,
                self.asked.args,
                self.asked.kwargs,
                self.dissolved | whole,
                graph.captured.regions,
                graph.captured.program.free_outputs,
                tuple(graph.fill_outputs),
            )
        except CaptureError as refusal:
            self.notes.append(f"could not trace into {', '.join(sorted(whole))}: {refusal}")
            return False
        opened = without_branches(opened, graph.removed_branches)
        self.graph = opened.hold(set(graph.held)) if graph.held else opened
        self.dissolved |= whole
        self.scores = self._score(self.scores)
        return True

    def _hold(self, violation: Violation) -> None:
        """Hold the node that could not be rewritten."""
        self.notes.append(f"held node {violation.node}, which could not be rewritten: {violation.reason}")
        self.graph = self.graph.hold(_around(self.graph, violation.node))

    def _plan(self, selected: Selected, rewritten: Rewritten) -> PruningPlan:
        """The plan of what is removed, and all that is to be said of it."""
        graph, selection, meter = self.graph, self.selection, self.meter
        program = graph.captured.program
        settings = dict(selection.settings())
        if selected.left:
            settings["left"] = dict(selected.left)
        if meter is not None:
            settings["measured"] = meter.measured
        return PruningPlan(
            model=graph.captured.class_name,
            inputs=describe_inputs(self.asked.args, self.asked.kwargs, program.reads_values),
            shapes=graph.whole.tensor_names(),
            branches=graph.removed_branches,
            sizes={group.name: group.size for group in graph.groups},
            removed=selected.removed,
            held=graph.held,
            dissolved=tuple(sorted(self.dissolved)),
            free_outputs=program.free_outputs,
            fill_outputs=tuple(graph.fill_outputs),
            into=selection.into,
            regions=graph.captured.regions,
            notes=tuple(filter(None, self._said(selected, rewritten))),
            settings=settings,
            config=self.config,
        )

    def _said(self, selected: Selected, rewritten: Rewritten) -> list[str]:
        """The notes, what matters most first."""
        graph = self.graph
        # What runs in the model's own class has its own code, which takes what it took.
        sizes = graph.sizes if self.selection.into == "graph" and not graph.sizes.free else None
        of_inputs = f"sizes of the inputs: {sizes}" if sizes is not None else ""
        pinned = sizes is not None and bool(sizes.pinned)
        filled = graph.fill_outputs.items()
        zeros = [name for name, node in filled if rewritten.narrowing.changed(node.args[0])]
        behind = (
            left_behind(self.own.model, graph.whole.states, rewritten.attributes)
            if isinstance(rewritten, InOwnClass) and any(selected.removed.values())
            else []
        )
        return [
            of_inputs if pinned else "",
            *graph.captured.notes,
            *selected.notes,
            *dict.fromkeys([*self.notes, *rewritten.notes]),
            *behind,
            self.meter.note if self.meter is not None else "",
            hold_zeros(zeros),
            graph.advice,
            "" if pinned else of_inputs,
        ]


def owner_of(graph: CouplingGraph, model: nn.Module) -> nn.Module:
    """What is run for gradients and activations: with its parameters as its own, a graph can be, too."""
    return graph.whole.captured.program.module() if takes_tensors(model) else model


def _by_config(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: InOwnClass
) -> tuple[str, dict[str, int]]:
    """Why no configuration of the model's class says what ``found`` is, and the integers of one that does.

    The former is empty where one does, or where the class has no configuration; the latter where the network
    was not run with that configuration as its own, or computes something else with it.
    """
    if not has_config(model):
        return "", {}
    without_values = found.on_meta()
    solved, reason = solve_configs(without_values, shapes_of(without_values))
    first = next(solved, None)
    if first is None:
        return reason(), {}
    if any(tensor.is_meta for tensor in model.state_dict().values()):  # shapes alone
        return "", {}
    with found.materialized() as narrow:
        values, twin, why = said_by_config(narrow, args, kwargs, (itertools.chain([first], solved), reason))
        if values is None:
            return why, {}
        same = put_into_config(narrow, values) and computes_the_same(narrow, twin, args, kwargs)
        let_go(twin)
        return "", values if same else {}


def _around(graph: CouplingGraph, name: str) -> set[str]:
    """The node ``name``; where it is held already, the nodes around all held ones; in the end, all nodes."""
    if name not in graph.held:
        return {name}
    nodes = graph.captured.program.graph.nodes
    near = {n.name for node in nodes if node.name in graph.held for n in (*node.all_input_nodes, *node.users)}
    return near if not near <= set(graph.held) else {node.name for node in nodes}


def called_function(graph: CouplingGraph, name: str) -> str | None:
    """Name of the Python function that the node ``name`` calls as a whole, if it does."""
    node = next((n for n in graph.captured.program.graph.nodes if n.name == name), None)
    return function_name(node.target) if node is not None and node.op == "call_function" else None


__all__ = ["Asked", "Decided", "Decision", "OwnClass", "called_function", "owner_of"]
