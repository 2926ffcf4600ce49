"""Parameters, MACs and bytes against figures worked out by hand; latency on models that sleep."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import measure
from fxprune.errors import ExampleInputsError
from fxprune.measure import Count, count, latency_ratio, measure_latency


class Tied(nn.Module):
    """An embedding whose table is also the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Masked(nn.Module):
    """Makes a tensor in its forward, holds one that is no buffer, and takes keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.constants = {"scale": [torch.ones(4)]}

    def forward(self, x: Tensor, options: dict[str, Tensor]) -> Tensor:
        mask = torch.ones(4) * self.constants["scale"][0]
        return F.linear(x * mask + options["shift"], self.linear.weight)


@pytest.mark.parametrize(
    ("model", "inputs", "params", "macs", "activations"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 5, 5), 8 * 27 + 8, 2 * 25 * 8 * 27, 2 * 25 * 8),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), torch.zeros(1, 4, 5, 5), 8 * 18, 9 * 8 * 18, 9 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), torch.zeros(1, 4, 3, 3), 96, 9 * 96, 36 * 6),
        (nn.Linear(5, 7), torch.zeros(3, 5), 42, 3 * 35, 21),
        (nn.LSTM(3, 4, bias=False), torch.zeros(6, 1, 3), 16 * 7, 6 * 16 * 7, 2 * 6 * 16),
        (Tied(), torch.zeros(2, 3, dtype=torch.long), 40, 6 * 40, 60),
        # Projections in and out, then two products of (positions, 8) with (positions, 8).
        (
            Attend(),
            torch.zeros(1, 6, 8),
            8 * 24 + 24 + 72,
            6 * (8 * 24 + 64) + 2 * 6 * 6 * 8,
            6 * (24 + 8) + 2 * 36 + 48,
        ),
        (Masked(), {"x": torch.zeros(2, 4), "options": {"shift": torch.zeros(4)}}, 16, 32, 8),
    ],
    ids=["conv", "grouped", "transposed", "linear", "lstm", "tied", "attention", "keywords"],
)
def test_count_by_hand(model: nn.Module, inputs: object, params: int, macs: int, activations: int) -> None:
    assert count(model, inputs) == Count(params, macs, activations, bytes=4 * params)


def test_bytes_hold_saved_buffers_once() -> None:
    """Running statistics and the batch counter are stored; a non-persistent buffer is not."""
    model = nn.BatchNorm1d(5).half()
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert count(model, torch.zeros(1, 5)).bytes == 2 * 4 * 5 + 8


class Token(nn.Module):
    """A parameter is an input of a submodule; on request, control flow depends on values."""

    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))
        self.linear = nn.Linear(4, 6, bias=False)
        self.by_value = by_value

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.token)
        return x + y if not self.by_value or float(x.sum()) == 0 else x - y


@pytest.mark.parametrize("by_value", [False, True])
def test_parameters_as_inputs_of_modules(by_value: bool) -> None:
    model = Token(by_value)
    assert count(model, torch.zeros(1, 6)) == Count(28, 24, 6, 112)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_count_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    fastpath = torch.backends.mha.get_fastpath_enabled()
    count(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_count_on_meta_and_in_float16() -> None:
    with torch.device("meta"):
        model = nn.Linear(30_000, 30_000, dtype=torch.float16)
        inputs = torch.zeros(1, 30_000, dtype=torch.float16)
    assert count(model, inputs) == Count(900_030_000, 900_000_000, 30_000, 1_800_060_000)


def test_torchvision_figures() -> None:
    """The figures of torchvision's own table."""
    from torchvision.models import resnet18, vit_b_16

    with torch.device("meta"):
        inputs = torch.zeros(1, 3, 224, 224)
        resnet, vit = count(resnet18(), inputs), count(vit_b_16(), inputs)
    assert (resnet.params, vit.params) == (11_689_512, 86_567_656)
    assert resnet.macs / 1e9 == pytest.approx(1.814, rel=1e-3)
    assert vit.macs / 1e9 == pytest.approx(17.564, rel=1e-3)
    assert (
        resnet.activations
        == 64 * 112**2
        + sum(
            width * size**2 * convolutions
            for width, size, convolutions in [(64, 56, 4), (128, 28, 5), (256, 14, 5), (512, 7, 5)]
        )
        + 1000
    )


def test_pruned_networks_are_counted_alike() -> None:
    """A narrowed network costs what a network built as narrow costs."""

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3))

    x = torch.zeros(2, 3, 8, 8)
    assert count(fxprune.prune(build(8), x, ratio=0.5), x) == count(build(4), x)


def test_wrong_inputs_and_lazy_modules_are_named() -> None:
    with pytest.raises(ExampleInputsError, match="Linear does not run on the example inputs"):
        count(nn.Linear(4, 4), torch.zeros(2, 5))
    with pytest.raises(ExampleInputsError, match=r"'0\.weight' is not known yet"):
        count(nn.Sequential(nn.LazyLinear(4)), torch.zeros(2, 5))


class Sleep(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, *, wait: bool) -> None:
        assert not torch.is_grad_enabled()
        if wait:
            time.sleep(self.seconds)


def test_latency_is_a_median_by_name() -> None:
    slow, fast = Sleep(0.02), Sleep(0.005)
    seconds = measure_latency({"slow": slow, "fast": fast}, (), {"wait": True}, min_run_time=0.05)
    assert list(seconds) == ["slow", "fast"]
    assert 0.02 <= seconds["slow"] < 0.08
    assert latency_ratio(slow, fast, {"wait": True}, min_run_time=0.05) < 0.8


def test_latency_is_measured_until_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the confidence interval is too wide, but not for ever."""
    spreads, seen = iter([float("inf"), 0.3, 0.02]), []

    def spread(times: dict[str, list[float]]) -> float:
        seen.append(len(times["b"]))
        return next(spreads)

    models = {"a": Sleep(0.0), "b": Sleep(0.0)}
    monkeypatch.setattr(measure, "_PATIENCE", 1e9)
    monkeypatch.setattr(measure, "_spread", spread)
    measure_latency(models, (), {"wait": True}, 1e-6, precision=0.02)
    assert seen == [5, 6, 7]
    monkeypatch.setattr(measure, "_PATIENCE", 1)
    measure_latency(models, (), {"wait": True}, 1e-6, precision=0.0)
    assert len(seen) == 3


def test_spread_of_shares() -> None:
    """Between the ranks (n - 1.96 n^0.5) / 2 from both ends; what slows down all models does not count."""
    slow = [1.0, 5.0, 1.0, 2.0] * 25
    shares = [0.5 + 0.001 * i for i in range(100)]
    times = {"a": slow, "b": [a * share for a, share in zip(slow, shares, strict=True)]}
    assert measure._spread(times) == pytest.approx((shares[60] - shares[39]) / 2 / 0.5495)
    assert measure._spread({**times, "c": slow}) == measure._spread(times)
    assert measure._spread({"a": [1.0] * 4, "b": [1.0] * 4}) == float("inf")
