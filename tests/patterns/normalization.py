"""Normalisation and reduction over channels, and what makes a group inexact."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    SERIES,
    TOKENS,
    VECTOR,
    case,
    conv,
    parameter,
)


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


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}, "a b c", exact=False)
def standardised_weight(net, x):
    weight = F.batch_norm(net.b.weight.reshape(1, 8, -1), None, None, training=True)
    return net.c(F.conv2d(net.a(x), weight.reshape_as(net.b.weight), net.b.bias, padding=1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "b": nn.Linear(12, 4)}, "a b", exact=False)
def less_the_largest_by_name(net, x):
    x = net.a(x)
    return net.b(x - torch.max(x, dim=-1, keepdim=True).values)
