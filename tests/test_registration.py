"""Rules for operators and modules of other libraries: what they may say, and what becomes of wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import check, compare
from torch import Tensor, library, nn

import fxprune
from fxprune.api import graph_for
from fxprune.errors import CaptureError, RuleError

TESTS = library.Library("fxtest", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any]) -> None:
    """An operator with a kernel for all devices, and without a gradient."""
    TESTS.define(schema)
    TESTS.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")


define("half_relu(Tensor x) -> Tensor", lambda x: x.relu() / 2)
define("project(Tensor x, Tensor w) -> Tensor", lambda x, w: x @ w)


@library.custom_op("fxtest::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x * weight + bias`` along the last axis."""
    return x * weight if bias is None else x * weight + bias


@scale.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.biased = len(inputs) > 2 and inputs[2] is not None


def _backward(ctx: Any, g: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    dims = tuple(range(g.dim() - 1))
    return g * weight, (g * x).sum(dims), g.sum(dims) if ctx.biased else None


scale.register_autograd(_backward, setup_context=_setup)


@library.custom_op("fxtest::roll", mutates_args=())
def roll(x: Tensor) -> Tensor:
    """Mixes positions, and no shape shows it."""
    return x.roll(1, -1)


roll.register_fake(torch.empty_like)


@library.custom_op("fxtest::sized", mutates_args=())
def sized(x: Tensor, width: int) -> Tensor:
    """Has to be told the width."""
    return x[..., :width] * 2


@sized.register_fake
def _(x: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


@library.custom_op("fxtest::silent", mutates_args=())
def silent(x: Tensor) -> Tensor:
    """Has no fake kernel."""
    return x * 2


@library.custom_op("fxtest::joined", mutates_args=())
def joined(xs: list[Tensor]) -> Tensor:
    """Takes a list."""
    return torch.cat(xs)


joined.register_fake(torch.cat)
ops = torch.ops.fxtest


class Between(nn.Module):
    """``first -> body -> last``, with a vector for the body."""

    def __init__(self, body: Callable[..., Tensor] | nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.weight = nn.Parameter(torch.rand(8))
        self.last = nn.Linear(8, 2)
        self.whole = isinstance(body, nn.Module)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.body(x) if self.whole else self.body(x, self.weight))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No registration outlives its test."""
    yield
    for operator in (scale, roll, sized, silent):
        fxprune.unregister(operator)
    for kind in (Affine, Remembering, Opaque):
        fxprune.unregister(kind)


X = torch.randn(4, 3)


# -- operators --------------------------------------------------------------------------------------


def test_without_a_rule_frozen_and_told_how_to_register() -> None:
    """An unknown operator freezes what it touches; the remedy names the operator."""
    model = Between(lambda x, w: scale(x, w))
    entry = next(f for f in fxprune.analyze(model, X).frozen if str(f.axis) == "first.weight[0]")
    assert entry.reason == "used by fxtest.scale.default, an operator without a rule"
    assert "fxprune.register_rule(fxtest.scale.default" in entry.remedy


def by_function(c: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A rule in the coupler's own words."""
    x, weight = (c.value(t) for t in args[:2])
    names = list(range(len(x.shape)))
    labels, _ = c.unify([(x, names), (weight, names[-1:])], names, any)
    c.put(out, labels)


@pytest.mark.parametrize(
    ("operator", "how"),
    [
        (ops.scale, "... d, d, d -> ... d"),
        (ops.scale.default, "n d,d,d->n d"),
        (scale, "pointwise"),
        ("fxtest::scale", by_function),
        ("fxtest::scale.default", "... d, d, d -> ... d"),
    ],
)
def test_forms_of_a_rule(operator: Any, how: Any) -> None:
    """Each way to name an operator and to say how it couples narrows what is around it, exactly."""
    with fxprune.register_rule(operator, how):
        model = Between(lambda x, w: scale(x, w))
        check(model, X, narrows=["first.weight", "first.bias", "weight", "last.weight"], exact=True)
    assert not fxprune.analyze(model, X).groups


def test_optional_tensors_and_keywords() -> None:
    """A tensor argument that is None, or given by its name."""
    with fxprune.register_rule(scale, "... d, d, d -> ... d"):
        check(Between(lambda x, w: scale(x, weight=w, bias=w)), X, narrows=["weight"])
        check(Between(lambda x, w: ops.scale(x, w, None)), X, narrows=["weight"])


def test_rule_of_another_operator_keeps_its_zeros() -> None:
    """As ``relu`` means all of its rule: of zero it is zero, so that a sum behind it stays exact."""
    model = Between(lambda x, w: x + ops.half_relu(x).sum(-1, keepdim=True))
    with fxprune.register_rule(ops.half_relu, torch.ops.aten.relu.default):
        assert fxprune.analyze(model, X).groups[0].exact
        pruned = fxprune.prune(model, X)
        assert fxprune.verify(model, pruned, pruned.meta["fxprune"], X).exact
    with fxprune.register_rule(ops.half_relu, "pointwise"):
        assert not fxprune.analyze(model, X).groups[0].exact


def test_marks() -> None:
    """``[d]`` keeps an axis, ``~d`` makes the group inexact, a name that is gone is summed over."""
    model = Between(lambda x, w: scale(x, w))
    with fxprune.register_rule(scale, "... [d], d, d -> ... d"):
        graph = fxprune.analyze(model, X)
        assert not graph.groups
        assert any("mixes the entries along 'd'" in f.reason for f in graph.frozen)
    with fxprune.register_rule(scale, "... ~d, d, d -> ... d"):
        (group,) = fxprune.analyze(model, X).groups
        assert "normalised over this axis by fxtest.scale" in group.inexact_because
    square = Between(lambda x, w: ops.project(x, torch.outer(w, w)))
    with fxprune.register_rule(ops.project, "... i, i o -> ... o"):
        pruned = fxprune.prune(square, X)
        assert pruned.weight.shape == (4,)
        assert fxprune.verify(square, pruned, pruned.meta["fxprune"], X).exact


def test_registered_twice() -> None:
    """The same again is nothing new; something else is refused, and names both places."""
    first = fxprune.register_rule(scale, "... d, d, d -> ... d")
    fxprune.register_rule(ops.scale.default, "... d, d, d -> ... d")
    with pytest.raises(RuleError, match=r"two rules: .*test_registration.*test_registration.*unregister"):
        fxprune.register_rule(scale, "pointwise")
    first.remove()
    first.remove()
    fxprune.register_rule(scale, "pointwise")
    with pytest.raises(RuleError, match=r"aten.mm has two rules: .*contraction"):
        fxprune.register_rule(torch.ops.aten.mm, "i j, j k -> i k")
    fxprune.unregister(torch.ops.aten.mm)  # ours are not undone
    assert fxprune.analyze(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.rand(1, 2)).groups


@pytest.mark.parametrize(
    ("operator", "how", "message"),
    [
        (scale, "... d, d, d", "has no '->'"),
        (scale, "... d, d -> ... d", r"2 terms for the 3 tensor arguments of fxtest.scale.default"),
        (scale, "... d, d, d -> ... d, d", r"2 terms for the 1 tensor results"),
        (scale, "n d d, d, d -> n d", "'d' twice in one term"),
        (scale, "n {d}, d, d -> n d", r"'\{d\}' for the name of a dimension"),
        (scale, "n d, d, d -> ... d", r"'\.\.\.' on the right side only"),
        (scale, "x: n d, d, d -> n d", "go by their order"),
        (joined, "n -> n", "lists of tensors; write a function"),
        (scale, 3, "is an equation such as"),
        (scale, lambda c: None, r"called as \(coupler, args, kwargs, out\)"),
        (scale, torch.ops.aten.fft_fft.default, "which has none"),
        ("fxtest::missing", "pointwise", "no operator 'fxtest::missing'"),
        ("nothing", "pointwise", "no operator 'nothing'"),
        (torch.nn.functional.relu, "pointwise", "is traced into"),
    ],
)
def test_bad_registrations(operator: Any, how: Any, message: str) -> None:
    """What cannot be a rule is refused at once."""
    with pytest.raises(RuleError, match=message):
        fxprune.register_rule(operator, how)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("d, d, d -> d", "has the term 'd' for a tensor with 2 dimensions"),
        ("d n, d, d -> d n", r"gives 'd' the sizes 4 and 8"),
        ("n d, d, d -> d n", r"gives 'd' the size 8, but the result has 4"),
    ],
)
def test_equations_that_do_not_fit_the_tensors(equation: str, message: str) -> None:
    """What the shapes contradict is found when the operator is met, and named."""
    with fxprune.register_rule(scale, equation), pytest.raises(RuleError, match=message):
        fxprune.analyze(Between(lambda x, w: scale(x, w)), X)


