"""Dropout, which follows ``train()`` and ``eval()`` of the result."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    VECTOR,
    case,
    conv,
)


class DropPath(nn.Module):
    """Drops whole samples while training, as vision libraries write it."""

    def forward(self, x):
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)
        return x * keep


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "drop": DropPath(), "c": conv(8, 4)}, "a b c")
def drop_path(net, x):
    x = net.a(x)
    return net.c(x + net.drop(net.b(x)))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "drop": nn.Dropout(0.5), "b": nn.Linear(12, 4)}, "a b")
def dropout_module_and_function(net, x):
    return net.b(F.dropout(net.drop(net.a(x)), 0.3, training=net.training))


@case(IMAGE, lambda: {"a": conv(3, 8), "drop": nn.Dropout2d(0.5), "b": conv(8, 4)}, "a b")
def dropout_of_channels(net, x):
    return net.b(F.dropout2d(net.drop(net.a(x)), 0.3, net.training))
