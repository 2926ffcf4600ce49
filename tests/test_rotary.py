"""Rotary positions: tables that all layers and heads share leave each of them its own columns and heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import call, check, difference
from test_properties import masked_by_value
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import capture
from fxprune.coupling import tables

WIDTH, HEADS, SHARED, COLUMNS, LENGTH = 24, 4, 2, 8, 5
PICKS = frozenset([torch.take_along_dim, torch.index_select])
X = torch.randn(2, LENGTH, 6, generator=torch.Generator().manual_seed(0))


def halves(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([-b, a], -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Layer(nn.Module):
    """Attention whose queries and keys are turned; two query heads share a key head."""

    columns = COLUMNS

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.shared = shared
        self.q, self.o = nn.Linear(WIDTH, HEADS * self.columns), nn.Linear(HEADS * self.columns, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, shared * self.columns) for _ in "kv")

    def turn(self, x: Tensor, tables: Any) -> Tensor:
        cos, sin = tables
        return x * cos + halves(x) * sin

    def forward(self, x: Tensor, tables: Any) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, -1).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.shared, -1).transpose(1, 2) for layer in (self.k, self.v))
        q, k = self.turn(q, tables), self.turn(k, tables)
        k, v = (t.repeat_interleave(HEADS // self.shared, dim=1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Partial(Layer):
    """Only the first columns of each head are turned."""

    columns = 12

    def turn(self, x: Tensor, tables: Any) -> Tensor:
        width = tables[0].shape[-1]
        return torch.cat([super().turn(x[..., :width], tables), x[..., width:]], -1)


class Interleaved(Layer):
    def turn(self, x: Tensor, tables: Any) -> Tensor:
        cos, sin = tables
        return x * cos + neighbours(x) * sin


class Late(Layer):
    """Turned before heads and tokens change places."""

    def turn(self, x: Tensor, tables: Any) -> Tensor:
        cos, sin = (t.unsqueeze(-2) for t in tables)
        x = x.transpose(1, 2)
        return (x * cos + halves(x) * sin).transpose(1, 2)


class Spread(Layer):
    def turn(self, x: Tensor, tables: Any) -> Tensor:
        return super().turn(x, [t.expand(1, x.shape[1], -1, -1) for t in tables])


class InPlace(Layer):
    def turn(self, x: Tensor, tables: Any) -> Tensor:
        cos, sin = tables
        other = halves(x)
        return x.mul_(cos).add_(other.mul_(sin))


class Complex(Layer):
    def turn(self, x: Tensor, tables: Any) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * tables).flatten(3)


class Net(nn.Module):
    """Two layers of attention on a stream that no norm reduces; the angles are computed from a buffer."""

    def __init__(self, layer: type[Layer] = Layer, shared: int = SHARED) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(layer(shared) for _ in range(2))
        self.register_buffer("rates", torch.logspace(0, -1, COLUMNS // 2))
        self.build()

    def build(self) -> None:
        pass

    def angles(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device)[:, None] * self.rates

    def tables(self, x: Tensor) -> Any:
        angles = self.angles(x)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        tables = self.tables(x)
        for layer in self.layers:
            x = x + layer(x, tables)
        return self.last(x)


class Stored(Net):
    """The tables themselves are buffers, longer than the sequence."""

    def build(self) -> None:
        angles = torch.arange(9)[:, None] * self.rates.repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def tables(self, x: Tensor) -> Any:
        return self.cos[: x.shape[1]], self.sin[: x.shape[1]]


class LookedUp(Stored):
    """Positions are looked up, in a batch."""

    def tables(self, x: Tensor) -> Any:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


class Neighbours(Net):
    def tables(self, x: Tensor) -> Any:
        angles = torch.stack([self.angles(x)] * 2, -1).flatten(-2)
        return angles.cos(), angles.sin()


class Polar(Net):
    def tables(self, x: Tensor) -> Any:
        angles = self.angles(x)
        return torch.polar(torch.ones_like(angles), angles)


class StoredPolar(Net):
    def build(self) -> None:
        angles = torch.arange(9)[:, None] * self.rates
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def tables(self, x: Tensor) -> Any:
        return self.turns[: x.shape[1]]


NETS = {
    "computed": lambda: Net(),
    "one key head each": lambda: Net(shared=HEADS),
    "partial": lambda: Net(Partial),
    "interleaved": lambda: Neighbours(Interleaved),
    "late": lambda: Net(Late),
    "spread": lambda: Net(Spread),
    "in place": lambda: Net(InPlace),
    "stored": lambda: Stored(),
    "looked up": lambda: LookedUp(),
    "complex": lambda: Polar(Complex),
    "stored complex": lambda: StoredPolar(Complex),
}


def judge(model: nn.Module, pruned: nn.Module) -> None:
    """The pruned network computes what the values of its parameters say (see :mod:`test_properties`)."""
    wanted = masked_by_value(model, pruned).double()
    assert difference(call(copy.deepcopy(pruned).double(), X.double()), call(wanted, X.double())) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_heads_and_columns(name: str) -> None:
    """Each layer has its own group, each key head chooses its own columns, and whole heads can go."""
    model = NETS[name]()
    graph = fxprune.analyze(model, X)
    heads = model.layers[0].shared
    for layer in ("layers.0", "layers.1"):
        for group in graph.explain(f"{layer}.q.weight", 0).groups:  # two if some columns are not turned
            names = {member.axis.name.rpartition(".")[0] for member in group.members if member.trainable}
            assert names == {f"{layer}.q", f"{layer}.k"}
            assert all(len(atoms) == heads for atoms in group.balance)
            assert len(group.rows) == heads
    assert [len(rows) for rows in graph.rows] == [heads, heads]
    for ratio, share in ((0.5, 0), (0, 0.5), (0.4, 0.5))[0 if name == "computed" else 2 :]:
        narrows = ["layers.1.q.weight", "layers.1.k.weight", "layers.1.o.weight"]
        plan, pruned = check(model, X, ratio=ratio, heads=share, exact=True, narrows=narrows)
        assert plan.check(model) == ()
        assert not plan.held, plan.notes
        buffers = dict(pruned.named_buffers())
        assert all(torch.equal(buffer, buffers[own]) for own, buffer in model.named_buffers())
        judge(model, pruned)


@pytest.mark.parametrize("name", ["computed", "partial", "interleaved", "complex"])
def test_exported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where torch.export captures."""
    monkeypatch.setattr(capture, "RUNGS", {"torch.export": capture.RUNGS["torch.export"]})
    model = NETS[name]()
    plan = fxprune.plan(model, X, ratio=0.4, heads=0.5)
    assert not plan.held, plan.notes
    pruned = plan.apply(model)
    keys = pruned.get_parameter("layers.1.k.weight")
    assert keys.shape[0] < model.layers[1].k.weight.shape[0] // 2
    judge(model, pruned)


