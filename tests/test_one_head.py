"""One head narrows as several do, and a plan that is returned can be applied."""

from __future__ import annotations

import pytest
import torch
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.passes import pipeline
from fxprune.passes.check import Violation


class Stacked(nn.Module):
    """Queries, keys and values along one dimension with the heads, taken apart by it."""

    def __init__(self, heads: int, exported: bool) -> None:
        super().__init__()
        self.h, self.exported = heads, exported
        self.i, self.e, self.o, self.f = (
            nn.Linear(8, 32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and x.sum().is_inference():  # what only torch.export follows
            x = x + 1
        x = self.i(x)
        b, n, d = x.shape
        stacked = self.e(x).reshape(b, n, 3 * self.h, d // self.h).permute(2, 0, 1, 3)
        q, k, v = stacked.chunk(3, 0)
        a = torch.einsum("hbpc,hbqc->hbpq", q, k).softmax(-1)
        return self.f(self.o(torch.einsum("hbij,hbjc->hbic", a, v).permute(1, 2, 0, 3).reshape(b, n, d)))


class Grouped(nn.Module):
    """One key head for all query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(6, 32), nn.Linear(6, 16), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 1, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))
        return self.o(y.transpose(1, 2).reshape(b, n, 32))


class Split(nn.Module):
    """One head whose rows are cut off with slices of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, 8)
        q, k, v = qkv[:, :, 0:1], qkv[:, :, 1:2], qkv[:, :, 2:3]
        y = torch.matmul((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1), v.transpose(1, 2))
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_stacked(heads: int, exported: bool) -> None:
    plan, _ = check(Stacked(heads, exported), torch.randn(2, 5, 8), kept_at_most=0.3)
    assert not plan.held


@pytest.mark.parametrize(("build", "name"), [(Grouped, "kv.weight"), (Split, "qkv.weight")])
def test_others(build: type[nn.Module], name: str) -> None:
    plan, _ = check(build(), torch.randn(2, 5, 6), narrows=[name])
    assert not plan.held


class Shared(nn.Module):
    """Two query heads for one key head, which one of them can go from."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q, self.kv, self.o = (
            nn.Linear(6, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = self.i(x)
        q = self.q(x).view(b, n, 2, 8).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 1, 16).transpose(1, 2).chunk(2, -1)
        y = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).softmax(-1) @ v.expand(-1, 2, -1, -1)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


def test_one_query_head_is_left_of_several_that_share_a_key_head() -> None:
    plan, pruned = check(Shared(), torch.randn(3, 5, 6), kept_at_most=0.3)
    assert not plan.held
    assert pruned.get_parameter("q.weight").shape == (4, 8)


def test_a_plan_that_removes_nothing_can_be_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the check would not agree with the graph as it is."""
    monkeypatch.setattr(pipeline, "check", lambda *_: [Violation("e", "does not fit")])
    model, x = Stacked(2, False), torch.randn(2, 5, 8)
    plan = fxprune.plan(model, x, ratio=0.5)
    assert not any(plan.removed.values())
    pruned = plan.apply(model)
    torch.testing.assert_close(pruned(x), model(x))
