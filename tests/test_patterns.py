"""Every network in ``patterns/``, judged by the oracle, and what needs more than one look."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import check
from patterns import CASES
from patterns.cases import IMAGE, VECTOR, conv, parameter, random
from torch import Tensor, nn

import fxprune
from fxprune import capture
from fxprune.nn import TrainingFlag


@pytest.fixture(autouse=True)
def _nothing_left_in_the_tracer() -> Iterator[None]:
    """No generated code has told ``torch.fx`` to wrap a dotted name: that breaks every later trace."""
    from torch.fx import _symbolic_trace

    table = _symbolic_trace._wrapped_fns_to_patch
    before = dict(table)
    yield
    added = [key for key in table if key not in before and "." in key[1]]
    for key in added:
        del table[key]
    assert not added, added


class Caching(nn.Module):
    """Keeps what it computed, as attention biases of several libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.bias = parameter(12, 3)
        self.cache: dict[str, Tensor] = {}
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.bias[:, torch.tensor([1])].squeeze(1)
        self.calls.append(1)
        self.last = x
        return self.b(self.a(x) + self.cache[key])


def test_caches_do_not_remember_the_tracing() -> None:
    """What a forward writes to its module while it is traced is gone afterwards, so that it traces again."""
    model = Caching()
    for _ in range(2):
        check(model, VECTOR, narrows=["a.weight", "bias", "b.weight"])
        model.eval()
        with torch.no_grad():
            model(VECTOR)
        assert list(model.cache) == ["cpu"]
        assert all(type(kept) is Tensor for kept in model.cache.values())
        model.cache.clear()


@pytest.mark.parametrize("name", CASES)
def test_pattern(name: str) -> None:
    """Narrowed where it can be, frozen where it must be, and never wrong."""
    example = CASES[name]
    check(example.build(), example.inputs, narrows=example.narrows, **example.expected)


@pytest.mark.parametrize(
    "name",
    [
        "grouped_conv_that_widens",
        "unbind_of_fused_qkv",
        "channel_shuffle_by_sizes",
        "pixel_shuffle_module",
        "gate_by_chunk",
        "c2f_block",
    ],
)
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.75, 0.99])
def test_ratios(name: str, ratio: float) -> None:
    """Other ratios, down to one unit a row."""
    example = CASES[name]
    check(example.build(), example.inputs, ratio=ratio, **example.expected)


class Attention(nn.Module):
    """An attention layer between two linear ones that must not disturb it."""

    def __init__(self, kind: str, extras: str, batch_first: bool, weights: str) -> None:
        super().__init__()
        widths = {"kdim": 10, "vdim": 14} if kind == "other widths" else {}
        options = {"bias": False} if extras == "float mask" else {}
        if extras == "appended":
            options = {"add_bias_kv": True, "add_zero_attn": True}
        self.attend = nn.MultiheadAttention(12, 2, batch_first=batch_first, **widths, **options)
        self.before, self.after = nn.Linear(6, 12), nn.Linear(12, 4)
        self.key, self.value = (nn.Linear(6, widths.get(side, 12)) for side in ("kdim", "vdim"))
        self.kind, self.weights = kind, weights

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Any:
        x = self.before(x)
        k, v = (x, x) if self.kind == "self" else (self.key(y), self.value(y))
        need = {"none": {"need_weights": False}, "mean": {}, "each": {"average_attn_weights": False}}[
            self.weights
        ]
        x, weights = self.attend(x, k, v, attn_mask=mask, key_padding_mask=padding, **need)
        return self.after(x), weights


