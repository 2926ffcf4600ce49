"""Symbolic tracing with tracers of our own: the first two rungs.

What it does beyond ``torch.fx.Tracer``:

- nested inputs (lists, dicts) become real containers of proxies, so that ``len`` and iteration work;
- inputs that were not given keep their defaults and leave the signature; non-tensor inputs are checked
  at run time against the value that was captured;
- ``self.training`` handed to a function stays dynamic (see :class:`fxprune.nn.TrainingFlag`);
- each node remembers the user's source line.

The second rung traces with the shapes of the example inputs at hand (``_ShapeTracer``): control flow on
shapes is decided by them, while sizes stay symbolic in the graph. Given names of functions, it also
*dissolves* these: what torch.fx keeps as one node is traced into.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import FrameType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from .. import known_shapes
from ..errors import CaptureError, ExampleInputsError, PinnedError
from ..graph_module import clone_module
from ..guards import CHECKS, check_decision, check_number
from ..inputs import meta_like, to_meta
from ..known_shapes import Remembered
from ..known_values import DEVICES, KINDS, UnknownValueError, Values, made_of_sizes
from ..module_registry import leaf_for, own_kind
from ..nn import Apply, TrainingFlag, assign, keep, stop_gradient
from ..nodes import by_position, describe_source, mutable
from ..program import Program, Skeleton, named_modules, named_tensors
from ..trees import TENSORS, flatten
from ..value_dependent import AS_LIST, FACTORIES, OnShapes, call_on_shapes, kept_whole
from . import patches, size_decisions, traced_sizes
from .alike import compare
from .arguments import LITERALS, Arguments, packing
from .effects import AUGMENTED, AttributesBefore, not_kept, write_in_place
from .merge import Call, Trace, merge, same_in_both
from .numbers import Number, note_origins, note_question
from .recording import Following, PartedError, Recording
from .twin import StandIn, Twin

_SKIPPED = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    "<",
)


@functools.cache
def _is_skipped(file: str) -> bool:
    return file.startswith(_SKIPPED)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Trace ``model`` with the structure of ``args`` and ``kwargs``.

    Raises:
        CaptureError: if the forward cannot be traced; names the source line.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    return _Tracer(model, Arguments.of(model, args, kwargs)).program()


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
    return _ShapeTracer(model, Arguments.of(model, args, kwargs), dissolve).program()


def function_name(target: Any) -> str | None:
    """``module.name`` of a Python function that a graph calls as one node; None for an operator."""
    module = getattr(target, "__module__", None) or ""
    if not isinstance(target, FunctionType) or module.partition(".")[0] in (
        "torch",
        "fxprune",
        "_operator",
        "math",
    ):
        return None
    return f"{module}.{target.__qualname__}"


def refuse_torchscript(module: nn.Module) -> None:
    """Raises CaptureError for a module that TorchScript has compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(module).__name__} was compiled by TorchScript, which hides what it computes. Use the "
            f"module that it was made from."
        )


def _unmark(nodes: Iterable[fx.Node]) -> None:
    """Leave the mark of ``torch.fx.wrap`` on calls of Python functions alone."""
    for node in nodes:
        if "is_wrapped" in node.meta and function_name(node.target) is None:
            del node.meta["is_wrapped"]


def check_value(value: Any, expected: Any, name: str) -> None:
    """In captured graphs: refuse a non-tensor input that differs from the captured one."""
    if value is not expected and value != expected:
        raise PinnedError(
            f"the input {name!r} was {expected!r} when the model was captured; got {value!r}. Next: analyse "
            f"the model again with this value, or with fxprune.Calls that hold both."
        )


class _Flag(int):
    """The value of a module's ``training`` attribute while tracing: a truth value with an owner."""

    owner: nn.Module
    asks: Callable[[nn.Module], None]

    def __bool__(self) -> bool:
        self.asks(self.owner)
        return int(self) != 0

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(int(self))


def _holds_proxies(tree: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(tree))


def _is_numbers(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(number) is int for number in given)


_WRITTEN = frozenset(["grad", "real", "imag", "names"])
_DTYPES: dict[type, torch.dtype] = {
    bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128,
}  # fmt: skip
"""What these types mean to functions of torch, as in ``x.to(float)``; torch.fx takes none of them."""
_PLAIN = frozenset([type(None), bool, int, float, str, torch.dtype, torch.device])
"""Types of values that stand in a graph as they are."""


