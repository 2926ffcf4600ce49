"""Plan files: what they hold, how two differ, and what is refused, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from fxprune.errors import OutputError, PlanError

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, width, 1), nn.ReLU(), nn.Conv2d(width, 6, 1)) for _ in range(blocks)
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def plan() -> fxprune.PruningPlan:
    torch.manual_seed(0)
    return fxprune.plan(Net(), X, 0.5)


def test_a_plan_goes_through_a_file(plan: fxprune.PruningPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert fxprune.PruningPlan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    lines = path.read_text().splitlines()
    # One line for each tensor, group and field: what changed is seen in a diff of two files.
    assert len(lines) < len(plan.shapes) + len(plan.sizes) + len(plan.removed) + 24
    assert any(line.strip().startswith('"blocks.1.0.weight[0]": "') for line in lines)


def test_whoever_may_read_other_files_may_read_these(plan: fxprune.PruningPlan, tmp_path: Path) -> None:
    plain, weights = tmp_path / "plain.txt", tmp_path / "net.safetensors"
    plain.touch()
    fxprune.save(plan.apply(Net()), weights)
    assert weights.stat().st_mode == plain.stat().st_mode


def test_positions_are_ranges(plan: fxprune.PruningPlan) -> None:
    edited = plan.with_removed({"blocks.0.0.weight[0]": [0, 1, 2, 5, 7, 8]})
    text = edited.to_json()
    assert '"blocks.0.0.weight[0]": "0-2, 5, 7-8"' in text
    assert fxprune.PruningPlan.from_json(text) == edited
    by_hand = text.replace('"0-2, 5, 7-8"', "[0, 1, 2, 5, 7, 8]")
    assert fxprune.PruningPlan.from_json(by_hand) == edited


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("0-99", "unit 99"),
        ("12", "unit 12"),
        ("3-1", "no list of units"),
        ("-1", "ranges such as"),
        ("0x1", "ranges such as"),
        ("1-2-3", "ranges such as"),
        ("0-99999999999999999999", "ranges such as"),
        ("0-11", "every unit"),
        ("1, 1", "more than once"),
    ],
)
def test_wrong_ranges(plan: fxprune.PruningPlan, positions: str, words: str) -> None:
    data = json.loads(plan.to_json())
    data["removed"]["blocks.0.0.weight[0]"] = positions
    with pytest.raises(PlanError, match=words):
        fxprune.PruningPlan.from_json(json.dumps(data)).apply(Net())


def test_a_file_that_stands_for_too_much(plan: fxprune.PruningPlan) -> None:
    data = json.loads(plan.to_json())
    data["sizes"]["blocks.0.0.weight[0]"] = 10**11
    data["removed"]["blocks.0.0.weight[0]"] = f"0-{10**11 - 2}"
    with pytest.raises(PlanError, match="no list of units"):
        fxprune.PruningPlan.from_json(json.dumps(data))
    data["notes"] = ["x" * 40_000]  # a long text may stand for more, but not for hundreds of megabytes
    data["removed"]["blocks.0.0.weight[0]"] = "0-6000000"
    with pytest.raises(PlanError, match="no list of units"):
        fxprune.PruningPlan.from_json(json.dumps(data))
    data["removed"]["blocks.0.0.weight[0]"] = "0-5"
    data["shapes"]["wide"] = [10**4000] * 100
    with pytest.raises(PlanError, match="that of no tensor"):
        fxprune.PruningPlan.from_json(json.dumps(data))


def test_deep_nesting_and_absurd_sizes(plan: fxprune.PruningPlan) -> None:
    with pytest.raises(PlanError, match="RecursionError"):
        fxprune.PruningPlan.from_json('{"fxprune_plan":' + "[" * 100_000)
    for inputs in (
        {"args": [{"tensor": [10**30, 2], "dtype": "float32"}], "kwargs": {}},
        {"args": [{"tensor": [2**40, 2**20], "dtype": "float32"}], "kwargs": {}},
        {"args": [{"tensor": [1, 3, 10**9, 8], "dtype": "float32"}], "kwargs": {}},  # 96 GB
        {"args": [{"tensor": [-1], "dtype": "float32"}], "kwargs": {}},
        {"args": [{"tensor": [2], "dtype": "nn"}], "kwargs": {}},
        {"args": 3, "kwargs": {}},
    ):
        data = {**json.loads(plan.to_json()), "inputs": inputs}
        with pytest.raises(PlanError, match="inputs"):
            fxprune.PruningPlan.from_json(json.dumps(data))


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        fxprune.PruningPlan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        fxprune.PruningPlan.load(path)
    path.write_text("{}")
    with pytest.raises(PlanError, match=r"plan\.json: this is no pruning plan"):
        fxprune.PruningPlan.load(path)


def test_a_plan_is_written_as_json_only(plan: fxprune.PruningPlan, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"end in \.json \(a plan\)"):
        plan.save(tmp_path / "plan.txt")
    with pytest.raises(OutputError, match="there is no folder"):
        plan.save(tmp_path / "nowhere" / "plan.json")
    assert list(tmp_path.iterdir()) == []


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _mutated(data: Any, choose: st.DataObject) -> Any:
    """``data`` with one value somewhere in it exchanged, removed or added."""
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return choose.draw(_VALUES)
        key = choose.draw(st.sampled_from(keys))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and choose.draw(st.booleans()):
            place = inner
            continue
        how = choose.draw(st.sampled_from(["exchange", "remove", "huge", "text"]))
        if how == "remove":
            del place[key]
        elif how == "huge":
            place[key] = choose.draw(st.sampled_from([10**9, 2**63, 10**40, -1, 1e308, float("nan")]))
        elif how == "text":
            place[key] = choose.draw(st.sampled_from(["0-7", "0-999999999999", "../../x", "0-", "\0", ""]))
        else:
            place[key] = choose.draw(_VALUES)
        return data


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choose=st.data())
def test_mutated_plans_are_refused_or_mean_something(
    plan: fxprune.PruningPlan, choose: st.DataObject
) -> None:
    """A plan with something wrong in it is refused with a PlanError; any other can be written and read."""
    data = _mutated(json.loads(plan.to_json()), choose)
    try:
        read = fxprune.PruningPlan.from_json(json.dumps(data))
    except PlanError:
        return
    assert str(read)
    assert str(plan.diff(read))
    assert fxprune.PruningPlan.from_json(read.to_json()).to_json() == read.to_json()


def test_diff(plan: fxprune.PruningPlan) -> None:
    assert not plan.diff(plan)
    assert str(plan.diff(plan)) == "no difference"
    other = plan.with_removed({f"blocks.{i}.0.weight[0]": [0, 1, 2] for i in range(3)})
    found = plan.diff(other)
    assert {change.group for change in found.changes} <= {f"blocks.{i}.0.weight[0]" for i in range(3)}
    for change in found.changes:
        assert set(change.only_second) == {0, 1, 2} - set(plan.removed[change.group])
    assert not found.architectures
    text = str(plan.diff(fxprune.plan(Net(blocks=4), X, 0.25)))
    assert "'blocks.3.0.weight' the first plan's has no such tensor, the second's has shape (12, 6, 1" in text
    assert "settings ratio: 0.5 and 0.25" in text


def test_another_architecture_is_told_apart_exactly(plan: fxprune.PruningPlan) -> None:
    with pytest.raises(PlanError) as caught:
        plan.apply(Net(width=10))
    said = str(caught.value)
    assert "for 'blocks.*.0.weight (x3)' it has shape (12, 6, 1, 1), Net has shape (10, 6, 1, 1)" in said
    assert "for 'blocks.*.2.weight (x3)' it has shape (6, 12, 1, 1), Net has shape (6, 10, 1, 1)" in said
    assert "stem" not in said


def test_printing_ends_with_what_it_costs(tmp_path: Path) -> None:
    model = Net()
    plan = fxprune.plan(model, X, 0.5)
    before, after = fxprune.count(model, X), fxprune.count(plan.apply(model), X)
    text = str(plan)
    assert f"parameters {before.params:,} -> {after.params:,} (" in text
    assert f"multiply-accumulates {before.macs:,} -> {after.macs:,} (" in text
    plan.save(tmp_path / "plan.json")
    loaded = fxprune.PruningPlan.load(tmp_path / "plan.json")
    assert str(loaded) == text
    assert loaded == plan
    assert "parameters" not in str(loaded.without("blocks.0.0.weight[0]"))


def test_printing_joins_repeated_layers(plan: fxprune.PruningPlan) -> None:
    assert "blocks.*.0.weight[0] (x3)      12 ->      6" in str(plan)
    lines = [line for line in plan.text(all=True).splitlines() if "weight[0]" in line]
    assert len(lines) == 4
