"""Compiled, data parallel and other wrapped models are captured by the first rungs; TorchScript is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import fxprune
from fxprune.errors import CaptureError


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16, momentum=None),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(16, 4, 1),
    )


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    for module in [model, *model.children()]:
        module.compile(backend="eager")
    return model


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file: Path = tmp_path_factory.mktemp("distributed") / "store"
    distributed.init_process_group("gloo", init_method=file.as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "distributed, compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled, distributed": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled part": lambda model: nn.Sequential(compiled(model), nn.Identity()),
    "compiled layers": lambda model: nn.Sequential(*map(compiled, model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_captured_by_the_first_rung(name: str, one_process: None) -> None:
    plain, x = net().eval(), torch.randn(2, 3, 8, 8)
    model = WRAPPERS[name](plain).eval()
    graph = fxprune.analyze(model, x)
    assert graph.captured.rung == "symbolic tracing"
    pruned = fxprune.prune(model, x, ratio=0.5)
    want = fxprune.prune(net_like(plain), x, ratio=0.5)
    assert list(pruned.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(pruned(x), want(x))
    assert fxprune.verify(model, pruned, pruned.meta["fxprune"], x).exact


def net_like(plain: nn.Module) -> nn.Module:
    """The same weights, never wrapped."""
    twin = net().eval()
    twin.load_state_dict(plain.state_dict())
    return twin


@pytest.mark.parametrize("name", ["compiled", "compiled in place", "distributed, compiled"])
def test_the_rung_is_the_same_after_a_run(name: str, one_process: None) -> None:
    model, x = WRAPPERS[name](nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))), torch.randn(3, 4)
    before = fxprune.analyze(model, x)
    model(x)
    after = fxprune.analyze(model, x)
    assert (before.captured.rung, before.captured.class_name) == ("symbolic tracing", "Sequential")
    assert after.captured.rung == before.captured.rung
    assert str(after.captured.program.graph) == str(before.captured.program.graph)


def test_a_result_does_not_run_what_was_compiled_in_place() -> None:
    """A layer's ``compile()`` leaves a function that runs that very layer."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    compiled_in_place(model)
    model(x)
    pruned = fxprune.prune(model, x, ratio=0.0)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert pruned(x).abs().max() == 0
    assert model(x).abs().max() > 0


def test_a_function_that_holds_on_to_the_model_is_followed() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.5)
            self.block = lambda x: self.b(self.drop(self.a(x)).relu()) * self.a.bias.sum()

        def forward(self, x: Tensor) -> Any:
            return x + self.block(x)

    class Exported(Held):
        def forward(self, x: Tensor) -> Any:
            if not issubclass(x.__class__, Tensor):
                raise TypeError("no tensor")
            return x + self.b(torch.relu(self.block(x) @ self.a.weight.T))

    x = torch.randn(3, 4)
    for kind, rung in ((Held, "symbolic tracing"), (Exported, "torch.export")):
        model = kind().eval()
        graph = fxprune.analyze(model, x)
        assert graph.captured.rung == rung
        assert not graph.captured.program.extras
        pruned = fxprune.prune(model, x, ratio=0.0)
        torch.testing.assert_close(pruned(x), model(x))
        assert {name for name, _ in pruned.named_parameters()} == {
            name for name, _ in model.named_parameters()
        }


def lora(**options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    inner = nn.Sequential()
    inner.up, inner.act, inner.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
    return peft.get_peft_model(inner, peft.LoraConfig(r=4, target_modules=["up", "down"], **options))


def lightning() -> nn.Module:
    kind: Any = pytest.importorskip("lightning").LightningModule

    class Lit(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

    return Lit()


def fabric() -> nn.Module:
    kind: Any = pytest.importorskip("lightning.fabric").Fabric
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    return kind(accelerator="cpu", devices=1).setup_module(model)


@pytest.mark.parametrize("make", [lora, lightning, fabric])
def test_wrappers_of_other_libraries(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, 8)
    graph = fxprune.analyze(model, x)
    assert graph.captured.rung.startswith("symbolic tracing")
    pruned = fxprune.prune(model, x, ratio=0.5)
    assert [n for n, _ in pruned.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert sum(p.numel() for p in pruned.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert fxprune.verify(model, pruned, pruned.meta["fxprune"], x).exact


# -- TorchScript ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["plain", "wrapped"])
@pytest.mark.parametrize("by", ["script", "trace"])
def test_torchscript_is_refused_with_advice(by: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(2, 4)
    plain = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    script = torch.jit.script(plain) if by == "script" else torch.jit.trace(plain, x)
    with pytest.raises(CaptureError, match=r"this Sequential is a TorchScript module .*made from"):
        fxprune.analyze(wrap(script), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["script", "trace"])
def test_what_is_around_a_torchscript_part_narrows(by: str) -> None:
    x = torch.randn(2, 4)
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    script = torch.jit.script(part) if by == "script" else torch.jit.trace(part, x)
    model = nn.Sequential(script, nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))).eval()
    pruned = fxprune.prune(model, x, ratio=0.5)
    assert pruned.get_parameter("1.0.weight").shape == (8, 4)
    assert pruned(x).shape == (2, 2)


# -- statistics of what torch.export captured -----------------------------------------------------------


class Exported(nn.Module):
    def __init__(self, norm: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 12), norm, drop, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        if not issubclass(x.__class__, Tensor):
            raise TypeError("no tensor")
        return self.b(self.drop(self.norm(self.a(x)).relu()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(12),
        nn.BatchNorm1d(12, momentum=None),
        nn.BatchNorm1d(12, affine=False, momentum=0.3),
        nn.BatchNorm1d(12, track_running_stats=False),
    ],
    ids=str,
)
def test_batch_norms_that_torch_export_captured_go_on_as_they_were(norm: nn.Module, training: bool) -> None:
    model = Exported(copy.deepcopy(norm), nn.Dropout(0.5)).train(training)
    x = torch.randn(5, 6)
    graph = fxprune.analyze(model, x)
    average = training and norm.momentum is None  # over a number of batches that torch.export does not know
    assert graph.captured.rung == ("regions" if average else "torch.export")
    pruned = fxprune.prune(model, x, ratio=0.0)
    for mode in (True, True, False, True):
        model.train(mode), pruned.train(mode)
        for network in (model, pruned):
            torch.manual_seed(0)
            network.out = network(x + 1)
        torch.testing.assert_close(pruned.out, model.out)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(pruned.get_buffer(name), buffer)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norms_that_average_over_all_batches(training: bool) -> None:
    """``momentum=None``, traced symbolically, in both modes."""
    model, x = net().train(training), torch.randn(4, 3, 8, 8)
    pruned = fxprune.prune(model, x, ratio=0.5).train()
    (layer,) = (m for m in pruned.modules() if isinstance(m, nn.BatchNorm2d))
    before = int(layer.num_batches_tracked)
    pruned(x), pruned(x)
    assert int(layer.num_batches_tracked) == before + 2
    assert pruned.get_parameter("0.weight").shape[0] == 8
