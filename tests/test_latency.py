"""Latency budgets, against a clock that the tests set: nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_budgets import MODELS, macs
from torch import nn

import fxprune
from fxprune import Budget
from fxprune.errors import BudgetError
from fxprune.planning import latency
from fxprune.planning.cost_model import CostModel
from fxprune.planning.latency import Latency, LatencyTable

MODEL, INPUTS = MODELS["chain"]


def fixed_costs(share: float) -> Any:
    """A clock that a share of the original's time does not depend on widths."""

    def clock(models: Mapping[str, nn.Module], *_: Any, **__: Any) -> dict[str, float]:
        whole = macs(MODEL, INPUTS)
        return {
            name: 0.05 * (share + (1 - share) * macs(model, INPUTS) / whole) for name, model in models.items()
        }

    return clock


@pytest.fixture
def by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take as long as their work."""

    def measure(self: LatencyTable, call: Any, costs: CostModel) -> list[tuple[float, float]]:
        works = {latency.work(call, costs, costs.scaled(share)) for share in (1.0, 0.5, 0.1)}
        return sorted((work, work * 1e-9) for work in works)

    monkeypatch.setattr(LatencyTable, "_measure", measure)


@pytest.mark.usefixtures("by_work")
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("target", [0.7, 0.5, 35.0])
def test_the_measured_latency_is_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, target: float
) -> None:
    """The estimate knows nothing of the fixed costs; the loop finds out."""
    monkeypatch.setattr(latency, "measure_latency", fixed_costs(share))
    budget = Budget(latency=target, table=tmp_path / "table.json")
    pruned = fxprune.prune(MODEL, INPUTS, budget=budget)
    seconds = fixed_costs(share)({"before": MODEL, "after": pruned})
    wanted = target if target <= 1 else target / 1e3 / seconds["before"]
    assert seconds["after"] / seconds["before"] == pytest.approx(wanted, rel=0.05)
    plan = pruned.meta["fxprune"]
    assert plan.settings["budget"] == {"latency": target}
    assert f"{seconds['after'] / seconds['before']:.2f} of the original" in plan.notes[-1]
    measured = plan.settings["measured"]
    assert measured["latency"] == seconds["after"] / seconds["before"]
    assert measured["milliseconds"] == [seconds["before"] * 1e3, seconds["after"] * 1e3]
    assert measured["tries"] <= 3
    assert plan == fxprune.PruningPlan.from_json(plan.to_json())


@pytest.mark.usefixtures("by_work")
def test_the_nearest_is_taken_where_the_clock_cannot_be_pleased(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shares = iter([0.9, 0.2, 0.45, 0.65, 0.35, 0.3, 7.0, 7.0])
    seen = []

    def clock(models: Mapping[str, nn.Module], *_: Any, **__: Any) -> dict[str, float]:
        seen.append(fxprune.count(models["narrowed"], INPUTS))  # it goes when it has been timed
        return {"original": 1.0, "narrowed": next(shares)}

    monkeypatch.setattr(latency, "measure_latency", clock)
    pruned = fxprune.prune(MODEL, INPUTS, budget=Budget(latency=0.5, table=tmp_path / "table.json"))
    assert len(seen) == 6
    assert "0.45 of the original, 0.50 was wanted" in pruned.meta["fxprune"].notes[-1]
    assert fxprune.count(pruned, INPUTS) == seen[2]


@pytest.mark.usefixtures("by_work")
def test_no_network_is_timed_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where widths are so coarse that one is too slow and the next too fast, the nearer one is taken."""
    timed = []

    def clock(models: Mapping[str, nn.Module], *_: Any, **__: Any) -> dict[str, float]:
        timed.append(macs(models["narrowed"], INPUTS))
        return fixed_costs(0.0)(models)

    monkeypatch.setattr(latency, "measure_latency", clock)
    budget = Budget(latency=0.54, table=tmp_path / "table.json")
    pruned = fxprune.prune(MODEL, INPUTS, budget=budget, round_to=64)
    assert len(set(timed)) == len(timed) < 6
    off = {abs(work / macs(MODEL, INPUTS) - 0.54) for work in timed}
    assert abs(macs(pruned, INPUTS) / macs(MODEL, INPUTS) - 0.54) == min(off) > 0.05


