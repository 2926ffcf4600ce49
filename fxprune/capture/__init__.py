"""Capture: from an ``nn.Module`` to a :class:`~fxprune.program.Program`. Knows nothing of pruning.

The rungs of the ladder are tried in order. A further one is a file here with a function
``(model, args, kwargs) -> Program`` that raises :class:`~fxprune.errors.CaptureError` where it cannot.
Where none can, the last rung captures the largest submodules that one of the others can.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import sizes
from ..calls import as_one
from ..errors import CaptureError, ExampleInputsError
from ..inputs import to_meta
from ..nodes import drop_questions
from ..program import Program, computed_tensors, named_tensors, own_train, unwrapped
from ..region_program import RegionProgram
from ..sizes import BATCH, Change, Trial
from . import dynamo, exported, free_sizes, patches, regions, shape_tracer, size_decisions, symbolic
from .arguments import Arguments
from .composites import dissolve as dissolve_composites
from .gradient_hooks import note_on_gradient_hooks
from .train_methods import switches

__all__ = ["RUNGS", "Captured", "capture", "recapture"]


@dataclass(frozen=True)
class Captured:
    """What a rung of the ladder delivers.

    Attributes:
        program: the graph with the original model's own tensors.
        rung: name of the rung.
        summary: a few sentences on what was captured and how.
        notes: what is lost, pinned, left as it is or approximated, worst first.
        class_name: class name of the model, carried on to the result.
        inputs: meta tensors and values for the graph's placeholders, in order.
        regions: the submodules that are captured, as plain data; empty where the whole model is.
        trials: the inputs at other sizes for which the graph is as good as for these, as far as the model's
            code is concerned; the first that runs is enough.
    """

    program: Program
    rung: str
    summary: str
    notes: tuple[str, ...]
    class_name: str
    inputs: list[Any]
    regions: Mapping[str, Any]
    trials: tuple[Trial, ...] = ()

    @property
    def report(self) -> str:
        """One paragraph on what was captured and how, with the notes."""
        return self.summary + "".join(f" Note: {note}." for note in self.notes)


Rung = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Program]
Accept = Callable[[Captured, nn.Module, tuple[Any, ...], dict[str, Any]], bool]

RUNGS: dict[str, Rung] = {
    "symbolic tracing": symbolic.trace,
    "symbolic tracing with known shapes": shape_tracer.trace_with_shapes,
    "torch.export": exported.trace,
}
"""The rungs that capture a module as a whole; a graph of Dynamo's has a rung of its own."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str] = frozenset(),
    known: Mapping[str, Any] | None = None,
    accept: Accept = lambda *_: True,
) -> Captured:
    """Capture ``model`` with the first rung that can.

    Args:
        model: the model.
        args: its positional inputs; only the last rung, which runs the model, needs real ones.
        kwargs: its keyword inputs.
        dissolve: names of functions to trace into (see :func:`fxprune.capture.symbolic.function_name`).
        known: regions to capture (:attr:`Captured.regions`), instead of looking for any.
        accept: called with what a rung delivers, what it was captured of, and the inputs of that; last with
            what is returned. Raises CaptureError or ExampleInputsError to have the next rung tried, and gives
            False for what is to be taken only where no further rung captures the whole.

    Raises:
        CaptureError: if no rung can; the message holds each rung's reason. Also for what is no module, and
            for parameters that are not yet initialised.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    model = as_one(model, kwargs)
    inner = unwrapped(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise CaptureError(
            f"this {inner.original_name} is a TorchScript module ({type(inner).__name__}), which hides what "
            f"it computes. Next: prune the nn.Module that it was made from, then call torch.jit.script or "
            f"torch.jit.trace on the result."
        )
    lazy = next((name for name, tensor in named_tensors(model) if nn.parameter.is_lazy(tensor)), None)
    if lazy is not None:
        raise CaptureError(f"{lazy} is uninitialized: run the model once on real inputs, then prune it.")
    with patches.LOCK:  # nobody traces the same model meanwhile
        return _captured_by_one(model, args, kwargs, dissolve, known, accept)


def _captured_by_one(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str],
    known: Mapping[str, Any] | None,
    accept: Accept,
) -> Captured:
    if dynamo.takes_tensors(model):
        if dissolve:
            raise CaptureError("what Dynamo left as one function cannot be traced into")
        return _climb(model, args, kwargs, {"Dynamo": dynamo.trace}, accept)
    opened: dict[str, Rung] = {
        "symbolic tracing with known shapes": partial(shape_tracer.trace_with_shapes, dissolve=dissolve)
    }

    def whole(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], other_sizes: bool
    ) -> tuple[Program, str]:
        found = _climb(module, args, kwargs, RUNGS, accept, other_sizes)
        called = (symbolic.function_name(node.target) for node in found.program.graph.nodes)
        if not dissolve.isdisjoint(called):
            found = _climb(module, args, kwargs, opened, accept, other_sizes)
        return found.program, found.rung

    if known:
        rungs: dict[str, Rung] = {"regions": lambda model, *_: regions.again(model, known, whole)}
    elif dissolve:
        rungs = opened
    else:
        rungs = {**RUNGS, "regions": partial(regions.find, whole=whole)}
    try:
        return _climb(model, args, kwargs, rungs, accept, other_sizes=True)
    except CaptureError as refusal:
        kinds = {path: type(module) for path, module in model.named_modules()}
        quantised = [path for path, kind in kinds.items() if _QUANTISED.match(kind.__module__)]
        if not quantised:
            raise
        raise CaptureError(
            f"{quantised[0]} ({kinds[quantised[0]].__qualname__}) says that the model is quantised: from "
            f"packed weights nothing can be removed. Next: prune the model before it is converted."
        ) from refusal


def recapture(
    captured: Captured,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str] = frozenset(),
) -> Program:
    """Capture another copy of the model that ``captured`` is of, in the same way.

    Raises:
        CaptureError: if it cannot be captured.
        ExampleInputsError: if it fails on the inputs.
    """
    model = as_one(model, kwargs)
    rungs: dict[str, Rung] = {
        **RUNGS,
        "symbolic tracing with known shapes": partial(shape_tracer.trace_with_shapes, dissolve=dissolve),
    }

    def whole(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], other_sizes: bool
    ) -> tuple[Program, str]:
        found = _climb(module, args, kwargs, rungs, lambda *_: True, other_sizes)
        return found.program, found.rung

    if captured.regions:
        program: Program = regions.again(model, captured.regions, whole)
    else:
        trace = rungs[captured.rung]
        program = _with_switches(trace(model, args, kwargs), model)
        if captured.trials or sizes.guarded(captured.program.graph):  # it was looked at with other sizes
            program, _ = _free_sizes(captured.rung, trace, model, program, args, kwargs)
        mine = sizes.guarded(program.graph)
        folded = [axis for axis in sizes.guarded(captured.program.graph) if axis not in mine]
        if folded:  # which the look at its couplings showed
            keys = dict(sizes.named(Arguments.of(model, args, kwargs).all()))
            sizes.guard(program.graph, [(axis, keys[axis.input]) for axis in folded])
    size_decisions.drop(program.graph)
    dissolve_composites(program.graph, program.tensors)
    drop_questions(program.graph)
    return program


_QUANTISED = re.compile(r"torch\.ao\.nn(\.intrinsic)?\.quantized\.")


def _climb(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rungs: Mapping[str, Rung],
    accept: Accept,
    other_sizes: bool = False,
) -> Captured:
    """Try ``rungs`` in their order; with ``other_sizes`` the model is looked at there, too."""
    name = type(unwrapped(model)).__name__
    refusals: list[tuple[str, CaptureError | ExampleInputsError]] = []
    doubtful: list[Captured] = []
    for rung, trace in rungs.items():
        if doubtful and rung not in RUNGS:
            break
        try:
            program = _with_switches(trace(model, args, kwargs), model)
            free: tuple[Change, ...] = ()
            if other_sizes:
                program, free = _free_sizes(rung, trace, model, program, args, kwargs)
            size_decisions.drop(program.graph)
            dissolve_composites(program.graph, program.tensors)
            drop_questions(program.graph)
            if not isinstance(program, RegionProgram):  # whose code stays that of the model
                _check_names(program)
            inputs = _inputs(name, program, args, kwargs)
            captured = _captured(name, rung, program, inputs, refusals, tuple(computed_tensors(model)))
            if rung in RUNGS:
                captured = replace(captured, notes=(*captured.notes, *_note_on_values(program, model)))
            captured = replace(captured, trials=_trials(program, free, args, kwargs))
            if accept(captured, model, args, kwargs) or len(rungs) == 1:
                return captured
            doubtful.append(captured)
            refusals.append((rung, CaptureError("it was not seen that the graph is all that the model does")))
        except CaptureError as refusal:
            refusals.append((rung, refusal))
        except ExampleInputsError as refusal:
            if not hasattr(refusal, "node"):  # the inputs do not fit the signature
                raise
            refusals.append((rung, refusal))
    if doubtful:
        accept(doubtful[0], model, args, kwargs)
        return doubtful[0]
    for _, reason in refusals:
        if isinstance(reason, ExampleInputsError):
            raise reason
    if len(refusals) == 1:
        raise refusals[0][1]
    reasons = "\n".join(f"  {rung}: {reason}" for rung, reason in refusals)
    raise CaptureError(
        f"{name} could not be captured as a graph.\n{reasons}\n"
        f"Next: capture the part that can be (prune model.backbone, say), or move the control flow that "
        f"depends on tensor values out of forward."
    ) from refusals[-1][1]


def _note_on_values(program: Program, model: nn.Module) -> list[str]:
    """Which inputs that are no tensors were given, and are not what they are by default."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.target is symbolic.check_value:
            given, expected, name = node.args
            default = parameters[name].default if name in parameters else None
            if expected is not None and expected is not default and given.op == "placeholder":
                found[name] = f"{name}={expected!r:.40}"
    said = f"analysed with {', '.join(found.values())} alone; fxprune.Calls takes calls with other values"
    return [said] if found else []


