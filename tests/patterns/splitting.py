"""Channels that are split, sliced, chunked, concatenated and stacked."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    TOKENS,
    VECTOR,
    Layers,
    case,
    conv,
    parameter,
    two_linears,
)


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 24), "b": nn.Linear(8, 4), "c": nn.Linear(10, 4), "d": nn.Linear(6, 4)},
    "a b c d",
)
def split_by_literal_sizes(net, x):
    p, q, r = net.a(x).split([8, 10, 6], dim=-1)
    return net.b(p) + net.c(q) * net.d(r)


@case(VECTOR, lambda: {"a": nn.Linear(6, 24), "b": nn.Linear(8, 4)}, "a b")
def split_by_one_literal_size(net, x):
    p, q, r = torch.split(net.a(x), 8, 1)
    return net.b(p * q + r)


@case(VECTOR, lambda: {"a": nn.Linear(6, 20), "b": nn.Linear(8, 4), "c": nn.Linear(4, 4)}, "a b c")
def split_with_an_uneven_rest(net, x):
    p, q, r = net.a(x).split(8, dim=1)
    return net.b(p) + net.b(q) + net.c(r)


@case(VECTOR, lambda: {"a": nn.Linear(6, 20), "b": nn.Linear(7, 4), "c": nn.Linear(6, 4)}, "a b c")
def tensor_split(net, x):
    p, q, r = torch.tensor_split(net.a(x), 3, dim=1)
    return net.b(p) + net.b(q) + net.c(r)


@case(IMAGE, lambda: {"a": conv(3, 12), "b": conv(6, 4)}, "a b")
def gate_by_chunk(net, x):
    value, gate = net.a(x).chunk(2, dim=1)
    return net.b(value * torch.sigmoid(gate))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 4)}, "a b")
def gate_by_glu_function(net, x):
    return net.b(F.glu(net.a(x), dim=-1))


@case(IMAGE, lambda: {"a": conv(3, 12), "gate": nn.GLU(dim=1), "b": conv(6, 4)}, "a b")
def gate_by_glu_module(net, x):
    return net.b(net.gate(net.a(x)))


@case(TOKENS, lambda: {"up": nn.Linear(12, 32), "down": nn.Linear(16, 12)}, "up down")
def swiglu_in_one_matrix(net, x):
    gate, value = net.up(x).chunk(2, dim=-1)
    return x + net.down(F.silu(gate) * value)


@case(
    TOKENS,
    lambda: {"up": nn.Linear(12, 16), "gate": nn.Linear(12, 16), "down": nn.Linear(16, 12)},
    "up gate down",
)
def swiglu_in_two_matrices(net, x):
    return x + net.down(F.silu(net.gate(x)) * net.up(x))


@case(VECTOR, two_linears(12, 5), "a b")
def slice_up_to(net, x):
    return net.b(net.a(x)[:, :5])


@case(VECTOR, two_linears(12, 7), "a b")
def slice_from(net, x):
    return net.b(net.a(x)[:, 5:])


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(5, 4), "c": nn.Linear(7, 4)}, "a b c")
def slice_both_halves(net, x):
    x = net.a(x)
    return net.b(x[:, :5]) + net.c(x[:, 5:])


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(8, 4), "c": nn.Linear(9, 4)}, "a b c")
def slices_that_overlap(net, x):
    x = net.a(x)
    return net.b(x[:, :8]) + net.c(x[:, 3:])


@case(VECTOR, two_linears(12, 6), "a b")
def slice_every_second(net, x):
    return net.b(net.a(x)[:, ::2])


@case(IMAGE, lambda: {"a": conv(3, 12), "b": conv(6, 4)}, "a b")
def slice_every_second_channel_and_pixel(net, x):
    return net.b(net.a(x)[:, ::2, ::2])


@case(IMAGE, lambda: {"a": conv(3, 12), "b": conv(12, 4)}, "a b")
def flip_along_channels_and_space(net, x):
    return net.b(net.a(x).flip(1, 3))


@case(IMAGE, lambda: {"a": conv(3, 12), "b": conv(12, 4), "order": nn.Buffer(torch.randperm(12))}, "a b")
def index_channels_and_slice_space(net, x):
    return net.b(net.a(x)[:, net.order, 2:, ::2])


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 4)}, "a b")
def slice_even_and_odd(net, x):
    x = net.a(x)
    return net.b(x[..., 0::2] * x[..., 1::2])


@case(VECTOR, two_linears(12, 6), "a b")
def slice_with_negative_bounds(net, x):
    return net.b(net.a(x)[:, -8:-2])


@case(VECTOR, two_linears(12, 9), "a b")
def slice_without_the_last(net, x):
    return net.b(net.a(x)[..., :-3])


@case(VECTOR, two_linears(12, 12), "a b")
def slice_beyond_the_end(net, x):
    return net.b(net.a(x)[:, :100])


@case(VECTOR, two_linears(12, 6), "a b")
def slice_by_half_the_size(net, x):
    x = net.a(x)
    half = x.shape[1] // 2
    return net.b(x[:, :half] + x[:, half:])


@case(IMAGE, lambda: {"a": conv(3, 12), "b": conv(4, 3), "c": conv(8, 3)}, "a b c")
def slice_channels_and_space(net, x):
    x = net.a(x)
    return net.b(x[:, :4, 1:-1, ::2]) + net.c(x[:, 4:, 1:-1, ::2])


@case(IMAGE, lambda: {"a": conv(3, 6), "b": conv(6, 4)}, "a b")
def integer_select_beside_a_conv(net, x):
    x = net.a(x)
    return net.b(x) * x[:, 2].unsqueeze(1)


@case(IMAGE, lambda: {"a": conv(3, 6), "b": conv(6, 4)}, "a b")
def integer_select_of_the_last(net, x):
    x = net.a(x)
    return net.b(x) + x[:, -1:] * torch.select(x, 1, -2)[:, None]


@case(VECTOR, two_linears(12, 5), "a b")
def narrow_method(net, x):
    return net.b(net.a(x).narrow(1, 4, 5))


@case(VECTOR, two_linears(12, 5), "a b")
def narrow_function(net, x):
    return net.b(torch.narrow(net.a(x), dim=-1, start=-5, length=5))


@case(VECTOR, two_linears(12, 4), "a b")
def index_by_a_list(net, x):
    return net.b(net.a(x)[:, [7, 0, 3, 3]])


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "order": nn.Buffer(torch.randperm(12))},
    "a b",
)
def index_by_a_buffer(net, x):
    return net.b(torch.index_select(net.a(x), 1, net.order))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "order": nn.Buffer(torch.randperm(12))},
    "a b",
)
def index_by_a_buffer_in_brackets(net, x):
    return net.b(net.a(x)[:, net.order])


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12)}, "qkv out")
def unbind_of_fused_qkv(net, x):
    n, t, c = x.shape
    q, k, v = net.qkv(x).reshape(n, t, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
    x = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1) @ v
    return net.out(x.transpose(1, 2).reshape(n, t, c))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 4)}, "a b")
def unbind_and_stack(net, x):
    p, q = net.a(x).view(-1, 2, 6).unbind(1)
    return net.b(torch.stack([q, p], dim=1).sum(1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(24, 4)}, "a b")
def repeat_along_channels(net, x):
    return net.b(net.a(x).repeat(1, 2))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(24, 4)}, "a b")
def repeat_interleave_along_channels(net, x):
    return net.b(net.a(x).repeat_interleave(2, dim=1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 8), "c": nn.Linear(8, 4)}, "a b c")
def slice_assignment(net, x):
    x = net.a(x)
    x[:, :4] = torch.tanh(x[:, 4:8])
    return net.c(net.b(x))


@case(IMAGE, lambda: {"a": conv(3, 4), "b": conv(3, 8), "c": conv(8, 4)}, "b c")
def slice_assignment_from_another_layer(net, x):
    y = net.b(x)
    y[:, :4] = net.a(x)
    return net.c(y)


@case(IMAGE, lambda: {"a": conv(3, 4), "b": conv(3, 4), "c": conv(8, 4)}, "c")
def slice_assignment_into_zeros(net, x):
    y = x.new_zeros(x.shape[0], 8, 8, 8)
    y[:, :4] = net.a(x)
    y[:, 4:] = net.b(x)
    return net.c(y)


def gated() -> Layers:
    return {"a": conv(3, 8), "gate": conv(3, 3, 1), "levels": nn.ModuleList(conv(8, 8) for _ in range(3)),
            "b": conv(8, 4)}  # fmt: skip


@case(IMAGE, gated, "a levels.0.weight b", frozen={"gate.weight[0]": "selected by its number"})
def gates_in_slices_of_one(net, x):
    gates, x = net.gate(x), net.a(x)
    total = 0
    for level, layer in enumerate(net.levels):
        x = layer(x)
        total = total + x * gates[:, level : level + 1]
    return net.b(total)


@case(TOKENS, lambda: {"t": parameter(1, 0, 4), "a": nn.Linear(12, 16), "b": nn.Linear(16, 4)}, "a b")
def cat_with_no_tokens(net, x):
    x = net.a(x)
    x = net.b(torch.cat([x, x[:, :0]], dim=1))
    return torch.cat([net.t.expand(x.shape[0], -1, -1), x], dim=1)
