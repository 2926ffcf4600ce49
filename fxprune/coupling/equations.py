"""Coupling rules written as equations, for operators and modules of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import RuleError
from .coupler import Coupler
from .units import Value


class Term(NamedTuple):
    """Names of the dimensions of one tensor; ``...`` stands for any number of them.

    Attributes:
        tensor: name of the parameter, buffer or keyword input that it is for; None for inputs by position.
        names: of the dimensions, without their marks.
    """

    tensor: str | None
    names: tuple[str, ...]


@dataclass(init=False)
class Equation:
    """How an operator couples dimensions, as in an einsum: ``"n c ..., c -> n c ..."``.

    Left of the arrow stands a term for each tensor that goes in, right of it one for each that comes out; a
    term names the dimensions of its tensor, separated by spaces. ``...`` stands for any further dimensions,
    which broadcast. A dimension of size 1 broadcasts as well.

    - Dimensions of the same name are narrowed together.
    - A name that is missing on the right is summed over, as in an einsum: a product in which entries that are
      zero contribute nothing.
    - ``[s]``: the operator mixes the entries along ``s``, or needs its size: it stays as it is.
    - ``~d``: statistics run over ``d``, as in a normalisation: it may be narrowed, but then the group is not
      exact.

    A mark is written once, at any of the places where the name stands.
    """

    text: str
    owner: str
    operands: tuple[Term, ...]
    results: tuple[Term, ...]
    mixed: frozenset[str]
    normalized: frozenset[str]

    def __init__(self, text: str, owner: str) -> None:
        """Raises RuleError where ``text`` cannot be read; ``owner`` is named in it."""
        self.text, self.owner = text, owner
        left, arrow, right = text.partition("->")
        if not arrow:
            raise self.error("has no '->'; 'pointwise' and 'n c ..., c -> n c ...' are right")
        mixed: set[str] = set()
        normalized: set[str] = set()
        self.operands = tuple(self._term(part, mixed, normalized) for part in left.split(","))
        self.results = tuple(self._term(part, mixed, normalized) for part in right.split(","))
        self.mixed, self.normalized = frozenset(mixed), frozenset(normalized)
        if any(term.tensor is not None for term in self.results):
            raise self.error("names a tensor on the right side")
        if any("..." in t.names for t in self.results) > any("..." in t.names for t in self.operands):
            raise self.error("has '...' on the right side only")

    def error(self, what: str) -> RuleError:
        return RuleError(f"the equation {self.text!r} of {self.owner} {what}.")

    def _term(self, part: str, mixed: set[str], normalized: set[str]) -> Term:
        tensor, colon, rest = part.partition(":")
        names = []
        for word in (rest if colon else part).split():
            name = word.strip("[]").lstrip("~")
            if word == "...":
                name = word
            elif not name.isidentifier() or word not in (name, f"[{name}]", f"~{name}"):
                raise self.error(f"has {word!r} for the name of a dimension; d, [d], ~d and ... are right")
            if name in names:
                raise self.error(f"has {name!r} twice in one term")
            if word.startswith("["):
                mixed.add(name)
            if word.startswith("~"):
                normalized.add(name)
            names.append(name)
        return Term(tensor.strip() if colon else None, tuple(names))

    def check_schema(self, operator: torch._ops.OpOverload) -> None:
        """Raise RuleError unless there is a term for each tensor of the operator."""
        schema = operator._schema
        for kind, terms, entries in (
            ("argument", self.operands, schema.arguments),
            ("result", self.results, schema.returns),
        ):
            types = [str(entry.type) for entry in entries]
            if any("List[Tensor]" in t or "List[Optional[Tensor]]" in t for t in types):
                raise self.error(
                    f"cannot stand for {operator}, which takes or gives lists of tensors; write a function "
                    f"(coupler, args, kwargs, out)"
                )
            count = sum("Tensor" in t for t in types)
            if len(terms) != count:
                raise self.error(f"has {len(terms)} terms for the {count} tensor {kind}s of {operator}")
        if any(term.tensor is not None for term in self.operands):
            raise self.error("names a tensor; arguments of an operator go by their order")

    def couple(self, c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """As a rule for operators; ``c.operator`` is the operator's name."""
        namespace, _, name = self.owner.partition(".")
        packet, _, overload = name.partition(".")
        operator: Any = getattr(getattr(torch.ops, namespace), packet)
        operator = getattr(operator, overload or operator.overloads()[0])
        tensors = []
        for place, argument in enumerate(operator._schema.arguments):
            if "Tensor" in str(argument.type):
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                tensors.append(given)
        self._apply(c, list(zip(tensors, self.operands, strict=True)), out)

    def couple_module(
        self, c: Coupler, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """As a rule for modules."""
        self._apply(c, self._match(module, args, kwargs), out)

    def outputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Meta tensors with the shapes that the equation gives the results."""
        matched = self._match(module, args, kwargs)
        given = [(tensor, term) for tensor, term in matched if tensor is not None]
        sizes = self._sizes(given)
        extra = max((name[1] for name in sizes if isinstance(name, tuple)), default=0)
        made = []
        for term in self.results:
            names = self._spread(term, len(term.names) + ("..." in term.names) * (extra - 1))
            unknown = [name for name in names if name not in sizes]
            if unknown:
                raise self.error(
                    f"leaves the size of {unknown[0]!r} open, and forward does not run on shapes alone"
                )
            shape = [sizes[name] for name in names]
            made.append(torch.empty(shape, dtype=given[0][0].dtype, device="meta"))
        return made[0] if len(made) == 1 else tuple(made)

    def _match(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Any, Term]]:
        matched: list[tuple[Any, Term]] = []
        named = {term.tensor for term in self.operands}
        by_name = {k: v for k, v in kwargs.items() if k in named}
        others = [*args, *(v for k, v in kwargs.items() if k not in named)]
        positional = [tensor for tensor in others if isinstance(tensor, torch.Tensor)]
        for term in self.operands:
            if term.tensor in by_name:
                matched.append((by_name[term.tensor], term))
            elif term.tensor is not None:
                try:
                    matched.append((attrgetter(term.tensor)(module), term))
                except AttributeError:
                    what = f"names {term.tensor!r}, which is no tensor of the module and no input"
                    raise self.error(what) from None
            elif positional:
                matched.append((positional.pop(0), term))
            else:
                raise self.error("has more terms without a name than there are tensor inputs")
        if positional:
            raise self.error(f"lacks terms for {len(positional)} of the tensor inputs")
        return matched

    def _sizes(self, tensors: Sequence[tuple[Any, Term]]) -> dict[Any, int]:
        """Size by name; the dimensions of ``...`` are named by their place from the right."""
        sizes: dict[Any, int] = {}
        for tensor, term in tensors:
            for size, name in zip(tensor.shape, self._spread(term, tensor.dim()), strict=True):
                if sizes.get(name, 1) not in (1, size) and size != 1:
                    shown = "..." if isinstance(name, tuple) else name
                    raise self.error(f"gives {shown!r} the sizes {sizes[name]} and {size}")
                sizes[name] = max(size, sizes.get(name, 1))
        return sizes

    def _spread(self, term: Term, rank: int) -> list[Any]:
        """A name for each dimension; those of ``...`` are numbered from the right."""
        extra = rank - len(term.names) + ("..." in term.names)
        if extra < 0 or (extra and "..." not in term.names):
            raise self.error(
                f"has the term {' '.join(term.names)!r} for a tensor with {rank} dimension{'s' * (rank != 1)}"
            )
        names: list[Any] = []
        for name in term.names:
            names += [("...", i) for i in range(extra, 0, -1)] if name == "..." else [name]
        return names

    def _apply(self, c: Coupler, matched: Sequence[tuple[Any, Term]], out: Any) -> None:
        operands: list[tuple[Value, list[Any]]] = []
        given = [(tensor, term) for tensor, term in matched if isinstance(tensor, torch.Tensor)]
        sizes = self._sizes(given)
        for tensor, term in given:
            value = c.value(tensor)
            names = self._spread(term, len(value.shape))
            for dim, name in enumerate(names):
                if name in self.mixed:
                    c.freeze_dim(value, dim, f"{self.owner} mixes the entries along {name!r}")
            operands.append((value, names))
        outs = [out] if isinstance(out, torch.Tensor) else [t for t in out if isinstance(t, torch.Tensor)]
        if len(outs) != len(self.results):
            raise self.error(f"has {len(self.results)} terms for {len(outs)} results")
        gone: dict[Any, Any] = {}
        kept: set[Any] = set()
        for tensor, term in zip(outs, self.results, strict=True):
            names = self._spread(term, tensor.dim())
            for size, name in zip(tensor.shape, names, strict=True):
                if name in sizes and sizes[name] != size:
                    raise self.error(f"gives {name!r} the size {sizes[name]}, but the result has {size}")
            c.product(operands, names)
            labels, lost = c.unify(operands, names, lambda zeros: False)
            for name, label in zip(names, labels, strict=True):
                if label is not None and name in self.normalized:
                    c.mark_inexact(label, f"normalised over this axis by {self.owner}")
            gone.update(lost)
            kept.update(names)
            c.put(tensor, labels)
        for name, (label, zeroed) in gone.items():
            if name in kept:
                continue
            if label.row:
                c.freeze(label, "whole rows are reduced over")
            elif name in self.normalized or not zeroed:
                c.mark_inexact(label, f"summed over by {self.owner}")


__all__ = ["Equation", "Term"]
