"""``train()`` and ``eval()`` of a result do what the original's do, whichever mode it was captured in."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ModeError
from fxprune.module_registry import own_kind


def moves(network: nn.Module, inputs: Any) -> bool:
    """Whether a call changes a buffer: running statistics move."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(inputs)
    return any(not torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def same_in_both_modes(model: nn.Module, inputs: Any) -> None:
    """Nothing is removed, so the result must do what the model does, random numbers and statistics too."""
    for captured in (True, False):
        model.train(captured)
        result = fxprune.prune(model, inputs, ratio=0.0)
        for mode in (True, False, True):
            reference = copy.deepcopy(model).train(mode)
            result.train(mode)
            outputs = []
            for network in (reference, copy.deepcopy(result)):
                torch.manual_seed(1)
                first = network(inputs)
                outputs.append((first, network(inputs), dict(network.named_buffers())))
            (a, b, buffers), (c, d, others) = outputs
            torch.testing.assert_close((c, d), (a, b), rtol=1e-4, atol=1e-5)
            for name, buffer in buffers.items():
                torch.testing.assert_close(others[name], buffer, msg=name)


class PlainNorm(nn.BatchNorm2d):
    """Nothing is overridden."""


class Tagged:
    def tag(self) -> str:
        return "mixed in"


class MixedIn(Tagged, nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.channels = channels

    def extra_repr(self) -> str:
        return self.tag()


class FrozenNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


@pytest.mark.parametrize("norm", [PlainNorm, MixedIn, FrozenNorm])
@pytest.mark.parametrize("captured", [True, False])
def test_subclasses_of_norms_switch(norm: Any, captured: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm(16), nn.Conv2d(16, 8, 3)).train(captured)
    inputs = torch.randn(4, 3, 8, 8)
    result = fxprune.prune(model, inputs, ratio=0.5)
    assert type(result.get_submodule("1")) is norm
    assert result.get_parameter("1.weight").shape == (8,)
    for mode in (True, False):
        assert moves(result.train(mode), inputs) == moves(copy.deepcopy(model).train(mode), inputs)
    same_in_both_modes(model, inputs)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Computed(nn.Linear):
    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self._parameters["own"]


def test_a_class_that_changes_what_its_parent_computes_is_not_its_parent() -> None:
    assert own_kind(PlainNorm) is own_kind(MixedIn) is own_kind(FrozenNorm) is nn.BatchNorm2d
    assert own_kind(Standardised) is Standardised
    assert own_kind(Computed) is Computed
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    same_in_both_modes(model, torch.randn(2, 3, 8, 8))


@dataclass
class Result:
    """What cannot be hashed."""

    y: torch.Tensor
    more: torch.Tensor | None = None


class Returning(nn.Module):
    """Returns more while it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Result:
        if x.shape[1] > 100:
            raise ValueError("too long")
        y = self.b(self.a(x).relu())
        return Result(y, None if self.training else y * 2)


@pytest.mark.parametrize("captured", [True, False])
def test_results_that_differ_from_mode_to_mode(captured: bool) -> None:
    model, x = Returning().train(captured), torch.randn(3, 4)
    result = fxprune.prune(model, x, ratio=0.0)
    for mode in (True, False):
        got, want = result.train(mode)(x), model.train(mode)(x)
        assert type(got) is Result
        torch.testing.assert_close(got.y, want.y)
        assert (got.more is None) == (want.more is None) == mode


class HalfWhileTraining(nn.Module):
    """Goes on with fewer positions while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.a(x).relu()
        if self.training:
            h = h[:, : length // 2]
        return self.b(h).reshape(batch, -1, 2, 2)


@pytest.mark.parametrize("captured", [True, False])
def test_modes_of_other_shapes_leave_the_mode_of_capture(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exported.append(args))
    model, x = HalfWhileTraining().train(captured), torch.randn(3, 6, 4)
    result = fxprune.prune(model, x, ratio=0.0)
    assert not exported
    torch.testing.assert_close(result(x), model(x))
    assert any("mode alone" in note for note in fxprune.plan(model, x, ratio=0.5).notes)
    with pytest.raises(ModeError, match="shape"):
        result.train(not captured)(x)
