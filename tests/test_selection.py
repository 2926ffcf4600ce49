"""What goes: scopes, ratios by layer, rounding, edits of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.errors import BudgetError, PlanError, RatioError, SelectionError

IMAGE = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Residual(nn.Module):
    """A residual stream of 20 channels, two blocks, a grouped convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 1)
        self.blocks = nn.Sequential(Block(20), Block(20))
        self.wide = nn.Conv2d(20, 24, 1)
        self.grouped = nn.Conv2d(24, 36, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(36, 10, 2, stride=2)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.up(self.grouped(self.wide(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


STREAM, GROUPED, UP = "stem.weight[0]", "grouped.weight[0]", "up.weight[1]"
INNER = ["blocks.0.conv1.weight[0]", "blocks.1.conv1.weight[0]"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Residual().eval()
    oracle.stir(net)
    return net


def kept(plan: fxprune.PruningPlan) -> dict[str, int]:
    return {entry.group: entry.kept for entry in plan}


def test_the_groups_that_the_tests_speak_of(model: nn.Module) -> None:
    sizes = fxprune.plan(model, IMAGE, 0).sizes
    assert dict(sizes) == {STREAM: 20, INNER[0]: 20, INNER[1]: 20, "wide.weight[0]": 24, GROUPED: 36, UP: 10}


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("round_to", [None, 4])
def test_scopes_give_exact_networks(model: nn.Module, scope: Any, round_to: int | None) -> None:
    plan = fxprune.plan(model, IMAGE, scope=scope, round_to=round_to)
    assert plan.removed
    pruned = plan.apply(model)
    assert fxprune.verify(model, pruned, plan, IMAGE).exact
    assert plan.check(model) == ()
    assert plan == fxprune.plan(model, IMAGE, scope=scope, round_to=round_to)


class Two(nn.Module):
    """Two hidden layers of 4 and 8 units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def scores(table: dict[str, list[float]]) -> Callable[[fxprune.Group], Any]:
    return lambda group: np.array(table[group.name])


FLAT = torch.randn(2, 3)
A, B = "a.weight[0]", "b.weight[0]"
TABLE = {A: [9.0, 2.0, 8.0, 1.0], B: [5.0, 5.0, 7.0, 0.5, 3.0, 4.0, 6.0, 5.0]}


def test_global_ranking_takes_the_lowest_of_all() -> None:
    """5 of 12: 0.5, 1, 2, 3, 4."""
    plan = fxprune.plan(Two(), FLAT, 0.42, scores(TABLE), scope="global")
    assert plan.removed == {A: [1, 3], B: [3, 4, 5]}


def test_global_ranking_never_empties_a_group() -> None:
    low = {A: [0.0] * 4, B: [1.0] * 8}
    plan = fxprune.plan(Two(), FLAT, 0.5, scores(low), scope="global")
    assert plan.removed == {A: [0, 1, 2], B: [0, 1, 2]}
    assert kept(fxprune.plan(Two(), FLAT, 0.99, scores(low), scope="global")) == {A: 1, B: 1}


def test_max_ratio_moves_the_rest_elsewhere() -> None:
    low = {A: [0.0] * 4, B: [1.0] * 8}
    assert kept(fxprune.plan(Two(), FLAT, 0.5, scores(low), scope="global", max_ratio=0.5)) == {A: 2, B: 4}


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_ranking_with_nothing_to_remove_does_nothing(scope: Any) -> None:
    net = nn.Linear(3, 2)
    plan = fxprune.plan(net, FLAT, scope=scope)
    assert plan.removed == {}
    assert plan.apply(net)(FLAT).shape == (2, 2)
    assert fxprune.plan(Two(), FLAT, scope=scope, where=lambda group: False).removed == {}


def test_isomorphic_ranks_groups_of_one_structure_together(model: nn.Module) -> None:
    """The inner groups of both blocks are one class; that of the first block has the lower scores."""

    def importance(group: fxprune.Group) -> Any:
        return np.full(group.size, 1.0 if group.name == INNER[0] else 2.0)

    left = kept(fxprune.plan(model, IMAGE, 0.4, importance, scope="isomorphic"))
    assert left == {STREAM: 12, INNER[0]: 4, INNER[1]: 20, "wide.weight[0]": 18, GROUPED: 24, UP: 6}


def test_balanced_rows_are_ranked_as_one_step() -> None:
    """Two rows of 4 against a plain layer: a step takes one unit of each row, ranked by their mean."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(4, 8, 1)
            self.g = nn.Conv2d(8, 8, 1, groups=2)
            self.c = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.g(self.b(self.a(x).relu()).relu()))

    table = {
        "a.weight[0]": [3.0, 4.0, 5.0, 6.0],
        "b.weight[0]": [0.0, 50.0, 50.0, 50.0, 4.0, 60.0, 60.0, 60.0],
        "g.weight[0]": [90.0] * 8,
    }
    net = Net().eval()
    plan = fxprune.plan(net, IMAGE, 3 / 20, scores(table), scope="global")
    assert plan.removed == {"a.weight[0]": [0], "b.weight[0]": [0, 4]}
    plan = fxprune.plan(net, IMAGE, 2 / 20, scores(table), scope="global")
    assert plan.removed == {"b.weight[0]": [0, 4]}


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ("stem", {STREAM}),
        ("blocks.*.conv1", set(INNER)),
        ("blocks.0", {INNER[0], STREAM}),
        ("blocks.0.bn1", {INNER[0]}),
        ("blocks.0.conv1.weight", {INNER[0]}),
        ("blocks.0.conv1.weight[1]", {STREAM}),
        (GROUPED, {GROUPED}),
        ("up", {UP}),
        ("fc", set()),
        ("fc.weight[1]", {UP}),
        (nn.ConvTranspose2d, {UP}),
        (nn.BatchNorm2d, {*INNER, STREAM}),
        (Block, {*INNER, STREAM}),
        (nn.Linear, set()),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_what_a_name_means(model: nn.Module, pattern: Any, groups: set[str]) -> None:
    everything = set(fxprune.plan(model, IMAGE, 0.5).removed)
    assert everything - set(fxprune.plan(model, IMAGE, 0.5, keep=pattern).removed) == groups


def test_ratios_by_layer(model: nn.Module) -> None:
    plan = fxprune.plan(model, IMAGE, 0.5, ratios={nn.Conv2d: 0.2, "blocks.0.conv1": 0.75}, keep=["wide"])
    assert kept(plan) == {
        STREAM: 16, INNER[0]: 5, INNER[1]: 16, "wide.weight[0]": 24, GROUPED: 30, UP: 5,
    }  # fmt: skip
    assert "blocks.0.conv1" in plan.notes[0]
    assert plan.settings["ratios"] == {"Conv2d": 0.2, "blocks.0.conv1": 0.75}
    assert fxprune.PruningPlan.from_json(plan.to_json()) == plan


def test_user_scopes_rank_their_layers_together(model: nn.Module) -> None:
    def importance(group: fxprune.Group) -> Any:
        return np.full(group.size, 1.0 if group.name == INNER[0] else 2.0)

    plan = fxprune.plan(
        model, IMAGE, 0.0, importance, scopes={("blocks.*.conv1",): 0.25, ("wide", "grouped"): 0.5}
    )
    left = kept(plan)
    assert (left[INNER[0]], left[INNER[1]]) == (10, 20)
    assert left["wide.weight[0]"] + left[GROUPED] == 30
    assert left[STREAM] == 20
    assert left[UP] == 10


@pytest.mark.parametrize(
    ("round_to", "ratio", "left"),
    [
        (8, 0.5, {STREAM: 8, INNER[0]: 8, INNER[1]: 8, "wide.weight[0]": 24, GROUPED: 24, UP: 8}),
        (4, 0.3, {STREAM: 12, INNER[0]: 12, INNER[1]: 12, "wide.weight[0]": 24, GROUPED: 24, UP: 8}),
        ({"blocks": 8, UP: 3}, 0.5,
         {STREAM: 8, INNER[0]: 8, INNER[1]: 8, "wide.weight[0]": 12, GROUPED: 18, UP: 6}),
    ],
    ids=str,
)  # fmt: skip
def test_round_to(model: nn.Module, round_to: Any, ratio: float, left: dict[str, int]) -> None:
    """The nearest multiple; of all rows together where a row is shorter than the multiple."""
    plan = fxprune.plan(model, IMAGE, ratio, round_to=round_to)
    assert kept(plan) == left
    assert plan.check(model) == ()


def test_round_to_says_what_it_cannot_round() -> None:
    plan = fxprune.plan(Two(), FLAT, 0.5, round_to=16)
    assert plan.removed == {}
    assert len(plan.notes) == 2
    assert "multiple of 16" in plan.notes[0]


@settings(max_examples=12)
@given(
    ratio=st.floats(0, 0.95),
    scope=st.sampled_from(["local", "global", "isomorphic"]),
    round_to=st.sampled_from([None, 2, 3, 8]),
    max_ratio=st.sampled_from([1.0, 0.95]),
    seed=st.integers(0, 5),
)
def test_any_selection_keeps_the_constraints(
    model: nn.Module, ratio: float, scope: Any, round_to: int | None, max_ratio: float, seed: int
) -> None:
    plan = fxprune.plan(
        model, IMAGE, ratio, "random", seed=seed, scope=scope, round_to=round_to, max_ratio=max_ratio
    )
    assert plan.check(model) == ()
    for entry in plan:
        assert entry.size - entry.kept <= max_ratio * entry.size
        if round_to and entry.removed:
            assert entry.kept % round_to == 0
    if round_to is None and scope == "global":
        gone = sum(len(units) for units in plan.removed.values())
        assert gone <= ratio * sum(plan.sizes.values()) + 1e-6


# -- edits ------------------------------------------------------------------------------------------


def test_a_plan_is_edited_group_by_group(model: nn.Module) -> None:
    plan = fxprune.plan(model, IMAGE, 0.5)
    assert [entry.group for entry in plan] == list(plan.sizes)
    first = next(iter(plan))
    assert (first.group, first.size, first.kept, len(first.removed)) == (STREAM, 20, 10, 10)
    assert str(first) == "stem.weight[0]: 20 -> 10 units"
    edited = plan.with_removed({INNER[0]: [3, 1], INNER[1]: []}).without(UP)
    assert edited.removed[INNER[0]] == [1, 3]
    assert INNER[1] not in edited.removed
    assert UP not in edited.removed
    assert len(plan.removed) == 6, "the plan itself was changed"
    assert edited.check(model) == edited.check(fxprune.analyze(model, IMAGE)) == ()
    assert fxprune.verify(model, edited.apply(model), edited, IMAGE).exact


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ({GROUPED: [0, 1, 6, 7, 12, 18, 24, 30]}, r"same share.*0 to 5 loses 2 of 6.*12 to 17 1 of 6"),
        ({GROUPED: list(range(6))}, r"all units of the row of units 0 to 5 go"),
        ({UP: list(range(10))}, r"all units .* at least one must stay"),
        ({UP: [3, 10, -1]}, r"there are none at \[-1, 10\]"),
        ({UP: [3, 3]}, r"\[3\] more than once"),
        ({UP: [0.5]}, r"whole numbers"),
    ],
    ids=str,
)
def test_check_names_the_constraint(model: nn.Module, removed: dict[str, list[Any]], says: str) -> None:
    plan = fxprune.plan(model, IMAGE, 0.0).with_removed(removed)
    (problem,) = plan.check(model)
    assert problem.group == next(iter(removed))
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(str(problem))


def test_check_of_another_model(model: nn.Module) -> None:
    plan = fxprune.plan(model, IMAGE, 0.5)
    (problem,) = plan.check(Two())
    assert "another architecture" in str(problem)
    strange = {entry.group for entry in plan.check(fxprune.analyze(Two(), FLAT))}
    assert strange == set(plan.removed)


def test_overlapping_scopes_are_noted(model: nn.Module) -> None:
    plan = fxprune.plan(model, IMAGE, 0.5, scopes={"stem": 0.5, ("wide", "stem"): 0.25})
    assert plan.notes == (f"{STREAM} is in two scopes; the latter counts, wide, stem",)
    assert not fxprune.plan(model, IMAGE, 0.5, scopes={("stem", "stem"): 0.5}).notes


def test_modules_are_told_their_names(model: nn.Module) -> None:
    """As ``ignored_layers`` elsewhere takes them."""
    with pytest.raises(SelectionError, match="got a Conv2d, whose name in the model is 'stem': give that"):
        fxprune.plan(model, IMAGE, keep=[model.get_submodule("stem")])


def test_numbers_of_numpy() -> None:
    """A ratio or a budget that was computed is as good as one that was typed, and is stored as plain data."""
    arguments: list[dict[str, Any]] = [
        {"ratio": np.float32(0.5), "max_ratio": np.float64(0.9)},
        {"budget": fxprune.Budget(params=np.float32(0.5))},
    ]
    for options in arguments:
        plan = fxprune.plan(Two(), FLAT, **options)
        assert plan.removed
        assert fxprune.PruningPlan.from_json(plan.to_json()) == plan


def test_edits_of_unknown_groups_name_the_nearest(model: nn.Module) -> None:
    plan = fxprune.plan(model, IMAGE, 0.5)
    for edit in (lambda: plan.with_removed({"stem.weight": [0]}), lambda: plan.without("stem.weight")):
        with pytest.raises(PlanError, match=r"'stem.weight'.*'stem.weight\[0\]'"):
            edit()
    with pytest.raises(PlanError, match=r"are a list, \[3\] say; got 3"):
        plan.with_removed({STREAM: 3})


# -- wrong arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"scope": "globl"}, SelectionError, "did you mean 'global'"),
        ({"scope": None}, SelectionError, "'isomorphic'"),
        ({"keep": "blocks.0.conv"}, SelectionError, r"nearest are 'blocks.0.conv\d'"),
        ({"keep": ["nothing.*"]}, SelectionError, r"matches no module"),
        ({"keep": 3}, SelectionError, "names"),
        ({"keep": [3]}, SelectionError, "module types"),
        ({"keep": nn.Conv3d}, SelectionError, "'Conv2d'"),
        ({"keep": nn.Linear(2, 2)}, SelectionError, "got a Linear.$"),
        ({"where": "stem"}, SelectionError, "where is a function .* got 'stem'. By name, use keep"),
        ({"ratio": fxprune.Budget(macs=0.5)}, BudgetError, "by name, in place of the ratio"),
        ({"ratio": 30}, RatioError, "got 30. For 30 % give 0.3"),
        ({"ratio": torch.tensor(0.5)}, RatioError, "got tensor"),
        ({"ratios": {"stm": 0.5}}, SelectionError, "'stem'"),
        ({"ratios": {"stem": 1.0}}, RatioError, r"ratios\['stem'\]"),
        ({"ratios": [("stem", 0.5)]}, SelectionError, "maps names"),
        ({"ratios": {"fc": 0.5}}, RatioError, r"ratios\['fc'\] = 0.5 cannot be met.*output of the model"),
        ({"scopes": {nn.Linear: 0.5}}, RatioError, r"scopes\[Linear\] = 0.5 cannot be met.*fc.weight\[0\]"),
        ({"scopes": {("stem", "wid"): 0.5}}, SelectionError, "'wide'"),
        ({"scopes": {"stem": -1}}, RatioError, "scopes"),
        ({"max_ratio": 0}, RatioError, "max_ratio"),
        ({"max_ratio": 1.5}, RatioError, "max_ratio"),
        ({"ratio": 0.8, "max_ratio": 0.6}, RatioError, "ratio = 0.8 cannot be met.*nearest.*ratio = 0.6"),
        ({"ratios": {"stem": 0.8}, "max_ratio": 0.6}, RatioError, "cannot be met"),
        ({"round_to": 0}, SelectionError, "round_to"),
        ({"round_to": 2.5}, SelectionError, "round_to"),
        ({"round_to": {"stem": "8"}}, SelectionError, "round_to"),
        ({"round_to": {"stern": 8}}, SelectionError, "'stem'"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("function", [fxprune.plan, fxprune.prune], ids=lambda f: f.__name__)
def test_wrong_arguments(
    model: nn.Module, function: Any, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        function(model, IMAGE, **arguments)


# -- the object ------------------------------------------------------------------------------------


def test_a_selection_is_what_the_keywords_make(model: nn.Module) -> None:
    selection = fxprune.Selection(0.4, "l1", scope="global", keep=nn.ConvTranspose2d, max_ratio=0.8)
    plan = fxprune.plan(model, IMAGE, selection)
    keywords: dict[str, Any] = {"scope": "global", "keep": nn.ConvTranspose2d, "max_ratio": 0.8}
    assert plan == fxprune.plan(model, IMAGE, 0.4, "l1", **keywords)
    assert plan == fxprune.plan(model, IMAGE, selection=selection)
    assert plan.settings["scope"] == "global"
    narrow = fxprune.prune(model, IMAGE, replace(selection, ratio=0.2))
    assert narrow.meta["fxprune"] == fxprune.plan(model, IMAGE, ratio=0.2, importance="l1", **keywords)


def test_all_arguments_are_those_of_the_selection() -> None:
    stated = list(inspect.signature(fxprune.Selection).parameters)
    for function in (fxprune.plan, fxprune.prune):
        assert list(inspect.signature(function).parameters) == ["model", "example_inputs", *stated]
    described = fxprune.Selection.__doc__ or ""
    assert [name for name in stated if f"        {name}: " not in described] == []


def test_a_selection_is_checked_when_it_is_made() -> None:
    with pytest.raises(RatioError, match="For 50 %"):
        fxprune.Selection(50)
    with pytest.raises(SelectionError, match="did you mean 'global'"):
        fxprune.Selection(scope="globl")
    with pytest.raises(BudgetError, match="contradict"):
        fxprune.Selection(0.5, budget=fxprune.Budget(macs=0.5))
    with pytest.raises(SelectionError, match="stands alone"):
        fxprune.plan(Two(), FLAT, fxprune.Selection(), scope="global")
    with pytest.raises(TypeError, match="unexpected keyword"):
        fxprune.plan(Two(), FLAT, rato=0.5)
    assert fxprune.Selection(budget=fxprune.Budget(latency=0.5)).round_to == 8
    assert fxprune.Selection(budget=fxprune.Budget(macs=0.5)).ratio is None
