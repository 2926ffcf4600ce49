"""Bad input: each mistake is an error of a named class that says what, where, why and what to do next."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import snapshot, stir
from torch import Tensor, nn

import fxprune
from fxprune import FxpruneError, PruningPlan
from fxprune.errors import (
    CaptureError,
    ExampleInputsError,
    ImportanceError,
    PlanError,
    RatioError,
    VerificationError,
)

IMAGE = torch.zeros(2, 3, 8, 8)


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Attention(nn.Module):
    """Heads that must stay equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 6).permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(n, t, c))


class Branches(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = x * 2
        return self.b(x)


class Reads(Branches):
    """Reads a value off a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * x.max().item())


class Leaves(Branches):
    """Goes through numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.from_numpy(self.a(x).detach().numpy()))


class Twins(nn.Module):
    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return image.mean() + vector


def says(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    """The message holds all of these, and no addresses of objects."""
    text = str(error.value)
    for part in parts:
        assert part.lower() in text.lower(), f"{part!r} is missing in: {text}"
    assert "object at 0x" not in text


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Branches(), Leaves()], ids=["branch", "numpy"])
def test_untraceable_model(model: nn.Module) -> None:
    """The error names the model, the user's line, the reason and what to try."""
    before = snapshot(model)
    with pytest.raises(FxpruneError) as error:
        fxprune.prune(model, torch.zeros(4, 6))
    assert isinstance(error.value, CaptureError)
    says(error, "test_errors.py:", "forward", "next:")
    assert snapshot(model) == before


def test_a_value_that_is_read_off_stays_in_the_graph() -> None:
    """The number is read at every call, not once."""
    model, x = Reads().eval(), torch.randn(4, 6)
    result = fxprune.prune(model, torch.zeros(4, 6), ratio=0.0)
    torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize("model", [None, "resnet18", net, torch.zeros(3), {}], ids=lambda m: type(m).__name__)
def test_what_is_no_module(model: Any) -> None:
    """Something else in place of a model."""
    with pytest.raises(CaptureError) as error:
        fxprune.analyze(model, IMAGE)
    says(error, "torch.nn.Module", type(model).__name__)


def test_uninitialised_model() -> None:
    """Lazy layers have no widths before their first call."""
    with pytest.raises(FxpruneError) as error:
        fxprune.prune(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(2, 6))
    says(error, "0.weight", "uninitialized")


def test_graph_modules_are_models_too() -> None:
    """A pruned network can be pruned again, by a plan of its own."""
    once = fxprune.prune(net(16), IMAGE, ratio=0.5)
    twice = fxprune.prune(once, IMAGE, ratio=0.5)
    assert twice.get_parameter("0.weight").shape == (4, 3, 3, 3)
    assert list(twice.state_dict()) == list(net().state_dict())
    assert twice.eval()(IMAGE).shape == (2, 5)
    fxprune.verify(once, twice, twice.meta["fxprune"], torch.randn(2, 3, 8, 8))
    traced = torch.fx.symbolic_trace(net())
    assert fxprune.prune(traced, IMAGE).get_parameter("0.weight").shape == (4, 3, 3, 3)


# -- example inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        (torch.zeros(2, 3), ["0", "conv", "example inputs"]),
        (torch.zeros(2, 3, 8, 8, 8), ["0", "conv", "example inputs"]),
        (torch.zeros(2, 4, 8, 8), ["0", "4", "example inputs"]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.long), ["dtype", "example inputs"]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), ["dtype", "example inputs"]),
        ((), ["input", "forward"]),
        ((IMAGE, IMAGE), ["forward", "positional"]),
        ({"image": IMAGE}, ["input", "forward"]),
        ({0: IMAGE}, ["keyword", "wrap"]),
        ([IMAGE], ["list", "wrap"]),
        (None, ["NoneType", "tensor"]),
        (8, ["int", "tensor"]),
        ("image", ["str", "tensor"]),
    ],
    ids=[
        "rank 2",
        "rank 5",
        "channels",
        "long",
        "double",
        "missing",
        "too many",
        "unknown name",
        "no name",
        "list",
        "None",
        "number",
        "text",
    ],
)
def test_wrong_example_inputs(inputs: Any, parts: list[str]) -> None:
    """The error says which input or which layer, and how inputs are given."""
    with pytest.raises(ExampleInputsError) as error:
        fxprune.prune(net(), inputs)
    says(error, *parts)


