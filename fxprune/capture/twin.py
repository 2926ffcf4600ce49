"""A twin of a model to capture in its place: whatever a forward writes, the user's own model stays as it is.

A forward may assign to attributes and to ``.data``, write into tensors, fill caches, register hooks. The twin
has modules, containers and objects of its own, and other tensors.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..inputs import meta_like
from ..program import Through, wrapped

Swap = Callable[[torch.Tensor], torch.Tensor]

_PLAIN = frozenset([type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device])
_FOREIGN = frozenset(
    ["torch", "numpy", "builtins", "collections", "functools", "logging", "threading", "weakref"]
)
"""Packages whose objects are taken as they are."""


class Twin:
    """The copy of a model, and what of it belongs to what.

    Attributes:
        model: the copy.
        tensors: every tensor of the original that was met, with what stands for it, by the id of that.
    """

    def __init__(self, model: nn.Module, swap: Swap) -> None:
        """``swap`` gives the tensor that stands for one of the original's."""
        self._swap = swap
        self._made: dict[int, Any] = {}
        self.tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.model: nn.Module = self._of(model)

    def _of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, torch.Tensor):
            self._made[id(value)] = new = self._swap(value)
            self.tensors[id(new)] = value, new
            return new
        if isinstance(value, nn.Module):
            return value if isinstance(value, torch.jit.ScriptModule) else self._object(value)
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self, value)
        if isinstance(value, tuple):
            items = [self._of(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return kind._make(items) if hasattr(kind, "_make") else kind(items)
        if kind is MethodType:
            owner = self._of(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if kind is functools.partial:
            call, args, kwargs = (self._of(part) for part in (value.func, value.args, value.keywords))
            return functools.partial(call, *args, **kwargs)
        if kind is FunctionType:
            return self._function(value)
        return self._object(value) if holds(value) else value

    def _function(self, value: FunctionType) -> FunctionType:
        """A function that has, in its closure and among its defaults, what stands for parts of the model."""
        if _is_foreign(value):
            return value
        code, cells = value.__code__, tuple(CellType() for _ in value.__closure__ or ())
        new = FunctionType(code, value.__globals__, value.__name__, value.__defaults__, cells)
        self._made[id(value)] = new  # which may call itself
        pairs: list[tuple[Any, Any]] = []

        def within(held: Any) -> Any:
            pairs.append((held, self._within(held)))
            return pairs[-1][1]

        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # of an empty one
                cell.cell_contents = within(old.cell_contents)
        new.__defaults__ = value.__defaults__ and tuple(map(within, value.__defaults__))
        named = value.__kwdefaults__
        new.__kwdefaults__ = named and {name: within(held) for name, held in named.items()}
        if all(made is held or made is new for held, made in pairs):
            self._made[id(value)] = value
            return value
        new.__dict__.update(value.__dict__)
        return new

    def _within(self, value: Any) -> Any:
        """What stands for something that a function holds; objects that are not the model's stay."""
        held = isinstance(value, (nn.Module, torch.Tensor)) or type(value) in _HELD
        return self._of(value) if held or id(value) in self._made else value

    def _object(self, value: Any) -> Any:
        inner = wrapped(value) if isinstance(value, nn.Module) else None
        if inner is not None:
            self._made[id(value)] = through = Through(self._of(value._modules[inner]), inner, value.training)
            return through
        try:
            new = object.__new__(type(value))
        except TypeError:  # made in another language than Python
            try:
                new = copy.copy(value)
            except Exception:  # noqa: BLE001  whatever a user's class raises
                return value
        self._made[id(value)] = new
        state, made = new.__dict__, self._made
        state.update(value.__dict__)
        for name, attribute in value.__dict__.items():
            kind = type(attribute)
            if kind in _PLAIN:
                continue
            if kind in _TABLES and not attribute and id(attribute) not in made:  # a module has a dozen
                made[id(attribute)] = state[name] = kind()
            else:
                state[name] = self._of(attribute)
        if isinstance(new, nn.Module):
            state.pop("_compiled_call_impl", None)  # which would run the original
        return new

    def of(self, module: nn.Module) -> nn.Module:
        """What stands for a module of the original; any other module itself."""
        found: nn.Module = self._made.get(id(module), module)
        return found

    def _mapping(self, value: Any) -> Any:
        self._made[id(value)] = new = value.copy() if type(value) is defaultdict else type(value)()
        if new:
            new.clear()
        for key, item in value.items():
            new[key if type(key) is str else self._of(key)] = self._of(item)
        return new

    def _sequence(self, value: Any) -> Any:
        self._made[id(value)] = new = value.copy()
        new.clear()
        add = new.add if isinstance(new, set) else new.append
        for item in value:
            add(self._of(item))
        return new


def twin_on_meta(model: nn.Module) -> nn.Module:
    """A twin of ``model`` that has shapes alone."""

    def shape_of(tensor: torch.Tensor) -> torch.Tensor:
        new = meta_like(tensor)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    return Twin(model, shape_of).model


def twin_with_parameters_of(model: nn.Module) -> nn.Module:
    """A twin of ``model`` that computes the same, shares its parameters, and has buffers of its own."""
    return Twin(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()).model


def _is_foreign(kind: Any) -> bool:
    """Whether a class or function is of a package whose objects are taken as they are."""
    return (kind.__module__ or "").partition(".")[0] in _FOREIGN


def holds(value: Any) -> bool:
    """Whether ``value`` is a container, or an object of a user's class, into which a forward may write."""
    kind = type(value)
    if kind in _CONTAINERS:
        return True
    return not _is_foreign(kind) and hasattr(value, "__dict__") and not isinstance(value, _IMMUTABLE)


_IMMUTABLE = (type, enum.Enum, nn.Module, int)

_CONTAINERS: dict[type, Callable[[Twin, Any], Any]] = {
    **dict.fromkeys([dict, OrderedDict, defaultdict], Twin._mapping),
    **dict.fromkeys([list, deque, set], Twin._sequence),
}
_TABLES = frozenset([dict, OrderedDict])
_HELD = frozenset([*_CONTAINERS, tuple, MethodType, FunctionType, functools.partial])


_FACTS = frozenset(
    ["shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "dtype", "device", "layout",
     "requires_grad", "is_leaf", "grad", "grad_fn", "is_floating_point", "is_complex", "is_signed",
     "is_contiguous", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested",
     "is_inference", "get_device",
     "element_size", "itemsize", "nbytes", "storage_offset", "names", "_version", "__hash__", "__len__",
     "__repr__", "__format__", "output_nr", "_is_view", "retains_grad"]
)  # fmt: skip
"""What may be asked of a tensor without looking at its values."""


class StandIn(torch.Tensor):
    """Stands for a parameter or buffer while its model is traced: what is computed from it becomes a node.

    It has the shape, type and device of the tensor, and no memory.
    """

    read: Callable[[], fx.Proxy]

    @staticmethod
    def of(tensor: torch.Tensor, read: Callable[[], fx.Proxy]) -> torch.Tensor:
        """A stand-in for ``tensor``, of which ``read`` gives the proxy; ``tensor`` where it is not dense."""
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return tensor
        made: StandIn = torch.Tensor._make_wrapper_subclass(
            StandIn, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device,
            requires_grad=tensor.requires_grad,
        )  # fmt: skip
        made.read = read
        if isinstance(tensor, nn.Parameter):
            made._is_param = True
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        attribute = func.__self__.__name__ if name in ("__get__", "__set__") else name
        if attribute in _FACTS and name != "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(StandIn, StandIn._read, (args, kwargs))
        if name == "__get__":
            return getattr(args[0], attribute)
        if name == "__set__":
            return setattr(args[0], attribute, args[1])
        if isinstance(args[0], fx.Proxy) and func is getattr(torch.Tensor, name, None):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return fx.Proxy.__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func} asks for the values of a parameter while its model is traced")

    def _read(self) -> fx.Proxy:
        return self.read()


__all__ = ["StandIn", "Twin", "holds", "twin_on_meta", "twin_with_parameters_of"]
