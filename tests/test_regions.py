"""Models that cannot be captured whole: their largest submodules are pruned, the code around them stays."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from oracle import difference, masked, same_structure, snapshot, stir
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.api import graph_for
from fxprune.coupling.units import Units
from fxprune.errors import CaptureError, PlanError, VerificationError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Has a method and an attribute that the code around it uses."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(z=self.out(self.hidden(x).relu()))

    def loss(self, y: Tensor) -> Tensor:
        return y.square().mean() * self.scale


class Whole(nn.Module):
    """Body and head with a loop on values between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
        self.body = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = Head()
        self.unused = nn.Linear(3, 3)
        stir(self)

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        y = self.body(x)
        while y.sum() > 0:
            y = y - 1
        out = self.head(F.dropout(y, 0.5, self.training))
        return out, self.head.loss(out["z"])


@pytest.fixture
def model() -> nn.Module:
    return Whole().eval()


def judge(model: nn.Module, inputs: Any = X, narrows: str = "") -> tuple[fxprune.PruningPlan, nn.Module]:
    """Prune at half; the result computes what the masked original computes, the original is untouched."""
    before = snapshot(model)
    plan = fxprune.plan(model, inputs, ratio=0.5)
    pruned = plan.apply(model)
    assert type(pruned) is type(model)
    assert list(pruned.state_dict()) == list(model.state_dict())
    for name in narrows.split():
        assert pruned.get_parameter(name).numel() < model.get_parameter(name).numel(), name
    assert fxprune.verify(model, pruned, plan, inputs).exact
    reference = masked(model, graph_for(plan, model), plan).double().eval()
    with torch.no_grad():
        wanted = reference(inputs.double())
        got = copy.deepcopy(pruned).double().eval()(inputs.double())
    assert same_structure(wanted, got)
    assert difference(got, wanted) < 1e-8
    assert snapshot(model) == before
    owned = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert owned.isdisjoint(id(t) for t in [*pruned.parameters(), *pruned.buffers()])
    return plan, pruned


def test_prunes_parts(model: nn.Module) -> None:
    """Both sides of the loop narrow; type, attributes, methods and output types are the original's."""
    plan, pruned = judge(model, narrows="body.0.weight body.3.weight head.hidden.weight head.out.weight")
    assert isinstance(pruned.head, Head)
    assert list(plan.regions) == ["body", "head"]
    assert pruned.meta["fxprune"] == plan
    assert fxprune.PruningPlan.from_json(plan.to_json()) == plan


def test_says_so(model: nn.Module) -> None:
    """The report names the regions and why the rungs before failed."""
    report = fxprune.analyze(model, X).captured.report
    assert "by regions" in report
    assert "Regions: body, head." in report
    assert "control flow" in report


def test_report() -> None:
    """One entry a region: what it was captured by, what of it can go, where its inputs come from."""
    model = Handing("operator").eval()
    report = fxprune.analyze(model, X).report()
    a, b = report.regions
    assert (a.path, b.path) == ("a", "b")
    assert {a.rung, b.rung} == {"symbolic tracing"}
    assert b.params.total == 8 * 12 + 12 + 12 * 4 + 4
    assert b.params.prunable == 8 * 12 + 12 + 12 * 4
    linked = fxprune.analyze(Handing().eval(), X).report().regions[1]
    assert linked.linked == ("a",)
    assert linked.params.prunable == b.params.prunable
    assert "2 regions; the code around them" in str(report)
    assert report.as_dict()["regions"][0]["path"] == "a"


def test_report_says_what_is_no_region() -> None:
    model = Stepwise().eval()
    model.block = Shape()  # type: ignore[assignment]
    report = fxprune.analyze(model, X).report()
    assert report.refused == ("block: its graph differs from call to call",)
    assert "not captured: block" in str(report)


