"""Criteria that run the model: against plain autograd and plain hooks, and without a trace."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from test_importance import both, build, by_entry, close, detached, entries, joined, scores
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import ImportanceError
from fxprune.importance import (
    KFAC,
    SNIP,
    Activation,
    Fisher,
    Hessian,
    SynFlow,
    Taylor,
    Wanda,
    supervised,
)
from fxprune.importance.gradient import _signs
from fxprune.importance.products import Products, Site

Batch = tuple[Tensor, Tensor]


def batches(x: Tensor, classes: int, count: int = 3) -> list[Batch]:
    """Batches like ``x``, one of them smaller, with targets."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        size = x.shape[0] + (number > 0)
        inputs = torch.randn((size, *x.shape[1:]), generator=generator)
        found.append((inputs, torch.randint(0, classes, (size,), generator=generator)))
    return found


def case(name: str) -> tuple[nn.Module, Tensor, list[Batch]]:
    """A net, an example input, and data."""
    model, x = build(name)
    return model, x, batches(x, 5 if name == "residual" else 3)


def first(model: nn.Module, batch: Batch) -> Any:
    """Run a model on the inputs of a pair."""
    return model(batch[0])


def gradients(model: nn.Module, data: list[Batch]) -> list[dict[str, Tensor]]:
    """Gradients for each batch, by ``backward`` on a copy."""
    found = []
    for inputs, target in data:
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(inputs), target).backward()
        found.append({name: p.grad.clone() for name, p in twin.named_parameters()})
    return found


# -- derivatives ----------------------------------------------------------------------------------


@both
def test_taylor(name: str) -> None:
    """``|w g|`` summed over entries, or summed with signs at each index; means over batches."""
    model, x, data = case(name)
    weights, each = detached(model), gradients(model, data)
    graph = fxprune.analyze(model, x)

    def size(n: str, place: tuple[int, ...]) -> float:
        return sum(abs(float(weights[n][place] * g[n][place])) for g in each) / len(each)

    alone = by_entry(graph, size)
    close(scores(model, x, Taylor(F.cross_entropy, data)), {g: joined(m, "sum") for g, m in alone.items()})
    together = {}
    for group in graph:
        members: dict[str, list[float]] = {}
        for member in group.members:
            if member.trainable:
                at_index: dict[Any, float] = defaultdict(float)
                for number, gradient in enumerate(each):
                    product = weights[member.axis.name] * gradient[member.axis.name]
                    for unit, place in entries(member):
                        index = tuple(place[d] for d in (*member.over, member.axis.dim))
                        at_index[unit, index, number] += float(product[place])
                sums: dict[int, float] = defaultdict(float)
                for (unit, _, _), value in at_index.items():
                    sums[unit] += abs(value) / len(each)
                members[str(member.axis)] = [sums.get(u, math.nan) for u in range(group.size)]
        together[group.name] = joined(members, "max")
    criterion = Taylor(F.cross_entropy, data, joint=True, reduce="max")
    close(scores(model, x, criterion), together, rtol=1e-4)


@both
def test_fisher_and_snip(name: str) -> None:
    """Squares of the gradients of batches; shares of the sensitivity."""
    model, x, data = case(name)
    weights, each = detached(model), gradients(model, data)
    graph = fxprune.analyze(model, x)

    def saliency(n: str, place: tuple[int, ...]) -> float:
        squares = [float(g[n][place]) ** 2 for g in each]
        return float(weights[n][place]) ** 2 / 2 * sum(squares) / len(squares)

    wanted = {g: joined(m, "sum") for g, m in by_entry(graph, saliency).items()}
    close(scores(model, x, Fisher(nn.CrossEntropyLoss(), data)), wanted)
    sensitivity = {n: (w * sum(g[n] for g in each) / len(each)).abs() for n, w in weights.items()}
    total = sum(float(value.sum()) for value in sensitivity.values())
    shares = by_entry(graph, lambda n, place: float(sensitivity[n][place]) / total)
    wanted = {g: joined(m, "mean") for g, m in shares.items()}
    close(scores(model, x, SNIP(F.cross_entropy, data, reduce="mean")), wanted)


