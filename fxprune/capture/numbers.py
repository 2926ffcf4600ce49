"""Numbers that remember which attribute of which module they came from, through arithmetic.

Views, splits and slices of a user's ``forward`` take many of their numbers from attributes:
``self.num_heads``, ``self.head_dim``, ``3 * self.embed_dim``. In a marked copy of the model they hold a
:class:`Number`, which is an ``int`` in every other respect; what was captured from the copy says for each
literal where it came from (node metadata ``"origins"``), so that the attribute can be rewritten in place of
the literal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from ..program import named_modules


@dataclass(frozen=True)
class Place:
    """Where a number is kept.

    Attributes:
        path: the module.
        name: its attribute; ``"config.hidden_size"`` for an attribute of an object that it holds.
        item: position in a tuple or list; None where the attribute is the number itself.
    """

    path: str
    name: str
    item: int | None = None

    def __str__(self) -> str:
        name = f"{self.path}.{self.name}" if self.path else self.name
        return name if self.item is None else f"{name}[{self.item}]"


@dataclass(frozen=True)
class Size:
    """The extent of a dimension that the code reads off a tensor.

    Attributes:
        node: what makes the tensor.
        dim: the dimension.
    """

    node: str
    dim: int


Origin = Place | Size | int | float | tuple[str, Any, Any]
"""A place, a size, a plain number, or the name of an operator and two origins."""


@dataclass(frozen=True)
class Comparison:
    """A question that ``forward`` asked: whether a number that has an origin equals another."""

    origin: Origin
    own: int
    other: int


class Number(int):
    """An ``int`` with an origin."""

    origin: Origin
    asked: list[Comparison]

    @classmethod
    def of(cls, value: int, origin: Origin, asked: list[Comparison]) -> Number:
        number = cls(value)
        number.origin, number.asked = origin, asked
        return number

    def _ask(self, other: Any) -> None:
        if type(other) is int:
            self.asked.append(Comparison(self.origin, int(self), other))

    def __eq__(self, other: Any) -> Any:
        self._ask(other)
        return int.__eq__(self, other)

    def __ne__(self, other: Any) -> Any:
        self._ask(other)
        return int.__ne__(self, other)

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


_OPERATORS = ("add", "sub", "mul", "floordiv", "mod")


def _arithmetic(name: str, reflected: bool) -> Callable[[Number, Any], Any]:
    method = f"__{'r' if reflected else ''}{name}__"
    plain = getattr(int, method)

    def compute(self: Number, other: Any) -> Any:
        result = plain(self, other)
        if type(result) is not int:
            return result
        against: Origin = other.origin if isinstance(other, Number) else int(other)
        operands = (against, self.origin) if reflected else (self.origin, against)
        return Number.of(result, (name, *operands), self.asked)

    return compute


for _name in _OPERATORS:
    for _reflected in (False, True):
        setattr(Number, f"__{'r' if _reflected else ''}{_name}__", _arithmetic(_name, _reflected))


def evaluate(origin: Origin, values: Mapping[Place | Size, int]) -> int | float:
    """The number at an origin, with these ``values`` of the places and sizes in it."""
    if isinstance(origin, (Place, Size)):
        return values[origin]
    if isinstance(origin, tuple):
        name, *operands = origin
        result: int | float = getattr(operator, name)(*(evaluate(operand, values) for operand in operands))
        return result
    return origin


def parts(origin: Origin) -> Iterator[Origin]:
    """An origin and all that it is computed from."""
    yield origin
    if isinstance(origin, tuple):
        for operand in origin[1:]:
            yield from parts(operand)


def places(origin: Origin) -> Iterator[Place]:
    """The places that a number depends on."""
    return (part for part in parts(origin) if isinstance(part, Place))


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_OF_LEAVES = frozenset(["groups", "num_groups", "normalized_shape"])
"""What is marked in layers of ``torch.nn``: numbers that are handed to functions."""


def mark(model: nn.Module) -> list[Comparison]:
    """Let the numbers in the attributes of ``model``, a copy of ours, remember where they are.

    Numbers in the plain objects that its modules hold (a configuration) are marked, too. Returns the list
    that questions will be noted in.
    """
    asked: list[Comparison] = []
    seen: set[int] = set()
    for path, module in named_modules(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        layer = type(module).__module__.startswith("torch.nn.")
        for name, value in list(module.__dict__.items()):
            if name in _OF_EVERY_MODULE or (layer and name not in _OF_LEAVES):
                continue
            module.__dict__[name] = _marked(value, path, name, asked)
            if not layer and _is_plain(value) and id(value) not in seen:
                seen.add(id(value))
                for inner, held in list(value.__dict__.items()):
                    if type(held) is int:
                        value.__dict__[inner] = Number.of(held, Place(path, f"{name}.{inner}"), asked)
    return asked


def _marked(value: Any, path: str, name: str, asked: list[Comparison]) -> Any:
    if type(value) is int:
        return Number.of(value, Place(path, name), asked)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(Number.of(item, Place(path, name, i), asked) for i, item in enumerate(value))
    return value


def _is_plain(value: Any) -> bool:
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, (type, nn.Module, torch.Tensor))
        and not callable(value)
        and not type(value).__module__.startswith(("torch.", "builtins", "collections"))
    )


def unmarked(value: Any) -> Any:
    """The same value with plain numbers."""
    if isinstance(value, Number):
        return int(value)
    if type(value) in (tuple, list):
        return type(value)(map(unmarked, value))
    return value


def write(model: nn.Module, place: Place, value: int) -> None:
    """Put another number at ``place``."""
    *holders, name = place.name.split(".")
    owner: Any = model.get_submodule(place.path)
    for holder in holders:
        owner = owner.__dict__[holder]
    if place.item is not None:
        old = owner.__dict__[name]
        items = [value if i == place.item else item for i, item in enumerate(old)]
        value = type(old)(items)
    owner.__dict__[name] = value


def numbers(args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """All leaves of a call's arguments, in order; those of slices, too."""
    found: list[Any] = []

    def walk(item: Any) -> None:
        if isinstance(item, (tuple, list)):
            for part in item:
                walk(part)
        elif isinstance(item, Mapping):
            for part in item.values():
                walk(part)
        elif isinstance(item, slice):
            walk((item.start, item.stop, item.step))
        else:
            found.append(item)

    walk(args)
    walk(kwargs)
    return found


