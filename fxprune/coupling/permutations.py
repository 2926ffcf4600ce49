"""Chains of views and transpositions that, together, only permute one dimension: channel shuffles.

Step by step, a shuffle written as view, transpose, view would tie channels across rows. No tensor is moved to
find out what a chain does: every dimension is a sequence of factors of the source's dimensions, which
a view regroups and a transposition reorders.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from ..nodes import operator_name

_VIEWS = frozenset(["view", "reshape", "flatten", "unflatten", "_unsafe_view"])
_PERMUTATIONS = frozenset(["transpose", "permute", "movedim", "swapaxes", "swapdims", "moveaxis"])
_MOVEMENTS = _VIEWS | _PERMUTATIONS | {"contiguous", "clone"}
_NUMBER_OPERATORS = frozenset(
    [getattr, operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub]
)


@dataclass(frozen=True)
class Permutation:
    """What a chain does.

    Attributes:
        source: the node whose value is permuted.
        chain: the nodes that do it, in order.
        dim: the dimension of the source, and of the chain's result, that is permuted.
        index: the position in the source of each index of the result along ``dim``.
    """

    source: fx.Node
    chain: tuple[fx.Node, ...]
    dim: int
    index: np.ndarray


def find_permutation(node: fx.Node, env: Mapping[fx.Node, Any]) -> Permutation | None:
    """The longest chain of movements from ``node``, a view, that permutes one dimension of its source.

    ``env`` holds what is known so far: meta tensors and numbers. A chain that moves nothing is no
    permutation, since its views may still have to be rewritten.
    """
    if not _is_movement(node, _VIEWS) or not isinstance(node.args[0], fx.Node) or node.args[0] not in env:
        return None
    source = env[node.args[0]]
    if not isinstance(source, torch.Tensor) or source.dim() < 2 or source.numel() == 0:
        return None
    chain = [node]
    while len(chain[-1].users) == 1:
        (following,) = chain[-1].users
        if not _is_movement(following, _MOVEMENTS) or following.args[0] is not chain[-1]:
            break
        chain.append(following)
    ends = [i + 1 for i, step in enumerate(chain) if i >= 2 and _is_movement(step, _VIEWS)]
    if not ends or not any(_is_movement(n, _PERMUTATIONS) for n in chain):
        return None
    found = None
    layout = [[_Factor(dim, size, 1)] if size > 1 else [] for dim, size in enumerate(source.shape)]
    numbers: dict[fx.Node, Any] = {node.args[0]: source}
    for length, step in enumerate(chain[: ends[-1]], 1):
        try:
            layout = _moved(layout, step, numbers, env)
        except (RuntimeError, TypeError, IndexError, KeyError, ValueError):
            break  # a step that cannot be followed
        shape = [_size(factors) for factors in layout]
        numbers[step] = torch.empty(shape, device="meta")
        at_home = all(factor.dim == dim for dim, factors in enumerate(layout) for factor in factors)
        if length in ends and at_home and shape == list(source.shape):
            moved = [(d, i) for d, i in enumerate(map(_index, layout)) if (np.diff(i) != 1).any()]
            found = Permutation(node.args[0], tuple(chain[:length]), *moved[0]) if len(moved) == 1 else found
    return found


@dataclass(frozen=True)
class _Factor:
    """A part of a dimension of the source: ``size`` steps of ``stride``."""

    dim: int
    size: int
    stride: int


def _size(factors: list[_Factor]) -> int:
    return math.prod(factor.size for factor in factors)


def _index(factors: list[_Factor]) -> np.ndarray:
    """The positions in a dimension of the source that its factors run through."""
    index = np.zeros(1, np.int64)
    for factor in factors:
        index = (index[:, None] + np.arange(factor.size) * factor.stride).ravel()
    return index


def _moved(
    layout: list[list[_Factor]], step: fx.Node, numbers: dict[fx.Node, Any], env: Mapping[fx.Node, Any]
) -> list[list[_Factor]]:
    """The layout after one movement. Raises ValueError where a view cuts across factors."""
    if not _is_movement(step, _VIEWS | _PERMUTATIONS):
        return layout  # a copy
    args: Any = map_arg(step.args[1:], lambda n: _ahead(n, numbers, env))
    kwargs: Any = map_arg(step.kwargs, lambda n: _ahead(n, numbers, env))

    def call(*shape: int) -> torch.Size:
        probe = torch.empty(shape, device="meta")
        function: Any = getattr(torch.Tensor, str(step.target)) if step.op == "call_method" else step.target
        result: torch.Tensor = function(probe, *args, **kwargs)
        return result.shape

    if _is_movement(step, _PERMUTATIONS):
        return [
            layout[size - 2] for size in call(*range(2, len(layout) + 2))
        ]  # sizes that tell dimensions apart
    factors = [factor for dimension in layout for factor in dimension][::-1]
    regrouped = []
    for size in call(*map(_size, layout)):
        own = []
        while size > 1:
            factor = factors.pop()
            part = math.gcd(size, factor.size)
            if part < min(size, factor.size):
                raise ValueError("the view cuts across factors")
            rest = factor.size // part
            if rest > 1:
                factors.append(_Factor(factor.dim, rest, factor.stride))
            own.append(_Factor(factor.dim, part, factor.stride * rest))
            size //= part
        regrouped.append(own)
    return regrouped


def _is_movement(node: fx.Node, names: frozenset[str]) -> bool:
    if node.op == "call_method":
        return node.target in names
    if node.op != "call_function":
        return False
    return operator_name(node) in names and getattr(node.target, "__module__", "").startswith(
        ("torch", "_operator")
    )


def _ahead(node: fx.Node, numbers: dict[fx.Node, Any], env: Mapping[fx.Node, Any]) -> Any:
    """A node's value; a size that is read later in the graph is computed now. Raises KeyError for others."""
    if node in numbers:
        return numbers[node]
    if node in env:
        return env[node]
    sizes = node.op == "call_method" and node.target == "size"
    if not sizes and (node.op != "call_function" or node.target not in _NUMBER_OPERATORS):
        raise KeyError(node)
    args: Any = map_arg(node.args, lambda n: _ahead(n, numbers, env))
    target: Any = node.target
    numbers[node] = args[0].size(*args[1:]) if sizes else target(*args)
    return numbers[node]


__all__ = ["Permutation", "find_permutation"]