def test_the_line_that_is_named_is_the_models() -> None:
    """Not that of the caller, where a model is made of PyTorch's own modules."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    here = os.path.basename(__file__)
    for model, named in ((nn.Sequential(nn.Linear(3, 4)), False), (Own(), True)):
        with pytest.raises(ExampleInputsError) as error:
            fxprune.analyze(model, torch.zeros(1, 5))
        assert (here in str(error.value)) is named


def test_missing_second_input() -> None:
    """The name of what is missing is given."""
    with pytest.raises(ExampleInputsError) as error:
        fxprune.prune(Twins(), IMAGE)
    says(error, "vector", "Twins.forward")


def test_wrong_inputs_for_verify() -> None:
    """Real inputs that do not fit the plan's."""
    model = net()
    plan = fxprune.plan(model, IMAGE)
    with pytest.raises(ExampleInputsError) as error:
        fxprune.verify(model, plan.apply(model), plan, (IMAGE, IMAGE))
    says(error, "positional")
    with pytest.raises(ExampleInputsError) as error:
        fxprune.verify(model, plan.apply(model), plan, torch.zeros(2, 4, 8, 8))
    says(error, "example inputs", "4")


# -- ratio and importance -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio", [-0.1, 1.0, 1, 1.5, "x", True, False, math.nan, math.inf, [0.5], 0.5j], ids=repr
)
@pytest.mark.parametrize("function", [fxprune.plan, fxprune.prune], ids=lambda f: f.__name__)
def test_ratio_out_of_range(function: Any, ratio: Any) -> None:
    """The error shows the range and what was given."""
    with pytest.raises(RatioError) as error:
        function(net(), IMAGE, ratio=ratio)
    says(error, "0 <= ratio < 1", repr(ratio))
    assert isinstance(error.value, FxpruneError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("importance", "parts"),
    [
        ("l3", ["'l3'", "'l1'", "'l2'", "'random'"]),
        (7, ["int", "function of a group"]),
        (None, ["NoneType", "function of a group"]),
        (lambda group: [1.0], ["shape (1,)", "(8,)", "0.weight"]),
        (lambda group: torch.zeros(group.size, 1), ["shape (8, 1)", "(8,)"]),
        (lambda group: torch.full((group.size,), math.nan), ["NaN", "0.weight"]),
        (lambda group: [math.inf] * group.size, ["infinity", "0.weight"]),
        (lambda group: "high", ["str", "0.weight"]),
        (lambda group: None, ["importance", "0.weight"]),
        (lambda group: torch.zeros(group.size, dtype=torch.complex64), ["complex", "0.weight"]),
    ],
    ids=["unknown", "number", "None", "too few", "matrix", "nan", "inf", "text", "nothing", "complex"],
)
def test_bad_importance(importance: Any, parts: list[str]) -> None:
    """Unknown names, and functions that return no scores."""
    with pytest.raises(ImportanceError) as error:
        fxprune.plan(net(), IMAGE, importance=importance)
    says(error, *parts)


def test_errors_of_the_callers_own_functions_pass_through() -> None:
    """What a predicate or an importance raises is not dressed up."""

    def broken(group: fxprune.Group) -> Any:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fxprune.plan(net(), IMAGE, importance=broken)
    with pytest.raises(LookupError, match="mine"):
        fxprune.plan(net(), IMAGE, where=broken)


# -- plans ----------------------------------------------------------------------------------------


def test_plan_for_another_architecture() -> None:
    """The first tensor that differs is named, with both shapes."""
    plan = fxprune.plan(net(), IMAGE)
    with pytest.raises(PlanError) as error:
        plan.apply(net(12))
    says(error, "0.weight", "(8, 3, 3, 3)", "(12, 3, 3, 3)", "plan again")
    with pytest.raises(PlanError) as error:
        plan.apply(nn.Sequential(*list(net())[:-1]))
    says(error, "7.weight", "no such tensor")
    with pytest.raises(PlanError) as error:
        plan.apply("model")  # type: ignore[arg-type]
    says(error, "torch.nn.Module", "str")


