"""Roles: which nodes make the channels of an axis, which read them, and where what they read can be seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.coupling.roles import Use


def uses(model: nn.Module, inputs: Any) -> dict[str, list[tuple[Any, ...]]]:
    """By axis the uses of the members of all groups: role, node, which node is read, its dimensions."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for group in fxprune.analyze(model.eval(), inputs):
        for member in group.members:
            found[str(member.axis)] = [
                (use.role, use.at, use.input.name if use.input is not None else None, use.dims)
                for use in member.uses
            ]
    return found


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu())
        return self.fc(self.up(self.grouped(x)).flatten(1))


def test_convolutions_of_every_kind() -> None:
    model = Convolutions()
    assert uses(model, torch.randn(2, 3, 1, 1)) == {
        "stem.weight[0]": [("produces", "stem", None, ())],
        **{f"norm.{name}[0]": [] for name in ("weight", "bias", "running_mean", "running_var")},
        **{f"{name}.bias[0]": [] for name in ("stem", "depthwise", "grouped", "up")},
        "depthwise.weight[0]": [
            ("produces", "depthwise", None, ()),
            ("consumes", "depthwise", "relu", (1,)),
        ],
        "grouped.weight[1]": [("consumes", "grouped", "depthwise", (1,))],
        "grouped.weight[0]": [("produces", "grouped", None, ())],
        "up.weight[0]": [("consumes", "up", "grouped", (1,))],
        "up.weight[1]": [("produces", "up", None, ())],
        "fc.weight[1]": [("consumes", "fc", "flatten", (1,))],
    }
    group = next(iter(fxprune.analyze(model, torch.randn(2, 3, 1, 1))))
    assert [str(m.axis) for m in group.producers] == ["stem.weight[0]", "depthwise.weight[0]"]
    assert [str(m.axis) for m in group.consumers] == ["depthwise.weight[0]", "grouped.weight[1]"]
    assert next(m for m in group.members if m.axis.name == "norm.weight").roles == {"follows"}
    (made,) = group.producers[0].producing
    assert "test_roles.py" in made.source
    assert str(made).startswith("produces at stem (")


class Functions(nn.Module):
    """The same products as functions, on parameters that are transposed, flattened, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(6, 7))
        self.c = nn.Parameter(torch.randn(5, 7))
        self.d = nn.Parameter(torch.randn(3, 5))
        self.kernel = nn.Parameter(torch.randn(2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, weight=self.a)
        x = x @ self.b
        x = torch.einsum("nc,oc->no", x, self.c)
        x = torch.matmul(self.d, x.t())
        return F.conv1d(x[None], self.kernel)


def test_functions() -> None:
    assert uses(Functions(), torch.randn(2, 4)) == {
        "a[0]": [("produces", "linear", None, ())],
        "b[0]": [("consumes", "matmul", "linear", (1,))],
        "b[1]": [("produces", "matmul", None, ())],
        "c[1]": [("consumes", "einsum", "matmul", (1,))],
        "c[0]": [("produces", "einsum", None, ())],
        "d[1]": [("consumes", "matmul_1", "t", (0,))],
        "d[0]": [("produces", "matmul_1", None, ())],
        "kernel[1]": [("consumes", "conv1d", "getitem", (1,))],
    }


class Reader(nn.Module):
    """Attention with other keys than queries, a recurrent layer, a classifier tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.query, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 8)
        self.classify = nn.Linear(8, 11, bias=False)
        self.classify.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        h = h + self.attention(self.query(h), h, h)[0]
        return self.classify(self.out(self.lstm(h)[0]))