class Tiny(nn.Module):
    """Few enough parameters for a whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def whole_hessian(model: nn.Module, data: list[Batch]) -> tuple[Tensor, Tensor]:
    """Mean Hessian of the loss over batches and the weights, flat, by ``torch.func``."""
    names = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in names.values()])

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in names.values()])
        parameters = {n: piece.view(p.shape) for (n, p), piece in zip(names.items(), pieces, strict=True)}
        values = [F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y) for x, y in data]
        return torch.stack(values).mean()

    return torch.func.hessian(loss)(flat), flat


def test_hessian() -> None:
    """The diagonal's estimate is that of the whole Hessian with the drawn vectors of signs."""
    model = Tiny().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    data = [(inputs.double(), target) for inputs, target in batches(x, 2)]
    hessian, flat = whole_hessian(model, data)

    def wanted(diagonal: Tensor) -> dict[str, Any]:
        pieces = (flat**2 / 2 * diagonal).split([p.numel() for p in model.parameters()])
        named = dict(zip(dict(model.named_parameters()), pieces, strict=True))
        shaped = {n: named[n].view(p.shape) for n, p in model.named_parameters()}
        sums = by_entry(fxprune.analyze(model, x), lambda n, place: float(shaped[n][place]))
        return {g: joined(m, "sum") for g, m in sums.items()}

    generator = torch.Generator().manual_seed(7)
    vectors = [torch.cat([_signs(p, generator).reshape(-1) for p in model.parameters()]) for _ in range(3)]
    drawn = [signs * (hessian @ signs) for signs in vectors]
    got = scores(model, x, Hessian(F.cross_entropy, data, samples=3), seed=7)
    close(got, wanted(torch.stack(drawn).mean(0)), rtol=1e-8)
    assert all(set(signs.abs().tolist()) == {1.0} for signs in vectors)
    assert len({tuple(signs.tolist()) for signs in vectors}) == 3


