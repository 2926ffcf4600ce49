"""An analysis is made once: what is planned, applied, verified, masked afterwards takes it as it is."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxprune
from fxprune.cli import main
from fxprune.errors import PlanError, SelectionError

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 4)
        self.options = SimpleNamespace(rate=[1.0], deep={"skip": False})
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu() * self.options.rate[0] + self.shift[:, None, None]
        if self.options.deep["skip"]:
            x = x + 1
        return self.head(self.hidden(x).relu().mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    oracle.stir(net)
    return net


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was captured and coupled, in order."""
    done: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("fxprune.analysis.capture", counted("capture", fxprune.analysis.capture))
    couple = fxprune.CouplingGraph.__init__  # which looks at the graph at one size of the inputs or two
    monkeypatch.setattr(fxprune.CouplingGraph, "__init__", counted("couple", couple))
    return done


ONCE = ["capture", "couple"]


def test_everything_around_a_plan_makes_one_analysis(model: nn.Module, made: list[str]) -> None:
    plan = fxprune.plan(model, X)
    pruned = plan.apply(model)
    assert fxprune.verify(model, pruned, plan, X).exact
    masked = plan.mask(model)
    assert plan.masks(model)
    plan.apply_state_dict(model.state_dict(), model)
    plan.apply_to_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, pruned)
    assert plan.check(model) == ()
    assert plan.without(next(iter(plan.removed))).apply(model)(X).shape == (2, 4)
    assert made == ONCE
    assert torch.allclose(pruned(X), masked(X), atol=1e-5)


def test_the_command_line_makes_one_analysis(tmp_path: Any, made: list[str]) -> None:
    arguments = ["prune", "test_reuse:Net", "--input-shape", "2,3,8,8", "--no-latency"]
    assert main([*arguments, "--out", str(tmp_path / "small.safetensors")]) == 0
    assert made == ONCE


def test_a_schedule_makes_one_analysis_a_step(model: nn.Module, made: list[str]) -> None:
    steps = list(fxprune.schedule(model, X, 0.5, steps=3))
    assert made == 3 * ONCE
    widths = [step.model.get_parameter("stem.weight").shape[0] for step in steps]
    assert widths == [7, 6, 4]
    again = steps[-1].total.apply(model)
    assert torch.equal(again(X), steps[-1].model(X))


def test_what_analyze_gave_serves_in_place_of_the_model(model: nn.Module, made: list[str]) -> None:
    graph = fxprune.analyze(model, X)
    plan = fxprune.plan(graph, 0.5, "l1")
    assert plan == fxprune.plan(graph, fxprune.Selection(0.5, "l1"))
    loaded = fxprune.PruningPlan.from_json(plan.to_json())
    pruned = loaded.apply(graph)
    assert torch.equal(pruned(X), fxprune.prune(graph, importance="l1")(X))
    assert fxprune.verify(graph, pruned, loaded, X).exact
    assert loaded.masks(graph).keys() == plan.masks(graph).keys()
    assert loaded.mask(graph)(X).shape == (2, 4)
    loaded.apply_state_dict(model.state_dict(), graph)
    loaded.apply_to_optimizer(torch.optim.SGD(model.parameters(), 0.1), graph, pruned)
    assert graph.report().params.total
    assert made == ONCE
    assert plan == fxprune.plan(model, X, 0.5, "l1")
    with pytest.raises(SelectionError, match="which has made this CouplingGraph"):
        fxprune.plan(graph, free_outputs="output")
    with pytest.raises(SelectionError, match="knows its inputs"):
        fxprune.plan(graph, X, 0.5)
    with pytest.raises(TypeError, match="example_inputs"):
        fxprune.plan(model)


def _stride(net: Any) -> None:
    net.stem.stride = (2, 2)


def _nested(net: Any) -> None:
    net.options.deep["skip"] = True


def _listed(net: Any) -> None:
    net.options.rate[0] = 3.0


def _parameter(net: Any) -> None:
    net.hidden.weight = nn.Parameter(torch.randn(12, 8, 1, 1))


def _module(net: Any) -> None:
    net.norm = nn.Identity()


def _forward(net: Any) -> None:
    net.forward = lambda x: net.head(net.hidden(net.stem(x)).mean((2, 3)))


def _hook(net: Any) -> None:
    net.stem.register_forward_hook(lambda module, args, out: out * 2)


def _buffer(net: Any) -> None:
    net.shift.add_(1)


def _mode(net: Any) -> None:
    net.train()