def test_boundary_stays(model: nn.Module) -> None:
    """What leaves a region keeps its width, and says why."""
    frozen = {str(f.axis): f.reason for f in fxprune.analyze(model, X).frozen}
    assert "boundary of a region" in frozen["body.3.weight[0]"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model: nn.Module, again: Any) -> None:
    """A copy or a pickle computes the same with tensors of its own, and stays prunable."""
    pruned = fxprune.prune(model, X)
    twin = again(pruned)
    assert torch.equal(twin(X)[1], pruned(X)[1])
    assert isinstance(twin.head, Head)
    with torch.no_grad():
        twin.head.hidden.weight.zero_()
    assert not torch.equal(twin(X)[1], pruned(X)[1])
    assert fxprune.plan(twin, X).sizes == dict.fromkeys(twin.meta["fxprune"].sizes, 8)


def test_trains(model: nn.Module) -> None:
    """Gradients reach every parameter of a region; modes switch."""
    pruned = fxprune.prune(model, X).train()
    assert not torch.equal(pruned(X)[1], pruned(X)[1])
    pruned(X)[1].backward()
    assert all(p.grad is not None for n, p in pruned.named_parameters() if not n.startswith("unused"))
    assert not torch.equal(
        pruned.get_buffer("body.1.running_mean"), model.get_buffer("body.1.running_mean")[:8]
    )


def test_leaves_no_trace() -> None:
    """The run that finds the regions moves no statistics and no random numbers."""
    model = Whole().train()
    before = snapshot(model)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    fxprune.analyze(model, X)
    assert torch.equal(torch.rand(1), wanted)
    assert snapshot(model) == before


def test_plan_applies_without_running() -> None:
    """The plan knows the inputs of the regions: another copy of the architecture may live on meta."""
    plan = fxprune.plan(Whole(), X)
    assert plan.apply(Whole().to("meta")).get_parameter("head.hidden.weight").shape == (8, 8)


def test_counts(model: nn.Module) -> None:
    """MACs of a model that cannot be run on shapes alone are those of a real run."""
    before, after = fxprune.count(model, X), fxprune.count(fxprune.prune(model, X), X)
    linear = 8 * 16 + 16 * 4
    assert before.macs == 2 * (36 * 27 * 16 + 16 * 9 * 16 * 8 + linear)
    assert after.macs == before.macs // 2


def test_tampering_is_found(model: nn.Module) -> None:
    plan = fxprune.plan(model, X)
    pruned = plan.apply(model)
    with torch.no_grad():
        pruned.get_parameter("head.hidden.weight").mul_(1.01)
    with pytest.raises(VerificationError, match="head_"):
        fxprune.verify(model, pruned, plan, X)


def test_unknown_region(model: nn.Module) -> None:
    plan = fxprune.plan(model, X)
    broken = plan.to_json().replace('"outside"', '"inside"')
    with pytest.raises(PlanError, match="region 'body'"):
        fxprune.PruningPlan.from_json(broken)


class Stepwise(nn.Module):
    """A region that is called several times, with other sizes; its parent reads one of its weights."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1))
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        while x.shape[-1] > 2 and x.sum() == x.sum():
            x = F.max_pool2d(self.block(x), 2)
        if self.tied:
            x = x + self.block[0].weight.sum()
        return x


def test_called_several_times() -> None:
    plan, _ = judge(Stepwise(), narrows="block.0.weight block.2.weight")
    assert list(plan.regions) == ["block"]


class Asking(Whole):
    """Asks each part first with an argument that it may not take."""

    def forward(self, x: Tensor) -> Any:
        try:
            y = self.body(x, lengths=None)
        except TypeError:
            y = self.body(x)
        while y.sum() > 0:
            y = y - 1
        return self.head(y)


def test_calls_that_a_part_does_not_take_say_nothing_of_it() -> None:
    judge(Asking().eval(), narrows="body.0.weight head.hidden.weight")


def test_weight_used_outside() -> None:
    """A parameter that the code around reads keeps its shape."""
    model = Stepwise(tied=True).eval()
    graph = fxprune.analyze(model, X)
    assert graph.captured.regions["block"]["outside"] == ["block.0.weight"]
    assert not list(graph)
    assert torch.equal(fxprune.prune(model, X)(X), model(X))


class Shape(nn.Module):
    """Takes another branch for small inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.b = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.shape[-1] > 4 else self.b(x)


