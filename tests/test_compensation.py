"""Compensation: what is reproduced exactly, what gets better, what is refused and said."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.compensation import Compensation, Reconstruction
from fxprune.compensation.choice import _Consumer, _order, _Read, _Worth
from fxprune.compensation.judge import Judge
from fxprune.compensation.moments import (
    BIAS_ONLY,
    RIDGES,
    Problem,
    evened,
    inputs,
    matrix,
    outputs,
    write,
)
from fxprune.compensation.outputs import Difference
from fxprune.compensation.walk import Runner, quiet
from fxprune.errors import CalibrationError, PlanError, SelectionError, VerificationError
from fxprune.importance.products import Site


class Residual(nn.Module):
    """Two residual blocks with batch norms, the second narrower in space, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(8)
        self.three = nn.Conv2d(8, 12, 3, stride=2)
        self.four = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))
        return self.head(F.relu(self.three(x) + self.four(x)).mean((2, 3)))


def settled(model: nn.Module, *shape: int) -> nn.Module:
    """Batch norms with statistics, scales and shifts as trained networks have them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(*shape))
    return model.eval()


def batches(count: int = 6, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(*(shape or (8, 3, 12, 12))) for _ in range(count)]


def divergence(model: nn.Module, other: nn.Module, x: Any) -> float:
    with torch.no_grad():
        wanted, got = model.double()(x.double()), other.double()(x.double())
    model.float(), other.float()
    return float((wanted - got).square().sum() / (wanted - wanted.mean()).square().sum())


def found(module: nn.Module) -> Compensation:
    compensation: Any = module.meta["compensation"]  # type: ignore[index]
    assert isinstance(compensation, Compensation)
    return compensation


def test_outputs_come_nearer_on_other_data() -> None:
    model = settled(Residual(), 8, 3, 12, 12)
    plain = fxprune.prune(model, torch.randn(1, 3, 12, 12), 0.4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    data = batches(12)
    better = fxprune.compensate(plain, model, data)
    statistics = fxprune.compensate(plain, model, data, least_squares=False)
    test = torch.randn(32, 3, 12, 12)
    errors = [divergence(model, other, test) for other in (plain, statistics, better)]
    assert errors[2] < errors[1] < 0.1 * errors[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(kept[name], tensor) for name, tensor in plain.state_dict().items())
    said = found(better)
    assert said.after < said.before
    assert said.batches == 12
    assert all(not entry.after > entry.before for entry in said.layers)
    assert "two.weight: error" in str(said)
    assert said.as_dict()["layers"]


def test_one_call_is_prune_then_compensate() -> None:
    model, data = settled(Residual(), 8, 3, 12, 12), batches()
    x = torch.randn(1, 3, 12, 12)
    options: Any = {"budget": fxprune.Budget(macs=0.6), "calibrate": data}
    one = fxprune.prune(model, x, **options)
    two = fxprune.compensate(fxprune.plan(model, x, **options), model, iter(data))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.training
    assert isinstance(one.meta["fxprune"], fxprune.PruningPlan)  # type: ignore[index]


def test_results_in_the_models_own_class() -> None:
    model, data = settled(Residual(), 8, 3, 12, 12), batches()
    options: Any = {"ratio": 0.4, "calibrate": data}
    own, graph = (fxprune.prune(model, data[0], into=into, **options) for into in ("module", "graph"))
    assert type(own) is Residual
    assert found(own).after < found(own).before
    assert torch.allclose(own(data[0]), graph(data[0]), atol=1e-4)


def twins(copies: bool) -> tuple[nn.Module, Any]:
    """A network in which what is removed are copies of what stays, or zero; and its pruned plan."""
    model = settled(Residual(), 8, 3, 12, 12)
    with torch.no_grad():
        for module, name in ((model.one, "weight"), (model.norm_one, "weight"), (model.norm_one, "bias")):
            tensor = getattr(module, name)
            tensor[6:] = tensor[:6] if copies else 0
        if copies:
            model.norm_one.running_mean[6:] = model.norm_one.running_mean[:6]
            model.norm_one.running_var[6:] = model.norm_one.running_var[:6]
    scores = lambda group: [1.0] * 6 + [0.0] * 6  # noqa: E731
    only = lambda group: group.name == "one.weight[0]"  # noqa: E731
    return model, fxprune.plan(model, torch.randn(1, 3, 12, 12), 0.5, scores, only)


@pytest.mark.parametrize("copies", [True, False])
def test_copies_and_zeros_are_reproduced(copies: bool) -> None:
    model, made = twins(copies)
    test = torch.randn(16, 3, 12, 12)
    assert made.removed == {"one.weight[0]": [6, 7, 8, 9, 10, 11]}
    if copies:
        assert divergence(model, made.apply(model), test) > 1e-3
    assert divergence(model, fxprune.compensate(made, model, batches()), test) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    model = settled(Residual(), 8, 3, 12, 12).to(dtype)
    data = [batch.to(dtype) for batch in batches()]
    plain = fxprune.prune(model, data[0][:1], 0.4)
    better = fxprune.compensate(plain, model, data)
    assert found(better).after < found(better).before
    assert {p.dtype for p in better.parameters()} == {dtype}


def layers(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "plain": (nn.Conv2d(4, 6, 3, padding=1, stride=2, dilation=2), (2, 4, 11, 9)),
        "grouped": (nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 7, 6)),
        "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 6)),
        "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2), (3, 4, 9)),
        "3d": (nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 0)), (2, 4, 4, 5, 3)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
        "transposed grouped": (nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2, dilation=2), (2, 4, 5)),
        "linear": (nn.Linear(4, 6), (3, 5, 4)),
        "batched": (Batched(), (3, 5, 4)),
        "turned": (Turned(), (5, 4)),
    }
    return made[kind]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight.t() @ x.t()).t()


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "grouped",
        "depthwise",
        "1d",
        "3d",
        "transposed",
        "transposed grouped",
        "linear",
        "batched",
        "turned",
    ],
)
def test_what_a_product_reads(kind: str) -> None:
    """Outputs are weights times what ``inputs`` gives, anywhere; ``write`` adds to those."""
    layer, shape = layers(kind)
    model = nn.Sequential(layer)
    graph = torch.fx.symbolic_trace(model)  # type: ignore[attr-defined]
    runner = Runner(graph)
    values = runner.start([torch.randn(shape)])
    products = []
    with quiet():
        for number, node in enumerate(runner.nodes):
            if node.op not in ("placeholder", "get_attr", "output"):
                products += runner.look(values, number).products
    (product,) = products
    site, weight = product.site, dict(graph.named_parameters())[product.site.name]
    bias = product.bias if product.bias is not None else torch.zeros(())
    y = product.output - bias
    for at in (None, torch.tensor([0, 3, 4])):
        u, wanted = inputs(site, product.input, at), outputs(site, y, at)
        assert torch.allclose(matrix(site, weight) @ u, wanted, atol=1e-5)
    change = torch.randn_like(matrix(site, weight))
    before = matrix(site, weight).detach().clone()
    write(site, weight.detach(), change)
    assert torch.allclose(matrix(site, weight), before + change, atol=1e-5)


class Siamese(nn.Module):
    """One layer used twice, and a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(x)))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x)


