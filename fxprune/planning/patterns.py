"""Which groups a name or a module type means."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.roles import in_module, makes_outputs
from ..coupling.units import Axis
from ..errors import RatioError, SelectionError

Pattern = str | type[nn.Module]
"""A name with ``*``, ``?`` as in a shell, or a module type."""


class Names:
    """Looks up groups by the layers whose *outputs* they are.

    A pattern means a group if it matches the name of

    - a module whose output is narrowed with the group (``layer1.0.conv1``) or a container of it
      (``layer1``),
    - a parameter of such a module (``layer1.0.conv1.weight``),
    - any axis of the group (``layer1.0.conv1.weight[1]``), or the group itself.

    A module type means the groups of all modules of that type, containers included. The input of a layer
    is not meant by its name: it is the output of another layer.
    """

    def __init__(self, model: nn.Module, graph: CouplingGraph) -> None:
        self._graph = graph
        self._modules = dict(model.named_modules())
        self._by_name: dict[str, set[str]] = defaultdict(set)
        aliases: dict[int, list[str]] = defaultdict(list)
        for name, tensor in graph.captured.program.tensors.items():
            aliases[id(tensor)].append(name)
        known = {*self._modules, *graph.captured.program.tensors} - {""}
        for group in graph.groups:
            self._by_name[group.name].add(group.name)
            for member in group.members:
                for name in aliases[id(member.tensor)]:
                    self._by_name[f"{name}[{member.axis.dim}]"].add(group.name)
                    if member.trainable and self._is_output(name, member.axis):
                        for part in (name, *_ancestors(name)):
                            self._by_name[part].add(group.name)
        self._names = sorted(known | set(self._by_name))

    def _is_output(self, name: str, axis: Axis) -> bool:
        """Whether an axis of a parameter, under one of its names, is an output of the layer."""
        return makes_outputs(in_module(self._graph.uses(axis), name.rpartition(".")[0]))

    def narrowed(self, pattern: Any, what: str, ratio: float) -> set[str]:
        """As :meth:`groups`, for a ``ratio`` that their units are to lose.

        Raises:
            RatioError: if nothing that is meant can be narrowed; says why.
        """
        found = self.groups(pattern, what)
        # Once nodes are held, what could be narrowed before may be gone: that is in the plan's notes.
        if not found and ratio > 0 and not self._graph.held:
            frozen = [
                f
                for f in self._graph.frozen
                if self._is_output(f.axis.name, f.axis) and self.means(pattern, f.axis.name)
            ]
            because = f" {frozen[0]}." if frozen else ""
            raise RatioError(
                f"{what}[{_quoted(pattern)}] = {ratio:g} cannot be met: nothing that it means can be "
                f"narrowed.{because}"
            )
        return found

    def means(self, pattern: Any, parameter: str) -> bool:
        """Whether ``pattern`` names a parameter or buffer, or a module that holds it."""
        parts = [parameter, *_ancestors(parameter)]
        if isinstance(pattern, str):
            return any(part == pattern or fnmatchcase(part, pattern) for part in parts)
        return any(isinstance(self._modules.get(part), pattern) for part in parts)

    def groups(self, pattern: Any, what: str) -> set[str]:
        """Names of the groups that ``pattern`` means; ``what`` it is for, in messages.

        Raises:
            SelectionError: if nothing in the model has such a name or type; suggests some that do.
        """
        found: set[str] = set()
        if isinstance(pattern, type) and issubclass(pattern, nn.Module):
            paths = [path for path, module in self._modules.items() if path and isinstance(module, pattern)]
            if not paths:
                types = sorted({type(module).__name__ for module in self._modules.values()})
                raise SelectionError(
                    f"{what} names the module type {pattern.__name__}, which the model does not have; "
                    f"{_suggest(pattern.__name__, types)}"
                )
            return found.union(*(self._by_name.get(path, ()) for path in paths))
        if not isinstance(pattern, str):
            path = next((path for path, module in self._modules.items() if module is pattern), "")
            given = f"a {type(pattern).__name__}" if isinstance(pattern, nn.Module) else repr(pattern)
            raise SelectionError(
                f"{what} takes names (layer1.0.conv1, layer1.*) and module types (nn.Linear); got {given}"
                + (f", whose name in the model is {path!r}: give that." if path else ".")
            )
        names = [name for name in self._names if name == pattern or fnmatchcase(name, pattern)]
        if not names:
            raise SelectionError(
                f"{what} names {pattern!r}, which matches no module, parameter or group of the model; "
                f"{_suggest(pattern, self._names)}"
            )
        return found.union(*(self._by_name.get(name, ()) for name in names))


def spelled(pattern: Any) -> str:
    """A pattern, or several, as plain text: names as they are, module types by their names."""
    if isinstance(pattern, tuple):
        return ", ".join(map(spelled, pattern))
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


def _quoted(pattern: Any) -> str:
    return repr(pattern) if isinstance(pattern, str) else spelled(pattern)


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def nearest(name: str, valid: Any, n: int = 3) -> list[str]:
    """The valid names that are most alike, best first."""
    return difflib.get_close_matches(name, list(valid), n=n, cutoff=0.0)


def _suggest(name: str, valid: list[str]) -> str:
    close = nearest(name, valid)
    return f"the nearest are {', '.join(map(repr, close))}." if close else "it has none."