def test_hessian_exact_where_diagonal() -> None:
    """One vector is enough; a linear loss has none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def cubes(model: nn.Module, batch: Any) -> Tensor:
        return sum(((p**3) / 6 * batch).sum() for p in model.parameters())

    weights = detached(model)
    sums = by_entry(fxprune.analyze(model, torch.zeros(1, 3)), lambda n, place: float(weights[n][place]) ** 3)
    wanted = {g: [1.5 * v for v in joined(m, "sum")] for g, m in sums.items()}
    close(scores(model, torch.zeros(1, 3), Hessian(cubes, [2.0, 4.0], samples=1)), wanted, rtol=1e-4)

    def linear(model: nn.Module, batch: Any) -> Tensor:
        return sum(p.sum() for p in model.parameters())

    assert not scores(model, torch.zeros(1, 3), Hessian(linear, [0]))["0.weight[0]"].any()


def test_synflow() -> None:
    """All weights positive, on ones."""
    model, x = build("residual")
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.abs_()
    twin(torch.ones_like(x).double()).sum().backward()
    flow = {n: p.detach() * p.grad for n, p in twin.named_parameters()}
    sums = by_entry(fxprune.analyze(model, x), lambda n, place: float(flow[n][place]))
    close(scores(model, x, SynFlow()), {g: joined(m, "sum") for g, m in sums.items()}, rtol=1e-8)


# -- activations ----------------------------------------------------------------------------------


def observed(
    model: nn.Module, data: list[Batch]
) -> dict[str, tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]]:
    """By weight: inputs, outputs, derivatives by both, ``(positions, channels)``; by module hooks."""
    found: dict[str, Any] = {}
    twin = copy.deepcopy(model)

    def flat(value: Tensor) -> Tensor:
        value = value.detach().double()
        return value.movedim(1, -1).flatten(0, -2) if value.dim() == 4 else value.flatten(0, -2)

    for path, module in twin.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            store = found.setdefault(f"{path}.weight", ([], [], [], []))

            def forward(module: nn.Module, inputs: Any, output: Tensor, store: Any = store) -> None:
                store[0].append(flat(inputs[0]))
                store[1].append(flat(output))
                output.register_hook(lambda g: store[2].append(flat(g)))

                def backward(gradient: Tensor) -> None:
                    with torch.enable_grad():
                        value = inputs[0].detach().clone().requires_grad_()
                        again = type(module).forward(module, value)
                    store[3].append(flat(torch.autograd.grad(again, value, gradient)[0]))

                output.register_hook(backward)

            module.register_forward_hook(forward)
    for inputs, target in data:
        F.cross_entropy(twin(inputs), target).backward()
    return found


def channel_of(name: str, model: nn.Module, place: tuple[int, ...]) -> int:
    """Input channel that an entry of a weight is multiplied with."""
    module = model.get_submodule(name.removesuffix(".weight"))
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return place[0] // (module.out_channels // module.groups) * place_width(module) + place[1]
    return place[1]


def place_width(module: nn.Conv2d) -> int:
    """Input channels of a group."""
    return module.in_channels // module.groups


@both
def test_wanda(name: str) -> None:
    """``|w|`` times the root mean square of what it is multiplied with."""
    model, x, data = case(name)
    weights, seen = detached(model), observed(model, data)
    norms = {n: torch.cat(inputs).square().mean(0).sqrt() for n, (inputs, _, _, _) in seen.items()}

    def product(n: str, place: tuple[int, ...]) -> float:
        return (
            abs(float(weights[n][place])) * float(norms[n][channel_of(n, model, place)])
            if n in norms
            else math.nan
        )

    sums = by_entry(fxprune.analyze(model, x), product)
    close(scores(model, x, Wanda(data, first)), {g: joined(m, "sum") for g, m in sums.items()})


def by_channel(model: nn.Module, x: Tensor, number: Callable[[str, bool, int], float]) -> dict[str, Any]:
    """For each group and member the numbers of the channels of each unit."""
    found: dict[str, Any] = {}
    for group in fxprune.analyze(model, x):
        for member in group.members:
            weight = member.axis.name
            if not weight.endswith(".weight") or member.tensor.dim() < 2:
                continue
            units: dict[int, dict[tuple[bool, int], float]] = defaultdict(dict)
            for index in np.ndindex(*member.units.shape):
                unit = int(member.units[index])
                if unit >= 0:
                    inner = member.axis.dim == 1
                    place = (*index, 0) if member.over else (0, *index) if inner else (*index, 0)
                    channel = channel_of(weight, model, place) if inner else index[-1]
                    units[unit][inner, channel] = number(weight, inner, channel)
            side = found.setdefault(group.name, {}).setdefault(member.axis.dim == 1, {})
            side[str(member.axis)] = [list(units[u].values()) for u in range(group.size)]
    return found


@both
@pytest.mark.parametrize("statistic", ["magnitude", "variance"])
def test_activation(name: str, statistic: str) -> None:
    """Where a unit is consumed; where it is produced if it is not."""
    model, x, data = case(name)
    seen = observed(model, data)

    def number(weight: str, inner: bool, channel: int) -> float:
        values = torch.cat(seen[weight][0 if inner else 1])[:, channel]
        return float(values.abs().mean() if statistic == "magnitude" else values.var(correction=0))

    wanted = {}
    for group, sides in by_channel(model, x, number).items():
        members = {
            inner: {axis: [sum(v) / len(v) if v else math.nan for v in units] for axis, units in side.items()}
            for inner, side in sides.items()
        }
        wanted[group] = []
        for unit in range(len(next(iter(members[False].values())))):
            for inner in (True, False):
                values = [units[unit] for units in members[inner].values() if not math.isnan(units[unit])]
                if values:
                    wanted[group].append(sum(values) / len(values))
                    break
    close(scores(model, x, Activation(data, first, statistic=statistic)), wanted)


@both
def test_kfac(name: str) -> None:
    """Second moments of activations times those of derivatives."""
    model, x, data = case(name)
    seen = observed(model, data)
    biases = detached(model)

    def number(weight: str, inner: bool, channel: int) -> float:
        inputs, outputs, by_output, by_input = seen[weight]
        values = torch.cat(inputs if inner else outputs)[:, channel]
        if not inner:
            values = values - float(biases.get(weight.replace("weight", "bias"), torch.zeros(99))[channel])
        squares = torch.cat(by_input if inner else by_output)[:, channel].square().sum()
        return float(values.square().mean() * squares / len(data) / 2)

    wanted = {}
    for group, sides in by_channel(model, x, number).items():
        members = {
            axis: [sum(v) if v else math.nan for v in units]
            for side in sides.values()
            for axis, units in side.items()
        }
        wanted[group] = joined(members, "sum")
    close(scores(model, x, KFAC(F.cross_entropy, data)), wanted, rtol=1e-4)


class Odd(nn.Module):
    """Weights that no module holds: transposed, sliced, batched; einsum and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(6, 4))
        self.packed = nn.Parameter(torch.randn(12, 6))
        self.experts = nn.Parameter(torch.randn(2, 4, 5))
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.last = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x @ self.plain.t())
        a, b, c = self.packed.chunk(3)
        x = F.linear(x, a) + F.linear(x * 2, b) + F.linear(x * 3, c)
        x = torch.bmm(x.expand(2, *x.shape), self.experts).sum(0)
        x = self.up(x[:, :4, None]).mean(-1)
        return torch.einsum("of,bf->bo", self.last, x)


