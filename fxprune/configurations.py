"""Which configuration of a class gives narrowed shapes.

It is solved, with no list of models: the class is built on the meta device from changed configurations, to
see which shapes follow.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .files import few

__all__ = [
    "Solved",
    "builder",
    "changed",
    "has_config",
    "name_of",
    "put_into_config",
    "shapes_of",
    "solve_configs",
]

Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[Any, ...]
"""Where an integer of a configuration is: names of nested ones, its own name, a position in a list."""

_TOGETHER, _MOST = 100, 300
"""How many changes are tried in one place, and configurations in all."""


def builder(model: nn.Module) -> Callable[[Any], nn.Module] | None:
    """How the class makes a network from a configuration; None where it has no such thing."""
    kind: Any = type(model)
    config = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)) and hasattr(kind, "config_class"):
        return lambda config: kind(type(config).from_dict(config.to_dict()))  # as it will be read from a file
    if isinstance(config, Mapping) and callable(getattr(kind, "from_config", None)):
        return lambda config: kind.from_config(dict(config))
    return None


def has_config(model: nn.Module) -> bool:
    """Whether the class of a model can be built from a configuration that the model holds."""
    return builder(model) is not None


def _integers(config: Any) -> Iterator[tuple[Key, int | None]]:
    """All integers of a configuration, in nested ones and in lists, too; and what is left open in it."""
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    for name, value in items:
        if str(name).startswith("_"):
            continue
        if value is None or (type(value) is int and value > 0):
            yield (name,), value
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            yield from (((name, place), item) for place, item in enumerate(value) if item > 0)
        elif callable(getattr(value, "to_dict", None)):
            yield from (((name, *key), inner) for key, inner in _integers(value))


def changed(config: Any, values: Mapping[Key, int]) -> Any:
    """A copy of a configuration with other integers."""
    new = dict(copy.deepcopy(dict(config))) if isinstance(config, Mapping) else copy.deepcopy(config)
    _put(new, values)
    return new


def put_into_config(pruned: nn.Module, values: Mapping[str, int]) -> bool:
    """Let the configuration of ``pruned`` say which widths it has; whether it does.

    Nothing is written where the class would not have these widths by that (the plan was edited, say), nor
    into a configuration that is a mapping. The class is built to see it, and never with an integer that is
    larger than before: a file might ask for a billion layers.

    Args:
        pruned: a network whose configuration is its own.
        values: integers of its configuration, by name.
    """
    if not has_config(pruned) or isinstance(pruned.config, Mapping):
        return False
    shapes = shapes_of(pruned)
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    known = {name_of(key): (key, value or widest) for key, value in _integers(pruned.config)}
    if all(name in known and value <= known[name][1] for name, value in values.items()):
        found = {known[name][0]: value for name, value in values.items()}
        if not _Builds(pruned, shapes).wrong(found):
            _put(pruned.config, found)
            return True
    return False


def name_of(key: Key) -> str:
    """The name of an integer of a configuration, for people and for plans."""
    return ".".join(map(str, key))


def _put(new: Any, values: Mapping[Key, int]) -> None:
    for key, value in values.items():
        owner, *rest = (new, *key)
        while len(rest) > 1 and not isinstance(_item(owner, rest[0]), (list, tuple)):
            owner, rest = _item(owner, rest[0]), rest[1:]
        if len(rest) == 2:
            old = _item(owner, rest[0])
            written: Any = type(old)(value if at == rest[1] else item for at, item in enumerate(old))
        else:
            written = value
        if isinstance(owner, dict):
            owner[rest[0]] = written
        else:
            owner.__dict__[rest[0]] = written


def _item(owner: Any, name: Any) -> Any:
    return owner[name] if isinstance(owner, Mapping) else owner.__dict__[name]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _Builds:
    """The shapes that the class has, by configuration."""

    def __init__(self, model: nn.Module, target: Shapes) -> None:
        self.build, self.config, self.target = builder(model), getattr(model, "config", None), target
        self.known: dict[tuple[tuple[Key, int], ...], dict[str, tuple[int, ...]] | None] = {}

    def shapes(self, values: Mapping[Key, int]) -> dict[str, tuple[int, ...]] | None:
        """None where the class refuses the configuration."""
        key = tuple(sorted(values.items(), key=str))
        if key not in self.known:
            assert self.build is not None
            try:
                with torch.device("meta"):
                    self.known[key] = shapes_of(self.build(changed(self.config, values)))
            except Exception:  # noqa: BLE001  whatever a class says to a width that it does not take
                self.known[key] = None
        return self.known[key]

    def wrong(self, values: Mapping[Key, int]) -> float:
        """How many tensors have other shapes than they should."""
        found = self.shapes(values)
        if found is None or found.keys() != self.target.keys():
            return math.inf
        return sum(found[name] != shape for name, shape in self.target.items())


Solved = tuple[Iterator[dict[Key, int]], Callable[[], str]]
"""Configurations, and why there are no more, once all have been seen."""


def solve_configs(model: nn.Module, target: Shapes) -> Solved:
    """All integers of ``model.config`` from which the class has the shapes in ``target``.

    They may mean different networks: half as many heads have the shapes of heads half as wide.

    Args:
        model: a network of the class.
        target: shapes by name in the state dict.

    Returns:
        The integers that change, by where they are, for each such configuration; and for people, what no
        configuration says.
    """
    if not has_config(model):
        return iter(()), lambda: f"{type(model).__name__} has no configuration that it could be built from"
    builds = _Builds(model, target)
    before = builds.shapes({})
    kind = type(model).__name__
    if before is None:
        return iter(()), lambda: f"{kind} cannot be built from its own configuration"
    if before.keys() != target.keys():
        gone, added = (few(sorted(a.keys() - b.keys())) for a, b in ((before, target), (target, before)))
        lacks = f"{kind} without {gone}" if gone else f"{kind} with {added}"
        return iter(()), lambda: f"no configuration gives a {lacks}"
    nearest: list[dict[Key, int]] = [{}]
    found = _search(builds, _choices(builds, before), nearest)

    def reason() -> str:
        made = builds.shapes(nearest[0]) or {}
        differ = [
            f"{name} {shape} (the nearest configuration gives {made.get(name)})"
            for name, shape in target.items()
            if made.get(name) != shape
        ]
        return f"no configuration gives {few(differ)}" if differ else ""

    return found, reason


def _choices(builds: _Builds, before: Shapes) -> list[tuple[Key, int]]:
    """Integers that may change, and what to, judging by which sizes do."""
    narrowed = {
        (old, new)
        for name, shape in builds.target.items()
        for old, new in zip(before[name], shape, strict=False)
        if old != new
    }
    found: dict[Key, set[int]] = defaultdict(set)
    for key, value in _integers(builds.config):
        for old, new in narrowed:
            if value is None:  # computed from another, unless it is given
                found[key].add(new)
            elif (old % value == 0 or value % old == 0) and new * value % old == 0 and new * value >= old:
                found[key].add(new * value // old)
    matter = [key for key, values in found.items() if builds.shapes({key: min(values)}) != before]
    return [(key, value) for key in sorted(matter, key=str) for value in sorted(found[key])]


def _search(
    builds: _Builds, choices: list[tuple[Key, int]], nearest: list[dict[Key, int]]
) -> Iterator[dict[Key, int]]:
    """Change one integer after the other, as long as more shapes are right; two where no single one helps."""
    stack: list[dict[Key, int]] = [{}]
    seen: set[frozenset[tuple[Key, int]]] = set()
    while stack and len(builds.known) < _MOST:
        values = stack.pop()
        wrong = builds.wrong(values)
        if wrong <= builds.wrong(nearest[0]):
            nearest[0] = values
        if not wrong:
            yield values
            continue
        free = [choice for choice in choices if choice[0] not in values]
        better: list[tuple[float, dict[Key, int]]] = []
        for size in (1, 2):
            for step in itertools.islice(itertools.combinations(free, size), _TOGETHER):
                new = {**values, **dict(step)}
                if len(new) == len(values) + size and (left := builds.wrong(new)) < wrong:
                    better.append((left, new))
            if better:
                break
        for _, new in sorted(better, key=lambda item: -item[0]):
            if frozenset(new.items()) not in seen:
                seen.add(frozenset(new.items()))
                stack.append(new)