def _with_switches(program: Program, model: nn.Module) -> Program:
    """The program with what the model does in ``train()`` methods of its own, and what of it is lost."""
    if isinstance(program, RegionProgram):  # whose modules keep their classes
        return program
    inner = unwrapped(model)
    found = switches(inner) if any(map(own_train, inner.modules())) else {}
    more = sorted({switch.more for by_mode in found.values() for switch in by_mode.values() if switch.more})
    lost = note_on_gradient_hooks(inner)
    notes = (*((lost,) if lost else ()), *program.notes)
    if more:
        said = "a train() of the model's own does more than setting flags"
        notes = (f"{said} ({more[0]}): the result refuses the mode for which it does", *notes)
    return replace(program, skeleton=replace(program.skeleton, switches=found), notes=notes)


def _free_sizes(
    rung: str, trace: Rung, model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, tuple[Change, ...]]:
    """The program, with checks of what is fixed to the example, and what of its inputs may change."""
    if rung == _KNOWN:
        return free_sizes.look(trace, model, program, args, kwargs)
    if rung not in (_FREE, _EXPORTED):
        return program, ()
    pinned = {axis.name for axis in sizes.guarded(program.graph)}
    free = {place.kind for place in sizes.places((args, kwargs)) if place.name not in pinned}
    found = [
        {kind: how for kind, how in change.items() if kind in free}
        for change in sizes.changes((args, kwargs))
    ]
    return program, tuple(change for number, change in enumerate(found) if change not in found[:number])