def test_columns_differ() -> None:
    """The smallest columns of each head go, wherever they lie."""
    model = Net()
    small = {"layers.0": ((0, 1), (2, 3)), "layers.1": ((0, 3), (1, 2))}
    with torch.no_grad():
        for layer, by_head in small.items():
            weight = model.get_submodule(layer).k.weight.view(SHARED, 2, COLUMNS // 2, WIDTH)
            for head, columns in enumerate(by_head):
                weight[head, :, list(columns)] *= 1e-3
    plan = fxprune.plan(model, X, ratio=0.5, importance=_of_keys)
    pruned = plan.apply(model)
    for layer in small:
        assert float(pruned.get_submodule(layer).k.weight.abs().mean(1).min()) > 1e-2
    judge(model, pruned)


def _of_keys(group: fxprune.Group) -> Tensor:
    """The size of the rows of the key projections, or of the first axis where there are none."""
    members = group.members
    member = next((m for m in members if m.axis.name.endswith("k.weight")), members[0])
    size = member.tensor.detach().abs().movedim(member.axis.dim, 0).flatten(1).sum(1)
    return torch.zeros(group.size).index_add_(0, torch.from_numpy(member.units), size)


class Folded(Layer):
    """The heads of all samples stand in one dimension, as in ESM-2."""

    def forward(self, x: Tensor, tables: Any) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).transpose(0, 1).contiguous().view(n, b * HEADS, COLUMNS).transpose(0, 1)
            for layer in (self.q, self.k, self.v)
        )
        q, k = self.turn(q, tables), self.turn(k, tables)
        seen = torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v
        return self.o(seen.transpose(0, 1).contiguous().view(n, b, HEADS * COLUMNS).transpose(0, 1))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_picked_by_head_is_not_that_of_the_batch_of_the_example(batch: int) -> None:
    model = Net(Folded, HEADS)
    plan = fxprune.plan(model, X[:batch], ratio=0.5)
    pruned = plan.apply(model)
    assert pruned.get_parameter("layers.1.v.weight").shape[0] < HEADS * COLUMNS
    masked = copy.deepcopy(model).double()
    for name, mask in plan.masks(model).items():
        masked.get_parameter(name).data.mul_(mask)
    for size in (1, 2, 3):
        x = X[:1].repeat(size, 1, 1).double()
        torch.testing.assert_close(pruned.double()(x), masked(x))


