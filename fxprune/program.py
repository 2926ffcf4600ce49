"""The form in which a network travels from stage to stage: a graph, its leaf modules, its tensors.

A ``Program`` is immutable by convention: no stage writes into one that it was given. Tensors are kept
apart from the modules that use them, so that analysis and rewriting run on shapes alone (meta tensors)
and weights are touched once, when the final module is assembled.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .record import record, replay


@dataclass(frozen=True)
class Skeleton:
    """What of a module tree is neither a leaf of the graph nor a tensor.

    Attributes:
        training: train/eval flag of every submodule, by path, in the order of the original.
        aliases: path of a module -> path under which the same module object was first seen.
        buffers: names of buffers -> whether they belong to the state dict.
        names: every name of every parameter and buffer, in the order of the original's state dict.
    """

    training: Mapping[str, bool]
    aliases: Mapping[str, str]
    buffers: Mapping[str, bool]
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Skeleton:
        """The skeleton of ``model``."""
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        training: dict[str, bool] = {}
        modules: dict[str, nn.Module] = {}
        for path, module in named_modules(model):
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
                    buffers[f"{path}.{name}" if path else name] = (
                        name not in module._non_persistent_buffers_set
                    )
        return cls(training, aliases, buffers, tuple(name for name, _ in named_tensors(model)))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, under every name that they have."""
    modules = named_modules(model)
    for registry in ("_parameters", "_buffers"):
        for path, module in modules:
            for name, tensor in module.__dict__[registry].items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``model.named_modules(remove_duplicate=False)`` as a list, which is made several times faster."""
    found: list[tuple[str, nn.Module]] = []

    def walk(path: str, module: nn.Module) -> None:
        found.append((path, module))
        for name, child in module.__dict__["_modules"].items():
            if child is not None:
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def computed_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the tensors that parametrizations, or the older hooks of ``torch.nn.utils``, compute."""
    for path, module in named_modules(model):
        names = list(module.parametrizations) if is_parametrized(module) else []  # type: ignore[arg-type]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                names.append(hook._tensor_name)
            elif isinstance(hook, (WeightNorm, SpectralNorm)):
                names.append(hook.name)
        for name in names:
            yield f"{path}.{name}" if path else name


