"""Small networks, each of which once came back wrong, or could not run: what a rule took for granted.

Each is judged by the values of its parameters alone (:func:`test_properties.masked_by_value`), by gradients
in training mode, and by :func:`fxprune.verify`.
"""

# The table has one case a line.
# ruff: noqa: E501

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import call, difference
from test_mutation import Network
from test_properties import masked_by_value
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import capture
from fxprune.capture import exported

WIDTH = 12
TOLERANCE = 1e-9
Body = Callable[[Any, Tensor], Tensor]


def alike(x: Tensor) -> Tensor:
    """A map whose channels are all alike."""
    return x.mean((1, 2, 3), keepdim=True).expand(-1, WIDTH, 4, 4)


def sliced(self: Any, x: Tensor) -> Tensor:
    e = alike(x)
    return torch.cat([e + self.conv(x), e[:, :5].relu()], 1)


def summed(self: Any, x: Tensor) -> Tensor:
    e = alike(x)
    return torch.cat([e + self.conv(x), e.sum(1, keepdim=True)], 1)


def joined(self: Any, x: Tensor) -> Tensor:
    e = alike(x)
    a, b = e * 2, e.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)
    return (a + b).sigmoid() * self.conv(x)


def picked(self: Any, x: Tensor) -> Tensor:
    e = alike(x)
    return torch.cat([e * self.conv(x), e[:, 3:4]], 1)


CASES: dict[str, Body] = {
    "2 ** 0 is 1": lambda self, x: torch.pow(2.0, self.plain(x)).sum(1),
    "hardtanh may begin above 0": lambda self, x: F.hardtanh(self.plain(x), 0.5).sum(1),
    "a function of an expanded map": lambda self, x: alike(x) * 2 + self.conv(x),
    "a permuted expanded map": lambda self, x: alike(x).permute(0, 2, 3, 1) + self.conv(x).permute(0, 2, 3, 1),
    "a flattened expanded map": lambda self, x: alike(x).flatten(2) * self.conv(x).flatten(2),
    "an expanded map beside another": lambda self, x: self.wide(torch.cat([alike(x), x], 1)),
    "a normalised expanded map": lambda self, x: alike(x).softmax(1) * self.conv(x),
    "a slice of an expanded map": sliced,
    "a sum over an expanded map": summed,
    "an index of an expanded map": picked,
    "functions of an expanded map that meet": joined,
    "numbers of the largest channels": lambda self, x: x.max(1)[1].to(x.dtype),
    "numbers that pick": lambda self, x: self.conv(x).gather(1, x.min(1, keepdim=True)[1]),
    "a squeeze of everything": lambda self, x: self.linear(x.mean((2, 3), keepdim=True).squeeze()),
    "a squeeze that did nothing": lambda self, x: self.linear(x.mean((2, 3)).squeeze(1)),
    "a squeeze of several": lambda self, x: self.linear(x.mean((2, 3), keepdim=True).squeeze((1, 2, 3))),
}  # fmt: skip


def build(body: Body) -> tuple[nn.Module, Tensor]:
    """The network in float64 and evaluation mode, no two of its parameter entries equal, and an input."""
    torch.manual_seed(0)
    modules = {
        "conv": nn.Conv2d(WIDTH, WIDTH, 1),
        "plain": nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
        "wide": nn.Conv2d(2 * WIDTH, 5, 1),
        "linear": nn.Linear(WIDTH, 6),
        "state": State(),
    }
    model = Network(body, modules, tokens=False).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return model, Network.example(tokens=False).double()


class Half(torch.autograd.Function):
    """A gradient that is not that of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / x.shape[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * -3


class State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.ones(WIDTH))
        self.register_buffer("step", torch.zeros(()))


def unseen(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.conv(x)
        self.state.center.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
    return x + y.sin() - self.state.center[:, None, None]


def counted(self: Any, x: Tensor) -> Tensor:
    self.state.step += 1
    y = x + self.state.center[:, None, None]
    self.state.center = 0.9 * self.state.center + x.detach().mean((0, 2, 3))
    return y + self.state.center[:, None, None] * self.state.step


def saved(self: Any, x: Tensor) -> Tensor:
    y = x * self.state.center[:, None, None]  # kept for the gradient
    self.state.center = self.state.center + 1
    return y


def written(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    part = x[:, 2:7]
    part += 1.0
    part *= 2.0
    same = x
    same -= x.detach().mean((2, 3), keepdim=True)
    size = x.shape[1]
    size *= 2
    return x + self.conv(same) / size


TRACED: dict[str, Body] = {
    "an autograd function": lambda self, x: Half.apply(x),
    "a block under no_grad": unseen,
    "buffers that are assigned to": counted,
    "a buffer that a gradient needs as it was": saved,
    "augmented assignments to views and aliases": written,
}


@pytest.fixture(params=["traced", "exported"])
def ratio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Capture by all rungs and leave one channel, or by torch.export alone and leave half of them."""
    if request.param == "traced":
        return 0.95
    monkeypatch.setattr(capture, "RUNGS", {"torch.export": exported.trace})
    return 0.5


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of all parameters in training mode."""
    model = copy.deepcopy(model).train()
    call(model, x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def judge(model: nn.Module, x: Tensor, ratio: float) -> None:
    """Exact groups prune exactly, gradients included; all groups prune as :func:`fxprune.verify` wants it."""
    plan = fxprune.plan(model, x, ratio=ratio, where=lambda group: group.exact)
    pruned = plan.apply(model)
    wanted = masked_by_value(model, pruned)
    more = torch.cat([x, x.flip(0) / 2])
    for given in (x, more):  # twice, for what is kept between calls
        with torch.no_grad():
            assert difference(call(pruned, given), call(wanted, given)) < TOLERANCE
    before, after = gradients(wanted, x), gradients(pruned, x)
    kept = dict(pruned.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, other = before[name], after[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert difference(other.flatten(), gradient[torch.isin(parameter, kept[name])]) < TOLERANCE, name
    plan = fxprune.plan(model, x, ratio=ratio)
    pruned = plan.apply(model)
    assert fxprune.verify(model, pruned, plan, x).error < 1e-8
    assert call(pruned, more).shape == call(model, more).shape


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_it_is_right_now(body: Body, ratio: float) -> None:
    judge(*build(body), ratio)


@pytest.mark.parametrize("body", TRACED.values(), ids=TRACED)
def test_tracing_keeps_effects(body: Body) -> None:
    """Gradients that are stopped or defined, buffers that are assigned to, memory that is written."""
    judge(*build(body), 0.5)


@pytest.mark.parametrize("body", [unseen, counted, written], ids=lambda body: body.__name__)
def test_exporting_keeps_effects(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "RUNGS", {"torch.export": exported.trace})
    judge(*build(body), 0.5)


def test_what_is_lost_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export traces into autograd functions; neither rung keeps what was not there before."""

    def body(self: Any, x: Tensor) -> Tensor:
        self.seen = Half.apply(x)
        return self.seen * 2

    model, x = build(body)
    assert "what forward leaves in seen is not kept" in fxprune.analyze(model, x).captured.report
    monkeypatch.setattr(capture, "RUNGS", {"torch.export": exported.trace})
    report = fxprune.analyze(model, x).captured.report
    assert "the gradient of Half is that of its forward" in report
    assert "what forward leaves in seen is not kept" in report
