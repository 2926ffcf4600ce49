"""Picking by value: boxes, top-k, sorting, gathering."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torchvision import ops

from .cases import (
    IMAGE,
    VECTOR,
    Layers,
    case,
    conv,
)


def one_map() -> Layers:
    return {
        "a": conv(3, 12),
        "b": conv(12, 8),
        "box": conv(8, 4, 1),
        "score": conv(8, 1, 1),
        "c": nn.Linear(8, 4),
    }


@case(IMAGE[:1], one_map, "a b c", batch_dim=None)
def suppressed_boxes(net, x):
    """How many are left is a matter of values; the channels of what is picked are not."""
    x = net.b(torch.relu(net.a(x)))
    corner, size = net.box(x)[0].flatten(1).t().chunk(2, 1)
    boxes, scores = torch.cat([corner, corner + size.abs()], 1), net.score(x).flatten()
    kept = ops.batched_nms(boxes, scores, (scores > 0).long(), 0.5)[:20]
    features = x[0].flatten(1).t()
    return boxes[torchvision.ops.nms(boxes, scores, 0.5)], net.c(features[kept]), net.c(features[scores > 0])


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(4, 4)},
    "",
    frozen={"a.weight[0]": "topk|gather|index"},
    shrinks=False,
)
def topk_over_channels(net, x):
    return net.b(net.a(x).topk(4, dim=1)[0])


@case(
    (VECTOR, torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(0))),
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(5, 4)},
    "",
    frozen={"a.weight[0]": "gather|index"},
    shrinks=False,
)
def gather_over_channels(net, x, index):
    return net.b(torch.gather(net.a(x), 1, index))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)},
    "",
    frozen={"a.weight[0]": "argmax|index|result"},
    shrinks=False,
)
def argmax_over_channels(net, x):
    x = net.a(x)
    return net.b(x), x.argmax(-1)


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 8), "c": nn.Linear(8, 4)},
    "b c",
    frozen={"a.weight[0]": "sort"},
)
def sort_over_channels(net, x):
    return net.c(net.b(net.a(x).sort(dim=1)[0]))
