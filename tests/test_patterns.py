"""Small networks, each with one awkward operator or idiom, judged by the oracle.

Each case is a forward function with its layers. ``narrows`` lists the parameters that must have become
smaller (``a`` stands for ``a.weight``), so that no case passes because nothing was pruned.
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from oracle import check
from torch import Tensor, library, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision import ops

import fxprune
from fxprune import capture
from fxprune.nn import TrainingFlag


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


VECTOR = _random(4, 6)
TOKENS = _random(2, 5, 12)
SERIES = _random(2, 3, 16)
IMAGE = _random(2, 3, 8, 8)
VOLUME = _random(2, 3, 4, 4, 4)
WORDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 0]])

Layers = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what is to become of it."""

    build: Callable[[], nn.Module]
    inputs: Any
    narrows: list[str]
    expected: dict[str, Any]


CASES: dict[str, Case] = {}


def case(
    inputs: Any, layers: Callable[[], Layers], narrows: str = "", **expected: Any
) -> Callable[[Any], Any]:
    """Register the decorated function as the ``forward`` of a network with these ``layers``.

    Args:
        inputs: what the network is called with.
        layers: makes modules and parameters, by name.
        narrows: names of parameters, or of modules for their ``weight``.
        expected: further arguments of the oracle. Groups must be exact unless it says otherwise.
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        kind = type(forward.__name__, (nn.Module,), {"forward": forward, "__module__": __name__})

        def build() -> nn.Module:
            torch.manual_seed(0)
            net = kind()
            for name, layer in layers().items():
                setattr(net, name, layer)
            return net

        made = layers()
        names = [
            n if "." in n or isinstance(made[n], nn.Parameter) else f"{n}.weight" for n in narrows.split()
        ]
        assert forward.__name__ not in CASES
        CASES[forward.__name__] = Case(build, inputs, names, {"exact": True, **expected})
        return forward

    return register


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, **{"padding": kernel // 2, **options})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


# -- moving channels ------------------------------------------------------------------------------


def two_convs(width: int = 8, into: int | None = None) -> Callable[[], Layers]:
    return lambda: {"a": conv(3, width), "b": conv(width if into is None else into, 4)}


def two_linears(width: int = 12, into: int | None = None) -> Callable[[], Layers]:
    return lambda: {"a": nn.Linear(6, width), "b": nn.Linear(width if into is None else into, 4)}


@case(IMAGE, two_convs(), "a b")
def channel_shuffle_by_sizes(net, x):
    x = net.a(x)
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    return net.b(x)


@case(IMAGE, two_convs(), "a b")
def channel_shuffle_by_literals(net, x):
    x = net.a(x).reshape(-1, 4, 2, 8, 8).permute(0, 2, 1, 3, 4).reshape(-1, 8, 8, 8)
    return net.b(x)


@case(IMAGE, lambda: {"a": conv(3, 8), "shuffle": nn.ChannelShuffle(4), "b": conv(8, 4)}, "a b")
def channel_shuffle_module(net, x):
    return net.b(net.shuffle(net.a(x)))


@case(IMAGE, two_convs(), "a b")
def channel_shuffle_function(net, x):
    return net.b(F.channel_shuffle(net.a(x), 2))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 8), "d": conv(8, 4)}, "a b c d")
def channel_shuffle_with_residual(net, x):
    x = net.a(x)
    for layer in (net.b, net.c):
        n, c, h, w = x.shape
        x = x + F.relu(layer(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))
    return net.d(x)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(4, 4), "c": conv(8, 4)}, "a b c")
def channel_split_and_shuffle(net, x):
    left, right = net.a(x).chunk(2, dim=1)
    x = torch.cat([left, net.b(right)], dim=1)
    n, c, h, w = x.shape
    return net.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w))


@case(IMAGE, lambda: {"a": conv(3, 8), "inner": nn.Linear(8, 8), "b": conv(8, 4)}, "a inner b")
def patches_by_way_of_batch_times_channels(net, x):
    x = net.a(x)
    n, c, h, w = x.shape
    x = x.reshape(n * c * (h // 2), 2, w // 2, 2).transpose(1, 2)
    x = x.reshape(n, c, (h // 2) * (w // 2), 4).transpose(1, 3)
    x = net.inner(x).transpose(1, 3).reshape(n * c * (h // 2), w // 2, 2, 2)
    return net.b(x.transpose(1, 2).reshape(n, c, h, w))


@case(TOKENS[:, :4, :6], two_linears(), "a b")
def tokens_permuted(net, x):
    x = net.a(x)
    n, t, c = x.shape
    x = x.view(n, 2, 2, c).permute(0, 2, 1, 3).reshape(n, t, c)
    return net.b(x)


@case(IMAGE, two_convs(), "a b")
def roll_along_channels(net, x):
    return net.b(torch.roll(net.a(x), 3, dims=1))


@case(IMAGE, two_convs(), "a b")
def roll_along_channels_and_space(net, x):
    return net.b(net.a(x).roll(shifts=(-3, 2), dims=(1, 3)))


@case(IMAGE, two_convs(), "a b")
def flip_along_channels(net, x):
    return net.b(torch.flip(net.a(x), [1]))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "a b c")
def flip_meets_what_was_flipped(net, x):
    y = net.a(x)
    return net.c(net.b(y) + y.flip(1, 2))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(4, 5), "c": conv(4, 5)}, "a b c")
def chunk_and_cat_with_a_moved_boundary(net, x):
    x = net.a(x)
    x = torch.cat([x[:, 3:], x[:, :3]], dim=1)
    left, right = x.chunk(2, dim=1)
    return net.b(left) + net.c(right)


@case(IMAGE, lambda: {"a": conv(3, 6), "b": conv(3, 6), "c": conv(4, 5), "d": conv(8, 5)}, "a b c d")
def cat_and_split_elsewhere(net, x):
    left, right = torch.cat([net.a(x), net.b(x)], 1).split([4, 8], dim=1)
    return net.c(left) + net.d(right)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": nn.Linear(8 * 8 * 8, 5)}, "a b")
def nhwc_flatten_linear(net, x):
    return net.b(net.a(x).permute(0, 2, 3, 1).flatten(1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6 * 64, 5)}, "a b c")
def nhwc_linear_flatten_linear(net, x):
    return net.c(F.relu(net.b(net.a(x).permute(0, 2, 3, 1))).reshape(-1, 384))


@case(IMAGE, lambda: {"a": conv(3, 8), "flat": nn.Flatten(), "b": nn.Linear(8 * 64, 5)}, "a b")
def flatten_module_linear(net, x):
    return net.b(net.flat(F.relu(net.a(x))))


@case(IMAGE, lambda: {"a": conv(3, 8, stride=2), "b": nn.Linear(8 * 16, 5)}, "a b")
def flatten_by_view_of_literals(net, x):
    return net.b(net.a(x).view(-1, 8 * 4 * 4))


@case(IMAGE, lambda: {"a": conv(3, 8, stride=2), "b": nn.Linear(8 * 16, 5)}, "a b")
def flatten_by_view_of_sizes(net, x):
    x = net.a(x)
    return net.b(x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)))


@case(IMAGE, lambda: {"a": conv(3, 8, stride=2), "b": nn.Linear(8 * 16, 5)}, "a b")
def flatten_by_the_last_size_left_open(net, x):
    x = net.a(x)
    return net.b(torch.reshape(x, (x.shape[0], -1)))


@case(IMAGE, lambda: {"a": conv(3, 8, stride=2), "b": nn.Linear(8, 6), "c": nn.Linear(6, 3)}, "a b c")
def patches_to_tokens(net, x):
    return net.c(torch.relu(net.b(net.a(x).flatten(2).transpose(1, 2)))).mean(1)


@case(VECTOR, lambda: {"a": nn.Linear(6, 32), "b": conv(8, 3)}, "a b")
def unflatten_into_a_map(net, x):
    return net.b(net.a(x).unflatten(1, (8, 2, 2)))


@case(VECTOR, lambda: {"a": nn.Linear(6, 32), "shape": nn.Unflatten(1, (8, 2, 2)), "b": conv(8, 3)}, "a b")
def unflatten_module(net, x):
    return net.b(net.shape(net.a(x)))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 32), "b": nn.ConvTranspose2d(8, 4, 2, stride=2), "c": conv(4, 3)},
    "a b c",
)
def generator_with_literal_view(net, x):
    return net.c(F.relu(net.b(net.a(x).view(-1, 8, 2, 2))))


# -- splitting and slicing ------------------------------------------------------------------------


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


# -- pixel shuffle --------------------------------------------------------------------------------


@case(IMAGE, lambda: {"a": conv(3, 16), "up": nn.PixelShuffle(2), "b": conv(4, 3)}, "a b")
def pixel_shuffle_module(net, x):
    return net.b(net.up(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 16), "b": conv(4, 3)}, "a b")
def pixel_shuffle_function(net, x):
    return net.b(F.pixel_shuffle(net.a(x), 2))


@case(IMAGE, lambda: {"a": conv(3, 16), "b": conv(4, 3)}, "a b")
def pixel_shuffle_by_hand(net, x):
    x = net.a(x)
    return net.b(x.view(-1, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(-1, 4, 16, 16))


@case(IMAGE, lambda: {"a": conv(3, 4), "down": nn.PixelUnshuffle(2), "b": conv(16, 3)}, "a b")
def pixel_unshuffle_module(net, x):
    return net.b(net.down(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 4), "b": conv(16, 3)}, "a b")
def pixel_unshuffle_function(net, x):
    return net.b(F.pixel_unshuffle(net.a(x), 2))


@case(IMAGE, lambda: {"a": conv(3, 4), "b": conv(16, 3)}, "a b")
def space_to_depth_by_slices(net, x):
    x = net.a(x)
    return net.b(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))


@case(IMAGE, lambda: {"a": conv(3, 4), "b": nn.Linear(4 * 9, 5)}, "a b")
def unfold_into_patches(net, x):
    return net.b(F.unfold(net.a(x), 3, padding=1).transpose(1, 2)).mean(1)


# -- parameters and functions in place of modules -------------------------------------------------


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "w": parameter(12, 8), "b": nn.Linear(8, 4)}, "a w b")
def einsum_with_a_parameter(net, x):
    return net.b(torch.einsum("bi,io->bo", net.a(x), net.w))


@case(
    TOKENS,
    lambda: {"w": parameter(12, 2, 6), "v": parameter(2, 6, 4)},
    shrinks=False,  # einsum flattens two axes of a parameter, which could go independently, into one
    frozen={"w[1]": "flattened"},
)
def einsum_with_heads(net, x):
    return torch.einsum("bthd,hdo->bto", torch.einsum("btc,chd->bthd", x, net.w).relu(), net.v)


@case(VECTOR, lambda: {"w": parameter(6, 12), "v": parameter(4, 12), "c": parameter(12)}, "w v c")
def matmul_with_parameters(net, x):
    return torch.matmul(torch.relu(x @ net.w + net.c), net.v.t())


@case(TOKENS, lambda: {"w": parameter(12, 16), "v": parameter(16, 4)}, "w v")
def matmul_of_three_dimensions(net, x):
    return torch.matmul(x, net.w).relu() @ net.v


@case(
    VECTOR,
    lambda: {"w": parameter(6, 12), "c": parameter(12), "v": parameter(12, 4), "d": parameter(4)},
    "w c v",
)
def addmm_with_parameters(net, x):
    return torch.addmm(net.d, torch.addmm(net.c, x, net.w).relu(), net.v)


@case(TOKENS, lambda: {"w": parameter(3, 12, 8), "v": parameter(3, 8, 4)}, "w v")
def batched_experts(net, x):
    x = x.reshape(1, -1, 12).expand(3, -1, -1)
    return torch.bmm(torch.bmm(x, net.w).relu(), net.v).sum(0)


@case(VECTOR, lambda: {"w": parameter(12, 6), "c": parameter(12), "v": parameter(4, 12)}, "w c v")
def functional_linear(net, x):
    return F.linear(F.relu(F.linear(x, net.w, net.c)), net.v)


@case(IMAGE, lambda: {"w": parameter(8, 3, 3, 3), "c": parameter(8), "v": parameter(4, 8, 1, 1)}, "w c v")
def functional_conv(net, x):
    return F.conv2d(F.relu(F.conv2d(x, net.w, net.c, padding=1)), net.v)


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "w": parameter(8, 1, 3, 3), "v": parameter(8), "b": conv(8, 4)},
    "a w v b",
)
def functional_depthwise_conv(net, x):
    return net.b(F.conv2d(net.a(x), net.w, net.v, padding=1, groups=8))


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8, 1, 3, 3), "b": conv(8, 4)}, "a w b")
def functional_depthwise_conv_by_size(net, x):
    x = net.a(x)
    return net.b(F.conv2d(x, net.w, None, 1, 1, 1, x.shape[1]))


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8, 4, 3, 3), "b": conv(8, 4)}, "a w b")
def functional_grouped_conv(net, x):
    return net.b(F.conv2d(net.a(x), net.w, padding=1, groups=2))


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8, 6, 2, 2), "b": conv(6, 4)}, "a w b")
def functional_transposed_conv(net, x):
    return net.b(F.conv_transpose2d(net.a(x), net.w, stride=2))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 8),
        "w": parameter(8),
        "c": parameter(8),
        "b": conv(8, 4),
        "mean": nn.Buffer(torch.randn(8)),
        "var": nn.Buffer(torch.rand(8) + 0.5),
    },
    "a w c b",
)
def functional_batch_norm(net, x):
    return net.b(F.batch_norm(net.a(x), net.mean, net.var, net.w, net.c, training=net.training))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 16), "w": parameter(16), "c": parameter(16), "b": nn.Linear(16, 4)},
    "a w c b",
    exact=False,
)
def functional_layer_norm_with_literals(net, x):
    return net.b(F.layer_norm(net.a(x), (16,), net.w, net.c, 1e-6))


@case(TOKENS, lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 4)}, "a b", exact=False)
def functional_layer_norm_with_sizes(net, x):
    x = net.a(x)
    return net.b(F.layer_norm(x, x.shape[-1:]))


@case(
    TOKENS, lambda: {"a": nn.Linear(12, 16), "w": parameter(16), "b": nn.Linear(16, 4)}, "a w b", exact=False
)
def functional_rms_norm(net, x):
    return net.b(F.rms_norm(net.a(x), [16], net.w))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "w": parameter(8), "c": parameter(8), "b": conv(8, 4)},
    "a w c b",
    exact=False,
)
def functional_group_norm(net, x):
    return net.b(F.group_norm(net.a(x), 2, net.w, net.c))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, "a b")
def functional_instance_norm(net, x):
    return net.b(F.instance_norm(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8), "b": conv(8, 4)}, "a w b")
def functional_prelu(net, x):
    return net.b(F.prelu(net.a(x), net.w))


@case(WORDS, lambda: {"table": parameter(10, 12), "b": nn.Linear(12, 4)}, "table b")
def functional_embedding(net, words):
    return net.b(F.embedding(words, net.table))


@case(VECTOR, lambda: {"a": nn.Bilinear(6, 6, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 4)}, "b c")
def bilinear_layer(net, x):
    return net.c(net.b(net.a(x, x)))


@case(VECTOR, lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 10), "c": nn.Linear(80, 4)}, "c")
def outer_product_flattened(net, x):
    return net.c((net.a(x).unsqueeze(2) * net.b(x).unsqueeze(1)).flatten(1))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 10), "w": parameter(8, 10)},
    "b w",
    frozen={"a.weight[0]": "flattened"},
)
def bilinear_form(net, x):
    return torch.einsum("bi,bj,ij->b", net.a(x), net.b(x), net.w)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(3, 6), "c": nn.Linear(48, 4)}, "c")
def bilinear_pooling(net, x):
    outer = torch.bmm(net.a(x).flatten(2), net.b(x).flatten(2).transpose(1, 2))
    return net.c(outer.flatten(1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 12)}, "a b")
def scalar_product_of_two_towers(net, x):
    return (net.a(x) * net.b(x)).sum(-1)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 12)}, "a b")
def similarity_matrix_of_two_towers(net, x):
    return net.a(x) @ net.b(x).T


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "scale": parameter(12), "shift": parameter(1, 12)},
    "a b scale shift",
)
def parameters_used_pointwise(net, x):
    return net.b(net.a(x) * net.scale + net.shift)


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "b": conv(8, 4), "bias": parameter(1, 8, 1, 1), "map": parameter(1, 8, 8, 8)},
    "a b bias map",
)
def parameters_of_four_dimensions(net, x):
    return net.b(F.relu(net.a(x) + net.bias) + net.map)


# -- sharing, tying, freezing, leaving unused -----------------------------------------------------


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 12), "c": nn.Linear(12, 4)}, "a b c")
def module_called_twice(net, x):
    return net.c(F.relu(net.b(F.relu(net.b(net.a(x))))))


@case((VECTOR, VECTOR.flip(0)), lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(24, 4)}, "a b")
def siamese_towers(net, x, y):
    return net.b(torch.cat([net.a(x), net.a(y)], 1))


def tied(*names: str, **layers: Any) -> Layers:
    """The layers with the weight of the first name in all of them."""
    for name in names[1:]:
        layers[name].weight = layers[names[0]].weight
    return layers


@case(
    VECTOR,
    lambda: tied("b", "c", a=nn.Linear(6, 12), b=nn.Linear(12, 12), c=nn.Linear(12, 12), d=nn.Linear(12, 4)),
    "a b c d",
)
def two_layers_share_a_weight(net, x):
    return net.d(F.relu(net.c(F.relu(net.b(net.a(x))))))


@case(VECTOR, lambda: tied("a", "b", a=nn.Linear(6, 12), b=nn.Linear(6, 12), c=nn.Linear(12, 4)), "a b c")
def parallel_layers_share_a_weight(net, x):
    return net.c(net.a(x) * net.b(x.relu()))


@case(
    WORDS,
    lambda: tied(
        "words", "head", words=nn.Embedding(10, 12), b=nn.Linear(12, 12), head=nn.Linear(12, 10, bias=False)
    ),
    "words b head",
    frozen={"words.weight[0]": "looked up|output"},
)
def tied_embedding_and_head(net, words):
    x = net.words(words)
    return net.head(x + torch.tanh(net.b(x)))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 6)}, "a b a.bias")
def weight_used_transposed(net, x):
    return F.linear(net.a(x), net.a.weight.t()) + net.b(net.a(x))


@case(
    VECTOR,
    lambda: {
        "a": nn.Linear(6, 12).requires_grad_(False),
        "n": nn.BatchNorm1d(12).requires_grad_(False),
        "b": nn.Linear(12, 4),
    },
    "a n b",
)
def layers_without_gradient(net, x):
    return net.b(net.n(net.a(x)))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "spare": nn.Linear(12, 12), "w": parameter(12), "b": nn.Linear(12, 4)},
    "a b",
)
def parameters_that_are_not_used(net, x):
    return net.b(net.a(x))


@case(IMAGE, lambda: {"a": conv(3, 1), "b": conv(1, 8), "c": conv(8, 1), "d": conv(1, 4)}, "b c")
def layers_of_one_channel(net, x):
    return net.d(net.c(F.relu(net.b(net.a(x)))))


@case(_random(2, 1, 8, 8), lambda: {"a": conv(1, 8), "n": nn.BatchNorm2d(8), "b": conv(8, 1)}, "a n b")
def inputs_and_outputs_of_one_channel(net, x):
    return net.b(net.n(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 1), "b": conv(3, 8), "c": conv(8, 4)}, "b c")
def one_channel_gate_broadcast(net, x):
    return net.c(net.b(x) * torch.sigmoid(net.a(x)))


@case(
    VECTOR,
    lambda: {"layers": nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)])},
    "layers.0.weight layers.1.weight layers.2.weight",
)
def module_list_in_a_loop(net, x):
    for i, layer in enumerate(net.layers):
        x = layer(x) if i == 0 else layer(F.relu(x))
    return x


@case(
    VECTOR,
    lambda: {
        "layers": nn.ModuleDict(
            {"one": nn.Linear(6, 12), "two": nn.Linear(12, 12), "three": nn.Linear(12, 4)}
        )
    },
    "layers.one.weight layers.two.weight layers.three.weight",
)
def module_dict_in_a_loop(net, x):
    for layer in net.layers.values():
        x = torch.tanh(layer(x))
    return x


@case(
    VECTOR,
    lambda: {"ws": nn.ParameterList([parameter(6, 12), parameter(12, 12), parameter(12, 4)])},
    "ws.0 ws.1 ws.2",
)
def parameter_list_in_a_loop(net, x):
    for w in net.ws:
        x = torch.tanh(x @ w)
    return x


# -- inputs and outputs ---------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


@case(([VECTOR, VECTOR.flip(0)],), two_linears(), "a b")
def inputs_in_a_list(net, xs):
    return net.b(sum(net.a(x) for x in xs))


@case(
    ({"image": IMAGE, "meta": {"vector": VECTOR[:2]}},),
    lambda: {"a": conv(3, 8), "b": nn.Linear(6, 8), "c": nn.Linear(8, 4)},
    "a b c",
)
def inputs_in_a_nested_dict(net, batch):
    return net.c(net.a(batch["image"]).mean((2, 3)) * net.b(batch["meta"]["vector"]))


@case(((VECTOR, (VECTOR.flip(0),)),), two_linears(), "a b")
def inputs_in_nested_tuples(net, pair):
    x, (y,) = pair
    return net.b(net.a(x) - net.a(y))


@case({"x": VECTOR, "y": VECTOR.flip(0)}, two_linears(), "a b")
def inputs_by_keyword(net, x, *, y):
    return net.b(net.a(x) * net.a(y))


@case((VECTOR, VECTOR.flip(0)), two_linears(), "a b")
def inputs_of_any_number(net, *xs):
    return net.b(sum(net.a(x) for x in xs))


@case({"x": VECTOR, "y": VECTOR.flip(0)}, two_linears(), "a b")
def inputs_by_any_keyword(net, **xs):
    return net.b(net.a(xs["x"]) * net.a(xs["y"]))


@case((VECTOR,), two_linears(), "a b")
def inputs_only_by_position(net, x, /):
    return net.b(net.a(x))


@case(VECTOR, two_linears(), "a b")
def inputs_with_defaults(net, x, scale=2.0, mask=None):
    x = net.a(x) * scale
    return net.b(x if mask is None else x * mask)


@case({"x": VECTOR, "scale": 3.0, "relu": True}, two_linears(), "a b")
def inputs_that_are_no_tensors(net, x, scale=2.0, relu=False):
    x = net.a(x) * scale
    return net.b(F.relu(x) if relu else x)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "c": nn.Linear(12, 3)}, "a b c")
def outputs_in_a_dict(net, x):
    x = net.a(x)
    return {"class": net.b(x), "box": (net.c(x), x.shape[0])}


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "c": nn.Linear(12, 3)}, "a b c")
def outputs_in_a_tuple(net, x):
    x = net.a(x)
    return net.b(x), None, [net.c(x)]


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "c": nn.Linear(12, 3)}, "a b c")
def outputs_in_a_namedtuple(net, x):
    x = net.a(x)
    return Pair(net.b(x), right=net.c(x))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 8), "c": nn.Linear(8, 3)},
    "b c",
    frozen={"a.weight[0]": "output of the model"},
)
def features_among_the_outputs(net, x):
    x = net.a(x)
    return net.c(net.b(x)), x


@case((IMAGE, VECTOR[:2]), lambda: {"a": conv(3, 8), "b": nn.Linear(6, 8), "c": nn.Linear(16, 4)}, "a b c")
def two_inputs_of_different_kinds(net, image, vector):
    return net.c(torch.cat([net.a(image).amax((2, 3)), net.b(vector)], dim=-1))


@case(VECTOR, two_linears(), "a b")
def control_flow_on_shapes(net, x):
    x = net.a(x)
    if x.dim() == 2 and x.shape[1] > 3:
        x = F.relu(x)
    for _ in range(x.shape[-1] // 6):
        x = torch.tanh(x)
    return net.b(x)


# -- constants made in the graph ------------------------------------------------------------------


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


# -- convolutions ---------------------------------------------------------------------------------


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 16, groups=2), "c": conv(16, 4)}, "a b c")
def grouped_conv_that_widens(net, x):
    return net.c(F.relu(net.b(net.a(x))))


@case(IMAGE, lambda: {"a": conv(3, 16), "b": conv(16, 8, groups=4), "c": conv(8, 4)}, "a b c")
def grouped_conv_that_reduces(net, x):
    return net.c(F.relu(net.b(net.a(x))))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=8), "n": nn.BatchNorm2d(8), "c": conv(8, 4)},
    "a b n c",
)
def depthwise_conv(net, x):
    return net.c(net.n(net.b(net.a(x))))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 24, groups=8), "c": conv(24, 4)}, "a b c")
def depthwise_conv_with_a_multiplier(net, x):
    return net.c(F.relu(net.b(net.a(x))))


@case(IMAGE, lambda: {"a": conv(3, 16), "b": conv(16, 4, groups=4), "c": conv(4, 4)}, "a b c")
def grouped_conv_to_one_channel_a_group(net, x):
    return net.c(F.relu(net.b(net.a(x))))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=2), "c": conv(8, 12, groups=4), "d": conv(12, 4)},
    "d",
)
def grouped_convs_in_a_row(net, x):
    return net.d(net.c(F.relu(net.b(net.a(x)))))


@case(IMAGE, lambda: {"a": conv(3, 12, groups=3), "b": conv(12, 4)}, "a b")
def grouped_conv_of_the_input(net, x):
    return net.b(net.a(x))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4, groups=2)}, "a b")
def grouped_conv_into_the_output(net, x):
    return net.b(net.a(x))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=2), "c": conv(8, 4)}, "a b c")
def grouped_conv_in_a_residual(net, x):
    x = net.a(x)
    return net.c(x + net.b(x))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(4, 8), "c": conv(16, 12, groups=2), "d": conv(12, 4)}, "d")
def grouped_conv_after_chunk_and_cat(net, x):
    x = net.a(x)
    left, _ = x.chunk(2, 1)
    return net.d(net.c(torch.cat([x, net.b(left)], 1)))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 6, 2, stride=2), "c": conv(6, 4)}, "a b c")
def transposed_conv(net, x):
    return net.c(F.relu(net.b(net.a(x))))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), "c": conv(12, 4)},
    "a b c",
)
def grouped_transposed_conv(net, x):
    return net.c(F.relu(net.b(net.a(x))))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), "c": conv(8, 4)},
    "a b c",
)
def depthwise_transposed_conv(net, x):
    return net.c(net.b(net.a(x)))


@case(
    IMAGE, lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 16, 2, groups=8), "c": conv(16, 4)}, "a b c"
)
def depthwise_transposed_conv_with_a_multiplier(net, x):
    return net.c(net.b(net.a(x)))


@case(
    SERIES,
    lambda: {
        "a": nn.Conv1d(3, 8, 3),
        "n": nn.BatchNorm1d(8),
        "b": nn.Conv1d(8, 8, 3, groups=2),
        "c": nn.ConvTranspose1d(8, 4, 3),
    },
    "a n b c",
)
def convs_of_one_dimension(net, x):
    return net.c(net.b(F.relu(net.n(net.a(x)))))


@case(
    VOLUME,
    lambda: {
        "a": nn.Conv3d(3, 8, 3, padding=1),
        "n": nn.BatchNorm3d(8),
        "b": nn.Conv3d(8, 8, 1, groups=8),
        "c": nn.ConvTranspose3d(8, 4, 2),
    },
    "a n b c",
)
def convs_of_three_dimensions(net, x):
    return net.c(net.b(F.relu(net.n(net.a(x)))))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 8, padding="same", padding_mode="circular"),
        "b": conv(8, 4, padding_mode="reflect"),
    },
    "a b",
)
def convs_with_padding_modes(net, x):
    return net.b(net.a(x))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 8),
        "p": nn.MaxPool2d(2),
        "q": nn.AdaptiveAvgPool2d(2),
        "up": nn.Upsample(scale_factor=2),
        "b": conv(8, 4),
    },
    "a b",
)
def pooling_and_upsampling(net, x):
    x = net.up(net.q(net.p(net.a(x))))
    return net.b(F.interpolate(F.avg_pool2d(x, 2), size=(5, 7), mode="bilinear"))


@case(
    IMAGE,
    lambda: {"a": conv(3, 16), "b": conv(16, 4), "fc1": conv(16, 8, 1), "fc2": conv(8, 16, 1)},
    "a b fc1 fc2",
)
def squeeze_and_excitation(net, x):
    x = net.a(x)
    gate = torch.sigmoid(net.fc2(F.relu(net.fc1(F.adaptive_avg_pool2d(x, 1)))))
    return net.b(x * gate)


@case(
    IMAGE,
    lambda: {"a": conv(3, 16), "b": conv(16, 4), "fc1": nn.Linear(16, 8), "fc2": nn.Linear(8, 16)},
    "a b fc1 fc2",
)
def squeeze_and_excitation_by_views(net, x):
    x = net.a(x)
    n, c, _, _ = x.size()
    gate = net.fc2(F.relu(net.fc1(x.mean(dim=[2, 3]).view(n, c)))).view(n, c, 1, 1)
    return net.b(x * torch.sigmoid(gate).expand_as(x))


@case(
    IMAGE,
    lambda: {"a": conv(3, 16), "k": nn.Conv1d(1, 1, 3, padding=1), "b": conv(16, 4)},
    frozen={"a.weight[0]": "spatial axis of a convolution"},
    shrinks=False,
)
def channels_as_a_sequence(net, x):
    x = net.a(x)
    gate = net.k(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
    return net.b(x * torch.sigmoid(gate)[:, :, None, None])


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 8), "d": conv(8, 4)}, "a b c d")
def residual_added_in_place(net, x):
    x = net.a(x)
    y = net.b(x)
    y += x
    z = net.c(F.relu_(y))
    z.add_(y).mul_(2).clamp_(min=-1)
    return net.d(z)


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "n": nn.BatchNorm2d(8), "act": nn.ReLU(inplace=True), "b": conv(8, 4)},
    "a n b",
)
def activation_in_place(net, x):
    return net.b(net.act(net.n(net.a(x))))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(16, 4)}, "a b c")
def dense_connection(net, x):
    x = net.a(x)
    return net.c(torch.cat((x, F.relu(net.b(x))), dim=1))


@case(
    IMAGE,
    lambda: {"cv1": conv(3, 16, 1), "m": conv(8, 8), "m2": conv(8, 8), "cv2": conv(32, 4, 1)},
    "cv1 m m2 cv2",
)
def c2f_block(net, x):
    y = list(net.cv1(x).chunk(2, 1))
    y.extend(m(y[-1]) for m in (net.m, net.m2))
    return net.cv2(torch.cat(y, 1))


# -- normalisation and activation over channels ---------------------------------------------------


@case(IMAGE, lambda: {"a": conv(3, 8), "n": nn.GroupNorm(2, 8), "b": conv(8, 4)}, "a n b", exact=False)
def group_norm(net, x):
    return net.b(net.n(net.a(x)))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "n": nn.GroupNorm(1, 8, affine=False), "b": conv(8, 4)},
    "a b",
    exact=False,
)
def group_norm_of_one_group(net, x):
    return net.b(net.n(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "n": nn.GroupNorm(8, 8), "b": conv(8, 4)}, "a n b")
def group_norm_of_single_channels(net, x):
    return net.b(net.n(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "n": nn.InstanceNorm2d(8, affine=True), "b": conv(8, 4)}, "a n b")
def instance_norm(net, x):
    return net.b(net.n(net.a(x)))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 8),
        "n": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        "b": conv(8, 4),
    },
    "a n b",
)
def instance_norm_with_statistics(net, x):
    return net.b(net.n(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "n": nn.BatchNorm2d(8, affine=False), "b": conv(8, 4)}, "a b")
def batch_norm_without_affine(net, x):
    return net.b(net.n(net.a(x)))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "n": nn.BatchNorm2d(8, track_running_stats=False), "b": conv(8, 4)},
    "a n b",
)
def batch_norm_without_statistics(net, x):
    return net.b(net.n(net.a(x)))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 16), "n": nn.LayerNorm(16), "b": nn.Linear(16, 4)},
    "a n b",
    exact=False,
)
def layer_norm(net, x):
    return net.b(net.n(net.a(x)))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 16), "n": nn.LayerNorm((5, 16)), "b": nn.Linear(16, 4)},
    "a n b",
    exact=False,
)
def layer_norm_over_two_dimensions(net, x):
    return net.b(net.n(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "n": nn.LayerNorm(8), "b": conv(8, 4)}, "a n b", exact=False)
def layer_norm_in_channels_first(net, x):
    return net.b(net.n(net.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@case(
    IMAGE,
    lambda: {"a": conv(3, 8), "w": parameter(8), "c": parameter(8), "b": conv(8, 4)},
    "a w c b",
    exact=False,
)
def layer_norm_by_hand(net, x):
    x = net.a(x)
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(var + 1e-6)
    return net.b(net.w[:, None, None] * x + net.c[:, None, None])


@case(
    TOKENS, lambda: {"a": nn.Linear(12, 16), "n": nn.RMSNorm(16), "b": nn.Linear(16, 4)}, "a n b", exact=False
)
def rms_norm(net, x):
    return net.b(net.n(net.a(x)))


@case(
    TOKENS, lambda: {"a": nn.Linear(12, 16), "w": parameter(16), "b": nn.Linear(16, 4)}, "a w b", exact=False
)
def rms_norm_by_hand(net, x):
    x = net.a(x)
    return net.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * net.w)


@case(VECTOR, lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(16, 4)}, "a b", exact=None)
def unit_length(net, x):
    return net.b(F.normalize(net.a(x), dim=-1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 16), "gate": nn.Linear(6, 1), "b": nn.Linear(16, 4)}, "a b")
def gate_expanded_over_channels(net, x):
    y = net.a(x)
    return net.b(y * torch.sigmoid(net.gate(x)).expand_as(y) + net.gate(x).expand(-1, 16))


@case(IMAGE, lambda: {"a": conv(3, 8), "act": nn.PReLU(8), "b": conv(8, 4)}, "a act b")
def prelu_of_channels(net, x):
    return net.b(net.act(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "act": nn.PReLU(), "b": conv(8, 4)}, "a b")
def prelu_of_one_slope(net, x):
    return net.b(net.act(net.a(x)))


@case(
    IMAGE, lambda: {"a": conv(3, 8), "n": nn.LocalResponseNorm(5, 2.0), "b": conv(8, 4)}, "a b", exact=False
)
def local_response_norm(net, x):
    return net.b(net.n(net.a(x)))


@case(IMAGE, lambda: {"a": conv(3, 8), "n": nn.CrossMapLRN2d(5), "b": conv(8, 4)}, "a b", exact=False)
def local_response_norm_across_maps(net, x):
    return net.b(net.n(net.a(x)))


@case(SERIES, lambda: {"a": nn.Conv1d(3, 8, 3), "b": nn.Conv1d(8, 4, 3)}, "a b", exact=False)
def local_response_norm_of_series(net, x):
    return net.b(F.local_response_norm(net.a(x), 4, alpha=1.0))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, "a b", exact=False)
def local_response_norm_by_hand(net, x):
    x = net.a(x)
    power = F.avg_pool3d(x.pow(2).unsqueeze(1), (3, 1, 1), stride=1, padding=(1, 0, 0)).squeeze(1)
    return net.b(x / (1 + power).sqrt())


@case(VECTOR, lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(14, 4)}, "a b", exact=False)
def averages_over_neighbouring_hidden_units(net, x):
    return net.b(F.avg_pool1d(net.a(x), 3, stride=1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(5, 4)}, exact=True, shrinks=False)
def averages_in_steps_over_hidden_units(net, x):
    return net.b(F.avg_pool1d(net.a(x), 4, stride=3))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=False)
def mean_over_channels(net, x):
    x = net.a(x)
    return net.b(x) * x.mean(-1, keepdim=True)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b")
def sum_over_channels(net, x):
    x = net.a(x)
    return net.b(x) * x.sum(-1, keepdim=True)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=False)
def sum_over_channels_that_are_not_zero(net, x):
    x = net.a(x).sigmoid()
    return net.b(x) * x.sum(-1, keepdim=True)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4), "gate": conv(2, 1)}, "a b", exact=False)
def spatial_attention(net, x):
    x = net.a(x)
    pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
    return net.b(x * torch.sigmoid(net.gate(pooled)))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=False)
def softmax_over_channels(net, x):
    return net.b(F.softmax(net.a(x), dim=-1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=False)
def norm_over_channels_with_ones(net, x):
    x = net.a(x) + 1
    return net.b(x / x.norm(dim=1, keepdim=True))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, exact=None)
def mean_over_everything(net, x):
    x = net.a(x)
    return net.b(x - x.mean()) * x.std()


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 12), "c": nn.Linear(12, 4)}, "a b c")
def where_between_layers(net, x):
    p, q = net.a(x), net.b(x)
    return net.c(torch.where(p > 0, p, q))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b")
def masked_fill_by_a_comparison(net, x):
    x = net.a(x)
    return net.b(x.masked_fill(x < 0, 0.5))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, exact=None, shrinks=False)
def cumsum_over_channels(net, x):
    return net.b(net.a(x).cumsum(1))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def cumsum_over_time(net, x):
    return net.b(net.a(x).cumsum(dim=1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4), "maxout": nn.Linear(4, 2)}, "a b", exact=None)
def maxout_over_pairs_of_channels(net, x):
    x = net.a(x)
    return net.maxout(x.view(-1, 4, 2, 8, 8).amax(2).mean((2, 3))) + net.b(x).sum((1, 2, 3))[:, None]


# -- attention ------------------------------------------------------------------------------------


def qkv() -> Layers:
    return {"q": nn.Linear(12, 24), "k": nn.Linear(12, 24), "v": nn.Linear(12, 24), "o": nn.Linear(24, 12)}


@case(TOKENS, qkv, "q k v o")
def attention_with_implied_scale(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@case(TOKENS, qkv, "q k v o")
def attention_with_a_scale_of_the_size(net, x):
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 4, -1).transpose(1, 2) for layer in (net.q, net.k, net.v))
    weights = ((q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return net.o((weights @ v).transpose(1, 2).reshape(n, t, -1))


@case(TOKENS, qkv, "q k v o")
def attention_with_a_square_root(net, x):
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 4, 6).permute(0, 2, 1, 3) for layer in (net.q, net.k, net.v))
    weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]), dim=-1)
    return net.o(torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(n, t, 24))


@case(TOKENS, qkv, "q k v o")
def attention_with_a_literal_scale(net, x):
    q, k, v = (layer(x).reshape(-1, 5, 4, 6).permute(0, 2, 1, 3) for layer in (net.q, net.k, net.v))
    weights = torch.einsum("bhid,bhjd->bhij", q, k) * 0.408
    return net.o(torch.einsum("bhij,bhjd->bihd", weights.softmax(-1), v).reshape(-1, 5, 24))


@case(TOKENS, qkv, "q k v o", batch_dim=None)
def attention_with_a_literal_batch(net, x):
    q, k, v = (layer(x).view(2, 5, 4, 6).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 24))


@case(TOKENS, qkv, "q k v o")
def attention_with_heads_folded_into_the_batch(net, x):
    n, t, _ = x.shape
    q, k, v = (
        layer(x).view(n, t, 4, 6).transpose(1, 2).reshape(n * 4, t, 6) for layer in (net.q, net.k, net.v)
    )
    weights = torch.bmm(q, k.transpose(1, 2)).mul(6**-0.5).softmax(-1)
    return net.o(torch.bmm(weights, v).view(n, 4, t, 6).transpose(1, 2).reshape(n, t, 24))


@case((TOKENS, torch.ones(2, 1, 1, 5, dtype=torch.bool).tril()), qkv, "q k v o")
def attention_with_a_mask(net, x, mask):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@case(TOKENS, lambda: {**qkv(), "bias": parameter(4, 5, 5)}, "q k v o")
def attention_with_a_bias_a_head(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    weights = (q @ k.mT * 0.4 + net.bias).softmax(-1)
    return net.o((weights @ v).transpose(1, 2).flatten(2))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, "qkv o")
def attention_with_literal_splits(net, x):
    q, k, v = net.qkv(x).split([24, 24, 24], dim=-1)
    q, k, v = (z.view(z.size(0), z.size(1), 4, 6).transpose(1, 2) for z in (q, k, v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.size(0), x.size(1), 24))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, "qkv o")
def attention_with_heads_before_the_split(net, x):
    n, t, _ = x.shape
    q, k, v = net.qkv(x).view(n, t, 4, 18).transpose(1, 2).chunk(3, dim=-1)
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 24))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, "qkv o")
def attention_with_qkv_selected_by_number(net, x):
    n, t, _ = x.shape
    qkv = net.qkv(x).reshape(n, t, 3, 4, 6).permute(2, 0, 3, 1, 4)
    return net.o(F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(n, t, 24))


def grouped_query() -> Layers:
    return {"q": nn.Linear(12, 24), "k": nn.Linear(12, 12), "v": nn.Linear(12, 12), "o": nn.Linear(24, 12)}


@case(TOKENS, grouped_query, "q k v o")
def grouped_queries_by_repeat_interleave(net, x):
    q = net.q(x).view(-1, 5, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(-1, 5, 2, 6).transpose(1, 2) for layer in (net.k, net.v))
    k, v = k.repeat_interleave(2, dim=1), torch.repeat_interleave(v, 2, dim=1)
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 24))


@case(TOKENS, grouped_query, "q k v o")
def grouped_queries_by_expand(net, x):
    n, t, _ = x.shape
    q = net.q(x).view(n, t, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(n, t, 2, 6).transpose(1, 2) for layer in (net.k, net.v))
    k, v = (z[:, :, None].expand(n, 2, 2, t, 6).reshape(n, 4, t, 6) for z in (k, v))
    return net.o((q @ k.mT * 0.4).softmax(-1).matmul(v).transpose(1, 2).reshape(n, t, 24))


@case(TOKENS, grouped_query, "q k v o")
def grouped_queries_by_flag(net, x):
    q = net.q(x).view(-1, 5, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(-1, 5, 2, 6).transpose(1, 2) for layer in (net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(-1, 5, 24))


@case(
    TOKENS,
    lambda: {"q": nn.Linear(12, 24), "k": nn.Linear(12, 6), "v": nn.Linear(12, 6), "o": nn.Linear(24, 12)},
    "q k v o",
)
def multi_query_attention(net, x):
    q = net.q(x).view(-1, 5, 4, 6).transpose(1, 2)
    k, v = net.k(x).unsqueeze(1), net.v(x).unsqueeze(1)
    return net.o((q @ k.mT * 0.4).softmax(-1).matmul(v).transpose(1, 2).reshape(-1, 5, 24))


@case(
    IMAGE,
    lambda: {"a": conv(3, 16), "qkv": conv(16, 48, 1), "o": conv(16, 16, 1), "b": conv(16, 4)},
    "a qkv o b",
)
def attention_over_space(net, x):
    x = net.a(x)
    n, c, h, w = x.shape
    q, k, v = net.qkv(x).reshape(n, 3, 2, 8, h * w).unbind(1)
    weights = torch.softmax(q.transpose(-2, -1) @ k / math.sqrt(8), -1)
    return net.b(x + net.o((v @ weights.transpose(-2, -1)).reshape(n, c, h, w)))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 12),
        "theta": conv(12, 6, 1),
        "phi": conv(12, 6, 1),
        "g": conv(12, 6, 1),
        "o": conv(6, 12, 1),
        "b": conv(12, 4),
    },
    "a theta phi g o b",
)
def non_local_block(net, x):
    x = net.a(x)
    q, k, v = (layer(x).flatten(2) for layer in (net.theta, net.phi, net.g))
    y = (v @ torch.softmax(q.mT @ k, -1).mT).view(x.shape[0], 6, 8, 8)
    return net.b(x + net.o(y))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, exact=None)
def channel_attention(net, x):
    q, k, v = net.qkv(x).view(-1, 5, 3, 4, 6).permute(2, 0, 3, 4, 1).unbind(0)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return net.o((weights @ v).permute(0, 3, 1, 2).reshape(-1, 5, 24))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 16), "gamma": parameter(16), "c": nn.Linear(16, 4)},
    "a b gamma c",
)
def layer_scale(net, x):
    x = net.a(x)
    return net.c(x + net.gamma * net.b(x))


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 16),
        "token": parameter(1, 1, 16),
        "position": parameter(1, 6, 16),
        "b": nn.Linear(16, 4),
    },
    "a token position b",
)
def class_token_and_positions(net, x):
    x = net.a(x)
    x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], dim=1) + net.position
    return net.b(x[:, 0])


@case(
    WORDS,
    lambda: {
        "words": nn.Embedding(10, 16, padding_idx=0),
        "places": nn.Embedding(5, 16),
        "a": nn.Linear(16, 24),
        "b": nn.Linear(24, 4),
    },
    "words places a b",
    frozen={"words.weight[0]": "looked up", "places.weight[0]": "looked up"},
)
def embeddings_of_words_and_places(net, words):
    x = net.words(words) + net.places(torch.arange(words.shape[1]))
    return net.b(torch.relu(net.a(x)))


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 16),
        "layer": nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
        "b": nn.Linear(16, 4),
    },
    "a layer.self_attn.in_proj_weight layer.linear1.weight layer.linear2.weight layer.norm1.weight b",
    exact=False,
)
def transformer_encoder_layer(net, x):
    return net.b(net.layer(net.a(x)))


@case(
    TOKENS,
    lambda: {
        "layers": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        )
    },
    "layers.layers.0.linear1.weight layers.layers.1.self_attn.in_proj_weight "
    "layers.layers.1.self_attn.out_proj.weight",
    exact=True,
)
def transformer_encoder(net, x):
    return net.layers(x)


@case(
    (TOKENS, TOKENS.flip(1)),
    lambda: {"layer": nn.TransformerDecoderLayer(12, 2, 24, batch_first=True)},
    "layer.linear1.weight layer.self_attn.in_proj_weight layer.multihead_attn.in_proj_weight",
)
def transformer_decoder_layer(net, x, memory):
    return net.layer(x, memory)


@case(
    (TOKENS, TOKENS.flip(1)),
    lambda: {
        "into": nn.Linear(12, 12),
        "t": nn.Transformer(12, 2, 1, 1, 24, batch_first=True),
        "last": nn.Linear(12, 5),
    },
    "into.weight t.encoder.layers.0.linear1.weight t.decoder.norm.weight last.weight",
    exact=False,
)
def transformer_between_layers(net, x, y):
    """The width of the residual stream is an attribute of ``nn.Transformer``."""
    return net.last(net.t(net.into(x), net.into(y)))


@case(
    (TOKENS, TOKENS.flip(1)),
    lambda: {"t": nn.Transformer(12, 2, 1, 1, 24, batch_first=True)},
    "t.encoder.layers.0.linear1.weight t.decoder.layers.0.multihead_attn.out_proj.weight",
)
def transformer(net, x, y):
    return net.t(x, y)


# -- recurrence, dropout, oddities ----------------------------------------------------------------


@case(
    WORDS,
    lambda: {
        "words": nn.Embedding(10, 12),
        "rnn": nn.LSTM(12, 8, batch_first=True),
        "b": nn.Linear(8, 6),
        "c": nn.Linear(6, 4),
    },
    "words rnn.weight_ih_l0 b c",
)
def lstm_in_a_tagger(net, words):
    x, _ = net.rnn(net.words(words))
    return net.c(torch.relu(net.b(x)))


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


@case(VECTOR, lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(8, 4)}, "a b")
def power_by_function(net, x):
    """``torch.pow`` has a form whose first argument is a number: what is traced is no tensor."""
    x = net.a(x)
    return net.b(x + 0.1 * torch.pow(x, 3.0))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "rnn": nn.LSTM(8, 6), "b": nn.Linear(6, 8), "c": nn.Linear(8, 4)},
    "a rnn.weight_ih_l0 b c", batch_dim=1,
)  # fmt: skip
def state_by_its_type(net, x):
    """Code for several kinds of recurrent layers."""
    _, state = net.rnn(net.a(x))
    if isinstance(state, tuple):
        state, _ = state
    return net.c(net.b(state[-1]))


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 8),
        "rnn": nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True),
        "b": nn.Linear(12, 4),
    },
    "a rnn.weight_ih_l0",
)
def gru_of_two_layers_and_directions(net, x):
    x, h = net.rnn(net.a(x))
    return net.b(x[:, -1]), h


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 8),
        "rnn": nn.LSTM(8, 6, proj_size=4, batch_first=True),
        "b": nn.Linear(4, 4),
    },
    "a rnn.weight_ih_l0",
)
def lstm_with_a_projection(net, x):
    x, _ = net.rnn(net.a(x))
    return net.b(x[:, -1])


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "rnn": nn.RNN(8, 6, batch_first=True), "b": nn.Linear(6, 4)},
    "a rnn.weight_ih_l0",
)
def plain_rnn(net, x):
    return net.b(net.rnn(net.a(x))[0])


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "cell": nn.GRUCell(8, 6), "b": nn.Linear(6, 4)},
    "a cell.weight_ih",
)
def gru_cell_in_a_loop(net, x):
    x = net.a(x)
    h = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    for t in range(5):
        h = net.cell(x[:, t], h)
    return net.b(h)


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


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "c")
def complex_values_over_space(net, x):
    x = torch.fft.rfft2(net.a(x), norm="ortho")
    return net.c(net.b(torch.fft.irfft2(x * 0.5, s=(8, 8), norm="ortho")))


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


@library.custom_op("fxprune_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.cumsum(-1).flip(-1)


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


mystery.register_autograd(lambda ctx, grad: grad.flip(-1).flip(-1).cumsum(-1).flip(-1))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 8), "c": nn.Linear(8, 4)},
    "b c",
    frozen={"a.weight[0]": r"fxprune_tests.mystery.*at mystery.*test_patterns.py:\d+.*register_rule"},
)
def unknown_operator(net, x):
    return net.c(net.b(mystery(net.a(x))))


# -- numbers, zeros and leaves that are easily overlooked -----------------------------------------


@case(TOKENS, qkv, "q k v o")
def attention_with_the_scale_as_alpha(net, x):
    n, t, _ = x.shape
    q, k, v = (
        layer(x).view(n, t, 4, -1).transpose(1, 2).reshape(n * 4, t, -1) for layer in (net.q, net.k, net.v)
    )
    bias = x.new_zeros(1, 1, 1)
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=q.size(-1) ** -0.5).softmax(-1)
    return net.o(torch.bmm(weights, v).view(n, 4, t, -1).transpose(1, 2).reshape(n, t, -1))


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


@case(TOKENS, qkv, "q k v o", exact=None)
def linear_attention(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    x = (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))
    return net.o(x.transpose(1, 2).flatten(2))


@case(TOKENS, lambda: {"a": nn.Linear(12, 24), "o": nn.Linear(24, 4)}, exact=None, shrinks=False)
def roll_within_heads(net, x):
    return net.o(net.a(x).unflatten(-1, (4, 6)).roll(1, -1).flatten(2))


@case(TOKENS, lambda: {"a": nn.Linear(12, 24), "o": nn.Linear(24, 4)}, exact=None, shrinks=False)
def flip_within_heads(net, x):
    return net.o(net.a(x).unflatten(-1, (4, 6)).flip(-1).flatten(2))


@case(TOKENS, lambda: {"a": nn.Linear(12, 24), "o": nn.Linear(24, 4)}, exact=None, shrinks=False)
def roll_of_heads(net, x):
    return net.o(net.a(x).unflatten(-1, (4, 6)).roll(1, -2).flatten(2))


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "table": nn.Buffer(torch.rand(12)), "b": nn.Linear(12, 4)},
    "a b",
    exact=None,
)
def sum_with_a_buffer(net, x):
    x = net.a(x) + net.table
    return net.b(x) * x.sum(-1, keepdim=True)


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "table": nn.Buffer(torch.rand(12)), "b": nn.Linear(12, 4)},
    "a b",
    exact=None,
)
def sum_weighted_by_a_buffer(net, x):
    x = net.a(x).sigmoid()
    return net.b(x) * (x * net.table).sum(-1, keepdim=True)


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "table": nn.Buffer(torch.rand(12, 3)), "b": nn.Linear(12, 4)},
    "a b",
    exact=None,
)
def product_with_a_buffer(net, x):
    x = net.a(x).sigmoid()
    return net.b(x) * (x @ net.table).sum(-1, keepdim=True)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=None)
def sum_after_a_bound_above_zero(net, x):
    x = F.hardtanh(net.a(x), 0.5, 2.0)
    return net.b(x) * x.sum(-1, keepdim=True)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=None)
def sum_after_writing_into_a_view(net, x):
    x = net.a(x)
    x[:, :6].add_(1.0)
    return net.b(x) * x.sum(-1, keepdim=True)


@case(
    VECTOR,
    lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4), "act": nn.Threshold(0.1, 20.0)},
    "a b",
    exact=None,
)
def sum_after_a_threshold(net, x):
    x = net.act(net.a(x))
    return net.b(x) * x.sum(-1, keepdim=True)


@torch.fx.wrap
def rolled_and_bent(x: Tensor) -> Tensor:
    return torch.tanh(x.roll(2, 1))


@case(VECTOR, two_linears(), exact=None, shrinks=False)
def leaf_function_that_moves_and_computes(net, x):
    return net.b(rolled_and_bent(net.a(x)))


@torch.fx.wrap
def bent_and_rolled(x: Tensor) -> Tensor:
    return torch.tanh(x).roll(2, 1)


@case(VECTOR, two_linears(), exact=None, shrinks=False)
def leaf_function_that_computes_and_moves(net, x):
    return net.b(bent_and_rolled(net.a(x)))


@torch.fx.wrap
def split_by_a_literal(x: Tensor) -> Tensor:
    return x[:, :6] * x[:, 6:]


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(6, 4)}, "a b")
def leaf_function_with_literals(net, x):
    return net.b(split_by_a_literal(net.a(x)))


@torch.fx.wrap
def scaled_in_place(x: Tensor, factors: list[int]) -> Tensor:
    factors[0] *= 2
    return x * factors[0]


@case(VECTOR, two_linears(), "a b")
def leaf_function_that_writes_into_a_list(net, x):
    return net.b(scaled_in_place(net.a(x), [1, 2]))


@case(IMAGE[0], lambda: {"a": conv(3, 8), "p": nn.MaxPool2d(2), "b": conv(8, 4)}, "a b", batch_dim=None)
def convs_without_a_batch(net, x):
    return net.b(F.relu(net.p(net.a(x))))


@case(VECTOR[0], two_linears(), "a b", batch_dim=None)
def linears_without_a_batch(net, x):
    return net.b(F.relu(net.a(x)))


@case(VECTOR, lambda: {"a": (one := nn.Linear(6, 12)), "b": nn.Linear(12, 4), "also": one}, "a b also")
def module_under_two_names(net, x):
    return net.b(net.also(x) + net.a(x * 2))


@case(
    VECTOR,
    lambda: {
        "a": nn.Sequential(nn.Linear(6, 12), nn.ReLU(), (one := nn.Linear(12, 12))),
        "b": nn.Sequential(one, nn.Tanh(), nn.Linear(12, 4)),
    },
    "a.0.weight a.2.weight b.0.weight b.2.weight",
)
def module_shared_by_two_containers(net, x):
    return net.b(net.a(x))


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


@torch.no_grad()  # else the masked weight could not be copied along with its module
def masked_conv(*widths: int) -> nn.Module:
    return prune.l1_unstructured(conv(*widths), "weight", 0.3)


@case(
    IMAGE,
    lambda: {"a": masked_conv(3, 8), "b": conv(8, 6), "c": conv(6, 4)},
    "c",
)
def layers_masked_by_torch_prune(net, x):
    return net.c(net.b(net.a(x)))


# -- the tests ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_left_in_the_tracer() -> Iterator[None]:
    """No generated code has told ``torch.fx`` to wrap a dotted name: that breaks every later trace."""
    from torch.fx import _symbolic_trace

    table = _symbolic_trace._wrapped_fns_to_patch
    before = dict(table)
    yield
    added = [key for key in table if key not in before and "." in key[1]]
    for key in added:
        del table[key]
    assert not added, added


# -- what the zoos taught -------------------------------------------------------------------------


@case(_random(2, 8, 8, 3), lambda: {"a": nn.Linear(3, 8), "b": nn.Linear(8, 4)}, "a b")
def one_window_that_is_the_whole_map(net, x):
    x = net.a(x)
    n, h, w, c = x.shape
    x = x.view(n, h // 8, 8, w // 8, 8, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 8, 8, c)
    return net.b(x)


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


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "mix": nn.Conv1d(2, 1, 1), "b": nn.Linear(8, 4)}, "a b")
def convolution_that_mixes_two_streams(net, x):
    x = net.a(x)
    x = net.mix(torch.stack([x[:, 0], x[:, 1]], dim=1)).squeeze(1)
    return net.b(x)


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "bend": nn.Conv1d(5, 5, 3, padding=1), "b": nn.Linear(8, 4)},
      "", shrinks=False, frozen={"a.weight[0]": "spatial axis"})  # fmt: skip
def convolution_that_mixes_features(net, x):
    return net.b(net.bend(net.a(x)))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "norm": nn.LayerNorm(8), "project": nn.Linear(8, 8),
                       "b": nn.Linear(8, 4)}, "a b", exact=False)  # fmt: skip
def sine_code_behind_a_normalisation(net, x):
    x = net.norm(net.a(x))
    code = 100 ** (2 * torch.arange(8, device=x.device, dtype=x.dtype) / 8)
    return net.b(x + net.project(1 / code))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "a b c", exact=False)
def standardised_weight(net, x):
    weight = F.batch_norm(net.b.weight.reshape(1, 8, -1), None, None, training=True)
    return net.c(F.conv2d(net.a(x), weight.reshape_as(net.b.weight), net.b.bias, padding=1))


class Caching(nn.Module):
    """Keeps what it computed, as attention biases of several libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.bias = parameter(12, 3)
        self.cache: dict[str, Tensor] = {}
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.bias[:, torch.tensor([1])].squeeze(1)
        self.calls.append(1)
        self.last = x
        return self.b(self.a(x) + self.cache[key])


