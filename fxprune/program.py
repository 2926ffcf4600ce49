"""The form in which a network travels from stage to stage: a graph, its leaf modules, its tensors.

A ``Program`` is immutable by convention: no stage writes into one that it was given. Tensors are kept
apart from the modules that use them, so that analysis and rewriting run on shapes alone (meta tensors)
and weights are touched once, when the final module is assembled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .graph_module import OwnedModule, Switch, assemble


@dataclass(frozen=True)
class Skeleton:
    """What of a module tree is neither a leaf of the graph nor a tensor.

    Attributes:
        training: train/eval flag of every submodule, by path, in the order of the original.
        aliases: path of a module -> path under which the same module object was first seen.
        buffers: names of buffers -> whether they belong to the state dict.
        names: every name of every parameter and buffer, in the order of the original's state dict.
        switches: what a ``train()`` of their own does in modules, by path and mode.
    """

    training: Mapping[str, bool]
    aliases: Mapping[str, str]
    buffers: Mapping[str, bool]
    names: tuple[str, ...]
    switches: Mapping[str, Mapping[bool, Switch]] = field(default_factory=dict)

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
            for name, tensor in _registered(module, registry).items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor


def exchange(model: nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put other parameters and buffers into ``model``, in place, each by the ``id`` of the one that goes."""
    for _, module in named_modules(model):
        for registry in ("_parameters", "_buffers"):
            table = module.__dict__[registry]
            for name, tensor in table.items():
                table[name] = new.get(id(tensor), tensor)
        if "_flat_weights" in module.__dict__:  # recurrent layers keep a second list of their parameters
            names: Any = module._flat_weights_names
            module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in names]


def let_go(model: nn.Module) -> None:
    """Let go of the memory of a model that is not needed any more, though something may still refer to it.

    (Modules refer to each other in cycles, which Python looks for later, or not while it is told to rest.)
    """
    exchange(model, {id(tensor): tensor.detach().to("meta") for _, tensor in named_tensors(model)})


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``model.named_modules(remove_duplicate=False)`` as a list, which is made several times faster."""
    found: list[tuple[str, nn.Module]] = []

    def walk(path: str, module: nn.Module) -> None:
        found.append((path, module))
        for name, child in _registered(module, "_modules").items():
            if child is not None:
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def _registered(module: nn.Module, registry: str) -> Mapping[str, Any]:
    """A module's own ``_parameters``, ``_buffers`` or ``_modules``; what TorchScript traced hides them."""
    table: Mapping[str, Any] | None = module.__dict__.get(registry)
    return getattr(module, registry) if table is None else table


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``model`` runs, where it is a wrapper of torch's: compiled, or data parallel."""
    while (inner := wrapped(model)) is not None:
        model = model._modules[inner]  # type: ignore[assignment]
    return model


def wrapped(model: nn.Module) -> str | None:
    """The name of the module that a wrapper of torch's runs; None for what is no wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    if isinstance(model, Through):
        return model.wrapped
    kinds = {(kind.__module__, kind.__qualname__) for kind in type(model).__mro__}
    return "_orig_mod" if ("torch._dynamo.eval_frame", "OptimizedModule") in kinds else None


class Through(nn.Module):
    """Stands for a wrapper that compiles a module, or runs it on several devices: runs it."""

    def __init__(self, module: nn.Module, name: str, training: bool) -> None:
        super().__init__()
        self.wrapped = name
        self._modules[name] = module
        self.training = training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = self._modules.values()
        assert module is not None
        return module(*args, **kwargs)


def own_train(module: nn.Module) -> bool:
    """Whether the class of a module, or the module itself, has a ``train()`` of its own."""
    home = getattr(type(module).train, "__module__", "")
    return "train" in vars(module) or not home.startswith("torch.")


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
        free_outputs: names of outputs (see :class:`~fxprune.trees.Leaf`) that may become narrower.
        reads_values: values of the example inputs were read to make the graph, not only their shapes.
        seen: what nodes are on shapes alone, while it is kept: until it is known which sizes are free.
        again: says whether the model makes the same calls for other inputs, ``again(args, kwargs)``, while it
            is kept; in doubt, no. None where the rung cannot tell.
        retraced: gives what is captured for other inputs, ``retraced(args, kwargs)``, with what was decided
            for these; kept as long. None where the rung decides nothing.
    """

    graph: fx.Graph
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, torch.Tensor]
    skeleton: Skeleton
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    free_outputs: tuple[str, ...] = ()
    reads_values: bool = False
    seen: Mapping[fx.Node, Any] = field(default_factory=dict, repr=False, compare=False)
    again: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = field(
        default=None, repr=False, compare=False
    )
    retraced: Callable[[tuple[Any, ...], dict[str, Any]], Program] | None = field(
        default=None, repr=False, compare=False
    )

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
