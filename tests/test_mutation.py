"""Who watches the rules: with any one of them broken, something has to notice.

A broken rule or a missing pass is noticed if planning refuses, if the pipeline's own check holds the node
back, or if :func:`fxprune.verify` raises. What must never happen is a wrong network that nobody objects to.
"""

# The table has one case a line.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import difference
from test_properties import masked_by_value
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.coupling import interpreter, registry
from fxprune.coupling.coupler import Coupler
from fxprune.coupling.rules import pointwise
from fxprune.errors import FxpruneError
from fxprune.passes import base, movements, pipeline

Patch = Callable[[pytest.MonkeyPatch], None]
TOLERANCE = 1e-9


class Network(nn.Module):
    """A convolution or linear layer, what is being tested, and another layer."""

    def __init__(self, body: Callable[..., Tensor], modules: dict[str, nn.Module], tokens: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 12) if tokens else nn.Conv2d(3, 12, 1)
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)
        with torch.no_grad():
            width = body(self, self.first(self.example(tokens))).flatten(1).shape[1]
        self.last = nn.Linear(width, 4)

    @staticmethod
    def example(tokens: bool) -> Tensor:
        return torch.randn(2, 5, 3) if tokens else torch.randn(2, 3, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, self.first(x)).flatten(1))


@dataclass(frozen=True)
class Mutant:
    """One thing broken, and a network that depends on it."""

    name: str
    patch: Patch
    body: Callable[..., Tensor]
    modules: Callable[[], dict[str, nn.Module]] = dict
    tokens: bool = False


def rules(apply: Any, *operators: str) -> Patch:
    """Replace the rule of some operators."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "_FOUND", {})
        for operator in operators:
            name = f"aten.{operator}"
            monkeypatch.setitem(registry._RULES, name, replace(registry._RULES[name], apply=apply))

    return patch


def attribute(owner: Any, name: str, value: Any) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def without(name: str) -> Patch:
    """Leave one pass out of the pipeline."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        rest = tuple(rewriting for rewriting in pipeline.PIPELINE if type(rewriting).__name__ != name)
        assert len(rest) == len(pipeline.PIPELINE) - 1
        monkeypatch.setattr(pipeline, "PIPELINE", rest)

    patch.left_out = name
    return patch


