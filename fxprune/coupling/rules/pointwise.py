"""Pointwise operators: dimensions are aligned from the right, those that meet are coupled."""

from __future__ import annotations

from typing import Any

import torch

from ..coupler import Coupler, ZeroRule
from ..registry import rule
from ..units import Label, Open, Value

# f(0) = 0, so a channel that is zero stays zero.
_KEEPS_ZERO = frozenset([
    "abs", "alias", "asin", "asinh", "atan", "atanh", "ceil", "clone", "contiguous", "deg2rad", "detach",
    "dropout", "elu", "erf", "expm1", "floor", "frac", "gelu", "hardshrink", "hardswish", "hardtanh",
    "leaky_relu", "lift", "lift_fresh", "lift_fresh_copy", "log1p", "mish", "native_dropout", "neg",
    "negative", "nan_to_num", "positive", "prelu", "_prelu_kernel", "rad2deg", "relu", "relu6", "round",
    "selu", "sgn", "sign", "silu", "sin", "sinh", "softshrink", "sqrt", "square", "tan", "tanh", "tanh_",
    "trunc", "_to_copy", "to", "_conj", "conj", "_conj_physical", "real",
])  # fmt: skip
_ANY = frozenset(["mul", "multiply"])
_FIRST = frozenset(["div", "divide", "true_divide", "floor_divide", "fmod", "remainder"])
_ALL = frozenset([
    "add", "sub", "subtract", "rsub", "maximum", "minimum", "max", "min", "lerp", "where", "hypot",
    "addcmul", "addcdiv",
])  # fmt: skip


def zero_rule(name: str, args: tuple[Any, ...]) -> ZeroRule:
    """How zeros at removed indices pass through the operator called ``name``."""
    name = name.rstrip("_") or name
    scalars = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if name in _ANY:
        return any
    if name in _FIRST:
        return lambda zeros: bool(zeros) and zeros[0] and not any(zeros[1:])
    if name in _ALL:
        others = [s for s in scalars if s != 0]
        return (lambda zeros: False) if others else all
    if name == "pow" and len(scalars) == 1:  # a number to the power of 0 is 1
        return all if scalars[0] > 0 and scalars[0] is args[1] else (lambda zeros: False)
    if name == "hardtanh" and scalars and not scalars[0] <= 0 <= [*scalars, 1.0][1]:
        return lambda zeros: False
    if name in _KEEPS_ZERO:
        return all
    return lambda zeros: False


# The second line: pointwise, though PyTorch does not tag them so.
@rule("<pointwise>",
      "hardswish", "_prelu_kernel", "log_sigmoid_forward", "polar", "complex", "real", "rsub", "floor_divide",
      "dropout", "rrelu_with_noise", "special_erfinv", "celu", "_conj", "_conj_physical",
      "leaky_relu")  # fmt: skip
def pointwise(c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    results = [out] if isinstance(out, torch.Tensor) else list(out)
    rank = max(result.dim() for result in results if isinstance(result, torch.Tensor))
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    values = [c.value(tensor) for tensor in tensors]
    zero = zero_rule(c.operator, args)
    if len(values) == 1 and not values[0].fixed and len(values[0].shape) == rank:
        _alone(c, values[0], zero, results)
        return
    operands = [(value, range(rank - len(value.shape), rank)) for value in values]
    in_place = any(result is tensors[0] for result in results) if tensors else False
    apart = range(in_place, len(operands)) if "out" not in kwargs else ()
    labels, _ = c.unify(operands, range(rank), zero, apart)
    if in_place and not all(label is None or label.zero for label in labels):
        c.written(values[0])
    for result in results:
        if isinstance(result, torch.Tensor):
            c.put(result, labels[rank - result.dim() :])


def _alone(c: Coupler, value: Value, zero: ZeroRule, results: list[Any]) -> None:
    """A function of one tensor: labels pass on, zeros perhaps."""
    labels: list[Label | None] = []
    for dim, label in enumerate(value.labels):
        if (
            label is not None
            and not isinstance(label, Open)
            and label.zero != (zeroed := zero([value.is_zero(dim)]))
        ):
            label = Label(label.ids, label.over, label.axis, zeroed, label.row)
        labels.append(label)
    kept = all(label is None or label.zero or isinstance(label, Open) for label in labels)
    for result in results:
        known = c.value(result)
        if known is value and not kept:
            c.written(value)
        c.put(result, labels)


@rule("clone", "alias", "detach", "lift_fresh", "lift", "_to_copy", "contiguous")
def same(c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The same value again: also for parameters, whose open axes stay open."""
    value = c.value(args[0])
    if out is not args[0]:
        c.permute(out, value, range(len(value.shape)))


@rule("copy", "copy_")
def copy_(c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    target, source = c.value(args[0]), c.value(args[1])
    rank = len(target.shape)
    operands = [(target, range(rank)), (source, range(rank - len(source.shape), rank))]
    labels, _ = c.unify(operands, range(rank))
    if not all(label is None or label.zero for label in labels):
        c.written(target)
    c.put(out, labels)


@rule("fill", "fill_", "zero_", "uniform_", "normal_", "bernoulli_", "bernoulli", "random_", "exponential_")
def fill(c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Overwritten with values that do not depend on the index."""
    value = c.value(args[0])
    if c.operator != "zero_":
        c.written(value)
    if out is not args[0]:
        c.permute(out, value, range(len(value.shape)))


@rule("native_dropout")
def dropout(c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    pointwise(c, args[:1], {}, out)
