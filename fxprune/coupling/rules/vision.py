"""Operators and modules of torchvision: regions of interest, boxes, deformable convolution.

They are known by name, so that torchvision need not be installed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ...convolution import Convolution
from ..coupler import Coupler
from ..registry import module_rule, rule
from ..units import Label
from .contraction import convolve

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_BOXES = "coordinates of regions of interest"
_PICKED = "picked by a region of interest"


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``x: (N, C, H, W)``, ``rois: (R, 5) -> (R, C, h, w)``: each region is resampled by itself."""
    x = c.value(args[0])
    for dim in (0, 2, 3):
        c.freeze_dim(x, dim, _PICKED)
    c.freeze_value(c.value(args[1]), _BOXES)
    labels, _ = c.unify([(x, "nchw")], "rcyx")
    for result in [out] if isinstance(out, torch.Tensor) else out:
        c.put(result, labels)


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def ps_roi_align(c: Coupler, args: Args, kwargs: Kwargs, out: Any) -> None:
    """``x: (N, C h w, H, W)``, ``rois: (R, 5) -> (R, C, h, w)``: each place reads a channel of its own."""
    x = c.value(args[0])
    for dim in (0, 2, 3):
        c.freeze_dim(x, dim, _PICKED)
    c.freeze_value(c.value(args[1]), _BOXES)
    result = out[0]  # the second says which channel was read
    labels, _ = c.unify([(x, "nchw")], "rcyx")
    label = labels[1]
    if label is not None:
        places = label.ids.reshape(result.shape[1], -1)
        c.merge(places[:, :1], places, label.axis, label.axis)
        label = Label(places[:, 0], (), label.axis, label.zero, label.row)
    c.put(result, [None, label, None, None])


def _all_kept(args: Args, kwargs: Kwargs) -> torch.Tensor:
    return torch.empty(args[0].shape[0], dtype=torch.int64, device="meta")


@rule("torchvision::nms", shapes=_all_kept)
def nms(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """``boxes: (N, 4)``, ``scores: (N) -> (M)``, the numbers of those that are kept."""
    c.freeze_value(c.value(args[0]), "coordinates of boxes that are compared")
    c.freeze_value(c.value(args[1]), "scores of boxes that are compared")


@rule("torchvision::deform_conv2d")
def deform_conv2d(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """A convolution that reads where ``offset: (N, 2 G kh kw, H, W)`` says, weighted by a mask.

    With ``G`` groups of offsets, which channel reads by which offset follows from its number.
    """
    x, weight, offset, mask, bias = (c.value(t) for t in args[:5])
    stride, padding, dilation = tuple(args[5:7]), tuple(args[7:9]), tuple(args[9:11])
    how, offset_groups = Convolution(stride, padding, dilation, False, (0, 0), args[11]), args[12]
    c.freeze_value(offset, "offsets of a deformable convolution")
    c.freeze_value(mask, "weights of the places that a deformable convolution reads")
    if offset_groups > 1:
        c.freeze_dim(x, 1, "each channel reads by the offset of its group")
    convolve(c, x, weight, bias, how, out, {})


def _pooled(module: Any, args: Args, kwargs: Kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The feature maps that are read, and the boxes."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return [given["x"][name] for name in given["x"] if name in module.featmap_names], given["boxes"]


def _pooled_shape(module: Any, args: Args, kwargs: Kwargs) -> torch.Tensor:
    maps, boxes = _pooled(module, args, kwargs)
    return maps[0].new_empty((sum(map(len, boxes)), maps[0].shape[1], *module.output_size))


@module_rule("torchvision.ops.poolers.MultiScaleRoIAlign", _pooled_shape)
def multi_scale_roi_align(c: Coupler, module: nn.Module, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Maps ``(N, C, H_i, W_i)`` and boxes ``(R, 4) -> (R, C, h, w)``: each box is read from one of them."""
    maps, boxes = _pooled(module, args, kwargs)
    values = [c.value(t) for t in maps]
    for value in values:
        for dim in (0, 2, 3):
            c.freeze_dim(value, dim, _PICKED)
    for box in boxes:
        c.freeze_value(c.value(box), _BOXES)
    names = [[("n", i), "c", ("y", i), ("x", i)] for i in range(len(values))]
    labels, _ = c.unify(list(zip(values, names, strict=True)), "rchw")
    c.put(out, labels)
