"""A capture that takes another branch than the model is seen when it is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import CaptureError, PinnedError
from fxprune.inputs import to_meta
from fxprune.same_calls import same_calls

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Between its layers, subclasses ask something."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.relu()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.between(x, self.a(x)))
        return out


class IsFloat(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.relu() if x.dtype is torch.float32 else h.sigmoid()


class InATable(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return {torch.float32: torch.relu, torch.half: torch.tanh}.get(h.dtype, torch.sigmoid)(h)


class InASet(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.tanh() if self.a.weight.dtype not in {torch.half, torch.bfloat16} and x.dtype in {
            torch.float32
        } else h.sigmoid()  # fmt: skip


class OfAWeight(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.relu() if self.b.weight.dtype is torch.float32 else h.sigmoid()


@pytest.mark.parametrize("kind", [IsFloat, InATable, InASet, OfAWeight])
@pytest.mark.parametrize("training", [False, True])
def test_the_type_of_a_tensor_decides(kind: type[Net], training: bool) -> None:
    model = kind().train(training)
    plan = fxprune.plan(model, X)
    pruned = plan.apply(model)
    assert pruned.a.weight.shape == (16, 8)
    assert fxprune.verify(model, pruned, plan, X).exact
    torch.testing.assert_close(fxprune.prune(model, X, ratio=0.0)(X), model(X))
    assert pruned(X[:2]).shape == (2, 4)


def test_the_type_is_said_and_checked() -> None:
    pruned = fxprune.prune(IsFloat().eval(), X)
    (note,) = pruned.meta["fxprune"].notes
    assert note.startswith("the type of a tensor, of which the code asks, stays torch.float32 (")
    with pytest.raises(PinnedError, match=r"asks for a value that was torch\.float32"):
        pruned.double()(X.double())


class OnlyAsks(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        kind = x.dtype
        return h.relu() if kind is not None and len(x) > 1 else h.sigmoid()


class AsksAndWrites(Net):
    """What is written in place makes the nodes of the graph others than those that were recorded."""

    def between(self, x: Tensor, h: Tensor) -> Tensor:
        _ = x.dtype
        h = h + len(x)
        h += x.mean()
        return h.relu() if len(x) > 1 else h


@pytest.mark.parametrize("kind", [OnlyAsks, AsksAndWrites])
def test_a_type_that_decides_nothing_is_not_pinned(kind: type[Net]) -> None:
    """Else nobody could run a pruned network in half precision."""
    model = kind().eval()
    pruned = fxprune.prune(model, X)
    assert pruned.meta["fxprune"].notes == ()
    assert pruned.double()(X.double()).dtype == torch.float64


class AsksForTheClass(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.relu() if h.__class__ is Tensor else h.sigmoid()


class AsksForAProxy(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return h.sigmoid() if hasattr(h, "tracer") else h.relu()


class AsksForALayer(Net):
    def between(self, x: Tensor, h: Tensor) -> Tensor:
        return self.a(x).relu() if isinstance(x, fx.Proxy) else self.a(x * 2).relu()


@pytest.mark.parametrize("kind", [AsksForTheClass, AsksForAProxy, AsksForALayer])
def test_what_the_graph_cannot_follow_is_not_taken(kind: type[Net]) -> None:
    """Either a lower rung does what the model does, or the model is refused."""
    model = kind().eval()
    refused, result = "", nn.Module()
    try:
        result = fxprune.prune(model, X, ratio=0.0)
    except CaptureError as refusal:
        refused = str(refusal)
    if refused:
        assert "The first layer that differs is" in refused
    else:
        torch.testing.assert_close(result(X), model(X))


def test_without_weights_it_is_said() -> None:
    (note,) = fxprune.analyze(AsksForTheClass().to("meta").eval(), X).captured.notes
    assert note == "whether the graph is all that the model does was not seen: there are no weights yet"


def test_inputs_without_values_do() -> None:
    """As those are that a plan holds."""
    with pytest.raises(CaptureError, match="The first layer that differs is"):
        fxprune.analyze(AsksForTheClass().eval(), X.to("meta"))


class Writes(nn.Module):
    """In place, into views, into buffers; with numbers that are read off an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.turn = nn.Linear(12, 12)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.steps += 1
        h = self.norm(self.layer(x)).relu_()
        h[:, :3] *= 2
        h += F.dropout(h, 0.5, self.training)
        h = torch.cat([torch.tensor([], device=x.device), h.t()])
        h = self.turn(h.t())
        h = h.masked_fill(mask[:, None], 0.0)
        return self.out(h)


@pytest.mark.parametrize("training", [False, True])
def test_models_that_are_followed_make_the_same_calls(training: bool) -> None:
    mask = torch.tensor([True, False, False, True, False, False])
    for model, inputs in [
        (Net(), (X,)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(1)),
         (torch.rand(2, 3, 6, 6),)),
        (Writes(), (X, mask)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (X[None],)),
    ]:  # fmt: skip
        model.train(training)
        program = fxprune.analyze(model, inputs).captured.program
        assert same_calls(model, program, inputs, {})
        assert same_calls(model, program, to_meta(inputs), {})


def test_random_numbers_of_others_stay_theirs() -> None:
    """All threads draw from one generator; a look at shapes alone neither seeds it nor draws from it."""
    seen = SimpleNamespace(seeds=set())

    class Noisy(Net):
        def between(self, x: Tensor, h: Tensor) -> Tensor:
            seen.seeds.add(torch.initial_seed())
            return F.dropout(h + torch.rand(32) * torch.rand_like(h), 0.5, self.training)

    model = Noisy().train()
    program = fxprune.analyze(model, X).captured.program
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    seen.seeds.clear()
    assert same_calls(model, program, (X,), {})
    assert seen.seeds == {1234}
    assert torch.equal(torch.get_rng_state(), state)


def others() -> list[Any]:
    """Networks that differ from Net by one operator, number, tensor or order."""

    def net(between: Any) -> Net:
        model = Net()
        model.between = between  # type: ignore[method-assign]
        return model

    return [
        net(lambda x, h: h.sigmoid()),
        net(lambda x, h: h.relu() * 1.0),
        net(lambda x, h: h.clone().add_(1).relu()),
        net(lambda x, h: F.linear(x, h.new_ones(32, 8)).relu()),
    ]


def test_other_calls_are_seen() -> None:
    program = fxprune.analyze(Net(), X).captured.program
    for model in others():
        model.load_state_dict(Net().state_dict())
        assert not same_calls(model, program, (X,), {})
