"""Parameters and functions in place of modules, functions that are not looked into, unknown operators."""

from __future__ import annotations

import torch
from torch import Tensor, library, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from .cases import (
    IMAGE,
    TOKENS,
    VECTOR,
    WORDS,
    case,
    conv,
    parameter,
    two_convs,
    two_linears,
)


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "w": parameter(12, 8), "b": nn.Linear(8, 4)}, "a w b")
def einsum_with_a_parameter(net, x):
    return net.b(torch.einsum("bi,io->bo", net.a(x), net.w))


@case(TOKENS, lambda: {"w": parameter(12, 2, 6), "v": parameter(2, 6, 4)}, "w v")
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


@case(IMAGE, lambda: {"a": conv(3, 8), "w": parameter(8, 1, 3, 3), "b": conv(4, 4)}, "a w b")
def functional_depthwise_conv_by_size_of_halves_that_are_tied(net, x):
    x = net.a(x)
    value, gate = F.conv2d(x, net.w, padding=1, groups=x.shape[1]).chunk(2, 1)
    return net.b(value * gate)


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


@case(VECTOR, lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 10), "c": nn.Linear(80, 4)}, "a b c")
def outer_product_flattened(net, x):
    return net.c((net.a(x).unsqueeze(2) * net.b(x).unsqueeze(1)).flatten(1))


@case(VECTOR, lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 10), "w": parameter(8, 10)}, "a b w")
def bilinear_form(net, x):
    return torch.einsum("bi,bj,ij->b", net.a(x), net.b(x), net.w)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(3, 6), "c": nn.Linear(48, 4)}, "a b c")
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


@case(VECTOR, lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(8, 4)}, "a b")
def power_by_function(net, x):
    """``torch.pow`` has a form whose first argument is a number: what is traced is no tensor."""
    x = net.a(x)
    return net.b(x + 0.1 * torch.pow(x, 3.0))


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
    frozen={"a.weight[0]": r"fxprune_tests.mystery.*at mystery.*functions.py:\d+.*register_rule"},
)
def unknown_operator(net, x):
    return net.c(net.b(mystery(net.a(x))))


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


@case(VECTOR, lambda: {"a": nn.Linear(6, 12), "softmax": nn.AdaptiveLogSoftmaxWithLoss(12, 10, [4, 7])}, "a")
def adaptive_softmax(net, x):
    """One of its layers has no inputs at all."""
    return net.softmax.log_prob(net.a(x))


@case(IMAGE, two_convs(), "a b")
def modules_made_in_forward(net, x):
    x = nn.Dropout(0.0)(nn.LeakyReLU(0.2)(net.a(x)))
    return nn.Softmax(dim=1)(net.b(nn.MaxPool2d(2)(x)))
