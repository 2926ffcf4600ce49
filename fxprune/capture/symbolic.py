"""Symbolic tracing with a tracer of our own: the first rung, on which :mod:`.shape_tracer` builds the second.

What it does beyond ``torch.fx.Tracer``:

- nested inputs (lists, dicts) become real containers of proxies, so that ``len`` and iteration work;
- inputs that were not given keep their defaults and leave the signature; non-tensor inputs are checked
  at run time against the value that was captured;
- ``self.training`` handed to a function stays dynamic (see :class:`fxprune.nn.TrainingFlag`);
- each node remembers the user's source line.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.autograd import Variable
from torch.fx.node import map_arg
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, ExampleInputsError, PinnedError
from ..files import told
from ..inputs import to_meta
from ..nn import Apply, TrainingFlag, assign, keep, stop_gradient
from ..nodes import by_position
from ..program import Program, Skeleton, named_modules, named_tensors
from ..trees import TENSORS, flatten
from ..value_dependent import FACTORIES, kept_whole
from . import patches, traced_sizes
from .alike import compare
from .arguments import LITERALS, Arguments, packing
from .effects import AUGMENTED, AttributesBefore, not_kept, write_in_place
from .leaf_modules import hooked, is_leaf, refuse_torchscript, with_hooks, without_hooks
from .merge import Call, Trace, merge, same_in_both
from .numbers import Number, note_origins
from .recording import Following, PartedError, Recording
from .source_lines import blame, here, user_frame
from .twin import StandIn, Twin


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Trace ``model`` with the structure of ``args`` and ``kwargs``.

    Raises:
        CaptureError: if the forward cannot be traced; names the source line.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    return Tracer(model, Arguments.of(model, args, kwargs)).program()


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


def _without_variables(kinds: Any) -> Any:
    """Types, with that of tensors in the place of ``Variable``, whose instances they are."""
    if isinstance(kinds, tuple):
        return tuple(map(_without_variables, kinds))
    return torch.Tensor if kinds == Variable else kinds


_FROM_NUMBERS = ("tensor", "as_tensor", "finfo", "iinfo")
"""Functions of ``torch`` besides the factories that take numbers, not tensors."""


def holds_proxies(tree: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(tree))


def is_numbers(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(number) is int for number in given)


_WRITTEN = frozenset(["grad", "real", "imag", "names"])
_DTYPES: dict[type, torch.dtype] = {
    bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128,
}  # fmt: skip
"""What these types mean to functions of torch, as in ``x.to(float)``; torch.fx takes none of them."""
_PLAIN = frozenset([type(None), bool, int, float, str, torch.dtype, torch.device])
"""Types of values that stand in a graph as they are."""


class TracedProxy(fx.Proxy):
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
    setattr(TracedProxy, _method, _augmented(_name))


class Tracer(fx.Tracer):
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
            if self.lists_as_values or not self.pins or not any(map(is_numbers, self.given.values())):
                raise
            return self._again(lists_as_values=True).program()
        typed = self._with_plain_types(graph)
        lists = [n for n in graph.find_nodes(op="placeholder") if is_numbers(self.given[str(n.target)])]
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
            raise CaptureError(f"{blame(error)}{told(error)}") from error
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
                if made or holds_proxies((args, kwargs)):
                    return self.create_proxy("call_function", original, args, kwargs)
                return original(*args, **kwargs)

            return make

        def variable(original: Any) -> Callable[..., Any]:
            def make(data: Any = None, *args: Any, **kwargs: Any) -> Any:
                if isinstance(data, (fx.Proxy, StandIn)):
                    return data.detach()
                return original(data, *args, **kwargs)

            return make

        def is_instance(value: Any, kinds: Any) -> bool:
            kinds = _without_variables(kinds)
            plain = isinstance(value, kinds)
            return plain or (isinstance(value, TracedProxy) and issubclass(self.type_of(value.node), kinds))

        if self.tables is None:
            self.tables = traced_sizes.tables(set(map(type, self.modules.values())))
        tables = self.tables
        return [
            patches.fx_tracing,
            patches.training(flag),
            patches.functions((*FACTORIES, *_FROM_NUMBERS), dynamic, tables),
            patches.functions(("Variable",), variable, tables, torch.autograd),
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
        if isinstance(value, TracedProxy):
            return self.type_of(value.node)
        return int if isinstance(value, Number) else type(value)

    def lines_for_types(self, graph: fx.Graph) -> frozenset[str]:
        """Lines of code that ask for the type of a tensor, and of which nothing in the graph makes use.

        There it decides which way the code goes: ``x.dtype is torch.float32``, ``table.get(x.dtype)``.
        """
        return frozenset()

    def _again(self, **options: Any) -> Tracer:
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

    def _in_both_modes(self, graph: fx.Graph, other: Tracer, reason: CaptureError | None) -> fx.Graph:
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

    def _as_in_both_modes(self, other: Tracer) -> fx.Graph:
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
        return TracedProxy(node, self)

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
            outputs = with_hooks(root, forward, values, keywords)
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
        if is_numbers(given) and not self.lists_as_values:
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
            return with_hooks(m, node, args, kwargs) if hooked(m) else node(*args, **kwargs)
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
        if issubclass(kind, TracedProxy):
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
        frame = user_frame()
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
                self.unhooked[path] = without_hooks(self.modules[path])
            return self.unhooked[path]
        return self.added[path] if path in self.added else self.modules[path]


__all__ = ["TracedProxy", "Tracer", "check_value", "function_name", "holds_proxies", "is_numbers", "trace"]