def note_origins(graph: fx.Graph) -> None:
    """Note origins in the metadata of nodes whose arguments have any, and leave plain numbers there."""

    def plain(item: Any) -> Any:
        if isinstance(item, slice):
            return slice(plain(item.start), plain(item.stop), plain(item.step))
        if isinstance(item, (tuple, list)):
            return tuple(map(plain, item)) if isinstance(item, tuple) else list(map(plain, item))
        if isinstance(item, dict):
            return {key: plain(part) for key, part in item.items()}
        return int(item) if isinstance(item, Number) else item

    for node in graph.nodes:
        leaves = numbers(node.args, node.kwargs)
        found = {place: leaf.origin for place, leaf in enumerate(leaves) if isinstance(leaf, Number)}
        if found:
            node.meta["origins"] = found
            node.args, node.kwargs = plain(node.args), plain(dict(node.kwargs))


def note_question(one: Any, other: Any) -> None:
    """Note that two numbers were compared, where one of them has an origin."""
    for own, against in ((one, other), (other, one)):
        if isinstance(own, Number):
            own._ask(against)


class Recorder(TorchFunctionMode):
    """Notes origins in the nodes that ``torch.export`` makes of the calls of torch functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = get_proxy_mode()
        given = numbers(args, kwargs) if mode is not None else []
        if mode is None or not any(isinstance(number, Number) for number in given):
            return func(*args, **kwargs)
        graph: fx.Graph = mode.tracer.graph
        last = next(iter(reversed(graph.nodes)), None)
        out = func(*args, **kwargs)
        for node in reversed(graph.nodes):
            if node is last:
                break
            found = _found(given, numbers(node.args, node.kwargs))
            if found:
                node.meta["origins"] = found
        return out


def _found(given: list[Any], made: list[Any]) -> dict[int, Origin]:
    """Origins by position in the arguments of a node that was made for a call with the numbers ``given``.

    Where both have equally many arguments, each follows the one in its place; else one of the same value.
    """
    found: dict[int, Origin] = {}
    aligned = len(given) == len(made)
    for place, number in enumerate(given):
        if not isinstance(number, Number):
            continue
        if aligned:
            if type(made[place]) is int and made[place] == int(number):
                found[place] = number.origin
            continue
        same = [at for at, value in enumerate(made) if type(value) is int and value == int(number)]
        if len(same) == 1:
            found[same[0]] = number.origin
    return found


def carries_numbers(model: nn.Module) -> bool:
    """Whether :func:`mark` was called with the model."""
    return any(isinstance(value, Number) for module in model.modules() for value in module.__dict__.values())


__all__ = [
    "Comparison",
    "Number",
    "Origin",
    "Place",
    "Recorder",
    "Size",
    "carries_numbers",
    "evaluate",
    "mark",
    "note_origins",
    "note_question",
    "numbers",
    "parts",
    "places",
    "unmarked",
    "write",
]