def test_plan_for_the_same_tensors_in_another_network() -> None:
    """Names and shapes agree, the couplings do not."""

    class Straight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    class Residual(Straight):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(x + self.b(self.a(x)))

    plan = fxprune.plan(Straight(), torch.zeros(4, 6))
    with pytest.raises(PlanError) as error:
        plan.apply(Residual())
    says(error, "plan again", "b.weight")


def edited(plan: PruningPlan, **changes: Any) -> PruningPlan:
    return PruningPlan.from_json(json.dumps({**json.loads(plan.to_json()), **changes}))


@pytest.mark.parametrize(
    ("removed", "parts"),
    [
        ({"0.weight[0]": [0, 8]}, ["8", "0.weight[0]"]),
        ({"0.weight[0]": [-1]}, ["-1", "0.weight[0]"]),
        ({"0.weight[0]": list(range(8))}, ["every unit", "0.weight[0]"]),
        ({"0.weight[1]": [0]}, ["0.weight[1]"]),
        ({"0.weight[0]": ["a"]}, ["0.weight[0]"]),
        ({"0.weight[0]": 3}, ["0.weight[0]"]),
        ({"0.weight[0]": [0.5]}, ["0.weight[0]"]),
        ([1, 2], ["removed"]),
    ],
    ids=["beyond", "negative", "all", "no group", "text", "number", "fraction", "list"],
)
def test_plan_edited_to_be_wrong(removed: Any, parts: list[str]) -> None:
    """Units that are not there, or all that are."""
    plan = fxprune.plan(net(), IMAGE)
    with pytest.raises(PlanError) as error:
        edited(plan, removed=removed).apply(net())
    says(error, *parts)


def test_plan_edited_to_be_unbalanced() -> None:
    """Heads of unequal width."""
    model = Attention()
    plan = fxprune.plan(model, torch.zeros(2, 5, 12))
    name = next(name for name, gone in plan.removed.items() if gone)
    with pytest.raises(PlanError) as error:
        edited(plan, removed={name: plan.removed[name][1:]}).apply(model)
    says(error, "node", "balanced")


@pytest.mark.parametrize("field", ["held", "dissolved"])
def test_plan_that_names_what_is_not_there(field: str) -> None:
    """A graph node or a function that the model does not have."""
    plan = fxprune.plan(net(), IMAGE)
    with pytest.raises(PlanError) as error:
        edited(plan, held=["nowhere"]).apply(net()) if field == "held" else edited(plan, sizes={}).apply(
            net()
        )
    says(error, "plan")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "{}", '{"fxprune_plan": 1}', '{"fxprune_plan": 99}', "PK\x03\x04"],
)
def test_malformed_json(text: str) -> None:
    """Text that is no plan."""
    with pytest.raises(PlanError) as error:
        PruningPlan.from_json(text)
    says(error, "plan")


@pytest.mark.parametrize("field", ["inputs", "shapes", "sizes", "removed", "held"])
@pytest.mark.parametrize("value", [None, 3, ["x"], {"x": "y"}], ids=repr)
def test_json_with_a_field_of_the_wrong_kind(field: str, value: Any) -> None:
    """A plan is refused on reading or on use, never with another error."""
    plan = fxprune.plan(net(), IMAGE)
    with pytest.raises(PlanError):
        edited(plan, **{field: value}).apply(net())


@pytest.mark.parametrize("field", ["model", "inputs", "shapes", "sizes", "removed", "held"])
def test_json_without_a_field(field: str) -> None:
    """A missing field is named."""
    data = json.loads(fxprune.plan(net(), IMAGE).to_json())
    del data[field]
    with pytest.raises(PlanError) as error:
        PruningPlan.from_json(json.dumps(data))
    says(error, field)


def test_applying_nothing_wrong_leaves_the_model_alone() -> None:
    """A refused plan has not touched the model."""
    model = net()
    before = snapshot(model)
    with pytest.raises(PlanError):
        edited(fxprune.plan(model, IMAGE), removed={"0.weight[0]": list(range(8))}).apply(model)
    assert snapshot(model) == before


