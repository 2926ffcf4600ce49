"""What a network puts out, compared with what another does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
