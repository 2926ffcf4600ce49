"""Dynamo's graphs: the rung for what ``torch.compile`` hands to a backend.

Dynamo (https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html) passes parameters and
buffers in as inputs of the graph. Here they become tensors of the program again, under the names that
they have in the model. The inputs stay in the signature, and nothing reads them.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from ..errors import CalibrationError, CaptureError
from ..nodes import by_position
from ..program import Program, Skeleton, named_tensors
from .exported import source_line

__all__ = ["Batches", "example", "named_inputs", "takes_tensors", "trace"]


def takes_tensors(model: nn.Module) -> bool:
    """Whether ``model`` is a graph that takes parameters, or buffers of modules, as inputs."""
    return isinstance(model, fx.GraphModule) and any(map(_is_state, _placeholders(model)))


def named_inputs(model: nn.Module, args: tuple[Any, ...] = ()) -> dict[str, torch.Tensor]:
    """The parameters and buffers that ``model`` takes as inputs, by name; none but for Dynamo's graphs.

    Raises:
        CaptureError: if only their shapes are at hand, not the tensors.
    """
    if not isinstance(model, fx.GraphModule):
        return {}
    return {name: tensor for _, name, tensor in _found(model, args)}


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The program of a graph of Dynamo's.

    Dynamo does not tell which buffers belong to the state dict; all of them do in the result.

    Raises:
        CaptureError: if a parameter's values are not at hand, or the graph calls other graphs.
    """
    if not isinstance(model, fx.GraphModule):
        raise CaptureError(f"{type(model).__name__} is no graph of Dynamo's")
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in _placeholders(model):
        env[node] = graph.create_node("placeholder", str(node.target), node.args, name=node.name)
    tensors: dict[str, torch.Tensor] = dict(named_tensors(model))
    first: dict[int, str] = {id(tensor): name for name, tensor in reversed(tensors.items())}
    skeleton = Skeleton.of(model)
    training = {
        path: mode
        for path, mode in skeleton.training.items()
        if not path or not isinstance(model.get_submodule(path), fx.GraphModule)
    }
    buffers = dict(skeleton.buffers)
    for node, name, tensor in _found(model, args):
        tensors[name] = tensor
        env[node] = graph.get_attr(first.setdefault(id(tensor), name))
        if not isinstance(tensor, nn.Parameter):
            buffers[name] = True
    extras: dict[str, torch.Tensor] = {}
    notes = [
        "the parameters and buffers among the inputs are ignored; the network has its own",
        "train() and eval() change nothing: torch.compile captures each mode by itself",
    ]
    _copy(model, "", graph, env, tensors, extras, notes)
    graph.lint()
    return Program(
        graph=graph,
        modules={str(n.target): model.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"},
        tensors=tensors,
        skeleton=replace(skeleton, training=training, buffers=buffers, names=tuple(tensors)),
        extras=extras,
        notes=tuple(notes),
    )


def example(model: fx.GraphModule, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a graph of Dynamo's with values.

    Those that it was made with; where they are gone, zeros of their shape.
    """
    return tuple(_valued(node, given) for node, given in zip(_placeholders(model), args, strict=True))


def _valued(node: fx.Node, given: Any) -> Any:
    if isinstance(given, torch.SymInt):
        return given.node.hint
    if not isinstance(given, torch.Tensor) or not isinstance(given, FakeTensor):
        return given
    known = getattr(node.meta.get("grapharg"), "_example", None)
    if isinstance(known, float):  # an attribute of a module, under dynamic=True
        return torch.tensor(known, dtype=given.dtype)
    known = _tensor(node, None)
    if known is not None:
        return known
    shape = [int(size) for size in given.shape]
    return torch.zeros(shape, dtype=given.dtype, device=given.device)


class Batches:
    """Batches of inputs of a model, as inputs of the graph that Dynamo made of its beginning.

    Args:
        model: the graph.
        args: its own inputs.
        batches: of the model's inputs: a tensor, a tuple in the order in which the graph takes them, or a
            dict by name.
        pick: from a batch to the inputs.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        args: tuple[Any, ...],
        batches: Iterable[Any],
        pick: Callable[[Any], Any] | None,
    ) -> None:
        self.model, self.batches, self.pick = model, batches, pick
        self.own = dict(zip(_placeholders(model), args, strict=True))
        self.taken = [
            node
            for node, given in self.own.items()
            if isinstance(given, torch.Tensor) and not _is_state(node) and not _is_number(node)
        ]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for number, batch in enumerate(self.batches):
            yield self._bound(number, batch if self.pick is None else self.pick(batch))

    def _bound(self, number: int, inputs: Any) -> tuple[Any, ...]:
        names = [_last_name(node) for node in self.taken]
        if isinstance(inputs, Mapping):
            given = [inputs.get(name) for name in names]
        else:
            given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            if len(given) > 1:  # the graph takes them in the order in which it uses them
                given = []
        if len(given) != len(names) or not all(isinstance(value, torch.Tensor) for value in given):
            raise CalibrationError(
                f"batch {number} of the calibration data cannot be given to the graph of torch.compile, "
                f"which takes {', '.join(names)}. Where that are several, a batch is a dict by these names; "
                f"pick=lambda batch: ... makes one of it."
            )
        by_origin = {_origin(node): value for node, value in zip(self.taken, given, strict=True)}
        return tuple(self._value(node, own, by_origin) for node, own in self.own.items())

    def _value(self, node: fx.Node, own: Any, by_origin: Mapping[str, Any]) -> Any:
        origin = _origin(node)
        if origin in by_origin:
            return by_origin[origin]
        size = _SIZE.fullmatch(origin)
        if size is not None and size[1] in by_origin:
            return by_origin[size[1]].shape[int(size[2])]
        return _valued(node, own)


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a number that Dynamo passes as a tensor: an attribute, under ``dynamic=True``."""
    return bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))


_SIZE = re.compile(r"(.+)\.size\(\)\[(\d+)\]")
_LAST = re.compile(r"\['(\w+)'\]$")


def _last_name(node: fx.Node) -> str:
    """The name by which the model knows an input."""
    found = _LAST.search(_origin(node))
    return found[1] if found is not None else str(node.target)


def _placeholders(model: fx.GraphModule) -> list[fx.Node]:
    return [node for node in model.graph.nodes if node.op == "placeholder"]


def _origin(node: fx.Node) -> str:
    """The expression by which Dynamo reads an input, as ``L['self']._modules['fc']._parameters['bias']``."""
    return str(getattr(getattr(node.meta.get("grapharg"), "source", None), "name", ""))


_BUFFER = re.compile(r"\._buffers\['[^']+'\]$")


def _is_state(node: fx.Node) -> bool:
    """Whether an input is a parameter, or a buffer of a module.

    Any other tensor that a module holds may be exchanged between calls, and stays an input.
    """
    parameter = isinstance(node.type, type) and issubclass(node.type, nn.Parameter)
    return parameter or _BUFFER.search(_origin(node)) is not None


def _found(model: fx.GraphModule, args: tuple[Any, ...]) -> Iterator[tuple[fx.Node, str, torch.Tensor]]:
    """Inputs that are parameters or buffers: the placeholder, a name for it, and the tensor."""
    places = _placeholders(model)
    nodes = [node for node in places if _is_state(node)]
    names = _names(nodes, {name for name, _ in named_tensors(model)})
    given = dict(zip(places, args, strict=False))
    for node, name in zip(nodes, names, strict=True):
        tensor = _tensor(node, given.get(node))
        if tensor is None:
            raise CaptureError(
                f"the graph takes the parameter or buffer {name} as its input {node.target}, and only its "
                f"shape is known. Next: call fxprune inside of the backend, while torch.compile runs, where "
                f"the graph knows its tensors; or give the parameters themselves in the example inputs."
            )
        yield node, name, tensor


def _tensor(node: fx.Node, given: Any) -> torch.Tensor | None:
    """The tensor that Dynamo will pass; else the parameter among the example inputs."""
    try:
        known = node.meta["grapharg"].example
    except (KeyError, AssertionError):  # compiled already, or the tensor is gone
        known = given if isinstance(given, nn.Parameter) and given.device.type != "meta" else None
    return known if isinstance(known, torch.Tensor) and not isinstance(known, FakeTensor) else None


_ROOT = re.compile(r"[LG]\['(\w+)'\]")
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^'.]+)'\]|\.([^\W\d]\w*)|\[(\d+)\]|\['(\w+)'\]")


def _names(nodes: list[fx.Node], taken: set[str]) -> list[str]:
    """Dotted names as in the model, where Dynamo tells; else the names of the inputs.

    Where the tensors belong to several variables (``encoder`` and ``decoder``, say), these come first.
    """
    paths = [_path(_origin(node)) for node in nodes]
    several = len({path[0] for path in paths if path}) > 1
    dotted = [".".join(path if several else path[1:]) for path in paths]
    names: list[str] = []
    for node, name in zip(nodes, dotted, strict=True):
        others = [*taken, *names, *(other for other in dotted if other != name)]
        if not name or name in [*taken, *names] or any(other.startswith(f"{name}.") for other in others):
            name = str(node.target)
        names.append(name)
    return names


def _path(origin: str) -> tuple[str, ...]:
    """``("self", "fc", "bias")`` for the example of :func:`_origin`; empty for what is no such path."""
    root = _ROOT.match(origin)
    if root is None:
        return ()
    path, end = [root[1]], root.end()
    while end < len(origin):
        step = _STEP.match(origin, end)
        if step is None:
            return ()
        path.append(next(part for part in step.groups() if part is not None))
        end = step.end()
    return () if len(path) < 2 or any(map(keyword.iskeyword, path)) else tuple(path)


def _copy(
    model: fx.GraphModule,
    prefix: str,
    graph: fx.Graph,
    env: dict[fx.Node, Any],
    tensors: dict[str, torch.Tensor],
    extras: dict[str, torch.Tensor],
    notes: list[str],
) -> Any:
    """Copy the calls of ``model``, whose attributes have names with ``prefix``; gives what it returns.

    Blocks under activation checkpoints become part of the graph.
    """
    for node in model.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            results = map_arg(node.args[0], env.__getitem__)
            if not prefix:
                graph.output(results)
            return results
        source = source_line(node)
        if node.op == "get_attr":
            value = _attribute(model, str(node.target))
            if isinstance(value, fx.GraphModule):
                env[node] = value  # for the operator that calls it
                continue
            if not isinstance(value, torch.Tensor):
                raise CaptureError(f"the graph reads {node.target}, which is no tensor but a {type(value)}")
            name = f"{prefix}{node.target}"
            if name not in tensors:
                extras[name] = value.detach()
            env[node] = graph.get_attr(name)
        elif node.target is torch.ops.higher_order.tag_activation_checkpoint:
            block, *inputs = map_arg(node.args, env.__getitem__)
            inner = dict(zip(_placeholders(block), inputs, strict=True))
            path = f"{prefix}{node.args[0].target}."
            env[node] = _copy(block, path, graph, inner, tensors, extras, notes)
            if _UNDONE not in notes:
                notes.append(_UNDONE)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            at = f" at {source[0]}:{source[1]}" if source else ""
            raise CaptureError(
                f"the graph holds {node.target}{at}, which calls another graph and is not rewritten. Next: "
                f"prune the model itself, before torch.compile."
            )
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (list, tuple)):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.target is torch.Size:  # of numbers, which may have to change one by one
            env[node] = tuple(map_arg(node.args[0], env.__getitem__))
        else:
            env[node] = new = graph.node_copy(node, env.__getitem__)
            if new.kwargs:
                new.args, new.kwargs = by_position(
                    new.op, node.target, new.args, new.kwargs, model.get_submodule
                )
            env[node].meta = {"source": source} if source else {}
            seen = node.meta.get("example_value")
            if isinstance(seen, torch.SymFloat) and seen.node.has_hint():
                env[node].meta["number"] = seen.node.hint  # an attribute of a module, under dynamic=True
            if node.op == "call_module":
                env[node].target = f"{prefix}{node.target}"
    return None


_UNDONE = "activation checkpoints are gone: what they would compute again is kept for the backward pass"


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