@pytest.mark.usefixtures("by_work")
def test_other_budgets_hold_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where fewer parameters make it faster than asked, that is that."""
    monkeypatch.setattr(latency, "measure_latency", fixed_costs(0.0))
    budget = Budget(latency=0.9, params=0.3, table=tmp_path / "table.json")
    left = fxprune.count(fxprune.prune(MODEL, INPUTS, budget=budget), INPUTS)
    whole = fxprune.count(MODEL, INPUTS)
    assert 0.297 <= left.params / whole.params <= 0.3
    assert left.macs < 0.9 * whole.macs


def test_every_call_of_a_network_can_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real table, with as short a measurement as can be; written as a whole, and read again."""
    monkeypatch.setattr(latency, "_SECONDS", 1e-6)
    file = tmp_path / "deep" / "table.json"
    for model, inputs in MODELS.values():
        costs = CostModel(fxprune.analyze(model, inputs))
        table = LatencyTable(torch.device("cpu"), file)
        estimate = Latency(costs, table)
        assert estimate.seconds(costs.full) > 0
        assert estimate(costs.full) == 1
        assert 0 < estimate(costs.scaled(0.3)) <= 1
        counted = Latency(costs, table, compiled=True)
        assert counted.seconds(costs.full) < estimate.seconds(costs.full)
    data = json.loads(file.read_text())
    assert data["torch"] == torch.__version__
    assert data["device"].startswith("cpu")
    assert all(data["calls"].values()), [key for key, points in data["calls"].items() if not points]
    assert [path.name for path in file.parent.iterdir()] == ["table.json"], "a temporary file was left"
    monkeypatch.setattr(LatencyTable, "_measure", lambda *_: pytest.fail("measured again"))
    assert Latency(costs, LatencyTable(torch.device("cpu"), file)).seconds(costs.full) == estimate.seconds(
        costs.full
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"torch": "0.1"}', '{"calls": 3}'])
def test_a_table_of_another_kind_is_begun_anew(tmp_path: Path, text: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    assert LatencyTable(torch.device("cpu"), file)._points == {}


def test_the_default_file_names_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    path = LatencyTable(torch.device("cpu")).path
    assert path.parent == tmp_path
    assert "cpu" in path.name
    assert torch.__version__.split("+")[0] in path.name


@pytest.mark.usefixtures("by_work")
def test_a_training_model_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batch-norm statistics are those from before, modes too."""

    def clock(
        models: Mapping[str, nn.Module], args: Any, kwargs: Any, *_: Any, **__: Any
    ) -> dict[str, float]:
        for net in models.values():
            net(*args, **kwargs)
        return {"original": 1.0, "narrowed": 0.6}

    monkeypatch.setattr(latency, "measure_latency", clock)
    model, inputs = (
        nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 2, 1)),
        torch.randn(2, 3, 4, 4),
    )
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = fxprune.prune(model, inputs, budget=Budget(latency=0.6, table=tmp_path / "table.json"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert pruned.training


def test_models_without_a_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    with pytest.raises(BudgetError, match="the model is on meta"):
        fxprune.plan(model, torch.randn(2, 3), budget=Budget(latency=0.5))


@pytest.mark.usefixtures("by_work")
@pytest.mark.parametrize("target", [0.5, 25.0])
def test_a_latency_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: float) -> None:
    """The estimate says that it can be had; the clock knows better, and has the word."""
    monkeypatch.setattr(latency, "measure_latency", fixed_costs(0.55))
    with pytest.raises(
        BudgetError, match=r"latency = .* \(0.5 of.*the least that can be reached is 0\.5[56]"
    ):
        fxprune.plan(MODEL, INPUTS, budget=Budget(latency=target, table=tmp_path / "table.json"))


@pytest.mark.usefixtures("by_work")
def test_an_estimate_out_of_reach_is_no_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def clock(models: Mapping[str, nn.Module], *_: Any, **__: Any) -> dict[str, float]:
        return {"original": 1.0, "narrowed": 0.01}

    monkeypatch.setattr(latency, "measure_latency", clock)
    budget = Budget(latency=0.01, table=tmp_path / "table.json")
    plan = fxprune.plan(MODEL, INPUTS, budget=budget, keep=("convs.0", "convs.1"))
    assert plan.settings["left"]["latency"] > 0.05
    assert plan.settings["measured"]["latency"] == 0.01
