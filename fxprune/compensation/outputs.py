"""What a network puts out, compared with what another does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..program import Program


def private(program: Program) -> Program:
    """The program with buffers of its own: a network may write into them."""
    made: dict[int, torch.Tensor] = {}
    for tensor in program.tensors.values():
        if not isinstance(tensor, nn.Parameter):
            made.setdefault(id(tensor), tensor.clone())
    tensors = {name: made.get(id(tensor), tensor) for name, tensor in program.tensors.items()}
    extras = {name: tensor.clone() for name, tensor in program.extras.items()}
    return replace(program, tensors=tensors, extras=extras)


_T = TypeVar("_T")


def own(values: _T) -> _T:
    """A tree with copies of its tensors: a network may write into what it is given."""
    copies: _T = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, values)
    return copies


_LEAST_LEFT = 1e-3
"""Outputs that have nothing to do with the original's differ from them by about their variance, and by no
more if more goes. So what is lost counts as a share of what is left, which is taken to be this at least."""


_AT_ONCE = 1 << 22
"""Numbers that are compared at once: outputs of a language model are large, and in double twice as large."""


class Difference:
    """How far a network's outputs are from those that are wanted, added up over batches.

    Args:
        classes: for those tensors among the outputs of a batch that are scores of classes, by their place,
            the dimension of the classes.
    """

    def __init__(self, classes: Mapping[int, int] | None = None) -> None:
        self.classes = classes or {}
        self._different, self._spread = 0.0, 0.0
        self._divergences: list[float] = []

    def add(self, wanted: Any, got: Any) -> None:
        """Add the outputs for one batch; those of other shapes, and of no real numbers, do not count."""
        leaves = itertools.zip_longest(pytree.tree_leaves(wanted), pytree.tree_leaves(got))
        for a, b in leaves:
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                continue
            if a.shape == b.shape and a.is_floating_point() and a.numel():
                mean = a.mean(dtype=torch.float64)
                for x, y in _parts(a.reshape(-1), b.reshape(-1)):
                    self._different += float((x.double() - y).square().sum()) / a.numel()
                    self._spread += float((x.double() - mean).square().sum()) / a.numel()
        for place, (a, b) in enumerate(zip(tensors(wanted), tensors(got), strict=False)):
            if place in self.classes and a.shape == b.shape and a.is_floating_point() and a.numel():
                a, b = (x.movedim(self.classes[place], -1).flatten(0, -2) for x in (a, b))
                found = 0.0
                for x, y in _parts(a, b):
                    p, q = x.float().log_softmax(1), y.float().log_softmax(1)
                    found += float((p.exp() * (p - q)).sum())
                self._divergences.append(found / len(a))

    def divergence(self) -> float:
        """Mean square difference of the outputs, as a share of the variance of those that are wanted."""
        return self._different / self._spread if self._spread else self._different

    def lost(self) -> float:
        """What is lost of the outputs; zero for equal ones, and losses of several changes add up roughly.

        It is the square of the difference as a share of what is left of the variance. Where outputs are the
        scores of classes, the divergence of Kullback and Leibler between the probabilities that they stand
        for is added: its unit, nats, is that of the cross entropy.
        """
        found = self.divergence()
        found /= max(1 - found, _LEAST_LEFT)
        return found + sum(self._divergences) / max(len(self._divergences), 1)


def _parts(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of two tensors at a time."""
    rows = max(1, _AT_ONCE // max(a[0].numel(), 1))
    return zip(a.split(rows), b.split(rows), strict=True)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
