"""Capture: from an ``nn.Module`` to a :class:`~fxprune.program.Program`. Knows nothing of pruning.

The rungs of the ladder are tried in order. A further one is a file here with a function
``(model, args, kwargs) -> Program`` that raises :class:`~fxprune.errors.CaptureError` where it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..errors import CaptureError
from ..program import Program
from . import symbolic

__all__ = ["Captured", "capture"]


@dataclass(frozen=True)
class Captured:
    """What a rung of the ladder delivers.

    Attributes:
        program: the graph with the original model's own tensors.
        rung: name of the rung.
        report: one paragraph on what was captured and how.
        class_name: class name of the model, carried on to the result.
    """

    program: Program
    rung: str
    report: str
    class_name: str


RUNGS = {
    "symbolic tracing": symbolic.trace,
    "symbolic tracing with known shapes": symbolic.trace_with_shapes,
}


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dissolve: frozenset[str] = frozenset()
) -> Captured:
    """Capture ``model`` with the first rung that can.

    Args:
        model: the model.
        args: its positional inputs.
        kwargs: its keyword inputs.
        dissolve: names of functions to trace into (see :func:`fxprune.capture.symbolic.function_name`).

    Raises:
        CaptureError: if no rung can; the message holds each rung's reason.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    name = type(model).__name__
    refusals: list[tuple[str, CaptureError]] = []
    rungs = dict(RUNGS)
    if dissolve:
        rungs = {"symbolic tracing with known shapes": partial(symbolic.trace_with_shapes, dissolve=dissolve)}
    for rung, trace in rungs.items():
        try:
            program = trace(model, args, kwargs)
        except CaptureError as refusal:
            refusals.append((rung, refusal))
            continue
        report = (
            f"captured {name} by {rung}: {len(program.graph.nodes)} nodes, "
            f"{len(program.modules)} leaf modules."
        )
        for other, reason in refusals:
            report += f" ({other} could not: {reason})"
        report += "".join(f" Note: {note}." for note in program.notes)
        if refusals:
            report += " Control flow follows the shapes of the example inputs."
        return Captured(program, rung, report, name)
    reasons = "\n".join(f"  {rung}: {reason}" for rung, reason in refusals)
    raise CaptureError(
        f"{name} could not be captured as a graph.\n{reasons}\n"
        f"Next: capture the part that can be (prune model.backbone, say), or move the control flow that "
        f"depends on tensor values out of forward."
    ) from refusals[-1][1]