def test_shared_weights_stay_and_are_named() -> None:
    model = Siamese().eval()
    data = [torch.randint(20, (4, 6)) for _ in range(5)]
    pruned = fxprune.prune(model, data[0], 0.5, calibrate=data)
    reasons = {entry.name: entry.reason for entry in found(pruned).layers}
    assert reasons["up.weight"] == reasons["down.weight"] == "used at several places"
    assert reasons.get("embed.weight", reasons.get("head.weight")) == "used at several places"
    assert pruned.embed.weight is pruned.head.weight


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize(("model", "shape"), [(Recurrent(), (32, 7, 6)), (Attention(), (32, 7, 16))])
def test_recurrent_layers_and_attention(model: nn.Module, shape: tuple[int, ...]) -> None:
    data = batches(12, *shape)
    plain = fxprune.prune(model.eval(), data[0], 0.5)
    better = fxprune.compensate(plain, model, data)
    test = torch.randn(shape)
    assert divergence(model, better, test) < 0.9 * divergence(model, plain, test)


def test_pairs_with_labels_are_picked() -> None:
    model, made = twins(True)
    data = [(batch, torch.zeros(8)) for batch in batches()]
    with pytest.raises(CalibrationError, match=r"pick=lambda batch: batch\[0\]"):
        fxprune.compensate(made, model, data)
    better = fxprune.compensate(made, model, data, pick=lambda batch: batch[0])
    assert found(better).batches == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "hold no batch"),
        (torch.randn(2, 3, 12, 12), "as a list that holds it"),
        (3, "got int"),
        ([{"y": torch.randn(2, 3, 12, 12)}], "no input named 'y'"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    model, made = twins(True)
    with pytest.raises(CalibrationError, match=message):
        fxprune.compensate(made, model, data)


def test_no_plan_and_no_weights() -> None:
    model, made = twins(True)
    with pytest.raises(PlanError, match="holds its plan"):
        fxprune.compensate(model, model, batches())
    with pytest.raises(CalibrationError, match="meta device"):
        fxprune.compensate(made, copy.deepcopy(model).to("meta"), batches())


def test_little_data_harms_nothing() -> None:
    """With two images a layer is changed only where it is better on what was held out."""
    model = settled(Residual(), 8, 3, 12, 12)
    plain = fxprune.prune(model, torch.randn(1, 3, 12, 12), 0.4)
    better = fxprune.compensate(plain, model, [torch.randn(2, 3, 12, 12)])
    said = found(better)
    assert all(not entry.after > entry.before for entry in said.layers)
    assert said.after <= said.before


def test_many_values_go_to_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = twins(True)
    data = batches()
    in_memory = fxprune.compensate(made, model, data)
    monkeypatch.setattr("fxprune.compensation.batches._IN_MEMORY", 1000)
    on_disk = fxprune.compensate(made, model, data)
    for a, b in zip(in_memory.parameters(), on_disk.parameters(), strict=True):
        assert torch.equal(a, b)


def test_of_two_copies_one_goes() -> None:
    """Whatever the weights' sizes: the first half is given up by its copies, and costs nothing."""
    model, _ = twins(True)
    with torch.no_grad():
        model.two.weight[:, :6] *= torch.rand(6).reshape(1, 6, 1, 1) + 1
    only = lambda group: group.name == "one.weight[0]"  # noqa: E731
    data = batches()
    pruned = fxprune.prune(model, data[0], 0.5, where=only, calibrate=data)
    (gone,) = pruned.meta["fxprune"].removed.values()  # type: ignore[index, union-attr]
    assert sorted(unit % 6 for unit in gone) == [0, 1, 2, 3, 4, 5]
    assert divergence(model, pruned, torch.randn(16, 3, 12, 12)) < 1e-6


def linear(weight: torch.Tensor) -> Site:
    """The product of a linear layer with this weight."""
    region = tuple(slice(0, size) for size in weight.shape)
    return Site("weight", weight.shape, region, inner=1, outer=0, rows=None, channel=1, batched=False)


@pytest.mark.parametrize("together", [True, False])
def test_an_error_is_what_is_left_after_a_new_fit(together: bool) -> None:
    """The errors of the order are those of least squares without the units that went, of all consumers."""
    torch.manual_seed(0)
    x = torch.randn(500, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
    sums = F.pad(x, (0, 1), value=1.0).mT @ F.pad(x, (0, 1), value=1.0)
    weights = [torch.randn(outputs, 9, dtype=torch.float64) for outputs in (4, 2)]
    units = np.repeat(np.arange(3), 3)
    one = _Read.of(sums, False)
    reads = [one, one] if together else [one, _Read.of(sums, False)]
    consumers = [_Consumer(linear(w), units, w, read, None) for w, read in zip(weights, reads, strict=True)]
    group: Any = SimpleNamespace(size=3)
    order, added = _order(group, consumers, np.zeros(3))
    for count in (1, 2):
        kept = [entry for entry in range(9) if units[entry] not in order[:count]]
        error = 0.0
        for y in (x @ weight.mT for weight in weights):
            fitted = x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution
            error += float((y - fitted).square().sum() / y.square().sum())
        assert sum(added[:count]) == pytest.approx(error, rel=0.1)


def test_a_consumer_may_read_none_of_the_units() -> None:
    """A part of a weight, of which other groups have all."""
    read = _Read.of(torch.eye(4, dtype=torch.float64), False)
    weight = torch.ones(2, 3, dtype=torch.float64)
    consumers = [
        _Consumer(linear(weight), np.array(units), weight, read, None) for units in ([-1, -1, -1], [0, 1, 2])
    ]
    group: Any = SimpleNamespace(size=3)
    order, added = _order(group, consumers, np.zeros(3))
    assert sorted(order.tolist()) == [0, 1, 2]
    assert (added > 0).all()


def test_groups_that_cost_little_give_more() -> None:
    """A budget takes from the layer whose channels are copies, not from the one that carries everything."""
    model, _ = twins(True)
    data = batches()
    x = torch.randn(1, 3, 12, 12)
    budget = fxprune.Budget(macs=0.7)
    given = fxprune.plan(model, x, budget=budget, calibrate=data)
    even = fxprune.plan(model, x, budget=budget)
    assert len(given.removed["one.weight[0]"]) > len(even.removed["one.weight[0]"])
    assert given.settings["left"]["macs"] <= 0.7 * fxprune.count(model, x).macs
    test = torch.randn(16, 3, 12, 12)
    errors = [divergence(model, fxprune.compensate(plan, model, data), test) for plan in (given, even)]
    assert errors[0] < errors[1]


def test_an_iterator_serves_plan_and_weights() -> None:
    model, data = settled(Residual(), 8, 3, 12, 12), batches()
    one = fxprune.prune(model, data[0], 0.4, calibrate=iter(data))
    two = fxprune.prune(model, data[0], 0.4, calibrate=data)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_moments_of_low_rank() -> None:
    """Channels that are always zero, and more channels than positions."""
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    with torch.no_grad():
        model[0].weight[20:] = 0  # type: ignore[union-attr, operator, index]
        model[0].bias[20:] = 0  # type: ignore[union-attr, operator, index]
    data = [torch.full((4, 4), float(number)) for number in range(4)]
    for options in ({"ratio": 0.5}, {"budget": fxprune.Budget(params=0.5)}):
        pruned = fxprune.prune(model, data[0], **options, calibrate=data)
        assert found(pruned).after <= found(pruned).before
        assert torch.isfinite(pruned(data[1])).all()


class Switched(nn.Module):
    """Control flow that depends on values: only the part can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.abs().max().item() > 100) + 1):
            x = self.part(x)
        return x


def test_regions_stay_as_they_are_and_it_is_said() -> None:
    model, data = Switched().eval(), batches(4, 16, 8)
    pruned = fxprune.prune(model, data[0], 0.5, calibrate=data)
    assert "in parts only" in found(pruned).notes[0]
    assert pruned.meta["fxprune"].regions  # type: ignore[index, union-attr]


def test_rebuilding_comes_nearer_still() -> None:
    model = settled(Residual(), 8, 3, 12, 12)
    data = batches(12)
    plain = fxprune.prune(model, torch.randn(1, 3, 12, 12), 0.5)
    kept = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fitted = fxprune.compensate(plain, model, data)
    rebuilt = fxprune.compensate(plain, model, data, rebuild=60)
    parts = [entry for entry in found(rebuilt).layers if entry.step == "rebuilding"]
    assert len(parts) >= 3
    assert all(entry.after <= entry.before for entry in parts)
    assert found(rebuilt).after < found(fitted).after
    assert all(torch.equal(kept[name], tensor) for name, tensor in plain.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in rebuilt.parameters())
    test = torch.randn(32, 3, 12, 12)
    assert divergence(model, rebuilt, test) < divergence(model, fitted, test)


def test_rebuilding_can_follow_by_itself() -> None:
    """On a network that has been compensated; where nothing has a bias, nothing else changes."""
    model, data = Turning().eval(), [torch.randn(4, 6, 16) for _ in range(8)]
    plain = fxprune.prune(model, data[0], 0.5)
    fitted = fxprune.compensate(plain, model, data)
    together = fxprune.compensate(plain, model, data, rebuild=10)
    after = fxprune.compensate(fitted, model, data, least_squares=False, rebuild=10)
    assert {entry.step for entry in found(after).layers} == {"rebuilding"}
    for a, b in zip(together.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_parts_end_where_trained_weights_meet() -> None:
    """What takes no parameters, or nothing but them, runs past them: angles, a mask, a bias of positions."""
    model, data = Turning().eval(), [torch.randn(4, 6, 16) for _ in range(8)]
    rebuilt = fxprune.compensate(fxprune.plan(model, data[0], 0.5), model, data, rebuild=10)
    parts = [entry for entry in found(rebuilt).layers if entry.step == "rebuilding"]
    assert len(parts) == 5


def test_what_is_rebuilt_is_not_decided_by_one_position() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    data = batches(8, 64, 8)
    for batch in data:
        batch[0] *= 1e3
    plan = fxprune.plan(model, data[0], 0.5)
    rebuilt = fxprune.compensate(plan, model, data, least_squares=False, rebuild=200)
    test = torch.randn(64, 8)
    assert divergence(model, rebuilt, test) < 0.7 * divergence(model, plan.apply(model), test)


class Turning(nn.Module):
    """Two layers without biases, attention with angles and an MLP; both use the same angles."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("speed", torch.rand(4))
        self.stem, self.bias = nn.Linear(16, 16, bias=False), nn.Parameter(torch.randn(6, 6))
        for layer in range(2):
            for name, shape in {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16)}.items():
                self.add_module(f"{name}{layer}", nn.Linear(*shape, bias=False))
            self.add_module(f"up{layer}", nn.Linear(16, 40, bias=False))
            self.add_module(f"down{layer}", nn.Linear(40, 16, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(6.0)[:, None] * self.speed.tanh()
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        x = self.stem(x)
        seen = self.bias.exp() - torch.ones(x.shape[-2], x.shape[-2]).triu(1) * 1e9
        for layer in range(2):
            q, k, v, o, up, down = (
                self.get_submodule(f"{name}{layer}") for name in ("q", "k", "v", "o", "up", "down")
            )
            y = F.layer_norm(x, (16,))
            a, b, c = (part(y).unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v))
            a, b = (u * cos + torch.cat([-u[..., 4:], u[..., :4]], -1) * sin for u in (a, b))
            x = x + o(F.scaled_dot_product_attention(a, b, c, seen).transpose(1, 2).flatten(2))
            x = x + down(F.relu(up(F.layer_norm(x, (16,)))))
        return x


@pytest.mark.parametrize("bias", [False, True])
def test_queries_and_keys_go_by_what_they_multiply(bias: bool) -> None:
    """Not by their weights: those here are large where nothing comes in, or where only keys are large."""

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(12, 6, bias=bias), nn.Linear(12, 6, bias=bias)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.q(x) @ self.k(y).mT

    model = Scored().eval()
    with torch.no_grad():
        model.q.weight[:, 6:] = 0
        model.q.weight[:2, :6] *= 1e-3
        model.q.weight[:2, 6:] = 100.0
        model.k.weight[:2] *= 10
        model.k.weight[5] *= 1e-4
        model.q.weight[5] *= 10
        if bias:
            model.q.bias.zero_()
            model.k.bias.zero_()
    data = [(torch.randn(4, 5, 12), torch.randn(4, 5, 12)) for _ in range(6)]
    for x, _ in data:
        x[..., 6:] = 0  # so the large weights of the first two queries read nothing
    (group,) = fxprune.analyze(model, data[0]).groups
    plan = fxprune.plan(model, data[0], 0.5, Reconstruction(data))
    assert plan.removed[group.name] == [0, 1, 5]
    least = fxprune.plan(model, data[0], 0.5, "l2")
    assert least.removed[group.name] != [0, 1, 5]


def test_rebuilding_needs_data() -> None:
    with pytest.raises(SelectionError, match="rebuild needs data"):
        fxprune.plan(Residual(), torch.randn(1, 3, 12, 12), rebuild=10)


def test_no_position_outweighs_all_others() -> None:
    """A value a thousand times larger than the rest counts for ten of the larger ones, not for a million."""
    x = torch.randn(1, 8, 100)
    x[:, :, 7] *= 1e3
    squares = (x * evened(x)).square().sum((0, 1))
    assert squares[7] == pytest.approx(10 * float(x.square().sum((0, 1)).sort().values[89]), rel=1e-4)
    assert torch.equal(evened(x)[:7], torch.ones(7))
    assert torch.equal(evened(torch.zeros(1, 3, 5)), torch.ones(5))


@pytest.mark.parametrize("into", ["graph", "module"])
def test_the_narrowing_of_a_compensated_network_is_verified(into: Any) -> None:
    model, data = settled(Residual(), 8, 3, 12, 12), batches()
    pruned = fxprune.prune(model, data[0], 0.4, calibrate=data, into=into)
    weights = [parameter.clone() for parameter in pruned.parameters()]
    verdict = fxprune.verify(model, pruned, pruned.meta["fxprune"], data[0])  # type: ignore[index, arg-type]
    assert verdict.exact
    assert "stood in their place" in str(verdict)
    assert all(torch.equal(a, b) for a, b in zip(weights, pruned.parameters(), strict=True))
    pruned.get_submodule("two").stride = (2, 2)  # type: ignore[assignment]
    with pytest.raises(VerificationError):
        fxprune.verify(model, pruned, pruned.meta["fxprune"], data[0])  # type: ignore[index, arg-type]


def test_verify_refuses_a_compensated_network_of_another_plan() -> None:
    model, data = settled(Residual(), 8, 3, 12, 12), batches()
    pruned = fxprune.prune(model, data[0], 0.4, calibrate=data)
    with pytest.raises(VerificationError, match="of shape"):
        fxprune.verify(model, pruned, fxprune.plan(model, data[0], 0.6), data[0])


def test_an_explicit_scope_is_kept() -> None:
    data, budget = batches(), fxprune.Budget(macs=0.7)
    assert fxprune.Selection(budget=budget, calibrate=data).scope == "auto"
    assert fxprune.Selection(budget=budget, calibrate=data, scope="local").scope == "local"
    assert fxprune.Selection(0.5, calibrate=data).scope == "local"
    model = settled(Residual(), 8, 3, 12, 12)
    made = fxprune.plan(model, data[0], budget=budget, calibrate=data, scope="local")
    shares = [narrowed.kept / narrowed.size for narrowed in made]
    assert max(shares) - min(shares) < 0.2


@pytest.mark.parametrize("into", ["graph", "module"])
def test_what_is_decided_is_no_worse_than_the_same_share_of_every_group(
    into: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that count a million times too much in one group, and too little in another, mislead nobody."""
    model, data = settled(Residual(), 8, 3, 12, 12), batches(8)
    asked: dict[str, Any] = {"budget": fxprune.Budget(macs=0.6), "calibrate": data, "into": into}
    even = fxprune.plan(model, data[0], **asked, scope="local")
    ranked = fxprune.plan(model, data[0], **asked, scope="global")
    judge = Judge(fxprune.analyze(model, data[0]), data, None, 0)

    def lost(plan: fxprune.PruningPlan) -> float:
        graph = fxprune.analyze(model, data[0])
        return judge.narrowed(replace(plan, into="graph").apply(graph), graph, plan.removed)

    made = fxprune.plan(model, data[0], **asked)
    best = min((ranked, even), key=lost)
    assert made.removed == best.removed
    assert ranked.removed != even.removed
    assert any("every group gives" in note for note in made.notes)
    monkeypatch.setattr(
        _Worth, "of", lambda self, groups: {g.group.name: 1e6 ** (i % 2) for i, g in enumerate(groups)}
    )
    misled = fxprune.plan(model, data[0], **asked, scope="global")
    assert lost(misled) > lost(even)
    made = fxprune.plan(model, data[0], **asked)
    assert made.removed == even.removed
    assert "every group gives the same share" in "; ".join(made.notes)
    assert "scope" not in made.settings


def test_each_step_of_a_schedule_is_compensated() -> None:
    model, data = settled(Residual(), 8, 3, 12, 12), batches(8)
    plain = [*fxprune.schedule(model, data[0], 0.4, steps=2)]
    steps = [*fxprune.schedule(model, data[0], 0.4, steps=2, calibrate=data)]
    assert all(found(step.model).after < found(step.model).before for step in steps)
    test = torch.randn(32, 3, 12, 12)
    assert divergence(model, steps[-1].model, test) < 0.5 * divergence(model, plain[-1].model, test)
    assert fxprune.verify(model, steps[-1].model, steps[-1].total, data[0]).exact


def test_outputs_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large outputs are, only a part of them is looked at at once; nothing depends on it."""
    wanted, got = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    p, q = wanted.double().log_softmax(1), got.double().log_softmax(1)
    share = float((wanted - got).double().square().mean() / wanted.double().var(correction=0))
    for at_once in (1, 7, 1 << 20):
        monkeypatch.setattr(fxprune.compensation.outputs, "_AT_ONCE", at_once)
        difference = Difference({0: 1})
        difference.add({"scores": wanted}, {"scores": got})
        assert difference.divergence() == pytest.approx(share, rel=1e-6)
        kl = float((p.exp() * (p - q)).sum(1).mean())
        assert difference.lost() == pytest.approx(share / max(1 - share, 1e-3) + kl, rel=1e-5)


class Attending(nn.Module):
    """Attention with dropout of its own: what it calls differs from mode to mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 16))
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table
        q, k, v = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = self.norm(x + self.o(y.transpose(1, 2).flatten(2)))
        if self.training:
            x = F.dropout(x, 0.1)
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("training", [False, True])
def test_networks_that_do_something_else_in_training(training: bool) -> None:
    torch.manual_seed(0)
    model, data = Attending().train(training), [torch.randn(8, 6, 16) for _ in range(6)]
    pruned = fxprune.prune(model, data[0], budget=fxprune.Budget(params=0.6), calibrate=data)
    plain = fxprune.prune(model, data[0], budget=fxprune.Budget(params=0.6))
    assert pruned.training == training
    model, pruned, plain = (net.eval() for net in (model, pruned, plain))
    x = torch.randn(16, 6, 16)
    assert divergence(model, pruned, x) < 0.5 * divergence(model, plain, x)


def test_a_run_from_the_middle_begins_where_the_first_change_is_read() -> None:
    """Also where a parameter is fetched in front of all layers, and read behind them."""
    graph = fxprune.analyze(Attending().eval(), torch.randn(2, 6, 16))
    for mode in (False, True):
        runner = Runner(graph.captured.program.module().train(mode))
        names = [node.name for node in runner.nodes]
        assert runner.first({"down.weight", "o.bias"}) == names.index("o")
        assert runner.nodes[runner.first({"table", "down.weight"})].all_input_nodes[0].name == "x"


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("positions", [5, 40, 400])
@pytest.mark.parametrize("bias", [False, True])
def test_the_ridge_is_that_with_the_least_error_of_all(noise: float, positions: int, bias: bool) -> None:
    """Also where the moments have less than full rank, and where no change is any good."""
    torch.manual_seed(positions)
    problem, weight = Problem(), torch.randn(1, 6, 24)
    mix = torch.randn(24, 24) * torch.linspace(0.01, 1, 24)[:, None]
    for number in range(8):
        u = (mix @ torch.randn(24, positions))[None]
        t = weight @ u + noise * torch.randn(1, 6, positions)
        problem.add(u, t - 0.9 * weight @ u, t, number, 8)
    strengths = [*RIDGES, *([BIAS_ONLY] if bias else [])]
    errors = [problem.held.error(problem.fit.solve(strength, bias)) for strength in strengths]
    change, ridge, before, after = problem.best(bias)
    if min(errors) < problem.held.error(None):
        assert ridge == strengths[int(np.argmin(errors))]
        assert after == pytest.approx(before * min(errors) / problem.held.error(None))
    else:
        assert change is None