def _trials(
    program: Program, free: tuple[Change, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trial, ...]:
    tree = to_meta((args, kwargs))
    same_batch = [{kind: how for kind, how in change.items() if kind != BATCH} for change in free]
    changes = [change for change in (*free, *same_batch) if change]
    return tuple(
        Trial(change, program.bind(*sizes.resized(tree, change)))
        for number, change in enumerate(changes)
        if change not in changes[:number]
    )


_FREE, _KNOWN, _EXPORTED = RUNGS


def _inputs(name: str, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    try:
        return program.bind(to_meta(args), to_meta(kwargs))
    except TypeError as error:
        raise ExampleInputsError(f"the captured {name} {error}.") from error


def _captured(
    name: str,
    rung: str,
    program: Program,
    inputs: list[Any],
    refusals: list[tuple[str, Any]],
    computed: tuple[str, ...],
) -> Captured:
    summary = (
        f"captured {name} by {rung}: {len(program.graph.nodes)} nodes, {len(program.modules)} leaf modules."
    )
    for other, reason in refusals:
        summary += f" ({other} could not: {reason})"
    notes = [*program.notes]
    if isinstance(program, RegionProgram):
        summary += f" Regions: {', '.join(region.path for region in program.regions)}."
        notes += [f"left as they are: {'; '.join(program.refused)}"] if program.refused else []
    if computed:
        more = f" and {len(computed) - 3} more" if len(computed) > 3 else ""
        notes.append(
            f"computed from other parameters, which are narrowed in their place: "
            f"{', '.join(computed[:3])}{more}; norms in there run over what is left. Remove the "
            f"parametrizations before pruning to keep the weights that they give now"
        )
    parts = program.regions if isinstance(program, RegionProgram) else None
    used = {rung} if parts is None else {part.rung for part in parts}
    if used - {next(iter(RUNGS)), ""}:
        summary += " Control flow follows the shapes of the example inputs."
    return Captured(program, rung, summary, tuple(notes), name, inputs, regions.describe(program))


def _check_names(program: Program) -> None:
    """Refuse names of modules and tensors that could not stand in the code of a graph module."""
    names = [str(node.target) for node in program.graph.nodes if node.op in ("call_module", "get_attr")]
    for name in names:
        if any(keyword.iskeyword(part) for part in name.split(".")):
            raise CaptureError(
                f"torch.fx cannot write code for {name!r}, because a Python keyword is part of it."
            )
