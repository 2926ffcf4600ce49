"""Shortcuts to the shapes of frequent operators' results.

The general meta kernels of these operators are Python and take 0.1 to 1 ms a call, most of the time of an
analysis. Each shortcut covers the plain case and returns None for any other, which then takes the
general way. ``tests/test_meta_shapes.py`` holds them against the general kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..convolution import Convolution
from ..value_dependent import SHAPES

Shortcut = Callable[[tuple[Any, ...], dict[str, Any]], Any]
aten = torch.ops.aten


def _plain(tensor: Any) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and tensor.is_contiguous()
    )


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _new(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _unary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    numbers = all(isinstance(a, (int, float, str, type(None))) for a in args[1:])
    return _like(x) if _plain(x) and numbers and not kwargs else None


def _binary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, y = args[0], args[1]
    if kwargs or len(args) > 2 or not _plain(x):
        return None
    if isinstance(y, (int, float)):
        return _like(x)
    if not _plain(y) or x.dtype != y.dtype or x.dim() != y.dim():
        return None
    if any(a != b and a != 1 and b != 1 for a, b in zip(x.shape, y.shape, strict=True)):
        return None
    return _new(x, *(b if a == 1 else a for a, b in zip(x.shape, y.shape, strict=True)))


def _in_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    others = [a for a in args[1:] if isinstance(a, torch.Tensor)]
    fits = all(a.shape == x.shape and a.dtype == x.dtype for a in others)
    return x if fits and not kwargs and x.is_floating_point() else None


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias, mean, var, training = args[:6]
    if training or kwargs or not _plain(x) or x.dim() < 2:
        return None
    vectors = [v for v in (weight, bias, mean, var) if v is not None]
    if any(tuple(v.shape) != (x.shape[1],) or v.dtype != x.dtype for v in vectors):
        return None
    return _like(x), _new(x, 0), _new(x, 0)


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = args[:3]
    if args[6] or kwargs or not _plain(x) or not _plain(weight) or x.dtype != weight.dtype:
        return None
    n = x.dim() - 2
    if n < 1 or weight.dim() != n + 2:
        return None
    how = Convolution.of(args)
    if x.shape[1] != weight.shape[1] * how.groups or weight.shape[0] % how.groups:
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return None
    sizes = []
    for i in range(n):
        reach = how.dilation[i] * (weight.shape[2 + i] - 1) + 1
        size = (x.shape[2 + i] + 2 * how.padding[i] - reach) // how.stride[i] + 1
        if size < 1:
            return None
        sizes.append(size)
    return _new(x, x.shape[0], weight.shape[0], *sizes)


def _product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``mm`` and ``bmm``, and ``addmm`` with a bias in front."""
    *bias, a, b = args
    if kwargs or not a.is_floating_point() or any(t.dtype != a.dtype for t in (*bias, b)):
        return None
    if (
        a.dim() != b.dim()
        or a.dim() not in (2, 3)
        or a.shape[-1] != b.shape[-2]
        or a.shape[:-2] != b.shape[:-2]
    ):
        return None
    if any(tuple(t.shape) != (b.shape[-1],) for t in bias):
        return None
    return _new(a, *a.shape[:-1], b.shape[-1])


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = (*args, None)[:3]
    if kwargs or not _plain(x) or x.dtype != weight.dtype or weight.dim() != 2 or not x.dim():
        return None
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.dtype != x.dtype):
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return None
    return _new(x, *x.shape[:-1], weight.shape[0])


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dims, keepdim = (*args, False)[:3]
    if kwargs or not _plain(x) or not dims or not keepdim:
        return None
    reduced = {d % x.dim() for d in dims}
    return _new(x, *(1 if d in reduced else size for d, size in enumerate(x.shape)))


def _cat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors, dim = (*args, 0)[:2]
    first = tensors[0] if tensors else None
    if kwargs or first is None or not all(_plain(t) and t.dtype == first.dtype for t in tensors):
        return None
    shape = list(first.shape)
    if not -len(shape) <= dim < len(shape):
        return None
    dim %= len(shape)
    others = shape[:dim] + shape[dim + 1 :]
    shapes = [list(t.shape) for t in tensors]
    if any(len(s) != len(shape) or s[:dim] + s[dim + 1 :] != others for s in shapes):
        return None
    shape[dim] = sum(s[dim] for s in shapes)
    return _new(first, *shape)


def _softmax(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    return _like(x) if _plain(x) and not kwargs and len(args) > 1 and args[2:] in ((), (False,)) else None


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape, weight, bias = args[:4]
    n = len(shape)
    if kwargs or not _plain(x) or tuple(x.shape[-n:]) != tuple(shape):
        return None
    if any(v is not None and (tuple(v.shape) != tuple(shape) or v.dtype != x.dtype) for v in (weight, bias)):
        return None
    statistics = _new(x, *x.shape[:-n], *[1] * n)
    return _like(x), statistics, _like(statistics)


SHORTCUTS: dict[Any, Shortcut] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor], _binary),
    **dict.fromkeys(
        [op.default for op in (aten.relu, aten.relu6, aten.sigmoid, aten.silu, aten.gelu, aten.hardtanh,
                               aten.hardswish, aten.hardsigmoid, aten.tanh, aten.leaky_relu, aten.elu)],
        _unary,
    ),
    **dict.fromkeys(
        [op.default for op in (aten.relu_, aten.sigmoid_, aten.silu_, aten.hardtanh_, aten.hardswish_,
                               aten.hardsigmoid_, aten.tanh_, aten.leaky_relu_, aten.elu_)],
        _in_place,
    ),
    **dict.fromkeys([aten.mm.default, aten.bmm.default, aten.addmm.default], _product),
    aten.linear.default: _linear,
    **dict.fromkeys([aten._softmax.default, aten._safe_softmax.default], _softmax),
    **dict.fromkeys([aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar], _binary),
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    **SHAPES,
    aten.add_.Tensor: _in_place,
    aten.mul_.Tensor: _in_place,
}  # fmt: skip