def test_calls_must_agree() -> None:
    """A submodule whose graph is another from call to call is no region; its children may be."""
    model = Stepwise().eval()
    model.block = Shape()  # type: ignore[assignment]
    plan, _ = judge(model, narrows="block.a.0.weight block.b.0.weight")
    assert list(plan.regions) == ["block.a", "block.b"]


def test_nothing_to_capture() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="no part of it can be captured"):
        fxprune.analyze(Alone(), torch.ones(2, 3))


def test_tracing_leaves_attributes() -> None:
    """A forward that stores what it computes does not store what tracing computes."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
            self.cache: Any = None
            self.seen: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.cache = self.fc(x)
            self.seen.append(x)
            return self.cache

    model = Caching()
    fxprune.prune(model, torch.randn(2, 3))
    assert model.cache is None
    assert model.seen == []


def test_many_meet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit that meets many is merged with all of them in a few rounds, not in one each."""
    units = Units()
    one, many = units.fresh(1), units.fresh(50)
    hub = units.fresh(1)
    rounds = []
    find = Units.find
    monkeypatch.setattr(Units, "find", lambda self, ids: rounds.append(1) or find(self, ids))
    units.merge(np.append(one, many), hub)
    assert len(rounds) < 10
    assert (units.find(many) == one).all()


class Handing(nn.Module):
    """Two regions, the second on what the first returns; ``between`` says what else happens to it."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = Maps()
        self.b = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1))
        self.lists = Lists()
        self.between = between
        stir(self)

    def forward(self, x: Tensor) -> Any:
        while x.sum() > 100:
            x = x - 1
        if self.between == "list":
            return self.lists(list(self.a(x).values()))
        if self.between == "twice":
            return [self.b(self.a(y)["p"]) for y in (x, x + 1)]
        if self.between == "other":
            return self.b(self.a(x)["p"]), self.b(x.new_ones(2, 8, 6, 6))
        y = self.a(x)["p"]
        if self.between == "operator":
            return self.b(y), y.mean()
        if self.between == "returned":
            return self.b(y), y
        if self.between == "view":
            return self.b(y[:])
        if self.between == "space":
            height = y.shape[-2:][0]
            return self.b(y) * height + y.size(3)
        if self.between == "width":
            return self.b(y) * y.shape[1]
        if self.between == "sizes":
            return self.b(y) * len(list(y.shape)) + torch.zeros(y.shape).sum()
        return self.b(y)


class Maps(nn.Module):
    """Feature maps by name."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Conv2d(3, 8, 3)
        self.q = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        p = self.p(x).relu()
        return OrderedDict(p=p, q=self.q(p))


