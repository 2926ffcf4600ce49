"""A model and example inputs become a coupling graph: capture and couple, composed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .calls import as_one
from .capture import RUNGS, Captured, capture
from .coupling.graph import CouplingGraph, Source
from .coupling.outputs import fill
from .errors import SelectionError
from .inputs import describe_inputs, to_meta
from .planning.patterns import nearest
from .planning.selection import AUTO, output_names
from .verify_model import is_the_model


def explored(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free_outputs: str | Sequence[str],
    fill_outputs: str | Sequence[str],
    original: nn.Module | None = None,
) -> CouplingGraph:
    """As :func:`fxprune.analyze`; ``original`` is what ``model`` is a marked copy of."""
    describe_inputs(args, kwargs)  # a plan could not be made for others
    free, zeros = output_names("free_outputs", free_outputs), output_names("fill_outputs", fill_outputs)
    free_names, zero_names = (tuple(name for name in names if name != AUTO) for names in (free, zeros))
    graph = analyzed(model, args, kwargs, frozenset(), None, free_names, zero_names, original)
    graph = graph.freed() if AUTO in free else graph
    graph = graph.filled() if AUTO in zeros else graph
    return graph.keep(model, args, kwargs)


def analyzed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str] = frozenset(),
    regions: Mapping[str, Any] | None = None,
    free_outputs: tuple[str, ...] = (),
    fill_outputs: tuple[str, ...] = (),
    original: nn.Module | None = None,
) -> CouplingGraph:
    """As :func:`explored`, where every option is decided.

    Args:
        model: the model.
        args: positional inputs of the example.
        kwargs: keyword inputs of the example.
        dissolve: names of Python functions that are traced into, in place of being called as a whole.
        regions: the parts that an earlier capture found, where only parts can be captured.
        free_outputs: names of outputs that may become narrower.
        fill_outputs: names of outputs that are filled up with zeros.
        original: what ``model`` is a marked copy of.

    Raises:
        CaptureError: if the model cannot be turned into a graph.
        SelectionError: if the model has no such output; names the nearest.
    """
    graphs: list[CouplingGraph] = []

    original = model if original is None else original

    def accept(captured: Captured, part: nn.Module, its: tuple[Any, ...], named: dict[str, Any]) -> bool:
        source = Source(weakref.ref(model), to_meta(args), to_meta(kwargs), dissolve)
        program = replace(captured.program, free_outputs=free_outputs)
        if fill_outputs and not captured.regions:
            program = fill(program, fill_outputs)
        graphs.append(CouplingGraph(replace(captured, program=program), source))
        own = part if original is model else as_one(original, kwargs)
        whole = named is kwargs  # not one of the parts, which of a marked copy have no counterpart at hand
        if dissolve or captured.rung not in RUNGS or not (whole or own is part):
            return True
        unknown = is_the_model(own, captured.program, its, named)
        if unknown:
            known = graphs[-1].captured
            graphs[-1].captured = replace(known, notes=(*known.notes, unknown))
        return not unknown or captured.rung != next(iter(RUNGS))  # the second rung sees more than the first

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


__all__ = ["analyzed", "explored"]