def sites(model: nn.Module, x: Tensor, autocast: bool = False) -> list[tuple[Site, Tensor, Tensor]]:
    """What a run comes to."""
    found = []

    def see(site: Site, value: Tensor, output: Tensor, bias: Any) -> None:
        found.append((site, value.clone(), output if bias is None else output - bias))

    with Products(model, see), torch.autocast("cpu", enabled=autocast):
        model(x)
    return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_every_product_is_seen(grad: bool, autocast: bool) -> None:
    """Each with the part of the parameter that took part; recomputing it gives the output."""
    model = Odd()
    with torch.set_grad_enabled(grad):
        found = sites(model, torch.randn(3, 4), autocast)
    names = [site.name for site, _, _ in found]
    assert names == ["plain", "packed", "packed", "packed", "experts", "up.weight", "last"]
    weights = detached(model)
    starts = []
    for site, value, output in found:
        folded, wanted = site.folded(value), site.folded(output)
        part = weights[site.name][site.region]
        starts.append(site.region[0].start)
        if site.groups > 1:
            got = torch.einsum("gip,giok->gop", folded, part.view(2, 2, 3, 2)[..., :1])
            wanted = wanted[..., ::2]
        elif site.rows is not None:
            got = torch.einsum("eip,eio->eop", folded, part)
        else:
            matrix = part if site.outer == 0 else part.t()
            got = (matrix @ folded[0])[None]
        torch.testing.assert_close(
            got, wanted, rtol=0.1 if autocast else 1e-4, atol=0.2 if autocast else 1e-4
        )
    assert starts == [0, 0, 4, 8, 0, 0, 0]


def test_parts_of_a_parameter() -> None:
    """Rows of a packed projection have their own inputs; a plan can be made from them."""
    model, x = Odd(), torch.randn(3, 4)
    got = scores(model, x, Wanda([x]))
    with torch.no_grad():
        hidden = torch.relu(x @ model.plain.t())
        norm = hidden.square().mean(0).sqrt()
        weights = model.packed.abs().view(3, 4, 6) * torch.tensor([1.0, 2, 3]).view(3, 1, 1)
        wanted = weights.sum((0, 1)) * norm + (model.plain.abs() * x.square().mean(0).sqrt()).sum(1)
    np.testing.assert_allclose(got["plain[0]"], wanted, rtol=1e-5)
    for criterion in (Activation([x]), KFAC(lambda model, batch: model(batch).square().mean(), [x])):
        assert fxprune.plan(model, x, importance=criterion).removed


def test_recurrent_layers() -> None:
    """They dissolve into products; every weight is seen."""
    model = nn.LSTM(3, 4, batch_first=True)
    assert {site.name for site, _, _ in sites(model, torch.randn(2, 5, 3))} == {
        "weight_ih_l0",
        "weight_hh_l0",
    }


# -- no trace -------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, batch normalisation, a frozen layer, one that is in evaluation mode, and memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.two = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.one.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_tracing() and not isinstance(x, torch.fx.Proxy):
            self.calls += 1
        return self.two(self.drop(self.norm(self.one(x))))


def rude(model: nn.Module, batch: Any) -> Tensor:
    """A loss that does what it should not."""
    model.train()
    torch.rand(1)
    if batch[0].shape[0] == 1:
        raise LookupError("mine")
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("kind", [Taylor, Fisher, Hessian, SNIP, KFAC, Wanda, Activation])
def test_no_trace(kind: Any, raises: bool) -> None:
    """Modes, buffers, gradients, flags, hooks, and random generators are what they were."""
    model = Noisy()
    data = batches(torch.zeros(4, 4), 3, 2) + ([(torch.zeros(1, 4), torch.zeros(1).long())] if raises else [])
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    held = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: None if g is None else g.clone() for name, g in held.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    arguments = (data, rude) if kind in (Wanda, Activation) else (rude, data)
    if kind in (Wanda, Activation):
        arguments = (data, lambda model, batch: rude_forward(model, batch))
    if raises:
        with pytest.raises(LookupError, match="mine"):
            fxprune.plan(model, torch.zeros(2, 4), importance=kind(*arguments))
    else:
        fxprune.plan(model, torch.zeros(2, 4), importance=kind(*arguments))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {n: (p.requires_grad, p.data_ptr(), p._version) for n, p in model.named_parameters()} == flags
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is held[name]
        assert parameter.grad is None or torch.equal(parameter.grad, copies[name])
    for module in model.modules():
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(module, table)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert gc.isenabled()


