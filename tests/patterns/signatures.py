"""Inputs and outputs of all kinds, with and without a batch."""

from __future__ import annotations

import functools
from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    VECTOR,
    case,
    conv,
    two_linears,
)

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


def with_default_scale(forward):
    """Fills a keyword in, as decorators of common libraries do; by position it would be there twice."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if kwargs.get("scale") is None:
            kwargs["scale"] = 2.0
        return forward(self, *args, **kwargs)

    return wrapper


@case({"x": VECTOR, "scale": None}, two_linears(), "a b")
@with_default_scale
def inputs_by_keyword_of_which_one_is_filled_in(net, x, scale=None):
    return net.b(net.a(x)) * scale


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


@case(IMAGE[0], lambda: {"a": conv(3, 8), "p": nn.MaxPool2d(2), "b": conv(8, 4)}, "a b", batch_dim=None)
def convs_without_a_batch(net, x):
    return net.b(F.relu(net.p(net.a(x))))


@case(VECTOR[0], two_linears(), "a b", batch_dim=None)
def linears_without_a_batch(net, x):
    return net.b(F.relu(net.a(x)))
