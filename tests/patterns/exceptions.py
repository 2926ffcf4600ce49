"""Code that tries one way, catches the error of it, and goes another."""

import torch
from torch import nn

from .cases import IMAGE, TOKENS, VECTOR, case, conv, two_linears


class _Longer(nn.Module):
    """A layer that says itself how many entries count, which those of torch cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor, lengths: object) -> torch.Tensor:
        return self.inner(x)


@case(TOKENS, lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(12, 4),
                       "all": nn.Sequential(nn.ReLU(), nn.Dropout(0.1), _Longer())},
      "a all.2.inner.weight b")  # fmt: skip
def arguments_that_only_some_layers_take(net, x):
    x = net.a(x)
    for layer in net.all:
        try:
            x = layer(x, lengths=None)
        except TypeError:
            x = layer(x)
    return net.b(x)


@case(IMAGE, lambda: {"a": conv(3, 8), "b": conv(8, 4)}, "a b")
def a_view_that_does_not_go(net, x):
    x = net.a(x).transpose(2, 3)
    try:
        x = x.view(x.shape[0], x.shape[1], -1)
    except RuntimeError:
        x = x.reshape(x.shape[0], x.shape[1], -1)
    return net.b(x.unsqueeze(-1))


@case(VECTOR, two_linears(), "a b")
def what_is_not_there(net, x):
    x = net.a(x)
    try:
        x = net.activation(x) + net.skip
    except AttributeError:
        x = x.relu()
    try:
        x = x + None
    except TypeError:
        x = x * 2
    return net.b(x)


@case(VECTOR, two_linears(), "a b")
def a_layer_that_does_not_fit(net, x):
    y = net.a(x).relu()
    try:
        y = y + net.b(net.a(y))
    except RuntimeError:
        y = y + net.a(x)
    return net.b(y)