# -- verify ---------------------------------------------------------------------------------------


def tampered(change: str) -> tuple[nn.Module, torch.fx.GraphModule, PruningPlan]:
    model = stir(net())
    plan = fxprune.plan(model, IMAGE)
    pruned = plan.apply(model)
    with torch.no_grad():
        weight = pruned.get_parameter("3.weight")
        if change == "one number":
            weight[0, 0, 0, 0] += 0.1
        elif change == "channel order":
            weight.copy_(weight.flip(1))
        elif change == "statistics":
            pruned.get_buffer("1.running_var").mul_(2)
        elif change == "operator":
            pruned.get_submodule("4").__class__ = nn.Tanh
    return model, pruned, plan


@pytest.mark.parametrize(
    ("change", "node"),
    [("one number", "_3"), ("channel order", "_3"), ("statistics", "_1"), ("operator", "_4")],
)
def test_verify_names_the_first_node_that_differs(change: str, node: str) -> None:
    """A network that was tampered with is refused, at the right node."""
    model, pruned, plan = tampered(change)
    with pytest.raises(VerificationError) as error:
        fxprune.verify(model, pruned, plan, torch.randn(2, 3, 8, 8))
    says(error, f"at node {node}", "relative error", "allowed")


def test_verify_refuses_what_is_no_graph_module() -> None:
    """Without a graph the node cannot be told, the difference can."""
    model, _, plan = tampered("none")
    with pytest.raises(VerificationError) as error:
        fxprune.verify(model, copy.deepcopy(model), plan, torch.randn(2, 3, 8, 8))
    says(error, "differ", "Sequential")


def test_verify_refuses_other_shapes() -> None:
    """A network narrowed by another plan."""
    model, _, plan = tampered("none")
    other = fxprune.prune(model, IMAGE, ratio=0.25)
    with pytest.raises(VerificationError) as error:
        fxprune.verify(model, other, plan, torch.randn(2, 3, 8, 8))
    says(error, "at node _0", "(2, 6, 8, 8)", "(2, 4, 8, 8)")


def test_verify_finds_tampering_beyond_an_inexact_node() -> None:
    """Where networks differ legitimately, the rest is still compared."""
    model = stir(
        nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    )
    x = torch.randn(4, 6)
    plan = fxprune.plan(model, x)
    pruned = plan.apply(model)
    assert not fxprune.verify(model, pruned, plan, x).exact
    with torch.no_grad():
        pruned.get_parameter("2.weight").mul_(1.5)
    with pytest.raises(VerificationError) as error:
        fxprune.verify(model, pruned, plan, x)
    says(error, "at node _2")


def test_verify_finds_a_tampered_norm() -> None:
    """An inexact node itself does what it did, on what it now gets."""
    model = stir(
        nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    )
    x = torch.randn(4, 6)
    plan = fxprune.plan(model, x)
    pruned = plan.apply(model)
    with torch.no_grad():
        pruned.get_parameter("1.weight").mul_(1.5)
    with pytest.raises(VerificationError) as error:
        fxprune.verify(model, pruned, plan, x)
    says(error, "at node _1")


def test_verify_without_weights() -> None:
    """A model on the meta device has nothing to compare."""
    with torch.device("meta"):
        model = net()
    plan = fxprune.plan(model, IMAGE, importance="random")
    with pytest.raises(VerificationError) as error:
        fxprune.verify(model, plan.apply(model), plan, IMAGE)
    says(error, "meta", "no weights")


def test_verify_with_a_plan_of_another_model() -> None:
    """The plan must belong to the model."""
    model, pruned, plan = tampered("none")
    with pytest.raises(PlanError):
        fxprune.verify(net(12), pruned, plan, IMAGE)
    with pytest.raises(PlanError):
        fxprune.verify(model, pruned, replace(plan, sizes={}), IMAGE)


def test_explain_of_an_unknown_name() -> None:
    """Names that are close are suggested."""
    graph = fxprune.analyze(net(), IMAGE)
    with pytest.raises(KeyError, match=r"did you mean .*0\.weight"):
        graph.explain("0.weigth", 0)
    with pytest.raises(KeyError, match="4 axes"):
        graph.explain("0.weight", 4)
