"""Sizes, numbers, types and tensors that forward makes itself."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable
from torch.nn import functional as F

from .cases import (
    IMAGE,
    TOKENS,
    VECTOR,
    case,
    conv,
    two_linears,
)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(10, 4)}, "a b")
def zeros_concatenated(net, x):
    x = net.a(x)
    return net.b(torch.cat([x, torch.zeros(x.shape[0], 2, 8, 8, dtype=x.dtype)], 1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(10, 4)}, "a b")
def ones_concatenated_in_front(net, x):
    x = net.a(x)
    return net.b(torch.cat([x.new_ones(x.size(0), 2, x.size(2), x.size(3)), x], dim=1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(10, 4)}, "a b")
def coordinates_concatenated(net, x):
    x = net.a(x)
    n, _, h, w = x.shape
    rows = torch.arange(h, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w) / h
    columns = torch.linspace(-1, 1, w, dtype=x.dtype).expand(n, 1, h, w)
    return net.b(torch.cat([x, rows, columns], dim=1))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "table": nn.Buffer(torch.randn(5, 4)), "b": nn.Linear(12, 4)},
    "a b",
)
def buffer_concatenated(net, x):
    return net.b(torch.cat([net.a(x), net.table.expand(x.shape[0], -1, -1)], -1))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def arange_added(net, x):
    return net.b(F.relu(net.a(x) + 0.1 * torch.arange(8)))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def arange_of_the_width_added(net, x):
    x = net.a(x)
    return net.b(F.relu(x * torch.arange(x.shape[-1], dtype=x.dtype)))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "table": nn.Buffer(torch.randn(1, 5, 8)), "b": nn.Linear(8, 4)},
    "a b",
)
def buffer_added(net, x):
    return net.b(F.relu(net.a(x) + net.table))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def sinusoids_computed_in_forward(net, x):
    x = net.a(x)
    position = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    rate = torch.exp(torch.arange(0, 8, 2, dtype=x.dtype) * (-math.log(100.0) / 8))
    table = torch.cat([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)
    return net.b(x + table)


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def sinusoids_assigned_in_slices(net, x):
    x = net.a(x)
    position = torch.arange(5, dtype=x.dtype)[:, None]
    rate = torch.exp(torch.arange(0, 8, 2, dtype=x.dtype) * -0.5)
    table = torch.zeros(5, 8, dtype=x.dtype)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return net.b(x + table)


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12)}, "qkv out")
def rotary_table_of_interleaved_pairs(net, x):
    n, t, _ = x.shape
    q, k, v = net.qkv(x).view(n, t, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
    angle = torch.outer(torch.arange(t, dtype=x.dtype), torch.arange(3, dtype=x.dtype)).repeat_interleave(
        2, -1
    )

    def rotated(z):
        turned = torch.stack([-z[..., 1::2], z[..., ::2]], -1).reshape(z.shape)
        return z * angle.cos() + turned * angle.sin()

    x = F.scaled_dot_product_attention(rotated(q), rotated(k), v)
    return net.out(x.transpose(1, 2).reshape(n, t, 12))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12)}, "qkv out")
def rotary_table_computed_in_forward(net, x):
    n, t, _ = x.shape
    q, k, v = net.qkv(x).view(n, t, 3, 2, 6).permute(2, 0, 3, 1, 4)
    angle = torch.outer(torch.arange(t, dtype=x.dtype), 10.0 ** -(torch.arange(0, 6, 2, dtype=x.dtype) / 6))
    angle = torch.cat([angle, angle], -1)

    def rotated(z):
        left, right = z.chunk(2, dim=-1)
        return z * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    x = F.scaled_dot_product_attention(rotated(q), rotated(k), v)
    return net.out(x.transpose(1, 2).reshape(n, t, 12))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 16, stride=2), "c": conv(16, 4)}, "a b c")
def padded_shortcut(net, x):
    x = net.a(x)
    return net.c(F.relu(net.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 16), "c": conv(16, 4)}, "a b c")
def zeros_concatenated_to_a_shortcut(net, x):
    x = net.a(x)
    return net.c(net.b(x) + torch.cat([x, torch.zeros_like(x)], 1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8, padding=0), "c": conv(8, 4)}, "a b c")
def padded_space(net, x):
    x = F.pad(net.a(x), (1, 1, 1, 1))
    return net.c(F.pad(net.b(x), (2, 1, 0, 1), mode="reflect"))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 8),
        "pad": nn.ZeroPad2d(1),
        "b": conv(8, 8, padding=0),
        "other": nn.ReflectionPad2d(1),
        "c": conv(8, 4),
    },
    "a b c",
)
def padding_modules(net, x):
    return net.c(net.other(net.b(net.pad(net.a(x)))))


@case(IMAGE, lambda: {"a": conv(3, 12), "b": conv(12, 8), "c": conv(8, 4)}, "a b c")
def assertions(net, x):
    """On sizes that become smaller, on free ones, and on values."""
    x = net.a(x)
    torch._assert(x.shape[1] == 12, "twelve channels")
    torch._assert(x.shape[1] % 4 == 0, "in quarters")
    torch._assert(x.shape[0] % 2 == 0, "an even batch")
    x = net.b(x)
    torch._assert((x.abs() < 1e9).all(), "no overflow")
    return net.c(x)


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4), "w": nn.Parameter(torch.randn(8, 16)),
                       "v": nn.Parameter(torch.randn(16, 8))}, "a b w v")  # fmt: skip
def sizes_with_a_number_put_in(net, x):
    """``x.size()[:-1] + (16,)`` is a shape as a whole, of which one entry changes."""
    x = net.a(x)
    whole = x.size()[:-1] + (net.w.shape[1],)  # noqa: RUF005
    literal = x.shape[:-1] + (16,)  # noqa: RUF005
    y = torch.mm(x.view(-1, x.size(-1)), net.w).view(whole).relu().reshape(literal)
    return net.b(torch.mm(y.view(-1, 16), net.v).view(x.size()[:-1] + (8,)))  # noqa: RUF005


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, "a b")
def type_and_device_of_what_is_traced(net, x):
    """Both are asked for in control flow; the other branches cannot run."""
    x = net.a(x)
    if not torch.is_tensor(x):
        x = torch.tensor([x])
    if x.device.type != "cpu" or not x.is_cpu or x.shape[1] == 0:
        x = x.int()
    return net.b(x + torch.zeros(1, dtype=x.dtype, device=x.device))


@case(VECTOR, two_linears(), "a b")
def kind_of_what_is_traced(net, x):
    """How a tensor is stored, and its type as TorchScript asks for it, are no values of the inputs."""
    x = net.a(x)
    kinds = (torch.sparse_coo, torch.sparse_csr)
    if x.layout in kinds or x.is_sparse or x.is_quantized or x.is_nested or x.is_mkldnn:
        x = x.to_dense()
    if not x.is_floating_point() or torch.is_complex(x) or not x.is_contiguous() or x.element_size() < 2:
        x = x.relu()
    return net.b(x * 2 if torch.jit.isinstance(x, torch.Tensor) else x)


@case(VECTOR, two_linears(), "a b")
def width_as_alpha(net, x):
    x = net.a(x)
    return net.b(torch.add(x, F.relu(x), alpha=1 / x.shape[1]))


@case(VECTOR, two_linears(), "a b")
def width_as_a_bound(net, x):
    x = net.a(x)
    return net.b(x.clamp(max=1 / x.size(1), min=-x.size(1)))


@case(VECTOR, two_linears(), "a b")
def width_as_a_fill_value(net, x):
    x = net.a(x)
    return net.b(x * torch.full_like(x, x.shape[1]))


@case(VECTOR, two_linears(), "a b")
def width_as_a_divisor(net, x):
    x = net.a(x)
    return net.b(x) * x.sum(1, keepdim=True) / x.shape[1]


@case(VECTOR, two_linears(), "a b")
def width_in_an_eps(net, x):
    return F.layer_norm(net.b(y := net.a(x)), (4,), eps=1 / y.shape[-1])


@case(VECTOR, two_linears(), "a b")
def logarithm_of_the_width(net, x):
    x = net.a(x)
    return net.b(x) * math.log(x.shape[1])


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "table": torch.rand(12), "b": nn.Linear(12, 4)}, "a b")
def tensor_that_is_a_plain_attribute(net, x):
    return net.b(F.relu(net.a(x) * net.table))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "scale": torch.tensor(2.0), "mean": torch.rand(1, 3, 1, 1), "b": conv(8, 4)},
    "a b",
)
def scalar_tensors_that_are_plain_attributes(net, x):
    return net.b(net.a(x - net.mean) * net.scale)


@case(VECTOR, two_linears(), "a b")
def tensor_made_of_numbers(net, x):
    return net.b(net.a(x) * torch.tensor([1.0, 2.0] * 6))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "norm": nn.LayerNorm(8), "project": nn.Linear(8, 8),
                       "b": nn.Linear(8, 4)}, "a b", exact=False)  # fmt: skip
def sine_code_behind_a_normalisation(net, x):
    x = net.norm(net.a(x))
    code = 100 ** (2 * torch.arange(8, device=x.device, dtype=x.dtype) / 8)
    return net.b(x + net.project(1 / code))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "b c",
      frozen={"a.weight[0]": "resize_as_"})  # fmt: skip
def memory_that_is_resized(net, x):
    x = net.a(x)
    return net.c(net.b(x + x.new_empty(0).resize_as_(x).zero_()))


@case(VECTOR, two_linears(), "a b")
def limits_of_a_type(net, x):
    """As in masks of attention: the type is the result's own."""
    x = net.a(x)
    return net.b(torch.where(x > 0, x, torch.finfo(x.dtype).tiny)) * (
        x.shape[0] < torch.iinfo(torch.int8).max
    )


