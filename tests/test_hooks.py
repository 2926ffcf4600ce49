"""Hooks on modules, and forwards that were put in place of those of a class, are part of what is captured."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from oracle import check, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.body = nn.Sequential(self.a, self.norm, nn.ReLU())
        self.kept: dict[str, Tensor] = {}

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.kept["a"] = out

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.body(x))
        return y + self.kept["a"].sum(1, keepdim=True) if self.kept else y


def flipped(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Which channel is which changes, and so does what each is."""
    return out.flip(-1) * torch.arange(16.0).to(out)


HOOKS: dict[str, Any] = {
    "output of a layer": lambda net: net.a.register_forward_hook(flipped),
    "output of a norm": lambda net: net.norm.register_forward_hook(flipped),
    "output of a container": lambda net: net.body.register_forward_hook(flipped),
    "input of a layer": lambda net: net.b.register_forward_pre_hook(lambda m, args: args[0].roll(1, -1)),
    "input by name": lambda net: net.b.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    ),
    "of the model": lambda net: net.register_forward_hook(lambda m, args, out: out * args[0].mean()),
    "before the model": lambda net: net.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "by mode": lambda net: net.a.register_forward_hook(lambda m, args, out: 2 * out if m.training else out),
    "two": lambda net: (net.a.register_forward_hook(flipped), net.a.register_forward_hook(flipped)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_part_of_the_model(name: str) -> None:
    net = Net().eval()
    HOOKS[name](net)
    check(net, torch.randn(4, 8), narrows=["a.weight", "b.weight"])
    again, x = fxprune.prune(net, torch.randn(4, 8), ratio=0.0).train(), torch.randn(5, 8)
    torch.testing.assert_close(again(x), net.train()(x))


def test_hooks_that_keep_values_keep_none_of_ours() -> None:
    net, seen = Net().eval(), []
    net.a.register_forward_hook(net.keep)
    net.b.register_forward_hook(lambda module, args, out: seen.append(out))
    before = snapshot(net)
    pruned = fxprune.prune(net, torch.randn(4, 8), ratio=0.5)
    assert snapshot(net) == before
    assert not seen
    assert not net.kept
    assert "kept" in pruned.meta["fxprune"].notes[0]


def own_method(net: Net) -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).tanh()

    net.a.forward = MethodType(forward, net.a)  # type: ignore[method-assign]


def default(net: Net) -> None:
    net.a.forward = lambda x, layer=net.a: F.linear(x, layer.weight, layer.bias) * 2  # type: ignore


def wrapped(net: Net) -> None:
    inner = net.a.forward
    net.a.forward = lambda x: inner(x).sigmoid()  # type: ignore[method-assign]


def of_the_model(net: Net) -> None:
    net.forward = lambda x: net.b(net.a(x).tanh())  # type: ignore[method-assign]


@pytest.mark.parametrize("put", [own_method, default, wrapped, of_the_model])
def test_forwards_put_in_place_of_others(put: Any) -> None:
    """They are followed, with the result's own weights, and not with the user's."""
    net, x = Net().eval(), torch.randn(4, 8)
    put(net)
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    assert pruned.get_parameter("a.weight").shape == (8, 8)
    fxprune.verify(net, pruned, plan, x)
    same = fxprune.prune(net, x, ratio=0.0)
    torch.testing.assert_close(same(x), net(x))
    same(x).sum().backward()
    assert same.get_parameter("a.weight").grad is not None
    assert net.a.weight.grad is None
    expected = pruned(x)
    with torch.no_grad():
        net.a.weight.zero_()
    torch.testing.assert_close(pruned(x), expected)
