"""Verify: the exactness contract.

``pruned(x)`` equals ``original(x)`` with all removed parameter entries set to zero, to rounding, wherever
no inexact operator (a normalisation or a reduction) runs over a narrowed axis. The entries of a unit are
removed on both sides of each coupling, so consumers multiply by zero whatever a removed channel carries.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from .api import graph_for, model_of
from .calls import as_one
from .capture.regions import real_inputs
from .coupling.graph import CouplingGraph
from .errors import ExampleInputsError, ModeError, VerificationError
from .inputs import normalize
from .passes import Narrowing
from .passes.parameters import narrow
from .planning.plan import PruningPlan
from .program import Program, named_tensors
from .region_program import RegionProgram
from .sizes import resized
from .trees import flatten
from .verify_class import as_graph, compare_classes
from .verify_masked import (
    cast,
    compare_weights,
    converted,
    masked_original,
    put_into_mode,
    restored,
    without_dropout,
)
from .verify_model import (
    LARGE,
    LIMITS,
    ROUGH,
    Outcome,
    buffer_scale,
    call,
    compare_with_model,
    relative_error,
    second_batch,
    writes_parameters,
)
from .verify_nodes import PrecisionError, UnknownUnitsError, Walk, compare_outputs, shapes_of


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification that found no difference.

    Attributes:
        error: largest difference, relative to the largest magnitude of the value it was found in.
        compared: number of graph nodes whose values were compared one by one; 0 where the outputs of
            the whole networks were.
        skipped: inexact nodes, whose values may differ; what follows them was compared from there on.
        dtype: the precision of the comparison.
        modes: the modes in which the networks were compared, "evaluation" and "training".
        inputs: how many sets of inputs they were compared on, other sizes among them where these are free.
        notes: what could not be compared, and why.
    """

    error: float
    compared: int
    skipped: tuple[str, ...]
    dtype: torch.dtype
    modes: tuple[str, ...] = ("evaluation",)
    inputs: int = 1
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the networks are equal as a whole."""
        return not self.skipped

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        sizes = f", on {self.inputs} sizes of inputs" if self.inputs > 1 else ""
        measured = f"(relative error {self.error:.1e} in {precision}; {' and '.join(self.modes)} mode{sizes})"
        if self.exact:
            said = f"exact: the pruned network equals the masked original {measured}"
        else:
            said = (
                f"exact but for {len(self.skipped)} normalisations and reductions over narrowed axes: all "
                f"other {self.compared} nodes equal those of the masked original {measured}"
            )
        return "\n".join([said, *(f"not compared: {note}" for note in self.notes)])


def verify(
    model: nn.Module | CouplingGraph,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    more_inputs: Sequence[Any] = (),
    low_memory: bool = False,
) -> Verdict:
    """Check that ``pruned`` computes what ``model`` computes with the removed entries set to zero.

    First the captured graph is compared with a copy of ``model``, which runs its own ``forward``. Then the
    masked original is with ``pruned``, both as copies in ``dtype``. If an inexact group was narrowed, these
    differ legitimately from there on; then the graphs are run side by side, each node on the masked
    original's narrowed values wherever an inexact node came before. Of a result in the model's own
    class, its own ``forward`` is compared as well where the plan is exact. All of it is done in
    evaluation mode and in training mode (with dropout off, batch statistics included), and in evaluation mode
    again at other sizes (batch, height, width, length) where the model takes them.

    Of a compensated network the narrowing is compared: a copy of it with the weights that the plan gives.

    Args:
        model: the original model, or its analysis; not changed.
        pruned: what ``plan.apply(model)`` gave.
        plan: the plan.
        example_inputs: real inputs, as for :func:`fxprune.analyze`.
        dtype: precision of the comparison of the two networks. By default float64; for networks of more than
            a gigabyte, and those that do not run in float64, their own.
        tolerance: largest relative error allowed; by default 1e-8 in float64, 1e-3 in float32, 5e-2 in less.
        more_inputs: further inputs, of other sizes say, to compare on in evaluation mode; in place of those
            that are made from the example.
        low_memory: compare in the networks' own precision, so that weights are copied once at most.

    Raises:
        VerificationError: where the networks differ; names the first node, its source line and the error.
        PlanError: if the plan does not belong to the model.
    """
    given, model = model, model_of(model)
    if "compensation" in getattr(pruned, "meta", {}):
        said = "the weights of a compensated network: those that the plan narrows stood in their place"
        verdict = verify(
            given,
            _uncompensated(given, pruned, plan),
            plan,
            example_inputs,
            dtype=dtype,
            tolerance=tolerance,
            more_inputs=more_inputs,
            low_memory=low_memory,
        )
        return replace(verdict, notes=(*verdict.notes, said))
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        raise VerificationError("the model is on the meta device, so there are no weights to verify.")
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    choice = dtype or (own if low_memory or size > LARGE else torch.float64)
    try:
        return _verify(given, pruned, plan, example_inputs, choice, own, tolerance, more_inputs)
    except PrecisionError as error:
        if dtype is not None or choice == own:
            raise ExampleInputsError(str(error)) from error.__cause__
    try:
        return _verify(given, pruned, plan, example_inputs, own, own, tolerance, more_inputs)
    except PrecisionError as error:
        raise ExampleInputsError(str(error)) from error.__cause__


def _uncompensated(given: nn.Module | CouplingGraph, pruned: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of a compensated network with the weights that the plan gives it.

    Raises:
        VerificationError: if it has other tensors than what the plan gives.
    """
    plain = copy.deepcopy(pruned)
    del plain.meta["compensation"]  # type: ignore[union-attr, operator]
    mine, wanted = (dict(named_tensors(module)) for module in (plain, plan.apply(given)))
    for name in {**wanted, **mine}:
        shapes = [tuple(own[name].shape) if name in own else None for own in (mine, wanted)]
        if shapes[0] != shapes[1]:
            raise VerificationError(
                f"the pruned network holds {name} of shape {shapes[0]}, and the plan gives {shapes[1]}."
            )
        mine[name].detach().copy_(wanted[name])
    return plain


