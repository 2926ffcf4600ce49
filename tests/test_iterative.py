"""Pruning in steps: plans for the current network, the one plan that they add up to, and schedules."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from oracle import difference, stir
from test_training import Attending, Convolutional, train
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import BudgetError, PlanError, RatioError
from fxprune.iterative import CURVES, agp, since


class Shuffled(nn.Module):
    """A channel shuffle, a concatenation that is split elsewhere, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.c, self.d = nn.Conv2d(12, 16, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        x, gate = self.c(x).chunk(2, dim=1)
        return self.d(x * torch.sigmoid(gate)).mean((2, 3))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.recurrent = nn.GRU(12, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(F.gelu(self.recurrent(x)[0]))


class Mixed(nn.Module):
    """Residual convolutions with batch norm, then attention with four heads; wide enough for many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40)
        self.inner, self.inner_norm = nn.Conv2d(40, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.outer, self.outer_norm = nn.Conv2d(24, 40, 1), nn.BatchNorm2d(40)
        self.qkv, self.project = nn.Linear(40, 3 * 48), nn.Linear(48, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x))))))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(-1, 16, 3, 4, 12).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.head((x + self.project(mixed.transpose(1, 2).reshape(-1, 16, 48))).mean(1))


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=5
    )


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], embed_dim=16, depths=[2], num_heads=[2], window_size=[2, 2], num_classes=5
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutional": (Convolutional, torch.randn(4, 3, 8, 8)),
    "attending": (Attending, torch.randint(0, 11, (4, 5))),
    "shuffled": (Shuffled, torch.randn(2, 3, 4, 4)),
    "attention": (Attention, torch.randn(2, 4, 5)),
    "mixed": (Mixed, torch.randn(2, 3, 4, 4)),
    "vit": (vision_transformer, torch.randn(2, 3, 16, 16)),
    "swin": (swin, torch.randn(2, 3, 16, 16)),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
        torch.randn(2, 3, 32, 32),
    ),
}


def equal(a: nn.Module, b: nn.Module) -> bool:
    """The same parameters and buffers, to the last bit."""
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) for name in x)


def shake(model: nn.Module) -> None:
    """As if it had been trained: another order of importance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)


@pytest.mark.parametrize("name", NETS)
def test_steps_equal_the_composed_plan(name: str) -> None:
    """Plans one after the other, each for what the last one left, are one plan for the original."""
    build, x = NETS[name]
    model = stir(build()).eval()
    current: nn.Module = model
    total: fxprune.PruningPlan | None = None
    narrowed = []
    for number in range(5):
        step = fxprune.plan(current, x, ratio=0.34, importance="random", seed=number)
        narrowed.append(len(step.removed))
        current = step.apply(current)
        total = step if total is None else total.then(step, model)
    assert total is not None
    assert narrowed[0] > 0 < narrowed[1]
    if name == "mixed":
        assert narrowed == [3] * 5, "every step narrows every group"
    composed = total.apply(model)
    assert equal(composed, current)
    assert torch.equal(composed(x), current(x))
    assert len(total.settings["steps"]) == 5
    fxprune.verify(model, composed, total, x)
    left = sum(p.numel() for p in current.parameters()) / sum(p.numel() for p in model.parameters())
    assert left < 0.6
    assert total == fxprune.PruningPlan.from_json(total.to_json())


@pytest.mark.parametrize("name", ["convolutional", "attending", "shuffled", "attention", "mixed"])
def test_schedule(name: str) -> None:
    """Widths are those of one step with the same ratio; totals are plans for the original."""
    build, x = NETS[name]
    model = stir(build()).eval()
    before = copy.deepcopy(model.state_dict())
    replay: nn.Module = model
    shares, totals = [], []
    for step in fxprune.schedule(model, x, ratio=0.6, steps=5, curve="cubic"):
        assert equal(step.model, step.plan.apply(step.previous))
        assert step.total.shapes == {
            key: list(t.shape)
            for key, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        }
        once = fxprune.plan(model, x, ratio=0.6 * step.share)
        assert {g: len(u) for g, u in once.removed.items()} == {
            g: len(u) for g, u in step.total.removed.items()
        }
        replay = step.plan.apply(replay)
        assert equal(replay, step.total.apply(model))
        shares.append(step.share)
        totals.append({(g, unit) for g, units in step.total.removed.items() for unit in units})
        shake(step.model)
    assert shares == pytest.approx([1 - (1 - t / 5) ** 3 for t in (1, 2, 3, 4, 5)])
    assert all(a <= b for a, b in itertools.pairwise(totals))
    assert totals[0] < totals[-1]
    assert difference(model.state_dict(), before) == 0
    assert torch.equal(replay(x), step.total.apply(model)(x))


def test_schedule_scores_the_current_network() -> None:
    """Units that training made weak go; those that one step would have taken at once may stay."""
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 7)[:, None].expand(6, 3))
    steps = iter(fxprune.schedule(model, torch.zeros(1, 3), ratio=0.5, steps=3))
    first = next(steps)
    assert first.total.removed == {"0.weight[0]": [0]}
    with torch.no_grad():
        first.model.get_parameter("0.weight")[3] = 0.0  # unit 4 of the original
        first.model.get_parameter("2.weight")[:, 3] = 0.0
        first.model.get_parameter("0.bias")[3] = 0.0
    second = next(steps)
    assert second.total.removed == {"0.weight[0]": [0, 4]}
    assert second.plan.removed == {"0.weight[0]": [3]}
    assert next(steps).total.removed == {"0.weight[0]": [0, 1, 4]}
    assert fxprune.plan(model, torch.zeros(1, 3), ratio=0.5).removed == {"0.weight[0]": [0, 1, 2]}


