"""Plain leaf modules, interpreted without running their ``forward``.

Which ATen calls a plain ``Conv2d`` or ``ReLU`` makes follows from its attributes. Making them directly saves
``nn.Module.__call__``, the functional layer and the dispatcher, which take longer than the rules themselves.
Only these types, and subclasses that change nothing of what they compute, are covered, without hooks and in
their plain case: for any other a function here returns None, and the module runs.
``tests/test_leaf_calls.py`` holds them against the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..module_registry import own_kind

Own = Callable[[str], torch.Tensor | None]
"""A module's own parameter or buffer by name, None where it has none."""
Call = Callable[..., Any]
"""Makes an ATen call: ``call(operator, *args)``."""
PlainCall = Callable[[Any, torch.Tensor, Own, Call], Any]
aten = torch.ops.aten

_OVERRIDABLE = frozenset(["forward", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
"""What would be an attribute of its own in a module that is not plain any more."""


def call_plain(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Callable[[str], torch.Tensor],
    make: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
) -> Any:
    """What ``module(*args, **kwargs)`` returns, or None where it has to run.

    Args:
        module: a leaf of the graph.
        args: meta tensors and values.
        kwargs: the same by name.
        tensor: gives the module's parameters and buffers by name.
        make: makes an ATen call, given the operator, its arguments and keyword arguments.
    """
    leaf = PLAIN_MODULES.get(own_kind(type(module)))  # type: ignore[arg-type]
    if leaf is None or len(args) != 1 or type(args[0]) is not torch.Tensor or kwargs:
        return None
    if module._forward_hooks or module._forward_pre_hooks or not _OVERRIDABLE.isdisjoint(module.__dict__):
        return None

    def own(name: str) -> torch.Tensor | None:
        held = module._parameters.get(name)
        return None if held is None and module._buffers.get(name) is None else tensor(name)

    def call(operator: Any, *values: Any) -> Any:
        return make(operator, values, {})

    return leaf(module, args[0], own, call)


def _identity(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    return x


def _dropout(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    return None if module.training else x


def _pointwise(
    operator: Any, in_place: Any, numbers: tuple[str, ...], module: Any, x: torch.Tensor, own: Own, call: Call
) -> Any:
    chosen = in_place if getattr(module, "inplace", False) else operator
    return call(chosen, x, *(float(getattr(module, name)) for name in numbers))


def _gelu(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    return call(aten.gelu.default, x) if module.approximate == "none" else None


def _convolution(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    n = len(module.kernel_size)
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or x.dim() != n + 2:
        return None
    sizes = [list(sizes) for sizes in (module.stride, module.padding, module.dilation)]
    weight, bias = own("weight"), own("bias")
    return call(aten.convolution.default, x, weight, bias, *sizes, False, [0] * n, module.groups)


def _linear(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    tensors = [tensor for tensor in (own("weight"), own("bias")) if tensor is not None]
    return call(aten.linear.default, x, *tensors) if x.dim() else None


def _batch_norm(ranks: tuple[int, ...], module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    if x.dim() not in ranks:
        return None
    mean, var, count = own("running_mean"), own("running_var"), own("num_batches_tracked")
    training = module.training or (mean is None and var is None)
    if training and x.numel() <= x.shape[1]:
        return None  # one value a channel, which is refused
    if module.training and module.track_running_stats:
        if count is None:
            return None
        call(aten.add_.Tensor, count, 1)
    elif module.training:
        mean = var = None
    tensors = (own("weight"), own("bias"), mean, var)
    momentum = module.momentum or 0.0  # None: an average over all batches, whose number no shape tells
    return call(aten.native_batch_norm.default, x, *tensors, training, momentum, module.eps)[0]


def _layer_norm(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    shape, weight, bias = list(module.normalized_shape), own("weight"), own("bias")
    return call(aten.native_layer_norm.default, x, shape, weight, bias, module.eps)[0]


def _global_average(module: Any, x: torch.Tensor, own: Own, call: Call) -> Any:
    if module.output_size not in (1, (1, 1)) or x.dim() != 4:
        return None
    return call(aten.mean.dim, x, [-1, -2], True)


PLAIN_MODULES: dict[type, PlainCall] = {
    nn.Identity: _identity,
    **dict.fromkeys([nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d], _dropout),
    nn.ReLU: partial(_pointwise, aten.relu.default, aten.relu_.default, ()),
    nn.ReLU6: partial(_pointwise, aten.hardtanh.default, aten.hardtanh_.default, ("min_val", "max_val")),
    nn.Hardtanh: partial(_pointwise, aten.hardtanh.default, aten.hardtanh_.default, ("min_val", "max_val")),
    nn.Hardswish: partial(_pointwise, aten.hardswish.default, aten.hardswish_.default, ()),
    nn.Hardsigmoid: partial(_pointwise, aten.hardsigmoid.default, aten.hardsigmoid_.default, ()),
    nn.SiLU: partial(_pointwise, aten.silu.default, aten.silu_.default, ()),
    nn.Sigmoid: partial(_pointwise, aten.sigmoid.default, None, ()),
    nn.Tanh: partial(_pointwise, aten.tanh.default, None, ()),
    nn.GELU: _gelu,
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], _convolution),
    nn.Linear: _linear,
    nn.BatchNorm1d: partial(_batch_norm, (2, 3)),
    nn.BatchNorm2d: partial(_batch_norm, (4,)),
    nn.BatchNorm3d: partial(_batch_norm, (5,)),
    nn.LayerNorm: _layer_norm,
    nn.AdaptiveAvgPool2d: _global_average,
}