def test_caches_do_not_remember_the_tracing() -> None:
    """What a forward writes to its module while it is traced is gone afterwards, so that it traces again."""
    model = Caching()
    for _ in range(2):
        check(model, VECTOR, narrows=["a.weight", "bias", "b.weight"])
        model.eval()
        with torch.no_grad():
            model(VECTOR)
        assert list(model.cache) == ["cpu"]
        assert all(type(kept) is Tensor for kept in model.cache.values())
        model.cache.clear()


@pytest.mark.parametrize("name", CASES)
def test_pattern(name: str) -> None:
    """Narrowed where it can be, frozen where it must be, and never wrong."""
    example = CASES[name]
    check(example.build(), example.inputs, narrows=example.narrows, **example.expected)


@pytest.mark.parametrize(
    "name",
    [
        "grouped_conv_that_widens",
        "unbind_of_fused_qkv",
        "channel_shuffle_by_sizes",
        "pixel_shuffle_module",
        "gate_by_chunk",
        "c2f_block",
    ],
)
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.75, 0.99])
def test_ratios(name: str, ratio: float) -> None:
    """Other ratios, down to one unit a row."""
    example = CASES[name]
    check(example.build(), example.inputs, ratio=ratio, **example.expected)


@case(IMAGE, lambda: {"a": conv(3, 16), "b": nn.Linear(4 * 16 * 16, 4)}, "a b")
def pixel_shuffle_before_a_flatten(net, x):
    return net.b(F.pixel_shuffle(net.a(x), 2).flatten(1))


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "b c",
      frozen={"a.weight[0]": "resize_as_"})  # fmt: skip
