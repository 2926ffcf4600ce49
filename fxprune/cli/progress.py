"""What the commands print: a line for each step, tables, numbers for people, and plain data."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..measure import Count


class Progress:
    """One line for each finished step, and on a terminal a spinner for the one that runs."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)

    def out(self, what: Any) -> None:
        """Print a result to stdout."""
        from rich.console import Console

        Console(highlight=False).print(what, markup=False, soft_wrap=True)

    def note(self, name: str, text: str) -> None:
        """Print a step's line; further lines of ``text`` are indented below the first."""
        first, *rest = text.strip().splitlines() or [""]
        lines = [f"{name:>8}  {first}", *(f"{'':8}  {line}" for line in rest)]
        self.console.print("\n".join(lines), markup=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Any]:
        """Time a step; what it passes to the function that it is given becomes its line."""
        start = time.perf_counter()
        text: list[str] = []
        with self.console.status(f"{name} ..."):
            yield text.append
        first, *rest = "\n".join(text).strip().splitlines() or [""]
        taken = f" ({time.perf_counter() - start:.1f} s)"
        self.note(name, "\n".join([first + taken, *rest]))


def table(before: Count, after: Count, seconds: dict[str, float]) -> Table:
    """The comparison: each row a cost before and after, and what is left of it."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for name in ("before", "after", "left"):
        made.add_column(name, justify="right")
    rows: list[tuple[str, float, float, Any]] = [
        ("parameters", before.params, after.params, number),
        ("MACs", before.macs, after.macs, number),
        ("weights on disk", before.bytes, after.bytes, size),
    ]
    if seconds:
        rows.append(("latency", seconds["before"], seconds["after"], duration))
    for name, old, new, form in rows:
        made.add_row(name, form(old), form(new), f"{new / old:.2f}x" if old else "-")
    return made


def _scaled(value: float, units: list[tuple[float, str]]) -> str:
    """``value`` in the largest of the descending units that it fills, with three digits or more."""
    for size, unit in units:
        if value >= size:
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {unit}".strip()
    return f"{value:g}"


def number(value: float) -> str:
    return _scaled(value, [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")])


def size(value: float) -> str:
    return _scaled(value, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")])


def duration(seconds: float) -> str:
    return _scaled(seconds, [(1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")])


def shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The shapes of the top-level inputs, for people."""

    def shape(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(shape, value))}]"
        return (
            "x".join(map(str, value.shape)) or "scalar" if hasattr(value, "shape") else type(value).__name__
        )

    return ", ".join([*map(shape, args), *(f"{name} {shape(value)}" for name, value in kwargs.items())])


def show(data: dict[str, Any]) -> None:
    """Write plain data to stdout, as one JSON object."""
    sys.stdout.write(f"{json.dumps(data, indent=2, default=str)}\n")


def costs(count: Count) -> dict[str, int]:
    """A count as plain data."""
    return {
        "params": count.params,
        "macs": count.macs,
        "activations": count.activations,
        "bytes": count.bytes,
    }
