"""Masks, the state of optimisers, averages and learning-rate schedules: training goes on after narrowing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import difference, masked, snapshot, stir
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune
from fxprune.api import graph_for
from fxprune.errors import PlanError, TrainingError


class Convolutional(nn.Module):
    """Residual, batch norm, grouped and depthwise convolutions; a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(torch.sigmoid(self.deep(x)))  # not zero where its input is
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Attending(nn.Module):
    """A tied embedding, and heads by views of literals, of which each chooses its own dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        )
        return self.head(x + self.outer(torch.relu(self.inner(x))))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional": (Convolutional, lambda: torch.randn(4, 3, 8, 8, dtype=torch.float64)),
    "attending": (Attending, lambda: torch.randint(0, 11, (4, 5))),
}
every_net = pytest.mark.parametrize("name", NETS)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5),
}


def made(name: str) -> tuple[nn.Module, list[Tensor], fxprune.PruningPlan]:
    build, inputs = NETS[name]
    model = stir(build()).double().train()
    batches = [inputs() for _ in range(4)]
    return model, batches, fxprune.plan(model, batches[0], ratio=0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], steps: int = 10) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        out = model(batches[step % len(batches)])
        (out.tanh() - 0.3 * torch.arange(out.shape[-1])).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> float:
    return difference(dict(a.named_parameters()), dict(b.named_parameters()))


# -- masks ----------------------------------------------------------------------------------------


@every_net
def test_mask_holds_what_the_plan_removes(name: str) -> None:
    """The masked copy equals the one masked by hand, and shares nothing with the model."""
    model, batches, plan = made(name)
    before = snapshot(model)
    twin = plan.mask(model)
    assert snapshot(model) == before
    assert type(twin) is type(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    by_hand = masked(model, graph_for(plan, model), plan)
    assert same(twin, by_hand) == 0
    assert difference(twin.eval()(batches[0]), by_hand.eval()(batches[0])) == 0
    for entry, alive in plan.masks(model).items():
        parameter = model.get_parameter(entry)
        assert alive.shape == parameter.shape
        assert torch.equal(by_hand.get_parameter(entry), parameter * alive)
        assert not alive.all()
    assert "head.weight" in plan.masks(model)


@every_net
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_masked_training_then_narrowing(name: str, rule: str) -> None:
    """Trained under masks and narrowed, a network computes what it did before it was narrowed."""
    model, batches, plan = made(name)
    twin = plan.mask(model)
    train(twin, OPTIMIZERS[rule](twin.parameters()), batches)
    for entry, alive in plan.masks(model).items():
        parameter = twin.get_parameter(entry)
        assert not parameter[~alive].any()
        assert not parameter.grad[~alive].any()
    pruned = plan.apply(twin)
    assert same(twin, model) > 0.01, "nothing was learned"
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in twin.parameters())
    assert difference(pruned.eval()(batches[0]), twin.eval()(batches[0])) < 1e-12


@pytest.mark.parametrize("carry", ["deepcopy", "pickle", "save"])
def test_masks_survive_copies_and_loaded_weights(carry: str) -> None:
    model, batches, plan = made("attending")
    twin = plan.mask(model)
    if carry == "deepcopy":
        twin = copy.deepcopy(twin)
    elif carry == "pickle":
        twin = pickle.loads(pickle.dumps(twin))
    else:
        buffer = io.BytesIO()
        torch.save(twin, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    twin.load_state_dict(model.state_dict())
    train(twin, OPTIMIZERS["sgd"](twin.parameters()), batches, 3)
    for entry, alive in plan.masks(model).items():
        assert not twin.get_parameter(entry)[~alive].any()
        assert not twin.get_parameter(entry).grad[~alive].any()


def test_mask_of_a_pruned_network_and_of_frozen_parameters() -> None:
    """A GraphModule is masked like any model; two forward passes may precede a backward pass."""
    model, batches, plan = made("convolutional")
    pruned = plan.apply(model)
    pruned.stem.weight.requires_grad_(False)
    again = fxprune.plan(pruned, batches[0], ratio=0.5)
    twin = again.mask(pruned)
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        copied.load_state_dict(pruned.state_dict())
        copied(batches[0])
        assert not copied.stem.weight[~again.masks(pruned)["stem.weight"]].any()
    (twin(batches[0]).sum() + twin(batches[1]).sum()).backward()
    assert twin.stem.weight.grad is None
    twin.stem.weight.requires_grad_(True)
    twin(batches[0]).sum().backward()
    assert not twin.stem.weight.grad[~again.masks(pruned)["stem.weight"]].any()
    assert twin.stem.weight.grad.any()
    assert difference(again.apply(twin).eval()(batches[0]), twin.eval()(batches[0])) < 1e-12


# -- optimisers -----------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_training_goes_on_after_narrowing(name: str, rule: str) -> None:
    """Ten steps of the narrowed network are ten steps of the masked one, with the past carried over."""
    model, batches, plan = made(name)
    optimizer = OPTIMIZERS[rule](model.parameters())
    train(model, optimizer, batches)
    before = snapshot(model)[0], copy.deepcopy(optimizer.state_dict())

    pruned = plan.apply(model)
    narrowed = plan.apply_to_optimizer(optimizer, model, pruned)
    assert type(narrowed) is type(optimizer)
    fresh = plan.apply(model)
    train(pruned, narrowed, batches)
    train(fresh, OPTIMIZERS[rule](fresh.parameters()), batches)

    assert difference(optimizer.state_dict(), before[1]) == 0
    assert [entry[5] for entry in snapshot(model)[0].values()] == [entry[5] for entry in before[0].values()]

    twin = plan.mask(model)
    going_on = OPTIMIZERS[rule](twin.parameters())
    going_on.load_state_dict(optimizer.state_dict())
    train(twin, going_on, batches)
    assert same(plan.apply(twin), pruned) < 1e-10
    assert same(fresh, pruned) > 1e-4, "the state made no difference"


def test_parameter_groups_and_settings_are_kept() -> None:
    model, batches, plan = made("convolutional")
    head = {id(p) for p in model.head.parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) not in head], "lr": 0.03},
            {"params": model.head.parameters(), "weight_decay": 0.0, "betas": (0.5, 0.9)},
        ],
        lr=torch.tensor(0.01),
    )
    train(model, optimizer, batches, 2)
    pruned = plan.apply(model)
    narrowed = plan.apply_to_optimizer(optimizer, model, pruned)
    for old, new in zip(optimizer.param_groups, narrowed.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }
    assert narrowed.param_groups[1]["lr"] is not optimizer.param_groups[1]["lr"]
    assert {id(p) for g in narrowed.param_groups for p in g["params"]} == {id(p) for p in pruned.parameters()}
    assert narrowed.defaults == optimizer.defaults
    narrowed.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "schedule", [torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.CosineAnnealingLR]
)
def test_learning_rate_schedule_goes_on(schedule: Any) -> None:
    model, _, plan = made("convolutional")
    rates = []
    for narrow in (False, True):
        model = copy.deepcopy(model)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        scheduler = schedule(optimizer, 3)
        rates.append([])
        for step in range(8):
            if narrow and step == 4:
                pruned = plan.apply(model)
                optimizer = plan.apply_to_optimizer(optimizer, model, pruned)
                scheduler.optimizer = optimizer
            optimizer.step()
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2


def test_optimizers_that_cannot_be_narrowed() -> None:
    model, batches, plan = made("convolutional")
    pruned = plan.apply(model)
    with pytest.raises(TrainingError, match=r"expected a torch.optim.Optimizer first, got Convolutional"):
        plan.apply_to_optimizer(model, model, pruned)  # type: ignore[type-var]
    factored = torch.optim.Adafactor(model.parameters())
    train(model, factored, batches, 1)
    with pytest.raises(TrainingError, match=r"'row_var' that Adafactor keeps for 'stem.weight' has shape"):
        plan.apply_to_optimizer(factored, model, pruned)
    with pytest.raises(TrainingError, match="LBFGS keeps tensors in its attribute '_params'"):
        plan.apply_to_optimizer(torch.optim.LBFGS(model.parameters()), model, pruned)
    sgd = OPTIMIZERS["sgd"](pruned.parameters())
    with pytest.raises(
        TrainingError, match=r"entry 0 of the optimiser's parameter group 0.*no parameter of the model"
    ):
        plan.apply_to_optimizer(sgd, model, pruned)
    sgd = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(TrainingError, match="the pruned model has shape"):
        plan.apply_to_optimizer(sgd, model, model)
    sgd.state[model.head.weight]["history"] = [torch.zeros(2)]
    with pytest.raises(TrainingError, match="is a list of tensors"):
        plan.apply_to_optimizer(sgd, model, pruned)


# -- averages -------------------------------------------------------------------------------------


def test_moving_average_goes_on() -> None:
    model, batches, plan = made("convolutional")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on(model: nn.Module, optimizer: torch.optim.Optimizer, ema: AveragedModel) -> None:
        for _ in range(3):
            train(model, optimizer, batches, 2)
            ema.update_parameters(model)

    on(model, optimizer, ema)
    pruned, twin = plan.apply(model), plan.mask(model)
    narrowed = AveragedModel(pruned, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    narrowed.module.load_state_dict(plan.apply_state_dict(ema.module.state_dict(), model))
    narrowed.n_averaged.copy_(ema.n_averaged)
    on(pruned, plan.apply_to_optimizer(optimizer, model, pruned), narrowed)

    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.module.load_state_dict(ema.module.state_dict())
    averaged.n_averaged.copy_(ema.n_averaged)
    going_on = OPTIMIZERS["sgd"](twin.parameters())
    going_on.load_state_dict(optimizer.state_dict())
    on(twin, going_on, averaged)
    wanted = plan.apply_state_dict(averaged.module.state_dict(), model)
    assert difference(narrowed.module.state_dict(), wanted) < 1e-12


def test_state_dict_narrows_as_the_model_does() -> None:
    model, _, plan = made("attending")
    state = plan.apply_state_dict(model.state_dict(), model)
    pruned = plan.apply(model)
    assert list(state) == list(pruned.state_dict())
    assert all(torch.equal(state[key], value) for key, value in pruned.state_dict().items())
    assert state["out.bias"].data_ptr() != model.out.bias.data_ptr()
    alone = plan.apply_state_dict(model.state_dict())
    assert all(torch.equal(alone[key], value) for key, value in state.items())
    loaded = fxprune.PruningPlan.from_json(plan.to_json())
    with pytest.raises(PlanError, match="read from a file, or its model is gone"):
        loaded.apply_state_dict(model.state_dict())
    with pytest.raises(PlanError, match=r"'heads.weight'.*nearest names are head.weight"):
        plan.apply_state_dict({"heads.weight": torch.zeros(1)}, model)
    with pytest.raises(PlanError, match=r"'out.bias' has shape \(3,\) in the state dict and \(8,\)"):
        plan.apply_state_dict({"out.bias": torch.zeros(3)}, model)


def test_masked_models_narrow_however_they_are_captured() -> None:
    """By regions, where the result is of the model's own type, and by export; no mask is left in it."""

    class Looping(nn.Module):
        """Control flow on values around two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            while y.sum() > 0:
                y = y - 1
            return y

    class Strict(nn.Module):
        """A check that no symbolic value passes."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            assert issubclass(x.__class__, Tensor)
            return self.body(x)

    x = torch.randn(2, 4, dtype=torch.float64)
    rungs = set()
    for model in (Looping(), Strict()):
        stir(model).double()
        plan = fxprune.plan(model, x, ratio=0.5)
        twin = plan.mask(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        train(twin, optimizer, [x], 3)
        pruned = plan.apply(twin)
        assert pruned.get_parameter("body.0.weight").shape == (6, 4)
        with torch.no_grad():
            assert difference(pruned(x), twin(x)) < 1e-12
        assert not pruned._forward_pre_hooks
        narrowed = plan.apply_to_optimizer(optimizer, twin, pruned)
        train(twin, optimizer, [x], 10)
        train(pruned, narrowed, [x], 10)
        assert same(plan.apply(twin), pruned) < 1e-12
        rungs.add(fxprune.analyze(model, x).captured.rung)
    assert rungs == {"regions", "torch.export"}


def test_the_former_name_names_the_new_one() -> None:
    plan = fxprune.plan(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4))
    with pytest.raises(AttributeError, match="apply_state_dict"):
        _ = plan.narrow_state_dict  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = plan.aply  # type: ignore[attr-defined]
