"""Axes that are flattened into one, and columns that all rows share: each goes without the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune


class Spline(nn.Module):
    """A layer of splines: inputs and coefficients are flattened into one axis."""

    def __init__(self, i: int, o: int, k: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(o, i, k) * 0.3)
        self.register_buffer("grid", torch.linspace(-1, 1, k))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2))
        return F.linear(basis.flatten(1), self.w.view(self.w.shape[0], -1))


class ScaledSpline(nn.Module):
    """The same with a linear layer beside it, and a scale for each input of each output."""

    def __init__(self, i: int, o: int, k: int = 5) -> None:
        super().__init__()
        self.base, self.scale = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.randn(o, i))
        self.spline = nn.Parameter(torch.randn(o, i, k) * 0.3)
        self.register_buffer("grid", torch.linspace(-1, 1, k).repeat(i, 1))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x[..., None] - self.grid) ** 2)).view(x.size(0), -1)
        w = (self.spline * self.scale[..., None]).view(self.base.size(0), -1)
        return F.linear(F.silu(x), self.base) + F.linear(basis, w)


class Conditional(nn.Module):
    """Kernels mixed for each image from those of experts, which are stored flat."""

    def __init__(self, i: int, o: int, experts: int = 4) -> None:
        super().__init__()
        self.w, self.r = nn.Parameter(torch.randn(experts, o * i * 9) * 0.1), nn.Linear(i, experts)
        self.io = i, o

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        mixed = torch.matmul(torch.sigmoid(self.r(x.mean((2, 3)))), self.w)
        kernels = mixed.view(b * self.io[1], self.io[0], 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b).view(b, self.io[1], h, w)


class Scan(nn.Module):
    """A state space model over chunks, whose heads share the inputs of a state by groups."""

    def __init__(self, groups: int, heads: int = 8, dim: int = 16, state: int = 16) -> None:
        super().__init__()
        self.g, self.h, self.d, self.n = groups, heads, dim, state
        self.inp = nn.Linear(32, heads * dim + groups * state + heads)
        self.out = nn.Linear(heads * dim, 32)

    def forward(self, u: Tensor) -> Tensor:
        b, n, _ = u.shape
        x, state, dt = self.inp(u).split([self.h * self.d, self.g * self.n, self.h], -1)
        x = x.reshape(b, n, self.h, self.d)
        state = state.reshape(b, n, self.g, self.n).repeat_interleave(self.h // self.g, dim=2)
        chunk = torch.einsum("bzhn,bzhp->bzhpn", state, x)
        weights = dt[:, :, None, :].expand(b, n, n, self.h)
        chunk = torch.einsum("bzch,bzhpn->bchpn", weights, chunk)
        return self.out(torch.einsum("bchn,bchpn->bchp", state, chunk).reshape(b, n, -1))


class Outer(nn.Module):
    """Bilinear pooling: the outer product of two streams, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.a(x)[:, :, None] * self.b(x)[:, None, :]).flatten(1))


class LowRank(nn.Module):
    """A weight made of two factors, flattened and brought back: what a hypernetwork does."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, 8), nn.Linear(12, 3)
        self.table = nn.Parameter(torch.randn(4, 12 * 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (torch.softmax(x[:, :4], -1) @ self.table).view(-1, 12, 8)
        return self.out((mixed @ self.inp(x).relu()[:, :, None]).squeeze(-1))


class Correlation(nn.Module):
    """The features of one image are the kernels for another's, a pair for each of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.out = nn.Conv2d(1, 2, 1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z, x = self.net(z), self.net(x)
        n, c, h, w = x.shape
        y = F.conv2d(x.view(1, n * c, h, w), z, groups=n)
        return self.out(y.view(n, 1, *y.shape[2:]))


