"""A ``train()`` of a model's own is followed by the result, or said and refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import snapshot
from torch import Tensor, nn

import fxprune
from fxprune.errors import ModeError


class Frozen(nn.Module):
    """Keeps its norms in evaluation mode, as fine-tuning code does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def within() -> nn.Module:
    return nn.Sequential(Frozen(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


@pytest.mark.parametrize("build", [Frozen, within])
def test_norms_that_stay_in_evaluation_do_so_in_the_result(build: Any) -> None:
    model, x = build().eval(), torch.randn(4, 3, 8, 8)
    plan = fxprune.plan(model, x, ratio=0.5)
    verdict = fxprune.verify(model, plan.apply(model), plan, x)
    assert verdict.exact
    assert verdict.modes == ("evaluation", "training")
    same = fxprune.prune(model, x, ratio=0.0)
    for result in (same, copy.deepcopy(same), pickle.loads(pickle.dumps(same))):
        mine, original = result.train(), copy.deepcopy(model).train()
        flags = {path: module.training for path, module in original.named_modules()}
        assert {path: module.training for path, module in mine.named_modules()} == flags
        torch.testing.assert_close(mine(x), original(x))
        assert not any(module.training for module in mine.eval().modules())


class Merging(nn.Linear):
    """Adds its low-rank part to the weight while evaluating, as LoRA layers do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.a.T @ self.b.T


def test_what_does_more_is_said_and_refused_and_writes_nothing() -> None:
    model, x = nn.Sequential(Merging(8, 16), nn.ReLU(), Merging(16, 3)).eval(), torch.randn(4, 8)
    before = snapshot(model)
    plan = fxprune.plan(model, x, ratio=0.5)
    pruned = plan.apply(model)
    assert any("does more than setting flags (changes merged)" in note for note in plan.notes)
    with pytest.raises(ModeError, match=r"own train\(\) does more.*Next:"):
        pruned.train()
    assert not any(module.training for module in pruned.modules())
    fxprune.verify(model, pruned, plan, x)
    assert snapshot(model) == before
