"""Residual branches that go from a copy of the model in its own class.

The class's own code goes on adding what the branch gave. So modules that serve a removed branch alone are
replaced by :class:`.nn.Nothing`, which gives zeros; a module that adds the branch itself and does nothing
else is replaced by one that returns what it is given. The proof is that the copy, captured again, is the
graph without the branches, node by node, once additions of zeros are left out.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import as_one, generation
from .capture.twin import Twin
from .coupling.branches import Branch, zeros_added
from .inputs import meta_like, to_meta
from .nn import Nothing
from .nodes import operator_name
from .passes.remove_branches import remove_branches
from .program import Program, named_modules, named_tensors
from .trees import flatten


@dataclass(frozen=True)
class StandIns:
    """What takes the place of the layers of removed branches.

    Attributes:
        modules: by path.
        tensors: names of parameters and buffers of these branches that other modules hold, which become a
            zero.
    """

    modules: Mapping[str, Nothing] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()

    def __or__(self, other: StandIns) -> StandIns:
        return StandIns({**self.modules, **other.modules}, (*self.tensors, *other.tensors))

    def put_into(self, model: nn.Module) -> None:
        """Replace modules and tensors of ``model``, in place."""
        for path, module in self.modules.items():
            parent, _, name = path.rpartition(".")
            training = model.get_submodule(path).training
            model.get_submodule(parent)._modules[name] = copy.deepcopy(module).train(training)
        for path in self.tensors:
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
            old = table.pop(name)
            zero = torch.zeros((1,) * old.dim(), dtype=old.dtype, device=old.device)
            owner.register_buffer(name, zero, persistent=False)


@dataclass(frozen=True)
class _Call:
    """A call of a module: what it was given, by name, and what it returned."""

    names: tuple[str, ...]
    given: Mapping[str, Any]
    outputs: Any


def find_stand_ins(
    model: nn.Module,
    branches: Sequence[Branch],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    right: Callable[[StandIns, Sequence[Branch]], bool],
) -> tuple[StandIns, list[Branch]]:
    """What takes the place of the ``branches`` in a copy of ``model``, and those for which nothing can.

    Args:
        model: it is run on shapes, once.
        branches: those to be removed, in the order of the graph.
        args: its positional inputs.
        kwargs: its keyword inputs.
        right: whether a copy with stand-ins for some of the branches is the model without these branches.
    """
    outer = [b for b in branches if not any(set(b.tensors) < set(o.tensors) for o in branches)]
    owned = {branch.name: _owned(model, branch) for branch in outer}
    calls = _calls(model, {path for paths in owned.values() for path in paths}, args, kwargs)
    alike: dict[tuple[Any, ...], list[Branch]] = {}
    for branch in outer:
        kinds = tuple(type(model.get_submodule(path)) for path in owned[branch.name])
        alike.setdefault(kinds, []).append(branch)
    found, lost = StandIns(), []
    for same in alike.values():
        options = [list(_options(branch, owned[branch.name], calls)) for branch in same]
        for chosen in zip(*options, strict=False):
            if right(union := _union(chosen), same):
                found |= union
                break
        else:
            lost += same
    return found, lost


def _union(chosen: Sequence[StandIns]) -> StandIns:
    found = StandIns()
    for one in chosen:
        found |= one
    return found


def _owned(model: nn.Module, branch: Branch) -> list[str]:
    """Paths of the modules all of whose tensors are the branch's, outer ones before those inside."""
    holds: dict[str, list[bool]] = {path: [] for path, _ in named_modules(model)}
    own = set(branch.tensors)
    for name, _ in named_tensors(model):
        path = name
        while path:
            path = path.rpartition(".")[0]
            holds[path].append(name in own)
    return [path for path, all_own in holds.items() if path and all_own and all(all_own)]


def _options(branch: Branch, owned: Sequence[str], calls: Mapping[str, _Call]) -> Iterator[StandIns]:
    """What may take the place of one branch: its outermost modules first, then those inside of them."""
    level = [path for path in owned if path.rpartition(".")[0] not in owned]
    while level:
        held = tuple(f"{path}." for path in level)
        left = tuple(name for name in branch.tensors if not name.startswith(held))
        for passes in (True, False) if len(level) == 1 else (False,):
            made = {path: _nothing(calls[path], passes) for path in level if path in calls}
            modules = {path: module for path, module in made.items() if module is not None}
            if len(modules) == len(level):
                yield StandIns(modules, left)
        inside = [path for path in owned if path.rpartition(".")[0] in level]
        level = [path for path in level if not any(c.startswith(f"{path}.") for c in inside)] + inside
        if not inside:
            return


def _nothing(call: _Call, passes: bool) -> Nothing | None:
    """What returns, in place of a module, zeros or what it was given; None where neither will do."""
    given = {name: value for name, value in call.given.items() if isinstance(value, torch.Tensor)}
    tensors, structure = flatten(call.outputs)
    if not given or any(leaf.inside for leaf in structure.leaves):
        return None
    follows = []
    for tensor in tensors:
        like = [n for n, value in given.items() if (value.shape, value.dtype) == (tensor.shape, tensor.dtype)]
        if passes and not like:
            return None
        follows.append(like[0] if like else next(iter(given)))
    return Nothing(call.names, tuple(follows), structure, passes)