class Standardized(nn.Module):
    """A convolution whose weight is standardised over inputs and kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b.weight.view(6, -1)
        w = (w - w.mean(1, keepdim=True)).view_as(self.b.weight)
        return self.c(F.conv2d(self.a(x).relu(), w, self.b.bias, padding=1).relu())


IMAGE = torch.randn(2, 3, 8, 8)


def _conditional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), Conditional(16, 12), nn.ReLU(), Conditional(12, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


CASES: dict[str, tuple[Any, Any, float, dict[str, tuple[int, ...]]]] = {
    "splines": (
        lambda: nn.Sequential(Spline(8, 32), Spline(32, 24), Spline(24, 3)),
        torch.randn(4, 8),
        0.2,
        {"1.w": (12, 16, 3)},
    ),
    "scaled_splines": (
        lambda: nn.Sequential(ScaledSpline(4, 16), ScaledSpline(16, 16), ScaledSpline(16, 4)),
        torch.randn(2, 4),
        0.3,
        {"1.spline": (8, 8, 3), "1.grid": (8, 3)},
    ),
    "mixed_kernels": (_conditional, IMAGE, 0.2, {"1.w": (2, 6 * 8 * 9), "3.w": (2, 4 * 6 * 9)}),
    "scan_of_one_group": (lambda: Scan(1), torch.randn(2, 5, 32), 0.6, {"out.weight": (32, 64)}),
    "scan_of_two_groups": (lambda: Scan(2), torch.randn(2, 5, 32), 0.6, {"out.weight": (32, 64)}),
    "outer_product": (Outer, torch.randn(2, 5), 0.5, {"out.weight": (3, 12)}),
    "hypernetwork": (LowRank, torch.randn(3, 5), 0.5, {"table": (4, 24)}),
    "standardised": (Standardized, IMAGE, 0.5, {"b.weight": (3, 4, 3, 3)}),
    "correlation": (
        Correlation,
        (torch.randn(2, 3, 9, 9), torch.randn(2, 3, 12, 12)),
        0.4,
        {"net.3.weight": (4, 8, 3, 3)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_axes_are_narrowed(name: str) -> None:
    build, x, kept, shapes = CASES[name]
    model = build()
    _, pruned = check(model, x, kept_at_most=kept)
    state = pruned.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name", CASES)
def test_any_choice_of_groups_is_exact(name: str) -> None:
    """One axis of a product goes without the other: groups drawn at random."""
    build, x, _, _ = CASES[name]
    model = build()
    rng = np.random.default_rng(1)
    chosen = {g.name for g in fxprune.analyze(model, x).groups if rng.random() < 0.5}
    check(model, x, ratio=0.6, where=lambda group: group.name in chosen, shrinks=False)


def test_scores_of_cells_count_for_both_axes() -> None:
    """The norm of a unit is that of all entries that go with it, found by hand."""
    model, x = Outer(), torch.randn(2, 5)
    groups = {g.name: g for g in fxprune.analyze(model, x).groups}
    plan = fxprune.plan(model, x, ratio=0.5)
    w = model.out.weight.detach().view(3, 8, 6)
    own = model.a.weight.pow(2).sum(1) + model.a.bias.pow(2) + w.pow(2).sum((0, 2))
    assert groups["a.weight[0]"].size == 8
    assert set(plan.removed["a.weight[0]"]) == set(own.argsort()[:4].tolist())


class NormedHeads(nn.Module):
    """Attention with a norm over the columns of each head of queries and keys; grouped keys if asked."""

    def __init__(self, heads: int = 4, keys: int = 4, width: int = 8, norm: str = "rms") -> None:
        super().__init__()
        self.h, self.k, self.w = heads, keys, width
        self.q, self.kv = nn.Linear(16, heads * width), nn.Linear(16, 2 * keys * width)
        self.o, self.head = nn.Linear(heads * width, 16), nn.Linear(16, 3)
        make = nn.RMSNorm if norm == "rms" else nn.LayerNorm
        self.q_norm, self.k_norm = make(width), make(width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        k, v = self.kv(x).chunk(2, -1)
        q = self.q_norm(self.q(x).view(b, n, self.h, self.w)).transpose(1, 2)
        k = self.k_norm(k.view(b, n, self.k, self.w)).transpose(1, 2)
        v = v.view(b, n, self.k, self.w).transpose(1, 2)
        if self.k != self.h:
            k, v = (t.repeat_interleave(self.h // self.k, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.h * self.w)
        return self.head(x + self.o(y))


class NormedFused(nn.Module):
    """The same with one projection for all three, as vision transformers have it."""

    def __init__(self, heads: int = 4, width: int = 8) -> None:
        super().__init__()
        self.h, self.w = heads, width
        self.i, self.qkv = nn.Linear(6, 16), nn.Linear(16, 3 * heads * width)
        self.o, self.head = nn.Linear(heads * width, 16), nn.Linear(16, 3)
        self.q_norm, self.k_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.h, self.w).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        y = (q @ k.transpose(-2, -1) * self.w**-0.5).softmax(-1) @ v
        return self.head(x + self.o(y.transpose(1, 2).reshape(b, n, self.h * self.w)))


class NormedResult(nn.Module):
    """A scale for each column of a head's result."""

    def __init__(self, heads: int = 4, width: int = 8) -> None:
        super().__init__()
        self.h, self.w = heads, width
        self.q, self.k, self.v = (nn.Linear(6, heads * width) for _ in range(3))
        self.scale, self.o = nn.Parameter(torch.rand(width) + 0.5), nn.Linear(heads * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.h, self.w).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) * self.scale
        return self.o(y.transpose(1, 2).reshape(b, n, self.h * self.w))


HEADS: dict[str, tuple[Any, Any, dict[str, tuple[int, ...]]]] = {
    "rms": (lambda: NormedHeads(), torch.randn(2, 5, 16), {"q.weight": (16, 16), "o.weight": (16, 16)}),
    "layer": (lambda: NormedHeads(norm="layer"), torch.randn(2, 5, 16), {"q.weight": (16, 16)}),
    "grouped": (
        lambda: NormedHeads(keys=2),
        torch.randn(2, 5, 16),
        {"q.weight": (16, 16), "kv.weight": (16, 16)},
    ),
    "fused": (NormedFused, torch.randn(2, 5, 6), {"qkv.weight": (48, 16), "o.weight": (16, 16)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_whole_heads_go_under_a_norm_of_their_columns(name: str) -> None:
    build, x, shapes = HEADS[name]
    model = build()
    _, pruned = check(model, x, ratio=0, heads=0.5, exact=None)
    state = pruned.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert state["q_norm.weight"].shape == (8,)


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_columns_go_together(name: str) -> None:
    build, x, _ = HEADS[name]
    _, pruned = check(build(), x, ratio=0.5, heads=0.5, exact=None)
    assert pruned.state_dict()["q_norm.weight"].shape == (4,)


def test_a_scale_of_the_columns_of_a_result() -> None:
    _, pruned = check(NormedResult(), torch.randn(2, 5, 6), kept_at_most=0.6)
    assert pruned.state_dict()["scale"].shape == (4,)