@dataclass(frozen=True)
class Program:
    """A captured or rewritten network.

    Attributes:
        graph: the ``torch.fx`` graph. Node metadata ``"source"`` holds ``(file, line, function)``.
        modules: leaf modules by path. Their own tensors are ignored: ``tensors`` counts.
        tensors: parameters and buffers by name. Tied tensors are one object under several names.
        skeleton: the rest of the module tree.
        extras: constants that were met while tracing or added by the rewriter; not in the state dict.
        notes: what the user should know about how the graph was made.
        free_outputs: names of outputs (see :class:`~fxprune.structure.Leaf`) that may become narrower.
    """

    graph: fx.Graph
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, torch.Tensor]
    skeleton: Skeleton
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    free_outputs: tuple[str, ...] = ()

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Values for the placeholders, in order. Raises TypeError as a Python call would."""
        names = [str(node.target) for node in self.placeholders()]
        if len(args) > len(names):
            raise TypeError(f"takes {len(names)} positional inputs ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        for key, value in kwargs.items():
            if key not in names:
                raise TypeError(f"has no input named {key!r}; its inputs are {', '.join(names)}")
            if key in given:
                raise TypeError(f"got two values for the input {key!r}")
            given[key] = value
        values = []
        for node in self.placeholders():
            name = str(node.target)
            if name not in given and not node.args:
                raise TypeError(f"misses the input {name!r}")
            values.append(given.get(name, node.args[0] if node.args else None))
        return values

    def pieces(self) -> dict[str, Program]:
        """The programs of the submodules that the graph covers, by path; here one, of the model itself."""
        return {"": self}

    def module(self, class_name: str = "GraphModule") -> fx.GraphModule:
        """Assemble a module that owns ``tensors`` (they are not copied) and runs the graph."""
        return OwnedModule.of(assemble(self), self.graph, class_name)

    def result(self, class_name: str) -> nn.Module:
        """What takes the place of the captured model; owns ``tensors``, too."""
        return self.module(class_name)


_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_pre_hooks")


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
        module = self.module()
        if module is not None:
            module.recompile()
        return getattr(owner if instance is None else instance, "forward")  # noqa: B009  (now another one)


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
        module = cls(nn.Module(), fx.Graph(), class_name)
        for registry in _REGISTRIES:
            module.__dict__[registry] = root.__dict__[registry]
        module.training = root.training
        module._graph = graph
        graph.owning_module = module
        for name in _GENERATED:
            del module.__dict__[name]
        type(module).forward = _Deferred(module)  # type: ignore[assignment]
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        own = {registry: self.__dict__[registry] for registry in _REGISTRIES}
        return _unpickle, (record(self.graph), own, self.meta, self.training, type(self).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedModule:
        root = nn.Module()
        for registry in _REGISTRIES[1:]:
            root.__dict__[registry] = copy.deepcopy(self.__dict__[registry], memo)
        modules: dict[int, nn.Module] = {}
        for name, child in self._modules.items():
            if child is not None:
                root._modules[name] = _clone(child, "", lambda _, t: copy.deepcopy(t, memo), False, modules)
        root.training = self.training
        new = OwnedModule.of(root, copy.deepcopy(self.graph), type(self).__name__)
        new.meta = copy.copy(self.meta)
        memo[id(self)] = new
        return new


def _unpickle(
    nodes: list[tuple[Any, ...]], own: dict[str, Any], meta: dict[str, Any], training: bool, class_name: str
) -> OwnedModule:
    root = nn.Module()
    root.__dict__.update(own)
    root.training = training
    module = OwnedModule.of(root, replay(nodes), class_name)
    module.meta = meta
    return module


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A copy of a graph with the same node names, and its nodes by name.

    A node that is added to it does not take the name of one that was erased: the names are those by which
    the nodes of the original graph are known.
    """
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, mapping)
    for old in graph.nodes:
        if old.op == "output":
            new.output(result, old.type).meta = dict(old.meta)
    new._codegen = graph._codegen
    new._graph_namespace._used_names |= graph._graph_namespace._used_names
    return new, {node.name: node for node in new.nodes}


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
    built: dict[str, nn.Module] = {"": root}
    inside_leaf: set[str] = set()

    def place(path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        container(parent)._modules[name] = module
        built[path] = module

    def container(path: str) -> nn.Module:
        if path not in built:
            module = nn.Module()
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


def mutable(tree: Any) -> Any:
    """Plain lists and dicts in place of torch.fx's immutable ones."""
    if isinstance(tree, list):
        return [mutable(item) for item in tree]
    if type(tree) is tuple:  # named ones stay what they are
        return tuple(mutable(item) for item in tree)
    if isinstance(tree, dict):
        return {key: mutable(item) for key, item in tree.items()}
    return tree


def is_assertion(node: fx.Node, args: Any) -> bool:
    """Whether a node asserts something of the values of a tensor, which are not known on shapes alone."""
    return node.target is torch._assert and bool(args) and isinstance(args[0], torch.Tensor)


def by_position(
    kind: str,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    module: Callable[[str], nn.Module],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as the rest of fxprune looks for it: ``chunk(x, chunks=2)`` for ``chunk(input=x, chunks=2)``.

    So for the first argument of functions and of modules (``module`` gives them by path), and for
    ``x.size(dim=1)``.
    """
    first = "dim" if kind == "call_method" and target == "size" else None
    if kind == "call_function" and not args:
        overloads = [list(signature.parameters) for signature in get_signature_for_torch_op(target) or ()]
        fitting = [names for names in overloads if names and names[0] in kwargs]
        first = max(fitting, key=lambda names: len(kwargs.keys() & names), default=[None])[0]
    elif kind == "call_module" and not args:
        parameters = inspect.signature(module(target).forward).parameters.values()
        first = next((p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD), None)
    if first is None or first not in kwargs:
        return args, dict(kwargs)
    return (*args, kwargs[first]), {name: value for name, value in kwargs.items() if name != first}


def writes(node: fx.Node) -> bool:
    """Whether a node may write into what it is given."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.endswith("_") or name == "setitem"


def describe_source(node: fx.Node | None) -> str:
    """``file.py:12 in forward`` for a node, or an empty string where the source is unknown."""
    source = node.meta.get("source") if node is not None else None
    if not source:
        return ""
    file, line, function = source
    return f"{file}:{line} in {function}"