class Lists(nn.Module):
    """A head on a list of feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Conv2d(8, 4, 1)
        self.q = nn.Conv2d(6, 4, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.p(maps[0]), self.q(maps[1])]


@pytest.mark.parametrize("between", ["", "list", "twice", "space"])
def test_linked(between: str) -> None:
    """What goes from region to region only becomes narrower, and trains, copies and applies as all else."""
    model = Handing(between).eval()
    plan = fxprune.plan(model, X, ratio=0.5)
    pruned = plan.apply(model)
    assert pruned.a.p.weight.shape[0] == 4
    taker = pruned.lists.p if between == "list" else pruned.b[0]
    assert taker.weight.shape[1] == 4
    assert pruned.a.q.weight.shape[0] == (3 if between == "list" else 6)
    assert fxprune.verify(model, pruned, plan, X).exact
    reference = masked(model, graph_for(plan, model), plan).double().eval()
    with torch.no_grad():
        wanted, got = reference(X.double()), copy.deepcopy(pruned).double()(X.double())
    assert same_structure(wanted, got)
    assert difference(got, wanted) < 1e-8
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert fxprune.PruningPlan.from_json(plan.to_json()) == plan
    again = fxprune.PruningPlan.from_json(plan.to_json()).apply(model)
    twin = pickle.loads(pickle.dumps(pruned))
    results = [torch.utils._pytree.tree_leaves(m(X)) for m in (pruned, again, twin)]
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
    sum(leaf.sum() for leaf in torch.utils._pytree.tree_leaves(pruned.train()(X))).backward()
    assert pruned.a.p.weight.grad is not None
    with torch.no_grad():
        pruned.a.p.weight.mul_(1.01)
    with pytest.raises(VerificationError):
        fxprune.verify(model, pruned, plan, X)


def test_other_sizes() -> None:
    """What returns a dict is traced, too, so that images of other sizes may come."""
    model = Handing().eval()
    assert fxprune.analyze(model.a, X).captured.rung == "symbolic tracing"
    plan = fxprune.plan(model, X)
    other = torch.randn(3, 3, 14, 10, dtype=torch.double)
    reference = masked(model, graph_for(plan, model), plan).double()
    with torch.no_grad():
        assert difference(plan.apply(model).double()(other), reference(other)) < 1e-8


@pytest.mark.parametrize("between", ["operator", "returned", "view", "width", "sizes", "other"])
def test_used_outside(between: str) -> None:
    """What the code around the regions looks at, too, keeps its width."""
    model = Handing(between).eval()
    plan = fxprune.plan(model, X, ratio=0.5)
    pruned = plan.apply(model)
    assert pruned.a.p.weight.shape[0] == 8
    assert pruned.b[0].weight.shape == (6, 8, 1, 1)
    assert same_structure(model(X), pruned(X))
    assert fxprune.verify(model, pruned, plan, X).exact


class Calling(nn.Module):
    """Code on values that calls layers itself, on what a region returns."""

    def __init__(self, through: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))
        self.through = through
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 6), nn.ReLU(), nn.Linear(6, 3))
        stir(self)

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 100:
            x = x - 1
        y = self.head(self.through(self.body(x)))
        return y if y.sum() > 0 else -y


class Twice(nn.Module):
    """Must not be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x if x.sum() > 0 else 2 * x


@pytest.mark.parametrize("through", [nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=12), Twice()])
def test_layers_between(through: nn.Module) -> None:
    """A layer that code calls by itself is a region, too, if it is linked to one; it stays what it is."""
    model = Calling(copy.deepcopy(through)).eval()
    rule = fxprune.register_module(Twice, "n c h w -> n c h w")
    with rule:
        plan, pruned = judge(model, narrows="body.2.weight head.1.weight")
        assert list(plan.regions) == ["body", "through", "head"]
        assert pruned.head[1].weight.shape == (3, 6 * 16)
        assert type(pruned.through) is type(model.through)
        again = fxprune.PruningPlan.from_json(plan.to_json()).apply(model)
        assert torch.equal(again(X), pruned(X))
        twin = pickle.loads(pickle.dumps(pruned))
        assert torch.equal(twin(X), pruned(X))
        pruned.train()(X).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())
        for parameter in [*pruned.through.parameters()][:1]:
            with torch.no_grad():
                parameter.mul_(1.01)
            with pytest.raises(VerificationError):
                fxprune.verify(model, pruned, plan, X)


def test_layers_alone() -> None:
    """A layer that is linked to nothing is no region."""
    model = Calling(Twice()).eval()  # which nobody registered
    plan, _ = judge(model)
    assert list(plan.regions) == ["body", "head"]


class Boxes(nn.Module):
    """Two maps, a pool of boxes that are chosen by value, a head: the pattern of a two-stage detector."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        from torchvision.ops import MultiScaleRoIAlign

        torch.manual_seed(0)
        self.looks = looks
        self.body = Pyramid()
        self.pool = MultiScaleRoIAlign(["p", "q"], 3, 2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(72, 10), nn.ReLU(), nn.Linear(10, 4))
        stir(self)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        kept = [boxes[boxes[:, 2] > boxes[:, 0]]]
        if self.looks and bool((kept[0] < 0).any()):
            raise ValueError("boxes begin at 0")
        return self.head(self.pool(self.body(x), kept, [(x.shape[2] * 8, x.shape[3] * 8)]))


class Pyramid(nn.Module):
    """Maps of two scales, and a third that the pool leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Conv2d(3, 8, 3, padding=1)
        self.q = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        p = self.p(x)
        q = self.q(p.relu())
        return OrderedDict(p=p, q=q, r=F.max_pool2d(q, 2))