def rude_forward(model: nn.Module, batch: Any) -> Any:
    """As :func:`rude`, without gradients."""
    model.train()
    if batch[0].shape[0] == 1:
        raise LookupError("mine")
    return model(batch[0])


def all_criteria(data: list[Any]) -> list[Any]:
    """One of each that needs data."""
    loss = F.cross_entropy
    return [
        Taylor(loss, data),
        Taylor(loss, data, joint=True),
        Fisher(loss, data),
        Hessian(loss, data, samples=1),
        SNIP(loss, data),
        KFAC(loss, data),
        Activation(data, first),
        Activation(data, first, statistic="variance"),
        Wanda(data, first),
    ]


@both
def test_half_precision_and_settings(name: str) -> None:
    """Scores in bfloat16 are near those in single precision; the plan says how it was made."""
    model, x, data = case(name)
    low = copy.deepcopy(model).bfloat16()
    low_data = [(inputs.bfloat16(), target) for inputs, target in data]
    for criterion, same in zip(all_criteria(data), all_criteria(low_data), strict=True):
        got, wanted = scores(low, x.bfloat16(), same), scores(model, x, criterion)
        for group in wanted:
            error = np.abs(got[group] - wanted[group]).max() / np.abs(wanted[group]).max()
            assert error < 0.25, (criterion, group)
        plan = fxprune.plan(model, x, importance=criterion)
        text = plan.settings["importance"]
        assert text.startswith(type(criterion).__name__)
        assert "tensor" not in text
        assert "0x" not in text
        assert fxprune.PruningPlan.from_json(plan.to_json()) == plan


def test_data_is_gone_through_once() -> None:
    """Also where the analysis is repeated because a function had to be traced into."""
    model = torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3).eval()
    nn.init.normal_(model.head.weight)
    x = torch.randn(2, 3, 16, 16)
    used = []

    def once() -> Iterator[Batch]:
        for _ in range(2):
            used.append(1)
            yield x, torch.tensor([0, 2])

    plan = fxprune.plan(model, x, importance=Taylor(F.cross_entropy, once()))
    assert plan.dissolved
    assert plan.removed
    assert len(used) == 2


# -- several processes ----------------------------------------------------------------------------


def worker(rank: int, folder: str, failing: bool) -> None:
    """One of two ranks: writes its scores, or the error."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found: list[Any] = []
    for name in ("residual", "heads"):
        model, x, data = case(name)
        own = data[:1] if rank == 0 else data[1:]
        for criterion in all_criteria(own):
            found.append(scores(model, x, criterion))
    errors = []
    model, x, data = case("heads")
    empty = Taylor(F.cross_entropy, [])
    broken = Taylor(
        lambda model, batch: rude(model, (batch[0][:1], batch[1][:1])) if rank else model(x).sum(), data
    )
    for criterion in (empty, broken):
        try:
            scores(model, x, criterion)
        except (ImportanceError, LookupError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    only_one = scores(model, x, Wanda(data if rank else [], first))
    torch.save((found, errors, only_one), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Both get the scores of all data; an error of one reaches the other."""
    multiprocessing.start_processes(worker, (str(tmp_path), False), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / str(rank), weights_only=False) for rank in (0, 1)]
    single = []
    for name in ("residual", "heads"):
        model, x, data = case(name)
        single += [scores(model, x, criterion) for criterion in all_criteria(data)]
    for one, other, alone in zip(ranks[0][0], ranks[1][0], single, strict=True):
        close(one, other, rtol=0)
        close(one, alone, rtol=1e-5)
    assert all("no batch" in errors[0] for _, errors, _ in ranks)
    assert "rank 1 failed" in ranks[0][1][1]
    assert "mine" in ranks[0][1][1]
    assert ranks[1][1][1].startswith("LookupError")
    model, x, data = case("heads")
    close(ranks[0][2], scores(model, x, Wanda(data, first)))


