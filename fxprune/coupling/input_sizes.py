"""For which sizes of the inputs a graph is right: what it checks, and where else it ran on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..capture import Captured
from ..capture.free_sizes import pin
from ..errors import FxpruneError
from ..nodes import describe_source
from ..region_program import RegionProgram
from ..sizes import (
    BATCH,
    FAR,
    LAST,
    NEAR,
    TWICE,
    Change,
    InputSize,
    InputSizes,
    changed_size,
    decided,
    finer,
    guarded,
    named,
    no_lengths,
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
    inputs = _given(captured)
    names = named(inputs)
    steps = {kind: _finest(captured, kind, how) for kind, how in change.items() if abs(how) == FAR}
    found = []
    given = places(list(inputs.values()))
    left_out = {LAST, *no_lengths(given, change)}
    for place in given:
        name = names[place.leaf][0]
        if (name, place.dim) in known:
            found.append(known[name, place.dim])
        elif place.kind == BATCH and batch is not None:  # which is checked at one input
            found.append(InputSize(name, place.dim, BATCH, place.size, batch.step, batch.because))
        elif place.kind in change:
            how = change[place.kind]
            step = steps.get(place.kind) or abs(changed_size(place, how) - place.size)
            step = 1 if abs(how) == NEAR else step
            why = refusals.get(place.kind, "") if how < 0 else ""
            found.append(InputSize(name, place.dim, place.name, place.size, step, why, how < 0))
        elif place.kind not in left_out:
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
    bounds = dict.fromkeys(because.keys() - _checked(captured), 0)
    if bounds:
        pin(captured.program.graph, _given(captured), bounds, dict(because))


def running(captured: Captured, seen: Change) -> Iterator[tuple[str, int]]:
    """The kinds of sizes that nobody looked at, though the graph runs at others, and does not refuse them.

    Most often it does not run there: a last dimension of features is as long as weights are.

    Yields:
        A kind, and a change of it at which the graph runs.
    """
    if isinstance(captured.program, RegionProgram) or captured.rung == "Dynamo":
        return
    known = {BATCH, *seen, *_checked(captured)}
    for kind in dict.fromkeys(place.kind for place in places(captured.inputs) if place.kind not in known):
        for how in (NEAR, FAR, TWICE):
            try:
                interpret(captured.program, resized(captured.inputs, {kind: how}), labels=False)
            except FxpruneError:
                continue
            yield kind, how
            break


def _checked(captured: Captured) -> set[str]:
    """The kinds of sizes that the graph checks."""
    given = _given(captured)
    names, checks = named(given), guarded(captured.program.graph)
    dims = {(check.input, check.dim) for check in checks}
    return {place.kind for place in places(given) if (names[place.leaf][0], place.dim) in dims}


def _given(captured: Captured) -> dict[str, Any]:
    """The inputs, by name."""
    titles = [str(node.target) for node in captured.program.placeholders()]
    return dict(zip(titles, captured.inputs, strict=True))


def _finest(captured: Captured, kind: str, how: int) -> int:
    """The smallest power of two by which sizes of a kind may differ, as ``how`` does; 0 if none is known."""
    for change in finer(captured.inputs, {kind: how}):
        try:
            interpret(captured.program, resized(captured.inputs, change), labels=False)
        except FxpruneError:
            continue
        return abs(change[kind])
    return 0


def refusal(error: FxpruneError) -> str:
    """Why a graph does not run at other sizes, in a line."""
    where = describe_source(getattr(error, "node", None))
    lines = str(error.__cause__ or error).strip().splitlines() or [""]
    return f"the model does not run at another ({lines[0][:160]}{f'; {where}' if where else ''})"


__all__ = ["input_sizes", "pin_folded", "refusal", "running"]
