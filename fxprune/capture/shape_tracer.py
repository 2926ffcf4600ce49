"""Symbolic tracing with the shapes of the example inputs at hand: the second rung.

Control flow on shapes is decided by them, while sizes stay symbolic in the graph. Given names of functions,
it also *dissolves* these: what torch.fx keeps as one node is traced into.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from .. import known_shapes
from ..graph_module import clone_module
from ..guards import CHECKS, check_decision, check_number
from ..inputs import meta_like
from ..known_shapes import Remembered
from ..known_values import DEVICES, KINDS, UnknownValueError, Values, made_of_sizes
from ..nodes import describe_source, finite_tests, if_finite, mutable, operator_name
from ..program import Program
from ..value_dependent import AS_LIST, OnShapes, call_on_shapes
from . import patches, size_decisions, traced_sizes
from .arguments import Arguments
from .numbers import note_question, numbers
from .source_lines import here
from .symbolic import TracedProxy, Tracer, function_name, is_numbers


def trace_with_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dissolve: frozenset[str] = frozenset()
) -> Program:
    """As :func:`trace`, with the shapes of the inputs known while tracing.

    Args:
        model: the model.
        args: its positional inputs.
        kwargs: its keyword inputs.
        dissolve: functions to trace into, as ``module.name``, though torch.fx was told to keep them whole.
    """
    return ShapeTracer(model, Arguments.of(model, args, kwargs), dissolve).program()


class ShapeProxy(TracedProxy):
    """A proxy that knows its value on meta tensors, and answers questions about it."""

    tracer: ShapeTracer

    @property
    def value(self) -> Any:
        return self.tracer.values[self.node]

    def __bool__(self) -> bool:
        if self.node.target in (operator.eq, operator.ne):
            note_question(*(self.tracer.values.get(a, a) if isinstance(a, fx.Node) else a
                            for a in self.node.args))  # fmt: skip
        return bool(self.tracer.pinned(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.pinned(self, int))

    def __int__(self) -> int:
        return int(self.tracer.pinned(self, int))

    def __float__(self) -> float:
        return float(self.tracer.pinned(self, float))

    def __len__(self) -> int:
        self.tracer.counted(self)
        return len(self.value)

    def __hash__(self) -> int:
        if isinstance(self.value, torch.Size):
            raise TypeError("unhashable: a shape whose sizes may change")  # functools.cache would keep it
        return id(self)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return traced_sizes.ufunc(self, function, method, inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return traced_sizes.of_numpy(self, function, args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        proxy: Any = self  # torch.fx gives it __getitem__ at run time
        return iter([proxy[i] for i in range(len(self))])

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.value, torch.Tensor) and (name in ("ndim", "requires_grad") or name in KINDS):
            return getattr(self.value, name)
        if isinstance(self.value, torch.Tensor) and name in ("dim", "ndimension"):
            return self.value.dim  # a plain number, which dictionaries have as a key
        if isinstance(self.value, torch.Tensor) and name in DEVICES:
            return self.tracer.device.type == name.removeprefix("is_")
        if isinstance(self.value, torch.Tensor) and name == "numpy":
            return partial(self.tracer.as_array, self)
        if isinstance(self.value, torch.device) and name == "type":  # autocast takes no proxy
            return self.value.type
        if name.startswith("__") and name.endswith("__"):  # protocols, of which a proxy has none
            raise AttributeError(name)
        if name == "item" and not isinstance(self.value, torch.Tensor):  # of a number of NumPy
            return lambda: self
        if name == "dtype" and here() in self.tracer.types_decide:
            return self.tracer.pinned_type(self)
        if name in ("shape", "device", "dtype", "T", "mT", "H"):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)


class ShapeTracer(Tracer):
    pins = True

    def __init__(self, model: nn.Module, arguments: Arguments, dissolve: frozenset[str]) -> None:
        super().__init__(model, arguments)
        self.options = (dissolve,)
        self.dissolve = dissolve
        self.values: dict[fx.Node, Any] = {}
        self.metas: dict[int, torch.Tensor] = {}
        self.evaluating = False
        self.clones: dict[str, nn.Module] = {}
        self.known = Values(self.values, self._source)
        self.counts: set[fx.Node] = set()  # lists whose length is checked
        self.others: dict[fx.Node, Any] = {}  # what nodes are where masks select less, if that differs
        self.decided: list[tuple[fx.Node, list[Any]]] = []  # decisions, with the numbers behind them
        self.before: Mapping[fx.Node, Any] = {}  # what nodes of the trace that is followed are
        self.device = next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ShapeProxy(node, self)

    def type_of(self, node: fx.Node) -> type:
        return type(self.values[node])

    def seen(self) -> Mapping[fx.Node, Any]:
        return self.values

    def knows(self, values: Mapping[fx.Node, Any]) -> None:
        self.before = values

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if kind == "call_function" and function_name(target) in self.dissolve:
            plain: Any = map_aggregate((args, kwargs), lambda a: a)
            return target(*mutable(plain[0]), **mutable(plain[1]))
        if kind == "call_method" and target == "new_full" and self._fills_with_tensor(args, kwargs):
            # On shapes alone the tensor has no number that could be filled in.
            return args[0].new_zeros(args[1], **kwargs) + args[2]
        kept = any(isinstance(arg, torch.Size) and self._is_kept(arg) for arg in args)
        if kind.startswith("call"):
            args, kwargs = self._with_numbers(kind, target, args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        try:
            self.values[proxy.node] = self._evaluate(proxy.node)
        except Exception:  # which forward may catch, and go on without it
            self.graph.erase_node(proxy.node)
            raise
        if kept:
            proxy.node.meta["kept shape"] = True
        return proxy

    def _is_kept(self, shape: torch.Size) -> bool:
        """Whether a module has held a shape since before this call."""
        return any(value is shape for module in self.modules.values() for value in vars(module).values())

    def _with_numbers(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call, with numbers for tensors of one number where it does not run without.

        PyTorch takes such a tensor as a bound of a slice or as a size, but not on shapes alone.
        """
        owner = args[0] if kind == "call_method" else None
        indices: dict[int, ShapeProxy] = {}

        def look(item: Any) -> Any:
            if isinstance(item, ShapeProxy) and item is not owner and _is_index(self.values.get(item.node)):
                indices[id(item)] = item
            return item

        map_aggregate((args, kwargs), look)
        if not indices:
            return args, kwargs
        node: Any = fx.Node(self.graph, "", kind, target, *self.create_arg((args, kwargs)))
        try:
            self._on_shapes(node, self.values, 0)
        except (RuntimeError, TypeError, NotImplementedError):
            numbers = {number: self._number(item) for number, item in indices.items()}
            changed: Any = map_aggregate((args, kwargs), lambda item: numbers.get(id(item), item))
            return changed
        finally:
            node.args, node.kwargs = (), {}  # it is not in the graph, and uses nothing
        return args, kwargs

    def _number(self, proxy: ShapeProxy) -> Any:
        """The number in a tensor: a plain one where it depends on constants alone, else a node."""
        if self.known.are_constant(proxy.node):
            return int(self._value(proxy.node))
        return self._converted(int, proxy)

    def as_array(self, proxy: ShapeProxy) -> Any:
        """``tensor.numpy()``: an array where the tensor depends on constants alone, else a node."""
        if self.known.are_constant(proxy.node):
            with contextlib.suppress(TypeError):
                return self._value(proxy.node).numpy()
        return self.create_proxy("call_method", "numpy", (proxy,), {})

    def _fills_with_tensor(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether new floating-point numbers are to be those of a tensor with a single one."""
        given = (*args[::2], kwargs.get("dtype", torch.float32))
        values = [self.values.get(a.node) if isinstance(a, fx.Proxy) else a for a in given]
        types = [v.dtype if isinstance(v, torch.Tensor) else v for v in values]
        floating = all(isinstance(t, torch.dtype) and t.is_floating_point for t in types)
        return len(args) == 3 and floating and isinstance(values[1], torch.Tensor)

    def create_arg(self, a: Any) -> Any:
        node = super().create_arg(a)
        if isinstance(node, fx.Node) and node not in self.values:  # a flag, a constant, an OrderedDict
            flag = node.op == "call_module"
            self.values[node] = self.leaf(str(node.target)).training if flag else self._evaluate(node)
        return node

    def evaluated(self, node: fx.Node) -> None:
        self.values[node] = self._evaluate(node)

    def shape(self, node: fx.Node) -> Any:
        def described(leaf: Any) -> Any:
            return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)

        leaves, structure = pytree.tree_flatten(self.values.get(node))
        return tuple(map(described, leaves)), str(structure)

    def wants_factory(self) -> bool:
        return not self.evaluating

    def _number_patches(self, tables: list[dict[str, Any]]) -> list[patches.Patch]:
        def value(proxy: fx.Proxy) -> Any:
            return self.values[proxy.node] if isinstance(proxy, ShapeProxy) else proxy

        return [traced_sizes.patch(tables, value, self._converted, self._require, self._kind)]

    def _converted(self, kind: type, proxy: fx.Proxy) -> Any:
        """``int(proxy)`` or ``float(proxy)``, as a node where that changes anything."""
        value = self.values.get(proxy.node)
        if type(value) is kind:
            return proxy
        return self.create_proxy("call_function", kind, (proxy,), {})

    def counted(self, proxy: ShapeProxy) -> None:
        """The length of a list of numbers among the inputs is pinned once the code asks for it."""
        node = proxy.node
        if node.op == "placeholder" and is_numbers(self.values[node]) and node not in self.counts:
            self.counts.add(node)
            length = self.create_proxy("call_function", len, (proxy,), {})
            where = f"the code for the list {node.target!r}"
            self.create_proxy("call_function", check_number, (length, len(self.values[node]), where), {})

    def pinned(self, proxy: ShapeProxy, kind: type) -> Any:
        """The plain number that a proxy stands for in the example.

        One that depends on the values of inputs is checked when the graph runs.
        """
        node, seen = proxy.node, self.values[proxy.node]
        if kind is bool and self._tests_finite(node):
            return bool(if_finite(node))
        number = kind(self._value(node)) if isinstance(seen, torch.Tensor) else seen
        if self.evaluating:
            return number
        sized = node in self.others
        if sized and kind is bool and _asks_for_none(node):
            self._note(node, "code for what a mask selects runs also where it selects nothing")
        elif sized and not isinstance(seen, torch.Tensor):
            raise TypeError("control flow depends on how many entries a mask selects")
        elif self.known.inputs(node):
            if not self.known.are_whole(node):
                raise TypeError("control flow depends on the values of an input")
            where = self._note(node, f"a number that depends on values of the inputs stays {number!r}")
            self.create_proxy("call_function", check_number, (self._as(kind, proxy), kind(number), where), {})
        elif not isinstance(seen, torch.Tensor):
            self._decides(self._as(kind, proxy), kind(number))
        return number

    def _tests_finite(self, node: fx.Node) -> bool:
        """Whether a node asks for infinite values or NaN where there are none, as far as anybody knows."""
        if if_finite(node) is None or self.evaluating:
            return False
        asked = [*finite_tests(node)]
        try:
            for part in asked:
                self._value(part)
        except TypeError:
            if any(map(self._is_meant_infinite, asked)):
                raise
            self._note(node, "code for values that are infinite or not a number is left out")
            return True
        return False

    def _is_meant_infinite(self, test: fx.Node) -> bool:
        """Whether the code puts infinity or NaN into what ``test`` is about, as masks of attention do."""
        todo, seen = [test], {test}
        while todo:
            part = todo.pop()
            value = self.originals.get(str(part.target)) if part.op == "placeholder" else None
            if part.op == "get_attr":
                value = self._source(part)  # no parameter's
            if isinstance(value, torch.Tensor) and not value.is_meta and not torch.isfinite(value).all():
                return True
            given = numbers(part.args, part.kwargs)
            if not all(math.isfinite(number) for number in given if isinstance(number, float)):
                return True
            if operator_name(part) not in _FROM_INFINITE:
                new = set(part.all_input_nodes) - seen
                seen |= new
                todo += new
        return False

    def _as(self, kind: type, proxy: ShapeProxy) -> Any:
        """What control flow sees of a number: of ``if n:`` whether there is any."""
        if kind is not bool or isinstance(self.values[proxy.node], bool):
            return proxy
        return self.create_proxy("call_function", bool, (proxy,), {})

    def _decides(self, proxy: ShapeProxy, answer: Any) -> None:
        """Control flow follows a number that sizes decide on."""
        where = describe_source(proxy.node) or "the model"
        check = self.create_proxy("call_function", check_decision, (proxy, answer, where), {}).node
        if self.following is None:
            size_decisions.note(check, self.values)
        else:
            parts = size_decisions.behind(proxy.node, self.values)
            self.decided.append((check, size_decisions.numbers(parts, self.values)))

    def is_made_anew(self, before: torch.Tensor | None, value: fx.Proxy) -> bool:
        made = self.values.get(value.node)
        if before is None or not isinstance(made, torch.Tensor) or made.shape == before.shape:
            return False
        return made_of_sizes(value.node, without=self.tensors)

    def meets(self) -> None:
        for check, values in self.decided:
            check.meta["decision"].others.append(values)

    def lines_for_types(self, graph: fx.Graph) -> frozenset[str]:
        asked = graph.find_nodes(op="call_function", target=getattr)
        return frozenset(
            "{}:{} in {}: ".format(*node.meta["source"])
            for node in asked
            if node.args[1] == "dtype" and not node.users and "source" in node.meta
        )

    def pinned_type(self, proxy: ShapeProxy) -> torch.dtype:
        """The type of a tensor as a plain value, which the graph checks."""
        found: Any = self.create_proxy("call_function", getattr, (proxy, "dtype"), {})
        seen: torch.dtype = found.value
        if self.following is not None:  # to see whether it makes a difference
            return seen
        where = self._note(found.node, f"the type of a tensor, of which the code asks, stays {seen}")
        self.create_proxy("call_function", check_number, (found, seen, where), {})
        return seen

    def _note(self, node: fx.Node, what: str) -> str:
        """Say in the notes what is pinned; gives the line of the model."""
        where = describe_source(node) or "the model"
        note = f"{what} ({where})"
        if note not in self.notes:
            self.notes.append(note)
        return where

    def _value(self, node: fx.Node) -> Any:
        """The value of a node that depends on inputs and constants alone."""
        self.evaluating = True
        try:
            return self.known.of(node)
        except UnknownValueError as error:
            raise TypeError("control flow depends on the values of a tensor") from error
        finally:
            self.evaluating = False

    def _source(self, node: fx.Node) -> Any:
        """What the values of a placeholder, or of a tensor that is no parameter, are read from."""
        if node.op == "placeholder":
            self.reads_values = True
            return self.originals[str(node.target)]
        tensor = self.tensors[str(node.target)]
        return None if isinstance(tensor, nn.Parameter) else tensor

    def _require(self, error: type[Exception], condition: fx.Proxy, message: str) -> None:
        """``torch._check(condition, message)``: the graph asserts it, too."""
        held = self.values.get(condition.node)
        if not isinstance(held, torch.Tensor) and not held:
            raise error(message)
        self.create_proxy("call_function", torch._assert, (condition, message), {})

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.evaluating else super().call_module(m, forward, args, kwargs)

    def _evaluate(self, node: fx.Node) -> Any:
        if node in self.before:
            return self.before[node]
        if node.op == "placeholder":
            return self.given[str(node.target)]
        if node.op == "get_attr":
            return self._meta(self.tensors[str(node.target)])
        if node.op == "output" or node.target in CHECKS:
            return None
        result, by_values = self._on_shapes(node, self.values, 0)
        if by_values or (self.others and not self.others.keys().isdisjoint(node.all_input_nodes)):
            with contextlib.suppress(Exception):  # less need not be possible
                other, _ = self._on_shapes(node, ChainMap(self.others, self.values), 1)
                if isinstance(result, bool) or _sizes(other) != _sizes(result):
                    self.others[node] = other
        return result

    def _on_shapes(self, node: fx.Node, values: Mapping[fx.Node, Any], fewer: int) -> tuple[Any, bool]:
        """What a node gives on shapes alone, and whether values decide on its size.

        Args:
            node: the node.
            values: what its inputs are.
            fewer: how many entries masks leave out.
        """
        args: Any = map_arg(node.args, values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, values.__getitem__)
        if node.target is getattr:  # control flow must see the model's device
            tensor = isinstance(args[0], torch.Tensor)
            return self.device if tensor and args[1] == "device" else getattr(*args), False
        if _names_device((args, kwargs)) and getattr(node.target, "__module__", "") != "_operator":
            # What is computed is on no device.
            args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
        if _reads_numbers(node, args):
            return self._read(node), False
        self.evaluating = True

        def run() -> Any:
            with torch.no_grad(), Remembered():
                return self._meta_call(node, args, kwargs)

        try:
            if node.op == "call_module":
                return run(), False
            if not kwargs and all(type(a) in _NUMBERS for a in args):
                return self._meta_call(node, args, kwargs), False
            return known_shapes.of_call(node.target, args, kwargs, run), False
        except (RuntimeError, NotImplementedError):
            if node.op == "call_module":
                raise
            with torch.no_grad(), OnShapes(fewer) as shapes:
                return self._meta_call(node, args, kwargs), shapes.by_values
        finally:
            self.evaluating = False

    def _read(self, node: fx.Node) -> Any:
        """The numbers that a node reads off a tensor. Lists of lengths need not be known."""
        try:
            tensor = self._value(node.all_input_nodes[0])
        except TypeError:
            if node.target in AS_LIST:
                return None
            if if_finite(node) is None:
                raise
            return bool(if_finite(node))
        kind: Any = node.target
        number = getattr(tensor, kind)() if node.op == "call_method" else kind(tensor)
        if self.following is None:
            node.meta["number"] = number
        return number

    def _meta_call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a node gives on shapes alone."""
        return call_on_shapes(node, args, kwargs, self._clone)

    def _clone(self, path: str) -> nn.Module:
        if path not in self.clones:
            self.clones[path] = clone_module(self.leaf(path), lambda _, tensor: self._meta(tensor))
        return self.clones[path]

    def _meta(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.metas.setdefault(id(tensor), meta_like(tensor))


_FROM_INFINITE = frozenset(["softmax", "_softmax", "scaled_dot_product_attention"])
"""Operators that give finite values where masks of infinity are meant for them."""
_NUMBERS = frozenset([bool, int, float, torch.Size])
"""Types of which no operator makes a tensor, as long as there is none beside them."""


def _names_device(value: Any) -> bool:
    """Whether a device is among arguments."""
    if isinstance(value, (tuple, list)):
        return any(map(_names_device, value))
    if isinstance(value, dict):
        return any(map(_names_device, value.values()))
    return isinstance(value, torch.device)


def _sizes(tree: Any) -> list[Any]:
    """The shapes of tensors in a tree, and its numbers."""
    return [leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(tree)]


def _reads_numbers(node: fx.Node, args: Any) -> bool:
    """Whether a node makes numbers of the values of a tensor."""
    if not args or not isinstance(args[0], torch.Tensor) or len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_method":
        return node.target == "item" or node.target in AS_LIST
    return node.op == "call_function" and node.target in (int, float, bool)


def _is_index(value: Any) -> bool:
    whole = isinstance(value, torch.Tensor) and not value.dim() and value.dtype != torch.bool
    return whole and not (value.is_floating_point() or value.is_complex())


def _asks_for_none(node: fx.Node) -> bool:
    """Whether a node compares a size with none or one: is there anything?"""
    if node.op == "call_method" or node.target is operator.getitem:
        return True  # the size itself, as a truth value
    numbers = [a for a in node.args if not isinstance(a, fx.Node)]
    return node.target in size_decisions.COMPARISONS and len(numbers) == 1 and numbers[0] in (0, 1)


__all__ = ["ShapeTracer", "trace_with_shapes"]
