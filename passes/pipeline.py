"""The passes in order, and what comes out of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..coupling.graph import CouplingGraph
from ..program import Program, let_go
from .base import Narrowing, Pass
from .check import Violation, check
from .constants import KeepConstants
from .literals import RewriteLiterals
from .modules import UpdateModules
from .movements import FillOutputs, NarrowConstants, PickFromTables, SelectMovements
from .parameters import NarrowParameters, narrow

PIPELINE: tuple[Pass, ...] = (
    UpdateModules(),
    KeepConstants(),
    RewriteLiterals(),
    SelectMovements(),
    NarrowConstants(),
    PickFromTables(),
    FillOutputs(),
)
"""What follows :class:`NarrowParameters`; the order matters only in that each sees the one before."""


@dataclass(frozen=True)
class Rewritten:
    """A rewritten program on meta tensors.

    Attributes:
        program: the program.
        narrowing: what was removed.
        violations: where it falls short; nowhere, if it may be used.
        notes: what the user should know about it.
    """

    program: Program
    narrowing: Narrowing
    violations: tuple[Violation, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def materialize(self, instead: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The module with the real, narrowed weights.

        Args:
            instead: tensors of the original that others take the place of, by name and of the same shape.
        """
        return self.narrowed(instead).result(self.narrowing.graph.captured.class_name)

    @contextlib.contextmanager
    def materialized(self) -> Iterator[nn.Module]:
        """The same for a while: at the end its memory goes, whatever still refers to the module."""
        module = self.materialize()
        try:
            yield module
        finally:
            let_go(module)

    def narrowed(self, instead: Mapping[str, Tensor] | None = None) -> Program:
        """The program with the real, narrowed weights; ``instead`` as for :meth:`materialize`."""
        original, graph = self.narrowing.graph.captured.program, self.narrowing.graph
        narrowed = NarrowParameters()(original, self.narrowing)
        others = {
            name: narrow(tensor, graph.labels(original.tensors[name]), self.narrowing)
            for name, tensor in (instead or {}).items()
        }
        extras = {**self.program.extras, **narrowed.extras}
        return replace(self.program, tensors={**narrowed.tensors, **others}, extras=extras)


Between = Callable[[Pass, Program, Program], None]
"""What is called after each pass, with the pass, the program before it and the program after it: the same
object where it had nothing to do. Both may share one graph, which the pass has edited."""


def rewrite(
    graph: CouplingGraph, removed: Mapping[str, Sequence[int]], between: Between | None = None
) -> Rewritten:
    """Rewrite the program of ``graph`` without the ``removed`` units, on shapes alone, and check it.

    Where nothing is removed, nothing is rewritten, and nothing can be wrong.

    Args:
        graph: the analysis; not changed.
        removed: positions of the units that go, by the group's name.
        between: called after each pass, for developers: to time, print or check what each does.
    """
    narrowing = Narrowing(graph, removed)
    program = graph.captured.program
    for rewriting in (NarrowParameters(shapes_only=True), *PIPELINE):
        before, program = program, rewriting(program, narrowing)
        if between is not None:
            between(rewriting, before, program)
    if not any(len(units) for units in removed.values()):
        return Rewritten(program, narrowing, ())
    found = [replace(v, node=_named(program, graph, v.node)) for v in check(program, narrowing)]
    return Rewritten(program, narrowing, tuple(found))


def _named(program: Program, graph: CouplingGraph, name: str) -> str:
    """The node ``name``, or where a pass inserted it the first node of the original that follows."""
    names = {node.name for node in graph.captured.program.graph.nodes}
    following = [node for node in program.graph.nodes if node.name == name]
    while following:
        node = following.pop(0)
        if node.name in names:
            return node.name
        following += node.users
    return "output"
