"""Trees of inputs and outputs: containers, dataclasses and plain objects around tensors.

``torch.utils._pytree`` sees into registered containers only. What models take and return may also be
a dataclass or an object that holds tensors (a key/value cache, say); these are followed through their
attributes, and rebuilt as copies with other tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.utils import _pytree as pytree

FIRST = ""
"""The key of the first of several results, whose parts keep their names."""
TENSORS = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Leaf:
    """Where a tensor stands in a tree.

    Attributes:
        path: keys and attribute names from the root.
        inside: whether an object lies on the path that is neither a container nor a dataclass.
    """

    path: tuple[Any, ...]
    inside: bool

    @property
    def shown(self) -> tuple[str, ...]:
        """The path for people."""
        return tuple(str(key) for key in self.path if key != FIRST)

    def __str__(self) -> str:
        return ".".join(self.shown) or "output"

    def named(self, patterns: Sequence[str]) -> bool:
        """Whether one of ``patterns`` (with ``*``, ``?`` as in a shell) name the leaf, or a tree it is in."""
        names = [".".join(self.shown[:end]) for end in range(1, len(self.shown))]
        return any(fnmatchcase(name, pattern) for name in (*names, str(self)) for pattern in patterns)


@dataclass(frozen=True)
class _Place:
    """Stands for the leaf of this number."""

    number: int


@dataclass(frozen=True)
class _Object:
    """An object without its tensors, and the trees that its attributes are to hold."""

    kind: type
    shell: Any = field(compare=False, repr=False)
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Structure:
    """A tree without its tensors: plain data, made by :func:`flatten`.

    Attributes:
        leaves: where each tensor stands, in order.
    """

    leaves: tuple[Leaf, ...]
    tree: Any

    def __str__(self) -> str:
        places = ", ".join(map(str, self.leaves))
        return f"a tree with {len(self.leaves)} tensors ({places})"

    @property
    def named(self) -> bool:
        """Whether the tree is a class with named fields, not a list, tuple or dict."""
        registered = is_dataclass(self.tree) and not isinstance(self.tree, _Place)
        return registered or isinstance(self.tree, _Object) or hasattr(self.tree, "_fields")

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The tree with these tensors in it."""
        return _rebuild(self.tree, tensors)


def flatten(tree: Any, kinds: tuple[type, ...] = TENSORS) -> tuple[list[Any], Structure]:
    """The tensors of ``tree`` in order, and the rest of it.

    Args:
        tree: any value.
        kinds: what counts as a tensor; by default tensors, and numbers that are symbolic.
    """
    walk = _Walk(kinds)
    made = walk.tree(tree, (), False, frozenset())
    return walk.tensors, Structure(tuple(walk.leaves), made)


class _Walk:
    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.kinds = kinds
        self.tensors: list[Any] = []
        self.leaves: list[Leaf] = []

    def tree(self, tree: Any, path: tuple[Any, ...], inside: bool, above: frozenset[int]) -> Any:
        """The tree with places for its tensors; ``above`` are the objects that it lies in."""
        found, spec = _with_paths(tree)
        made = [self.leaf(leaf, (*path, *keys), inside, above) for keys, leaf in found]
        return pytree.tree_unflatten(made, spec)

    def leaf(self, leaf: Any, path: tuple[Any, ...], inside: bool, above: frozenset[int]) -> Any:
        if isinstance(leaf, self.kinds):
            self.tensors.append(leaf)
            self.leaves.append(Leaf(path, inside))
            return _Place(len(self.tensors) - 1)
        attributes = self.attributes(leaf, above)
        if not attributes:
            return leaf
        inside = inside or not is_dataclass(leaf)
        above |= {id(leaf)}
        made = {name: self.tree(value, (*path, name), inside, above) for name, value in attributes.items()}
        shell = copy.copy(leaf)
        for name in made:
            object.__setattr__(shell, name, None)
        return _Object(type(leaf), shell, made)

    def attributes(self, leaf: Any, above: frozenset[int]) -> dict[str, Any]:
        """The attributes of an object that hold tensors, somewhere."""
        if id(leaf) in above or isinstance(leaf, (type, torch.nn.Module)) or callable(leaf):
            return {}
        above |= {id(leaf)}
        own = getattr(leaf, "__dict__", None) or {}
        return {
            name: value
            for name, value in own.items()
            if any(isinstance(x, self.kinds) or self.attributes(x, above) for x in pytree.tree_leaves(value))
        }


def _with_paths(tree: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], pytree.TreeSpec]:
    """Leaves with the keys that lead to them; numbers where a container was registered without keys."""
    try:
        found, spec = pytree.tree_flatten_with_path(tree)
    except ValueError:
        leaves, spec = pytree.tree_flatten(tree)
        return [((number,), leaf) for number, leaf in enumerate(leaves)], spec
    return [(tuple(map(_key, keys)), leaf) for keys, leaf in found], spec


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))


def _rebuild(tree: Any, tensors: Sequence[Any]) -> Any:
    def leaf(made: Any) -> Any:
        if isinstance(made, _Place):
            return tensors[made.number]
        if isinstance(made, _Object):
            new = copy.copy(made.shell)
            for name, value in made.attributes.items():
                object.__setattr__(new, name, _rebuild(value, tensors))
            return new
        return made

    return pytree.tree_map(leaf, tree)


__all__ = ["Leaf", "Structure", "flatten"]