def test_schedule_with_training_and_an_optimiser() -> None:
    """A step may be answered with another network; the optimiser goes along."""
    model = stir(Convolutional()).double()
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, batches, 2)
    for step in fxprune.schedule(model, batches[0], ratio=0.5, steps=3, where=lambda g: g.exact):
        optimizer = step.plan.apply_to_optimizer(optimizer, step.previous, step.model)
        train(step.model, optimizer, batches, 2)
        if step.number == 2:
            step.model = copy.deepcopy(step.model)
            optimizer = torch.optim.SGD(step.model.parameters(), lr=0.01, momentum=0.9)
            train(step.model, optimizer, batches, 2)
    assert step.model.get_submodule("stem").out_channels == 4
    steps = iter(fxprune.schedule(model, batches[0], steps=2))
    next(steps).model = model
    with pytest.raises(PlanError, match="another architecture"):
        next(steps)


def test_heads_go_in_steps() -> None:
    """Once some heads are gone, the pruned network has other groups; the totals are still plans."""
    model = stir(
        torchvision.models.VisionTransformer(
            image_size=8, patch_size=4, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=8, num_classes=5
        )
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    replay: nn.Module = model
    for step in fxprune.schedule(model, x, ratio=0.5, heads=0.5, steps=2):
        replay = step.plan.apply(replay)
        shake(step.model)
    attention = replay.get_submodule("encoder.layers.encoder_layer_0.self_attention")
    assert (attention.num_heads, attention.v_width) == (2, 4)
    assert equal(replay, step.total.apply(model))
    assert torch.equal(replay(x), step.total.apply(model)(x))


def test_criteria_and_globally() -> None:
    """A function of a group sees the current network's groups."""
    model, x = stir(Attending()), NETS["attending"][1]
    seen: list[int] = []

    def largest(group: fxprune.Group) -> Any:
        seen.append(group.size)
        member = group.members[0]
        return torch.randn(group.size).numpy() + member.tensor.shape[member.axis.dim]

    last = [*fxprune.schedule(model, x, ratio=0.5, steps=2, importance=largest)][-1]
    assert seen == [8, 16, 12, 6, 12, 9]
    assert last.total.settings["importance"] == "largest"


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "global"},
        {"ratios": {"1": 0.75}, "keep": "0"},
        {"scopes": {("0", "2"): 0.5}},
        {"budget": fxprune.Budget(params=0.4)},
        {"round_to": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_refer_to_the_original(options: dict[str, Any]) -> None:
    """Whatever decides, the last step is as wide as one step, and nothing comes back."""
    model = nn.Sequential()
    for number, width in enumerate([8, 16, 24, 12]):
        model.append(nn.Sequential(nn.Linear([3, 8, 16, 24][number], width), nn.ReLU()))
    model.append(nn.Linear(12, 2))
    x = torch.zeros(1, 3)
    lefts = []
    for step in fxprune.schedule(model, x, steps=3, **options):
        lefts.append(sum(p.numel() for p in step.model.parameters()))
    once = fxprune.plan(model, x, **options)
    assert lefts[0] > lefts[1] > lefts[2]
    assert {g: len(u) for g, u in step.total.removed.items()} == {g: len(u) for g, u in once.removed.items()}
    with pytest.raises(BudgetError, match="params = 1000 is an amount"):
        fxprune.schedule(model, x, budget=fxprune.Budget(params=1000))


def test_curves() -> None:
    model, x = Convolutional(), NETS["convolutional"][1]
    for curve in CURVES.values():
        assert curve(1) == 1
    assert agp(0.2)(0.5) == pytest.approx(0.2 + 0.8 * (1 - 0.5**3))
    own = [step.share for step in fxprune.schedule(model, x, 0.5, 2, curve=lambda t: t**2)]
    assert own == [0.25, 1.0]
    with pytest.raises(RatioError, match="unknown curve 'cubik', did you mean 'cubic'"):
        fxprune.schedule(model, x, curve="cubik")
    with pytest.raises(RatioError, match=r"must rise from 0 to 1.*\[1.0, 0.0\]"):
        fxprune.schedule(model, x, steps=2, curve=lambda t: 2 - 2 * t)
    with pytest.raises(RatioError, match=r"curve is 'linear', 'cubic', 'agp' or a function .* got 0.5"):
        fxprune.schedule(model, x, curve=0.5)
    with pytest.raises(RatioError, match="at least 1; got 0"):
        fxprune.schedule(model, x, steps=0)
    with pytest.raises(RatioError, match="0 <= ratio < 1"):
        fxprune.schedule(model, x, ratio=1.0)


def test_what_cannot_be_composed() -> None:
    """Plans out of order, plans that bring units back, and groups that only the pruned network has."""
    model, x = stir(Shuffled()), NETS["shuffled"][1]
    first = fxprune.plan(model, x, ratio=0.5, importance="random")
    second = fxprune.plan(first.apply(model), x, ratio=0.5)
    with pytest.raises(PlanError, match="another architecture"):
        second.then(first, model)
    with pytest.raises(PlanError, match="another architecture"):
        first.then(first, model)
    other = fxprune.plan(model, x, ratio=0.5, importance="random", seed=1)
    with pytest.raises(PlanError, match="keeps entries of"):
        since(other, first, model)
    assert since(first.then(second, model), first, model).removed == second.removed

    class Grouped(nn.Module):
        """Groups of two channels; once they have one, it is depthwise, and they go one by one."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    grouped = Grouped()
    first = fxprune.plan(grouped, x, ratio=0.5)
    narrow = first.apply(grouped)
    second = fxprune.plan(narrow, x, ratio=0.5)
    pruned = second.apply(narrow)
    with contextlib.suppress(PlanError):  # right or not at all
        assert equal(first.then(second, grouped).apply(grouped), pruned)
