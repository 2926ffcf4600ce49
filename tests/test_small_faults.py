"""Messages and refusals that are easily got wrong: what a model raises itself, advice on outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError, ExampleInputsError, ImportanceError
from fxprune.measure import latency_ratio


@dataclass
class Batch:
    image: Tensor


class TakesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, batch: Batch) -> Tensor:
        return self.b(self.a(batch.image).relu())


@pytest.mark.parametrize("call", [fxprune.analyze, fxprune.plan, fxprune.prune])
@pytest.mark.parametrize("wrap", [lambda b: (b,), lambda b: {"batch": b}, lambda b: ([b],)])
def test_objects_as_inputs_are_refused_alike(call: Callable[..., Any], wrap: Callable[[Batch], Any]) -> None:
    """A plan describes its inputs, which it cannot for an object of a class."""
    with pytest.raises(ExampleInputsError, match="found Batch"):
        call(TakesBatch(), wrap(Batch(torch.randn(2, 4))))


class Failing(nn.Module):
    """Raises by itself, whoever runs it."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.a, self.b, self.error = nn.Linear(4, 8), nn.Linear(8, 2), error

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if type(h).__name__ != "never":
            raise self.error("it is broken")
        return self.b(h)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AttributeError])
def test_a_model_that_raises_by_itself_is_told_from_one_that_cannot_be_captured(
    error: type[Exception],
) -> None:
    with pytest.raises(
        ExampleInputsError, match=f"Failing does not run .*in forward: {error.__name__}: it is"
    ):
        fxprune.analyze(Failing(error), torch.randn(2, 4))


def test_a_model_that_runs_but_cannot_be_captured_is_no_fault_of_its_inputs() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy())

    with pytest.raises(CaptureError, match="could not be captured"):
        fxprune.analyze(Hidden(), torch.randn(2, 4))


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class WithLoss:
    loss: Tensor
    logits: Tensor
    hidden: Tensor


class Outputs(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 16), nn.Linear(16, 3), form

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return self.form(self.b(h), h)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, h: (y, h),
    "dict": lambda y, h: {"logits": y, "hidden": h},
    "named tuple": Named,
    "with a loss before": lambda y, h: WithLoss(y.mean(), y, h),
}


@pytest.mark.parametrize("form", FORMS)
def test_nobody_is_told_to_free_the_result(form: str) -> None:
    graph = fxprune.analyze(Outputs(FORMS[form]), torch.randn(2, 4), fill_outputs=())
    frozen = [event for event in graph.frozen if event.reason == "output of the model"]
    advice = {(event.axis.name, event.axis.dim): event.remedy for event in frozen}
    assert advice["b.weight", 0] == ""
    assert "free_outputs" in advice["a.weight", 0]


@pytest.mark.parametrize("importance", ["l2", "l1", "lamp", fxprune.importance.FPGM()])
def test_criteria_that_read_weights_say_that_there_are_none(importance: Any) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.empty(2, 4, device="meta")
    with pytest.raises(ImportanceError, match=r"reads the weights, and '0.weight' is on the meta device"):
        fxprune.plan(model, x, importance=importance)
    assert fxprune.plan(model, x, importance="random").removed
    assert fxprune.plan(model, x, importance=lambda group: torch.arange(group.size).float()).removed


@pytest.mark.parametrize("budget", [{"size_mb": 5}, {"params": 1e6}, {"size_mb": 5, "params": 0.5}])
def test_a_budget_that_is_met_already_says_so(budget: dict[str, float]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = fxprune.plan(model, torch.randn(2, 4), budget=fxprune.Budget(**budget))
    said = [note for note in plan.notes if "met without removing anything" in note]
    assert len(said) == 1
    assert next(iter(budget)) in said[0]
    assert bool(plan.removed) == (len(budget) > 1)


def test_latency_ratio_takes_inputs_as_count_does() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    for inputs in (x, (x,), {"input": x}):
        assert latency_ratio(model, model, inputs, min_run_time=0.01) > 0