def _calls(
    model: nn.Module, paths: set[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, _Call]:
    """The first call of each of these modules when ``model`` runs."""
    found: dict[str, _Call] = {}

    def note(path: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        places = inspect.signature(module.forward).parameters.values()
        names = tuple(p.name for p in places if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        found.setdefault(path, _Call(names, {**dict(zip(names, given, strict=False)), **named}, out))

    with _on_shapes(model, args, kwargs) as (twin, run):
        for path in paths:
            twin.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True)
        run()
    return found


@contextlib.contextmanager
def _on_shapes(model: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """A copy of ``model`` without values, and what runs it as far as no value is asked for."""
    fake = FakeTensorMode()
    twin = Twin(model, lambda tensor: fake.from_tensor(meta_like(tensor))).model.eval()
    args, kwargs = pytree.tree_map_only(torch.Tensor, fake.from_tensor, to_meta((args, kwargs)))

    def run() -> None:
        with contextlib.suppress(Exception):  # whatever a user's class raises
            as_one(twin, kwargs)(*args, **kwargs)

    with fake, torch.no_grad():
        yield twin, run


class _Log(TorchDispatchMode):
    """The calls that are made outside of some modules, with the numbers that they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []
        self.inside = 0

    def enter(self, *_: Any) -> None:
        self.inside += 1

    def leave(self, *_: Any) -> None:
        self.inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            leaves = pytree.tree_leaves((args, kwargs or {}))
            self.calls.append((str(func), *(leaf for leaf in leaves if isinstance(leaf, (int, float)))))
        return func(*args, **(kwargs or {}))


def decodes_alike(
    model: nn.Module, stand_ins: StandIns, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the decode step of ``generate()`` makes the same calls with stand-ins, outside of these.

    It does not where it counts tokens by what a removed layer would have put into the cache.
    """
    calls = generation(model, args, kwargs)
    if calls is None or not stand_ins.modules:
        return True
    copied = Twin(model, lambda tensor: tensor).model
    stand_ins.put_into(copied)
    logs = []
    for each in (model, copied):
        with _on_shapes(each, *calls) as (twin, run), _Log() as log:
            for path in stand_ins.modules:
                twin.get_submodule(path).register_forward_pre_hook(log.enter)
                twin.get_submodule(path).register_forward_hook(log.leave)
            run()
        logs.append(log.calls)
    return logs[0] == logs[1]


def without_zeros(program: Program, reference: Program, inputs: list[Any]) -> Program:
    """``program`` without additions of zeros, with the names and the order of the nodes of ``reference``.

    Args:
        program: a copy with stand-ins, captured. What does not have the reference's nodes is as it was.
        reference: the graph without the branches.
        inputs: meta tensors and values for the placeholders of both, in order.
    """
    program = remove_branches(program, zeros_added(program, inputs))
    pairs = _pairs(program.graph, reference.graph)
    if pairs is None:
        return program
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in reference.graph.nodes:
        own, same = pairs[node]
        if not all(before in made for before in own.all_input_nodes):
            return program
        new = graph.node_copy(own, made.__getitem__)
        new.name = node.name
        made.update(dict.fromkeys([other for other in same if other not in made], new))
        made[own] = new
    graph._codegen = program.graph._codegen
    return replace(program, graph=graph)


def _pairs(mine: fx.Graph, theirs: fx.Graph) -> dict[fx.Node, tuple[fx.Node, list[fx.Node]]] | None:
    """For each node of ``theirs`` the one of ``mine`` that does the same, and all that give the same.

    Numbers may differ. What is read off a tensor may be read at another place, or twice. None where there is
    more in one graph than in the other.
    """
    known: dict[Any, int] = {}
    alike = [_classes(graph, known, numbers=False) for graph in (mine, theirs)]
    same = [_classes(graph, known, numbers=True) for graph in (mine, theirs)]
    found: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = {}
    if alike[0].keys() != alike[1].keys():
        return None
    for kind, nodes in alike[1].items():
        kinds = [
            {exact: members for exact, members in all_same.items() if members[0] in own}
            for all_same, own in zip(same, (set(alike[0][kind]), set(nodes)), strict=True)
        ]
        if len(kinds[0]) != len(kinds[1]):
            return None
        others = iter([members for exact, members in kinds[0].items() if exact not in kinds[1]])
        for exact, members in kinds[1].items():
            own = kinds[0][exact] if exact in kinds[0] else next(others)
            found.update({node: (own[min(at, len(own) - 1)], own) for at, node in enumerate(members)})
    return found


def _classes(graph: fx.Graph, known: dict[Any, int], numbers: bool) -> dict[int, list[fx.Node]]:
    """The nodes that make the same calls of the same, by a number that such have in all graphs."""
    found: dict[fx.Node, int] = {}
    classes: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else operator_name(node)
        said = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"node {found[n]}")
        if not numbers:
            said = pytree.tree_map_only((int, float), lambda number: "a number", said)
        found[node] = known.setdefault((node.op, target, str(said)), len(known))
        classes[found[node]].append(node)
    return dict(classes)


def same_graph(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs, in the same order, make the same calls."""
    known: dict[Any, int] = {}
    kinds = [
        {node: kind for kind, nodes in _classes(graph, known, numbers=True).items() for node in nodes}
        for graph in (one, other)
    ]
    return [kinds[0][node] for node in one.nodes] == [kinds[1][node] for node in other.nodes]


__all__ = ["StandIns", "decodes_alike", "find_stand_ins", "same_graph", "without_zeros"]
