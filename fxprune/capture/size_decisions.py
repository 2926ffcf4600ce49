"""What a model's code decides by the sizes of its inputs, and whether it could come out otherwise.

``if n > 512:``, ``range(h // 64)``, ``min(n, 100)``: control flow asks for a plain number, and the graph
holds what the code did for the example. Each such decision becomes a call of :func:`check_decision
<fxprune.guards.check_decision>`. Looks at other sizes show which of the numbers behind it follow the sizes
of the inputs. :func:`settle` leaves the decisions that do, which then compute with the example's values of
all the other numbers: those may be widths of layers, which pruning makes smaller.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..graph_module import clone_module
from ..guards import check_decision
from ..inputs import meta_like, to_meta
from ..known_shapes import Remembered
from ..nodes import counts_entries, size_read
from ..program import Program
from ..sizes import Change, places, resized
from ..value_dependent import OnShapes, call_on_shapes

_NUMBERS = (bool, int, float)
_POLYNOMIALS = (operator.add, operator.sub, operator.mul, operator.neg)
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.gt, operator.le, operator.ge)


@dataclass
class SizeDecision:
    """A decision by sizes. It is the ``"decision"`` in the metadata of its node, and of copies of that.

    Attributes:
        values: of the numbers behind it, itself first, as :func:`behind` gives them.
        others: what they are at other sizes, at which the graph is the same.
        elsewhere: what the graph has for them at further sizes, at which it need not be right.
    """

    values: list[Any]
    others: list[list[Any]] = field(default_factory=list)
    elsewhere: list[list[Any]] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        """Whether it came out otherwise at other sizes, and the graph was the same all the same."""
        return any(values[0] != self.values[0] for values in self.others)

    @property
    def is_open(self) -> bool:
        """Whether it may come out otherwise, by what it is computed from."""
        return not self.is_idle and any(not self.is_fixed(place) for place in range(len(self.values)))

    def is_fixed(self, place: int) -> bool:
        """Whether the number at a place is the same at all sizes."""
        return all(values[place] == self.values[place] for values in (*self.others, *self.elsewhere))

    def is_free(self, place: int) -> bool:
        """Whether the number at a place, and in a shape each one, follows the sizes of the inputs."""
        return all(self.are_free(place))

    def are_free(self, place: int) -> list[bool]:
        """As :meth:`is_free`, for each size of the shape at a place, or for the number there alone."""
        seen = [_parts(values[place]) for values in (*self.others, *self.elsewhere)]
        return [any(sizes[i] != mine for sizes in seen) for i, mine in enumerate(_parts(self.values[place]))]


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


def _apart(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    """How far numbers are from each other; of unlike many, they themselves."""
    return tuple(map(operator.sub, one, other)) if len(one) == len(other) else (one, other)


def _is_number(value: Any) -> bool:
    """Whether it is a number, a shape, or what holds nothing else."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_number, value))
    return isinstance(value, _NUMBERS)