@pytest.mark.parametrize(
    "change", [_stride, _nested, _listed, _parameter, _module, _forward, _hook, _buffer, _mode]
)
def test_a_changed_model_is_analysed_again(model: nn.Module, made: list[str], change: Any) -> None:
    plan = fxprune.plan(model, X)
    change(model)
    fresh = copy.deepcopy(plan)  # which remembers nothing
    try:
        expected: Any = fresh.apply(model)
    except PlanError as error:
        with pytest.raises(PlanError, match=re.escape(str(error))):
            plan.apply(model)
        return
    assert made == 2 * ONCE
    found = plan.apply(model)
    assert made == 3 * ONCE
    assert torch.equal(found(X), expected(X))


def test_new_rules_make_a_new_analysis(model: nn.Module, made: list[str]) -> None:
    plan = fxprune.plan(model, X)
    with fxprune.register_module(nn.Identity, attributes={"nothing": "input[1]"}):
        plan.apply(model)
    assert made == 2 * ONCE


def test_a_graph_module_that_was_edited_is_analysed_again(made: list[str]) -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.randn(2, 3)
    plan = fxprune.plan(net, x)
    node = next(n for n in net.graph.nodes if n.target == "1")
    node.args = (node.args[0],)
    with net.graph.inserting_after(node):
        doubled = net.graph.call_function(torch.mul, (node, 2.0))
    node.replace_all_uses_with(doubled, lambda user: user is not doubled)
    net.recompile()
    found = plan.apply(net)
    assert made == 2 * ONCE
    assert fxprune.verify(net, found, plan, x).exact


def test_weights_that_were_trained_since_are_those_that_count(model: nn.Module, made: list[str]) -> None:
    plan = fxprune.plan(model, X)
    first = plan.apply(model)
    with torch.no_grad():
        model.get_parameter("head.bias").add_(1)
    second = plan.apply(model)
    assert made == ONCE
    assert torch.allclose(second(X), first(X) + 1, atol=1e-5)
    second.get_parameter("stem.weight").data.zero_()
    assert first.get_parameter("stem.weight").abs().sum() > 0


def test_other_copies_and_loaded_plans_make_an_analysis_of_their_own(
    model: nn.Module, made: list[str]
) -> None:
    plan = fxprune.plan(model, X)
    plan.apply(copy.deepcopy(model))
    assert made == 2 * ONCE
    copies: list[fxprune.PruningPlan] = [pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)]
    for other in copies:
        assert other == plan
        other.apply(model)
    assert made == 4 * ONCE


def test_another_plan_of_the_model_takes_no_plan_its_counts(model: nn.Module, made: list[str]) -> None:
    first, second = (fxprune.plan(model, X, ratio) for ratio in (0.5, 0.25))
    assert first.counts()["params"][1] < second.counts()["params"][1] < second.counts()["params"][0]
    done = len(made)
    first.apply(model)
    assert len(made) == done


def test_plans_and_analyses_keep_no_model_alive(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    plan, gone = fxprune.plan(other, X), weakref.ref(other)
    pruned = plan.apply(other)
    del other
    gc.collect()
    assert gone() is None
    assert pruned(X).shape == (2, 4)
    graph = fxprune.analyze(copy.deepcopy(model), X)
    assert fxprune.plan(graph).removed  # a graph that somebody holds keeps its model


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_analyses_can_be_pickled(name: str) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(name).eval()
        x = torch.empty(1, 3, 224, 224)
    graph = fxprune.analyze(net, x)
    read: fxprune.CouplingGraph = pickle.loads(pickle.dumps(graph))
    assert list(map(repr, read)) == list(map(repr, graph))
    assert list(map(str, read.frozen)) == list(map(str, graph.frozen))
    for new, old in zip(read, graph, strict=True):
        for a, b in zip(new.members, old.members, strict=True):
            assert (a.units == b.units).all()
            assert list(map(str, a.uses)) == list(map(str, b.uses))
    plan = fxprune.plan(read, importance="random")
    assert plan == fxprune.plan(graph, importance="random")
    assert dict(plan.apply(read).named_parameters()).keys() == dict(net.named_parameters()).keys()


def test_a_pickled_analysis_is_one_of_its_own_copy_of_the_model(model: nn.Module, made: list[str]) -> None:
    read = pickle.loads(pickle.dumps(fxprune.analyze(model, X)))
    pruned = fxprune.prune(read)
    assert made == ONCE
    assert torch.equal(pruned(X), fxprune.prune(model, X)(X))
    assert read.model is not model