def _limit(dtype: torch.dtype, tolerance: float | None) -> float:
    return tolerance if tolerance is not None else LIMITS.get(dtype, ROUGH)


def _verify(
    given: nn.Module | CouplingGraph,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    dtype: torch.dtype,
    own: torch.dtype,
    tolerance: float | None,
    more_inputs: Sequence[Any],
) -> Verdict:
    model = model_of(given)
    limit = _limit(dtype, tolerance)
    if plan.into == "module":
        form, made = as_graph(model, pruned, plan), replace(plan, into="graph")
        verdict = _verify(model, form, made, example_inputs, dtype, own, tolerance, more_inputs)
        error = compare_classes(
            model,
            pruned,
            plan,
            form,
            verdict.exact,
            example_inputs,
            lambda module: converted(module, dtype),
            lambda tree: cast(tree, dtype),
            limit,
        )
        return replace(verdict, error=max(verdict.error, error))
    graph = graph_for(plan, given)
    program = graph.whole.captured.program
    args, kwargs = normalize(example_inputs, several=True)
    model, pruned = as_one(model, kwargs), as_one(pruned, kwargs)
    calls = real_inputs(model, program, args, kwargs)
    pieces = program.pieces()
    if pieces.keys() != calls.keys():
        missed = ", ".join(sorted(pieces.keys() - calls.keys()))
        raise VerificationError(f"{missed} is not called in evaluation mode on these inputs.")
    others = [] if isinstance(program, RegionProgram) else _others(graph, args, kwargs, more_inputs)
    notes, taken = _against_the_model(model, pieces, calls, others, _limit(own, tolerance), bool(more_inputs))
    comparison = _Comparison(graph, Narrowing(graph, plan.removed), pruned, dtype, limit)
    comparison.run(calls, False)
    compared = 1
    for more in taken:
        try:
            comparison.run({"": more}, False)
            compared += 1
        except UnknownUnitsError:
            notes.append("at other sizes, where a dimension holds channels together with a size that changes")
    trained, note = comparison.train(calls)
    notes += [note] if note and note not in notes else []
    if comparison.drawn:
        notes.append(f"{', '.join(comparison.drawn)}: random numbers, as many as there are channels")
    if comparison.inexact or comparison.drawn:
        # the skipped nodes' own weights, too
        compare_weights(graph.captured.program, pruned, comparison.narrowing)
    return Verdict(
        comparison.worst,
        comparison.compared,
        tuple(comparison.inexact),
        dtype,
        ("evaluation", "training") if trained else ("evaluation",),
        compared,
        tuple(dict.fromkeys(notes)),
    )