def memory_that_is_resized(net, x):
    x = net.a(x)
    return net.c(net.b(x + x.new_empty(0).resize_as_(x).zero_()))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "softmax": nn.AdaptiveLogSoftmaxWithLoss(12, 10, [4, 7])}, "a")
def adaptive_softmax(net, x):
    """One of its layers has no inputs at all."""
    return net.softmax.log_prob(net.a(x))


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "b": nn.Linear(8, 4)}, "a b")
def complex_rotation(net, x):
    z = torch.view_as_complex(net.a(x).reshape(-1, 5, 4, 2))
    z = z * torch.polar(torch.ones(5, 4), torch.arange(20.0).view(5, 4))
    return net.b(torch.view_as_real(z).flatten(2))


@case(
    IMAGE,
    lambda: {"a": conv(3, 12), "q": nn.Linear(12, 12), "k": nn.Linear(12, 12), "v": nn.Linear(12, 12),
             "o": nn.Linear(12, 12), "c": nn.Linear(12, 4)},
    "a q k v o c",
)  # fmt: skip
def attention_as_one_function(net, x):
    """Attention pooling as in CLIP (Radford et al., 2021)."""
    x = net.a(x).flatten(2).permute(2, 0, 1)
    x, _ = F.multi_head_attention_forward(
        query=x.mean(0, keepdim=True), key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=3,
        q_proj_weight=net.q.weight, k_proj_weight=net.k.weight, v_proj_weight=net.v.weight,
        in_proj_weight=None, in_proj_bias=torch.cat([net.q.bias, net.k.bias, net.v.bias]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=net.o.weight,
        out_proj_bias=net.o.bias, use_separate_proj_weight=True, training=net.training, need_weights=False,
    )  # fmt: skip
    return net.c(x.squeeze(0))


class Attention(nn.Module):
    """An attention layer between two linear ones that must not disturb it."""

    def __init__(self, kind: str, extras: str, batch_first: bool, weights: str) -> None:
        super().__init__()
        widths = {"kdim": 10, "vdim": 14} if kind == "other widths" else {}
        options = {"bias": False} if extras == "float mask" else {}
        if extras == "appended":
            options = {"add_bias_kv": True, "add_zero_attn": True}
        self.attend = nn.MultiheadAttention(12, 2, batch_first=batch_first, **widths, **options)
        self.before, self.after = nn.Linear(6, 12), nn.Linear(12, 4)
        self.key, self.value = (nn.Linear(6, widths.get(side, 12)) for side in ("kdim", "vdim"))
        self.kind, self.weights = kind, weights

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Any:
        x = self.before(x)
        k, v = (x, x) if self.kind == "self" else (self.key(y), self.value(y))
        need = {"none": {"need_weights": False}, "mean": {}, "each": {"average_attn_weights": False}}[
            self.weights
        ]
        x, weights = self.attend(x, k, v, attn_mask=mask, key_padding_mask=padding, **need)
        return self.after(x), weights


@pytest.mark.parametrize(
    ("kind", "extras", "batch_first", "weights"),
    list(
        itertools.product(
            ["self", "cross", "other widths"],
            ["plain", "appended", "bool masks", "float mask"],
            [True, False],
            ["none", "mean", "each"],
        )
    ),
)
def test_multihead_attention(kind: str, extras: str, batch_first: bool, weights: str) -> None:
    """Every way to call ``nn.MultiheadAttention``."""
    net = Attention(kind, extras, batch_first, weights)
    queries, keys = 5, 5 if kind == "self" else 7
    inputs = {"x": _random(2, queries, 6), "y": _random(2, keys, 6)}
    if not batch_first:
        inputs = {name: x.transpose(0, 1).contiguous() for name, x in inputs.items()}
    if extras == "bool masks":
        inputs["mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(2)
        inputs["padding"] = torch.arange(keys)[None] >= torch.tensor([[keys], [keys - 1]])
    elif extras == "float mask":
        inputs["mask"] = _random(2 * 2, queries, keys)
    packed = kind != "other widths"
    names = ["attend.in_proj_weight"] if packed else [f"attend.{side}_proj_weight" for side in "qkv"]
    names += ["attend.out_proj.weight", "before.weight", "after.weight"]
    names += ["attend.bias_k", "attend.bias_v"] if extras == "appended" else []
    check(net, inputs, narrows=names, exact=True, batch_dim=None)


def test_unbatched_attention() -> None:
    """``nn.MultiheadAttention`` on two dimensions."""
    net = Attention("cross", "plain", True, "mean")
    check(net, (_random(5, 6), _random(7, 6)), narrows=["attend.in_proj_weight"], exact=True, batch_dim=None)


@pytest.mark.parametrize(("name", "module"), [("drop_path", "drop"), ("dropout_module_and_function", "drop")])
def test_training_flag_is_obeyed(name: str, module: str) -> None:
    """Dropout, as a module or by ``self.training``, follows ``train()`` and ``eval()`` of the result."""
    example = CASES[name]
    model = example.build()
    pruned = fxprune.prune(model, example.inputs, ratio=0.5)
    flags = [m for m in pruned.modules() if isinstance(m, (TrainingFlag, nn.Dropout))]
    assert flags or name == "drop_path"
    pruned.eval()
    assert torch.equal(pruned(example.inputs), pruned(example.inputs))
    pruned.train()
    samples = [pruned(example.inputs) for _ in range(8)]
    assert any(not torch.equal(samples[0], other) for other in samples[1:])


def test_drop_path_captured_in_eval_mode_is_reported() -> None:
    """A branch on ``self.training`` is either kept dynamic or mentioned in the report."""
    example = CASES["drop_path"]
    pruned = fxprune.prune(example.build().eval(), example.inputs, ratio=0.5).train()
    samples = [pruned(example.inputs) for _ in range(8)]
    dynamic = any(not torch.equal(samples[0], other) for other in samples[1:])
    report = fxprune.analyze(example.build().eval(), example.inputs).captured.report
    assert dynamic or "training" in report


def test_tracing_sees_types_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control flow on them is that of the model itself, though nothing but shapes is computed."""
    rung = "symbolic tracing with known shapes"
    monkeypatch.setattr(capture, "RUNGS", {rung: capture.RUNGS[rung]})
    example = CASES["type_and_device_of_what_is_traced"]
    check(example.build(), example.inputs, narrows=["a.weight", "b.weight"])


def test_unknown_operator_is_named() -> None:
    """The report of frozen axes names the operator, the source line and the way out."""
    example = CASES["unknown_operator"]
    (entry,) = [
        f for f in fxprune.analyze(example.build(), example.inputs).frozen if str(f.axis) == "a.weight[0]"
    ]
    assert "fxprune_tests.mystery" in entry.reason
    assert "test_patterns.py" in entry.source
    assert "register_rule" in entry.remedy


def test_rows_choose_their_own_columns() -> None:
    """Heads lose equally many units, not the same ones."""
    example = CASES["attention_with_implied_scale"]
    model = example.build()
    with torch.no_grad():
        for head in range(4):  # in each head, other rows are small
            weak = [6 * head + (head + i) % 6 for i in range(3)]
            model.v.weight[weak] *= 1e-3
            model.v.bias[weak] *= 1e-3
            model.o.weight[:, weak] *= 1e-3
    plan = fxprune.plan(model, example.inputs, ratio=0.5)
    (group,) = [
        g for g in fxprune.analyze(model, example.inputs) if any(m.axis.name == "v.weight" for m in g.members)
    ]
    (member,) = [m for m in group.members if str(m.axis) == "v.weight[0]"]
    removed = [row for row in range(24) if member.units[row] in plan.removed[group.name]]
    assert removed == sorted(6 * head + (head + i) % 6 for head in range(4) for i in range(3))


class GroupScaled(nn.Module):
    """Divides by written-out statistics of two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.v, self.b = conv(3, 8), parameter(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        y = x.reshape(n, 2, c // 2, h, w)
        std = y.var(dim=(2, 3, 4), keepdim=True).add(1e-3).sqrt().expand(y.shape).reshape(n, c, h, w)
        return self.b(x * (x * self.v.view(1, -1, 1, 1)).sigmoid() / std)


def test_one_group_of_two_is_left() -> None:
    """Its channels are one unit, and are followed nevertheless when the result is checked."""
    plan = fxprune.plan(GroupScaled().eval(), IMAGE, ratio=0.5)
    assert not plan.notes
    assert [len(units) for units in plan.removed.values()] == [1]
