"""Residual branches: the ``f`` of an addition ``y = x + f(x)``, which can go as a whole.

They are found in the graph, whatever the modules are called. A branch is everything that serves ``f`` alone:
its values are read by nothing else, it writes into nothing else, and where its parameters are zero, it adds
zeros. The last is what the exactness contract asks for: a network without the branch computes what the
original does with the branch's parameters at zero.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..nodes import ADDS, describe_source, operator_name
from ..program import Program
from .interpreter import Run, interpret
from .registry import rule_for
from .rules.pointwise import zero_rule
from .units import Value

if TYPE_CHECKING:
    from .graph import CouplingGraph

_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])
_PRODUCTS = frozenset(["mm", "bmm", "mv", "dot"])
_SUMS_OF_PRODUCTS = frozenset(["addmm", "baddbmm", "addmv", "addbmm"])


@dataclass(frozen=True)
class Branch:
    """A residual branch, ``f`` in ``y = x + f(x)``.

    Attributes:
        name: that of the module with most of its parameters.
        addition: name of the graph node that adds it.
        stream: name of the node that it is added to, ``x``.
        nodes: names of the nodes that go with it, in order.
        tensors: names of the parameters and buffers that nothing else reads.
        entries: how many entries these parameters have.
        copies: something is written into ``x`` or ``y`` afterwards, so that ``y`` has to be a copy of ``x``.
        source: ``file:line in function`` of the addition, or empty.
    """

    name: str
    addition: str
    stream: str
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    entries: int
    copies: bool
    source: str = ""

    def __str__(self) -> str:
        at = f" ({self.source})" if self.source else ""
        return f"{self.name}: {self.entries:,} parameters, added at {self.addition}{at}"


@dataclass(frozen=True)
class Branches:
    """The branches of a network by name, and why other additions to a stream have none that can go.

    Attributes:
        found: in the order of the graph.
        refused: by the name of the addition.
    """

    found: Mapping[str, Branch]
    refused: Mapping[str, str]


def find_branches(graph: CouplingGraph) -> Branches:
    """The residual branches of a network; its program is run on shapes once more."""
    program = graph.captured.program
    if list(program.pieces()) != [""]:
        return Branches({}, {})
    calls = _Calls(tensor for tensor in program.tensors.values() if isinstance(tensor, nn.Parameter))
    run = interpret(program, graph.inputs, follow=calls.follow)
    search = _Search(program, graph.inputs, run, calls)
    candidates: list[_Candidate] = []
    refused: dict[str, str] = {}
    for addition in program.graph.nodes:
        for stream, last in _operands(addition):
            between = search.between(stream, last)
            if not between:
                continue
            candidate = _Candidate(addition, stream, search.own(addition, stream, last))
            reason = search.refusal(candidate, last, between)
            if reason:
                refused[addition.name] = reason
            elif reason is not None:
                candidates.append(candidate)
            break
    names = _names(search, candidates)
    pairs = zip(names, candidates, strict=True)
    return Branches({name: search.branch(name, candidate) for name, candidate in pairs}, refused)


def zeros_added(program: Program, inputs: list[Any]) -> list[Branch]:
    """Additions of what is zero whatever the parameters are, as branches that can be removed.

    Args:
        program: it is run on shapes once.
        inputs: meta tensors and values for its placeholders, in order.
    """
    calls = _Calls(())
    run = interpret(program, inputs, follow=calls.follow)
    search = _Search(program, inputs, run, calls)
    found = []
    for addition in program.graph.nodes:
        for stream, last in _operands(addition):
            before, after = run.values.get(stream), run.values.get(addition)
            if not calls.zero(run.values.get(last)) or not (
                isinstance(before, Value) and isinstance(after, Value)
            ):
                continue
            if before.shape == after.shape and before.dtype == after.dtype:
                nodes = search.own(addition, stream, last)
                found.append(search.branch(addition.name, _Candidate(addition, stream, nodes)))
                break
    return found


@dataclass(frozen=True)
class _Candidate:
    addition: fx.Node
    stream: fx.Node
    nodes: frozenset[fx.Node]


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What may be the stream and what is added to it, in both orders; nothing for what is no plain sum."""
    if operator_name(node) not in ADDS:
        return
    others = (value for key, value in node.kwargs.items() if key in ("input", "self", "other"))
    given = [item for item in (*node.args, *others) if isinstance(item, fx.Node)]
    if len(given) != 2 or len(node.args) + len(node.kwargs) - ("alpha" in node.kwargs) != 2:
        return
    if given[0] is given[1]:
        return
    yield given[0], given[1]
    if node.kwargs.get("alpha", 1) == 1:
        yield given[1], given[0]