class _Proxy(fx.Proxy):
    """A proxy that remembers augmented assignments, and what is assigned to attributes of tensors."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.tracer.create_proxy("call_function", assign, (self, value), {})
        elif name == "requires_grad":
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
        elif name in _WRITTEN:
            raise CaptureError(f"{here()}forward assigns to .{name} of a tensor, which a graph cannot")
        else:
            super().__setattr__(name, value)


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def assign(proxy: fx.Proxy, other: Any) -> Any:
        tracer: Any = proxy.tracer
        result = tracer.create_proxy("call_function", function, (proxy, other), {})
        tracer.recording.augmented[result.node] = name
        return result

    return assign


for _method, _name in AUGMENTED.items():
    setattr(_Proxy, _method, _augmented(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True
    pins = False
    """Whether a model is captured in its mode alone where the other mode cannot be traced."""

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        functions, modules = kept_whole()
        super().__init__(autowrap_functions=functions)
        self._autowrap_search += modules
        self.model = model
        self.arguments = arguments
        self.options: tuple[Any, ...] = ()
        self.switches: set[str] = set()
        self.flipped = False  # whether all modules are in the other mode than they are in
        self.types_decide: frozenset[str] = frozenset()  # lines where a tensor's type is a plain one
        self.types_do_not: frozenset[str] = frozenset()  # where that makes no difference
        self.stuck: CaptureError | None = None  # why the other mode was not captured
        self.tables: list[dict[str, Any]] | None = None  # global names that the model's code sees
        self.calls: list[Call] = []  # of modules, that tracing is in
        self.asked: dict[tuple[Call, ...], dict[str, None]] = {}
        self.given_to: dict[Call, Any] = {}
        self.lists_as_values = False
        self.reads_values = False
        self.constants: dict[str, torch.Tensor] = {}
        self.alive: list[torch.Tensor] = []  # constants whose id must stay theirs
        self.given: dict[str, Any] = {}
        self.originals: dict[str, Any] = {}
        self.added: dict[str, nn.Module] = {}  # modules of ours, by path
        self.unhooked: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        self.modules = dict(named_modules(model))
        named = list(named_tensors(model))
        self.names = tuple(name for name, _ in named)
        self.tensors = dict(named)
        self.tensor_names = {id(tensor): name for name, tensor in reversed(named)}
        self.tensor_proxies: dict[str, fx.Proxy] = {}
        self.twin = Twin(model, self._stand_in)
        for number, (tensor, _) in self.twin.tensors.items():
            if id(tensor) in self.tensor_names:
                self.tensor_names[number] = self.tensor_names[id(tensor)]
        self.kept = AttributesBefore(self.twin.model)
        self.under_no_grad: dict[fx.Node, bool] = {}  # whether a node there may have a gradient all the same
        self.stops: dict[fx.Node, fx.Node] = {}
        self.merged: dict[fx.Node, Any] = {}  # what nodes of the graph for both modes are on shapes alone
        self.recording = Recording(
            added=self.added, constants=self.constants, asked=self.asked, given=self.given_to
        )
        self.following: Following | None = None  # nodes of another trace, in place of new ones
        self.edited = False  # whether nodes are not as they were made

    def program(self) -> Program:
        """Trace, and collect what the graph refers to.

        Lists of numbers may differ from call to call, as far as that can be; without known shapes only those
        that say how long packed sequences are. A module without tensors or children whose control flow asks
        for ``self.training`` (stochastic depth, say) becomes a leaf, so that it still switches. Where others
        do, the model is traced in both modes, and the graph holds the calls of both.
        """
        try:
            graph = self._traced()
        except CaptureError:
            if self.lists_as_values or not self.pins or not any(map(_is_numbers, self.given.values())):
                raise
            return self._again(lists_as_values=True).program()
        typed = self._with_plain_types(graph)
        lists = [n for n in graph.find_nodes(op="placeholder") if _is_numbers(self.given[str(n.target)])]
        users = {user.target for node in lists for user in node.users}
        if not self.lists_as_values and not self.pins and users - {rnn.pack_padded_sequence}:
            raise CaptureError("a list of numbers among the inputs is used as more than lengths")
        both: tuple[Recording, ...] | None = (self.recording,)
        if self.asked:
            other = self._again(flipped=True)
            other.knows(self.recording.steady(self.seen()))
            same = self.stuck is None and other.makes(self.recording)
            reason = self.stuck
            if not same and reason is None:
                other = self._again(flipped=True)
                try:
                    other._traced()
                except CaptureError as error:
                    reason = error
            if switches := (self._new_switches() | other._new_switches()):
                return self._again(switches=switches).program()
            both = (self.recording, self.recording if same else other.recording)
            self.stuck = reason
            if same:
                graph = self._as_in_both_modes(other)
            else:
                graph = self._in_both_modes(graph, other, reason)
                both = None if graph is self.recorded else both
        for node in graph.nodes:
            node.meta.pop("calls", None)
        made = Program(
            graph=graph,
            modules={str(n.target): self.leaf(str(n.target)) for n in graph.nodes if n.op == "call_module"},
            tensors={name: self.tensors[name] for name in self.names},
            skeleton=Skeleton.of(self.model),
            extras=self.constants,
            notes=tuple(self.notes),
            reads_values=self.reads_values,
            seen=self.merged or self.seen(),
            again=partial(self._makes_again, both) if self.pins and both is not None else None,
            retraced=self._retraced if self.pins else None,
        )
        if typed is not None and not compare(made, typed).same:
            return typed
        self.types_do_not |= self.lines_for_types(self.recorded)
        return made

    def _with_plain_types(self, graph: fx.Graph) -> Program | None:
        """What is captured where types of tensors are plain ones; None where the calls are the same.

        Code that asks for a type, and makes nothing of it in the graph, mostly does nothing with it.
        """
        lines = self.lines_for_types(graph) - self.types_decide - self.types_do_not
        if not lines:
            return None
        plain = {"types_decide": self.types_decide | lines}
        other = self._again(**plain)
        other.knows(self.recording.steady(self.seen()))
        return None if other.makes(self.recording) else self._again(**plain).program()

    def _retraced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What is captured of the model for other inputs, with what was decided for these."""
        arguments = Arguments.of(self.model, args, kwargs)
        decided = {"types_do_not": self.types_do_not, "stuck": self.stuck}
        return self._again(arguments=arguments, **decided).program()

    def makes(self, recording: Recording) -> bool:
        """Whether the model, as this tracer runs it, makes the calls of another trace; in doubt, no."""
        if not recording.complete:
            return False
        self.following = Following(recording)
        try:
            patches.within(self._patches(), self._run)
        except (PartedError, Exception):  # noqa: BLE001  whatever a user's forward raises on symbolic values
            return False
        finally:
            _unmark(node for node, _ in recording.calls)
        same = self.following.is_done() and recording.same_tables(self.recording)
        if same:
            self.meets()
        return same

    def meets(self) -> None:
        """Note what the numbers behind decisions are here: this run made the calls that it followed."""

    def _makes_again(
        self, recordings: tuple[Recording, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether the model makes the recorded calls for other inputs, too.

        Args:
            recordings: of the mode that it is in, and of the other one where its code asked for it.
            args: its positional inputs.
            kwargs: its keyword inputs.
        """
        one = recordings[0] is recordings[-1]  # then it makes no difference who asked
        arguments = Arguments.of(self.model, args, kwargs)
        values: Mapping[fx.Node, Any] = {}
        for flipped, recording in zip((False, True), recordings, strict=False):
            tracer = self._again(flipped=flipped, arguments=arguments)
            tracer.knows(values)
            if not tracer.makes(recording) or tracer._new_switches():
                return False
            asks_alike = tracer.asked == recording.asked and tracer.given_to == recording.given
            if (tracer.asked and len(recordings) == 1) or not (one or asks_alike):
                return False
            values = recording.steady(tracer.seen()) if one else {}
        return True

    def knows(self, values: Mapping[fx.Node, Any]) -> None:
        """What nodes of the trace that is followed are on shapes alone, as far as that is known."""

    def seen(self) -> Mapping[fx.Node, Any]:
        """What nodes are on shapes alone, where that is known."""
        return {}

    def _traced(self) -> fx.Graph:
        """The graph of one trace."""
        try:
            graph = patches.within(self._patches(), self._run)
        except (CaptureError, ExampleInputsError):
            raise
        except Exception as error:  # whatever a user's forward raises on symbolic values
            raise CaptureError(f"{blame(error)}{type(error).__name__}: {error}") from error
        self.edited |= bool(write_in_place(graph, self.recording.augmented, self.leaf))
        note_origins(graph)
        graph._tracer_cls = None  # a copy must not try to make a tracer of ours from nothing
        _unmark(graph.nodes)
        for node in graph.nodes:
            if node.target is rnn.pack_padded_sequence and any(
                isinstance(a, list) for a in (*node.args, *node.kwargs.values())
            ):
                raise CaptureError(
                    "the lengths of packed sequences are computed as a list, which would stay that of the "
                    "example; compute them as a tensor"
                )
        self.recorded = graph
        self.recording = replace(
            self.recording,
            added=dict(self.added),
            constants=dict(self.constants),
            complete=not self.edited,
        )
        return graph

    def _run(self) -> fx.Graph:
        with torch.enable_grad():  # against which a block under torch.no_grad stands out
            return super().trace(self.twin.model)

    def _patches(self) -> list[patches.Patch]:
        """What is replaced while tracing.

        ``torch.zeros(proxy, 4)``, ``torch.finfo(proxy)`` and the like become nodes: their arguments are
        parsed without regard to proxies. With shapes known, all calls become nodes, so that a tensor made by
        one can be assigned to in slices. A proxy cannot say itself that its value is a tensor: PyTorch would
        take it for one, and read memory that it does not have.
        """
        owned = {id(module) for _, module in named_modules(self.twin.model)}

        def flag(module: nn.Module, mode: bool) -> Any:
            owner = self.twin.of(module)
            if id(owner) not in owned:
                return mode
            flag = _Flag(mode != self.flipped)
            flag.owner, flag.asks = owner, self._asks
            return flag

        def dynamic(original: Any) -> Callable[..., Any]:
            def make(*args: Any, **kwargs: Any) -> Any:
                made = original.__name__ in FACTORIES and self.wants_factory()
                if made or _holds_proxies((args, kwargs)):
                    return self.create_proxy("call_function", original, args, kwargs)
                return original(*args, **kwargs)

            return make

        def is_instance(value: Any, kinds: Any) -> bool:
            plain = isinstance(value, kinds)
            return plain or (isinstance(value, _Proxy) and issubclass(self.type_of(value.node), kinds))

        if self.tables is None:
            self.tables = traced_sizes.tables(set(map(type, self.modules.values())))
        tables = self.tables
        return [
            patches.fx_tracing,
            patches.training(flag),
            patches.functions((*FACTORIES, *_FROM_NUMBERS), dynamic, tables),
            patches.types_of_values(tables, is_instance),
            patches.autograd_functions(self._apply),
            patches.flags(True, set()),
            patches.marks,
            *self._number_patches(tables),
        ]

    def _number_patches(self, tables: list[dict[str, Any]]) -> list[patches.Patch]:
        """What is replaced for what numbers and types are; ``tables`` are global names."""
        return [traced_sizes.types(tables, self._kind)]

    def _kind(self, value: Any) -> type:
        """``type(value)``, of a proxy that of what it stands for."""
        if isinstance(value, _Proxy):
            return self.type_of(value.node)
        return int if isinstance(value, Number) else type(value)

    def lines_for_types(self, graph: fx.Graph) -> frozenset[str]:
        """Lines of code that ask for the type of a tensor, and of which nothing in the graph makes use.

        There it decides which way the code goes: ``x.dtype is torch.float32``, ``table.get(x.dtype)``.
        """
        return frozenset()

    def _again(self, **options: Any) -> _Tracer:
        """A tracer of the same model, with other options."""
        again = type(self)(self.model, self.arguments, *self.options)
        again.switches, again.lists_as_values = self.switches, self.lists_as_values
        again.types_decide, again.tables = self.types_decide, self.tables
        for name, value in options.items():
            setattr(again, name, value)
        return again

    def _asks(self, owner: nn.Module) -> None:
        """Called where control flow asks for the training flag of a module."""
        path = self._path(owner)
        self.asked.setdefault(tuple(self.calls), {})[path] = None

    def _path(self, module: nn.Module) -> str:
        return "" if module is self.twin.model else self.path_of_module(module)

    def _new_switches(self) -> set[str]:
        """Modules without tensors and children that were asked for their flags; none once they are leaves."""
        asked = {path for paths in self.asked.values() for path in paths if path}
        bare = {
            path
            for path in asked
            if not [*(m := self.modules[path]).children(), *m.parameters(), *m.buffers()]
        }
        return bare | self.switches if bare else set()

    def _in_both_modes(self, graph: fx.Graph, other: _Tracer, reason: CaptureError | None) -> fx.Graph:
        """The graph that holds the calls of both traces, or of this one alone, with a note."""
        asked = tuple(dict.fromkeys(path for paths in self.asked.values() for path in paths))
        try:
            if reason is not None:
                raise reason
            merged, stands_for = merge(self._trace(), other._trace())
        except CaptureError as error:
            if not self.pins:
                raise
            now, then = (
                ("training", "evaluation") if self.modules[asked[0]].training else ("evaluation", "training")
            )
            because = f": {str(error).splitlines()[0]}"
            self.notes.append(
                f"the result runs in {now} mode alone; {then} mode could not be captured{because}"
            )
            end = next(node for node in reversed(graph.nodes) if node.op == "output")
            end.meta["given"] = tuple((path, self.modules[path].training) for path in asked)
            end.meta["because"] = because
            return graph
        self.notes += [note for note in other.notes if note not in self.notes]
        for name, tensor in self.constants.items():
            self.tensors[name] = tensor
        for tracer, nodes in zip((other, self), reversed(stands_for), strict=True):
            old = tracer.seen()
            self.merged |= {new: old[node] for node, new in nodes.items() if node in old}
        return merged

    def _as_in_both_modes(self, other: _Tracer) -> fx.Graph:
        """The graph of this trace, for both modes: those of the ``other`` are the same calls."""
        self.notes += [note for note in other.notes if note not in self.notes]
        graph, stands_for = same_in_both(self._trace())
        old = self.seen()
        self.merged |= {new: old[node] for node, new in stands_for.items() if node in old}
        return graph

    def _trace(self) -> Trace:
        flags = {path: module.training != self.flipped for path, module in self.modules.items()}
        return Trace(self.recorded, flags, self.asked, self.given_to, self.shape, self.added, self.constants)

    def shape(self, node: fx.Node) -> Any:
        """Shape and type of what a node gives, where that is known."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def type_of(self, node: fx.Node) -> type:
        """The type of a node's value, where that is known without running the node."""
        if node.op == "get_attr":
            return type(self.tensors[str(node.target)])
        if node.op == "placeholder" and str(node.target) in self.given:
            given = self.given[str(node.target)]
            return torch.Tensor if isinstance(given, torch.Tensor) else type(given)
        raise TypeError("control flow depends on the type of a value that is computed")

    # -- inputs ---------------------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        placed, named = self.arguments.by_place(), self.arguments.by_name()
        positional = [self.root, *(self._input(name, given) for name, given in placed.items())]
        keywords = {name: self._input(name, given) for name, given in named.items()}
        own = vars(self.root).get("forward")  # one that was put in place of its class's

        def forward(*values: Any, **keywords: Any) -> Any:
            return own(*values, **keywords) if own is not None else root_fn(self.root, *values, **keywords)

        def call(root: nn.Module, *values: Any) -> Any:
            outputs = _with_hooks(root, forward, values, keywords)
            self._keep()
            return self._packed(outputs)

        return call, positional

    def _packed(self, output: Any) -> Any:
        """The output as the graph can hold it: what is no plain container is built by a module of ours."""
        tensors, structure = flatten(output, (fx.Proxy, *TENSORS))
        pack, notes = packing(structure, self.arguments)
        if pack is None:
            return output
        self.notes += notes
        path = "_pack"
        while hasattr(self.model, path):
            path += "_"
        self.added[path] = pack.train(int(self.model.training) != 0)
        return self.create_proxy("call_module", path, tuple(tensors), {})

    def _input(self, name: str, given: Any) -> Any:
        leaves, spec = pytree.tree_flatten(given)
        self.given[name], self.originals[name] = to_meta(given), given
        if _is_numbers(given) and not self.lists_as_values:
            return self.create_proxy("placeholder", name, (None,), {})
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            checked = self.create_proxy("placeholder", name, self.arguments.default(name), {})
            self.create_proxy("call_function", check_value, (checked, given, name), {})
            return given
        proxy: Any = self.create_proxy("placeholder", name, self.arguments.default(name), {})
        if isinstance(given, torch.Tensor):
            return proxy
        items = []
        for path, leaf in pytree.tree_flatten_with_path(given)[0]:
            item = proxy
            for key in path:
                item = item[getattr(key, "idx", getattr(key, "key", None))]
            if isinstance(leaf, LITERALS):
                self.create_proxy("call_function", check_value, (item, leaf, name), {})
            items.append(item if isinstance(leaf, torch.Tensor) else leaf)
        return pytree.tree_unflatten(items, spec)

    # -- modules and tensors --------------------------------------------------------------------

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As torch.fx does it, without a record of the calling modules in each node.

        A module that forward makes itself, ``nn.Softmax(-1)(x)``, is dissolved.
        """
        refuse_torchscript(m)
        own = self.twin.of(m)
        if own is not m:  # held by a function, say, of which the twin has no copy
            return own(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            if any(True for _ in named_tensors(m)):
                kind, model = type(m).__name__, type(self.model).__name__
                raise CaptureError(
                    f"forward calls a {kind} that is no submodule of {model}, so that its weights belong to "
                    f"no one. Assign it to an attribute, or put it in an nn.ModuleList."
                ) from None
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            node = partial(self._leaf_node, path)
            return _with_hooks(m, node, args, kwargs) if hooked(m) else node(*args, **kwargs)
        call = path, len(self.given_to)
        leaves = pytree.tree_leaves((args, kwargs))
        self.given_to[call] = [leaf if isinstance(leaf, LITERALS) else None for leaf in leaves]
        self.calls.append(call)
        try:
            return forward(*args, **kwargs)
        finally:
            self.calls.pop()

    def _leaf_node(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_module", path, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TrainingFlag) or module_qualified_name in self.switches or is_leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        name = self.tensor_names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        return attr_val if name is None else self.read(name)

    def read(self, name: str) -> fx.Proxy:
        """The proxy of a parameter or buffer."""
        if name not in self.tensor_proxies:
            self.tensor_proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self.tensor_proxies[name]

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """What takes the place of a tensor in the twin: nothing that forward writes reaches the original."""
        name = self.tensor_names.get(id(tensor))
        if name is not None:
            return StandIn.of(tensor, partial(self.read, name))
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind in _PLAIN:
            return a
        if kind is _Proxy or kind is _ShapeProxy:
            return a.node
        if kind is dict and not a:
            return a
        if kind is tuple:
            return tuple([self.create_arg(item) for item in a])
        if isinstance(a, type) and a in _DTYPES:  # what stands for one in a capture is equal to it
            return _DTYPES[a]
        if isinstance(a, np.generic):  # a number of NumPy, which generated code could not name
            return a.item()
        if isinstance(a, _Flag):
            owner = self._path(a.owner)
            path = f"{owner}.training_flag" if owner else "training_flag"
            if path not in self.added:
                self.added[path] = TrainingFlag().train((int(a) != 0) != self.flipped)
            return self.create_node("call_module", path, (), {})
        if isinstance(a, torch.Tensor):
            name = self.tensor_names.get(id(a))
            if name is None:  # made in forward, or a plain attribute
                name = f"_constant_{len(self.constants)}"
                own, _ = self.twin.tensors.get(id(a), (a, a))
                self.constants[name] = (a if a._version else own).detach()  # written to, or as it was
                self.tensors[name] = self.constants[name]
                self.tensor_names[id(a)] = name
                self.alive.append(a)
            return self.create_node("get_attr", name, (), {})
        if type(a) is OrderedDict:  # which torch.fx would turn into a plain dict
            return self.create_node("call_function", OrderedDict, (super().create_arg(a),), {})
        return super().create_arg(a)

    def _apply(self, function: type, args: tuple[Any, ...]) -> Any:
        """An autograd function whose arguments are traced stays whole, with the gradient that it defines."""
        if not any(isinstance(leaf, (fx.Proxy, StandIn)) for leaf in pytree.tree_leaves(args)):
            return NotImplemented
        path = f"_{function.__name__}"
        while (
            hasattr(self.model, path) or getattr(self.added.get(path), "function", function) is not function
        ):
            path += "_"
        if path not in self.added:
            self.added[path] = Apply(function).train(int(self.model.training) != 0)
        return self.create_proxy("call_module", path, args, {})

    def _keep(self) -> None:
        """Keep what forward assigned to its buffers, and to other tensors that it had read."""
        left = []
        for name, before, value, _ in self.kept.replaced(fx.Proxy):
            known = self.tensor_names.get(id(before))
            if known is None or self.is_made_anew(before, value):
                left.append(name)
                continue
            for read in [n for n in self.graph.nodes if n.op == "get_attr" and n.target == known]:
                with self.graph.inserting_after(read):  # forward goes on with the tensor from before
                    copy = self.graph.call_method("clone", (read,))
                read.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
                self.evaluated(copy)
                self.edited = True
            self.create_proxy(
                "call_function", keep, (self.create_proxy("get_attr", known, (), {}), value), {}
            )
        self.notes += not_kept([*left, *self.kept.changed(fx.Proxy), *self._written()])

    def is_made_anew(self, before: torch.Tensor | None, value: fx.Proxy) -> bool:
        """Whether each call makes for itself what it puts in the place of a tensor: a table for its sizes."""
        return False

    def _written(self) -> Iterator[str]:
        """Names of plain attributes that hold a tensor into which forward has written itself."""
        written = {number for number, (_, own) in self.twin.tensors.items() if not isinstance(own, StandIn)
                   and own._version}  # fmt: skip
        for path, module in named_modules(self.twin.model) if written else ():
            for name, value in vars(module).items():
                if written & set(map(id, pytree.tree_leaves(value))):
                    yield f"{path}.{name}".lstrip(".")

    def evaluated(self, node: fx.Node) -> None:
        """Called for a node that no proxy was asked for."""

    def _stopped(self, node: fx.Node) -> fx.Node:
        """``node`` without a gradient."""
        if node not in self.stops:
            self.stops[node] = new = self._node("call_function", stop_gradient, (node,), {})
            self.under_no_grad[new] = False
            self.evaluated(new)
        return self.stops[node]

    def _without_gradient(self, kind: str, target: Any, arguments: Any) -> Any:
        """The arguments of a new node as ``torch.no_grad`` leaves them, where it or they stand under one."""
        inside = not torch.is_grad_enabled()
        if kind in ("placeholder", "get_attr") or not (inside or self.under_no_grad):
            return arguments
        stopped = map_arg(arguments, lambda n: self._stopped(n) if self.under_no_grad.get(n, inside) else n)
        if target is not assign:
            return stopped
        self.stops.pop(arguments[0][0], None)  # with the memory from before
        return (arguments[0][0], *stopped[0][1:]), stopped[1]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> fx.Node:
        args, kwargs = self._without_gradient(kind, target, (args, kwargs))
        if kwargs:
            args, kwargs = by_position(kind, target, args, kwargs, self.leaf)
        node = self._node(kind, target, args, kwargs, *rest, **options)
        if not torch.is_grad_enabled() and kind not in ("placeholder", "get_attr"):
            self.under_no_grad[node] = kind == "call_module"
        if self.following is not None:
            return node
        node.meta["calls"] = tuple(self.calls)
        if self.calls:
            node.meta["module"] = self.calls[-1][0]
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_skipped(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None and node.op not in ("placeholder", "output"):
            node.meta["source"] = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return node

    def _node(self, *call: Any, **options: Any) -> fx.Node:
        """A new node; or that of the trace that is followed, which has to be of the same call."""
        if self.following is not None:
            return self.following.node(call[:4])
        node = super().create_node(*call, **options)
        self.recording.calls.append((node, call[:4]))
        return node

    def wants_factory(self) -> bool:
        """Whether a call of ``torch.zeros`` or the like on numbers alone becomes a node."""
        return False

    def leaf(self, path: str) -> nn.Module:
        """A module that is called as one node, without the hooks that the graph holds."""
        if path not in self.added and hooked(self.modules[path]):
            if path not in self.unhooked:
                self.unhooked[path] = _without_hooks(self.modules[path])
            return self.unhooked[path]
        return self.added[path] if path in self.added else self.modules[path]


class _ShapeProxy(_Proxy):
    """A proxy that knows its value on meta tensors, and answers questions about it."""

    tracer: _ShapeTracer

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


class _ShapeTracer(_Tracer):
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
        return _ShapeProxy(node, self)

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
        if kind.startswith("call"):
            args, kwargs = self._with_numbers(kind, target, args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        self.values[proxy.node] = self._evaluate(proxy.node)
        return proxy

    def _with_numbers(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call, with numbers for tensors of one number where it does not run without.

        PyTorch takes such a tensor as a bound of a slice or as a size, but not on shapes alone.
        """
        owner = args[0] if kind == "call_method" else None
        indices: dict[int, _ShapeProxy] = {}

        def look(item: Any) -> Any:
            if isinstance(item, _ShapeProxy) and item is not owner and _is_index(self.values.get(item.node)):
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

    def _number(self, proxy: _ShapeProxy) -> Any:
        """The number in a tensor: a plain one where it depends on constants alone, else a node."""
        if self.known.are_constant(proxy.node):
            return int(self._value(proxy.node))
        return self._converted(int, proxy)

    def as_array(self, proxy: _ShapeProxy) -> Any:
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
            return self.values[proxy.node] if isinstance(proxy, _ShapeProxy) else proxy

        return [traced_sizes.patch(tables, value, self._converted, self._require, self._kind)]

    def _converted(self, kind: type, proxy: fx.Proxy) -> Any:
        """``int(proxy)`` or ``float(proxy)``, as a node where that changes anything."""
        value = self.values.get(proxy.node)
        if type(value) is kind:
            return proxy
        return self.create_proxy("call_function", kind, (proxy,), {})

    def counted(self, proxy: _ShapeProxy) -> None:
        """The length of a list of numbers among the inputs is pinned once the code asks for it."""
        node = proxy.node
        if node.op == "placeholder" and _is_numbers(self.values[node]) and node not in self.counts:
            self.counts.add(node)
            length = self.create_proxy("call_function", len, (proxy,), {})
            where = f"the code for the list {node.target!r}"
            self.create_proxy("call_function", check_number, (length, len(self.values[node]), where), {})

    def pinned(self, proxy: _ShapeProxy, kind: type) -> Any:
        """The plain number that a proxy stands for in the example.

        One that depends on the values of inputs is checked when the graph runs.
        """
        node, seen = proxy.node, self.values[proxy.node]
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

    def _as(self, kind: type, proxy: _ShapeProxy) -> Any:
        """What control flow sees of a number: of ``if n:`` whether there is any."""
        if kind is not bool or isinstance(self.values[proxy.node], bool):
            return proxy
        return self.create_proxy("call_function", bool, (proxy,), {})

    def _decides(self, proxy: _ShapeProxy, answer: Any) -> None:
        """Control flow follows a number that sizes decide on."""
        where = describe_source(proxy.node) or "the model"
        check = self.create_proxy("call_function", check_decision, (proxy, answer, where), {}).node
        if self.following is None:
            size_decisions.note(check, self.values)
        else:
            self.decided.append(
                (check, [self.values[part] for part in size_decisions.behind(proxy.node, self.values)])
            )

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

    def pinned_type(self, proxy: _ShapeProxy) -> torch.dtype:
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
            raise
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
    return node.target in _COMPARISONS and len(numbers) == 1 and numbers[0] in (0, 1)


_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.gt, operator.le, operator.ge)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as one node: those of ``torch.nn`` that do not merely contain, classes that
    inherit all that these compute, and those that were registered (:func:`fxprune.register_module`).
    """
    if "forward" in vars(module):  # which need not be that of its class
        return False
    if leaf_for(module) is not None:
        return True
    kind = type(module)
    if kind.__module__ == "torch.ao.quantization.stubs":
        return kind.__qualname__ != "QuantWrapper"
    if kind.__module__.startswith("torch.ao.nn."):  # also those that inherit from Sequential
        return True
    kind = own_kind(kind)  # type: ignore[arg-type]  # a class is hashable
    holds = kind is nn.Module or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return kind.__module__.startswith(("torch.nn.", "fxprune.nn")) and not holds


def _user_hooks(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Those of others than torch, whose own give modules their weights, or observe them."""
    return {
        key: hook
        for key, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("torch.")
    }


def hooked(module: nn.Module) -> bool:
    """Whether calling a module calls hooks of a user's."""
    return bool(module._forward_hooks or module._forward_pre_hooks) and bool(
        _user_hooks({**module._forward_hooks, **module._forward_pre_hooks})
    )


def _with_hooks(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``forward(*args, **kwargs)`` with the hooks of ``module`` around it, as ``torch`` calls them."""
    for key, hook in _user_hooks(module._forward_pre_hooks).items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    out = forward(*args, **kwargs)
    for key, hook in _user_hooks(module._forward_hooks).items():
        given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, out)
        out = out if changed is None else changed
    return out


def _without_hooks(module: nn.Module) -> nn.Module:
    """The same module, with the same tensors, without hooks of a user's."""
    new = clone_module(module, lambda _, tensor: tensor, share=True)
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        mine = _user_hooks(getattr(module, table))
        new.__dict__[table] = OrderedDict(
            (k, hook) for k, hook in getattr(module, table).items() if k not in mine
        )
    return new


_FROM_NUMBERS = ("tensor", "as_tensor", "finfo", "iinfo")


def blame(error: BaseException) -> str:
    """The innermost line of the user's code in a traceback."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_SKIPPED):
            where = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}: "
        trace = trace.tb_next
    return where


def here() -> str:
    """The line of the user's code that runs now, as :func:`blame` gives it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_skipped(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: " if frame else ""


__all__ = ["blame", "check_value", "function_name", "is_leaf", "refuse_torchscript", "trace",
           "trace_with_shapes"]  # fmt: skip
