"""Simulated quantisation: values are rounded to multiples of a scale, one for all or one a channel.

Rounding keeps zeros, since a zero point lies within the range. What observes the range of a tensor to set
the scale counts removed channels no longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..coupler import Coupler
from ..registry import module_rule, rule
from ..units import Label, Value

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_OBSERVED = "its range, by which it is quantised, is observed over this axis"


def _with_mask(args: Args, kwargs: Kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(args[0]), torch.empty_like(args[0], dtype=torch.bool)


def _alike(args: Args, kwargs: Kwargs) -> torch.Tensor:
    return torch.empty_like(args[0])


def _rounded(c: Coupler, x: torch.Tensor, channels: Sequence[torch.Tensor], axis: int) -> list[Label | None]:
    """Labels of ``x``, with which tensors that hold a number for each index of ``axis`` go along."""
    value = c.value(x)
    names = range(len(value.shape))
    operands: list[tuple[Value, Sequence[Any]]] = [(value, names)]
    operands += [(c.value(tensor), [axis]) for tensor in channels if tensor.dim() == 1]
    return c.unify(operands, names, lambda zeros: zeros[0])[0]


def _put(c: Coupler, out: Any, labels: Sequence[Label | None]) -> None:
    for result in [out] if isinstance(out, torch.Tensor) else out:
        c.put(result, labels)


@rule(
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    shapes=_with_mask,
)
def fake_quantize(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    _put(c, out, _rounded(c, args[0], (), 0))


@rule("fake_quantize_per_channel_affine_cachemask", shapes=_with_mask)
def fake_quantize_channels(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``scale`` and ``zero_point`` hold a number for each index of dimension ``args[3]``."""
    _put(c, out, _rounded(c, args[0], args[1:3], args[3]))


@rule("_fake_quantize_learnable_per_tensor_affine", shapes=_alike)
def fake_quantize_learnable(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    fake_quantize(c, args, kwargs, out)


@rule("_fake_quantize_learnable_per_channel_affine", shapes=_alike)
def fake_quantize_learnable_channels(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    fake_quantize_channels(c, args, kwargs, out)


@rule("_fused_moving_avg_obs_fq_helper")
def observe_and_quantize(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Ranges, scales and zero points ``args[3:7]``; with ``args[11]`` they lie along ``args[10]``."""
    by_channel, axis = len(args) > 11 and args[11], args[10]
    labels = _rounded(c, args[0], args[3:7] if by_channel else (), axis)
    for dim, label in enumerate(labels):
        if label is not None and not (by_channel and dim == axis):
            c.mark_inexact(label, _OBSERVED)
    _put(c, out, labels)


def _same_shape(module: nn.Module, args: Args, kwargs: Kwargs) -> torch.Tensor:
    return torch.empty_like(args[0])


@module_rule("torch.ao.quantization.observer.ObserverBase", _same_shape)
@module_rule("torch.ao.quantization.fake_quantize.FakeQuantizeBase", _same_shape)
def quantizer(c: Coupler, module: nn.Module, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Observers hand on what they get; what rounds it may observe it before.

    Ranges, scales and zero points of channels go along with these.
    """
    x, scheme = args[0], getattr(module, "qscheme", torch.per_tensor_affine)
    by_channel = scheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    axis: Any = getattr(module, "ch_axis", 0) % max(x.dim(), 1)
    width = x.shape[axis] if by_channel and x.dim() else 1
    channels = [buffer for buffer in module.buffers() if width > 1 and tuple(buffer.shape) == (width,)]
    labels = _rounded(c, x, channels, axis)
    if _observes(c, getattr(module, "observer_enabled", None)):
        for dim, label in enumerate(labels):
            if label is not None and not (by_channel and dim == axis):
                c.mark_inexact(label, _OBSERVED)
    _put(c, out, labels)


def _observes(c: Coupler, switch: torch.Tensor | None) -> bool:
    """Whether what rounds observes ranges as well: unless its switch is known to be off."""
    state = c.value(switch).state if switch is not None else None
    if state is None:
        return False
    return state.tensor is None or state.tensor.device.type == "meta" or bool(state.tensor[0])