def behind(node: fx.Node, seen: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The numbers that ``node``, a number, is computed from: itself first, back to those read off tensors.

    Of what counts the entries of a tensor, the tensor is one of them, which stands for its shape.
    """
    found = {node: None}
    todo = [node]
    while todo:
        whole = todo.pop()
        for part in whole.all_input_nodes:
            if part in found:
                continue
            if _is_number(seen.get(part)):
                todo.append(part)
            elif not (counts_entries(whole) and isinstance(seen.get(part), torch.Tensor)):
                continue
            found[part] = None
    return list(found)


def numbers(parts: Iterable[fx.Node], seen: Mapping[fx.Node, Any]) -> list[Any]:
    """What nodes that :func:`behind` gives are."""
    values = (seen[part] for part in parts)
    return [value.shape if isinstance(value, torch.Tensor) else value for value in values]


def note(node: fx.Node, seen: Mapping[fx.Node, Any]) -> None:
    """Make a decision of the node of a check."""
    number: Any = node.args[0]
    node.meta["decision"] = SizeDecision(numbers(behind(number, seen), seen))


def decisions(graph: fx.Graph) -> list[tuple[fx.Node, SizeDecision]]:
    """The decisions that are not settled, each with its node, in order."""
    nodes = graph.find_nodes(op="call_function", target=check_decision)
    return [(node, node.meta["decision"]) for node in nodes if "decision" in node.meta]


def meet(graph: fx.Graph, other: fx.Graph) -> fx.Node | None:
    """Note what decisions are in the graph of another trace, at other sizes, that makes the same calls.

    Returns:
        The first check where the other trace decided by another line, or by one less; None where none did.
        ``if a and b:`` asks for ``b`` only where ``a`` holds: what it came to there says little.
    """
    mine, others = decisions(graph), decisions(other)
    for (node, decision), (found, there) in zip(mine, others, strict=False):
        if found.args[2] != node.args[2] or len(there.values) != len(decision.values):
            return node
    if len(mine) != len(others):
        return max(mine, others, key=len)[min(len(mine), len(others))][0]
    for (_, decision), (_, there) in zip(mine, others, strict=True):
        decision.others.append(there.values)
        there.others = [decision.values, *decision.others]
    return None


_SHARES = (1 / 8, 8)
"""How large the sizes are at which a graph is run on shapes, as shares of those of the example."""
_LEAST = 2
"""Smaller sizes are left out."""


def look_elsewhere(program: Program, tree: Any, steps: Mapping[str, int]) -> None:
    """Note what the numbers behind decisions are where sizes are much smaller and larger, on shapes alone.

    What is padded to windows has the same size at all small sizes of the inputs.

    Args:
        program: its decisions are added to.
        tree: the inputs of the example.
        steps: by kind what its sizes may differ by a multiple of; below 0, what they may be smaller by.
    """
    made = [found for found in decisions(program.graph) if not found[1].is_idle]
    if not made:
        return
    given = to_meta(tree)
    behind_each = [behind(node.args[0], program.seen) for node, _ in made]  # type: ignore[arg-type]
    for change in _further(given, steps):
        values = _on_shapes(program, resized(given, change))
        for (_, decision), parts in zip(made, behind_each, strict=True):
            if all(part in values for part in parts):
                decision.elsewhere.append(numbers(parts, values))


def questions(graph: fx.Graph) -> Counter[Any]:
    """How many numbers each line asks for in each way, whatever the answer and however often."""
    asked = {check.args[0]: check.args[2] for check, _ in decisions(graph)}
    return Counter(
        (line, number.target, tuple(repr(part) for part in number.args if not isinstance(part, fx.Node)))
        for number, line in asked.items()
        if isinstance(number, fx.Node)
    )


def ask_for_one(graph: fx.Graph, lengths: Collection[int]) -> list[fx.Node]:
    """The checks of decisions by whether a length is one: ``if n > 1:``, ``if n == 1:``.

    Args:
        graph: the graph.
        lengths: of the inputs of the example.
    """
    return [
        check
        for check, decision in decisions(graph)
        if decision.is_open and _asks_for_one(check, decision, lengths)
    ]


def _asks_for_one(check: fx.Node, decision: SizeDecision, lengths: Collection[int]) -> bool:
    number: Any = check.args[0]
    read = [part for part in number.args if isinstance(part, fx.Node)]
    if number.target not in COMPARISONS or len(number.args) != 2 or len(read) != 1:
        return False
    (bound,) = (part for part in number.args if part is not read[0])
    if size_read(read[0]) is None or not isinstance(bound, int) or decision.values[1] not in lengths:
        return False

    def answer(size: int) -> bool:
        return bool(number.target(*(size if part is read[0] else part for part in number.args)))

    return all(answer(size) is not answer(1) for size in (2, max(bound, 2), max(bound + 1, 2)))


def _further(tree: Any, steps: Mapping[str, int]) -> Iterator[Change]:
    smallest: dict[str, int] = {}
    for place in places(tree):
        smallest[place.kind] = min(place.size, smallest.get(place.kind, place.size))
    for share in _SHARES:
        change = {}
        for kind, step in steps.items():
            size = smallest.get(kind, 0)
            more = abs(step) * round(size * (share - 1) / abs(step))
            if step == 1:  # an odd size
                more += 1 - (size + more) % 2
            if more and size + more >= _LEAST and (step > 0 or more < 0):
                change[kind] = more
        if change:
            yield change


def _on_shapes(program: Program, tree: Any) -> dict[fx.Node, Any]:
    """What nodes of a program are for other inputs, on shapes alone; without those that do not run."""
    inputs = iter(program.bind(*tree))
    values: dict[fx.Node, Any] = {}

    @functools.cache
    def module(path: str) -> nn.Module:
        return clone_module(program.modules[path], lambda _, tensor: meta_like(tensor))

    def value(node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(inputs)
        if node.op == "get_attr":
            name = str(node.target)
            return meta_like(program.tensors[name] if name in program.tensors else program.extras[name])
        if "number" in node.meta:
            return node.meta["number"]
        given = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), given)
        return call_on_shapes(node, args, kwargs, module)

    with torch.no_grad(), Remembered(), OnShapes():
        for node in program.graph.nodes:
            if node.op != "output" and all(part in values for part in node.all_input_nodes):
                with contextlib.suppress(Exception):  # the way that the graph goes may not take these sizes
                    values[node] = value(node)
    return values


Steps = Mapping[str, Sequence[int]]
"""By input what the size of each dimension may differ from that of the example by a multiple of."""


def settle(graph: fx.Graph, seen: Mapping[fx.Node, Any], steps: Steps) -> None:
    """Leave the checks of those decisions alone that may come out otherwise for inputs of other sizes.

    Args:
        graph: changed in place.
        seen: what its nodes are on shapes alone.
        steps: of the sizes of its inputs that may change.
    """
    for node, decision in decisions(graph):
        kept = None if decision.is_idle else _Kept(node, decision, seen, steps).of(node.args[0])
        if isinstance(kept, fx.Node):
            node.args = (kept, *node.args[1:])
            del node.meta["decision"]
        else:
            graph.erase_node(node)


def drop(graph: fx.Graph) -> None:
    """Remove the decisions that are not settled, where nobody looked at other sizes."""
    for node, _ in decisions(graph):
        graph.erase_node(node)


class _Kept:
    """Computes a decision anew, with the example's values of numbers that are the same at all sizes."""

    def __init__(
        self, check: fx.Node, decision: SizeDecision, seen: Mapping[fx.Node, Any], steps: Steps
    ) -> None:
        self.check, self.decision, self.seen, self.steps = check, decision, seen, steps
        number: Any = check.args[0]
        self.order = {part: place for place, part in enumerate(behind(number, seen))}
        self.made: dict[fx.Node, Any] = {}

    def of(self, node: Any) -> Any:
        """The node or the value that stands for a number; None where narrower layers could change it."""
        if node not in self.made:
            if counts_entries(node):
                self.made[node] = self._counted(node)
            else:
                self.made[node] = self._read(node) if self._is_read(node) else self._computed(node)
        return self.made[node]

    def _value(self, node: fx.Node) -> Any:
        return self.decision.values[self.order[node]]

    def _is_read(self, node: fx.Node) -> bool:
        """Whether a number is read off what is none, or is part of a shape."""
        return (
            counts_entries(node)
            or self._is_of_shape(node)
            or any(part not in self.order for part in node.all_input_nodes)
        )

    def _is_of_shape(self, node: fx.Node) -> bool:
        whole = node.args[0] if node.target is operator.getitem else None
        return (
            isinstance(whole, fx.Node) and whole in self.order and isinstance(self._value(whole), torch.Size)
        )

    def _read(self, node: fx.Node) -> Any:
        value, place = self._value(node), self.order[node]
        if self.decision.is_fixed(place):
            return tuple(value) if isinstance(value, tuple) else value
        of_shape = isinstance(value, torch.Size) or size_read(node) is not None or self._is_of_shape(node)
        if of_shape and self.decision.is_free(place):
            return node
        return self._in_part(node, place) if isinstance(value, torch.Size) else None

    def _in_part(self, shape: fx.Node, place: int) -> tuple[Any, ...]:
        """A shape whose sizes follow those of the inputs in part: the others are those of the example."""
        sizes: list[Any] = list(self.decision.values[place])
        with shape.graph.inserting_before(self.check):
            for i, free in enumerate(self.decision.are_free(place)):
                if free:
                    sizes[i] = shape.graph.call_function(operator.getitem, (shape, i))
                    sizes[i].meta = dict(shape.meta)
        return tuple(sizes)

    def _is_whole(self, shape: fx.Node) -> bool:
        """Whether all of a shape follows the inputs, or none of it."""
        return len(set(self.decision.are_free(self.order[shape]))) <= 1

    def _counted(self, node: fx.Node) -> Any:
        """How many entries a tensor has; the sizes that are the same at all are those of the example."""
        whole: Any = node.args[0]
        place = self.order[whole]
        with node.graph.inserting_before(self.check):
            if isinstance(self.seen[whole], torch.Tensor):
                whole = node.graph.call_function(getattr, (whole, "shape"))
                whole.meta = dict(node.meta)
            sizes = self._in_part(whole, place)
            count: Any = math.prod(size for size in sizes if not isinstance(size, fx.Node))
            for size in sizes:
                if isinstance(size, fx.Node):
                    count = node.graph.call_function(operator.mul, (size, count))
                    count.meta = dict(node.meta)
        return count

    def _is_polynomial(self, node: fx.Node) -> bool:
        if self._is_read(node):
            return True
        return node.target in _POLYNOMIALS and all(map(self._is_polynomial, node.all_input_nodes))

    def _is_settled(self, node: fx.Node) -> bool:
        """Whether a number is the same at all sizes: a polynomial that was so at those seen, or what compares
        two that are equally far from each other: ``n + 1 > n``, or what is left of dividing what changes in
        steps of the divisor.
        """
        if node.target in COMPARISONS:
            if None in node.args:
                return True
            one, other = map(self._at_all_sizes, node.args)
            return bool(one and other) and len({_apart(*pair) for pair in zip(one, other, strict=True)}) == 1
        if node.target is operator.mod:
            divisor = node.args[1]
            return isinstance(divisor, int) and divisor > 0 and self._step(node.args[0]) % divisor == 0
        return self._is_polynomial(node) and self.decision.is_fixed(self.order[node])

    def _at_all_sizes(self, given: Any) -> list[tuple[Any, ...]]:
        """What a number is at each of the sizes that were seen, or the sizes of a shape; none in doubt."""
        seen = (self.decision.values, *self.decision.others, *self.decision.elsewhere)
        if isinstance(given, (tuple, list)):
            parts = [self._at_all_sizes(part) for part in given]
            return [tuple(one for whole in row for one in whole) for row in zip(*parts, strict=False)]
        if isinstance(given, fx.Node):
            known = self._is_polynomial(given) and isinstance(self._value(given), (*_NUMBERS, torch.Size))
            return [_parts(values[self.order[given]]) for values in seen] if known else []
        return [(given,)] * len(seen) if isinstance(given, (int, float)) else []

    def _step(self, number: Any) -> int:
        """What an integer differs by a multiple of from size to size: 0 where it is the same at all sizes, 1
        where nothing is known.
        """
        if not isinstance(number, fx.Node):
            return 0 if isinstance(number, int) else 1
        if self._is_read(number):
            return 0 if self.decision.is_fixed(self.order[number]) else self._step_read(number)
        parts: Any = number.args
        steps = [self._step(part) for part in parts]
        if number.target in (operator.add, operator.sub, operator.neg):
            return math.gcd(*steps)
        if number.target is operator.mul and 1 not in steps:
            one, other = (self._value(part) if isinstance(part, fx.Node) else part for part in parts)
            return math.gcd(steps[0] * other, steps[1] * one, steps[0] * steps[1])
        return 1

    def _step_read(self, node: fx.Node) -> int:
        """As :meth:`_step`, of a number that is read off a tensor."""
        tensor, keys = size_read(node) or (node, [])
        steps: Any = self.steps.get(str(tensor.target)) if tensor.op == "placeholder" else None
        for key in keys:
            steps = steps[key] if steps is not None and isinstance(key, (int, slice)) else None
        return steps if isinstance(steps, int) else 1

    def _computed(self, node: fx.Node) -> Any:
        if self._is_settled(node):
            return self._value(node)
        if "kept shape" in node.meta and not all(map(self._is_whole, node.all_input_nodes)):
            return None
        parts = {part: self.of(part) for part in node.all_input_nodes}
        if any(new is None for new in parts.values()):
            return None
        if not any(isinstance(new, fx.Node) for whole in parts.values() for new in _parts(whole)):
            return self._value(node)
        if all(new is part for part, new in parts.items()):
            return node
        with node.graph.inserting_before(self.check):
            args: Any = map_arg(node.args, parts.__getitem__)
            kwargs: Any = map_arg(node.kwargs, parts.__getitem__)
            new = node.graph.create_node(node.op, node.target, args, kwargs)
        new.meta = dict(node.meta)
        return new


__all__ = [
    "COMPARISONS",
    "ask_for_one",
    "decisions",
    "drop",
    "look_elsewhere",
    "meet",
    "note",
    "numbers",
    "questions",
    "settle",
]
