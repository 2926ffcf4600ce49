"""Properties that hold for every network, tried on random small ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import call, difference, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.api import graph_for
from fxprune.planning.plan import PruningPlan

TOLERANCE = 1e-9
SIDE = 4
HEADS = 2

# -- blocks: each takes its input width, and knows its output width -----------------------------------


class Block(nn.Module):
    """A piece of a random network.

    Attributes:
        out: width of the output.
    """

    out: int


class Conv(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = 4 + choice
        self.conv = nn.Conv2d(width, self.out, 3, padding=1, bias=choice % 2 == 0)
        self.bn = nn.BatchNorm2d(self.out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Residual(Block):
    """``x + f(x)``, with a gate on the channels."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width
        self.conv1 = nn.Conv2d(width, 5 + choice, 1)
        self.conv2 = nn.Conv2d(5 + choice, width, 3, padding=1)
        self.gate = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.empty(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.gelu(self.conv1(x))) * self.scale
        return x + y * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]


class Depthwise(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Grouped(Block):
    """Two convolutions in groups."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out, self.groups = 8, (2, 4)[choice % 2]
        self.conv1 = nn.Conv2d(width, 16, 1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=self.groups)
        self.conv3 = nn.Conv2d(16, 8, 1, groups=(1, self.groups)[choice // 2 % 2])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(self.conv1(x))))


class Cat(Block):
    """Dense connection: the input beside what is made of it."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width + 3 + choice
        self.conv = nn.Conv2d(width, 3 + choice, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], 1)


class Exchange(Block):
    """Chunks in another order, so that the boundary moves."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out, self.first = width, 1 + choice % (width - 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([self.first, self.out - self.first], 1)
        return torch.cat([F.relu(b), a], 1)


class Chunk(Block):
    """One half through a convolution, the other as it is."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        half = (width + 1) // 2
        self.conv = nn.Conv2d(half, 3 + choice, 1)
        self.out = 3 + choice + width - half

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([self.conv(a), b], dim=1)


class Slice(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.start, self.step = choice % 3, 1 + choice % 2
        self.out = len(range(width)[self.start :: self.step])

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start :: self.step]


class Shuffle(Block):
    """Channel shuffle, roll or flip."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out, self.choice = width, choice % 3

    def forward(self, x: Tensor) -> Tensor:
        if self.choice == 0 and self.out % 2 == 0:
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return torch.roll(x, 3, 1) if self.choice == 1 else x.flip(1)


class GroupNorm(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width
        self.norm = nn.GroupNorm(2 if width % 2 == 0 else 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Mlp(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width
        self.first, self.last = nn.Linear(width, 6 + choice), nn.Linear(6 + choice, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.gelu(self.first(x)))


class Norm(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Attention(Block):
    """Heads and widths are literals; the scale is taken from a shape."""

    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out, self.width = width, (4, 6, 8)[choice % 3]
        self.qkv = nn.Linear(width, 3 * HEADS * self.width)
        self.proj = nn.Linear(HEADS * self.width, width)
        self.fused = choice % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, self.width).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, HEADS * self.width))


class Multihead(Block):
    def __init__(self, width: int, choice: int) -> None:
        super().__init__()
        self.out = width
        self.attention = nn.MultiheadAttention(width, 2 if width % 2 == 0 else 1, batch_first=True)
        self.need = choice % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.need)[0]


IMAGE: list[Callable[[int, int], Block]] = [
    Conv, Residual, Depthwise, Grouped, Cat, Exchange, Chunk, Slice, Shuffle, GroupNorm,
]  # fmt: skip
TOKENS: list[Callable[[int, int], Block]] = [Mlp, Norm, Attention, Multihead]


class Network(nn.Module):
    """Image blocks, then token blocks or nothing, then a classifier."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        images, tokens, end = recipe
        self.stem = nn.Conv2d(3, 8, 1)
        width = 8
        self.images, self.tokens = nn.ModuleList(), nn.ModuleList()
        for chain, names in ((self.images, images), (self.tokens, tokens)):
            for block, choice in names:
                if width < 3:
                    break
                made = block(width, choice)
                chain.append(made)
                width = made.out
        self.end = end
        self.head = nn.Linear(width * SIDE * SIDE if end == "flatten" else width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.images:
            x = block(x)
        if self.end == "flatten":
            return self.head(x.flatten(1))
        x = x.flatten(2).transpose(1, 2)
        for block in self.tokens:
            x = block(x)
        return self.head(x.mean(1))


Recipe = tuple[
    list[tuple[Callable[[int, int], Block], int]], list[tuple[Callable[[int, int], Block], int]], str
]


@st.composite
def networks(draw: st.DrawFn, exact: bool = False) -> Network:
    """A random network in float64 and evaluation mode; no two of its parameter entries are equal."""
    image = [block for block in IMAGE if not (exact and block is GroupNorm)]
    token = [block for block in TOKENS if not (exact and block is Norm)]
    end = draw(st.sampled_from(["flatten", "tokens"]))
    recipe = (
        draw(st.lists(st.tuples(st.sampled_from(image), st.integers(0, 5)), min_size=1, max_size=4)),
        draw(st.lists(st.tuples(st.sampled_from(token), st.integers(0, 5)), min_size=1, max_size=2))
        if end == "tokens"
        else [],
        end,
    )
    torch.manual_seed(draw(st.integers(0, 3)))
    model = Network(recipe).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return model


def image() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)


