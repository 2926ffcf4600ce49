"""Control flow that asks for infinite values and NaN goes on as if there were none, and the notes say so."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import check
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import CaptureError, PinnedError
from fxprune.nodes import finite_tests, if_finite

NOTE = "code for values that are infinite or not a number is left out"


def raising(y: Tensor) -> Tensor:
    assert not torch.isnan(y).any(), "nan"
    return y


def reading(y: Tensor) -> Tensor:
    if y.isnan().any().item():
        raise ValueError("nan")
    return y


def clamping(y: Tensor) -> Tensor:
    return y if torch.isfinite(y).all() else y.clamp(-1, 1)


def either(y: Tensor) -> Tensor:
    if torch.isinf(y).any() or torch.isnan(y).any():
        return torch.nan_to_num(y)
    return y


def both(y: Tensor) -> Tensor:
    return torch.nan_to_num(y) if torch.any(torch.isinf(y) | ~torch.isfinite(y)) else y


def counting(y: Tensor) -> Tensor:
    return y.clamp(-1, 1) if torch.isnan(y).sum().item() > 0 else y


def of_sum(y: Tensor) -> Tensor:
    return torch.zeros_like(y) if torch.isnan(y.sum()) else y


class Careful(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor], training: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 4)
        self.step = step
        self.in_training_alone = training

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        if not self.in_training_alone or self.training:
            y = self.step(y)
        last: Tensor = self.last(y.mean((2, 3)))
        return last


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("step", [raising, reading, clamping, either, both, counting, of_sum])
def test_it_is_captured_and_said(step: Callable[[Tensor], Tensor], training: bool) -> None:
    plan, pruned = check(
        Careful(step, training).eval(), IMAGES, narrows=["conv.weight", "last.weight"], exact=True
    )
    assert sum(NOTE in str(note) and "test_finite.py" in str(note) for note in plan.notes) == 1
    assert not [node for node in pruned.graph.nodes if node.name.startswith("is")]
    assert "training" not in str(plan.notes), "both modes are captured"


def by_value(y: Tensor) -> Tensor:
    return y.clamp(-1, 1) if (y > 100).any() else y


def test_other_questions_about_values_are_not_answered() -> None:
    graph = fxprune.analyze(Careful(by_value).eval(), IMAGES)
    assert graph.captured.rung == "regions"
    assert not any(NOTE in str(note) for note in graph.captured.notes)


def test_no_answer_where_something_else_has_a_part() -> None:
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    test = graph.call_function(torch.isnan, (x,))
    assert if_finite(graph.call_method("any", (test,))) is False
    assert if_finite(graph.call_function(torch.max, (test, mask))) is None
    assert if_finite(graph.call_function(operator.or_, (test, mask))) is None
    assert if_finite(graph.call_method("sum", (graph.call_function(torch.isfinite, (x,)),))) is None
    assert if_finite(graph.call_method("any", (mask,))) is None


def test_answers_are_found_once() -> None:
    graph = fx.Graph()
    mask = graph.call_function(torch.isnan, (graph.placeholder("x"),))
    for _ in range(200):
        mask = graph.call_function(operator.or_, (mask, mask))
    assert if_finite(mask) is False
    assert len([*finite_tests(mask)]) == 1


class Masked(nn.Module):
    """Gives zeros where all of a sample is masked: infinity is meant."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(8, 16), nn.Linear(16, 4), kind
        self.register_buffer("none", torch.tensor([torch.inf]))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.first(x).relu()
        scores = y.mean(-1)
        if self.kind == "literal":
            scores = scores.masked_fill(mask, -torch.inf)
        elif self.kind == "buffer":
            scores = torch.where(mask, -self.none, scores)
        else:
            scores = scores.masked_fill(mask, -torch.inf).softmax(-1)
        if torch.isinf(scores).all():
            return torch.zeros_like(self.last(y))
        last: Tensor = self.last(y)
        return last


@pytest.mark.parametrize("kind", ["literal", "buffer"])
def test_no_answer_where_infinity_is_meant(kind: str) -> None:
    with pytest.raises(CaptureError, match="control flow depends on the values of a tensor"):
        fxprune.analyze(Masked(kind).eval(), (torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)))


def test_behind_softmax_nothing_is_infinite() -> None:
    model, x, mask = Masked("softmax").eval(), torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    pruned = fxprune.prune(model, (x, mask), ratio=0.0)
    for given in (mask, ~mask):
        torch.testing.assert_close(pruned(x, given), model(x, given))


class OfInput(Careful):
    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.nan_to_num(x) if torch.isnan(x).any() else x)


def test_what_is_known_of_an_input_is_pinned_as_before() -> None:
    plan, pruned = check(OfInput(lambda y: y).eval(), IMAGES, narrows=["conv.weight"])
    assert any("stays False" in str(note) for note in plan.notes)
    with pytest.raises(PinnedError):
        pruned(torch.full_like(IMAGES, torch.nan))
