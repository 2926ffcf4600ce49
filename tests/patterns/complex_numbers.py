"""Complex numbers, whose parts are an axis of their own."""

from __future__ import annotations

import torch
from torch import nn

from .cases import (
    IMAGE,
    TOKENS,
    case,
    conv,
)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "c")
def complex_values_over_space(net, x):
    x = torch.fft.rfft2(net.a(x), norm="ortho")
    return net.c(net.b(torch.fft.irfft2(x * 0.5, s=(8, 8), norm="ortho")))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def complex_rotation(net, x):
    z = torch.view_as_complex(net.a(x).reshape(-1, 5, 4, 2))
    z = z * torch.polar(torch.ones(5, 4), torch.arange(20.0).view(5, 4))
    return net.b(torch.view_as_real(z).flatten(2))
