"""The stages composed: analyze, plan, prune, apply."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .calls import CALLS
from .capture import Captured, capture
from .capture.dynamo import named_inputs, takes_tensors
from .capture.numbers import Comparison
from .capture.patches import without_collector
from .capture.symbolic import function_name
from .compensation import Pick, Reconstruction, compensated
from .compensation.depth import Depth, Judge, Order, saved
from .configurations import has_config, solve_config
from .coupling.branches import Branch
from .coupling.graph import WHOLE_ROWS, CouplingGraph, Source
from .coupling.groups import Group
from .coupling.outputs import fill, hold_zeros
from .errors import CaptureError, PlanError, RewriteError, SelectionError
from .importance import score
from .importance.base import Scores
from .inputs import describe_inputs, in_dtype_of, normalize, restore_inputs, to_meta
from .origins import remember
from .own_class import Generation, holds, line_notes, marked_copy, rewrite_in_class
from .passes import Rewritten, rewrite
from .passes.check import Violation
from .passes.remove_branches import unknown, without_branches
from .planning.budget import Budget
from .planning.cost_model import CostModel
from .planning.latency import Meter
from .planning.patterns import Names, nearest
from .planning.plan import Problem, PruningPlan
from .planning.plan_diff import architectures, listed
from .planning.select import repeated, select
from .planning.selection import AUTO, Selection, output_names, takes_selection
from .planning.validate import check_balance, problems, unequal_rows
from .pretrained import said_by_config
from .reuse import analysis_of, link, rewritten_by

_ATTEMPTS = 100

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _stage(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run outside of inference mode, and with Python's cycle collector at rest.

    Parameters made in inference mode could not be trained. The analysis allocates many small objects
    at once, and looking for cycles among them takes up to a third of its time.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with without_collector(), torch.inference_mode(False):
            return function(*args, **kwargs)

    return run


@_stage
def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    free_outputs: str | Sequence[str] = (),
    fill_outputs: str | Sequence[str] = AUTO,
) -> CouplingGraph:
    """Find out what can be removed from ``model`` together, and what cannot be removed.

    Runs on shapes alone: the model may live on the meta device.

    Args:
        model: any module that can be captured; it is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        free_outputs: outputs that may become narrower, for code that can do with that; all others keep their
            widths. By name: ``"encoder_last_hidden_state"``, ``"hidden_states.*"``, ``"2"`` in a tuple,
            ``"output"`` where there is but one; the name of a tree stands for all in it. ``"auto"`` means
            those that keep several layers wide, as ``graph.advice`` names them.
        fill_outputs: outputs that keep their shape and hold zeros in place of what was removed, as those of
            the original with these weights at zero do. By name, as before. ``"auto"`` means what is returned
            beside the result and keeps several layers wide: in an output class with named fields, those after
            the first that the network itself goes on with (``encoder_last_hidden_state``). All others
            stay whole.

    Raises:
        CaptureError: if the model cannot be turned into a graph.
        ExampleInputsError: if the inputs do not fit it.
        SelectionError: if the model has no such output; names the nearest.
    """
    args, kwargs = normalize(example_inputs, several=True)
    return _explored(model, args, kwargs, free_outputs, fill_outputs)


def _explored(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free_outputs: str | Sequence[str],
    fill_outputs: str | Sequence[str],
) -> CouplingGraph:
    """As :func:`analyze`."""
    describe_inputs(args, kwargs)  # a plan could not be made for others
    free, zeros = output_names("free_outputs", free_outputs), output_names("fill_outputs", fill_outputs)
    named = (tuple(name for name in names if name != AUTO) for names in (free, zeros))
    graph = _analyze(model, args, kwargs, frozenset(), None, *named)
    graph = graph.freed() if AUTO in free else graph
    graph = graph.filled() if AUTO in zeros else graph
    return graph.keep(model, args, kwargs)


def _analyze(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str] = frozenset(),
    regions: Mapping[str, Any] | None = None,
    free_outputs: tuple[str, ...] = (),
    fill_outputs: tuple[str, ...] = (),
) -> CouplingGraph:
    graphs: list[CouplingGraph] = []

    def accept(captured: Captured) -> None:
        source = Source(weakref.ref(model), to_meta(args), to_meta(kwargs), dissolve)
        program = replace(captured.program, free_outputs=free_outputs)
        if fill_outputs and not captured.regions:
            program = fill(program, fill_outputs)
        graphs.append(CouplingGraph(replace(captured, program=program), source))

    capture(model, args, kwargs, dissolve, regions, accept)
    graph = graphs[-1]
    for option, pattern in [
        *(("free_outputs", name) for name in free_outputs),
        *(("fill_outputs", name) for name in fill_outputs),
    ]:
        if graph.captured.regions:
            raise SelectionError(
                f"{option} names {pattern!r}, but {graph.captured.class_name} could be captured in "
                f"parts only, and its outputs are made by the code around them."
            )
        outputs = graph.run.outputs[""]
        if not any(leaf.named([pattern]) for leaf in outputs):
            close = ", ".join(map(repr, nearest(pattern, map(str, outputs))))
            raise SelectionError(
                f"{option} names {pattern!r}, and there is no such output; the nearest are {close}."
            )
    return graph


@takes_selection(Selection)
@_stage
def plan(model: nn.Module | CouplingGraph, example_inputs: Any, selection: Selection) -> PruningPlan:
    """Decide what to remove. The same arguments give the same plan.

        plan = fxprune.plan(model, x, 0.5, "l1", scope="global")
        plan = fxprune.plan(model, x, fxprune.Selection(0.5, "l1", scope="global"))  # the same
        plan = fxprune.plan(fxprune.analyze(model, x), 0.5, "l1", scope="global")  # and again

    Args:
        model: the model to prune; it is not changed. Or what :func:`analyze` gave, in place of the model and
            its inputs.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        selection: a :class:`Selection`, or its arguments in place of it.

    Raises:
        RatioError, SelectionError, BudgetError, ImportanceError, CaptureError, ExampleInputsError: for
            bad arguments; names the nearest valid choice.
    """
    made, graph, rewritten = _plan(model, example_inputs, selection)
    if selection.into == "graph":  # else what was analysed is a copy
        link(made, graph.model, graph, rewritten)
    return made


@takes_selection(Selection)
@_stage
def prune(model: nn.Module | CouplingGraph, example_inputs: Any, selection: Selection) -> nn.Module:
    """A narrower copy of ``model``; arguments as for :func:`plan`.

    It is a ``torch.fx.GraphModule`` where the model could be captured as a whole. Where only parts of it
    could, it is a module of the model's own type, in which those parts run as graphs. Either way the
    result's ``meta["fxprune"]`` holds the :class:`~fxprune.planning.plan.PruningPlan`. With
    ``into="module"`` it is a module of the model's own class, whose ``forward`` and other methods are the
    user's own.

    With calibration data (``calibrate``) the layers that are left make up for what went, as by
    :func:`compensate`.
    """
    made, _, rewritten = _plan(model, example_inputs, selection)
    module = _finish(model_of(model), made, rewritten)
    if selection.calibrate is not None:
        graph = rewritten.narrowing.graph
        data, pick = selection.calibrate, selection.pick
        _compensate(module, graph, made, data, pick, selection.rebuild, selection.seed)
    return module


@_stage
def compensate(
    pruned: nn.Module | PruningPlan,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    pick: Pick | None = None,
    least_squares: bool = True,
    rebuild: int = 0,
    seed: int = 0,
) -> nn.Module:
    """A copy of ``pruned`` in which the layers that are left make up for what went.

    Needs inputs, but no labels, and does not train. Layer after layer, in the order of the graph, the weights
    are found that bring the outputs nearest to those of the original, by least squares over all batches, from
    what the layer reads in the narrowed network; with a ridge towards the weights as they are, whose strength
    is that which does best on calibration data that are held out. A layer for which nothing is better there
    stays as it was. Means go into biases and running means; where a layer keeps its weights, its batch
    normalisation is measured again. The result's ``meta["compensation"]`` holds the
    :class:`~fxprune.compensation.Compensation`: what was done, and what it brought.

    Each node of both networks is run once for each batch, and memory does not grow with the number of
    batches.

    Args:
        pruned: what :func:`prune` or :meth:`PruningPlan.apply` gave, trained further or not; or a plan, which
            is applied first. It is not changed.
        model: the original model; not changed.
        batches: as ``calibrate`` of :class:`Selection`; gone through once.
        pick: as for :class:`Selection`.
        least_squares: change weights; if not, only biases and statistics of batch normalisations.
        rebuild: as for :class:`Selection`.
        seed: for the positions of large inputs that are looked at.

    Raises:
        CalibrationError: for data that are empty, used up, or do not fit the model.
        PlanError: if the plan does not belong to the model, or there is none.
    """
    made = pruned if isinstance(pruned, PruningPlan) else getattr(pruned, "meta", {}).get("fxprune")
    if not isinstance(made, PruningPlan):
        raise PlanError(
            f"compensate takes what fxprune.prune or plan.apply returned, which holds its plan, or a plan; "
            f"got {type(pruned).__name__}."
        )
    module = made.apply(model) if isinstance(pruned, PruningPlan) else copy.deepcopy(pruned)
    _compensate(module, graph_for(made, model), made, batches, pick, rebuild, seed, least_squares)
    return module


def _compensate(
    module: nn.Module,
    graph: CouplingGraph,
    made: PruningPlan,
    batches: Iterable[Any],
    pick: Pick | None,
    rebuild: int,
    seed: int,
    least_squares: bool = True,
) -> None:
    found = compensated(module, graph, made.removed, batches, pick, least_squares, rebuild, seed)
    meta = getattr(module, "meta", {})
    if isinstance(meta, dict):
        module.meta = {**meta, "compensation": found}  # type: ignore[assignment]


@_stage
def apply(made: PruningPlan, given: nn.Module | CouplingGraph) -> nn.Module:
    """See :meth:`PruningPlan.apply`."""
    model = model_of(given)
    rewritten = rewritten_by(made, model) if made.into == "graph" else None
    if rewritten is None:
        own = _OwnClass.of(made.into, model)
        rewritten = rewrite(graph_for(made, given if own.marked is None else own.source), made.removed)
        if not rewritten.violations:
            args, kwargs = restore_inputs(in_dtype_of(model, made.inputs))
            rewritten = own.rewritten(rewritten, args, kwargs, frozenset(made.dissolved))
    if rewritten.violations:
        first = rewritten.violations[0]
        raise PlanError(
            f"the plan cannot be carried out: node {first.node}: {first.reason}. If it was edited, see that "
            f"all rows of a balanced set lose equally many units; otherwise plan again for this model."
        )
    return _finish(model, made, rewritten)


def model_of(given: nn.Module | CouplingGraph) -> nn.Module:
    """A model, where its analysis may stand in its place."""
    return given.model if isinstance(given, CouplingGraph) else given


def graph_for(made: PruningPlan, given: nn.Module | CouplingGraph) -> CouplingGraph:
    """The analysis that ``made`` refers to, of a model or of what was analysed before.

    Raises:
        PlanError: if the plan does not fit the model, or removes what is not there.
    """
    made.validate()
    graph = graph_of(made, given)
    sizes = {group.name: group.size for group in graph.groups}
    for name in made.removed:
        if sizes.get(name) != made.sizes.get(name):
            raise PlanError(
                f"the plan has {made.sizes.get(name)} units in the group {name!r}, this model has "
                f"{sizes.get(name, 'no such group')}. Plan again for this model."
            )
    check_balance(graph, made.removed)
    return graph


def graph_of(made: PruningPlan, given: nn.Module | CouplingGraph) -> CouplingGraph:
    """As :func:`graph_for`, whatever it is that the plan removes."""
    model = model_of(given)
    _check_architecture(made, model)
    known = given if isinstance(given, CouplingGraph) else analysis_of(made, model)
    if known is not None and _serves(known, made):
        known = without_branches(known, made.branches)
        return known.hold(set(made.held)) if made.held != known.held else known
    args, kwargs = restore_inputs(in_dtype_of(model, made.inputs))
    regions = {path: in_dtype_of(model, region) for path, region in made.regions.items()}
    dissolved = frozenset(made.dissolved)
    free, zeros = tuple(made.free_outputs), tuple(made.fill_outputs)
    graph = without_branches(_analyze(model, args, kwargs, dissolved, regions, free, zeros), made.branches)
    return graph.hold(set(made.held)) if made.held else graph


def _serves(graph: CouplingGraph, made: PruningPlan) -> bool:
    """Whether a plan can be read as one for this analysis, with further nodes held."""
    program, dissolved = graph.captured.program, set(made.dissolved)
    nodes = graph.whole.captured.program.graph.nodes
    unopened = dissolved - graph.source.dissolved
    return (
        set(graph.held) <= set(made.held)
        and tuple(program.free_outputs) == tuple(made.free_outputs)
        and tuple(graph.fill_outputs) == tuple(made.fill_outputs)
        and graph.captured.regions == made.regions
        and graph.source.dissolved <= dissolved
        and not (unopened and any(_function(graph, node.name) in unopened for node in nodes))
    )


@_stage
def check(made: PruningPlan, model: nn.Module | CouplingGraph) -> tuple[Problem, ...]:
    """See :meth:`PruningPlan.check`."""
    try:
        graph = model if isinstance(model, CouplingGraph) else graph_of(made, model)
    except PlanError as error:
        return (Problem("", str(error)),)
    return tuple(problems(made, graph))


def _analyzed(
    given: nn.Module | CouplingGraph, example_inputs: Any, selection: Selection, own: _OwnClass
) -> CouplingGraph:
    """The analysis to plan for, and its inputs."""
    free, zeros = selection.free_outputs, selection.fill_outputs
    if isinstance(given, CouplingGraph):
        for option, default in (("free_outputs", ()), ("fill_outputs", (AUTO,))):
            if getattr(selection, option) != default:
                raise SelectionError(
                    f"{option} is given to fxprune.analyze, which has made this CouplingGraph."
                )
        if own.marked is None:
            return given
        args, kwargs, free = given.source.args, given.source.kwargs, given.captured.program.free_outputs
    else:
        args, kwargs = normalize(example_inputs, several=True)
    if own.marked is not None:
        zeros = ()  # its own code returns what it returns
    return _explored(own.source, args, kwargs, free, zeros)


_Decided = tuple[PruningPlan, CouplingGraph, Rewritten]
"""A plan, the analysis that it is for, and what it rewrites."""


def _plan(given: nn.Module | CouplingGraph, example_inputs: Any, selection: Selection) -> _Decided:
    """The plan, the analysis that it is for, and what it rewrites."""
    selection = resolved(selection)
    model = model_of(given)
    own = _OwnClass.of(selection.into, model)
    analyzed = _analyzed(given, example_inputs, selection, own)
    args, kwargs = analyzed.source.args, analyzed.source.kwargs
    if CALLS in kwargs and own.marked is None:
        raise SelectionError(
            'several calls need into="module": a graph makes one. Give that, or the inputs of one call.'
        )
    graph = analyzed.loose()
    graph = graph.hold({WHOLE_ROWS}) if selection.uniform else graph
    names = _branches(selection, own, graph)
    asked = _Asked(selection, own, model, args, kwargs)
    if selection.depth and selection.budget is not None:
        return _deep(asked, graph, names)
    return _decided(asked, without_branches(graph, names))[0]


@dataclass(frozen=True)
class _Asked:
    """What a plan is asked for.

    Attributes:
        selection: what is to go.
        own: the form of the result.
        model: the user's model.
        args: positional inputs of the example.
        kwargs: keyword inputs of the example.
    """

    selection: Selection
    own: _OwnClass
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def meter(self, owner: nn.Module) -> Meter | None:
        """What holds a latency against the clock, where the budget has one."""
        return _meter(owner, self.args, self.kwargs, self.selection.budget)


def _deep(asked: _Asked, graph: CouplingGraph, names: tuple[str, ...]) -> _Decided:
    """As :func:`_decided`, with the number of residual branches for which the least is lost."""
    selection = asked.selection
    fixed = [graph.branches[name] for name in names]
    owner = _owner(graph, asked.model)
    may_go = _may_go(selection, owner, graph, names)
    assert selection.budget is not None
    share = saved(CostModel(graph), selection.budget, asked.meter(owner))
    if not any(map(share, may_go.values())):  # no branch can go, or nothing has to
        return _decided(asked, without_branches(graph, names))[0]
    judge = Judge(graph, selection.calibrate or (), selection.pick, selection.seed)
    scores: Callable[[Group], Scores] | None = None

    def decide(more: list[str]) -> _Decided:
        nonlocal scores
        left = without_branches(graph, (*names, *more))
        found, scores = _decided(asked, left, scores)
        return found

    def loss(found: _Decided) -> float:
        made, left, rewritten = found
        return judge.narrowed(rewritten.materialize(), left, made.removed)

    most = len(may_go) if selection.depth is True else int(selection.depth)
    search = Depth(Order(judge, may_go, fixed, share), most, decide, loss)
    made, left, rewritten = search.run()
    made = replace(made, notes=(*made.notes, search.note), settings={**made.settings, **search.settings})
    return made, left, rewritten


def _may_go(
    selection: Selection, owner: nn.Module, graph: CouplingGraph, names: Collection[str]
) -> dict[str, Branch]:
    """The residual branches that may go besides those in ``names``."""
    scopes = [part for key in selection.scopes for part in (key if isinstance(key, tuple) else (key,))]
    named = {"keep": selection.kept, "ratios": selection.ratios, "scopes": scopes}
    layers = Names(owner, graph) if any(named.values()) else None
    if layers is not None:
        for what, patterns in named.items():
            for pattern in patterns:
                layers.groups(pattern, what)  # refuses what is no pattern, or means nothing
    apart = [pattern for patterns in named.values() for pattern in patterns]
    where = selection.where
    kept = [group for group in graph.groups if where is not None and not where(group)]
    staying = [{member.axis.name for member in group.members if member.trainable} for group in kept]
    gone = {node for name in names for node in graph.branches[name].nodes}
    return {
        name: branch
        for name, branch in graph.branches.items()
        if name not in names
        and branch.addition not in gone
        and not any(own <= set(branch.tensors) for own in staying)
        and not (layers and any(layers.means(p, t) for p in apart for t in branch.tensors))
    }


def _owner(graph: CouplingGraph, model: nn.Module) -> nn.Module:
    """What is run for gradients and activations: with its parameters as its own, a graph can be, too."""
    return graph.whole.captured.program.module() if takes_tensors(model) else model


def _decided(
    asked: _Asked, graph: CouplingGraph, earlier: Callable[[Group], Scores] | None = None
) -> tuple[_Decided, Callable[[Group], Scores]]:
    """What to remove from the network of ``graph``, and the scores that say so.

    ``earlier`` are scores for another analysis of it, so that data are gone through once.
    """
    selection, own, model = asked.selection, asked.own, asked.model
    args, kwargs = asked.args, asked.kwargs
    importance, seed = selection.importance, selection.seed
    dissolved = graph.source.dissolved
    generating, note = Generation.of(model, args, kwargs) if own.marked is not None else (None, "")
    notes = [note] if note else []
    owner = _owner(graph, model)
    meter = asked.meter(owner)
    without = graph.captured.program.module().train(model.training) if graph.removed_branches else owner
    scores = score(graph, importance, seed, without, earlier)
    ties: set[tuple[str, ...]] = set()
    for _ in range(_ATTEMPTS):
        selected = select(graph, selection, scores, owner, meter, sorted(ties))
        rewritten = rewrite(graph, selected.removed)
        unequal = unequal_rows(graph, selected.removed) if not rewritten.violations else None
        if unequal is not None:
            rewritten = replace(rewritten, violations=(Violation(*unequal[:2]),))
        if not rewritten.violations and own.marked is not None:
            rewritten = own.rewritten(rewritten, args, kwargs, dissolved)
            new = {v.ties: v for v in rewritten.violations if v.ties and v.ties not in ties}
            if new:
                ties |= new.keys()
                tied = {name: violation for names, violation in new.items() for name in names}
                notes += line_notes(graph.captured.program, tied, tied=True)
                continue
            if rewritten.violations and any(selected.removed.values()):
                program = graph.captured.program
                found = holds(program, rewritten.narrowing, rewritten.violations)
                held = found.keys() - set(graph.held)
                if not held:  # of these dimensions all that may stay does; now the nodes themselves
                    held = set().union(*(_around(graph, name.partition("[")[0]) for name in found))
                notes += line_notes(program, {name: v for name, v in found.items() if name in held} or found)
                graph, first = graph.hold(set(held)), rewritten.violations[0]
                continue
            tests = [generating.fails] if generating is not None else []
            if selection.uniform:
                tests.append(partial(_unsaid, own.model, args, kwargs))
            unfit, why = _unfit(own, graph, selected.removed, rewritten, tests, args, kwargs, dissolved)
            if unfit:
                notes.append(f"{', '.join(sorted(unfit)[:3])} and all alike stay whole: {why}")
                graph, first = graph.hold(unfit), Violation("", why)
                continue
        if not rewritten.violations or not any(selected.removed.values()):  # nothing narrower, nothing wrong
            if meter is None or meter.accepts(selected.left["latency"], rewritten.materialize()):
                break
            continue
        whole = {name for v in rewritten.violations if (name := _function(graph, v.node))} - dissolved
        if whole:
            # The widths are numbers inside these functions: trace into them, then decide again.
            try:
                opened = _analyze(
                    own.source,
                    args,
                    kwargs,
                    dissolved | whole,
                    graph.captured.regions,
                    graph.captured.program.free_outputs,
                    tuple(graph.fill_outputs),
                )
            except CaptureError as refusal:
                notes.append(f"could not trace into {', '.join(sorted(whole))}: {refusal}")
                opened = None
            if opened is not None:
                opened = without_branches(opened, graph.removed_branches)
                graph, dissolved = opened.hold(set(graph.held)) if graph.held else opened, dissolved | whole
                scores = score(graph, importance, seed, without, scores)
                continue
        first = rewritten.violations[0]
        notes.append(f"held node {first.node}, which could not be rewritten: {first.reason}")
        graph = graph.hold(_around(graph, first.node))
    else:
        raise RewriteError(f"the graph could not be rewritten at node {first.node}: {first.reason}.")
    # What runs in the model's own class has its own code, which takes what it took.
    sizes = graph.sizes if selection.into == "graph" and not graph.sizes.free else None
    said = [
        f"sizes of the inputs: {sizes}" if sizes is not None and sizes.pinned else "",
        *graph.captured.notes,
        *selected.notes,
        *dict.fromkeys([*notes, *rewritten.notes]),
        meter.note if meter is not None else "",
    ]
    filled = graph.fill_outputs.items()
    zeros = [name for name, node in filled if rewritten.narrowing.changed(node.args[0])]
    said += [hold_zeros(zeros), graph.advice]
    said += [f"sizes of the inputs: {sizes}" if sizes is not None and not sizes.pinned else ""]
    made = PruningPlan(
        model=graph.captured.class_name,
        inputs=describe_inputs(args, kwargs, graph.captured.program.reads_values),
        shapes=graph.whole.tensor_names(),
        branches=graph.removed_branches,
        sizes={group.name: group.size for group in graph.groups},
        removed=selected.removed,
        held=graph.held,
        dissolved=tuple(sorted(dissolved)),
        free_outputs=graph.captured.program.free_outputs,
        fill_outputs=tuple(graph.fill_outputs),
        into=selection.into,
        regions=graph.captured.regions,
        notes=tuple(filter(None, said)),
        settings={
            **selection.settings(),
            **({"left": dict(selected.left)} if selected.left else {}),
            **({"measured": meter.measured} if meter is not None else {}),
        },
    )
    return (made, graph, rewritten), scores


def _branches(selection: Selection, own: _OwnClass, graph: CouplingGraph) -> tuple[str, ...]:
    """Names of the residual branches to remove."""
    names = selection.branches
    for name in names:
        if name not in graph.branches:
            raise SelectionError(f"branches: {unknown(graph, name)}")
    if names and own.marked is not None:
        raise SelectionError(
            'residual branches are removed from a graph; with into="module" the code of the model adds them. '
            'Leave branches out, or give into="graph".'
        )
    return tuple(names)


def _unsaid(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Rewritten) -> str:
    """Why no configuration of the model's class says what ``found`` is.

    Empty where one does, or where the class has no configuration.
    """
    if not has_config(model):
        return ""
    if any(tensor.is_meta for tensor in model.state_dict().values()):  # shapes alone
        shapes = {name: tuple(found.program.tensors[name].shape) for name in model.state_dict()}
        solved, reason = solve_config(model, shapes)
        return reason if solved is None else ""
    values, _, reason = said_by_config(found.materialize(), args, kwargs)
    return reason if values is None else ""


def _unfit(
    own: _OwnClass,
    graph: CouplingGraph,
    removed: Mapping[str, Sequence[int]],
    rewritten: Rewritten,
    tests: Sequence[Callable[[Rewritten], str]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolved: frozenset[str],
) -> tuple[set[str], str]:
    """Axes of the groups that fail one of the ``tests`` by themselves, and why.

    None where all of what is removed passes. A test says what is wrong, or nothing.
    """
    reason = next(filter(None, (test(rewritten) for test in tests)), "") if any(removed.values()) else ""
    if not reason:
        return set(), ""
    alike = {group.name: repeated(group) for group in graph.groups}
    unfit = set()
    for kind in {alike[name] for name, units in removed.items() if units}:
        part = {name: units for name, units in removed.items() if alike[name] == kind}
        alone = own.rewritten(rewrite(graph, part), args, kwargs, dissolved)
        failed = [v.reason for v in alone.violations] or [why for test in tests if (why := test(alone))]
        if failed:
            unfit |= {name.rpartition("]")[0] + "]" for name in part}
            reason = failed[0]
    if not unfit:  # each passes, but not all of them together
        unfit = {name.rpartition("]")[0] + "]" for name, units in removed.items() if units}
    return unfit, reason


@dataclass(frozen=True)
class _OwnClass:
    """What it takes to decide on a result in the model's own class.

    Attributes:
        model: the original.
        marked: a copy whose numbers remember their attributes; None where the result is a graph.
        questions: what the copy's code asks while it is captured.
    """

    model: nn.Module
    marked: nn.Module | None
    questions: list[Comparison]

    @staticmethod
    def of(into: str, model: nn.Module) -> _OwnClass:
        if into == "graph" or not isinstance(model, nn.Module):
            return _OwnClass(model, None, [])
        if takes_tensors(model):
            raise SelectionError(
                'into="module" needs the model that the graph was made from; a graph that takes its '
                "parameters as inputs has no class of its own. Prune that model instead."
            )
        return _OwnClass(model, *marked_copy(model))

    @property
    def source(self) -> nn.Module:
        """What is captured."""
        return self.marked if self.marked is not None else self.model

    def rewritten(
        self, rewritten: Rewritten, args: tuple[Any, ...], kwargs: dict[str, Any], dissolved: frozenset[str]
    ) -> Rewritten:
        """``rewritten`` in the form that is asked for."""
        if self.marked is None:
            return rewritten
        return rewrite_in_class(self.model, self.questions, rewritten, args, kwargs, dissolved)


def resolved(selection: Selection) -> Selection:
    """With calibration data, units are chosen by them; for a budget, errors are those of the outputs."""
    if selection.calibrate is None or selection.importance != AUTO:
        return selection
    metric = next(iter(selection.budget.settings())) if selection.budget is not None else None
    importance = Reconstruction(
        selection.calibrate, selection.pick, "macs" if metric == "latency" else metric
    )
    return replace(selection, importance=importance)


def _meter(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], budget: Budget | None
) -> Meter | None:
    """What holds a budget for the latency against the clock, if there is one."""
    if budget is None or budget.latency is None:
        return None
    return Meter(model, args, kwargs, budget.latency, budget.compiled, budget.table)


def _around(graph: CouplingGraph, name: str) -> set[str]:
    """The node ``name``; where it is held already, the nodes around all held ones; in the end, all nodes."""
    if name not in graph.held:
        return {name}
    nodes = graph.captured.program.graph.nodes
    near = {n.name for node in nodes if node.name in graph.held for n in (*node.all_input_nodes, *node.users)}
    return near if not near <= set(graph.held) else {node.name for node in nodes}


def _function(graph: CouplingGraph, name: str) -> str | None:
    """Name of the Python function that the node ``name`` calls as a whole, if it does."""
    node = next((n for n in graph.captured.program.graph.nodes if n.name == name), None)
    return function_name(node.target) if node is not None and node.op == "call_function" else None


def _finish(model: nn.Module, made: PruningPlan, rewritten: Rewritten) -> nn.Module:
    module = rewritten.materialize()
    remember(module, model, [made])
    return module


def _check_architecture(made: PruningPlan, model: nn.Module) -> None:
    """Refuse a model whose parameters and buffers are not those that the plan was made for."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"a plan is applied to a torch.nn.Module, got {type(model).__name__}.")
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shapes = {name: list(tensor.shape) for name, tensor in [*tensors, *named_inputs(model).items()]}
    lines = architectures(made.shapes, shapes, "it", type(model).__name__)
    if lines:
        raise PlanError(
            f"the plan was made for another architecture ({made.model}): {listed(lines)}. Plan again for "
            "this "
            f"model."
        )
