"""Capture: from an ``nn.Module`` to a :class:`~fxprune.program.Program`. Knows nothing of pruning.

The ladder of rungs is tried in order; today it has one, symbolic tracing. A further rung is a file here
with a function ``(model, args, kwargs) -> Captured`` that raises :class:`~fxprune.errors.CaptureError`
where it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import CaptureError, ExampleInputsError
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


RUNGS = {"torch.fx symbolic tracing": symbolic.trace}


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Capture ``model`` with the first rung that can.

    Raises:
        CaptureError: if no rung can; the message holds each rung's reason.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    refusals = []
    for rung, trace in RUNGS.items():
        try:
            program = trace(model, args, kwargs)
        except ExampleInputsError:
            raise
        except CaptureError as refusal:
            refusals.append((rung, refusal))
            continue
        name = type(model).__name__
        total = len(program.graph.nodes)
        kept = f"captured {name} by {rung}: {total} nodes, {len(program.modules)} leaf modules."
        return Captured(program, rung, kept, name)
    reasons = "\n".join(f"  {rung}: {refusal}" for rung, refusal in refusals)
    raise CaptureError(
        f"{type(model).__name__} could not be captured as a graph.\n{reasons}\n"
        f"Next: capture the part that can be (prune model.backbone, say), or move the control flow that "
        f"depends on tensor values out of forward."
    ) from refusals[-1][1]