def test_no_fake_kernel() -> None:
    """Says which operator lacks one, and what to do."""
    model = Between(lambda x, w: silent(x))
    with pytest.raises(CaptureError, match=r"fxtest.silent.default .* no fake kernel.*register_fake"):
        fxprune.analyze(model, X)


def test_a_rule_that_lies_about_sizes_is_caught() -> None:
    """The rehearsal on the narrowed shapes finds that the operator does not do what its rule says."""
    with fxprune.register_rule(sized, "pointwise"):
        model = Between(lambda x, w: sized(x, 8))
        plan = fxprune.plan(model, X)
        assert not any(plan.removed.values())
        assert any("held node" in note for note in plan.notes)
        assert plan.apply(model)(X).shape == (4, 2)


def test_a_lie_that_no_shape_shows_is_found_by_verify() -> None:
    """A rule can be wrong in ways that only the values tell."""
    with fxprune.register_rule(roll, "pointwise"):
        model = Between(lambda x, w: roll(x))
        pruned = fxprune.prune(model, X)
        with pytest.raises(fxprune.VerificationError):
            fxprune.verify(model, pruned, pruned.meta["fxprune"], X)


# -- modules ----------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A module that remembers its width, and checks it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.rand(width))
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if int(x.shape[-1]) != self.width:
            raise ValueError("another width")
        return x * self.weight


