"""Units that are coupled otherwise where the inputs have other sizes: they stay.

Which entries of weights meet may depend on a height, a width or a length: where ``(N, HW, C)`` is reshaped to
``(N, C, H, W)``, it does. What is removed for the example's sizes would be wrong at any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..program import Program
from .groups import Mask
from .interpreter import Run, interpret
from .operator_calls import OperatorCalls, UnlikeError
from .units import FIXED, Event, Ids, Label

Shape = tuple[int, ...]
REASON = "couples differently at other sizes of the inputs"


def run_at(program: Program, inputs: list[Any], calls: OperatorCalls, run: Run) -> Run:
    """The run of ``program`` at other sizes: without labels where its calls couple as ``calls`` do, those of
    ``run``.

    Raises:
        FxpruneError: if the program takes no such sizes.
    """
    try:
        return interpret(program, inputs, labels=False, follow=calls.follow(run.coupler))
    except UnlikeError:
        return interpret(program, inputs)


def differing(run: Run, other: Run) -> Iterator[Event]:
    """An event for each label of ``run`` with units whose couplings are others in ``other``.

    The second run is of the same graph, with other sizes of the inputs; one without labels has no others.
    """
    pairs = [(name, dim) for name, state in run.states.items() for dim in range(len(state.shape))]
    labels = {(name, dim): (run.states[name].axes[dim], _label(other, name, dim)) for name, dim in pairs}
    both = {place: found for place, found in labels.items() if _alike(*found)}
    if not both:
        return
    mine = [run.coupler.units.find(a.ids.reshape(-1)) for a, _ in both.values() if a is not None]
    theirs = [other.coupler.units.find(b.ids.reshape(-1)) for _, b in both.values() if b is not None]
    a, b = np.concatenate(mine), np.concatenate(theirs)
    stays = _frozen(run, a)
    freed = _frozen(other, b) & ~stays  # there they stay, here they would go
    apart = _twice(a, b) | freed
    for above, there in zip(run.coupler.units.parents(a), other.coupler.units.parents(b), strict=True):
        apart |= ((above < 0) != (there < 0)) | (_twice(above + 1, there + 1) & (above >= 0))
    bad = np.zeros(run.coupler.units.count, dtype=bool)
    bad[a[apart & ~stays]] = True
    for place, (label, there) in labels.items():
        if label is None or (label.ids == FIXED).all():
            continue
        node = run.states[place[0]].node
        if place not in both:
            if there is not None:
                yield Event(label.ids.reshape(-1), label.axis, node, REASON)
            continue
        ids = label.ids.reshape(-1)
        if bad[run.coupler.units.find(ids)].any():  # how much of the axis, a third size would say
            yield Event(ids, label.axis, node, REASON)


def _twice(a: Ids, b: Ids) -> Mask:
    """For each pair whether one of the two has another partner elsewhere."""
    return _has_two(a, b) | _has_two(b, a)


def _has_two(a: Ids, b: Ids) -> Mask:
    """For each pair ``(a, b)`` whether there is another one of the same ``a`` with another ``b``."""
    size = int(a.max(initial=0)) + 1
    one = np.zeros(size, dtype=np.int64)
    one[a] = b  # of several the last
    two = np.zeros(size, dtype=bool)
    two[a[one[a] != b]] = True
    found: Mask = two[a]
    return found


def same_batch(run: Run, inputs: list[Any], other: Run, others: list[Any]) -> bool:
    """Whether outputs that have the batch of the inputs as first dimension have it at other sizes, too.

    A batch of one that was squeezed away may stand in any place there. A first dimension that stays what it
    is may be equal to the batch by chance, as the two directions of a recurrent layer are to a batch of two.
    """
    mine, theirs = _batch(inputs), _batch(others)
    pairs: list[tuple[Shape, Shape | None]] = [
        (tuple(value.shape), tuple(there.shape) if there is not None else None)
        for region, outputs in run.outputs.items()
        for leaf, value in outputs.items()
        for there in [other.outputs.get(region, {}).get(leaf)]
    ]
    moves = any(here[:1] == (mine,) and there is not None and there[:1] == (theirs,) for here, there in pairs)

    def alike(here: Shape, there: Shape | None) -> bool:
        if there is None:
            return False
        if len(there) != len(here):
            return mine == 1 and len(there) == len(here) + 1 and theirs in there
        if here[:1] != (mine,) or there[:1] == (theirs,):
            return True
        return there[:1] == (mine,) and (mine == 1 or moves or theirs in there)

    return all(alike(here, there) for here, there in pairs)


def _batch(inputs: list[Any]) -> int | None:
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next((tensor.shape[0] for tensor in tensors), None)


def _label(run: Run, name: str, dim: int) -> Label | None:
    state = run.states.get(name)
    return state.axes[dim] if state is not None and dim < len(state.axes) else None


def _alike(a: Label | None, b: Label | None) -> bool:
    return a is not None and b is not None and a.ids.shape == b.ids.shape and a.over == b.over


def _frozen(run: Run, roots: Ids) -> Mask:
    """For each of these units whether it stays."""
    gone = np.zeros(run.coupler.units.count, dtype=bool)
    gone[FIXED] = True
    for event in run.coupler.frozen:
        gone[run.coupler.units.find(event.ids.reshape(-1))] = True
    return gone[roots]


__all__ = ["differing", "same_batch"]
