"""Which sizes of the inputs a graph leaves free: the model is traced again at others, and compared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .. import sizes
from ..nodes import describe_source
from ..program import Program
from ..sizes import BATCH, FAR, LAST, LENGTH, NEAR, Change, InputSize, Place
from .alike import compare
from .arguments import Arguments
from .size_decisions import ask_for_one, decisions, look_elsewhere, meet, questions, settle

Trace = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Program]
_LONGEST = 200
"""Characters of a reason."""


def look(
    trace: Trace, model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, tuple[Change, ...]]:
    """Trace again at other sizes.

    Returns:
        The program, which checks the sizes for which the model's code does something else, or does not run.
        Where it computes from its inputs' sizes what it had kept from an earlier call, it is the one
        that does. And what may change together.
    """
    tree = args, kwargs
    found = sizes.places(tree)
    kinds = {place.kind for place in found}
    known: dict[str, int] = {}
    free: list[Change] = []
    because: dict[str, str] = {}
    fixed: list[tuple[Change, str]] = []  # of which at least one kind may not change so, and why
    seen = _Seen(trace, model, program)
    together = [*sizes.changes(tree)]
    alone = [{kind: how} for kind in sorted(kinds - {BATCH}) for how in (NEAR, FAR)]
    alone += [{kind: how} for change in together for kind, how in change.items() if kind != BATCH]
    for change in [*together, *alone]:
        if not sizes.asks_more(change, known, found):
            continue
        said = [reason for tried, reason in fixed if _is_to_blame(change, tried, known)]
        if said:
            because |= dict.fromkeys(change, said[-1])
            continue
        reason = seen.differs(*sizes.resized(tree, change))
        if reason:
            fixed.append((change, reason))
        else:
            free.append(change)
            known = {**change, **known}
            if not _asked(found, known):
                break
        for kind in change.keys() - known.keys():
            because[kind] = reason
    if seen.apart and not free and seen.differs(args, kwargs):
        return _alone(seen.program), ()  # no two traces are alike
    for finer in sizes.finer(tree, known):
        fine_args, fine_kwargs = sizes.resized(tree, finer)
        if not seen.differs(fine_args, fine_kwargs, retrace=seen.made_others):
            free.append(finer)
            known |= finer
            break
    larger = sizes.larger(known)
    if larger and not seen.differs(*sizes.resized(tree, larger)):
        free.append(larger)
        known |= {kind: -known[kind] for kind in larger}
    known = _at_once(seen, tree, free, known)
    several = BATCH in known and any(p.size > 1 for p in sizes.places(tree) if p.kind == BATCH)
    if several and any(decision.is_open for _, decision in decisions(seen.program.graph)):
        one_args, one_kwargs = sizes.resized(tree, {BATCH: sizes.ONE})
        seen.differs(one_args, one_kwargs, fewer=True)  # what makes no difference there decides nothing
    given = Arguments.of(model, args, kwargs).all()
    if LENGTH in known:
        _at_length_one(seen, tree, given)
    program = seen.program
    look_elsewhere(program, tree, _multiples(tree, known))
    settle(program.graph, program.seen, _by_dimension(given, known))
    bounds = steps(found, known)
    if bounds:
        pin(program.graph, given, bounds, because)
    return _alone(program), tuple(free)


def _at_once(seen: _Seen, tree: Any, free: list[Change], known: dict[str, int]) -> dict[str, int]:
    """Of what is ``known`` to be free what is so at once, which comes first in ``free`` then.

    Couplings are looked at where all that is free is different.
    """
    if not known:
        return known
    whole = next((change for change in free if known.keys() <= change.keys()), None)
    if whole is None:
        whole = max(free, key=len) if seen.differs(*sizes.resized(tree, known)) else known
    free[:] = [whole, *(change for change in free if change != whole)]
    return {kind: how for kind, how in known.items() if kind in whole}


def _at_length_one(seen: _Seen, tree: Any, given: dict[str, Any]) -> None:
    """Have the program take inputs of length one, if what decides by them makes no difference there."""
    graph = seen.program.graph
    lengths = [place for place in sizes.places(given) if place.kind == LENGTH]
    found = ask_for_one(graph, {place.size for place in lengths})
    if not found or seen.is_otherwise(*sizes.resized(tree, {LENGTH: sizes.ONE})):
        return
    lengths += _ones(given)
    if len(lengths) == 1:
        for check in found:
            graph.erase_node(check)
        return
    read = tuple(sizes.reads(graph, given, lengths))
    for check in found:  # to one query it makes a difference how it attends to many keys
        check.args = (*check.args, read)


def _ones(given: dict[str, Any]) -> list[Place]:
    """Sizes of one in the example that are not the batch: lengths, maybe, of which nobody knows."""
    known = {(place.leaf, place.dim) for place in sizes.places(given)}
    return [
        Place(number, dim, LENGTH, size, leaf.dim())
        for number, leaf in enumerate(pytree.tree_leaves(given))
        if isinstance(leaf, torch.Tensor)
        for dim, size in enumerate(leaf.shape)
        if size == 1 and (number, dim) not in known
    ]


def _alone(program: Program) -> Program:
    """The program without what its tracer keeps."""
    return replace(program, seen={}, again=None, retraced=None)


def _is_to_blame(change: Change, tried: Change, known: Change) -> bool:
    """Whether ``change`` is what made a difference in ``tried``, where all else is known to be free."""
    return change.items() <= tried.items() and tried.items() - change.items() <= known.items()


class _Seen:
    """A program, and traces of its model at other sizes.

    Attributes:
        program: the program; the one that computes from its inputs' sizes what an earlier call kept.
        apart: whether the model's code did something else at some size.
        made_others: whether it made, at some size, other calls than were recorded, which come to the same.
    """

    def __init__(self, trace: Trace, model: nn.Module, program: Program) -> None:
        self._trace, self._model = trace, model
        self.program = program
        self.apart = self.made_others = False

    def differs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], fewer: bool = False, retrace: bool = True
    ) -> str:
        """Why the program is not that of the model for these inputs; empty where it is.

        Args:
            args: the inputs.
            kwargs: the same by name.
            fewer: whether the program may do more, as what expands a batch that is larger than one.
            retrace: whether calls other than those that were recorded are looked at, too: they may come to
                the same. That takes several times as long.
        """
        if self.program.again is not None and self.program.again(args, kwargs):
            return ""
        if not retrace:
            return "the model's code does something else at another"
        try:
            retraced = self.program.retraced
            other = retraced(args, kwargs) if retraced else self._trace(self._model, args, kwargs)
        except Exception as error:  # noqa: BLE001  the model takes no such size, or is not captured there
            return f"the model does not run at another ({_short(error)})"
        found = compare(other, self.program) if fewer else compare(self.program, other)
        node = meet(self.program.graph, other.graph) if found.same else found.node
        if not found.same or node is not None:
            self.apart = True
            where = describe_source(node)
            return f"the model's code does something else at another{f' ({where})' if where else ''}"
        self.made_others = True
        if found.computed and not fewer:
            self.program = other
        return ""

    def is_otherwise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model gives something else for inputs of length one, or asks more of sizes."""
        try:
            other = self.program.retraced(args, kwargs) if self.program.retraced else None
        except Exception:  # noqa: BLE001  the model takes no such length, or is not captured there
            return True
        if other is None:
            return True
        asks_more = questions(other.graph) - questions(self.program.graph)
        return bool(asks_more) or not compare(self.program, other, sampled=True).same


