"""Shapes of what operators give, found out once for each operator and each kind of arguments.

Networks repeat themselves, and each is looked at more than once: while it is traced, when its dimensions are
coupled, at a second size, when the result is checked. PyTorch's general kernels for meta tensors are Python
functions, of 0.1 to 1 ms a call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .time_steps import RECURRENT, over_few

_MOST = 1 << 14
"""Results that are remembered; with more, all are forgotten."""

_found: dict[Any, Any] = {}
_SCALARS = frozenset([bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device,
                      torch.layout, torch.memory_format])  # fmt: skip

_SEQUENCES = frozenset([tuple, list, immutable_list, torch.Size])


def result(func: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]) -> Any:
    """What the ATen operator ``func`` gives on meta tensors: new ones, as ``run(func, args, kwargs)`` made
    them for arguments of the same shapes, strides and types.

    Operators that write, or whose results are views, and all that are not PyTorch's own always run.
    """
    if not _makes_new(func):
        return run(func, args, kwargs)
    if func in RECURRENT and not kwargs:
        return over_few(func, args, lambda func, args: _remembered(func, args, {}, run))
    return _remembered(func, args, kwargs, run)


def _remembered(func: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]) -> Any:
    key = _key((args, kwargs))
    if key is None:
        return run(func, args, kwargs)
    key = func, key, torch.get_default_dtype()
    found = _found.get(key)
    if found is None:
        out = run(func, args, kwargs)
        described = _described(out)
        if described is not None:
            if len(_found) >= _MOST:
                _found.clear()
            _found[key] = described
        return out
    return _made(found)


def of_call(function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """What a function of PyTorch's, or a method of a tensor by its name, gives on meta tensors, as ``run()``
    made it for arguments of the same shapes, strides and types.

    What gives one of its arguments, or anything but one new tensor, always runs.
    """
    if not (type(function) is str or _is_of_torch(function)):
        return run()
    of_tensor = bool(args) and isinstance(args[0], torch.Tensor)
    if not of_tensor and (type(function) is str or function is operator.getitem):
        return run()
    key = _key((args, kwargs))
    if key is None:
        return run()
    starts = [arg.storage_offset() for arg in args if isinstance(arg, torch.Tensor)]  # views go on from there
    key = function, key, torch.get_default_dtype(), *starts
    found = _found.get(key)
    if found is not None:
        return _made(found)
    out = run()
    described = _described(out) if type(out) is torch.Tensor else None
    if described is not None and all(out is not leaf for leaf in tree_leaves((args, kwargs))):
        if len(_found) >= _MOST:
            _found.clear()
        _found[key] = described
    return out


@functools.cache
def _is_of_torch(function: Any) -> bool:
    """Whether a function is one of PyTorch's own, or an operator of Python's."""
    if isinstance(function, BuiltinFunctionType):
        return str(function.__module__).partition(".")[0] in ("torch", "_operator")
    return isinstance(function, FunctionType) and function.__module__ == "torch.nn.functional"


class Remembered(TorchDispatchMode):
    """While it lasts, operators on meta tensors give what :func:`result` gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever compiled; the guard against it would cost at every call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return result(func, args, kwargs or {}, _call)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether an operator is a function of its arguments alone that gives new tensors."""
    schema = func._schema
    return func.namespace in ("aten", "prims") and not schema.is_mutable and all(
        returned.alias_info is None for returned in schema.returns
    )  # fmt: skip


def _key(argument: Any) -> Any:
    """What of an argument decides on shapes; None where that is not known."""
    kind = type(argument)
    if kind in _SCALARS:
        return kind, argument
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        if not argument.is_meta or argument.layout is not torch.strided or argument.is_neg():
            return None
        if argument.is_complex() and argument.is_conj():
            return None
        return argument.shape, argument.stride(), argument.dtype
    if kind is slice:
        ends = _key((argument.start, argument.stop, argument.step))
        return None if ends is None else (kind, ends)
    if kind in _SEQUENCES:
        parts = [_key(part) for part in argument]
        return None if None in parts else (kind, *parts)
    if kind is dict or kind is immutable_dict:
        parts = [_key(part) for part in argument.values()]
        return None if None in parts else (kind, *argument, *parts)
    return None


def _described(out: Any) -> Any:
    if type(out) is torch.Tensor:
        strided = out.is_meta and out.layout is torch.strided and not out.storage_offset()
        strided = strided and not out.is_neg() and not out.is_conj()
        return (tuple(out.shape), out.stride(), out.dtype) if strided and not out.requires_grad else None
    if type(out) in (tuple, list):
        parts = [_described(part) for part in out]
        return None if None in parts else (type(out), parts)
    return None


def _made(described: Any) -> Any:
    if len(described) == 2:
        kind, parts = described
        return kind(_made(part) for part in parts)
    shape, stride, dtype = described
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


__all__ = ["Remembered", "of_call", "result"]
