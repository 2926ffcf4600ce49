"""Values of what a model computes from its inputs and constants alone, while it is traced on shapes.

Lengths, masks and index tensors do not depend on weights, and the example has their values. They are
computed when they are asked for, on the CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .guards import CHECKS
from .nodes import mutable, operator_name, writes

FROM_SHAPE = frozenset(["zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones",
                         "new_empty", "new_full", "new_tensor", "new"])  # fmt: skip
"""Functions that look at nothing but the shape, type and device of their first argument."""
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "uniform", "exponential", "poisson")
KINDS = frozenset(["layout", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"])
"""Attributes that say how a tensor is stored, which is no more in an example than in any other input."""
DEVICES = frozenset(["is_cuda", "is_cpu", "is_meta", "is_mps", "is_xla", "is_xpu"])
"""Attributes that say on which device a tensor is."""
_FACTS = KINDS | DEVICES | {"shape", "ndim", "dtype", "device", "requires_grad", "size", "dim", "numel",
                  "nelement", "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_tensor",
                  "element_size", "itemsize", "stride"}  # fmt: skip
"""What a tensor says of itself without a look at its entries."""


class UnknownValueError(TypeError):
    """A value depends on weights, on random numbers, or on an input that is given as a shape alone."""


class Values:
    """The values of nodes of one graph, which may still grow.

    Args:
        seen: what each node is on shapes alone.
        source: what stands behind a placeholder or ``get_attr`` node, a tensor or a tree of tensors; None
            where it is not to be had.
    """

    def __init__(self, seen: Mapping[fx.Node, Any], source: Callable[[fx.Node], Any]) -> None:
        self._seen = seen
        self._source = source
        self._found: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``.

        Raises:
            UnknownValueError: if it depends on anything but inputs and constants.
        """
        needed = self._needed(node)
        written = any(map(writes, needed))
        found = {} if written else self._found
        with _disable_current_modes(), torch.no_grad():
            for part in needed:
                if part not in found:
                    found[part] = self._run(part, found, written)
        return found[node]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose values, and not only whose shapes, have a part in the value of ``node``."""
        return [part for part in _behind(node, _looks_at_shapes) if part.op == "placeholder"]

    def are_constant(self, node: fx.Node) -> bool:
        """Whether neither values nor sizes of the inputs have a part in the value of ``node``."""
        return all(part.op != "placeholder" for part in _behind(node, lambda part: False))

    def are_whole(self, node: fx.Node) -> bool:
        """Whether a value is computed of whole numbers and masks alone: lengths, indices, where a number is
        missing. Of measured values, any input has others.
        """

        def is_known(part: fx.Node) -> bool:
            asks = _looks_at_shapes(part) or operator_name(part) in ("isnan", "isinf", "isfinite")
            return asks or (part.target is operator.getitem and _is_whole(self._seen[part]))

        behind = _behind(node, is_known)
        return all(part.op != "placeholder" or _is_whole(self._seen[part]) for part in behind)

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """What must be run for ``node``, in order, with all that writes into any of it."""
        needed, todo = {node}, [node]
        while todo:
            for part in self._inputs(todo.pop()):
                if part not in needed:
                    needed.add(part)
                    todo.append(part)
            if not todo:
                for part in node.graph.nodes:
                    first = part.args[0] if part.args else None
                    if part in needed or part not in self._seen or part.target in CHECKS or not writes(part):
                        continue
                    while isinstance(first, fx.Node) and first not in needed:
                        first = first.args[0] if first.args else None
                    if isinstance(first, fx.Node):
                        needed.add(part)
                        todo.append(part)
                        break
        return [part for part in node.graph.nodes if part in needed]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        plain = not _has_tensors(self._seen[node]) and "number" not in node.meta
        if plain or (operator_name(node) in FROM_SHAPE):
            return [] if plain else [n for n in node.all_input_nodes if n is not node.args[0]]
        return node.all_input_nodes

    def _run(self, node: fx.Node, found: Mapping[fx.Node, Any], written: bool) -> Any:
        seen = self._seen[node]
        if not _has_tensors(seen) and not writes(node):
            return torch.device("cpu") if isinstance(seen, torch.device) else seen
        if node.op in ("placeholder", "get_attr"):
            tree = self._source(node)
            if tree is None or any(
                t.is_meta for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)
            ):
                raise UnknownValueError(f"the values of {node.name} are not known")
            copy = torch.clone if written else torch.Tensor.detach
            return pytree.tree_map_only(torch.Tensor, lambda tensor: copy(tensor.detach().cpu()), tree)
        name = operator_name(node)
        if node.op == "call_module" or any(word in name for word in _RANDOM):
            raise UnknownValueError(f"the values of {node.name} are not known")

        def given(argument: fx.Node) -> Any:
            if argument in found:
                return found[argument]
            shape: Any = self._seen[argument]
            return torch.empty(shape.shape, dtype=shape.dtype)

        args: Any = map_arg(node.args, given)
        kwargs: Any = map_arg(node.kwargs, given)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        args, kwargs = mutable(args), mutable(kwargs)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        if node.op == "call_method":
            if name in ("cpu", "cuda"):
                return args[0]
            return getattr(args[0], name)(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)


def made_of_sizes(node: fx.Node, without: Collection[str] = ()) -> bool:
    """Whether a value is computed of sizes of tensors, and of constants, with no look at any entry.

    Args:
        node: the value.
        without: names of tensors that are no constants.
    """
    behind = list(_behind(node, _fact))
    return any(map(_fact, behind)) and not any(
        part.op == "placeholder"
        or (part.op == "get_attr" and part.target in without)
        or (part.op.startswith("call") and any(word in operator_name(part) for word in _RANDOM))
        for part in behind
    )


def _behind(node: fx.Node, ends: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """``node`` and all nodes that it is computed from, each once, but for what only those read that ``ends``
    holds for.
    """
    todo, met = [node], {node}
    while todo:
        part = todo.pop()
        yield part
        if not ends(part):
            todo += [n for n in part.all_input_nodes if n not in met]
            met.update(part.all_input_nodes)


def _looks_at_shapes(node: fx.Node) -> bool:
    """Whether a node looks at nothing of what it is given but its shape, type and device."""
    return _fact(node) or operator_name(node) in FROM_SHAPE


def _has_tensors(tree: Any) -> bool:
    if isinstance(tree, torch.Tensor):
        return True
    return isinstance(tree, (list, tuple, dict)) and any(
        isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(tree)
    )


def _is_whole(seen: Any) -> bool:
    return isinstance(seen, torch.Tensor) and not (seen.is_floating_point() or seen.is_complex())


def _fact(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _FACTS
    return node.op in ("call_method", "call_function") and operator_name(node) in _FACTS


__all__ = ["FROM_SHAPE", "UnknownValueError", "Values", "made_of_sizes"]