def _against_the_model(
    model: nn.Module,
    pieces: Mapping[str, Program],
    calls: Mapping[str, Any],
    others: Sequence[Any],
    limit: float,
    given: bool,
) -> tuple[list[str], list[Any]]:
    """Hold what was captured against the user's own model, in both modes.

    Args:
        model: the user's model.
        pieces: what was captured, by path.
        calls: positional and keyword inputs of each piece.
        others: further inputs, each with what they are; of these it is compared in evaluation mode alone.
        limit: largest relative error.
        given: whether the user has given the further inputs; of others, the first that can be compared is
            enough.

    Returns:
        What could not be compared and why, and the further inputs that could.
    """
    notes: list[str] = []
    taken: list[Any] = []
    for path, piece in pieces.items():
        for training in (False, True):
            for args, kwargs, what in [(*calls[path], ""), *([] if training else others)]:
                if what and taken and not given:
                    break
                _, note = compare_with_model(model.get_submodule(path), piece, args, kwargs, training, limit)
                if not what:
                    notes += [f"{path}: {note}" if path else note] if note else []
                elif not note:
                    taken.append((args, kwargs))
                elif given:
                    notes.append(f"{what}: {note}")
    return notes, taken


def _others(
    graph: CouplingGraph, args: tuple[Any, ...], kwargs: dict[str, Any], more_inputs: Sequence[Any]
) -> list[Any]:
    """Further inputs to compare on, and what they are."""
    if more_inputs:
        return [(*normalize(more, True), f"inputs {number}") for number, more in enumerate(more_inputs, 2)]
    other = resized((args, kwargs), graph.other_sizes) if graph.other_sizes else None
    doubled = second_batch(args, kwargs)
    found = [(*other, f"another {' and '.join(graph.other_sizes)}")] if other is not None else []
    return [*found, *([(*doubled[:2], f"a batch of {doubled[2]}")] if doubled is not None else [])]


