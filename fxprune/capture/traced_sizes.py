"""Numbers that a forward makes of sizes stay in the graph: ``len(x)``, ``int(n * 0.5)``, ``np.prod(shape)``.

Python insists that ``len`` and ``int`` return plain numbers, which would be those of the example for good. So
while a model is traced with known shapes, its own code finds others under these names (:func:`patch`), and
proxies take part in NumPy's protocols (:func:`ufunc`, :func:`of_numpy`).
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx

from ..nn import numpy_function
from .patches import Patch, Session

Convert = Callable[[type, fx.Proxy], Any]
"""``int`` or ``float`` of a proxy: another proxy."""

_LIBRARIES = frozenset(
    {"torch", "numpy", "fxprune", "builtins", "__future__", *sys.stdlib_module_names} - {"__main__"}
)
"""Packages in which no model's code stands."""
_READERS = ("einops", "einx")
"""Packages whose functions ask for the types and lengths of what they are given."""


def tables(classes: Iterable[type]) -> list[dict[str, Any]]:
    """The global names that the code of these classes sees, and of the functions that it calls.

    Those are the names in the files of the classes, in all loaded files of their packages, and in the files
    from which they have functions.
    """
    todo = {cls.__module__ for kind in classes for cls in kind.__mro__}
    found: dict[str, dict[str, Any]] = {}
    while todo:
        file = todo.pop()
        if file in found or file not in sys.modules or file.partition(".")[0] in _LIBRARIES:
            continue
        table = found[file] = vars(sys.modules[file])
        todo |= {value.__module__ for value in list(table.values()) if isinstance(value, FunctionType)}
    packages = {file.partition(".")[0] for file in found if "." in file} | set(_READERS)
    for file, module in list(sys.modules.items()):
        if file.partition(".")[0] in packages and file not in found and module is not None:
            found[file] = vars(module)
    return list(found.values())


class _StandsFor(type):
    """The class of what stands for a type: its instances and subclasses are those of the type itself."""

    kind: type

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.kind)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.kind)

    def __eq__(cls, other: object) -> bool:
        return other is cls.kind or other is cls

    def __hash__(cls) -> int:
        return hash(cls.kind)


class _Number(_StandsFor):
    """``int`` or ``float``, which makes a node of a proxy."""

    convert: Callable[..., Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], fx.Proxy) and not kwargs:
            return cls.convert(cls.kind, args[0])
        return cls.kind(*args, **kwargs)


def _number(kind: type, convert: Convert) -> Any:
    names = {"kind": kind, "convert": staticmethod(convert), "dtype": np.dtype(kind)}  # as NumPy reads it
    return _Number(kind.__name__, (kind,), names)


class _Shape(_StandsFor):
    """``torch.Size``, which makes a tuple of proxies."""

    def __call__(cls, items: Any = ()) -> Any:
        items = tuple(items)
        return items if any(isinstance(item, fx.Proxy) for item in items) else cls.kind(items)


class _Type(_StandsFor):
    """``type``, which asks ``kind_of`` for the type of a value."""

    kind_of: Callable[[Any], type]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.kind_of(args[0]) if len(args) == 1 and not kwargs else type(*args, **kwargs)


def types(found: Iterable[dict[str, Any]], kind_of: Callable[[Any], type]) -> Patch:
    """Have ``type(value)`` give what ``kind_of`` says, also for proxies.

    Args:
        found: the global names where that is to hold.
        kind_of: the type of a value; of a proxy that of what it stands for.
    """
    replacement = _Type("type", (type,), {"kind": type, "kind_of": staticmethod(kind_of)})

    def apply(session: Session) -> None:
        for table in found:
            if "type" not in table:
                session.note(table, "type")
                session._begin.append(partial(table.__setitem__, "type", replacement))

    return apply


def patch(
    found: Iterable[dict[str, Any]],
    value: Callable[[fx.Proxy], Any],
    convert: Convert,
    require: Callable[[type, fx.Proxy, str], Any],
    kind_of: Callable[[Any], type],
) -> Patch:
    """Have ``len``, ``int``, ``float``, ``callable`` and ``type`` take proxies for what they stand for.

    While that lasts, ``int``, ``float`` and ``torch.Size`` are other classes, and ``type`` gives these: so
    ``type(3) is int`` is true. It is false for ``kind = int`` that was bound before, where ``==`` is true.

    Args:
        found: the global names where that is to hold.
        value: the value that a proxy has for the example.
        convert: makes an ``int`` or ``float`` of a proxy.
        require: called for ``torch._check(proxy)`` with the error to raise, the proxy and the message.
        kind_of: as for :func:`types`.
    """

    def length(given: Any) -> Any:
        is_tensor = isinstance(given, fx.Proxy) and isinstance(value(given), torch.Tensor)
        return given.shape[0] if is_tensor else len(given)

    def is_callable(given: Any) -> bool:
        return callable(value(given) if isinstance(given, fx.Proxy) else given)

    def check(original: Any) -> Callable[..., Any]:
        def with_error(error: Any, condition: Any, message: Any = None) -> Any:
            if not isinstance(condition, fx.Proxy):
                return original(error, condition, message)
            return require(error, condition, str(message() if callable(message) else message or ""))

        return with_error

    def is_size(original: Any) -> Callable[..., Any]:
        return lambda i, *args, **kwargs: None if isinstance(i, fx.Proxy) else original(i, *args, **kwargs)

    own = {int: _number(int, convert), float: _number(float, convert)}
    size = _Shape("Size", (), {"kind": torch.Size})
    named = {**own, torch.Size: size}

    def named_kind(value: Any) -> type:
        kind = kind_of(value)
        return named.get(kind, kind)

    def apply(session: Session) -> None:
        for table in found:
            for original, replacement in ((len, length), (callable, is_callable)):
                name = original.__name__
                session.note(table, name)
                chosen = session.own(table.get(name, original), replacement)
                session._begin.append(partial(table.__setitem__, name, chosen))
            for kind, replacement in own.items():
                if kind.__name__ not in table:
                    session.note(table, kind.__name__)
                    session._begin.append(partial(table.__setitem__, kind.__name__, replacement))
        types(found, named_kind)(session)
        session.put(torch, "Size", size)  # to other threads it is what it was
        session.replace(torch, "_check_with", check)
        session.replace(torch, "_check_is_size", is_size)

    return apply


_OPERATORS = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "true_divide": operator.truediv,
    "divide": operator.truediv, "floor_divide": operator.floordiv, "power": operator.pow,
    "remainder": operator.mod, "less": operator.lt, "less_equal": operator.le, "greater": operator.gt,
    "greater_equal": operator.ge, "equal": operator.eq, "not_equal": operator.ne,
}  # fmt: skip
"""What Python's operators call where the first operand is a number of NumPy."""


def ufunc(proxy: Any, function: Any, method: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What ``np.log(proxy)`` is, and ``np.float64(2.0) * proxy``."""
    if method != "__call__":
        return NotImplemented
    if function.__name__ in _OPERATORS and not options and len(inputs) == 2:
        return proxy.tracer.create_proxy("call_function", _OPERATORS[function.__name__], inputs, {})
    return of_numpy(proxy, function, inputs, options)


def of_numpy(proxy: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``np.prod(proxy)`` is: a call in the graph, of numbers that are known."""
    name = function.__name__
    if getattr(np, name, None) is not function:
        return NotImplemented
    return proxy.tracer.create_proxy("call_function", numpy_function, (name, *args), kwargs)


__all__ = ["of_numpy", "patch", "tables", "types", "ufunc"]
