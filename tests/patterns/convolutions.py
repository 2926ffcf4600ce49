"""Convolutions of every kind: grouped, transposed, in one to three dimensions, with computed weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    SERIES,
    TOKENS,
    VOLUME,
    case,
    conv,
)


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


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "mix": nn.Conv1d(2, 1, 1), "b": nn.Linear(8, 4)}, "a b")
def convolution_that_mixes_two_streams(net, x):
    x = net.a(x)
    x = net.mix(torch.stack([x[:, 0], x[:, 1]], dim=1)).squeeze(1)
    return net.b(x)


@case(TOKENS, lambda: {"a": nn.Linear(12, 8), "bend": nn.Conv1d(5, 5, 3, padding=1), "b": nn.Linear(8, 4)},
      "", shrinks=False, frozen={"a.weight[0]": "spatial axis"})  # fmt: skip
def convolution_that_mixes_features(net, x):
    return net.b(net.bend(net.a(x)))