class _Calls:
    """What the ATen calls of a run write into, and what they leave at zero where some parameters are zero."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        """``parameters``: those that are zero."""
        self.writes: list[tuple[fx.Node | None, Any]] = []
        self._parameters = {id(tensor) for tensor in parameters}
        self._zero: dict[int, Value] = {}
        self._dirty: dict[int, Any] = {}

    def zero(self, value: Any) -> bool:
        """Whether a value is zero where these parameters are."""
        if not isinstance(value, Value):
            return False
        if value.state is not None:
            return id(value.state.tensor) in self._parameters
        return id(value) in self._zero and id(value.storage) not in self._dirty

    def follow(self, node: fx.Node | None, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """See :data:`.operator_calls.Follow`."""
        if func is None:  # a module with a rule of its own
            return
        arguments = func._schema.arguments
        given = {argument.name: item for argument, item in zip(arguments, args, strict=False)} | kwargs
        zero = self._gives_zero(func, args, given)
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for value in _known(given.get(argument.name)):
                    self.writes.append((node, value.storage))
                    if not zero:
                        self._dirty[id(value.storage)] = value.storage
        if zero:
            for value in _known(out):
                self._zero[id(value)] = value

    def _gives_zero(self, func: Any, args: Any, given: Mapping[str, Any]) -> bool:
        rule = rule_for(func)
        name = func._schema.name.partition("::")[2]
        if name in _ZEROS:
            return True
        if rule is None:
            return False

        def zero(item: Any) -> bool:
            return isinstance(item, torch.Tensor) and self.zero(getattr(item, "_fxprune_value", None))

        tensors = [item for item in pytree.tree_leaves(args) if isinstance(item, torch.Tensor)]
        if name in _PRODUCTS:
            return any(map(zero, tensors))
        if name in _SUMS_OF_PRODUCTS:
            return zero(args[0]) and any(map(zero, args[1:3]))
        if rule.family in ("contraction", "normalization"):
            bias = given.get("bias")
            factors = given.get("weight"), given.get("input") if name == "linear" else None
            return any(map(zero, factors)) and (bias is None or zero(bias))
        if rule.family == "movement":
            filler = given.get("value")
            return bool(tensors) and all(map(zero, tensors)) and (filler is None or filler == 0)
        if rule.family == "pointwise" and tensors:
            return bool(zero_rule(name, tuple(args))(list(map(zero, tensors))))
        return False


def _known(tree: Any) -> Iterator[Value]:
    for leaf in pytree.tree_leaves(tree):
        value = getattr(leaf, "_fxprune_value", None) if isinstance(leaf, torch.Tensor) else None
        if value is not None:
            yield value


@dataclass
class _Search:
    program: Program
    inputs: list[Any]
    run: Run
    calls: _Calls
    place: dict[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {node: number for number, node in enumerate(self.program.graph.nodes)}
        self._owns: dict[frozenset[fx.Node], dict[int, torch.Tensor]] = {}

    @cached_property
    def readers(self) -> Mapping[int, list[fx.Node]]:
        """By the id of a parameter or buffer the nodes that read it."""
        inside: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, tensor in self.program.tensors.items():
            path = name
            while path:
                inside[path].append(tensor)
                path = path.rpartition(".")[0]
        found: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.place:
            if node.op in ("call_module", "get_attr"):
                for tensor in inside.get(str(node.target), ()):
                    found[id(tensor)].append(node)
        return found

    @cached_property
    def live(self) -> set[fx.Node]:
        """The nodes that the outputs are made of; the others assert something, or write."""
        todo = [node for node in self.place if node.op == "output"]
        found = set(todo)
        while todo:
            for before in todo.pop().all_input_nodes:
                if before not in found:
                    found.add(before)
                    todo.append(before)
        return found

    def same(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that give the very tensor that ``node`` does: through an identity, or in place."""
        value = self.run.values.get(node)
        return {other for other, known in self.run.values.items() if known is value} | {node}

    def between(self, stream: fx.Node, last: fx.Node) -> set[fx.Node]:
        """The nodes by which tensors come from ``stream`` to ``last``; empty if none do."""
        start = self.same(stream)
        ahead, todo = set(start), [*start]
        while todo:
            for user in todo.pop().users:
                if user not in ahead and self.place[user] <= self.place[last] and self._tensors(user):
                    ahead.add(user)
                    todo.append(user)
        if last not in ahead or last in start:
            return set()
        found, todo = {last}, [last]
        while todo:
            for before in todo.pop().all_input_nodes:
                if before in ahead and before not in found and before not in start:
                    found.add(before)
                    todo.append(before)
        return found

    def own(self, addition: fx.Node, stream: fx.Node, last: fx.Node) -> frozenset[fx.Node]:
        """What serves ``last`` alone, and with it the addition."""
        start = self.same(stream)
        found, todo = {addition}, [last]
        while todo:
            node = todo.pop()
            if node in found or node in start or node.op == "placeholder":
                continue
            if all(user in found or user not in self.live for user in node.users):
                todo += self._with_idle(node, found)
        counters = [tensors for path, tensors in self.idle.items() if self._served(path, found)]
        for tensor in (tensor for tensors in counters for tensor in tensors):
            for reader in self.readers[id(tensor)]:
                self._with_idle(reader, found)
        return frozenset(found - {addition})

    def _with_idle(self, node: fx.Node, found: set[fx.Node]) -> list[fx.Node]:
        """Add a node, and those after it that no output is made of; what all of these read."""
        parts, read = [node], []
        for part in parts:
            found.add(part)
            read += part.all_input_nodes
            parts += [user for user in part.users if user not in self.live and user not in found]
        return read

    @cached_property
    def idle(self) -> Mapping[str, list[torch.Tensor]]:
        """By path of a module its buffers that no output is made of: counters."""
        found: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, tensor in self.program.tensors.items():
            readers = self.readers.get(id(tensor), [])
            if readers and not self.live.intersection(readers):
                found[name.rpartition(".")[0]].append(tensor)
        return found

    def _served(self, path: str, nodes: set[fx.Node]) -> bool:
        """Whether these nodes read tensors of the module at ``path``, and no others that count do."""
        readers = {
            reader
            for name, tensor in self.program.tensors.items()
            if name.rpartition(".")[0] == path
            for reader in self.readers.get(id(tensor), ())
        }
        readers &= self.live
        return bool(readers) and readers <= nodes

    def refusal(self, candidate: _Candidate, last: fx.Node, between: set[fx.Node]) -> str | None:
        """Why the branch cannot go; empty if it can, None where there is no parameter in it."""
        addition, stream, own = candidate.addition, candidate.stream, candidate.nodes
        outside = [node for node in self.place if node in between and node not in own]
        owned = self.owned(own)
        if not outside and not any(isinstance(tensor, nn.Parameter) for tensor in owned.values()):
            return None
        before, after = self.run.values.get(stream), self.run.values.get(addition)
        if not isinstance(before, Value) or not isinstance(after, Value):
            return "it is no sum of two tensors"
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"{stream.name} is not of the sum's shape and type"
        if outside:
            return f"{outside[-1].name}, which comes from {stream.name}, is read elsewhere, too"
        others = {
            id(value.storage)
            for node in self.place
            if node not in own and node is not addition
            for value in _values(self.run.values.get(node))
        }
        writer = next((n for n, storage in self.calls.writes if n in own and id(storage) in others), None)
        if writer is not None:
            return f"{writer.name} writes into what others read"
        if not self.calls.zero(self.run.values.get(last)) or not self._zero_by_its_own(own, last):
            return "it is not known to be zero where its parameters are"
        return ""

    def _zero_by_its_own(self, nodes: frozenset[fx.Node], last: fx.Node) -> bool:
        """Whether ``last`` is zero where the parameters are that these nodes alone read.

        Where they read no others, it is zero where all are, which has been found out.
        """
        parameters = [t for t in self.program.tensors.values() if isinstance(t, nn.Parameter)]
        owned = self.owned(nodes)
        read = nodes.union(*(node.all_input_nodes for node in nodes))
        if all(id(t) in owned or read.isdisjoint(self.readers.get(id(t), ())) for t in parameters):
            return True
        calls = _Calls(t for t in parameters if id(t) in owned)
        run = interpret(self.program, self.inputs, follow=calls.follow)
        return calls.zero(run.values.get(last))

    def owned(self, nodes: frozenset[fx.Node]) -> dict[int, torch.Tensor]:
        """The parameters and buffers that these nodes alone read, by their ids."""
        if nodes not in self._owns:
            self._owns[nodes] = {
                id(tensor): tensor
                for tensor in self.program.tensors.values()
                if (readers := self.readers.get(id(tensor))) and nodes.issuperset(readers)
            }
        return self._owns[nodes]

    def branch(self, name: str, candidate: _Candidate) -> Branch:
        """The branch of this name."""
        owned = self.owned(candidate.nodes)
        return Branch(
            name,
            candidate.addition.name,
            candidate.stream.name,
            tuple(node.name for node in self.place if node in candidate.nodes),
            tuple(key for key, tensor in self.program.tensors.items() if id(tensor) in owned),
            sum(tensor.numel() for tensor in owned.values() if isinstance(tensor, nn.Parameter)),
            self.written_later(candidate),
            describe_source(candidate.addition),
        )

    def written_later(self, candidate: _Candidate) -> bool:
        """Whether others write into the stream, or into the sum, after the addition."""
        values = [self.run.values[node] for node in (candidate.stream, candidate.addition)]
        storages = {id(value.storage) for value in values}
        if len(storages) == 1:  # the sum is the stream, written in place
            return False
        after = self.place[candidate.addition]
        return any(
            id(storage) in storages and node is not None and self.place[node] > after
            for node, storage in self.calls.writes
        )

    def _tensors(self, node: fx.Node) -> bool:
        return next(_values(self.run.values.get(node)), None) is not None


def _values(tree: Any) -> Iterator[Value]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value))


def _names(search: _Search, candidates: list[_Candidate]) -> list[str]:
    """For each candidate the module that holds its parameters, or most of them; each name once."""
    program = search.program
    names = []
    for candidate in candidates:
        owned = search.owned(candidate.nodes)
        sizes = {name: t.numel() for name, t in program.tensors.items() if id(t) in owned}
        path = ""
        while not path or any(name not in sizes for name in program.tensors if name.startswith(f"{path}.")):
            start = f"{path}." if path else ""
            children: Counter[str] = Counter()
            for name, size in sizes.items():
                head, _, rest = name.removeprefix(start).partition(".")
                if name.startswith(start) and rest:
                    children[head] += size
            if not children:
                break
            path = start + children.most_common(1)[0][0]
        names.append(path or candidate.addition.name)
    counts = Counter(names)
    return [
        name if counts[name] == 1 else candidate.addition.name
        for name, candidate in zip(names, candidates, strict=True)
    ]


__all__ = ["Branch", "Branches", "find_branches", "zeros_added"]
