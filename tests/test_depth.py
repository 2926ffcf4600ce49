"""Residual branches that go as a whole, as a budget and calibration data decide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_branches import Residual, Transformer, Unit
from torch import Tensor, nn

import fxprune
from fxprune import Budget
from fxprune.compensation import depth
from fxprune.errors import BudgetError, SelectionError


def residual(useless: tuple[int, ...], units: int = 4) -> Residual:
    """A network whose units with these numbers add zeros."""
    torch.manual_seed(0)
    model = Residual([Unit("plain", 8) for _ in range(units)])
    for number in useless:
        nn.init.zeros_(model.units[number].bn2.weight)
        nn.init.zeros_(model.units[number].bn2.bias)
    return model.eval()


def transformer(useless: tuple[str, ...]) -> Transformer:
    """A network in which what these layers project to is zero."""
    torch.manual_seed(0)
    model = Transformer(post=False)
    for name in useless:
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return model.eval()


def images(count: int = 8) -> list[Tensor]:
    return list(torch.randn(8 * count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(8))


def texts(count: int = 8) -> list[Tensor]:
    return list(torch.randn(16 * count, 6, 5, generator=torch.Generator().manual_seed(1)).split(16))


def share(model: nn.Module, names: Any, graph: fxprune.CouplingGraph) -> float:
    """What of the parameters is left without these branches, and a little more."""
    entries = sum(graph.branches[name].entries for name in names)
    return 1 - (entries - 1) / sum(p.numel() for p in model.parameters())


def test_branches_that_add_nothing_go_from_a_residual_network() -> None:
    model, data = residual((0, 2)), images()
    graph = fxprune.analyze(model, data[0])
    budget = Budget(params=share(model, ["units.0", "units.2"], graph))
    pruned = fxprune.prune(graph, budget=budget, calibrate=data, depth=True)
    plan = pruned.meta["fxprune"]
    assert plan.branches == ("units.0", "units.2")
    assert not plan.removed
    assert torch.allclose(pruned(data[0]), model(data[0]), atol=1e-5)
    assert "2 of 4 residual branches go" in str(plan)
    assert plan.settings["branches_tried"]["2"] < plan.settings["branches_tried"]["0"]
    fxprune.verify(model, plan.apply(model), plan, data[0])


def test_branches_that_add_nothing_go_from_a_transformer() -> None:
    model, data = transformer(("blocks.0.down", "blocks.1.proj")), texts()
    graph = fxprune.analyze(model, data[0])
    wanted = [
        name
        for name, b in graph.branches.items()
        if {"blocks.0.down.bias", "blocks.1.proj.bias"} & {*b.tensors}
    ]
    pruned = fxprune.prune(
        graph, budget=Budget(params=share(model, wanted, graph)), calibrate=data, depth=True
    )
    plan = pruned.meta["fxprune"]
    assert sorted(plan.branches) == sorted(wanted)
    assert torch.allclose(pruned(data[0]), model(data[0]), atol=1e-5)


def test_branches_stay_where_narrower_layers_cost_less() -> None:
    model, data = residual(()), images()
    with torch.no_grad():
        for unit in model.units:  # a third of what is inside does nothing
            unit.bn1.weight[::3] = unit.bn1.bias[::3] = 0
            unit.conv2.weight.mul_(3)
    graph = fxprune.analyze(model, data[0])
    narrow = fxprune.plan(graph, budget=Budget(params=0.75), calibrate=data)
    plan = fxprune.plan(graph, budget=Budget(params=0.75), calibrate=data, depth=True)
    assert plan.branches == ()
    assert plan.removed == narrow.removed
    tried = plan.settings["branches_tried"]
    assert tried["0"] < 1e-6 < 1e-4 < min(tried["1"], tried["2"])


def test_dead_channels_go_from_all_layers_before_living_ones_go() -> None:
    model, data = residual((), units=3), images()
    with torch.no_grad():
        for unit in model.units:
            unit.bn1.weight[::2] = unit.bn1.bias[::2] = 0
    plan = fxprune.plan(model, data[0], budget=Budget(params=0.7), calibrate=data)
    assert plan.removed
    assert all(set(gone) <= {0, 2, 4} for gone in plan.removed.values())


@pytest.mark.parametrize("most", [0, 1, False])
def test_no_more_branches_go_than_may(most: int) -> None:
    model, data = residual((0, 2)), images()
    plan = fxprune.plan(model, data[0], budget=Budget(macs=0.5), calibrate=data, depth=most)
    assert len(plan.branches) == int(most)


def test_what_is_kept_is_in_no_branch_that_goes() -> None:
    model, data = residual((0, 1, 2, 3)), images()
    options: Any = {"budget": Budget(params=0.4), "calibrate": data, "depth": 1}
    for kept in (
        {"keep": ["units.0.conv1"]}, {"ratios": {"units.0.conv1": 0.5}}, {"scopes": {("units.0",): 0.2}},
        {"where": lambda group: group.name != "units.0.conv1.weight[0]"},
    ):  # fmt: skip
        plan = fxprune.plan(model, data[0], **options, **kept)
        assert plan.branches
        assert "units.0" not in plan.branches
    plan = fxprune.plan(model, data[0], **options, branches=["units.0"])
    assert "units.0" in plan.branches
    assert len(plan.branches) > 1


def test_a_budget_that_widths_cannot_meet_is_met() -> None:
    model, data = residual((1,)), images()
    options: Any = {"budget": Budget(params=0.5), "calibrate": data, "max_ratio": 0.2}
    with pytest.raises(BudgetError, match="cannot be met"):
        fxprune.plan(model, data[0], **options)
    plan = fxprune.plan(model, data[0], **options, depth=True)
    before, after = plan.counts()["params"]
    assert after <= 0.5 * before
    assert plan.settings["branches_tried"]["0"] is None
    assert "the budget is not met with 0" in str(plan)
    with pytest.raises(BudgetError, match="cannot be met"):
        fxprune.plan(model, data[0], **{**options, "budget": Budget(params=0.01)}, depth=True)


def test_a_chosen_plan_is_what_its_branches_by_name_give() -> None:
    model, data = residual((0,)), images()
    plan = fxprune.plan(model, data[0], budget=Budget(macs=0.6), calibrate=data, depth=True)
    assert plan == fxprune.PruningPlan.from_json(plan.to_json())
    again = fxprune.plan(model, data[0], budget=Budget(macs=0.6), calibrate=data, depth=True)
    assert again.removed == plan.removed
    assert again.branches == plan.branches
    assert fxprune.count(plan.apply(model), data[0]).macs <= 0.6 * fxprune.count(model, data[0]).macs


def test_branches_that_went_in_a_step_stay_gone() -> None:
    model, data = residual((0, 2)), images()
    options: Any = {"budget": Budget(params=0.5), "calibrate": data, "depth": 2}
    steps = list(fxprune.schedule(model, data[0], steps=2, **options))
    assert steps[0].total.branches
    assert set(steps[0].total.branches) <= set(steps[1].total.branches) == {"units.0", "units.2"}
    assert {*steps[0].plan.branches, *steps[1].plan.branches} == {"units.0", "units.2"}


def test_branches_go_from_the_models_own_class() -> None:
    model, data = residual((0,)), images()
    options: Any = {"budget": Budget(macs=0.6), "calibrate": data, "depth": 1}
    graph, narrow = (fxprune.prune(model, data[0], **options, into=form) for form in ("graph", "module"))
    assert type(narrow) is type(model)
    assert narrow.meta["fxprune"].branches == graph.meta["fxprune"].branches != ()
    assert torch.allclose(narrow(data[0]), graph(data[0]), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"depth": True}, "needs a budget"), ({"depth": 1, "budget": Budget(macs=0.5)}, "calibration data"),
        ({"depth": -1}, "largest number"), ({"depth": "deep"}, "largest number"),
        ({"depth": 2, "budget": Budget(macs=0.5), "calibrate": [0], "uniform": True}, "uniform=True"),
    ],
)  # fmt: skip
def test_what_depth_needs_is_said(options: dict[str, Any], what: str) -> None:
    with pytest.raises(SelectionError, match=what):
        fxprune.Selection(**options)


def test_a_latency_looks_at_branches_by_itself() -> None:
    data = images(1)
    assert fxprune.Selection(budget=Budget(latency=0.5), calibrate=data).depth is True
    for options in (
        {"budget": Budget(latency=0.5)}, {"budget": Budget(macs=0.5), "calibrate": data},
        {"budget": Budget(latency=0.5), "calibrate": data, "uniform": True},
    ):  # fmt: skip
        assert fxprune.Selection(**options).depth is False  # type: ignore[arg-type]


class Priced:
    """Stands for a judge: each branch costs what it is said to, and pairs cost more."""

    def __init__(self, prices: dict[str, float]) -> None:
        self.prices, self.measured = prices, 0

    def without(self, branches: Any) -> float:
        self.measured += 1
        names = [branch.name for branch in branches]
        return sum(self.prices[name] for name in names) + (10.0 if {"a", "b"} <= {*names} else 0.0)


def test_branches_go_by_what_they_cost_for_what_they_save() -> None:
    from fxprune.coupling.branches import Branch

    prices = {"a": 1.0, "b": 1.5, "c": 3.0, "d": 8.0, "inner": 0.5}
    named = {
        name: Branch(name, f"add_{name}", "x", ("add_inner",) if name == "c" else (), (), 1, False)
        for name in prices
    }
    judge: Any = Priced(prices)
    saved = {"a": 0.2, "b": 0.2, "c": 0.4, "d": 0.4, "inner": 0.01}
    order = depth.Order(judge, named, (), lambda branch: {"params": saved[branch.name]})
    assert order.first(1) == ["a"]
    assert order.first(9) == ["a", "c", "d"]  # "b" after "a" costs 11.5, and "inner" went with "c"
    assert judge.measured < 16


def search(losses: dict[int, float], most: int = 99) -> tuple[int, list[int]]:
    order: Any = type(
        "Order", (), {"first": lambda self, count: list(range(min(count, 12))), "branches": {}}
    )()

    def decide(names: list[str]) -> int:
        if math.isinf(losses[len(names)]):
            raise BudgetError("cannot be met")
        return len(names)

    found = depth.Depth(order, most, decide, lambda count: losses[count])
    return found.run(), sorted(found.tried)


def test_numbers_of_branches_are_tried_until_more_bring_nothing() -> None:
    assert search({0: 1.0, 1: 2.0, 2: 3.0}) == (0, [0, 1, 2])
    assert search({0: 5.0, 1: 4.0, 2: 3.0, 3: 2.5, 4: 3.5, 8: 9.0}) == (3, [0, 1, 2, 3, 4, 8])
    assert search({0: 5.0, 1: 4.0, 2: 3.0}, most=2) == (2, [0, 1, 2])
    assert search({n: float(12 - n) for n in range(13)}) == (12, [0, 1, 2, 4, 8, 10, 12])
    unmet = math.inf
    assert search({0: unmet, 1: unmet, 2: unmet, 4: unmet, 6: 1.0, 8: 2.0, 10: 4.0, 12: 3.0}) == (
        6,
        [0, 1, 2, 4, 6, 8, 10, 12],
    )
    with pytest.raises(BudgetError):
        search(dict.fromkeys(range(13), unmet))
