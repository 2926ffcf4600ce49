"""Example inputs: how the user may give them, and how they are described in a plan.

Only shapes, dtypes and the values of non-tensors matter to the analysis, so example inputs travel
through the library as trees of meta tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .errors import ExampleInputsError, PlanError

_SCALARS = (type(None), bool, int, float, str)
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Several:
    """Example inputs of several calls; see :class:`fxprune.Calls`."""

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs of all of them."""
        raise NotImplementedError


def normalize(example_inputs: Any, several: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split ``example_inputs`` into positional and keyword arguments of the model.

    A tensor is the only positional argument, a tuple holds positional arguments, a dict holds keyword
    arguments. Arguments may nest tensors in lists, tuples and dicts.

    Sizes that ``torch.compile`` leaves free are taken to be those that it saw.

    Args:
        example_inputs: the inputs.
        several: whether those of several calls will do, too.

    Raises:
        ExampleInputsError: for anything else.
    """
    if isinstance(example_inputs, Several):
        if several:
            return example_inputs.inputs()
        raise ExampleInputsError("fxprune.Calls was given where one call is needed: give the inputs of one.")
    if any(isinstance(leaf, (FakeTensor, *_NUMBERS)) for leaf in pytree.tree_leaves(example_inputs)):
        example_inputs = pytree.tree_map(_concrete, example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        if not all(isinstance(key, str) for key in example_inputs):
            raise ExampleInputsError(
                "example_inputs is a dict, which holds keyword arguments, but some keys are no strings. "
                "To pass a dict as the first positional argument, wrap it in a tuple: (inputs,)."
            )
        return (), dict(example_inputs)
    raise ExampleInputsError(
        f"example_inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs; got "
        f"{type(example_inputs).__name__}. To pass a {type(example_inputs).__name__} as one positional "
        f"argument, wrap it in a tuple: (inputs,)."
    )


def _concrete(leaf: Any) -> Any:
    """A fake tensor as a meta tensor, and a symbolic number as the number that was seen."""
    if isinstance(leaf, FakeTensor):
        sizes, strides = map(_concrete, leaf.shape), map(_concrete, leaf.stride())
        return torch.empty_strided(tuple(sizes), tuple(strides), dtype=leaf.dtype, device="meta")
    if not isinstance(leaf, _NUMBERS):
        return leaf
    if not leaf.node.has_hint():
        raise ExampleInputsError(
            f"the size {leaf} of the example inputs is only known when the model runs. Next: prune the "
            f"model itself, before torch.compile."
        )
    return leaf.node.hint


def to_meta(tree: Any) -> Any:
    """The same tree with every tensor replaced by a meta tensor of its shape, stride and dtype."""
    return pytree.tree_map_only(torch.Tensor, meta_like, tree)


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the shape, strides and dtype of ``tensor``, without its values."""
    if tensor.layout is not torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A sparse tensor with its zeros, which can be compared; any other as it is."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As ``torch.equal``, also of sparse tensors."""
    return torch.equal(dense(a), dense(b))


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], values: bool = False) -> dict[str, Any]:
    """A JSON-serialisable description of a model's arguments; the inverse of :func:`restore_inputs`.

    With ``values`` tensors of up to :data:`MOST` entries keep these.
    """
    return {
        "args": [describe(a, values) for a in args],
        "kwargs": {k: describe(v, values) for k, v in kwargs.items()},
    }


MOST = 1 << 16
"""Entries of a tensor whose values may stand in a description."""


def restore_inputs(description: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, tensors without values on the meta device.

    Raises:
        PlanError: if the description is malformed.
    """
    try:
        args, kwargs = description["args"], description["kwargs"].items()
    except (TypeError, KeyError, AttributeError) as error:
        raise PlanError("the plan's 'inputs' must hold 'args' and 'kwargs'.") from error
    return tuple(restore(a) for a in args), {k: restore(v) for k, v in kwargs}


def describe(tree: Any, values: bool = False) -> Any:
    """A JSON-serialisable description of a tree of inputs; the inverse of :func:`restore`.

    For ``values`` see :func:`describe_inputs`.
    """
    if isinstance(tree, torch.Tensor):
        described: dict[str, Any] = {
            "tensor": list(tree.shape),
            "dtype": str(tree.dtype).removeprefix("torch."),
        }
        if values and not tree.is_meta and not tree.is_complex() and tree.numel() <= MOST:
            described["values"] = tree.tolist()
        return described
    if isinstance(tree, tuple):
        return {"tuple": [describe(item, values) for item in tree]}
    if isinstance(tree, list):
        return [describe(item, values) for item in tree]
    if isinstance(tree, dict):
        return {"dict": {key: describe(item, values) for key, item in tree.items()}}
    if isinstance(tree, _SCALARS):
        return {"value": tree}
    raise ExampleInputsError(
        f"example inputs may hold tensors, numbers, strings, None, lists, tuples and dicts; found "
        f"{type(tree).__name__}."
    )


def in_dtype_of(model: nn.Module, description: Any) -> Any:
    """A description of inputs in the floating-point type of ``model``, another copy of what it was made for.

    It stays as it is where some parameter or buffer has the type of an input.
    """
    dtypes = [t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    types = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    leaves = [leaf for leaf in _described(description) if _is_floating(leaf)]
    if not types or any(leaf["dtype"] in types for leaf in leaves):
        return description
    wanted = str(dtypes[0]).removeprefix("torch.")

    def cast(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {**tree, "dtype": wanted} if _is_floating(tree) else {k: cast(v) for k, v in tree.items()}
        return [cast(item) for item in tree] if isinstance(tree, (list, tuple)) else tree

    return cast(description)


def _described(tree: Any) -> list[Any]:
    """All dicts in a description, nested ones too."""
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tree, *(found for item in items for found in _described(item))] if items else [tree]


def _is_floating(tree: Any) -> bool:
    if not isinstance(tree, dict) or "tensor" not in tree:
        return False
    dtype = getattr(torch, str(tree.get("dtype")), None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def restore(description: Any) -> Any:
    """Meta tensors and values from what :func:`describe` wrote."""
    if isinstance(description, list):
        return [restore(item) for item in description]
    if isinstance(description, dict):
        if "tensor" in description:
            dtype = getattr(torch, str(description.get("dtype")), None)
            if isinstance(dtype, torch.dtype):
                shape = description["tensor"]
                if "values" in description:
                    return torch.tensor(description["values"], dtype=dtype).reshape(shape)
                return torch.empty(shape, dtype=dtype, device="meta")
        elif "tuple" in description:
            return tuple(restore(item) for item in description["tuple"])
        elif "dict" in description:
            return {key: restore(item) for key, item in description["dict"].items()}
        elif "value" in description:
            return description["value"]
    raise PlanError(f"the plan's description of the example inputs is malformed at {description!r}.")