def test_attention_recurrence_and_tied_weights() -> None:
    model = Reader()
    found = uses(model, torch.randint(0, 11, (2, 5)))
    assert found["embed.weight[1]"] == [
        ("produces", "embed", None, ()),
        ("consumes", "classify", "out", (2,)),
    ]
    assert found["place[2]"] == []
    assert found["attention.in_proj_weight[1]"] == [
        ("consumes", "attention", "query", (2,)),
        ("consumes", "attention", "add", (2,)),
    ]
    assert found["attention.out_proj.weight[1]"] == [("consumes", "attention", None, ())]
    assert found["attention.out_proj.weight[0]"] == [("produces", "attention", None, ())]
    assert found["lstm.weight_ih_l0[1]"] == [("consumes", "lstm", "add_1", (2,))]
    assert found["lstm.weight_hh_l0[1]"] == [("consumes", "lstm", None, ())]
    assert found["lstm.weight_hh_l0[0]"] == [("produces", "lstm", None, ())]
    assert found["lstm.bias_hh_l0[0]"] == []
    graph = fxprune.analyze(model, torch.randint(0, 11, (2, 5)))
    packed = next(m for g in graph for m in g.consumers if m.axis.name == "attention.in_proj_weight")
    regions = [use.region for use in packed.consuming]
    assert regions == [(slice(0, 8), slice(0, 8)), (slice(8, 24), slice(0, 8))]
    assert [use.argument for use in packed.consuming] == [(0,), (1,)]


def test_names_mean_what_a_layer_puts_out_also_of_tied_weights() -> None:
    """The embedding makes the channels that the classifier reads, by the same axis of the same tensor."""
    plan = fxprune.plan(Reader().eval(), torch.randint(0, 11, (2, 5)), ratio=0.5, keep="embed")
    assert "place[2]" not in plan.removed
    with pytest.raises(fxprune.FxpruneError, match="classify"):
        fxprune.plan(Reader().eval(), torch.randint(0, 11, (2, 5)), ratios={"classify": 0.5})


class Computed(nn.Module):
    """Weights that are computed: normalised, scaled, the sum of a matrix and a product of thin ones."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.base, self.scale = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 1))
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))
        self.pair, self.fc = nn.Bilinear(5, 5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.normed(x).relu(), (self.base + self.up @ self.down) * self.scale)
        return self.fc(self.pair(x, x))


def test_weights_that_are_computed() -> None:
    found = uses(Computed(), torch.randn(2, 4))
    assert found["normed.parametrizations.weight.original1[0]"] == [("produces", "normed", None, ())]
    assert found["normed.parametrizations.weight.original0[0]"] == []
    assert found["base[0]"] == found["up[0]"] == [("produces", "linear", None, ())]
    assert found["base[1]"] == found["down[1]"] == [("consumes", "linear", "relu", (1,))]
    assert found["down[0]"] == found["up[1]"] == found["scale[0]"] == []
    assert found["pair.weight[1]"] == [("consumes", "pair", "linear", (1,))]
    assert found["fc.weight[1]"] == [("consumes", "fc", "pair", (1,))]


class Values(fx.Interpreter):
    """Keeps what every node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def rows(use: Use, value: Tensor) -> Tensor:
    """What a use reads as ``(positions, channels)``."""
    others = [d for d in range(value.dim()) if d not in use.dims]
    return value.permute(*others, *use.dims).reshape(-1, math.prod(value.shape[d] for d in use.dims))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 2), nn.Linear(16, 6)
        self.w, self.out = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.conv(x).flatten(1)).relu()
        return self.out(torch.einsum("nc,co->no", x, self.w))


def test_what_consumers_read_can_be_observed() -> None:
    """Times the weight, what ``use.input`` gives is what ``use.node`` gives: the recipe for compensation."""
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 3, 3)
    graph = fxprune.analyze(model, x)
    seen = Values(graph.captured.program.module())
    seen.run(x)
    checked = set()
    for group in graph:
        for member in group.consumers:
            for use in member.consuming:
                assert use.input is not None
                read = rows(use, seen.values[use.input.name])
                assert read.shape[1] == member.tensor.shape[member.axis.dim]
                weight = member.tensor.movedim(member.axis.dim, 0).flatten(1)
                bias = getattr(getattr(model, use.module, None), "bias", 0.0)
                assert torch.allclose(read @ weight + bias, rows_out(seen.values[use.at]), atol=1e-5)
                checked.add(str(member.axis))
    assert checked == {"fc.weight[1]", "w[0]", "out.weight[1]"}


def rows_out(value: Tensor) -> Tensor:
    return value.movedim(1, -1).reshape(-1, value.shape[1])
