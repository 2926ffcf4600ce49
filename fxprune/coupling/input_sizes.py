"""For which sizes of the inputs a graph is right: what it checks, and where else it ran on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from ..capture import Captured
from ..capture.free_sizes import pin
from ..errors import FxpruneError
from ..nodes import describe_source
from ..region_program import RegionProgram
from ..sizes import (
    BATCH,
    FAR,
    FINER,
    LAST,
    LENGTH,
    NEAR,
    Change,
    InputSize,
    InputSizes,
    changed_size,
    decided,
    guarded,
    named,
    places,
    resized,
)
from .interpreter import interpret


def input_sizes(captured: Captured, change: Change, refusals: Mapping[str, str]) -> InputSizes:
    """The sizes of the inputs that may change, and those that may not.

    Args:
        captured: the graph.
        change: at which other sizes its couplings were looked at.
        refusals: by kind of a size why the graph does not run at another.
    """
    program = captured.program
    checks = guarded(program.graph)
    if isinstance(program, RegionProgram):
        return InputSizes(tuple(checks), "captured in parts: what else is free, the code around them says")
    if captured.rung == "Dynamo":
        return InputSizes((), "torch.compile checks the sizes of its inputs itself")
    known = {(check.input, check.dim): check for check in checks}
    batch = next((check for check in checks if check.name == BATCH), None)
    titles = [str(node.target) for node in program.placeholders()]
    inputs = dict(zip(titles, captured.inputs, strict=True))
    names = named(inputs)
    steps = {kind: _finest(captured, kind) for kind, how in change.items() if how == FAR}
    found = []
    for place in places(list(inputs.values())):
        name = names[place.leaf][0]
        if (name, place.dim) in known:
            found.append(known[name, place.dim])
        elif place.kind == BATCH and batch is not None:  # which is checked at one input
            found.append(InputSize(name, place.dim, BATCH, place.size, batch.step, batch.because))
        elif place.kind in change:
            step = steps.get(place.kind) or changed_size(place, FAR) - place.size
            step = 1 if change[place.kind] == NEAR else step
            found.append(InputSize(name, place.dim, place.name, place.size, step))
        elif place.kind != LAST and not (place.kind == LENGTH and LAST in change):
            why = refusals.get(place.kind, "")
            found.append(InputSize(name, place.dim, place.name, place.size, 0, why))
    return InputSizes(tuple(found), _said(decided(program.graph)))


def _said(lines: list[str]) -> str:
    """That the model's code decides by sizes."""
    if not lines:
        return ""
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    return f"sizes for which the code decides otherwise than for the example are refused ({lines[0]}{more})"


def pin_folded(captured: Captured, because: Mapping[str, str]) -> None:
    """Have the graph refuse other sizes of these kinds, at which nobody looked at its couplings.

    Args:
        captured: its graph is changed in place.
        because: by kind of a size why it is pinned.
    """
    checked = {check.name for check in guarded(captured.program.graph)}
    titles = [str(node.target) for node in captured.program.placeholders()]
    inputs = dict(zip(titles, captured.inputs, strict=True))
    names = {place.kind: place.name for place in places(inputs)}
    bounds = {kind: 0 for kind in because if names.get(kind) not in checked}
    if bounds:
        pin(captured.program.graph, inputs, bounds, dict(because))


def _finest(captured: Captured, kind: str) -> int:
    """The smallest power of two by which sizes of a kind may differ; 0 where none is known."""
    for step in FINER:
        try:
            interpret(captured.program, resized(captured.inputs, {kind: step}), labels=False)
        except FxpruneError:
            continue
        return step
    return 0


def refusal(error: FxpruneError) -> str:
    """Why a graph does not run at other sizes, in a line."""
    where = describe_source(getattr(error, "node", None))
    lines = str(error.__cause__ or error).strip().splitlines() or [""]
    return f"the model does not run at another ({lines[0][:160]}{f'; {where}' if where else ''})"


__all__ = ["input_sizes", "pin_folded", "refusal"]
