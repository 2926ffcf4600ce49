"""Module classes that stay whole in a captured graph, and the attributes in which modules keep widths."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from .errors import RuleError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Attributes = Callable[[Any, Shapes, Shape | None, Shape | None], Mapping[str, Any]]
"""``(module, shapes of its tensors, of its first input, of its output) -> new values of attributes``."""


@dataclass(frozen=True)
class LeafClass:
    """A registered module class.

    Attributes:
        module_class: the class, or ``module.name`` of a class in a library that may not be installed.
        couple: how it couples, ``(coupler, module, args, kwargs, out)``; None to follow its ``forward``.
        outputs: makes meta tensors of the results' shapes from the inputs; None if only ``forward`` can.
        attributes: what it remembers of its widths, or None.
        site: ``file:line`` of the registration.
        given: what it was registered with, to tell whether a second registration is the same.
        runs: whether ``forward`` is tried on shapes before ``outputs``.
    """

    module_class: type[nn.Module] | str
    couple: Callable[..., None] | None
    outputs: Callable[..., Any] | None
    attributes: Attributes | None
    site: str
    given: Any
    runs: bool = True


class Registration:
    """Undoes a registration by :meth:`remove`, or at the end of a ``with`` block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        self._undo()

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


_LEAVES: dict[type | str, LeafClass] = {}
_FOUND: weakref.WeakKeyDictionary[type, LeafClass | None] = weakref.WeakKeyDictionary()


def leaf_for(module: nn.Module) -> LeafClass | None:
    """The registration of a module's class, or of the nearest class that it inherits from."""
    kind = type(module)
    if kind not in _FOUND:
        keys = [key for base in kind.__mro__ for key in (base, f"{base.__module__}.{base.__qualname__}")]
        _FOUND[kind] = next((_LEAVES[key] for key in keys if key in _LEAVES), None)
    return _FOUND[kind]


_HARMLESS = frozenset(
    ["__annotations__", "__annotate_func__", "__annotations_cache__", "__constants__", "__dict__", "__doc__",
     "__firstlineno__", "__init__", "__module__", "__orig_bases__", "__parameters__", "__qualname__",
     "__repr__", "__static_attributes__", "__weakref__", "_get_name", "_load_from_state_dict",
     "_save_to_state_dict", "_version", "extra_repr", "load_state_dict", "reset_parameters",
     "reset_running_stats", "state_dict", "train"]
)  # fmt: skip
"""What a subclass may have of its own without computing anything else than its parent."""


@functools.lru_cache(maxsize=4096)
def own_kind(kind: type) -> type:
    """The class whose ``forward`` and helpers a class runs: ``nn.BatchNorm2d`` for a subclass that changes
    none of them.

    Such a subclass may add attributes, and say how it is initialised, printed and switched by ``train()``.
    """
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules."):
            return base
        after = kind.__mro__[kind.__mro__.index(base) + 1 :]
        known = {name for other in after for name in (*vars(other), *vars(other).get("__annotations__", ()))}
        own = {name: value for name, value in vars(base).items() if name not in _HARMLESS}
        if any(name in known or hasattr(value, "__set__") for name, value in own.items()):
            break
    return kind


def register_leaf(leaf: LeafClass, same: Callable[[Any, Any], bool]) -> None:
    """Add a registration; one that says the same may be there already."""
    present = _LEAVES.get(leaf.module_class)
    if present is not None and not same(present.given, leaf.given):
        name = getattr(leaf.module_class, "__qualname__", leaf.module_class)
        raise RuleError(
            f"{name} is registered twice, differently: {present.site} and {leaf.site}. "
            f"fxprune.unregister({name}) removes the first."
        )
    _LEAVES[leaf.module_class] = leaf
    _FOUND.clear()


def leaf_registrations() -> tuple[LeafClass, ...]:
    """All registrations."""
    return tuple(_LEAVES.values())


def unregister_leaf(module_class: type) -> None:
    _LEAVES.pop(module_class, None)
    _FOUND.clear()


_AXIS = re.compile(r"^([\w.]+)\[(-?\d+)\]$")


def attribute_rule(given: Any, name: str) -> Attributes | None:
    """The function that a table of attributes (or a function) stands for."""
    if given is None:
        return None
    if callable(given):
        function: Attributes = given
        return function
    if not isinstance(given, dict):
        raise RuleError(
            f"the attributes of {name} are a dict such as {{'channels': 'weight[0]'}}, or a function; got "
            f"{given!r}."
        )
    axes = {}
    for attribute, axis in given.items():
        match = _AXIS.match(axis) if isinstance(axis, str) else None
        if match is None:
            raise RuleError(
                f"the attribute {attribute!r} of {name} follows an axis such as 'weight[0]', 'input[1]' or "
                f"'output[-1]'; got {axis!r}."
            )
        axes[attribute] = (match[1], int(match[2]))

    def changes(
        module: Any, shapes: Shapes, inputs: Shape | None, outputs: Shape | None
    ) -> Mapping[str, Any]:
        known = {**shapes, "input": inputs, "output": outputs}
        new = {}
        for attribute, (tensor, dim) in axes.items():
            if not hasattr(module, attribute):
                raise RuleError(f"{name} has no attribute {attribute!r}, which its registration names.")
            if tensor not in known:
                raise RuleError(
                    f"{name} has no tensor {tensor!r}, which its registration names; it has "
                    f"{', '.join(known)}."
                )
            shape = known[tensor]
            if shape is None:
                continue
            if not -len(shape) <= dim < len(shape):
                raise RuleError(f"{tensor} of {name} has {len(shape)} axes, so there is no {tensor}[{dim}].")
            new[attribute] = shape[dim]
        return new

    return changes


__all__ = [
    "Attributes",
    "LeafClass",
    "Registration",
    "attribute_rule",
    "leaf_for",
    "own_kind",
    "register_leaf",
    "unregister_leaf",
]
