"""Which sizes of the inputs may change, found out on shapes alone.

A graph is made from one example. :func:`resized` gives the same inputs at other sizes: another batch, another
height, width or length. Where the model's own code does something else there, the graph is right for the
sizes of the example alone, and checks them when it runs; where it does the same, the coupling is looked at
again at the other sizes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .guards import check_decision, check_size

BATCH, LENGTH, FRAMES, LAST, DEPTH, IMAGE = "batch", "length", "frames", "last length", "depth", "image"
"""Kinds of sizes, each of which changes as a whole: the batch; the second dimension of sequences; that of
features beside whole numbers of other lengths (speech and what is said in it), which may be channels; the
last one of sequences with channels first, and of waveforms; what comes before height and width in volumes,
and may be channels in videos; height and width."""
NEAR, FAR, TWICE = 1, 32, 64
"""By how much sizes change: by a small odd number, another one for each extent; or by 32, as networks ask for
that halve an image five times; or to twice the size, which windows and chunks of any size allow, and is what
:data:`FAR` means where a size is no multiple of 32. Where the example is as large as a network takes, lengths
change by minus :data:`NEAR`, and images by minus :data:`FAR`, or to half the size."""
ONE = 0
"""How a batch or a length changes that becomes 1, which code often asks for."""
FINEST = 16
"""Into how many equal parts a step of 32, or of the whole size, that a network takes is divided at most."""

Change = Mapping[str, int]
"""Kinds of sizes, each with :data:`NEAR`, :data:`FAR`, :data:`TWICE`, :data:`ONE`, or by how much it is
larger; below 0, smaller."""


@dataclass(frozen=True)
class Trial:
    """The example inputs at other sizes.

    Attributes:
        change: what is different.
        inputs: meta tensors and values for the graph's placeholders, in order.
    """

    change: Change
    inputs: list[Any]


@dataclass(frozen=True)
class InputSize:
    """One dimension of an input whose size may be another one, or is pinned.

    Attributes:
        input: the input, by its name in the signature; of one inside of a container with its place there.
        dim: the dimension.
        name: what it is taken for: batch, length, depth, height or width.
        example: its size in the example.
        step: sizes that differ from it by a multiple of this are right: 1 where any is, 0 where only
            ``example`` is.
        because: why no other size is, or empty.
        at_most: whether no size above ``example`` is right.
    """

    input: str
    dim: int
    name: str
    example: int
    step: int
    because: str = ""
    at_most: bool = False

    @property
    def said(self) -> str:
        """``any``, ``up to 512``, ``multiples of 32``, or ``pinned at 224, because ...``."""
        if self.step and self.at_most:
            multiples = f"multiples of {self.step} " if self.step > 1 else ""
            return f"{multiples}up to {self.example}"
        if self.step == 1:
            return "any"
        because = f", because {self.because}" if self.because else ""
        if self.step:
            multiples = f"multiples of {self.step}"
            return (
                multiples if not self.example % self.step else f"{self.example} and {multiples} more or less"
            )
        return f"pinned at {self.example}{because}"


@dataclass(frozen=True)
class InputSizes:
    """For which sizes of the inputs a graph is right. ``str()`` of it is meant to be read:

        batch: any; height, width: multiples of 32; length: any

    Attributes:
        axes: the dimensions of the inputs that stand for a batch, a length, a height or a width.
        note: what is to be said beside them, or empty.
    """

    axes: tuple[InputSize, ...]
    note: str = ""

    @property
    def pinned(self) -> tuple[InputSize, ...]:
        """Those that must be as in the example."""
        return tuple(axis for axis in self.axes if not axis.step)

    @property
    def free(self) -> bool:
        """Whether any of these sizes may be another."""
        return all(axis.step == 1 and not axis.at_most for axis in self.axes)

    def __str__(self) -> str:
        by_name: dict[str, dict[str, list[str]]] = {}
        for axis in self.axes:
            by_name.setdefault(axis.name, {}).setdefault(axis.said, []).append(axis.input)
        entries: dict[str, list[str]] = {}
        for name, said in by_name.items():
            for what, inputs in said.items():
                whose = f" of {', '.join(dict.fromkeys(inputs))}" if len(said) > 1 else ""
                entries.setdefault(what, []).append(f"{name}{whose}")
        parts = [f"{', '.join(names)}: {what}" for what, names in entries.items()]
        return "; ".join([*parts, *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Place:
    """A dimension of a tensor among the inputs.

    Attributes:
        leaf: number of the tensor among the leaves of the inputs.
        dim: the dimension.
        kind: what changes with it.
        size: in the example.
        rank: how many dimensions the tensor has.
    """

    leaf: int
    dim: int
    kind: str
    size: int
    rank: int

    @property
    def name(self) -> str:
        """What it is, for people."""
        if self.kind == IMAGE:
            return ("height", "width")[self.dim - self.rank]
        return {LAST: LENGTH}.get(self.kind, self.kind)


def places(tree: Any) -> list[Place]:
    """The sizes in ``tree`` that may change.

    The batch is the first dimension of every tensor that has as many entries there as the first one. What
    else may change is height and width of images and volumes, and the length of sequences: the second
    dimension of whole numbers, and of floating-point numbers in three dimensions; or the last dimension of
    floating-point numbers. What is as long as a sequence changes with it: a mask, or what is given for each
    edge of a graph. Floating-point numbers that are as long as no whole numbers have a length of their own.
    One is no length.
    """
    tensors = [
        (number, leaf)
        for number, leaf in enumerate(pytree.tree_leaves(tree))
        if isinstance(leaf, torch.Tensor) and leaf.dim()
    ]
    if not tensors:
        return []
    batch = tensors[0][1].shape[0]
    sequences = [tensor for _, tensor in tensors if _is_sequence(tensor) and tensor.shape[1] != 1]
    words = {tensor.shape[1] for tensor in sequences if not tensor.is_floating_point()}
    lengths = {tensor.shape[1]: FRAMES if words else LENGTH for tensor in sequences}
    lengths |= dict.fromkeys(words, LENGTH)
    found = []
    for number, tensor in tensors:
        for dim, size in enumerate(tensor.shape):
            kind = None
            if dim == 0:
                kind = BATCH if size == batch else lengths.get(size)
            elif size != 1 and tensor.dim() > 3 and dim > 1:
                kind = {tensor.dim() - 3: DEPTH, tensor.dim() - 2: IMAGE, tensor.dim() - 1: IMAGE}.get(dim)
                kind = kind and lengths.get(size, kind)
            elif size != 1 and ((dim == 1 and _is_sequence(tensor)) or tensor.is_floating_point()):
                kind = lengths.get(size, LAST)
            if kind is not None:
                found.append(Place(number, dim, kind, size, tensor.dim()))
    return found


def _is_sequence(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point())


def no_lengths(found: Iterable[Place], known: Collection[str]) -> set[str]:
    """The kinds that cannot be a length as well, where ``known`` kinds are free.

    Of features either the second dimension is a length or the last one, and the other holds channels. The
    last dimension of two is that of a waveform, whose length rules out nothing.
    """
    found = [*found]
    if all(place.rank == 2 for place in found if place.kind == LAST):
        return set()
    second = FRAMES if any(place.kind == FRAMES for place in found) else LENGTH
    return ({LAST} if second in known else set()) | ({second} if LAST in known else set())


def changed_size(place: Place, how: int) -> int:
    """Another size in its place. Patches and strides of up to 32 must tell it from the one in the example."""
    if how == ONE:
        return 1
    if how == NEAR and place.kind in (DEPTH, IMAGE, LAST):
        return place.size + 32 * (place.dim - 1 or 1) + 1
    if how == TWICE or (how == FAR and (place.kind == BATCH or place.size % FAR)):
        return 2 * place.size
    if how == -FAR and place.size <= FAR:
        return place.size // 2
    return place.size + how


def step(place: Place, how: int) -> int:
    """What a size may differ by a multiple of, where it may change so; below 0, what it may be smaller by."""
    return 1 if how == NEAR else changed_size(place, how) - place.size


def resized(tree: Any, change: Change) -> Any:
    """The same tree at other sizes, entries repeated; equal lengths stay equal."""
    leaves, spec = pytree.tree_flatten(tree)
    for place in places(tree):
        if place.kind in change:
            leaf, size = leaves[place.leaf], changed_size(place, change[place.kind])
            if leaf.is_meta:  # has no entries to repeat
                shape = (*leaf.shape[: place.dim], size, *leaf.shape[place.dim + 1 :])
                leaves[place.leaf] = torch.empty(shape, dtype=leaf.dtype, device="meta")
                continue
            index = torch.arange(size, device=leaf.device) % max(place.size, 1)
            leaves[place.leaf] = leaf.index_select(place.dim, index)
    return pytree.tree_unflatten(leaves, spec)


def changes(tree: Any) -> Iterator[Change]:
    """What may change at once, as much as can be first; what may be smaller, where no more can be."""
    found = places(tree)
    kinds = {place.kind for place in found}
    tight = {place.kind for place in found if place.size < 3}  # one is no length
    rest = [kind for kind in (LENGTH, FRAMES, DEPTH, IMAGE) if kind in kinds]
    lengths = [kind for kind in (LENGTH, FRAMES) if kind in kinds]
    first = [BATCH] if BATCH in kinds else []
    twice = {place.kind: (TWICE,) for place in found if not place.size % FAR}  # else FAR is twice
    sets = [dict.fromkeys(rest, NEAR)]
    if IMAGE in kinds:
        hows = FAR, *twice.get(IMAGE, ())
        sets += [{kind: NEAR if kind in lengths else how for kind in rest} for how in hows]
    if LAST in kinds:
        no = no_lengths(found, {LAST})
        with_last = {LAST: NEAR, **dict.fromkeys((kind for kind in rest if kind not in no), NEAR)}
        # A waveform may be longer; where it may not, the first layer says so.
        sets.insert(len(sets) if no and rest else 0, with_last)
    for shorter in lengths:
        if shorter not in tight:
            sets += [{**change, shorter: -NEAR} for change in sets if shorter in change]
    if len(rest) > 1:
        for kind in rest:
            further = (FAR, *twice.get(kind, ())) if kind not in lengths else ()
            sets += [{kind: how} for how in (NEAR, *further)]
    for kind in (*lengths, *kinds & {LAST}):
        sets += [{kind: how} for how in (FAR, *twice.get(kind, ()))]
    if IMAGE in kinds and not {IMAGE, DEPTH} & tight:
        sets.append({kind: -FAR for kind in rest if kind not in lengths})
    sets.append({})
    for change in sets:
        if first or change:
            yield {**dict.fromkeys(first, NEAR), **change}
    if first:
        yield {BATCH: FAR}


def finer(tree: Any, known: Change) -> Iterator[Change]:
    """Equal parts of the steps by which ``known`` changes images and lengths, the smallest first."""
    found = [place for place in places(tree) if place.kind != BATCH and abs(known.get(place.kind, 0)) == FAR]
    whole = math.gcd(*(changed_size(place, known[place.kind]) - place.size for place in found))
    for parts in range(FINEST, 1, -1):
        step = whole // parts
        if not whole % parts and step > 1:
            yield {place.kind: step if known[place.kind] > 0 else -step for place in found}


def larger(known: Change) -> Change:
    """Larger images by three of the steps of :func:`finer`, where they were seen to be smaller alone.

    The few larger sizes that were tried may be ones of which the code asks: the one that it was built for.
    """
    return {kind: 3 * -how for kind, how in known.items() if kind in (DEPTH, IMAGE) and -FAR < how < 0}


def asks_more(change: Change, known: Change, found: Iterable[Place]) -> bool:
    """Whether a change is of more than what is ``known`` to be free, and of one length of each tensor."""
    return bool(change.keys() - known.keys()) and not change.keys() & no_lengths(found, known)


def named(inputs: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    """For each leaf of the inputs its name, and the keys that lead to it inside of the input."""
    found = []
    for name, value in inputs.items():
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            keys = tuple(getattr(key, "idx", getattr(key, "key", None)) for key in path)
            found.append((".".join(map(str, (name, *keys))), keys))
    return found


def guard(graph: fx.Graph, axes: Iterable[tuple[InputSize, tuple[Any, ...]]]) -> None:
    """Have ``graph`` refuse other sizes than these.

    Args:
        graph: changed in place.
        axes: sizes, each with the keys that lead to the tensor inside of the input.
    """
    with graph.inserting_before(_behind_inputs(graph)):
        for axis, keys in axes:
            if axis.step == 1 and not axis.at_most:
                continue
            node = _leaf(graph, axis.input, keys)
            if node is None:
                continue
            more = (True,) if axis.at_most else ()
            given = (node, axis.input, axis.dim, axis.example, axis.step, axis.name, axis.because, *more)
            graph.call_function(check_size, given)


def reads(graph: fx.Graph, inputs: Mapping[str, Any], found: Iterable[Place]) -> list[fx.Node]:
    """New nodes of ``graph`` that read sizes of its inputs.

    Args:
        graph: changed in place.
        inputs: those of the example, by name.
        found: which sizes of them.
    """
    names = named(inputs)
    with graph.inserting_before(_behind_inputs(graph)):
        leaves = [(_leaf(graph, *names[place.leaf]), place.dim) for place in found]
        return [graph.call_method("size", (node, dim)) for node, dim in leaves if node is not None]


def _behind_inputs(graph: fx.Graph) -> fx.Node:
    """The first node behind all inputs; checks of some may stand between them."""
    node: fx.Node = [*graph.find_nodes(op="placeholder")][-1].next
    return node


def _leaf(graph: fx.Graph, name: str, keys: tuple[Any, ...]) -> fx.Node | None:
    """The node of an input, or a new one that takes a tensor out of it; None where the graph has no such."""
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    node = inputs.get(name.partition(".")[0])
    for key in keys if node is not None else ():
        node = graph.call_function(operator.getitem, (node, key))
    return node


def guarded(graph: fx.Graph) -> list[InputSize]:
    """The sizes that ``graph`` checks."""
    found = []
    for node in graph.nodes:
        if node.target is check_size:
            _, name, dim, example, step, role, *more = node.args
            found.append(InputSize(name, dim, role, example, step, *more))
    return found


def decided(graph: fx.Graph, among: Collection[fx.Node] | None = None) -> list[str]:
    """The lines of the model that decide by sizes: ``graph`` checks that they come out as for the example.

    Args:
        graph: the graph.
        among: nodes of checks that are looked at; None for all.
    """
    nodes = graph.find_nodes(op="call_function", target=check_decision)
    return list(dict.fromkeys(node.args[2] for node in nodes if among is None or node in among))


__all__ = ["BATCH", "DEPTH", "FAR", "FRAMES", "IMAGE", "LAST", "LENGTH", "NEAR", "ONE", "TWICE", "Change",
           "InputSize", "InputSizes", "Place", "Trial", "asks_more", "changed_size", "changes", "decided",
           "finer", "guard", "guarded", "larger", "named", "no_lengths", "places", "reads", "resized",
           "step"]  # fmt: skip
