"""The modules that come out: a ``GraphModule`` with the module tree of the original around it."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from .errors import ModeError
from .graph_record import record, replay
from .modes import deciding, in_mode
from .nodes import mutable

if TYPE_CHECKING:
    from .program import Program

_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_pre_hooks")


@dataclass(frozen=True)
class Switch:
    """What ``train(mode)`` of a module does that has one of its own.

    Attributes:
        flags: the flag of each module below, and of it itself, by path from there.
        more: what else it does; empty for nothing.
    """

    flags: Mapping[str, bool]
    more: str = ""


Switches = Mapping[bool, Switch]


def _switch(module: nn.Module, mode: bool, switches: Switches | None) -> None:
    """Give ``module``, and what is below it, the flags that the original's ``train(mode)`` gives.

    Raises:
        ModeError: where that does more than setting flags.
    """
    if switches is None:
        return
    if switches[mode].more:
        name = "train()" if mode else "eval()"
        raise ModeError(
            f"the model's own {name} does more than setting flags ({switches[mode].more}), which the result "
            f"does not do. Next: put the model into this mode, then prune it."
        )
    for path, flag in switches[mode].flags.items():
        with contextlib.suppress(AttributeError):  # within a leaf that was replaced
            module.get_submodule(path).training = flag


class Container(nn.Module):
    """Stands for a module whose class has a ``train()`` of its own, and whose forward is in the graph."""

    def __init__(self, switches: Switches) -> None:
        super().__init__()
        self.switches = switches

    def train(self, mode: bool = True) -> Container:
        super().train(mode)
        _switch(self, mode, self.switches)
        return self


_GENERATED = ("_code", "_lineno_map", "_prologue_start")


def _generated(name: str) -> Any:
    """An attribute that ``recompile`` sets, and that makes it run when it is read before."""

    def read(module: OwnedModule) -> Any:
        if name not in module.__dict__:
            module.recompile()
        return module.__dict__[name]

    def write(module: OwnedModule, value: Any) -> None:
        module.__dict__[name] = value

    return property(read, write)


class _Deferred:
    """The ``forward`` of a module whose code is not generated yet: looking at it generates the code."""

    def __init__(self, module: OwnedModule) -> None:
        self.module = weakref.ref(module)  # the class that holds this is the module's own

    def __get__(self, instance: Any, owner: type) -> Any:
        module = instance if isinstance(instance, OwnedModule) else self.module()  # which it is a copy of
        if module is not None:
            module.recompile()
        return getattr(owner if instance is None else instance, "forward")  # noqa: B009  (now another one)


_OWN = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module))
"""Names of which ``torch.fx.GraphModule`` makes use itself: ``graph``, ``code``, ``meta`` ..."""
_NAMING = ("call_module", "get_attr")
_STATE = tuple(vars(nn.Module()))


def plain(module: nn.Module) -> nn.Module:
    """The same module as one that has nothing but its parameters, buffers and submodules.

    There a buffer may be called ``code``: in a ``GraphModule`` that is the text of its forward.
    """
    new = nn.Module.__new__(nn.Module)
    new.__dict__.update((name, module.__dict__[name]) for name in _STATE)
    return new


class Interpreter(fx.Interpreter):
    """Runs a module node by node, and does what its generated code does."""

    def __init__(self, module: nn.Module, garbage_collect_values: bool = True) -> None:
        super().__init__(module, garbage_collect_values)
        self.module = plain(module)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, mutable(args), mutable(kwargs))


def _on_plain(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(plain(self), *args, **kwargs)

    return run


class _NamedOutputs(CodeGen):
    """Code that knows the classes of the named tuples that it returns: before torch 2.14 it lacks them."""

    def __init__(self, classes: dict[str, type]) -> None:
        super().__init__()
        self.classes = classes

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), *self.classes.items()]


def _parts(tree: Any) -> Iterator[Any]:
    """A tree of containers, and everything in it."""
    yield tree
    if isinstance(tree, (tuple, list, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _parts(part)


class OwnedModule(fx.GraphModule):
    """A ``GraphModule`` that keeps all of its module tree, its name and its ``meta`` through copies.

    ``torch.fx.GraphModule`` keeps only what the graph refers to, in the order of the graph, and loses
    its metadata when it is pickled. Its code is generated when it is first needed.
    """

    _code = _generated("_code")
    _lineno_map = _generated("_lineno_map")
    _prologue_start = _generated("_prologue_start")

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph, class_name: str) -> OwnedModule:
        """A module that runs ``graph`` and owns the module tree of ``root``."""
        kind = SwitchedModule if deciding(graph) else cls
        module = kind(nn.Module(), fx.Graph(), class_name)
        for registry in _REGISTRIES:
            module.__dict__[registry] = root.__dict__[registry]
        module.training = root.training
        module.__dict__["_switches"] = root.__dict__.get("_switches")
        outputs = [node.args for node in graph.nodes if node.op == "output"]
        classes = {type(part) for part in _parts(outputs) if hasattr(part, "_fields")}
        if classes and type(graph._codegen) is CodeGen:
            graph.set_codegen(_NamedOutputs({c.__name__: c for c in classes}))
        module._graph = graph
        graph.owning_module = module
        for name in _GENERATED:
            module.__dict__.pop(name, None)  # older versions of torch know fewer of them
        type(module).forward = module._first()
        return module

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("graph", "meta"):  # of which names there may be modules or tensors
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def get_submodule(self, target: str) -> nn.Module:
        hidden = target.partition(".")[0] in _OWN
        return plain(self).get_submodule(target) if hidden else super().get_submodule(target)

    def recompile(self) -> Any:
        """Write the code again, after the ``graph`` was edited."""
        if not len(self._graph.nodes):  # it has none yet
            return None
        written = super().recompile()
        kind: Any = type(self)
        if any(n.op in _NAMING and str(n.target).partition(".")[0] in _OWN for n in self._graph.nodes):
            kind.forward = _on_plain(vars(kind)["forward"])
        return written

    def _first(self) -> Any:
        """What the class has as ``forward`` to begin with."""
        return _Deferred(self)

    @property
    def whole(self) -> fx.Graph:
        """The graph; where it differs from mode to mode, the one that holds the calls of both."""
        return self._graph

    def train(self, mode: bool = True) -> OwnedModule:
        before = [(inner, inner.training) for inner in self.modules()]
        try:
            super().train(mode)
            _switch(self, mode, self.__dict__.get("_switches"))
        except ModeError:
            for inner, flag in before:
                inner.training = flag
            raise
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        own = {registry: self.__dict__[registry] for registry in (*_REGISTRIES, "_switches")}
        return _unpickle, (record(self.whole), own, self.meta, self.training, type(self).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedModule:
        root = nn.Module()
        for registry in _REGISTRIES[1:]:
            root.__dict__[registry] = copy.deepcopy(self.__dict__[registry], memo)
        modules: dict[int, nn.Module] = {}
        for name, child in self._modules.items():
            if child is not None:
                root._modules[name] = _clone(child, "", lambda _, t: copy.deepcopy(t, memo), False, modules)
        root.training = self.training
        root.__dict__["_switches"] = self.__dict__.get("_switches")
        new = OwnedModule.of(root, copy.deepcopy(self.whole), type(self).__name__)
        new.meta = copy.copy(self.meta)
        memo[id(self)] = new
        return new


class SwitchedModule(OwnedModule):
    """A network that does one thing in training and another in evaluation (see :mod:`fxprune.modes`).

    ``graph`` and ``code`` are those of the mode that it is in. ``train()`` and ``eval()`` raise
    :class:`~fxprune.errors.ModeError` where the model could not be captured in that mode, as a call does
    where single submodules were put into a mix of modes that was not captured.
    """

    def _first(self) -> Any:
        return switching(self, self.whole)

    @property
    def whole(self) -> fx.Graph:
        graph: fx.Graph = self.__dict__["_whole"]
        return graph

    @property
    def _graph(self) -> fx.Graph:
        flags = flags_of(self, self.whole)
        made: dict[Any, fx.Graph] = self.__dict__["_made"]
        key = tuple(flags.values())
        if key not in made:
            made[key] = in_mode(self.whole, flags)
            made[key].owning_module = self
        return made[key]

    @_graph.setter
    def _graph(self, graph: fx.Graph) -> None:
        self.__dict__.update(_whole=graph, _made={}, _written=None)

    @property
    def code(self) -> str:
        if self.__dict__["_written"] is not self._graph:
            self.recompile()
        return self._code

    def recompile(self) -> Any:
        """Write the code of the present mode again, after its ``graph`` was edited."""
        written = super().recompile()
        if written is None:
            return None
        kind: Any = type(self)
        self.__dict__["_written"] = self._graph
        switch = switching(self, self.whole)
        switch.ways[tuple(flags_of(self, self.whole).values())] = vars(kind)["forward"]
        kind.forward = switch
        return written

    def train(self, mode: bool = True) -> SwitchedModule:
        return into_mode(self, mode, super().train, self.whole)


def flags_of(module: nn.Module, graph: fx.Graph) -> dict[str, bool]:
    """The training flags of the submodules that decide what of ``graph`` runs."""
    return {path: module.get_submodule(path).training for path in deciding(graph)}


def into_mode(module: Any, mode: bool, train: Callable[[bool], Any], graph: fx.Graph) -> Any:
    """``module.train(mode)``; where ``graph`` has nothing for that mode, modules stay in theirs.

    Raises:
        ModeError: for a mode that was not captured.
    """
    before = [(inner, inner.training) for inner in module.modules()]
    train(mode)
    try:
        in_mode(graph, flags_of(module, graph))
    except ModeError:
        for inner, flag in before:
            inner.training = flag
        raise
    return module


def switching(module: nn.Module, graph: fx.Graph) -> Any:
    """A ``forward`` that runs what of ``graph`` belongs to the mode that its module is in."""
    ways: dict[tuple[bool, ...], Any] = {}
    paths = deciding(graph)

    def way(module: nn.Module) -> Any:
        flags = tuple([module.get_submodule(path).training for path in paths])
        if flags not in ways:
            made = OwnedModule.of(module, in_mode(graph, dict(zip(paths, flags, strict=True))), "GraphModule")
            made.recompile()
            ways[flags] = vars(type(made))["forward"]
        return ways[flags]

    @functools.wraps(way(module))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return way(self)(self, *args, **kwargs)

    forward.ways = ways  # type: ignore[attr-defined]
    return forward


def _unpickle(
    nodes: list[tuple[Any, ...]], own: dict[str, Any], meta: dict[str, Any], training: bool, class_name: str
) -> OwnedModule:
    root = nn.Module()
    root.__dict__.update(own)
    root.training = training
    module = OwnedModule.of(root, replay(nodes), class_name)
    module.meta = meta
    return module


_SIMPLE = frozenset([bool, int, float, str, tuple, type(None)])
_CONTAINERS = (dict, list, set)
Supply = Callable[[str, torch.Tensor], torch.Tensor | None]


def clone_module(module: nn.Module, supply: Supply, share: bool = False) -> nn.Module:
    """A copy of ``module`` and its children with other tensors.

    ``supply(name, original)`` gives each parameter and buffer of the copy, by its dotted name. Unless
    ``share`` is set, the copy shares nothing mutable (hook tables, lists of options) with the original.
    """
    return _clone(module, "", supply, share, {})


def _clone(
    module: nn.Module, prefix: str, supply: Supply, share: bool, memo: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    new = module.__class__.__new__(module.__class__)
    memo[id(module)] = new
    state = new.__dict__
    state.update(module.__dict__)
    for key, value in module.__dict__.items():
        if type(value) in _SIMPLE:  # most are
            continue
        if isinstance(value, _CONTAINERS):
            if not share:
                state[key] = value.copy()
        elif isinstance(value, torch.Tensor):  # recomputed by a hook; what is no leaf could not be copied
            state[key] = value.detach()
    state.pop("_compiled_call_impl", None)  # what module.compile() has made runs the original
    for registry in ("_parameters", "_buffers"):
        table = module.__dict__[registry]
        state[registry] = {k: v if v is None else supply(prefix + k, v) for k, v in table.items()}
    children = module.__dict__["_modules"]
    if children:
        state["_modules"] = {
            name: child if child is None else _clone(child, f"{prefix}{name}.", supply, share, memo)
            for name, child in children.items()
        }
    if "_flat_weights" in state:  # recurrent layers keep a second list of their parameters
        names: Any = module._flat_weights_names
        state["_flat_weights"] = [getattr(new, name, None) for name in names]
    return new


def assemble(program: Program) -> nn.Module:
    """The module tree of ``program``: leaves as they are, everything else a bare container."""
    skeleton = program.skeleton
    root = nn.Module()
    root.training = skeleton.training.get("", False)
    root.__dict__["_switches"] = skeleton.switches.get("")
    built: dict[str, nn.Module] = {"": root}
    inside_leaf: set[str] = set()

    def place(path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        container(parent)._modules[name] = module
        built[path] = module

    def container(path: str) -> nn.Module:
        if path not in built:
            module = Container(skeleton.switches[path]) if path in skeleton.switches else nn.Module()
            module.training = skeleton.training.get(path, root.training)
            place(path, module)
        return built[path]

    def leaf(path: str) -> None:
        def owned(name: str, _: torch.Tensor) -> torch.Tensor | None:
            return program.tensors.get(f"{path}.{name}")

        place(path, clone_module(program.modules[path], owned))

    paths = [*skeleton.training, *(path for path in program.modules if path not in skeleton.training)]
    for path in paths:
        if not path or path.rpartition(".")[0] in inside_leaf:
            inside_leaf.update({path} - {""})
        elif path in skeleton.aliases:
            place(path, container(skeleton.aliases[path]))
            inside_leaf.update({path} if skeleton.aliases[path] in inside_leaf else ())
        elif path in program.modules:
            leaf(path)
            inside_leaf.add(path)
        else:
            container(path)
    for name in skeleton.names:
        parent, _, attribute = name.rpartition(".")
        if parent not in inside_leaf and parent not in skeleton.aliases:
            owner = container(parent)
            if name in skeleton.buffers:
                owner.register_buffer(attribute, program.tensors[name], persistent=skeleton.buffers[name])
            else:
                owner.register_parameter(attribute, program.tensors[name])  # type: ignore[arg-type]
    for name, tensor in program.extras.items():
        parent, _, attribute = name.rpartition(".")
        container(parent).register_buffer(attribute, tensor, persistent=False)
    return root
