"""Quantisation in training: observers, simulated rounding, and the fused layers of PyTorch's workflow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import check, stir
from torch import Tensor, nn
from torch.ao import quantization as quant

import fxprune
from fxprune.errors import CaptureError, ExampleInputsError

IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NAMES = ["a", "b", "c"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quant.QuantStub(), quant.DeQuantStub()
        self.a, self.norm, self.relu = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()
        self.b, self.norm_b = nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16)
        self.c = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.a(self.quant(x))))
        return self.dequant(self.c(self.norm_b(self.b(x)).mean((2, 3))))


def prepared(training: bool, by_channel: bool = False, fuse: bool = True) -> nn.Module:
    """:class:`Small` behind ``prepare`` or ``prepare_qat``, which has seen some data."""
    torch.manual_seed(0)
    model: Any = stir(Small()).train(training)
    rounding = quant.FakeQuantize.with_args(observer=quant.MovingAverageMinMaxObserver)
    weights = quant.default_per_channel_weight_fake_quant if by_channel else quant.default_weight_fake_quant
    plain = quant.default_per_channel_qconfig
    model.qconfig = quant.QConfig(activation=rounding, weight=weights) if training else plain
    layers = [["a", "norm", "relu"], ["b", "norm_b"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if fuse:
            model = (quant.fuse_modules_qat if training else quant.fuse_modules)(model, layers)
        model = (quant.prepare_qat if training else quant.prepare)(model)
    with torch.no_grad():
        for _ in range(2):
            model(IMAGE)
    return model.eval()


def weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' weights."""
    layers: dict[str, Any] = {name: getattr(model, name) for name in NAMES}
    return {name: tuple(getattr(layer, "weight", layer).shape) for name, layer in layers.items()}


NARROW = {"a": (6, 3, 3, 3), "b": (8, 6, 3, 3), "c": (4, 8)}


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("by_channel", [False, True], ids=["one scale", "by channel"])
def test_training_aware_of_quantisation(by_channel: bool, fuse: bool) -> None:
    """Scales and ranges of channels go along; ranges over channels make a group inexact."""
    model = prepared(training=True, by_channel=by_channel, fuse=fuse)
    plan = fxprune.plan(model, IMAGE)
    pruned: Any = plan.apply(model)
    assert weights(pruned) == NARROW
    assert not any(group.exact for group in fxprune.analyze(model, IMAGE).groups)
    assert pruned.a.weight_fake_quant.scale.shape == ((6,) if by_channel else (1,))
    fxprune.verify(model, pruned, plan, IMAGE, dtype=torch.float32, tolerance=1e-2)
    pruned.train()(IMAGE).sum().backward()
    assert pruned.a.weight.grad.shape == NARROW["a"]
    if fuse:
        converted: Any = quant.convert(pruned.eval())
        assert converted.a.weight().shape == NARROW["a"]
        assert converted(IMAGE).shape == (4, 4)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_settled_ranges_are_exact(fuse: bool) -> None:
    """With the observers off nothing runs over channels; fused layers divide by removed scales."""
    model = prepared(training=True, fuse=fuse)
    model.apply(quant.disable_observer)
    plan = fxprune.plan(model, IMAGE)
    pruned = plan.apply(model)
    assert weights(pruned) == NARROW
    assert all(group.exact for group in fxprune.analyze(model, IMAGE).groups)
    assert fxprune.verify(model, pruned, plan, IMAGE, dtype=torch.float32, tolerance=1e-2).exact
    for net in (model, pruned):
        net.apply(quant.disable_fake_quant)
    assert fxprune.verify(model, pruned, plan, IMAGE).error < 1e-8


def test_observed() -> None:
    """Observers look on, and are as wide as what they look at."""
    model = prepared(training=False)
    plan = fxprune.plan(model, IMAGE)
    pruned: Any = plan.apply(model)
    assert pruned.b.weight.shape == NARROW["b"]
    assert fxprune.verify(model, pruned, plan, IMAGE).exact
    converted = quant.convert(pruned)
    assert converted(IMAGE).shape == (4, 4)


class Rounded(nn.Module):
    """Rounds activations, with a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)
        self.round = quant.FakeQuantize(
            quant.MovingAveragePerChannelMinMaxObserver, dtype=torch.qint8, quant_min=-128, quant_max=127,
            qscheme=torch.per_channel_affine, ch_axis=1,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.round(self.a(x)))


def test_scales_of_activations() -> None:
    """Each channel has a range of its own, so that nothing is inexact."""
    model: Any = Rounded()
    model(IMAGE)
    plan = fxprune.plan(model, IMAGE)
    pruned: Any = plan.apply(model)
    state = pruned.state_dict()
    assert state["round.scale"].shape == state["round.activation_post_process.min_val"].shape == (6,)
    assert fxprune.verify(model, pruned, plan, IMAGE, dtype=torch.float32, tolerance=1e-2).exact


def test_quantised_layers_are_refused() -> None:
    """Packed weights cannot be narrowed; the message says what to do before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quant.convert(prepared(training=False))
    with pytest.raises(CaptureError, match=r"quant \(Quantize\).*before it is converted"):
        fxprune.prune(model, IMAGE)


class Divided(nn.Module):
    def __init__(self, divide: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.divide = divide

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.divide(self.a(x), self.scale))


@pytest.mark.parametrize(
    "divide",
    [
        lambda x, scale: x / scale,
        lambda x, scale: x * torch.rsqrt(scale),
        lambda x, scale: (x * scale).abs().log(),
    ],
    ids=["division", "rsqrt", "logarithm"],
)
def test_removed_channels_need_not_be_finite(divide: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Where the masked original divides by a removed scale, what that gives is multiplied by zero."""
    torch.manual_seed(0)
    model, x = Divided(divide), torch.randn(3, 6)
    plan = fxprune.plan(model, x)
    pruned: Any = plan.apply(model)
    assert pruned.scale.shape == (6,)
    assert fxprune.verify(model, pruned, plan, x).exact
    with torch.no_grad():
        pruned.b.weight[0, 0] += 0.1
    with pytest.raises(fxprune.errors.VerificationError, match="node b"):
        fxprune.verify(model, pruned, plan, x)


class Twice(nn.Module):
    """One layer with children of its own, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.y = self.x

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.y(self.x(self.a(x))))


def test_a_layer_under_two_names() -> None:
    """It keeps its children."""
    check(Twice(), torch.randn(2, 5, 6), narrows=["x.linear1.weight", "a.weight"], exact=False)


def test_verify_chooses_the_precision() -> None:
    """Fake quantisers take float32 alone: so they are compared in it, and another is refused by name."""
    model = prepared(training=True, by_channel=True)
    plan = fxprune.plan(model, IMAGE)
    pruned = plan.apply(model)
    assert fxprune.verify(model, pruned, plan, IMAGE).dtype == torch.float32
    with pytest.raises(ExampleInputsError, match=r"float64"):
        fxprune.verify(model, pruned, plan, IMAGE, dtype=torch.float64)
