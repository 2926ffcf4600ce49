"""What a model is called with, by the names under which the captured graph takes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ExampleInputsError
from ..nn import Pack
from ..program import unwrapped
from ..trees import Structure

LITERALS = (type(None), bool, int, float, str)
"""Values that can stand in a graph."""


@dataclass(frozen=True)
class Arguments:
    """The given inputs of ``forward``; those that keep their defaults are left out.

    Attributes:
        signature: of ``forward``.
        given: values by parameter name; ``*args`` is a tuple, ``**kwargs`` a dict.
        named: which of them are given by keyword. They are passed on in this way: to decorators around
            ``forward`` it may make a difference.
    """

    signature: inspect.Signature
    given: dict[str, Any]
    named: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Bind inputs to ``model.forward``.

        Raises:
            ExampleInputsError: if the inputs do not fit the signature.
        """
        model = unwrapped(model)
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ExampleInputsError(
                f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}. Give a "
                f"tensor, a tuple of positional inputs or a dict of keyword inputs."
            ) from error
        return cls(signature, dict(bound.arguments), frozenset(kwargs))

    def by_place(self) -> dict[str, Any]:
        """What is passed by position; extras of ``*args`` are numbered."""
        return dict(self._listed(True))

    def by_name(self) -> dict[str, Any]:
        """What is passed by keyword: what was given so, and what follows one that keeps its default."""
        return dict(self._listed(False))

    def all(self) -> dict[str, Any]:
        """All of them, in the order of the captured graph's placeholders."""
        return {**self.by_place(), **self.by_name()}

    def default(self, name: str) -> tuple[Any, ...]:
        """What a placeholder's ``args`` are: its default, if there is one.

        A value that is no tensor need not be given again. What follows such an input must have a default,
        too, as in any Python signature; None there stands for nothing.
        """
        given = self.all()
        if not _holds_tensors(given[name]):
            return (given[name],)
        before = list(given)[: list(given).index(name)]
        return (None,) if any(not _holds_tensors(given[other]) for other in before) else ()

    def _listed(self, by_place: bool) -> Iterator[tuple[str, Any]]:
        gap = False
        for name, parameter in self.signature.parameters.items():
            if name not in self.given:
                gap = True
                continue
            value = self.given[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                yield from ((f"{name}_{i}", item) for i, item in enumerate(value) if by_place)
            elif parameter.kind is parameter.VAR_KEYWORD:
                yield from (() if by_place else value.items())
            elif by_place != (gap or name in self.named):
                yield name, value


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def packing(structure: Structure, arguments: Arguments) -> tuple[Pack | None, list[str]]:
    """The module that builds the model's output, and what to note; None if the graph itself can.

    State that the model hands out as an object under the name of one of its inputs, to be given back to
    it, is no output that must keep its width.
    """
    if _is_plain(structure.rebuild([None] * len(structure.leaves))):
        return None, []
    state = tuple(
        number
        for number, leaf in enumerate(structure.leaves)
        if leaf.inside and not arguments.signature.parameters.keys().isdisjoint(leaf.shown[:2])
    )
    names = sorted({key for number in state for key in structure.leaves[number].shown[:2]
                    if key in arguments.signature.parameters})  # fmt: skip
    notes = [
        f"the output's {name} is an object that forward takes in again: its tensors are as narrow as the "
        f"network"
        for name in names
    ]
    return Pack(structure, state), notes


def _is_plain(tree: Any) -> bool:
    """Whether torch.fx can write the tree down as it is."""
    if type(tree) in (list, tuple) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        return all(map(_is_plain, tree))
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in tree.items())
    return isinstance(tree, LITERALS)


__all__ = ["LITERALS", "Arguments", "packing"]
