"""Operators and modules of other libraries: what happens without a rule, and how to register one.

    python examples/custom_operator.py              # a second or two

A network uses an operator that its library registered with PyTorch, and a module that has to stay
whole: it remembers its width, and tracing into it would lose the gradient of an ``autograd.Function``. The
script asserts what it prints, and runs as one of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library, nn

import fxprune

# -- what the other library has: an operator with a fake kernel, and a module ---------------------------


@library.custom_op("demo::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis: ``x`` is ``(..., d)``, ``weight`` ``(d)``."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The fake kernel: an empty tensor of the result's shape. The analysis runs on shapes alone."""
    return torch.empty_like(x)


class Clamp(torch.autograd.Function):
    """Clamps each channel at a bound of its own; gradients pass as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        return torch.minimum(x, bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ChannelClamp(nn.Module):
    """``(..., width) -> (..., width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.bound = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.width:
            raise ValueError(f"expected {self.width} features, got {x.shape[-1]}")
        return Clamp.apply(x, self.bound)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.clamp = ChannelClamp(32)
        self.middle = nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.rand(32))
        self.down = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.clamp(self.up(x))
        return self.down(rms_norm(self.middle(x), self.scale, 1e-6))


# -- what you write --------------------------------------------------------------------------------------


def register() -> list[fxprune.Registration]:
    """Once, where your program begins. Each call returns a handle that can undo it."""
    return [
        # One term for each tensor argument, one for the result. ``~`` marks an axis that statistics run
        # over: it may be narrowed, but then the result is not exactly the masked network any more.
        fxprune.register_rule(torch.ops.demo.rms_norm.default, "... ~d, d -> ... d"),
        # Inputs go by order, parameters by name; ``width`` must follow the parameter.
        fxprune.register_module(ChannelClamp, "... c, bound: c -> ... c", {"width": "bound[0]"}),
    ]


def main() -> None:
    """Prune the network without rules, then with them."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 8)

    before = fxprune.analyze(model, x)
    print("without rules:", before)
    print(*before.frozen, sep="\n")
    reasons = {str(entry.axis): entry.reason for entry in before.frozen}
    assert "demo.rms_norm.default, an operator without a rule" in reasons["middle.weight[0]"]

    registrations = register()
    try:
        graph = fxprune.analyze(model, x)
        print("with rules:", graph)
        plan = fxprune.plan(model, x, ratio=0.5)
        pruned = plan.apply(model)
        print(pruned.code)
        print(fxprune.verify(model, pruned, plan, x))
        assert isinstance(pruned.clamp, ChannelClamp)
        assert pruned.clamp.width == 16
        assert [tuple(p.shape) for p in (pruned.middle.weight, pruned.scale)] == [(16, 16), (16,)]
        assert pruned(torch.randn(5, 8)).shape == (5, 4)
    finally:
        for registration in registrations:
            registration.remove()


if __name__ == "__main__":
    main()
