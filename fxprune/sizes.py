"""Which sizes of the inputs may change, found out on shapes alone.

A graph is made from one example. :func:`trials` gives the same inputs at other sizes: another batch, another
height, width or length. Where the model's own code does something else there, the graph is right for the
sizes of the example alone; where it does the same, the coupling is looked at again at the other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .guards import check_size
from .program import Program

BATCH, REST = "batch", "other sizes"
Calls = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """The example inputs at other sizes.

    Attributes:
        changed: what is different: :data:`BATCH`, :data:`REST` (height, width, length), or both.
        inputs: meta tensors and values for the graph's placeholders, in order.
    """

    changed: tuple[str, ...]
    inputs: list[Any]


def resized(args: tuple[Any, ...], kwargs: dict[str, Any], changed: tuple[str, ...]) -> Calls | None:
    """The same arguments at other sizes, entries repeated; None where there is nothing to change.

    The batch is the first dimension of every tensor that has as many entries there as the first one. What
    else may change is height and width of images and volumes, and the length of sequences: the second
    dimension of whole numbers, and of floating-point numbers in three dimensions. Equal sizes stay equal.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    shaped = [tensor for tensor in tensors if tensor.dim()]
    if not shaped:
        return None
    batch = shaped[0].shape[0]
    rest = {tensor.shape[dim] for tensor in shaped for dim in _free(tensor)} - {1}
    if REST in changed and not rest:
        return None

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(tensor.shape):
            if dim == 0 and size == batch and BATCH in changed:
                tensor = _repeated(tensor, dim, size + 1)
            elif dim in _free(tensor) and size in rest and REST in changed:
                tensor = _repeated(tensor, dim, size + 32 if size % 32 == 0 else 2 * size)
        return tensor

    new_args, new_kwargs = pytree.tree_map_only(torch.Tensor, resize, (args, kwargs))
    return new_args, new_kwargs


def _free(tensor: torch.Tensor) -> range:
    """Dimensions that may be height, width or length."""
    if tensor.dim() > 3:
        return range(2, tensor.dim())
    whole = not tensor.is_floating_point()
    return range(1, 2) if tensor.dim() == 3 or (whole and tensor.dim() == 2) else range(0)


def _repeated(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    index = torch.arange(size, device=tensor.device) % max(tensor.shape[dim], 1)
    return tensor.index_select(dim, index)


def trials(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Calls]]:
    """The example at other sizes: all at once, then the batch alone, then the others alone."""
    for changed in ((BATCH, REST), (BATCH,), (REST,)):
        found = resized(args, kwargs, changed)
        if found is not None:
            yield changed, found


def same(a: Program, b: Program) -> bool:
    """Whether two graphs do the same: the same calls with the same numbers and constants."""
    if len(a.graph.nodes) != len(b.graph.nodes):
        return False
    place: dict[fx.Node, int] = {}
    other: dict[fx.Node, int] = {}
    for number, (x, y) in enumerate(zip(a.graph.nodes, b.graph.nodes, strict=True)):
        if x.op != y.op or x.target != y.target:
            return False
        if not _alike((x.args, x.kwargs), (y.args, y.kwargs), place, other):
            return False
        place[x], other[y] = number, number
    return a.extras.keys() == b.extras.keys() and all(
        _equal(tensor, b.extras[name]) for name, tensor in a.extras.items()
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or b.is_meta or bool(torch.equal(a, b))


def _alike(a: Any, b: Any, place: Mapping[fx.Node, int], other: Mapping[fx.Node, int]) -> bool:
    if isinstance(a, fx.Node):
        return isinstance(b, fx.Node) and place.get(a) == other.get(b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(
            _alike(x, y, place, other) for x, y in zip(a, b, strict=True)
        )  # fmt: skip
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(
            _alike(a[key], b[key], place, other) for key in a
        )  # fmt: skip
    if isinstance(a, slice):
        parts = [(x.start, x.stop, x.step) for x in (a, b)] if isinstance(b, slice) else [(), (1,)]
        return _alike(parts[0], parts[1], place, other)
    return a is b or (type(a) is type(b) and (a == b or a != a))


def look(
    trace: Callable[..., Program], model: Any, program: Program, args: Any, kwargs: Any
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Trace again at other sizes.

    Returns:
        What may change together, and what may not: for it the model's code does something else.
    """
    free: list[tuple[str, ...]] = []
    fixed: list[str] = []
    for changed, (new_args, new_kwargs) in trials(args, kwargs):
        try:
            is_same = same(program, trace(model, new_args, new_kwargs))
        except Exception:  # noqa: BLE001  the model takes no such size, or is not captured there
            continue
        if is_same:
            free.append(changed)
            if len(changed) == 2:
                break
        elif len(changed) == 1:
            fixed += changed
    if fixed and not same(program, trace(model, args, kwargs)):
        fixed = []  # no two traces are alike
    return tuple(free), tuple(fixed)


def guard(program: Program, given: Mapping[str, Any]) -> None:
    """Have the graph of ``program`` refuse another batch than that of the inputs ``given``, by name."""
    shaped = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor) and t.dim()]
    for node in program.placeholders():
        tensor = given.get(str(node.target))
        if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[0] == shaped[0].shape[0]:
            with program.graph.inserting_after(program.placeholders()[-1]):
                program.graph.call_function(check_size, (node, str(node.target), 0, tensor.shape[0], 0))
            return


NAMES = {BATCH: "batch size", REST: "height, width or length"}


__all__ = ["BATCH", "NAMES", "REST", "Trial", "guard", "look", "resized", "same", "trials"]
