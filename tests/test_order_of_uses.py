"""Whether an axis may go does not depend on when a use of it is seen; outputs keep their shapes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.coupling.coupler import Coupler
from fxprune.errors import PlanError

Use = Callable[[Any, Tensor], Tensor]


class Uses(nn.Module):
    """Parameters, and independent uses of them, made in a given order and returned in a fixed one."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], uses: Sequence[Use], order: Sequence[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in shapes.items():
            if name.startswith("buffer"):
                self.register_buffer(name, torch.randn(shape))
            else:
                setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.uses, self.order = tuple(uses), tuple(order)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results: dict[int, Tensor] = {}
        for number in self.order:
            results[number] = self.uses[number](self, x)
        return tuple(results[number] for number in range(len(self.uses)))


MAP = torch.randn(2, 3, 6, 6)
ROWS = torch.randn(2, 5, 3)


def _net(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, m.a, padding=1).relu(), m.b, padding=1)


def _grouped(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(F.conv2d(x, m.a), m.deep, groups=8), m.b)


def _grouped_pairs(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(F.conv2d(x, m.a), m.pairs, groups=4), m.b)


def _grouped_to_one(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(F.conv2d(x, m.a), m.pairs, groups=4), m.b)


def _grouped_transposed(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv_transpose2d(F.conv2d(x, m.a), m.pairs, groups=8), m.b)


def _penalty(name: str) -> Use:
    return lambda m, x: getattr(m, name).abs().sum()


def _kernel_sum(name: str) -> Use:
    return lambda m, x: getattr(m, name).sum((2, 3)).mean()


def _flat(name: str) -> Use:
    return lambda m, x: getattr(m, name).flatten(1).pow(2).sum(1).sum()


def _standardized(m: Any, x: Tensor) -> Tensor:
    w = m.a.view(m.a.shape[0], -1)
    w = (w - w.mean(1, keepdim=True)).view(m.a.shape)
    return F.conv2d(F.conv2d(x, w, padding=1), m.b, padding=1).mean()


def _merged(m: Any, x: Tensor) -> Tensor:
    w = F.conv2d(m.w1.permute(1, 0, 2, 3), m.w2, padding=2).permute(1, 0, 2, 3)
    return F.conv2d(F.conv2d(x, w, padding=1).relu(), m.head)


def _bias_of(m: Any, x: Tensor) -> Tensor:
    return (m.w2 * m.bias.reshape(1, -1, 1, 1)).sum((1, 2, 3)).pow(2).sum()


def _attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = ((x @ w).view(2, 5, 4, 4).transpose(1, 2) for w in (m.q, m.k, m.v))
    a = (q @ k.transpose(-1, -2) + m.table[:, None, None]).softmax(-1)
    return (a @ v).transpose(1, 2).reshape(2, 5, 16) @ m.o


def _head_norm(m: Any, x: Tensor) -> Tensor:
    return ((x @ m.q).view(2, 5, 4, 4) * m.scale).pow(2).sum()


def _table_sum(m: Any, x: Tensor) -> Tensor:
    return m.table.sum() + m.scale.sum()


def _row_picked(m: Any, x: Tensor) -> Tensor:
    return m.v[:, 3]


def _added_map(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, m.a, padding=1) + m.position, m.b, padding=1)


