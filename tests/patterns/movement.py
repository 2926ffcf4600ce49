"""Channels that are shuffled, rolled, flipped, transposed, flattened, or moved into space."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    TOKENS,
    VECTOR,
    case,
    conv,
    parameter,
    random,
    two_convs,
    two_linears,
)


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


@case(random(2, 8, 8, 3), lambda: {"a": nn.Linear(3, 8), "b": nn.Linear(8, 4)}, "a b")
def one_window_that_is_the_whole_map(net, x):
    x = net.a(x)
    n, h, w, c = x.shape
    x = x.view(n, h // 8, 8, w // 8, 8, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 8, 8, c)
    return net.b(x)


@case(IMAGE, lambda: {"a": conv(3, 16), "b": nn.Linear(4 * 16 * 16, 4)}, "a b")
def pixel_shuffle_before_a_flatten(net, x):
    return net.b(F.pixel_shuffle(net.a(x), 2).flatten(1))


@case(IMAGE, lambda: {"a": conv(3, 8), "g": conv(3, 1), "b": conv(8, 4)}, "a b")
def one_map_repeated_for_all_channels(net, x):
    return net.b(net.a(x) * net.g(x).repeat(1, 8, 1, 1))


@case(IMAGE, lambda: {"a": conv(3, 8), "g": conv(3, 1), "b": conv(8, 4)}, "a b")
def one_map_repeated_by_size(net, x):
    y = net.a(x)
    n, c, _, _ = y.shape
    return net.b((y * net.g(x).repeat(1, c, 1, 1)).reshape(n, c, *x.shape[2:]))


@case(IMAGE, lambda: {"a": conv(3, 8), "g": conv(3, 1), "b": conv(8, 4)}, "a b")
def one_map_tiled_for_all_channels(net, x):
    return net.b(net.a(x) * torch.tile(input=net.g(x), dims=(8, 1, 1)))


@case(IMAGE, lambda: {"a": conv(3, 8), "g": conv(3, 1), "b": conv(8, 4)}, "a b")
def one_map_interleaved_for_all_channels(net, x):
    return net.b(net.a(x) * net.g(x).repeat_interleave(8, dim=1))


@case(IMAGE, lambda: {"a": conv(3, 8), "g": conv(3, 4), "b": conv(8, 4)}, "a g b")
def maps_interleaved_with_the_size_of_the_result(net, x):
    return net.b(net.a(x) * torch.repeat_interleave(net.g(x), repeats=2, dim=1, output_size=8))


@case(IMAGE, lambda: {"a": conv(3, 8), "g": conv(3, 1), "b": conv(8, 4)}, "a b")
def repeated_map_of_which_channels_are_written(net, x):
    y = net.g(x).repeat(1, 8, 1, 1)
    y[:, 2:5] += 1.0
    return net.b(net.a(x) * y)


@case(IMAGE, lambda: {"a": conv(3, 8), "k": parameter(1, 1, 3, 3), "b": conv(8, 4)}, "a b")
def one_kernel_for_all_channels(net, x):
    x = net.a(x)
    return net.b(F.conv2d(x, net.k.repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1]))