def masked_by_value(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """The original with zeros for all parameter entries whose values the pruned network does not hold.

    Parameters of the result are plain slices of the originals, and no two entries are equal, so the values
    alone tell which entries survived: this oracle knows nothing of units, groups or plans.
    """
    twin = copy.deepcopy(model)
    kept = dict(pruned.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            survives = torch.isin(parameter, kept[name])
            assert int(survives.sum()) == kept[name].numel(), f"{name} is no slice of the original"
            parameter.mul_(survives)
    return twin


def error(model: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """Relative error of the pruned network against the masked original."""
    with torch.no_grad():
        wanted, got = call(masked_by_value(model, pruned), x), call(pruned, x)
    assert got.shape == wanted.shape
    return difference(got, wanted)


def is_exact(group: fxprune.Group) -> bool:
    return group.exact


def check_rows(model: nn.Module, plan: PruningPlan) -> None:
    """Every row keeps a unit, and rows that belong together lose equally many."""
    for group in graph_for(plan, model):
        gone = np.isin(np.arange(group.size), plan.removed.get(group.name, []))
        for atoms in group.balance:
            counts = [int(gone[row].sum()) for row in atoms]
            assert len(set(counts)) == 1
            assert all(count < row.size for count, row in zip(counts, atoms, strict=True))


@given(networks(), st.sampled_from([0.25, 0.5, 0.8]))
def test_exact_groups_prune_exactly(model: Network, ratio: float) -> None:
    """The forward runs, and equals that of the masked original; the original stays as it was."""
    x, before = image(), snapshot(model)
    plan = fxprune.plan(model, x, ratio=ratio, where=is_exact)
    pruned = plan.apply(model)
    assert error(model, pruned, x) < TOLERANCE
    assert fxprune.verify(model, pruned, plan, x).exact
    check_rows(model, plan)
    assert snapshot(model) == before


@given(networks(), st.sampled_from([0.5, 0.9]))
def test_all_groups_prune(model: Network, ratio: float) -> None:
    """Inexact groups too: the forward runs, on other batch sizes as well, and node by node all is equal."""
    x = image()
    plan = fxprune.plan(model, x, ratio=ratio)
    pruned = plan.apply(model)
    assert fxprune.verify(model, pruned, plan, x).error < 1e-8
    assert pruned(torch.cat([x, x, x])).shape == (6, 3)
    check_rows(model, plan)


@given(networks(exact=True))
def test_networks_without_normalisation_are_exact(model: Network) -> None:
    """Where no layer or group norm stands, every group is exact but those a softmax runs over."""
    assert all(group.exact or "softmax" in group.inexact_because for group in fxprune.analyze(model, image()))


@given(networks())
def test_ratio_zero_changes_nothing(model: Network) -> None:
    """Nothing is removed, and the outputs are equal bit by bit."""
    x = image()
    plan = fxprune.plan(model, x, ratio=0)
    assert not plan.removed
    pruned = plan.apply(model)
    state = pruned.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(pruned(x), model(x))


@given(networks(), st.data())
def test_one_group_alone_is_exact(model: Network, data: st.DataObject) -> None:
    """Whichever group is removed alone, the result is exact."""
    x = image()
    groups = [group for group in fxprune.analyze(model, x) if group.exact]
    assume(groups)
    name = data.draw(st.sampled_from(sorted(group.name for group in groups)))
    pruned = fxprune.prune(model, x, ratio=0.5, where=lambda group: group.name == name and group.exact)
    assert error(model, pruned, x) < TOLERANCE


@given(networks(), st.randoms(use_true_random=False))
def test_order_of_groups_is_irrelevant(model: Network, random: Any) -> None:
    """A plan is a mapping: neither the order of its groups nor that of the units in it matters."""
    x = image()
    plan = fxprune.plan(model, x, ratio=0.5)
    names = list(plan.removed)
    random.shuffle(names)
    other = replace(
        plan, removed={name: random.sample(plan.removed[name], len(plan.removed[name])) for name in names}
    )
    a, b = plan.apply(model), other.apply(model)
    assert {n: t.tolist() for n, t in a.state_dict().items()} == {
        n: t.tolist() for n, t in b.state_dict().items()
    }
    assert torch.equal(a(x), b(x))


@given(networks())
def test_plans_survive_json(model: Network) -> None:
    """A plan read back is equal, and does the same to a copy of the architecture."""
    x = image()
    plan = fxprune.plan(model, x, ratio=0.5)
    read = PruningPlan.from_json(plan.to_json())
    assert read == plan
    assert read.to_json() == plan.to_json()
    assert torch.equal(read.apply(copy.deepcopy(model))(x), plan.apply(model)(x))


@given(networks(), st.integers(0, 100))
def test_random_units_prune_exactly(model: Network, seed: int) -> None:
    """Which units go does not matter; the same seed takes the same ones."""
    x = image()
    plan = fxprune.plan(model, x, ratio=0.5, importance="random", seed=seed, where=is_exact)
    assert plan == fxprune.plan(model, x, ratio=0.5, importance="random", seed=seed, where=is_exact)
    assert error(model, plan.apply(model), x) < TOLERANCE


@given(networks())
def test_pruning_twice(model: Network) -> None:
    """A pruned network is a model like any other."""
    x = image()
    once = fxprune.prune(model, x, ratio=0.4, where=is_exact)
    twice = fxprune.prune(once, x, ratio=0.4, where=is_exact)
    assert list(twice.state_dict()) == list(model.state_dict())
    assert error(once, twice, x) < TOLERANCE
    assert error(model, twice, x) < TOLERANCE


@given(networks())
def test_analysis_ignores_values(model: Network) -> None:
    """Groups follow from shapes alone: a copy on the meta device has the same ones."""
    x = image()
    here = [(repr(group), [str(m.axis) for m in group.members]) for group in fxprune.analyze(model, x)]
    there = fxprune.analyze(copy.deepcopy(model).to("meta"), x.to("meta"))
    assert [(repr(group), [str(m.axis) for m in group.members]) for group in there] == here