class Remembering(Affine):
    """A subclass."""


class Opaque(Affine):
    """Does something that shapes alone cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return silent(x) * self.weight


def by_module(c: Any, module: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Inputs and parameters alike have labels."""
    x, weight = c.value(args[0]), c.value(module.weight)
    labels, _ = c.unify([(x, "nd"), (weight, "d")], "nd", any)
    c.put(out, labels)


@pytest.mark.parametrize(
    "how", [None, "n d, weight: d, bias: d -> n d", by_module], ids=["followed", "equation", "function"]
)
@pytest.mark.parametrize("kind", [Affine, Remembering])
def test_forms_of_a_module(kind: type[nn.Module], how: Any) -> None:
    """The module stays whole, narrows with its neighbours, and its attribute follows."""
    with fxprune.register_module(Affine, how, {"width": "weight[0]"}):
        _, pruned = check(Between(kind()), X, narrows=["first.weight", "body.weight"], exact=True)
        assert type(pruned.body) is kind
        assert pruned.body.width == 4


def test_attributes_by_function_and_by_ends() -> None:
    """Axes of the input and the output, and a function of all shapes."""
    seen = []

    def attributes(module: Any, shapes: Any, inputs: Any, outputs: Any) -> dict[str, Any]:
        seen.append((dict(shapes), inputs, outputs))
        return {"width": shapes["weight"][0]}

    for given in ({"width": "input[1]"}, {"width": "output[-1]"}, attributes):
        with fxprune.register_module(Affine, attributes=given):
            assert fxprune.prune(Between(Affine()), X).body.width == 4
    assert ({"weight": (4,)}, (4, 4), (4, 4)) in seen


def test_a_forgotten_attribute_is_caught() -> None:
    """The module refuses its narrowed input in the rehearsal, so that it is left alone."""
    with fxprune.register_module(Affine):
        plan = fxprune.plan(Between(Affine()), X)
        assert not any(plan.removed.values())
        assert any("held node body" in note for note in plan.notes)


def test_opaque_module() -> None:
    """Where forward does not run on shapes, the sizes come from the equation; without one it is an error."""
    model = Between(Opaque())
    with fxprune.register_module(Opaque, "n d, weight: d -> n d", {"width": "weight[0]"}):
        plan = fxprune.plan(model, X)
        pruned = plan.apply(model)
        assert pruned.body.width == 4
        compare(model, graph_for(plan, model), plan, pruned, X)
    with fxprune.register_module(Opaque), pytest.raises(CaptureError, match="no fake kernel"):
        fxprune.plan(model, X)
    with fxprune.register_module(Opaque, "n d, weight: d -> n e"), pytest.raises(RuleError, match="'e' open"):
        fxprune.plan(model, X)


def test_unregistered_again() -> None:
    """Outside of the block the module is traced into as before."""
    model = Between(Affine())
    with fxprune.register_module(Affine, attributes={"width": "weight[0]"}):
        assert fxprune.analyze(model, X).captured.program.modules.keys() >= {"body"}
    assert "body" not in fxprune.analyze(model, X).captured.program.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Affine(),), "takes a subclass"),
        ((Affine, 3), "function .coupler, module, args, kwargs, out."),
        ((Affine, "weight: d -> d"), "no term for an input"),
        ((Affine, None, {"width": "weight"}), "follows an axis such as"),
        ((Affine, None, ["width"]), "are a dict such as"),
    ],
)
def test_bad_module_registrations(arguments: Any, message: str) -> None:
    """What cannot be a registration is refused at once."""
    with pytest.raises(RuleError, match=message):
        fxprune.register_module(*arguments)


@pytest.mark.parametrize(
    ("how", "attributes", "message"),
    [
        ("n d, scale: d -> n d", None, "names 'scale', which is no tensor of the module"),
        ("n d, n d -> n d", None, "more terms without a name than there are tensor inputs"),
        (None, {"breadth": "weight[0]"}, "has no attribute 'breadth'"),
        (None, {"width": "gain[0]"}, "has no tensor 'gain'"),
        (None, {"width": "weight[1]"}, r"no weight\[1\]"),
    ],
)
def test_module_registrations_that_do_not_fit(how: Any, attributes: Any, message: str) -> None:
    """What the module contradicts is found when it is met."""
    with fxprune.register_module(Affine, how, attributes), pytest.raises(RuleError, match=message):
        fxprune.plan(Between(Affine()), X)


def test_a_module_registered_twice() -> None:
    """As for operators."""
    fxprune.register_module(Affine, by_module, {"width": "weight[0]"})
    fxprune.register_module(Affine, by_module, {"width": "weight[0]"})
    with pytest.raises(RuleError, match="Affine is registered twice, differently"):
        fxprune.register_module(Affine)