def _pointwise_on_map(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(m.position[None], m.mix).sum((1, 2, 3))


def _map_sum(m: Any, x: Tensor) -> Tensor:
    return m.position.sum()


def _looked_up(m: Any, x: Tensor) -> Tensor:
    return torch.take_along_dim(x.flatten(1), m.buffer_index.clamp(0, 1).long(), 1)


def _met(m: Any, x: Tensor) -> Tensor:
    return ((x.mean((2, 3)) @ m.wide) * m.buffer_index) @ m.back


NETS: dict[str, tuple[dict[str, tuple[int, ...]], list[Use], Tensor]] = {
    "convolutions": (
        {"a": (8, 3, 3, 3), "b": (2, 8, 3, 3)},
        [_net, _penalty("a"), _penalty("b"), _kernel_sum("a"), _flat("b"), _standardized],
        MAP,
    ),
    "merged_kernels": (
        {"w1": (6, 3, 1, 1), "w2": (12, 6, 3, 3), "bias": (6,), "head": (2, 12, 1, 1)},
        [_merged, _bias_of, _penalty("w2"), _penalty("w1")],
        MAP,
    ),
    "depthwise": (
        {"a": (8, 3, 1, 1), "deep": (8, 1, 3, 3), "b": (2, 8, 1, 1)},
        [_grouped, _penalty("deep"), _kernel_sum("deep"), _flat("a")],
        MAP,
    ),
    "grouped": (
        {"a": (8, 3, 1, 1), "pairs": (8, 2, 3, 3), "b": (2, 8, 1, 1)},
        [_grouped_pairs, _penalty("pairs"), _penalty("a")],
        MAP,
    ),
    "grouped_to_one": (
        {"a": (8, 3, 1, 1), "pairs": (4, 2, 3, 3), "b": (2, 4, 1, 1)},
        [_grouped_to_one, _penalty("pairs"), _kernel_sum("pairs")],
        MAP,
    ),
    "grouped_transposed": (
        {"a": (8, 3, 1, 1), "pairs": (8, 2, 3, 3), "b": (2, 16, 1, 1)},
        [_grouped_transposed, _penalty("pairs"), _penalty("a")],
        MAP,
    ),
    "attention": (
        {"q": (3, 16), "k": (3, 16), "v": (3, 16), "o": (16, 3), "table": (4,), "scale": (4,)},
        [_attention, _head_norm, _table_sum, _penalty("q")],
        ROWS,
    ),
    "picked": (
        {"q": (3, 16), "k": (3, 16), "v": (3, 16), "o": (16, 3), "table": (4,)},
        [_attention, _row_picked, _penalty("v")],
        ROWS,
    ),
    "learned_map": (
        {"a": (8, 3, 3, 3), "b": (2, 8, 3, 3), "position": (8, 6, 6), "mix": (2, 8, 1, 1)},
        [_added_map, _pointwise_on_map, _map_sum],
        MAP,
    ),
    "index": (
        {"buffer_index": (1, 8), "wide": (3, 8), "back": (8, 2)},
        [_looked_up, _met],
        MAP,
    ),
}


def _shown(graph: fxprune.CouplingGraph) -> Any:
    """Which indices go together, whether exactly, and what stays."""
    groups = {
        frozenset(
            (str(member.axis), tuple(np.argwhere(member.units == unit).ravel().tolist()))
            for member in group.members
            for unit in [position]
        )
        for group in graph.groups
        for position in range(group.size)
    }
    exact = {group.name: group.exact for group in graph.groups}
    rows = {
        frozenset((name, tuple(sorted(units.tolist()))) for name, units in row.items())
        for row_set in graph.rows
        for row in row_set.rows
    }
    return groups, exact, rows, {str(frozen.axis) for frozen in graph.frozen}


def _orders(count: int) -> list[tuple[int, ...]]:
    every = list(itertools.permutations(range(count)))
    return [every[0], every[-1], *random.Random(0).sample(every[1:-1], min(6, len(every) - 2))]


@pytest.mark.parametrize("name", NETS)
def test_the_order_of_independent_uses_decides_nothing(name: str) -> None:
    """The same groups, exact or not, the same rows and the same frozen axes in every order."""
    shapes, uses, x = NETS[name]
    found = [_shown(fxprune.analyze(Uses(shapes, uses, order), x)) for order in _orders(len(uses))]
    for order, other in zip(_orders(len(uses)), found, strict=True):
        assert other == found[0], order


class Penalty(nn.Module):
    """A weight is used once more after its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x).relu()), self.a.weight.abs().sum() + self.b.weight.abs().sum()


class Merged(nn.Module):
    """Two kernels that are merged at run time, and a sum over one of them for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 3, 1, 1)), nn.Parameter(torch.randn(6))
        self.w2, self.head = nn.Parameter(torch.randn(12, 6, 3, 3)), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = F.conv2d(self.w1.permute(1, 0, 2, 3), self.w2, padding=2).permute(1, 0, 2, 3)
        bias = (self.w2 * self.b1.reshape(1, -1, 1, 1)).sum((1, 2, 3))
        return self.head(F.conv2d(x, w, bias, padding=1).relu())


class Temporal(nn.Module):
    """1-D and transposed convolutions whose kernels are smoothed afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 5, padding=2), nn.ConvTranspose1d(16, 2, 5, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(self.a(x).relu())
        return y, self.a.weight.pow(2).mean() + (self.b.weight * 2).abs().sum()


@pytest.mark.parametrize(
    ("build", "x"),
    [(Penalty, MAP), (Merged, MAP), (Temporal, torch.randn(2, 3, 8))],
    ids=["penalty", "merged", "temporal"],
)
def test_kernels_stay_whole(build: type[nn.Module], x: Tensor) -> None:
    model = build()
    _, pruned = check(model, x, exact=None)
    old, new = dict(model.named_parameters()), dict(pruned.named_parameters())
    assert all(new[name].shape[2:] == tensor.shape[2:] for name, tensor in old.items() if tensor.dim() > 2)


def _let_kernels_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in a rule: kernel axes are not said to keep their extent."""
    freeze_dim = Coupler.freeze_dim

    def faulty(self: Coupler, value: Any, dim: int, reason: str, remedy: str = "") -> None:
        if not reason.startswith("kernel axis"):
            freeze_dim(self, value, dim, reason, remedy)

    monkeypatch.setattr(Coupler, "freeze_dim", faulty)


def test_outputs_keep_their_shapes_whatever_a_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the result would have another shape, the units around it are held, and the notes say so."""
    _let_kernels_go(monkeypatch)
    model, x = Penalty().eval(), MAP
    assert any(group.name == "a.weight[2]" for group in fxprune.analyze(model, x).groups)
    plan = fxprune.plan(model, x)
    assert any("has shape" in note for note in plan.notes)
    pruned = plan.apply(model)
    assert [part.shape for part in pruned(x)] == [part.shape for part in model(x)]


def test_apply_refuses_a_plan_that_changes_the_shape_of_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    _let_kernels_go(monkeypatch)
    model, x = Penalty().eval(), MAP
    plan = fxprune.plan(model, x, ratio=0)
    sizes = {group.name: group.size for group in fxprune.analyze(model, x).groups}
    edited = replace(plan, sizes=sizes, removed={"a.weight[2]": [0]})
    with pytest.raises(PlanError, match="has shape"):
        edited.apply(model)