@pytest.mark.parametrize("looks", [True, False], ids=["by regions", "as a whole"])
def test_pooled_boxes(looks: bool) -> None:
    """torchvision's pool of regions of interest passes channels on, wherever the boxes lie."""
    model = Boxes(looks).eval()
    boxes = torch.tensor([[4.0, 4, 40, 50], [0, 0, 400, 380], [9, 9, 3, 3], [10, 20, 60, 60]])
    plan = fxprune.plan(model, (X, boxes))
    pruned = plan.apply(model)
    assert ("pool" in plan.regions) is looks
    assert (pruned.body.p.weight.shape[0], pruned.body.q.weight.shape[0]) == (4, 4)
    assert pruned.get_submodule("head.1").weight.shape == (5, 36)
    assert fxprune.verify(model, pruned, plan, (X, boxes)).exact
    reference = masked(model, graph_for(plan, model), plan).double()
    pruned = pruned.double()
    for count in (4, 2, 0):
        for x in (X.double(), torch.randn(1, 3, 12, 16, dtype=torch.double)):
            with torch.no_grad():
                got, wanted = pruned(x, boxes[:count].double()), reference(x, boxes[:count].double())
            assert got.shape == wanted.shape
            assert difference(got, wanted) < 1e-8


def test_a_name_that_a_graph_module_cannot_have() -> None:
    """The parts narrow, joined to each other, and the report says why it is not done as a whole."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("in", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)))
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(getattr(self, "in")(x))

    model, x = Named().double(), torch.randn(2, 4).double()
    assert "'in" in fxprune.analyze(model, x).captured.report
    plan = fxprune.plan(model, x)
    pruned = plan.apply(model)
    assert type(pruned) is Named
    assert pruned.out.weight.shape == (3, 3)
    fxprune.verify(model, pruned, plan, x)


class Router(nn.Module):
    """Chooses in float32, whatever the model computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.out(self.hidden(x).relu()).float().softmax(-1)
        return torch.topk(shares.to(x.dtype), 2, -1)


class Experts(nn.Module):
    """Tokens are handed to those experts that some router chose for them, one expert after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = Router()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 1000:
            x = x / 2
        shares, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if token.numel():
                out.index_add_(0, token, expert(x[token]) * shares[token, place, None])
        return out


def test_regions_with_a_type_written_down() -> None:
    """``float()`` inside of a region is that of the comparison, in the result as in the original."""
    inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    narrows = "router.hidden.weight experts.0.0.weight experts.3.2.weight"
    judge(Experts(), inputs, narrows)


class Scripted(nn.Module):
    """A layer in the middle was compiled by TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.script = torch.jit.script(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.script(input=self.a(x))


def test_compiled_layers() -> None:
    """They cannot be looked into; what is around them is narrowed."""
    model = Scripted().eval()
    assert "compiled by TorchScript" in fxprune.analyze(model, X).captured.report
    pruned = fxprune.prune(model, X, ratio=0.5)
    assert pruned.get_parameter("a.0.weight").shape == (4, 3, 3, 3)
    assert pruned(X).shape == model(X).shape


def test_what_torch_vmap_calls_is_left_as_it_is() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # The batch norm would stay in one mode, were the whole model exported.
            self.a = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
            self.b = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.b)(self.a(x))

    model, x = Mapped().eval(), torch.randn(3, 6)
    plan = fxprune.plan(model, x, ratio=0.5)
    assert any("within torch.vmap" in note for note in plan.notes)
    pruned = plan.apply(model)
    assert pruned.get_parameter("a.0.weight").shape == (8, 6)
    assert fxprune.verify(model, pruned, plan, x).exact