def test_table_of_one_user_is_narrowed_at_its_source() -> None:
    """Where nobody else is coupled by it, nothing is left to do at run time."""
    model = nn.Sequential(nn.Linear(6, 8), Shift(), nn.Linear(8, 3))
    _, pruned = check(model, X, exact=True, narrows=["0.weight"])
    assert pruned.get_buffer("1.rates").shape == (4,)
    assert {node.target for node in pruned.graph.nodes}.isdisjoint(PICKS)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rates.cos()


class Slopes(Layer):
    """A slope for each head, the same in all layers (Press et al., 2022)."""

    def forward(self, x: Tensor, tables: Any) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) + tables).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Distances(Net):
    def tables(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device, dtype=self.rates.dtype)
        return -self.rates[:, None, None].exp() * (place[:, None] - place).abs()


def test_table_by_head() -> None:
    """Layers whose heads share a table of slopes lose different heads."""
    model = Distances(Slopes, HEADS)
    assert [len(rows) for rows in fxprune.analyze(model, X).rows] == [HEADS, HEADS]
    plan, pruned = check(model, X, ratio=0.4, heads=0.5, exact=True, narrows=["layers.1.q.weight"])
    assert not plan.held
    judge(model, pruned)


class Cached(Net):
    """The turned keys are an output, as those of a cache."""

    def forward(self, x: Tensor) -> Any:
        layer = self.layers[0]
        x = self.first(x)
        keys = layer.k(x).view(*x.shape[:2], SHARED, -1).transpose(1, 2)
        return super().forward(x @ self.first.weight), layer.turn(keys, self.tables(x))


def test_keys_that_are_handed_out_stay() -> None:
    """An output keeps its width, and so do the heads that make it; the other layer is free."""
    _, pruned = check(Cached(), X, heads=0.5, narrows=["layers.1.q.weight"])
    assert pruned.layers.get_submodule("0").k.weight.shape[0] == SHARED * COLUMNS
    assert pruned.layers.get_submodule("1").k.weight.shape[0] < SHARED * COLUMNS


@pytest.mark.parametrize("name", ["computed", "partial", "stored", "complex"])
def test_pruned_again(name: str) -> None:
    """A network that picks from its tables is narrowed further; its indices shrink, and no pick is added."""
    model = NETS[name]()
    first = fxprune.prune(model, X, ratio=0.3)
    first(X)  # generates its code
    plan, second = check(first, X, ratio=0.4, heads=0.5, narrows=["layers.1.q.weight"])
    assert not plan.held, plan.notes
    judge(model, second)
    once, twice = (sum(node.target in PICKS for node in net.graph.nodes) for net in (first, second))
    assert once == twice == 8 - 4 * (name == "complex")


def test_only_units_that_are_met_or_stand_in_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """However wide the layers around them are."""
    joined: list[int] = []
    some = tables._some

    def counted(count: int, classes: Any) -> Any:
        units, place = some(count, classes)
        joined.append(units.count)
        return units, place

    monkeypatch.setattr(tables, "_some", counted)
    layers = [nn.Linear(6, 5000), nn.Linear(5000, 6)]
    graph = fxprune.analyze(nn.Sequential(*layers, Net()), X)
    assert graph.run.coupler.units.count > 5000
    assert joined
    assert max(joined) < 500
