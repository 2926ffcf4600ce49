"""``fxprune.removable``: what goes with the channels of a layer, checked against the groups and a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import AxisError, PlanError


class Net(nn.Module):
    """A stem, a grouped convolution, a transposed one, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.norm(self.stem(x))))
        return self.head(x.flatten(1))


X = torch.zeros(2, 3, 1, 1)


@pytest.fixture
def graph() -> fxprune.CouplingGraph:
    return fxprune.analyze(Net(), X)


def lines(removal: Any) -> dict[str, str]:
    return {str(step.axis): step.indices for step in removal.steps if step.indices}


def test_names_what_goes_and_what_else_is_needed(graph: fxprune.CouplingGraph) -> None:
    removal = fxprune.removable(graph, "stem", idxs=[6, 1, 2])
    assert removal.removed == {"stem.weight[0]": [1, 2, 6]}
    wanted = dict.fromkeys(["stem.weight[0]", "stem.bias[0]", "norm.weight[0]", "norm.bias[0]"], "[1-2, 6]")
    wanted |= dict.fromkeys(["norm.running_mean[0]", "norm.running_var[0]"], "[1-2, 6]")
    assert lines(removal) == wanted | {"grouped.weight[1]": "[1-2], 1-2 a row"}
    assert removal.balance == (
        "also needs 1 more in row 1 of the 2 rows that remain of stem.weight[0] (4 units each); any will do",
    )
    text = str(removal)
    assert text.startswith("stem.weight[0], indices 1-2, 6\n")
    assert "through norm (" in text
    assert "test_explain.py" in text


def test_balanced_removals_make_plans(graph: fxprune.CouplingGraph) -> None:
    """What it reports can be put into a plan; that works exactly where it asks for nothing more."""
    model = Net()
    plan = fxprune.plan(model, X, ratio=0)
    even = fxprune.removable(graph, "stem", idxs=[1, 2, 5, 6])
    assert not even.balance
    pruned = replace(plan, removed=even.removed).apply(model)
    assert torch.equal(pruned.stem.bias, model.stem.bias[[0, 3, 4, 7]])
    with pytest.raises(PlanError):
        replace(plan, removed=fxprune.removable(graph, "stem", idxs=[1]).removed).apply(model)
    whole = fxprune.removable(graph, "stem", idxs=[0, 1, 2, 3])
    assert whole.balance == (
        "a whole row of stem.weight[0] goes, so it needs units 0-2 of grouped.weight[0], too",
    )
    both = whole.removed | fxprune.removable(graph, "grouped", idxs=[0, 1, 2]).removed
    assert replace(plan, removed=both).apply(model).grouped.groups == 1
    more = fxprune.removable(graph, "stem", idxs=[0, 1, 2, 3, 5])
    assert len(more.balance) == 1, "what remains is a single row"
    assert "all rows of stem.weight[0] would go" in fxprune.removable(graph, "stem").balance[-1]


def test_names_dimensions_and_repeats(graph: fxprune.CouplingGraph) -> None:
    """A module means its outputs; an axis that holds a unit several times loses all of it."""
    up = fxprune.removable(graph, "up", idxs=[3])
    assert str(up.root) == "up.weight[1]"
    assert lines(up)["head.weight[1]"] == "[12-15]"
    inner = fxprune.removable(graph, "head.weight", [13], dim=-1)
    assert inner.removed == up.removed
    assert lines(inner)["head.weight[1]"] == "[12-15]"
    assert lines(inner)["up.bias[0]"] == "[3]"
    assert fxprune.removable(graph, "up").removed == {"up.weight[1]": [0, 1, 2, 3]}


def test_what_stays_and_what_is_not_there(graph: fxprune.CouplingGraph) -> None:
    removal = fxprune.removable(graph, "head", [0, 2])
    assert (removal.removed, removal.steps) == ({}, ())
    assert "stays: 0, 2: output of the model" in str(removal)
    with pytest.raises(AxisError, match=r"'steam'; the nearest names are stem"):
        fxprune.removable(graph, "steam")
    with pytest.raises(AxisError, match=r"takes what fxprune.analyze\(model, x\) gave, got Linear"):
        fxprune.removable(nn.Linear(1, 1), "stem")
    with pytest.raises(AxisError, match=r"by the name of its layer.*got a Conv2d"):
        fxprune.removable(graph, nn.Conv2d(1, 1, 1))
    with pytest.raises(AxisError, match=r"indices 0 to 7; there are no \[8, -1\] among them"):
        fxprune.removable(graph, "stem", [8, -1])
    with pytest.raises(AxisError, match=r"stem.weight has 4 axes, so there is no axis 4"):
        fxprune.removable(graph, "stem.weight", [0], dim=4)
