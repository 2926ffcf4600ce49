"""What a network puts out, compared with what another does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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


def lost(wanted: Sequence[Any], got: Sequence[Any], classes: Mapping[int, int]) -> float:
    """What is lost of the outputs, so that losses of several changes add up roughly; zero for equal outputs.

    It is the square of the difference as a share of what is left of the variance. Where outputs are the
    scores of classes, the divergence of Kullback and Leibler between the probabilities that they stand for
    is added: its unit, nats, is that of the cross entropy.

    Args:
        wanted: outputs for each batch.
        got: the same of the other network.
        classes: for those tensors among the outputs of a batch that are scores, by their place, the dimension
            of the classes.
    """
    found = divergence(wanted, got)
    found /= max(1 - found, _LEAST_LEFT)
    divergences = []
    for outputs in zip(wanted, got, strict=True):
        leaves = zip(*(tensors(tree) for tree in outputs), strict=False)
        for place, (a, b) in enumerate(leaves):
            if place in classes and a.shape == b.shape and a.is_floating_point():
                p, q = (x.float().log_softmax(classes[place]) for x in (a, b))
                divergences.append(float((p.exp() * (p - q)).sum(classes[place]).mean()))
    return found + sum(divergences) / max(len(divergences), 1)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def divergence(wanted: Sequence[Any], got: Sequence[Any]) -> float:
    """Mean square difference of outputs, as a share of the variance of those that are wanted.

    Outputs of other shapes than wanted, and of no real numbers, do not count.
    """
    different, spread = 0.0, 0.0
    leaves = (pytree.tree_leaves(list(outputs)) for outputs in (wanted, got))
    for a, b in itertools.zip_longest(*leaves):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        if a.shape == b.shape and a.is_floating_point():
            a, b = a.double(), b.double()
            different += float((a - b).square().mean())
            spread += float((a - a.mean()).square().mean())
    return different / spread if spread else different