@pytest.mark.parametrize(
    ("kind", "extras", "batch_first", "weights"),
    list(
        itertools.product(
            ["self", "cross", "other widths"],
            ["plain", "appended", "bool masks", "float mask"],
            [True, False],
            ["none", "mean", "each"],
        )
    ),
)
def test_multihead_attention(kind: str, extras: str, batch_first: bool, weights: str) -> None:
    """Every way to call ``nn.MultiheadAttention``."""
    net = Attention(kind, extras, batch_first, weights)
    queries, keys = 5, 5 if kind == "self" else 7
    inputs = {"x": random(2, queries, 6), "y": random(2, keys, 6)}
    if not batch_first:
        inputs = {name: x.transpose(0, 1).contiguous() for name, x in inputs.items()}
    if extras == "bool masks":
        inputs["mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(2)
        inputs["padding"] = torch.arange(keys)[None] >= torch.tensor([[keys], [keys - 1]])
    elif extras == "float mask":
        inputs["mask"] = random(2 * 2, queries, keys)
    packed = kind != "other widths"
    names = ["attend.in_proj_weight"] if packed else [f"attend.{side}_proj_weight" for side in "qkv"]
    names += ["attend.out_proj.weight", "before.weight", "after.weight"]
    names += ["attend.bias_k", "attend.bias_v"] if extras == "appended" else []
    check(net, inputs, narrows=names, exact=True, batch_dim=None)


def test_unbatched_attention() -> None:
    """``nn.MultiheadAttention`` on two dimensions."""
    net = Attention("cross", "plain", True, "mean")
    check(net, (random(5, 6), random(7, 6)), narrows=["attend.in_proj_weight"], exact=True, batch_dim=None)


@pytest.mark.parametrize(("name", "module"), [("drop_path", "drop"), ("dropout_module_and_function", "drop")])
def test_training_flag_is_obeyed(name: str, module: str) -> None:
    """Dropout, as a module or by ``self.training``, follows ``train()`` and ``eval()`` of the result."""
    example = CASES[name]
    model = example.build()
    pruned = fxprune.prune(model, example.inputs, ratio=0.5)
    flags = [m for m in pruned.modules() if isinstance(m, (TrainingFlag, nn.Dropout))]
    assert flags or name == "drop_path"
    pruned.eval()
    assert torch.equal(pruned(example.inputs), pruned(example.inputs))
    pruned.train()
    samples = [pruned(example.inputs) for _ in range(8)]
    assert any(not torch.equal(samples[0], other) for other in samples[1:])


def test_drop_path_captured_in_eval_mode_is_reported() -> None:
    """A branch on ``self.training`` is either kept dynamic or mentioned in the report."""
    example = CASES["drop_path"]
    pruned = fxprune.prune(example.build().eval(), example.inputs, ratio=0.5).train()
    samples = [pruned(example.inputs) for _ in range(8)]
    dynamic = any(not torch.equal(samples[0], other) for other in samples[1:])
    report = fxprune.analyze(example.build().eval(), example.inputs).captured.report
    assert dynamic or "training" in report


def test_tracing_sees_types_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control flow on them is that of the model itself, though nothing but shapes is computed."""
    rung = "symbolic tracing with known shapes"
    monkeypatch.setattr(capture, "RUNGS", {rung: capture.RUNGS[rung]})
    example = CASES["type_and_device_of_what_is_traced"]
    check(example.build(), example.inputs, narrows=["a.weight", "b.weight"])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("keyword")])
def test_keywords_need_no_other_rung(name: str) -> None:
    example = CASES[name]
    assert fxprune.analyze(example.build(), example.inputs).captured.rung.startswith("symbolic tracing")


def test_layer_in_a_plain_list_is_named() -> None:
    """Its weights are in no state dict; the report says what to do about it."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.between = conv(3, 8), conv(8, 4), [conv(8, 8)]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.between[0](self.a(x)))

    graph = fxprune.analyze(Listed(), IMAGE)
    assert "calls a Conv2d that is no submodule of Listed" in graph.captured.report
    assert "nn.ModuleList" in graph.captured.report


def test_unknown_operator_is_named() -> None:
    """The report of frozen axes names the operator, the source line and the way out."""
    example = CASES["unknown_operator"]
    (entry,) = [
        f for f in fxprune.analyze(example.build(), example.inputs).frozen if str(f.axis) == "a.weight[0]"
    ]
    assert "fxprune_tests.mystery" in entry.reason
    assert "functions.py" in entry.source
    assert "register_rule" in entry.remedy


def test_rows_choose_their_own_columns() -> None:
    """Heads lose equally many units, not the same ones."""
    example = CASES["attention_with_implied_scale"]
    model = example.build()
    with torch.no_grad():
        for head in range(4):  # in each head, other rows are small
            weak = [6 * head + (head + i) % 6 for i in range(3)]
            model.v.weight[weak] *= 1e-3
            model.v.bias[weak] *= 1e-3
            model.o.weight[:, weak] *= 1e-3
    plan = fxprune.plan(model, example.inputs, ratio=0.5)
    (group,) = [
        g for g in fxprune.analyze(model, example.inputs) if any(m.axis.name == "v.weight" for m in g.members)
    ]
    (member,) = [m for m in group.members if str(m.axis) == "v.weight[0]"]
    removed = [row for row in range(24) if member.units[row] in plan.removed[group.name]]
    assert removed == sorted(6 * head + (head + i) % 6 for head in range(4) for i in range(3))


class GroupScaled(nn.Module):
    """Divides by written-out statistics of two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.v, self.b = conv(3, 8), parameter(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        y = x.reshape(n, 2, c // 2, h, w)
        std = y.var(dim=(2, 3, 4), keepdim=True).add(1e-3).sqrt().expand(y.shape).reshape(n, c, h, w)
        return self.b(x * (x * self.v.view(1, -1, 1, 1)).sigmoid() / std)


def test_one_group_of_two_is_left() -> None:
    """Its channels are one unit, and are followed nevertheless when the result is checked."""
    plan = fxprune.plan(GroupScaled().eval(), IMAGE, ratio=0.5)
    assert not plan.notes
    assert [len(units) for units in plan.removed.values()] == [1]