class _Comparison:
    """The masked original and the pruned network, side by side."""

    def __init__(
        self, graph: CouplingGraph, narrowing: Narrowing, pruned: nn.Module, dtype: torch.dtype, limit: float
    ) -> None:
        self.graph, self.narrowing, self.limit, self.dtype = graph, narrowing, limit, dtype
        self.program = graph.whole.captured.program
        self.pieces = graph.captured.program.pieces()
        self.originals = {
            path: (piece, without_dropout(piece.module()))
            for path, piece in masked_original(self.program, narrowing, dtype).pieces().items()
        }
        self.written = any(map(writes_parameters, self.pieces.values()))
        self.candidate = without_dropout(converted(pruned, dtype, not self.written))
        self.inexact = {
            event.node.name: None
            for event in graph.run.coupler.inexact
            if event.node is not None and narrowing.mixed(event.ids)
        }
        self.worst, self.compared = 0.0, 0
        self.drawn: dict[str, None] = {}

    def train(self, calls: Mapping[str, Any]) -> tuple[bool, str]:
        """Compare in training mode; whether that could be, and if not, why.

        What is drawn at random for each sample is the same in both networks, unlike what is drawn for each
        channel.

        Raises:
            VerificationError: if the networks differ, and nothing is drawn at random.
        """
        draws = False
        for path, (_, original) in self.originals.items():
            args, kwargs = (cast(tree, self.dtype) for tree in calls[path])
            try:
                put_into_mode(original, True)
                outcomes = self._seeds(original, args, kwargs)
            except ModeError as error:
                return False, str(error)
            failed = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
            if failed is not None:
                return (
                    False,
                    f"the masked original does not run in training mode ({type(failed).__name__}: {failed})",
                )
            first, second = (flatten(outcome.output)[0] for outcome in outcomes)
            draws |= relative_error(first, second) > self.limit
        before = self.worst, self.compared, dict(self.drawn)
        try:
            self.run(calls, True)
        except (VerificationError, UnknownUnitsError):
            if not draws:
                raise
            self.worst, self.compared, self.drawn = before
            return False, "in training mode, what is drawn at random may depend on widths"
        return True, ""

    def _restored(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Afterwards, buffers hold what they hold now, and parameters where the forward writes to some."""
        return restored([*module.buffers(), *(module.parameters() if self.written else ())])

    def _seeds(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Outcome]:
        """What the masked original gives with two seeds; its tensors are what they were."""
        outcomes = []
        for seed in (0, 1):
            with self._restored(original):
                outcomes.append(call(original, args, kwargs, seed))
        return outcomes

    def _draws(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether random numbers have a part in what the masked original gives."""
        first, second = (flatten(outcome.output)[0] for outcome in self._seeds(original, args, kwargs))
        return relative_error(first, second) > self.limit

    def run(self, calls: Mapping[str, Any], training: bool) -> None:
        """Compare on these inputs of each piece; raises VerificationError."""
        try:
            put_into_mode(self.candidate, training)
        except ModeError as error:
            raise VerificationError(
                f"the original runs in training mode, the result does not: {error}"
            ) from error
        for path, (piece, original) in self.originals.items():
            put_into_mode(original, training)
            part = self.candidate.get_submodule(path)
            with self._restored(original), self._restored(part):
                self._piece(path, piece, original, part, calls[path])

    def _piece(self, path: str, piece: Program, original: Any, part: nn.Module, inputs: Any) -> None:
        args, kwargs = (cast(tree, self.dtype) for tree in inputs)
        walk = Walk(original, self.narrowing, self.inexact, self.limit)
        with torch.no_grad():
            linked = isinstance(self.program, RegionProgram) and walk.linked()
            whole = not self.inexact and not linked
            if whole:
                outputs = self.graph.run.outputs[path]
                with self._restored(original), self._restored(part):
                    difference = compare_outputs(original, part, args, kwargs, outputs, self.narrowing)
                    if difference <= self.limit:
                        difference = max(difference, self._left(self.pieces[path], original, part))
                if difference <= self.limit:
                    self.worst = max(self.worst, difference)
                    return
            else:
                with self._restored(original):
                    failed = call(original, args, kwargs).error
                if failed is not None:
                    raise PrecisionError(
                        f"the original does not run in {self.dtype}: {failed}. Next: leave dtype out, and it "
                        f"is compared in its own."
                    ) from failed
            try:
                values = piece.bind(args, kwargs)
            except TypeError as error:
                raise ExampleInputsError(f"the captured {self.graph.captured.class_name} {error}.") from error
            if isinstance(self.program, RegionProgram):
                part = self.program.graph_module(self.candidate, path) or part
            if not isinstance(part, fx.GraphModule):
                differs = f"the outputs differ by {difference:.1e} (relative), and " if whole else ""
                raise VerificationError(
                    f"{differs}{type(part).__name__} is no GraphModule, so it cannot be compared with the "
                    f"masked original node by node. Give verify the module that plan.apply(model) returned."
                )
            try:
                self.worst = max(self.worst, walk.run(part, values))
            except UnknownUnitsError:
                if not whole or (difference < math.inf and self._draws(original, args, kwargs)):
                    raise
                raise VerificationError(
                    f"on inputs of the shapes {shapes_of((args, kwargs))} the pruned network fails, or gives "
                    f"something else than the masked original (relative error {difference:.1e})."
                ) from None
            self.compared += walk.compared
            self.drawn |= walk.drawn
        if whole and not walk.settled:
            raise VerificationError(
                f"the outputs differ from the masked original's by {difference:.1e} (relative), though no "
                f"single node of the graph differs: was {type(part).__name__} changed since it was pruned?"
            )

    def _left(self, own: Program, original: nn.Module, part: nn.Module) -> float:
        """Largest relative error of what is left in buffers, and in parameters where some are written to."""
        wanted, got = (dict(m.named_buffers(remove_duplicate=False)) for m in (original, part))
        scales = {name: buffer_scale(wanted, name) for name in wanted}
        if self.written:
            wanted |= dict(original.named_parameters(remove_duplicate=False))
            got |= dict(part.named_parameters(remove_duplicate=False))
        worst = 0.0
        for name, value in wanted.items():
            tensor = own.tensors.get(name)
            if tensor is not None and name in got:
                expected = narrow(value, self.graph.labels(tensor), self.narrowing)
                worst = max(worst, relative_error(got[name], expected, scales.get(name, 0.0)))
        return worst


__all__ = ["Verdict", "verify"]
