"""Arguments by keyword where most networks give them by position."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .cases import IMAGE, TOKENS, case, conv, parameter, two_convs


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8, 4, 3, 3), "b": conv(8, 4)}, "a w b")
def keywords_of_a_grouped_convolution(net, x):
    return net.b(F.conv2d(input=net.a(x), weight=net.w, padding=1, groups=2))


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8, 4, 3, 3), "b": conv(8, 4)}, "a w b")
def weight_of_a_grouped_convolution_by_keyword(net, x):
    return net.b(F.conv2d(net.a(x), weight=net.w, padding=1, groups=2))


@case(IMAGE, two_convs(8, 4), "a b")
def keywords_of_chunk(net, x):
    return net.b(torch.chunk(input=net.a(x), chunks=2, dim=1)[1])


@case(IMAGE, two_convs(8, 4), "a b")
def keywords_of_narrow(net, x):
    return net.b(torch.narrow(input=net.a(x), dim=1, start=2, length=4))


@case(IMAGE, two_convs(), "a b")
def keywords_of_select(net, x):
    x = net.a(x)
    return net.b(x * torch.select(input=x, dim=0, index=1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": nn.Linear(512, 4)}, "a b", batch_dim=None)
def keywords_of_reshape(net, x):
    return net.b(torch.reshape(input=net.a(x), shape=(2, 512)))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": nn.Linear(8, 4)}, "a b")
def keywords_of_squeeze(net, x):
    return net.b(torch.squeeze(input=net.a(x).mean(dim=(2, 3), keepdim=True), dim=(2, 3)))


@case(IMAGE, two_convs(), "a b")
def keywords_of_a_channel_shuffle(net, x):
    x = torch.unflatten(input=net.a(x), dim=1, sizes=(2, 4))
    return net.b(torch.flatten(input=torch.transpose(input=x, dim0=1, dim1=2), start_dim=1, end_dim=2))


@case(IMAGE, two_convs(), "a b")
def keywords_of_where(net, x):
    """The input is not the first argument here."""
    x = net.a(x)
    return net.b(torch.where(condition=x > 0, input=x, other=x * 0.1))


@case(IMAGE, two_convs(), "a b")
def keyword_of_size(net, x):
    x = net.a(x)
    return net.b(x * x.size(dim=1))


@case(IMAGE, lambda: {"a": conv(3, 8), "split": nn.Unflatten(1, (2, 4)), "b": conv(8, 4)}, "a b")
def keywords_of_modules(net, x):
    return net.b(input=net.split(input=net.a(input=x)).flatten(1, 2))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "attend": nn.MultiheadAttention(8, 2, batch_first=True),
             "b": nn.Linear(8, 4)},
    "a attend.in_proj_weight b",
)  # fmt: skip
def keywords_of_attention(net, x):
    x = net.a(x)
    return net.b(net.attend(query=x, key=x, value=x, need_weights=False)[0])


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def keywords_of_a_range(net, x):
    """Of its overloads one begins with the end, the other with the start."""
    x = net.a(x)
    places = torch.arange(start=1, end=x.shape[1] + 1, dtype=torch.float32, device=x.device)
    return net.b(x * places[:, None])


@case(IMAGE, two_convs(), "a b")
def keywords_of_numpy(net, x):
    x = net.a(x)
    return net.b(x * torch.sum(input=x.new_ones(2, 1, 1, 1), axis=0, keepdims=True))