def steps(found: Collection[Place], known: Change) -> dict[str, int]:
    """By how much sizes may differ from those of the example, by kind, where that is not by any number.

    Args:
        found: the sizes that there are.
        known: changes that were seen to make no difference.

    Returns:
        By kind 0 where none may, below 0 where sizes may be smaller alone.
    """
    fixed = dict.fromkeys(_asked(found, known), 0)
    return {kind: how for kind, how in known.items() if how != NEAR} | fixed


def _asked(found: Collection[Place], known: Change) -> set[str]:
    """The kinds of sizes of which nothing is ``known``; a last dimension may always be features."""
    return {place.kind for place in found} - known.keys() - {LAST} - sizes.no_lengths(found, known)


def _multiples(tree: Any, known: Change) -> dict[str, int]:
    """By kind that is free what its sizes differ by a multiple of; below 0, what they may be smaller by."""
    found = {place.kind: place for place in sizes.places(tree) if place.kind in known}
    return {kind: sizes.step(place, known[kind]) for kind, place in found.items()}


def _by_dimension(given: dict[str, Any], known: Change) -> dict[str, list[int]]:
    """By input what the size of each dimension may differ by a multiple of, where ``known`` is free."""
    names = sizes.named(given)
    found: dict[str, list[int]] = {}
    for place in sizes.places(given):
        name, keys = names[place.leaf]
        if not keys:
            of_dims = found.setdefault(name, [1] * place.rank)
            of_dims[place.dim] = abs(sizes.step(place, known.get(place.kind, NEAR)))
    return found


def pin(graph: fx.Graph, given: dict[str, Any], bounds: dict[str, int], because: dict[str, str]) -> None:
    """Have ``graph`` refuse other sizes of these kinds.

    Args:
        graph: changed in place.
        given: the inputs, by name.
        bounds: by kind 0, or by what sizes may differ; below 0, what they may be smaller by.
        because: by kind why.
    """
    names = sizes.named(given)
    axes = []
    batch = False
    for place in sizes.places(given):
        if place.kind not in bounds or (place.kind == BATCH and batch):
            continue
        batch |= place.kind == BATCH  # one input stands for all
        how = bounds[place.kind]
        step = abs(sizes.step(place, how)) if how else 0
        name, keys = names[place.leaf]
        why = because.get(place.kind, "")
        axes.append((InputSize(name, place.dim, place.name, place.size, step, why, how < 0), keys))
    sizes.guard(graph, axes)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST]


__all__ = ["look", "pin", "steps"]
