"""Whole rows: attention heads, groups of convolutions and group norms, judged by the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import PlanError, RatioError


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TOKENS = _random(2, 5, 6)
IMAGE = _random(2, 3, 8, 8)
WIDTH, HEADS = 24, 4


class Net(nn.Module):
    """An attention between two linear layers; ``attend`` is the part that differs."""

    heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.build()

    def build(self) -> None:
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out = self.attend(*self.qkv(x))
        b, n = x.shape[:2]
        return self.last(x + self.proj(out.transpose(1, 2).reshape(b, n, -1)))


class LiteralViews(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (layer(x).view(-1, 5, 4, 6).permute(0, 2, 1, 3) for layer in (self.q, self.k, self.v))
        out = self.attend(q, k, v).permute(0, 2, 1, 3).contiguous().view(-1, 5, 24)
        return self.last(x + self.proj(out))


class FlattenedHeads(Net):
    """``(B H, N, D)`` with sizes that are computed, as in fairseq's and BART's attention."""

    def split(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.view(b, n, self.heads, c // self.heads).transpose(1, 2)
        return x.reshape(b * self.heads, n, c // self.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.4).softmax(-1), v)
        return out.view(out.shape[0] // self.heads, self.heads, out.shape[1], out.shape[2])


class Fused(Net):
    def build(self) -> None:
        self.all = nn.Linear(WIDTH, 3 * WIDTH)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = self.all(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class FusedIndexed(Fused):
    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.all(x).reshape(-1, 5, 3, 4, 6).permute(2, 0, 3, 1, 4)
        return y[0], y[1], y[2]


class FusedChunks(Fused):
    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.all(x).chunk(3, dim=-1)
        return self.split(q), self.split(k), self.split(v)


class FusedByHead(Fused):
    """Query, key and value of one head lie side by side, as in GPT-NeoX."""

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.all(x).view(b, n, self.heads, 18).transpose(1, 2).split(6, dim=-1)
        return q, k, v


class Scaled(Net):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class BiasTable(Net):
    """A learned bias for each head and distance, and one for each head."""

    def build(self) -> None:
        super().build()
        self.table = nn.Parameter(_random(9, HEADS))
        self.each = nn.Parameter(_random(HEADS, 1, 1))
        index = torch.arange(5)[:, None] - torch.arange(5)[None] + 4
        self.register_buffer("index", index.flatten())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index].view(5, 5, -1).permute(2, 0, 1).unsqueeze(0)
        return (q @ k.transpose(-2, -1) + bias + self.each).softmax(-1) @ v


class Cosine(Net):
    """Swin v2: cosine attention with a learned scale for each head."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (logits * self.scale.clamp(max=4.6).exp()).softmax(-1) @ v


