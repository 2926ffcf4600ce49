"""Criteria against slow formulas, written out entry by entry."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import importance
from fxprune.errors import ImportanceError
from fxprune.importance import FPGM, LAMP, BNScale, Criterion, Magnitude, score

Slow = dict[str, dict[str, list[float]]]
"""For each group, for each member axis, a number for each unit."""


class Residual(nn.Module):
    """conv-bn-relu-conv with a residual, a grouped convolution, and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(self.grouped(x), 2).flatten(1))


class Heads(nn.Module):
    """Attention with a fused projection and two heads, and an MLP, without normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 12)
        self.qkv = nn.Linear(12, 24)
        self.out = nn.Linear(8, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))
        x = x + self.mlp(x)
        return self.head(x.mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 6, 6)),
    "heads": (Heads, (2, 7, 5)),
}
both = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A net in evaluation mode with no parameter or statistic that is 0 or 1, and an input."""
    make, shape = MODELS[name]
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4 + 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model, torch.randn(shape, generator=generator)


def detached(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, as plain tensors."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def scores(model: nn.Module, x: Tensor, criterion: Any, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Scores of all groups."""
    graph = fxprune.analyze(model, x)
    found = score(graph, criterion, seed, model)
    return {group.name: found(group) for group in graph}


def entries(member: fxprune.Member) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Unit and place of every entry of a parameter that goes with a unit, one by one."""
    for place in itertools.product(*map(range, member.tensor.shape)):
        unit = int(member.units[tuple(place[d] for d in (*member.over, member.axis.dim))])
        if unit >= 0:
            yield unit, place


def by_entry(graph: fxprune.CouplingGraph, number: Callable[[str, tuple[int, ...]], float]) -> Slow:
    """What the entries of each member at each unit add up to, by loops; NaN for units it does not hold."""
    found: Slow = {}
    for group in graph:
        found[group.name] = {}
        for member in group.members:
            if member.trainable:
                sums: dict[int, float] = defaultdict(float)
                for unit, place in entries(member):
                    sums[unit] += number(member.axis.name, place)
                found[group.name][str(member.axis)] = [sums.get(u, math.nan) for u in range(group.size)]
    return found


def joined(members: dict[str, list[float]], how: str) -> list[float]:
    """The reductions, written out."""
    function: Callable[[tuple[float, ...]], float] = {
        "sum": sum,
        "mean": lambda v: sum(v) / len(v),
        "max": max,
        "product": math.prod,
    }[how]
    units = zip(*members.values(), strict=True)
    return [function(tuple(v for v in values if not math.isnan(v))) for values in units]


def normal(values: list[float], how: str | None) -> list[float]:
    """The normalisers, written out."""
    mean = sum(values) / len(values)
    if how == "standardize":
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return [(v - mean) / deviation for v in values]
    divisor = {None: 1.0, "mean": mean, "sum": sum(values), "max": max(values)}[how]
    return [v / divisor for v in values]


def close(got: dict[str, Any], wanted: dict[str, Any], rtol: float = 1e-5) -> None:
    """Same groups, same numbers."""
    assert got.keys() == wanted.keys()
    for group in wanted:
        scale = float(np.abs(wanted[group]).max())
        np.testing.assert_allclose(got[group], wanted[group], rtol=rtol, atol=rtol * scale, err_msg=group)


# -- weights alone --------------------------------------------------------------------------------


def test_nets_have_what_they_are_for() -> None:
    """Rows, a flattened axis and shared axes are among the groups."""
    model, x = build("residual")
    groups = {group.name: group for group in fxprune.analyze(model, x)}
    assert any(member.over for group in groups.values() for member in group.members)
    flattened = next(m for g in groups.values() for m in g.members if str(m.axis) == "fc.weight[1]")
    assert np.bincount(flattened.units.ravel()).tolist() == [4] * 8
    model, x = build("heads")
    assert [len(rows) for group in fxprune.analyze(model, x) for rows in group.balance] == [1, 4, 1]
    sums = by_entry(fxprune.analyze(model, x), lambda name, place: 1.0)["qkv.weight[0]"]
    assert sums["qkv.weight[0]"] == [24.0] * 8 + [12.0] * 8, "a unit of q and k takes up an index of each"
    assert np.isnan(sums["out.weight[1]"]).tolist() == [True] * 8 + [False] * 8


@both
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize(
    ("reduce", "normalize"),
    [("sum", None), ("mean", "mean"), ("max", "sum"), ("product", "max"), ("sum", "standardize")],
)
def test_magnitude(name: str, p: float, reduce: str, normalize: str | None) -> None:
    """All reductions and normalisers."""
    model, x = build(name)
    weights = detached(model)
    sums = by_entry(fxprune.analyze(model, x), lambda n, place: abs(float(weights[n][place])) ** p)
    wanted = {g: normal([v ** (1 / p) for v in joined(m, reduce)], normalize) for g, m in sums.items()}
    close(scores(model, x, Magnitude(p, reduce=reduce, normalize=normalize)), wanted)


@both
@pytest.mark.parametrize("p", [1, 2])
def test_names_of_norms(name: str, p: int) -> None:
    """``"l2"`` is the sum over all members, and gives the same plan as the criterion."""
    model, x = build(name)
    close(scores(model, x, f"l{p}"), scores(model, x, Magnitude(p)), rtol=1e-12)
    plans = [fxprune.plan(model, x, importance=choice) for choice in (f"l{p}", Magnitude(p))]
    assert plans[0].removed == plans[1].removed
    assert [plan.settings["importance"] for plan in plans] == [
        f"l{p}",
        ["Magnitude(p=1)", "Magnitude()"][p - 1],
    ]


@both
def test_members(name: str) -> None:
    """The root is the first axis; a predicate picks."""
    model, x = build(name)
    weights = detached(model)
    sums = by_entry(fxprune.analyze(model, x), lambda n, place: float(weights[n][place]) ** 2)
    first = {g: np.sqrt(next(iter(m.values()))) for g, m in sums.items()}
    close(scores(model, x, Magnitude(members="root")), first)
    matrices = {
        g: np.sqrt(joined({a: v for a, v in m.items() if "weight" in a and "bn" not in a}, "sum"))
        for g, m in sums.items()
    }
    close(scores(model, x, Magnitude(members=lambda member: member.tensor.dim() > 1)), matrices)


@both
def test_lamp(name: str) -> None:
    """The share in all that is no smaller."""
    model, x = build(name)
    weights = detached(model)
    sums = by_entry(fxprune.analyze(model, x), lambda n, place: float(weights[n][place]) ** 2)
    wanted = {}
    for group, members in sums.items():
        values = joined(members, "sum")
        wanted[group] = [v / sum(other for other in values if other >= v) for v in values]
    close(scores(model, x, "lamp"), wanted)
    assert all(values.max() == 1 for values in scores(model, x, LAMP()).values())
    equal = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in equal.parameters():
            parameter.fill_(1)
    np.testing.assert_allclose(
        scores(equal, torch.zeros(1, 3), "lamp")["0.weight[0]"], [1 / 4, 1 / 3, 1 / 2, 1]
    )


def test_batch_norm_scale() -> None:
    """Means of the scales that a unit passes; other groups by their magnitude."""
    model, x = build("residual")
    weights = detached(model)
    graph = fxprune.analyze(model, x)
    sums = by_entry(graph, lambda n, place: abs(float(weights[n][place])))
    got = scores(model, x, "bn_scale")
    otherwise = scores(model, x, Magnitude(reduce="mean", normalize="mean"))
    seen = set()
    for group, members in sums.items():
        scales = {axis: v for axis, v in members.items() if "bn" in axis and "weight" in axis}
        seen.add(len(scales))
        if scales:
            np.testing.assert_allclose(got[group], normal(joined(scales, "mean"), "mean"), rtol=1e-5)
        else:
            np.testing.assert_allclose(got[group], otherwise[group])
    assert seen == {0, 1, 2}

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)
            self.scale, self.shift = nn.Parameter(torch.tensor([4.0, 1, 3, 2])), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.next(F.batch_norm(self.conv(x), None, None, self.scale, self.shift, training=True))

    (got_functional,) = scores(Functional(), torch.zeros(2, 2, 3, 3), BNScale(normalize=None)).values()
    assert got_functional.tolist() == [4, 1, 3, 2]


@both
@pytest.mark.parametrize("root", [False, True])
def test_fpgm(name: str, root: bool) -> None:
    """Sums of distances between the vectors of units, member by member."""
    model, x = build(name)
    weights = detached(model)
    wanted = {}
    for group in fxprune.analyze(model, x):
        members = {}
        for member in group.members:
            if member.trainable and member.tensor.dim() > 1 and not (root and members):
                rows = defaultdict(list)
                for unit, place in entries(member):
                    rows[unit].append(float(weights[member.axis.name][place]))
                members[str(member.axis)] = [
                    sum(math.dist(rows[u], other) for other in rows.values() if len(other) == len(rows[u]))
                    if u in rows
                    else math.nan
                    for u in range(group.size)
                ]
        wanted[group.name] = joined(members, "mean")
    close(scores(model, x, FPGM(members="root" if root else "all")), wanted, rtol=1e-4)


def test_random_is_as_it_was() -> None:
    """Depends on seed and architecture only."""
    model, x = build("residual")
    first, again, other = (scores(model, x, "random", seed) for seed in (3, 3, 4))
    close(first, again, rtol=0)
    assert any((first[g] != other[g]).any() for g in first)


@pytest.mark.parametrize("name", sorted(importance.BUILT_IN))
def test_names(name: str) -> None:
    """Every name plans, is recorded, leaves the model alone, and works in bfloat16."""
    model, x = build("residual")
    model.bfloat16().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = fxprune.plan(model, x.bfloat16(), importance=name)
    assert plan.settings["importance"] == name
    assert plan == fxprune.PruningPlan.from_json(plan.to_json())
    assert plan.removed
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Magnitude(reduce="maximum"), ["reduce='maximum'", "'max'"]),
        (lambda: Magnitude(normalize="gaussian"), ["normalize='gaussian'", "'standardize'", "None"]),
        (lambda: Magnitude(members="roots"), ["members='roots'", "Did you mean 'root'?"]),
        (lambda: Magnitude(0), ["p=0", "above 0"]),
        (lambda: Magnitude(math.nan), ["p=nan"]),
        (lambda: Magnitude(True), ["p=True"]),
    ],
)
def test_wrong_options(make: Callable[[], Criterion], parts: list[str]) -> None:
    """Refused when the criterion is made; names the field, the value and the nearest choice."""
    with pytest.raises(ImportanceError) as error:
        make()
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ("bn_scales", ["'bn_scales'", "Did you mean 'bn_scale'?"]),
        ("L2", ["'L2'", "Did you mean 'l2'?"]),
        ("magnitud", ["'magnitud'", "Did you mean 'l2'?"]),
        (Magnitude, ["class Magnitude", "instance"]),
        (Magnitude(members=lambda member: False), ["Magnitude(members=<lambda>)", "0.weight[0]", "where="]),
        (Magnitude(normalize=lambda scores: scores[:1]), ["shape (1,)", "(8,)"]),
        (Magnitude(reduce="product", normalize=lambda scores: scores * math.inf), ["infinity"]),
    ],
)
def test_wrong_importance(choice: Any, parts: list[str]) -> None:
    """The error names what is wrong and what would do."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ImportanceError) as error:
        fxprune.plan(model, torch.zeros(2, 6), importance=choice)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("name", sorted(set(importance.BUILT_IN) - {"random", "synflow"}))
def test_weights_that_are_no_numbers(name: str) -> None:
    """A unit with such a weight is neither the most nor the least important one."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[3, 2] = math.nan
    with pytest.raises(ImportanceError, match=r"NaN or infinity .*'0.weight' holds such values"):
        fxprune.plan(model, torch.zeros(2, 6), importance=name)


def test_criterion_of_ones_own() -> None:
    """A class of the user's own is a criterion like any other, and is prepared once."""
    calls = []

    class Last(Criterion):
        def prepare(self, graph: Any, model: nn.Module, seed: int) -> Any:
            calls.append((type(graph).__name__, model, seed))
            return lambda group: -np.arange(group.size)

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = fxprune.plan(model, torch.zeros(2, 6), importance=Last(), seed=5)
    assert plan.removed == {"0.weight[0]": [4, 5, 6, 7]}
    assert plan.settings["importance"] == "Last()"
    assert calls == [("CouplingGraph", model, 5)]