# -- errors ---------------------------------------------------------------------------------------

X = torch.zeros(2, 6)
Y = torch.zeros(2).long()


def foreign(model: nn.Module, batch: Any) -> Tensor:
    """The loss of another model."""
    return nn.Linear(6, 1)(X).sum()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Taylor(), ["Taylor needs data", "NoneType", "'l2'"]),
        (lambda: Taylor(F.cross_entropy), ["Taylor needs data"]),
        (lambda: Taylor(None, [X]), ["Taylor needs a loss", "loss(model, batch)", "CrossEntropyLoss"]),
        (lambda: Taylor(nn.CrossEntropyLoss, [X]), ["class CrossEntropyLoss", "CrossEntropyLoss()"]),
        (lambda: Fisher(F.cross_entropy, X), ["tensor of shape (2, 6)", "list"]),
        (lambda: Wanda({"x": X}), ["dict", "list"]),
        (lambda: Wanda(3), ["Wanda needs data", "int"]),
        (lambda: Hessian(F.cross_entropy, [X], samples=0), ["samples=0", "1 or more"]),
        (lambda: Activation([X], statistic="variances"), ["'variances'", "Did you mean 'variance'?"]),
        (lambda: "taylor", ["'taylor'", "fxprune.importance.Taylor(loss, data)"]),
        (lambda: "Wanda", ["'wanda'", "fxprune.importance.Wanda(data)"]),
        (lambda: "tailor", ["'tailor'", "Did you mean 'taylor'?"]),
        (lambda: Taylor, ["class Taylor", "fxprune.importance.Taylor(loss, data)"]),
        (lambda: Taylor(F.cross_entropy, []), ["no batch", "empty"]),
        (lambda: Taylor(F.cross_entropy, iter([])), ["no batch", "iterator"]),
        (lambda: Wanda([]), ["Wanda got no batch"]),
        (lambda: Taylor(F.cross_entropy, [X]), ["(inputs, target)", "tensor of shape (2, 6)"]),
        (lambda: Taylor(F.cross_entropy, [[[X], Y]]), ["cannot be given to the model", "list"]),
        (lambda: Taylor(lambda model, batch: model(X), [0]), ["one element", "(2, 4)", "mean"]),
        (lambda: Taylor(lambda model, batch: 1.0, [0]), ["one element", "float"]),
        (lambda: KFAC(lambda model, batch: model(X).sum().detach(), [0]), ["does not depend", "no_grad"]),
        (lambda: Taylor(foreign, [0]), ["does not depend", "another model"]),
        (
            lambda: Taylor(lambda model, batch: model(X).sum() * math.nan, [0]),
            ["NaN or infinity", "'0.weight'"],
        ),
        (lambda: Wanda([(X, Y)]), ["tuple of 2", "forward=lambda model, batch: model(batch[0])"]),
        (lambda: Wanda([X / 0]), ["Wanda met NaN or infinity", "'0.weight'"]),
    ],
)
def test_wrong_use(make: Callable[[], Any], parts: list[str]) -> None:
    """Each error says what was given, and what would do."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ImportanceError) as error:
        fxprune.plan(model, X, importance=make())
    assert all(part in str(error.value) for part in parts), error.value


def test_groups_that_are_not_measured() -> None:
    """A weight that is computed from parameters is no parameter: refused, not guessed."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.one * 2).relu(), self.two * 2)

    assert fxprune.plan(Scaled(), X).removed
    with pytest.raises(ImportanceError, match="measures no unit of Group"):
        fxprune.plan(Scaled(), X, importance=Wanda([torch.randn(3, 6)]))


def test_meta_device() -> None:
    """There are no weights to run."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    for criterion in (Wanda([X]), Taylor(F.cross_entropy, [(X, Y)]), "synflow"):
        with pytest.raises(ImportanceError, match="meta device"):
            fxprune.plan(model, X, importance=criterion)


def test_supervised() -> None:
    """A function of output and target that is not torch's own; inputs may be several."""
    model, x, data = case("heads")
    own = supervised(lambda output, target: F.cross_entropy(output, target))
    wrapped = [((inputs,), target) for inputs, target in data]
    close(scores(model, x, Taylor(own, wrapped)), scores(model, x, Taylor(F.cross_entropy, data)), rtol=0)
