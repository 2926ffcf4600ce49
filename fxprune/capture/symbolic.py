"""Rung 1: ``torch.fx`` symbolic tracing, with a tracer of our own.

What it does beyond ``torch.fx.Tracer``:

- nested inputs (lists, dicts) become real containers of proxies, so that ``len`` and iteration work;
- inputs that were not given keep their defaults and leave the signature; non-tensor inputs are checked
  at run time against the value that was captured;
- ``self.training`` handed to a function stays dynamic (see :class:`fxprune.nn.TrainingFlag`);
- each node remembers the user's source line.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, ExampleInputsError
from ..nn import TrainingFlag
from ..program import Program, Skeleton, describe_source

_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep, "<")


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Trace ``model`` with the structure of ``args`` and ``kwargs``.

    Raises:
        CaptureError: if the forward cannot be traced; names the source line.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    tracer = _Tracer(model, _arguments(model, args, kwargs))
    graph = tracer.capture()
    return Program(
        graph=graph,
        modules={path: tracer.leaf(path) for path in tracer.leaf_paths()},
        tensors=dict(_tensors(model)),
        skeleton=_skeleton(model, tracer),
    )


def check_value(value: Any, expected: Any, name: str) -> None:
    """In captured graphs: refuse a non-tensor input that differs from the captured one."""
    if value is not expected and value != expected:
        raise ValueError(f"the input {name!r} was {expected!r} when the model was captured; got {value!r}.")


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The given inputs by name; positional extras of ``*args`` are numbered."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}. Give a "
            f"tensor, a tuple of positional inputs or a dict of keyword inputs."
        ) from error
    return dict(bound.arguments)


class _Flag(int):
    """The value of a module's ``training`` attribute while tracing: a truth value with an owner."""

    owner: nn.Module


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.flags: dict[str, TrainingFlag] = {}
        self.tensor_names = {id(tensor): name for name, tensor in reversed(list(_tensors(model)))}
        self.tensor_proxies: dict[str, fx.Proxy] = {}

    def capture(self) -> fx.Graph:
        try:
            with _dynamic_training(self.model):
                graph = super().trace(self.model)
        except (CaptureError, ExampleInputsError):
            raise
        except Exception as error:  # whatever a user's forward raises on symbolic values
            raise CaptureError(f"{_blame(error)}{type(error).__name__}: {error}") from error
        return graph

    # -- inputs ---------------------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        signature = inspect.signature(self.model.forward)
        positional: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for name, parameter in signature.parameters.items():
            if name not in self.arguments:
                continue
            given = self.arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += [self._input(f"{name}_{i}", item) for i, item in enumerate(given)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords.update({key: self._input(key, item) for key, item in given.items()})
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = self._input(name, given)
            elif len(positional) - 1 == list(signature.parameters).index(name):
                positional.append(self._input(name, given))
            else:  # an earlier positional one keeps its default
                keywords[name] = self._input(name, given)

        def call(*values: Any) -> Any:
            return root_fn(*values, **keywords)

        return call, positional

    def _input(self, name: str, given: Any) -> Any:
        leaves, spec = pytree.tree_flatten(given)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            proxy = self.create_proxy("placeholder", name, (given,), {})
            self.create_proxy("call_function", check_value, (proxy, given, name), {})
            return given
        proxy = self.create_proxy("placeholder", name, (), {})
        if isinstance(given, torch.Tensor):
            return proxy
        items = []
        for path, leaf in pytree.tree_flatten_with_path(given)[0]:
            item = proxy
            for key in path:
                item = item[getattr(key, "idx", getattr(key, "key", None))]
            items.append(item if isinstance(leaf, torch.Tensor) else leaf)
        return pytree.tree_unflatten(items, spec)

    # -- modules and tensors --------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TrainingFlag) or is_leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        name = self.tensor_names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        if name not in self.tensor_proxies:
            self.tensor_proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self.tensor_proxies[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Flag):
            owner = self.path_of_module(a.owner) if a.owner is not self.model else ""
            path = f"{owner}.training_flag" if owner else "training_flag"
            if path not in self.flags:
                self.flags[path] = TrainingFlag().train(bool(a))
            return self.create_node("call_module", path, (), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and node.op not in ("placeholder", "output"):
            node.meta["source"] = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return node

    # -- what the graph refers to ---------------------------------------------------------------

    def leaf_paths(self) -> list[str]:
        return [str(node.target) for node in self.graph.nodes if node.op == "call_module"]

    def leaf(self, path: str) -> nn.Module:
        return self.flags[path] if path in self.flags else self.model.get_submodule(path)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as one node: those of ``torch.nn``, and none that merely contain."""
    name = type(module).__module__
    return name.startswith(("torch.nn.", "torch.ao.nn.", "fxprune.nn")) and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _skeleton(model: nn.Module, tracer: _Tracer) -> Skeleton:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    training: dict[str, bool] = {}
    leaves = set(tracer.leaf_paths())
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        training[path] = module.training
        modules[path] = module
        if id(module) in first:
            aliases[path] = first[id(module)]
        else:
            first[id(module)] = path
    buffers = {}
    for path, module in modules.items():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers[f"{path}.{name}" if path else name] = name not in module._non_persistent_buffers_set
    names = tuple(name for name, _ in _tensors(model))
    return Skeleton(training, frozenset(leaves), aliases, buffers, names)


@contextlib.contextmanager
def _dynamic_training(model: nn.Module) -> Iterator[None]:
    """While it lasts, ``module.training`` of the traced modules is a :class:`_Flag`.

    Done with a property on ``nn.Module``, as ``torch.fx`` itself does for ``__call__`` and
    ``__getattr__``: the modules are not written to.
    """
    owned = {id(module) for module in model.modules()}

    def read(module: nn.Module) -> Any:
        try:
            value = module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None
        if id(module) not in owned:
            return value
        flag = _Flag(value)
        flag.owner = module
        return flag

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value

    nn.Module.training = property(read, write)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        del nn.Module.training


def _blame(error: BaseException) -> str:
    """The innermost line of the user's code in a traceback."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_SKIPPED):
            where = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}: "
        trace = trace.tb_next
    return where


__all__ = ["check_value", "describe_source", "is_leaf", "trace"]