def same_labels(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    """As if the operator were not there."""
    value = c.value(args[0])
    c.materialize(value)
    for result in [out] if isinstance(out, Tensor) else out:
        c.put(result, [value.label(d) for d in range(len(value.shape))][: result.dim()])


def reversed_cat(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    values = [c.value(t) for t in args[0]][::-1]
    c.put(out, c.cat(values, args[1] % out.dim()))


def split_from_zero(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    value = c.value(args[0])
    for part in out:
        c.put(part, c.take(value, args[2], np.arange(part.shape[args[2]])))


def slice_from_zero(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    value = c.value(args[0])
    c.put(out, c.take(value, args[1], np.arange(out.shape[args[1]])))


def interleaved(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    """``repeat`` as if it were ``repeat_interleave``."""
    value = c.value(args[0])
    times = args[1][1]
    c.put(out, c.take(value, 1, np.repeat(np.arange(value.shape[1]), times)))


def unmerged(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    """A pointwise rule that looks at its first operand only."""
    first = next(a for a in args if isinstance(a, Tensor))
    if c.value(first).state is None and first.shape == out.shape:
        same_labels(c, (first,), {}, out)
    else:
        c.put(out, [None] * out.dim())


def uncoupled_norm(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    same_labels(c, args[:1], {}, out[0])


def uncontracted(c: Coupler, args: Any, kwargs: Any, out: Any) -> None:
    """A linear layer whose weight is labelled on the way out, not on the way in."""
    weight, bias = (c.value(t) for t in args[1:3])
    labels, _ = c.unify([(bias, "n"), (weight, "nk")], [*range(out.dim() - 1), "n"])
    c.put(out, labels)


def guessing(self: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Unknown operators are taken for pointwise ones: what the peers do."""
    self.guess = True


def dispatching(original: Any) -> Any:
    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.guess = False
        out = original(self, func, types, args, kwargs)
        if self.guess:
            same_labels(self.coupler, args, kwargs, out)
        return out

    return dispatch


def guess(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = interpreter._Interpreter
    monkeypatch.setattr(cls, "_unknown", guessing)
    monkeypatch.setattr(cls, "__torch_dispatch__", dispatching(cls.__torch_dispatch__))


def unnarrowed(narrowing: Any, take: Any) -> Any:
    """The first so many positions in place of those that survive."""
    label = take.value.label(take.dim)
    return np.arange(int(narrowing.row(label)[take.index].sum()))


class Table(nn.Module):
    """A table that both halves of what it meets pick from."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.linspace(1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(-1, 5, 2, 6) * self.rates.cos()).flatten(2)


def heads(self: Any, x: Tensor) -> Tensor:
    """Attention with everything written out: 3 heads of 4."""
    q, k, v = (layer(x).view(x.shape[0], 5, 3, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 5, 12)


def projections() -> dict[str, nn.Module]:
    return {name: nn.Linear(12, 12) for name in "qkv"}


def scaled(self: Any, x: Tensor) -> Tensor:
    return x * x.shape[-1] ** -0.5


def rotated(self: Any, x: Tensor) -> Tensor:
    return x * torch.arange(12, dtype=x.dtype, device=x.device).cos()


def shuffled(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w).relu()


MUTANTS = [
    Mutant("flip is the identity", rules(same_labels, "flip"), lambda self, x: x.flip(1)),
    Mutant("roll is the identity", rules(same_labels, "roll"), lambda self, x: x.roll(5, 1)),
    Mutant("cat in the wrong order", rules(reversed_cat, "cat"), lambda self, x: torch.cat([x, x[:, :5].relu()], 1)),
    Mutant("split starts at zero", rules(split_from_zero, "split"), lambda self, x: x.split(6, 1)[1]),
    Mutant("slice starts at zero", rules(slice_from_zero, "slice"), lambda self, x: x[:, 4:]),
    Mutant("repeat interleaves", rules(interleaved, "repeat"), lambda self, x: x.repeat(1, 2, 1, 1)),
    Mutant("transpose is the identity", rules(same_labels, "transpose", "permute"),
           lambda self, x: x.permute(0, 2, 3, 1)),
    Mutant("residuals are not coupled", rules(unmerged, "<pointwise>"),
           lambda self, x: x + self.conv(x), lambda: {"conv": nn.Conv2d(12, 12, 1)}),
    Mutant("batch norm is not coupled", rules(uncoupled_norm, "native_batch_norm"),
           lambda self, x: self.norm(x), lambda: {"norm": nn.BatchNorm2d(12)}),
    Mutant("inputs of linear layers are not coupled", rules(uncontracted, "linear"), lambda self, x: x),
    Mutant("rows need not be equally long", attribute(Coupler, "rectangle", lambda self, rows, cells: None),
           heads, projections, tokens=True),
    Mutant("nothing is frozen", attribute(Coupler, "freeze", lambda self, *args: None), lambda self, x: x.relu()),
    Mutant("unknown operators are pointwise", guess, lambda self, x: self.b(self.a(x.masked_scatter(x > 0, x.flip(1)))),
           lambda: {"a": nn.Conv2d(12, 12, 1), "b": nn.Conv2d(12, 4, 1)}),
    Mutant("normalisation is exact", attribute(Coupler, "mark_inexact", lambda self, label, reason: None),
           lambda self, x: self.norm(x), lambda: {"norm": nn.LayerNorm(12)}, tokens=True),
    Mutant("sigmoid(0) is 0", attribute(pointwise, "_KEEPS_ZERO", pointwise._KEEPS_ZERO | {"sigmoid"}),
           lambda self, x: torch.sigmoid(x).sum(1)),
    Mutant("literals stay", without("RewriteLiterals"), lambda self, x: x.view(-1, 12, 16)),
    Mutant("slice bounds stay", without("RewriteLiterals"), lambda self, x: x[:, :9]),
    Mutant("split sizes stay", without("RewriteLiterals"),
           lambda self, x: torch.cat([part.relu() for part in x.split([5, 7], 1)][::-1], 1)),
    Mutant("attention's scale follows the width", without("RewriteLiterals"),
           lambda self, x: F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)), projections, tokens=True),
    Mutant("constants follow the width", without("KeepConstants"), scaled, tokens=True),
    Mutant("computed constants stay", without("NarrowConstants"), rotated, tokens=True),
    Mutant("tables are taken whole", without("PickFromTables"), lambda self, x: self.table(x),
           lambda: {"table": Table()}, tokens=True),
    Mutant("shuffles stay", without("SelectMovements"), shuffled),
    Mutant("rolls stay", without("SelectMovements"), lambda self, x: x.roll(5, 1)),
    Mutant("strided slices stay", without("SelectMovements"), lambda self, x: x[:, 1::3]),
    Mutant("places by size follow their dimension", rules(same_labels, "sort"),
           lambda self, x: (y := self.conv(x)) * y.argsort(1), lambda: {"conv": nn.Conv2d(12, 12, 1)}),
    Mutant("every size is that of a batch of rows", attribute(base.Narrowing, "repeats", lambda self, label: True),
           lambda self, x: F.conv2d(x, self.conv.weight, groups=x.shape[1]),
           lambda: {"conv": nn.Conv2d(12, 12, 1, groups=12)}),
    Mutant("movements pick the wrong survivors", attribute(movements, "_surviving", unnarrowed), shuffled),
    Mutant("modules keep their widths", without("UpdateModules"),
           lambda self, x: self.conv(x), lambda: {"conv": nn.Conv2d(12, 12, 3, groups=12)}),
    Mutant("attention modules keep their scale", without("UpdateModules"),
           lambda self, x: self.attention(x, x, x)[0],
           lambda: {"attention": nn.MultiheadAttention(12, 3, batch_first=True)}, tokens=True),
    Mutant("the first survivors win", attribute(base.Narrowing, "row", lambda self, label: np.arange(
           label.ids.shape[-1]) < self.alive(label).reshape(-1, label.ids.shape[-1]).sum(1).max()),
           lambda self, x: x[:, 5:10]),
]  # fmt: skip


def build(mutant: Mutant) -> tuple[Network, Tensor]:
    model = Network(mutant.body, mutant.modules(), mutant.tokens).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, Network.example(mutant.tokens).double()


def outcome(model: Network, x: Tensor) -> tuple[fxprune.PruningPlan | None, str, bool]:
    """The plan, who objects, and whether the network is wrong (by the oracle that knows no plan)."""
    try:
        plan = fxprune.plan(model, x, ratio=0.5)
        pruned = plan.apply(model)
    except FxpruneError as error:
        return None, f"planning: {error}", False
    frozen = fxprune.analyze(model, x).frozen
    held = [axis for axis in frozen if "does not foresee" in axis.reason]
    if held:  # a later rule failed on what the mutated one left
        return None, f"planning: {held[0]}", False
    try:
        with torch.no_grad():
            got, wanted = pruned(x), masked_by_value(model, pruned)(x)
        wrong = got.shape != wanted.shape or difference(got, wanted) > TOLERANCE
    except (RuntimeError, AssertionError):
        wrong = True
    try:
        verdict = fxprune.verify(model, pruned, plan, x)
    except FxpruneError as error:
        return plan, f"verify: {error}", wrong
    return plan, "" if verdict.exact else "inexact", wrong


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutants_are_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, the network is narrowed and right; with the mutation, somebody objects."""
    model, x = build(mutant)
    sound, objection, wrong = outcome(model, x)
    assert sound is not None
    assert sound.removed
    assert not sound.held
    assert objection in ("", "inexact")
    assert not wrong or objection == "inexact"

    mutant.patch(monkeypatch)
    plan, objection, wrong = outcome(model, x)
    if plan is None or objection.startswith("verify"):
        return
    held = set(plan.held) - set(sound.held)
    assert held or wrong, "the mutation changes nothing"
    assert held or not wrong, "wrong, and nobody objects"


class States(NamedTuple):
    """A result, and what is returned beside it."""

    last: Tensor
    first: Tensor


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> States:
        y = self.first(x)
        y = y + self.middle(y).relu()
        return States(self.last(y), y)


WITHOUT_FILLING = without("FillOutputs")


def test_outputs_that_are_not_filled_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Hidden().eval(), torch.randn(2, 3)
    assert not fxprune.plan(model, x).held
    WITHOUT_FILLING(monkeypatch)
    assert fxprune.plan(model, x).held


def test_every_pass_has_a_mutant() -> None:
    """A pass that nobody misses is not needed, or not tested."""
    patches = [*(mutant.patch for mutant in MUTANTS), WITHOUT_FILLING]
    left_out = {patch.left_out for patch in patches if hasattr(patch, "left_out")}
    assert left_out == {type(rewriting).__name__ for rewriting in pipeline.PIPELINE}


def test_what_is_given_inserted_numbers_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass computes the groups of a convolution anew, and wrongly: planning notices, without ``verify``."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "every size is that of a batch of rows")
    mutant.patch(monkeypatch)
    model, x = build(mutant)
    pruned = fxprune.prune(model, x, ratio=0.5)
    assert pruned(x).shape == model(x).shape
    assert "conv2d" in pruned.meta["fxprune"].held


def test_a_check_that_never_agrees_leaves_all_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """More and more is held, in the end everything; a network of which nothing is removed is right."""
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.randn(2, 3)
    violation = pipeline.Violation("_1", "never")
    monkeypatch.setattr(pipeline, "check", lambda program, narrowing: [violation])
    pruned = fxprune.prune(model, x, ratio=0.5)
    torch.testing.assert_close(pruned(x), model(x))
    plan = pruned.meta["fxprune"]
    assert not any(plan.removed.values())
    assert sum("held node" in note and "never" in note for note in plan.notes) == 1
