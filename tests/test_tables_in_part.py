"""Parameters of which the sizes of the inputs say how much is used: what the example leaves over stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import compare, stir
from torch import Tensor, nn

import fxprune
from fxprune.api import graph_for
from fxprune.errors import VerificationError

TABLES: dict[str, Any] = {
    "first": (lambda: torch.randn(1, 24, 16), lambda p, n: p[:, :n]),
    "last": (lambda: torch.randn(24, 16), lambda p, n: p[-n:]),
    "from the second on": (lambda: torch.randn(24, 16), lambda p, n: p[1 : n + 1]),
    "narrow": (lambda: torch.randn(24, 16), lambda p, n: p.narrow(0, 1, n)),
    "by number": (lambda: torch.randn(24, 16), lambda p, n: p[torch.arange(n)]),
    "flat": (lambda: torch.randn(24 * 16), lambda p, n: p[: n * 16].view(-1, 16)),
    "on both sides": (lambda: torch.randn(24, 24, 16), lambda p, n: p[:n, :n].mean(0)),
}


class Placed(nn.Module):
    """``x: (N, L, 5)``; adds a place to each of the L tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make, self.pick = TABLES[name]
        self.a, self.b, self.table = nn.Linear(5, 16), nn.Linear(16, 4), nn.Parameter(make())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b((self.a(x) + self.pick(self.table, x.shape[1])).relu())
        return out


class InParts(nn.Module):
    """What follows asks for values, so that regions are captured."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.placed = Placed(name)
        self.head = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.placed(x)
        if float(h.sum()) > 1e9:
            h = h * 2
        out: Tensor = self.head(h)
        return out


class Exported(Placed):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum().is_inference():  # which torch.export alone can tell
            x = x + 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((Placed, name) for name in TABLES), (InParts, "first"), (InParts, "flat"), (Exported, "first")],
)
def test_what_the_example_leaves_over_is_there_for_other_sizes(kind: Any, name: str) -> None:
    model, x = stir(kind(name).eval()), torch.randn(2, 6, 5)
    plan = fxprune.plan(model, x, ratio=0.5)
    pruned = plan.apply(model)
    assert pruned.get_parameter("placed.table" if kind is InParts else "table").shape[0] in (1, 24, 24 * 16)
    for length in (6, 3, 9, 23):
        compare(model, graph_for(plan, model), plan, pruned, torch.randn(2, length, 5))
    fxprune.verify(model, pruned, plan, x, more_inputs=[torch.randn(1, 11, 5)])


def test_dynamo_keeps_it_too() -> None:
    found: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        found.append((module, tuple(inputs)))
        return module.forward

    torch.compile(Placed("first"), backend=backend, dynamic=True)(torch.randn(2, 6, 5))
    torch._dynamo.reset()
    graph = fxprune.analyze(*found[0])
    assert {f.reason for f in graph.frozen if "how much of it is used" in f.reason}


def test_a_result_that_fails_at_another_size_does_not_pass() -> None:
    model, x = Placed("first").eval(), torch.randn(2, 6, 5)
    plan = fxprune.plan(model, x, ratio=0.5)
    pruned = plan.apply(model)
    pruned.table.data = pruned.table.data[:, :6]  # enough for the example
    with pytest.raises(VerificationError, match=r"differ|fails"):
        fxprune.verify(model, pruned, plan, x)


class Rotated(nn.Module):
    """Two layers, in each of which both halves of the channels change places."""

    def __init__(self) -> None:
        super().__init__()
        self.ins = nn.ModuleList(nn.Linear(5, 16) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(16, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.ins, self.outs, strict=True):
            h = first(x).unflatten(-1, (2, 8)).transpose(1, 2)
            half = h.shape[-1] // 2
            h = torch.cat((h[..., half:], h[..., :half]), -1) + h
            x = x + second(h.transpose(1, 2).flatten(2))
        return x


def test_what_one_layer_gives_up_says_nothing_of_slices_in_others() -> None:
    model = stir(Rotated())
    x = torch.randn(2, 6, 5)
    plan = fxprune.plan(model, x, 0.5, keep=["ins.1"])
    pruned = plan.apply(model)
    fxprune.verify(model, pruned, plan, x)
    assert pruned.get_submodule("ins.0").weight.shape[0] == 8
    assert pruned.get_submodule("ins.1").weight.shape[0] == 16
