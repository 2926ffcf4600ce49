"""The stages composed: analyze, plan, prune, apply."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .analysis import analyzed, explored
from .calls import CALLS
from .capture.dynamo import named_inputs
from .capture.patches import without_collector
from .compensation import Pick, Reconstruction, compensated
from .compensation.depth import Depth, Order, saved
from .compensation.judge import Judge
from .configurations import put_into_config
from .coupling.branches import Branch
from .coupling.graph import WHOLE_ROWS, CouplingGraph
from .coupling.groups import Group
from .deciding import Asked, Decided, Decision, OwnClass, called_function, owner_of
from .errors import BudgetError, PlanError, SelectionError
from .importance.base import Scores
from .inputs import in_dtype_of, normalize, restore_inputs
from .origins import config_before, keep_config, remember
from .passes import Rewritten, rewrite
from .passes.remove_branches import unknown, without_branches
from .planning.cost_model import CostModel
from .planning.patterns import Names
from .planning.plan import Problem, PruningPlan
from .planning.plan_diff import architectures, listed
from .planning.selection import AUTO, Selection, takes_selection
from .planning.validate import check_widths, problems
from .reuse import analysis_of, link, rewritten_by

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
    return explored(model, args, kwargs, free_outputs, fill_outputs)


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
        own = OwnClass.of(made.into, model)
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
    check_widths(graph, made.removed)
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
    graph = without_branches(analyzed(model, args, kwargs, dissolved, regions, free, zeros), made.branches)
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
        and not (unopened and any(called_function(graph, node.name) in unopened for node in nodes))
    )


@_stage
def check(made: PruningPlan, model: nn.Module | CouplingGraph) -> tuple[Problem, ...]:
    """See :meth:`PruningPlan.check`."""
    try:
        graph = model if isinstance(model, CouplingGraph) else graph_of(made, model)
    except PlanError as error:
        return (Problem("", str(error)),)
    return tuple(problems(made, graph))


def _start(
    given: nn.Module | CouplingGraph, example_inputs: Any, selection: Selection, own: OwnClass
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
    return explored(own.source, args, kwargs, free, zeros, own.model)


def _plan(given: nn.Module | CouplingGraph, example_inputs: Any, selection: Selection) -> Decided:
    """The plan, the analysis that it is for, and what it rewrites."""
    compares = selection.scope == AUTO
    selection = resolved(selection)
    model = model_of(given)
    own = OwnClass.of(selection.into, model)
    start = _start(given, example_inputs, selection, own)
    args, kwargs = start.source.args, start.source.kwargs
    if CALLS in kwargs and own.marked is None:
        raise SelectionError(
            'several calls need into="module": a graph makes one. Give that, or the inputs of one call.'
        )
    graph = start.without_model()
    graph = graph.hold({WHOLE_ROWS}) if selection.uniform else graph
    asked = Asked(selection, own, model, args, kwargs)
    names = _branches(asked, graph)
    if selection.depth and selection.budget is not None:
        return _deep(asked, graph, names, compares)
    return _decided(asked, without_branches(graph, names), compares)


def _decided(asked: Asked, graph: CouplingGraph, compares: bool) -> Decided:
    """As :class:`Decision`; where it ``compares``, no worse than the same share of every group."""
    decision = Decision(asked, graph)
    found = decision.run()
    return _or_even(asked, graph, found, decision.scores) if compares else found


def _or_even(
    asked: Asked,
    graph: CouplingGraph,
    found: Decided,
    scores: Callable[[Group], Scores],
    judge: Judge | None = None,
) -> Decided:
    """``found``, or the same share of every group where the outputs lose less by that.

    Args:
        asked: what was asked for.
        graph: the analysis to decide with.
        found: what was decided by ranking all groups together.
        scores: by which.
        judge: compares the two; made where there is none.
    """
    selection = asked.selection
    if not Judge.can(graph) or not any(found[0].removed.values()):
        return found
    try:
        even = Decision(replace(asked, selection=replace(selection, scope="local")), graph, scores).run()
    except BudgetError:
        return found
    if even[0].removed == found[0].removed:
        return found
    judge = judge or Judge(graph, selection.calibrate or (), selection.pick, selection.seed)
    lost, otherwise = _loss(judge, found), _loss(judge, even)
    made, left, rewritten = even if otherwise < lost else found
    by = "the same share" if otherwise < lost else "what costs the outputs least"
    note = (
        f"every group gives {by}: on {judge.where} the outputs lose {min(lost, otherwise):.3g} "
        f"by that, and {max(lost, otherwise):.3g} the other way"
    )
    return replace(made, notes=(*made.notes, note)), left, rewritten


def _loss(judge: Judge, found: Decided) -> float:
    """What the outputs lose by a decision, with compensation."""
    made, left, rewritten = found
    graph_form = Rewritten.materialize(rewritten)  # which is called as the others that are judged
    return judge.narrowed(graph_form, left, made.removed)


def _deep(asked: Asked, graph: CouplingGraph, names: tuple[str, ...], compares: bool) -> Decided:
    """As :func:`_decided`, with the number of residual branches for which the least is lost."""
    selection = asked.selection
    fixed = [graph.branches[name] for name in names]
    owner = owner_of(graph, asked.model)
    may_go = _may_go(selection, owner, graph, names)
    _, lost = asked.own.without(graph, may_go, asked.args, asked.kwargs, graph.source.dissolved)
    may_go = {name: branch for name, branch in may_go.items() if name not in lost}
    assert selection.budget is not None
    share = saved(CostModel(graph), selection.budget, asked.meter(owner))
    if not any(map(share, may_go.values())):  # no branch can go, or nothing has to
        return _decided(asked, without_branches(graph, names), compares)
    judge = Judge(graph, selection.calibrate or (), selection.pick, selection.seed)
    scores: Callable[[Group], Scores] | None = None

    def decide(more: list[str]) -> Decided:
        nonlocal scores
        left = without_branches(graph, (*names, *more))
        decision = Decision(asked, left, scores)
        found = decision.run()
        scores = decision.scores
        return found

    most = len(may_go) if selection.depth is True else int(selection.depth)
    search = Depth(Order(judge, may_go, fixed, share), most, decide, partial(_loss, judge))
    made, left, rewritten = search.run()
    if compares and scores is not None:
        made, left, rewritten = _or_even(asked, left, (made, left, rewritten), scores, judge)
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


def _branches(asked: Asked, graph: CouplingGraph) -> tuple[str, ...]:
    """Names of the residual branches to remove."""
    names, own = asked.selection.branches, asked.own
    for name in names:
        if name not in graph.branches:
            raise SelectionError(f"branches: {unknown(graph, name)}")
    _, lost = own.without(graph, names, asked.args, asked.kwargs, graph.source.dissolved)
    if lost:
        raise SelectionError(f"branches: {own.stays(*next(iter(lost.items())))}")
    return tuple(names)


def resolved(selection: Selection) -> Selection:
    """With calibration data, units are chosen by them; for a budget, errors are those of the outputs."""
    if selection.calibrate is None or selection.importance != AUTO:
        return selection
    metric = next(iter(selection.budget.settings())) if selection.budget is not None else None
    importance = Reconstruction(
        selection.calibrate, selection.pick, "macs" if metric == "latency" else metric
    )
    scope = "global" if selection.scope == AUTO else selection.scope
    return replace(selection, importance=importance, scope=scope)


def _finish(model: nn.Module, made: PruningPlan, rewritten: Rewritten) -> nn.Module:
    module = rewritten.materialize()
    if made.config:
        keep_config(module, config_before(model))
        if not put_into_config(module, made.config):  # the plan was edited, or is for another configuration
            said = ", ".join(f"{name}={value}" for name, value in made.config.items())
            note = (
                f"the plan's configuration ({said}) does not give these widths, so that of {made.model} "
                "stays as it was; what fxprune.save_pretrained writes opens all the same"
            )
            made = replace(made, config={}, notes=(*made.notes, note))
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
