"""Modules and weights used more than once, tied, frozen or not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    VECTOR,
    WORDS,
    Layers,
    case,
    conv,
    parameter,
    random,
)


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


@case(random(2, 1, 8, 8), lambda: {"a": conv(1, 8), "n": nn.BatchNorm2d(8), "b": conv(8, 1)}, "a n b")
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
