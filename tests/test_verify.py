"""``verify`` holds results against the user's own model, in both modes, at two sizes."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import VerificationError


class Net(nn.Module):
    """Two linear layers with a normalisation; ``between`` says what comes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.norm(self.between(x, self.a(x)))))
        return out


class AsksForTheType(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.sigmoid() if x.__class__ is Tensor else h


class AsksForAProxy(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h if isinstance(x, fx.Proxy) else h * 2


class AsksForAnAttribute(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h + 1 if not hasattr(x, "tracer") else h


def pruned(model: nn.Module, x: Any, ratio: float = 0.5) -> tuple[fxprune.PruningPlan, Any]:
    plan = fxprune.plan(model, x, ratio=ratio)
    return plan, plan.apply(model)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [AsksForTheType, AsksForAProxy, AsksForAnAttribute])
def test_a_capture_that_is_not_the_model_is_refused(kind: type[Net]) -> None:
    """The pruned graph equals the captured one; the model is what counts."""
    model = kind().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxprune.analysis, "is_the_model", lambda *_: "")  # what is seen at capture
        plan, result = pruned(model, X)
        graph = fxprune.analyze(model, X)
    with pytest.raises(
        VerificationError, match=r"what was captured is not the model: in evaluation mode"
    ) as info:
        fxprune.verify(graph, result, plan, X)
    assert "The first layer that differs is norm" in str(info.value)


def test_both_modes_and_two_sizes_are_compared() -> None:
    model = Net().eval()
    plan, result = pruned(model, X)
    verdict = fxprune.verify(model, result, plan, X)
    assert verdict.exact
    assert verdict.modes == ("evaluation", "training")
    assert verdict.inputs == 2
    assert not verdict.notes
    assert "evaluation and training mode, on 2 sizes of inputs" in str(verdict)


def test_statistics_of_the_batch_are_compared() -> None:
    """Right in evaluation mode, and in the outputs of training mode."""
    model = Net().eval()
    plan, result = pruned(model, X)
    result.norm.momentum = 0.5
    with pytest.raises(VerificationError, match="differ"):
        fxprune.verify(model, result, plan, X)


def test_training_mode_is_compared() -> None:
    model = Net().eval()
    plan, result = pruned(model, X)
    result.norm.track_running_stats = False  # by which training no longer differs from evaluation there
    result.norm.running_mean = result.norm.running_var = None
    with pytest.raises(VerificationError):
        fxprune.verify(model, result, plan, X)


class ByBatch(Net):
    """Does something else from a batch of seven on."""

    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.sigmoid() if x.shape[0] > 6 else h


def test_the_second_size_is_compared() -> None:
    model = ByBatch().eval()
    plan, result = pruned(model, X)
    try:
        result(torch.cat([X, X]))
    except Exception:  # noqa: BLE001  refused by name: nothing is wrong
        assert fxprune.verify(model, result, plan, X).inputs == 1
    else:
        with pytest.raises(VerificationError, match="what was captured is not the model"):
            fxprune.verify(model, result, plan, X)


def test_further_inputs_are_compared() -> None:
    model = Net().eval()
    plan, result = pruned(model, X)
    assert fxprune.verify(model, result, plan, X, more_inputs=[X[:3], X[:4]]).inputs == 3
    assert fxprune.verify(model, result, plan, X, more_inputs=[torch.randn(3, 9)]).notes


class NoTraining(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("give targets")
        return h


def test_what_is_not_compared_is_said() -> None:
    model = NoTraining().eval()
    plan, result = pruned(model, X)
    verdict = fxprune.verify(model, result, plan, X)
    assert verdict.modes == ("evaluation",)
    assert any("give targets" in note for note in verdict.notes)
    assert "not compared" in str(verdict)


class Noisy(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h + torch.randn_like(h) if self.training else h


def test_random_numbers_by_width_are_no_difference() -> None:
    """All but these is compared in training mode, too, node by node."""
    model = Noisy().eval()
    plan, result = pruned(model, X)
    verdict = fxprune.verify(model, result, plan, X)
    assert verdict.modes == ("evaluation", "training")
    assert "random numbers, as many as there are channels" in verdict.notes[0]


class NoisySamples(Net):
    """As stochastic depth: a number for each sample, whatever the widths."""

    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h * torch.rand(len(h), 1, dtype=h.dtype) if self.training else h


def test_random_numbers_by_sample_are_the_same_in_both() -> None:
    model = NoisySamples().eval()
    plan, result = pruned(model, X)
    verdict = fxprune.verify(model, result, plan, X)
    assert verdict.modes == ("evaluation", "training")
    assert not any("random" in note for note in verdict.notes)


@pytest.mark.parametrize("into", ["graph", "module"])
def test_random_numbers_by_sample_in_both_forms(into: str) -> None:
    model = torchvision.ops.StochasticDepth(0.5, "row")
    net = nn.Sequential(nn.Conv2d(3, 8, 1), model, nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    plan = fxprune.plan(net, x, ratio=0.5, into=into)
    result = plan.apply(net)
    assert fxprune.verify(net, result, plan, x).modes == ("evaluation", "training")


def test_nothing_is_written_and_little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the networks' own precision, the weights of the result are compared as they lie there."""
    seen = []
    module: Any = importlib.import_module("fxprune.verification")
    made = module.converted

    def converted(*args: Any) -> nn.Module:
        seen.append(made(*args))
        return seen[-1]

    monkeypatch.setattr(module, "converted", converted)
    model = Net().eval().to(torch.bfloat16)
    plan, result = pruned(model, X.to(torch.bfloat16))
    before = copy.deepcopy(result.state_dict())
    verdict = fxprune.verify(model, result, plan, X.to(torch.bfloat16), low_memory=True)
    assert verdict.dtype == torch.bfloat16
    ours, theirs = dict(result.named_parameters()), dict(seen[0].named_parameters())
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in ours.items())
    torch.testing.assert_close(result.state_dict(), before, rtol=0, atol=0)
    assert fxprune.verify(model, result, plan, X.to(torch.bfloat16)).dtype == torch.float64


class Upsampled(nn.Module):
    """What pixel_shuffle makes is cut to the height and width of what it is put beside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.last = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        up = F.pixel_shuffle(self.up(F.relu(self.b(a))), 2)
        out: Tensor = self.last(torch.cat([a, up[..., : a.shape[2], : a.shape[3]]], 1))
        return out


class Dynamic(nn.Module):
    """Each image of the batch has a kernel of its own: channels stand in one axis with the batch."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.a, self.gate, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(4, 12, 8, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        batch, channels, height, width = x.shape
        gate = self.gate(x.mean((2, 3))).softmax(-1)
        weight = torch.einsum("bk,koihw->boihw", gate, self.weight).reshape(batch * 12, channels, 3, 3)
        y = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        y = y.view(batch, 12, height, width).relu()
        if self.channels_first:
            y = y.transpose(0, 1).reshape(12 * batch, height, width).relu()
            y = y.reshape(12, batch, height, width).transpose(0, 1)
        out: Tensor = self.last(y.mean((2, 3)))
        return out


@pytest.mark.parametrize(
    "model", [Upsampled(), Dynamic(False), Dynamic(True)], ids=["upsampled", "batch", "channels"]
)
def test_heights_and_widths_are_compared(model: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = model.eval()
    plan, result = pruned(model, x)
    assert fxprune.count(result, x).params < 0.6 * fxprune.count(model, x).params
    verdict = fxprune.verify(model, result, plan, x)
    assert verdict.inputs == 2
    fxprune.verify(model, result, plan, x, more_inputs=[torch.randn(3, 3, 9, 11)])


def test_what_one_image_does_not_tell_is_not_compared() -> None:
    """Of one image nobody sees whether channels or images come first where they share a dimension."""
    x = torch.randn(1, 3, 8, 8)
    model = Dynamic(False).eval()
    plan, result = pruned(model, x)
    verdict = fxprune.verify(model, result, plan, x)
    assert verdict.inputs == 1
    assert "not compared: at other sizes" in str(verdict)


def test_a_height_of_the_example_alone_is_found() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Upsampled().eval()
    plan, result = pruned(model, x)
    (source,) = (node for node in result.graph.nodes if "pixel_shuffle" in node.name)
    (cut,) = source.users
    cut.args = (source, (..., slice(None, 8), slice(None, 8)))
    result.recompile()
    with pytest.raises(VerificationError):
        fxprune.verify(model, result, plan, x)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator, whose weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.a(x))[..., :3]
        mixed = torch.einsum("bix,iox->box", spectrum, self.weight)
        out: Tensor = self.last(torch.fft.irfft(mixed, n=x.shape[-1]).relu())
        return out


def test_networks_with_complex_weights_are_compared() -> None:
    model = Spectral().eval()
    plan, result = pruned(model, torch.randn(2, 3, 16))
    assert result.weight.shape == (4, 4, 3)
    assert fxprune.verify(model, result, plan, torch.randn(2, 3, 16)).exact


class AlwaysNoisy(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h * torch.rand_like(h)


def test_random_numbers_are_not_compared_and_named() -> None:
    """What follows is, and so are the weights."""
    model = AlwaysNoisy().eval()
    plan, result = pruned(model, X)
    assert "rand_like: random numbers" in str(fxprune.verify(model, result, plan, X))
    with torch.no_grad():
        result.b.weight[0, 0] += 1
    with pytest.raises(VerificationError):
        fxprune.verify(model, result, plan, X)


class Normed(nn.Module):
    """What its head reads in training mode on a batch of one is zero, to rounding."""

    def __init__(self, average):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 99, 3), nn.BatchNorm2d(99), nn.Conv2d(99, 16, 1)
        self.norm, self.average, self.head = nn.BatchNorm2d(16), average, nn.Linear(16, 5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.average(self.norm(self.b(self.n(self.a(x)).relu()))).flatten(1))


AVERAGES = {
    "a layer": nn.AdaptiveAvgPool2d(1),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum((2, 3)),
    "a function": lambda x: nn.functional.avg_pool2d(x, 6),
}


@pytest.mark.parametrize("into", ["graph", "module"])
@pytest.mark.parametrize("average", AVERAGES)
def test_what_cancels_to_rounding_errors_is_no_difference(average, into):
    torch.manual_seed(0)
    model, x = Normed(AVERAGES[average]).eval(), torch.randn(1, 3, 8, 8)
    plan = fxprune.plan(model, x, ratio=0.5, into=into)
    pruned = plan.apply(model)
    with torch.no_grad():  # as another order of the same additions might do
        pruned.get_parameter("b.weight").mul_(1 + 2**-21)
    verdict = fxprune.verify(model, pruned, plan, x, dtype=torch.float32)
    assert verdict.exact
    assert verdict.modes == ("evaluation", "training")
    with torch.no_grad():  # in evaluation mode it makes no difference, in training mode it does
        pruned.get_parameter("b.weight").mul_(2.0)
        pruned.get_parameter("b.bias").mul_(2.0)
        pruned.get_buffer("norm.running_mean").mul_(2.0)
        pruned.get_buffer("norm.running_var").mul_(4.0).add_(3e-5)
    with pytest.raises(VerificationError):
        fxprune.verify(model, pruned, plan, x)


class Folded(nn.Module):
    """Batch, channels and rows in one dimension, as where MobileViT takes patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x).transpose(1, 3)).transpose(1, 3)  # nodes are compared one by one
        batch, channels = x.shape[:2]
        x = x.reshape(batch * channels * 2, 2, 2, 2).transpose(1, 2)
        return self.last(x.reshape(batch, channels, 4, 4))


def test_channels_between_batch_and_positions_are_no_difference() -> None:
    model, x = Folded().eval(), torch.randn(1, 3, 4, 4)
    plan = fxprune.plan(model, x, 0.5, "random")
    assert "at other sizes" in str(fxprune.verify(model, plan.apply(model), plan, x))