@case(VECTOR, two_linears(), "a b")
def precision_by_the_type_of_the_device(net, x):
    x = net.a(x)
    if x.device.type != "meta":
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = x.tanh()
    return net.b(x)


@case(TOKENS, lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 4)}, "a b")
def size_by_a_function_of_tensors(net, x):
    x, half = net.a(x), torch.div(x.shape[1] - 1, 2, rounding_mode="trunc")
    return net.b(torch.cat([x, x.new_zeros(x.shape[0], half + 1, 16)], dim=1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(10, 4)}, "a b")
def variables_of_old(net, x):
    """What PyTorch asked for before version 0.4."""
    x = Variable(net.a(x))
    assert isinstance(x, Variable)
    assert isinstance(x, (float, Variable))
    return net.b(torch.cat([x, torch.autograd.Variable(torch.zeros(len(x), 2, 8, 8), requires_grad=True)], 1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, "a b")
def shuffled_by_a_variable(net, x):
    x = net.a(x)
    return net.b(x.index_select(1, Variable(torch.arange(7, -1, -1))))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, "a b")
def a_mask_made_by_new(net, x):
    x = net.a(x)
    return net.b(x * Variable(x.data.new(x.size(0), 8, 1, 1).fill_(0.5)) + x.new([1.0]))


@case(VECTOR, two_linears(), "a b")
def numbers_of_numpy(net, x):
    return net.b((net.a(x) * np.sqrt(2.0)).clamp(max=np.float64(3.0)))


@case(VECTOR, two_linears(), "a b")
def sizes_of_numpy(net, x):
    return net.b(net.a(x).view(-1, np.int64(12)) + np.float32(0.5))
