"""The result trains as the model does: at ratio 0 its gradients are the model's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune

Function = torch.autograd.Function


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class Round(Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Reverse(Function):
    """A gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Scan(Function):
    """Writes into a clone, step by step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        h = x.clone()
        for step in range(1, x.size(1)):
            h[:, step].add_(0.5 * h[:, step - 1])
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        for step in range(grad.size(1) - 2, -1, -1):
            grad[:, step].add_(0.5 * grad[:, step + 1])
        return grad


class Scaled(Function):
    """With a ``setup_context``, and a number that has a default."""

    @staticmethod
    def forward(x: Tensor, factor: float = 2.0) -> Tensor:
        return (x * factor).round()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1] * inputs[0].size(-1) / output.size(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


class Halves(Function):
    """Two results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.round(), x.floor()

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return first + 3 * second


class Outer(Function):
    """Applies another one, as those do that are made of several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Round.apply(x) + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 5 * grad


BOUND = {f: f.apply for f in (Swish, Round, Reverse, Scan, Scaled, Halves, Outer)}
scaled_by_three = functools.partial(Scaled.apply, factor=3.0)

SINGLE = [f for f in BOUND if f is not Halves]


def summed(results: Any) -> Tensor:
    return results[0] + 2 * results[1]


Op = Callable[[Tensor], Tensor]
OPS: dict[str, Op] = {
    **{f"{f.__name__} by its class": functools.partial(lambda f, x: f.apply(x), f) for f in SINGLE},
    **{f"{f.__name__} bound before": BOUND[f] for f in SINGLE},
    "two results": lambda x: summed(BOUND[Halves](x)),
    "in a partial": scaled_by_three,
    "under no_grad": torch.no_grad()(BOUND[Swish]),
    "in a checkpoint": lambda x: checkpoint(BOUND[Round], x, use_reentrant=True),
    "in a checkpoint of torch functions": lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
    "in a checkpoint that is not re-entrant": lambda x: checkpoint(BOUND[Reverse], x, use_reentrant=False),
}


class Net(nn.Module):
    def __init__(self, op: Op, by_shapes: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.op, self.by_shapes = op, by_shapes

    def forward(self, x: Tensor) -> Tensor:
        if self.by_shapes and x.shape[1] > 100:
            raise ValueError("too long")
        return self.c(self.op(2 * self.a(x)) + self.b(x))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model.zero_grad()
    model(x).pow(2).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(model: nn.Module, x: Tensor) -> fxprune.CouplingGraph:
    graph = fxprune.analyze(model, x)
    pruned = fxprune.prune(model, x, ratio=0.0)
    wanted, found = gradients(model, x), gradients(pruned, x)
    assert wanted.keys() == found.keys()
    for name, want in wanted.items():
        got = found[name]
        assert (want is None) == (got is None), name
        if want is not None and got is not None:
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
    return graph


@pytest.mark.parametrize("by_shapes", [False, True], ids=["symbolic", "with shapes"])
@pytest.mark.parametrize("op", OPS)
def test_autograd_functions_keep_their_gradients(op: str, by_shapes: bool) -> None:
    graph = assert_same_gradients(Net(OPS[op], by_shapes).double(), torch.randn(2, 4, 8).double())
    assert graph.captured.rung == "symbolic tracing" + " with known shapes" * by_shapes


class OfWeights(nn.Module):
    """A function of a parameter alone, as quantisation-aware training has, and of one and a value."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.op(4 * self.a.weight), self.op(self.a.bias))
        return nn.functional.linear(self.op(h), self.op(self.b.weight), self.b.bias)


@pytest.mark.parametrize(
    "op", ["Round by its class", "Round bound before", "Swish bound before", "in a partial"]
)
def test_functions_of_weights_keep_their_gradients(op: str) -> None:
    assert_same_gradients(OfWeights(OPS[op]).double(), torch.randn(2, 8).double())


@pytest.mark.parametrize("op", ["Round bound before", "Swish by its class", "Reverse bound before"])
def test_gradients_through_a_narrowed_function(op: str) -> None:
    """Half of the channels go; those that are left have the gradients of the masked original."""
    model, x = Net(OPS[op], False).double(), torch.randn(2, 4, 8).double()
    plan = fxprune.plan(model, x, ratio=0.5)
    pruned = plan.apply(model)
    removed = plan.removed["a.weight[0]"]
    kept = torch.tensor([i for i in range(16) if i not in removed])
    with torch.no_grad():
        model.c.weight[:, removed] = 0
    wanted, found = gradients(model, x), gradients(pruned, x)
    for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
        torch.testing.assert_close(found[name], wanted[name][kept])


class Halved(nn.Module):
    """Halves the gradient of its hidden values, where there is one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 8), nn.Linear(8, 3), way

    def halve(self, h: torch.Tensor) -> None:
        h.register_hook(lambda gradient: gradient / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.way == "always" or h.requires_grad:
            self.halve(h)
        out: torch.Tensor = self.b(h.relu())
        return out


@pytest.mark.parametrize("way", ["always", "guarded"])
def test_hooks_on_gradients_are_not_lost_without_a_word(way: str) -> None:
    notes = fxprune.plan(Halved(way).train(), torch.randn(2, 4), 0.5).notes
    assert any("registers hooks on gradients" in note for note in notes)
    notes = fxprune.plan(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4), 0.5).notes
    assert not any("hooks on gradients" in note for note in notes)