class Slopes(Net):
    """A constant slope for each head (ALiBi), as a buffer."""

    def build(self) -> None:
        super().build()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float().view(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(5, device=q.device)
        distance = (steps[None] - steps[:, None]).abs()
        return (q @ k.transpose(-2, -1) - self.slopes * distance).softmax(-1) @ v


class TalkingHeads(Net):
    """Linear layers over the head axis before and after the softmax (Shazeer et al., 2020)."""

    def build(self) -> None:
        super().build()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(logits.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


class Grouped(Net):
    """Two query heads share a key and value head."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)

    def widen(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=1)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        k, v = (layer(x).view(b, n, 2, 6).transpose(1, 2) for layer in (self.k, self.v))
        return self.split(self.q(x)), self.widen(k), self.widen(v)


class GroupedExpand(Grouped):
    def widen(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


class GroupedFolded(Grouped):
    """The queries get a dimension more, and the keys broadcast."""

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        k, v = (layer(x).view(b, n, 2, 1, 6).permute(0, 2, 3, 1, 4) for layer in (self.k, self.v))
        return self.q(x).view(b, n, 2, 2, 6).permute(0, 2, 3, 1, 4), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v).flatten(1, 2)


class Rotary(Net):
    """A table of angles that is the same for all heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(6, dtype=q.dtype, device=q.device) * 0.3
        return super().attend(q * angles.cos(), k * angles.cos(), v)


NETS: list[type[Net]] = [
    Net, LiteralViews, FlattenedHeads, Fused, FusedIndexed, FusedChunks, FusedByHead, Scaled, BiasTable,
    Cosine, Slopes, TalkingHeads, Grouped, GroupedExpand, GroupedFolded, Rotary,
]  # fmt: skip


def _rows(model: nn.Module, inputs: Any) -> list[int]:
    return [len(rows) for rows in fxprune.analyze(model, inputs).rows]


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_heads(net: type[Net]) -> None:
    """Half of the heads go, and nothing else."""
    model = net()
    plan, pruned = check(model, TOKENS, ratio=0, heads=0.5, narrows=["proj.weight"])
    assert not plan.held
    widths = dict(pruned.named_parameters())
    value = next(name for name in ("v.weight", "all.weight") if name in widths)
    old = model.get_parameter(value)
    assert widths[value].shape == (old.shape[0] // 2, old.shape[1])
    assert widths["embed.weight"].shape == model.embed.weight.shape


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_heads_and_columns(net: type[Net]) -> None:
    """Whole heads, and columns of those that remain; down to one head, or one column."""
    # A shared head of one column loses its label where it is repeated, and is held.
    for ratio, heads in ((0.4, 0.25), (0.4, 0.9), (0.7 if issubclass(net, Grouped) else 0.9, 0.5)):
        plan, _ = check(net(), TOKENS, ratio=ratio, heads=heads)
        assert not plan.held


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` between two linear layers."""

    def __init__(self, kind: str, extras: str, batch_first: bool, weights: str) -> None:
        super().__init__()
        self.kind, self.weights = kind, weights
        self.embed, self.other, self.last = nn.Linear(6, WIDTH), nn.Linear(6, 16), nn.Linear(WIDTH, 5)
        widths = {"kdim": 16, "vdim": 16} if kind == "other widths" else {}
        if kind == "cross":
            self.other = nn.Linear(6, WIDTH)
        appended = {"add_bias_kv": True, "add_zero_attn": True} if extras == "appended" else {}
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **widths, **appended)

    def forward(self, x: Tensor, y: Tensor, padding: Tensor | None = None) -> Any:
        x, y = self.embed(x), self.other(y)
        if self.kind == "self":
            y = x
        need = self.weights != "none"
        out, weights = self.attend(
            x, y, y, key_padding_mask=padding, need_weights=need, average_attn_weights=self.weights != "each"
        )
        return (self.last(x + out), weights) if self.weights in ("mean", "each") else self.last(x + out)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extras", ["plain", "padding", "appended"])
@pytest.mark.parametrize("kind", ["self", "cross", "other widths"])
def test_multihead_attention(kind: str, extras: str, batch_first: bool) -> None:
    """Heads and columns of ``nn.MultiheadAttention``; weights that are computed, but not used."""
    keys = 5 if kind == "self" else 7
    inputs = {"x": _random(2, 5, 6), "y": _random(2, keys, 6)}
    if not batch_first:
        inputs = {name: x.transpose(0, 1).contiguous() for name, x in inputs.items()}
    if extras == "padding":
        inputs["padding"] = torch.arange(keys)[None] >= torch.tensor([[keys], [keys - 1]])
    packed = kind != "other widths"
    names = ["attend.in_proj_weight"] if packed else [f"attend.{side}_proj_weight" for side in "qkv"]
    names += ["attend.out_proj.weight"]
    names += ["attend.bias_k", "attend.bias_v"] if extras == "appended" else []
    for weights in ("unused", "none"):
        net = Multihead(kind, extras, batch_first, weights)
        _, pruned = check(net, inputs, ratio=0, heads=0.5, narrows=names, exact=True, batch_dim=None)
        assert pruned.get_submodule("attend").num_heads == 2
    plan, pruned = check(net, inputs, ratio=0.4, heads=0.25, narrows=names, exact=True, batch_dim=None)
    assert pruned.get_submodule("attend").num_heads == 3
    assert not plan.held
    pruned(**inputs)  # generates its code
    check(pruned, inputs, ratio=0.3, heads=0.4, narrows=names, exact=True, batch_dim=None)  # once more


class Normed(BiasTable):
    """A norm of the queries with a weight for each column, the same for all heads."""

    def build(self) -> None:
        super().build()
        self.norm = nn.LayerNorm(6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.norm(q), k, v)


def test_heads_of_tied_columns_go() -> None:
    """Columns that all heads share are units of their own, and so are the heads."""
    model = Normed()
    assert len(fxprune.analyze(model, TOKENS).rows) == 1
    _, pruned = check(model, TOKENS, ratio=0, heads=0.5, narrows=["q.weight", "v.weight", "table"])
    assert pruned.state_dict()["norm.weight"].shape == (6,)
    check(model, TOKENS, ratio=0.5, heads=0.5, narrows=["q.weight", "v.weight", "norm.weight"])


@pytest.mark.parametrize("weights", ["mean", "each"])
def test_heads_that_are_looked_at_stay(weights: str) -> None:
    """Attention weights that are an output keep their heads, and their mean."""
    net = Multihead("self", "plain", True, weights)
    graph = fxprune.analyze(net, (TOKENS, TOKENS))
    assert graph.rows == ()
    check(net, (TOKENS, TOKENS), ratio=0, heads=0.5, shrinks=False, batch_dim=None)
    check(net, (TOKENS, TOKENS), ratio=0.5, heads=0.5, narrows=["attend.in_proj_weight"], batch_dim=None)


def test_vit() -> None:
    model = torchvision.models.VisionTransformer(16, 8, 2, 4, 24, 48, num_classes=5)
    plan, pruned = check(model, _random(2, 3, 16, 16), ratio=0, heads=0.5)
    for layer in pruned.encoder.layers.children():
        assert layer.self_attention.num_heads == 2
    assert not plan.held
    check(model, _random(2, 3, 16, 16), ratio=0.3, heads=0.25)


@pytest.mark.parametrize("version", [1, 2])
def test_swin(version: int) -> None:
    """Windows, shifts, and tables of biases (and a scale, in version 2) whose last axis are the heads."""
    block: Any = {}
    if version == 2:
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

        block = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    model = torchvision.models.SwinTransformer(
        [4, 4], 16, [2, 2], [4, 4], [4, 4], num_classes=5, stochastic_depth_prob=0.0, **block
    )
    inputs = _random(2, 3, 32, 32)
    heads = "cpb_mlp.2.weight" if version == 2 else "relative_position_bias_table"
    narrows = [f"features.{stage}.{i}.attn.{heads}" for stage in (1, 3) for i in (0, 1)]
    narrows += [f"features.{stage}.{i}.attn.qkv.weight" for stage in (1, 3) for i in (0, 1)]
    plan, _ = check(model, inputs, ratio=0, heads=0.5, narrows=narrows)
    assert not plan.held, plan.notes
    check(model, inputs, ratio=0.3, heads=0.25, narrows=narrows)


class Convolutions(nn.Module):
    """Grouped convolutions and group norms between two plain convolutions."""

    def __init__(self, *layers: nn.Module, width: int = 24, out: int = 24) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(out, 4, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


class Functional(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        (norm, conv) = self.layers
        x = F.group_norm(self.first(x), 4, norm.weight, norm.bias)
        return self.last(F.conv2d(F.relu(x), conv.weight, conv.bias, groups=4))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "grouped": (lambda: Convolutions(nn.Conv2d(24, 24, 3, groups=4)), 4),
    "widens": (lambda: Convolutions(nn.Conv2d(24, 48, 3, groups=4), out=48), 4),
    "transposed": (lambda: Convolutions(nn.ConvTranspose2d(24, 12, 3, groups=4), out=12), 4),
    "chain": (lambda: Convolutions(*(nn.Conv2d(24, 24, 1, groups=4) for _ in range(2))), 4),
    "coarser": (lambda: Convolutions(nn.Conv2d(24, 24, 3, groups=4), nn.Conv2d(24, 24, 1, groups=2)), 2),
    "resnext": (
        lambda: Convolutions(
            nn.Conv2d(24, 24, 3, groups=8, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1)
        ),
        8,
    ),
    "depthwise inside": (
        lambda: Convolutions(nn.Conv2d(24, 24, 3, groups=4), nn.Conv2d(24, 24, 1, groups=24)), 4
    ),
    "group norm": (lambda: Convolutions(nn.GroupNorm(4, 24), nn.ReLU()), 4),
    "norm and groups": (lambda: Convolutions(nn.GroupNorm(4, 24), nn.Conv2d(24, 24, 3, groups=4)), 4),
    "functional": (lambda: Functional(nn.GroupNorm(4, 24), nn.Conv2d(24, 24, 3, groups=4)), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_groups(name: str) -> None:
    """Whole groups go; a group norm over fewer groups stays exact."""
    build, rows = CONVOLUTIONS[name]
    model = build()
    assert _rows(model, IMAGE) == [rows]
    plan, pruned = check(model, IMAGE, ratio=0, heads=0.5, narrows=["first.weight", "layers.0.weight"])
    assert not plan.held
    assert fxprune.verify(model, pruned, plan, IMAGE).exact
    for module, old in zip(pruned.layers.children(), model.layers.children(), strict=True):
        if isinstance(module, nn.GroupNorm):
            assert (module.num_groups, module.num_channels) == (2, 12)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            assert module.groups == max(old.groups // 2, 1)
    plan, pruned = check(model, IMAGE, ratio=0.4, heads=0.5)
    assert not plan.held


def test_depthwise_has_no_rows() -> None:
    """A group of one channel is a unit: ``ratio`` removes it."""
    model = Convolutions(nn.Conv2d(24, 24, 3, groups=24))
    assert _rows(model, IMAGE) == []
    plan, _ = check(model, IMAGE, ratio=0, heads=0.5, shrinks=False)
    assert plan.removed == {}


def test_no_heads_costs_nothing() -> None:
    """Plans without heads are what they were."""
    model = BiasTable()
    plan = fxprune.plan(model, TOKENS, ratio=0.5)
    assert plan == fxprune.plan(model, TOKENS, ratio=0.5, heads=0)
    pruned = plan.apply(model)
    assert pruned.table.shape == model.table.shape


def test_lowest_rows_go() -> None:
    """The heads with the smallest weights go, wherever they lie; the groups tell their rows."""
    model = Net()
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight.view(HEADS, 6, WIDTH)[[0, 2]] *= 1e-2
    graph = fxprune.analyze(model, TOKENS)
    axes = {"q.weight[0]", "v.weight[0]"}
    groups = {g.name: g for g in graph if any(str(m.axis) in axes for m in g.members)}
    assert all(len(group.rows) == HEADS and "in 4 rows" in repr(group) for group in groups.values())
    plan = fxprune.plan(model, TOKENS, ratio=0, heads=0.5)
    assert set(plan.removed) == set(groups)
    for name, gone in plan.removed.items():
        assert gone == sorted(torch.cat([torch.as_tensor(groups[name].rows[row]) for row in (0, 2)]).tolist())


def test_where_covers_all_groups_of_a_row() -> None:
    model = Net()
    plan = fxprune.plan(
        model, TOKENS, ratio=0, heads=0.5, where=lambda g: all(m.axis.name != "q.weight" for m in g.members)
    )
    assert plan.removed == {}


def test_edited_plans() -> None:
    """A plan that removes a row from one group only, or rows unevenly, is refused with the reason."""
    model = Multihead("self", "plain", True, "none")
    inputs = (TOKENS, TOKENS)
    plan = fxprune.plan(model, inputs, ratio=0, heads=0.25)
    graph = fxprune.analyze(model, inputs)
    (rows,) = graph.rows
    (name,) = rows.groups
    units = rows.rows[1][name].tolist()
    for part, reason in ((units[:6], "rows"), (units[:3], "equal"), (units, None)):
        edited = dataclasses.replace(plan, removed={name: part})
        if reason is None:
            edited.apply(model)
        else:
            with pytest.raises(PlanError, match=reason):
                edited.apply(model)


@pytest.mark.parametrize("heads", [-0.1, 1, 1.5, float("nan"), "half", True, None])
def test_bad_share(heads: Any) -> None:
    with pytest.raises(RatioError, match="heads is the share"):
        fxprune.plan(Net(), TOKENS, heads=heads)


def test_heads_that_are_not_there() -> None:
    """Nothing goes, and the plan says why."""
    plan = fxprune.plan(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(1, 3), heads=0.25)
    assert "heads = 0.25 takes nothing: no attention heads" in plan.notes[-1]
    assert plan.removed
    plan = fxprune.plan(Net(), TOKENS, ratio=0, heads=0.1)
    assert plan.removed == {}
    assert "heads = 0.1 takes nothing: it is less than one" in plan.notes[-1]
    assert "(the largest has 4)" in plan.notes[-1]
    assert fxprune.plan(Net(), TOKENS, ratio=0, heads=0.25).notes == ()
