"""Regularisers against autograd on the penalty written out, entry by entry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import stir
from test_training import Attending, Convolutional
from torch import Tensor, nn

import fxprune
from fxprune.errors import PlanError, TrainingError
from fxprune.regularize import BNScale, GroupNorm, GrowingReg


class Joined(nn.Module):
    """Two groups share the axis of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), torch.tanh(self.b(x))], dim=-1))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutional": (Convolutional, torch.randn(4, 3, 8, 8, dtype=torch.float64)),
    "joined": (Joined, torch.randn(4, 3, dtype=torch.float64)),
    "attending": (Attending, torch.randint(0, 11, (4, 5))),
}
every_net = pytest.mark.parametrize("name", NETS)


def made(name: str) -> tuple[nn.Module, fxprune.CouplingGraph, Tensor]:
    build, x = NETS[name]
    model = stir(build()).double()
    return model, fxprune.analyze(model, x), x


def of_unit(model: nn.Module, group: fxprune.Group, unit: int) -> list[Tensor]:
    """All trainable entries that go with a unit, differentiably; the slow way."""
    parameters = dict(model.named_parameters())
    found = []
    for member in group.members:
        if member.trainable:
            parameter = parameters[member.axis.name].movedim(
                (*member.over, member.axis.dim), tuple(range(member.units.ndim))
            )
            found += [
                parameter[tuple(place)] for place in zip(*(member.units == unit).nonzero(), strict=True)
            ]
    return [entry.reshape(-1) for entry in found]


def added(model: nn.Module, reg: Any, x: Tensor) -> dict[str, Tensor]:
    """What a step adds to the gradients of a loss."""
    model.zero_grad()
    model(x).square().mean().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    reg.step()
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    return {name: p.grad - before[name] for name, p in model.named_parameters()}


def by_autograd(model: nn.Module, penalty: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(model.named_parameters(), gradients, strict=True)
    }


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12, msg=name)
    assert any(t.abs().max() > 1e-6 for t in a.values())


@every_net
def test_group_norm(name: str) -> None:
    model, graph, x = made(name)
    penalty = torch.zeros((), dtype=torch.float64)
    for group in graph:
        norms = torch.stack([torch.cat(of_unit(model, group, u)).norm() for u in range(group.size)])
        gamma = 2 ** (3 * (norms.max() - norms) / (norms.max() - norms.min())).detach()
        penalty = penalty + 0.01 / 2 * (gamma * norms.square()).sum()
    close(added(model, GroupNorm(graph, model, strength=0.01, alpha=3), x), by_autograd(model, penalty))


def test_group_norm_of_equal_units() -> None:
    """Where all units are alike, none is pushed harder."""
    model, graph, x = made("convolutional")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    reg = GroupNorm(graph, model, strength=0.1)
    assert added(model, reg, x)["norm.weight"] == pytest.approx(0.05)


def test_bn_scale() -> None:
    model, graph, x = made("convolutional")
    with torch.no_grad():
        model.get_parameter("norm.weight")[::2].neg_()
    penalty = 0.01 * model.get_parameter("norm.weight").abs().sum()
    close(added(model, BNScale(graph, model, strength=0.01), x), by_autograd(model, penalty))
    model, graph, _ = made("attending")
    with pytest.raises(TrainingError, match="batch norm with a scale"):
        BNScale(graph, model)


@every_net
@pytest.mark.parametrize("planned", [True, False])
def test_growing_regularisation(name: str, planned: bool) -> None:
    model, graph, x = made(name)
    plan = fxprune.plan(model, x, ratio=0.5)
    reg = GrowingReg(graph, model, plan if planned else None, delta=0.1, every=2, ceiling=0.25)
    factors = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in graph}
    for number in range(7):
        penalty = torch.zeros((), dtype=torch.float64)
        for group in graph:
            norms = torch.stack([torch.cat(of_unit(model, group, u)).norm() for u in range(group.size)])
            if number % 2 == 0:
                weak = ((norms.max() - norms) / (norms.max() - norms.min())).detach()
                gone = torch.tensor([u in plan.removed[group.name] for u in range(group.size)]).double()
                factors[group.name] = (factors[group.name] + 0.1 * (gone if planned else weak)).clamp(
                    max=0.25
                )
            penalty = penalty + (factors[group.name] / 2 * norms.square()).sum()
        close(added(model, reg, x), by_autograd(model, penalty))
        assert all(torch.allclose(reg.penalty[g], factors[g]) for g in factors)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter))
    assert max(float(p.max()) for p in reg.penalty.values()) == 0.25


def test_growing_regularisation_clears_what_the_plan_removes() -> None:
    """Driven to zero, units go without changing the outputs."""
    model, graph, x = made("convolutional")
    plan = fxprune.plan(model, x, ratio=0.5)
    reg = GrowingReg(graph, model, plan, delta=0.05, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (0 * model(x).sum()).backward()
        reg.step()
        optimizer.step()
    model.eval()
    torch.testing.assert_close(plan.apply(model)(x), model(x), rtol=1e-6, atol=1e-6)


def test_only_parameters_with_gradients_and_only_this_model() -> None:
    model, graph, x = made("convolutional")
    twin = copy.deepcopy(model)
    twin.get_parameter("stem.weight").requires_grad_(False)
    reg = GroupNorm(graph, twin)  # the graph may be that of a copy
    twin(x).sum().backward()
    reg.step()
    assert twin.get_parameter("stem.weight").grad is None
    assert all(p.grad is None for p in model.parameters())
    pruned = fxprune.prune(model, x)
    with pytest.raises(TrainingError, match=r"'stem.weight' of shape \(8, 3, 3, 3\), the model has shape"):
        GroupNorm(graph, pruned)
    with pytest.raises(TrainingError, match="the model has no such parameter"):
        GroupNorm(graph, Attending())
    with pytest.raises(PlanError, match="Plan again"):
        GrowingReg(fxprune.analyze(pruned, x), pruned, fxprune.plan(model, x))
    sparse = nn.Sequential(nn.Embedding(5, 6, sparse=True), nn.Linear(6, 2))
    words = torch.tensor([[1, 2]])
    reg = GroupNorm(fxprune.analyze(sparse, words), sparse)
    sparse(words).sum().backward()
    with pytest.raises(TrainingError, match=r"'0.weight' is sparse"):
        reg.step()


def test_wrong_use() -> None:
    """Before the backward pass there is nothing to add to; a negative strength would feed the units."""
    model, graph, _ = made("convolutional")
    for reg in (GroupNorm(graph, model), BNScale(graph, model), GrowingReg(graph, model)):
        with pytest.raises(TrainingError, match=r"no parameter has a gradient .* after loss.backward\(\)"):
            reg.step()
    with pytest.raises(TrainingError, match=r"GroupNorm takes what fxprune.analyze\(.* got Conv.* and Coup"):
        GroupNorm(model, graph)
    for make in (
        lambda: GroupNorm(graph, model, strength=-1),
        lambda: BNScale(graph, model, strength=float("nan")),
        lambda: GrowingReg(graph, model, delta=-1e-4),
    ):
        with pytest.raises(TrainingError, match="is a number from 0 on"):
            make()
