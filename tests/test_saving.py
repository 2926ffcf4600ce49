"""Pruned networks as files: bit-identical when they come back, and refused where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxprune
from fxprune.errors import CheckpointError, FxpruneError, OutputError, PlanError, VerificationError

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Tensors of every kind: parameters, persistent buffers, and some that no state dict holds."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.mix = weight_norm(nn.Conv2d(width, width, 1))
        self.head = nn.Linear(width, 5)
        self.register_buffer("scale", torch.linspace(1, 2, width)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu() * self.scale
        return self.head(self.mix(x).mean((2, 3)))


class Constant(Plain):
    """A tensor that is no buffer, and a number that is computed from one: a meta model has neither."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.linspace(0, 1, 5)
        self.register_buffer("gain", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain.item() + self.shift


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.rnn, self.down = nn.Linear(8, 12), nn.LSTM(12, 6, batch_first=True), nn.Linear(6, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.rnn(self.up(self.embed(x)))[0]))


class Detector(nn.Module):
    """Captured in parts: what runs in between depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(row[row.sum(1) > row.sum(1).mean()]) for row in self.body(x).flatten(2).mT]


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "plain": (Plain, IMAGE),
    "constant": (Constant, IMAGE),
    "recurrent": (Recurrent, torch.arange(10).view(2, 5)),
    "regions": (Detector, IMAGE),
}


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return model


def same(a: nn.Module, b: nn.Module, x: Any) -> bool:
    with torch.no_grad():
        one, other = a(x), b(x)
    leaves = zip(*(t if isinstance(t, list) else [t] for t in (one, other)), strict=True)
    return all(torch.equal(u, v) for u, v in leaves)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    make, x = MODELS[name]
    pruned = fxprune.prune(seeded(make), x, 0.5)
    path = tmp_path / "narrow.safetensors"
    assert fxprune.save(pruned, path) == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["narrow.safetensors"]
    for origin in (make, seeded(make, 7)):  # a function, and a network with other weights
        loaded = fxprune.load(origin, path)
        assert same(loaded, pruned, x)
        assert list(loaded.state_dict()) == list(pruned.state_dict())
        assert not loaded.training
        assert [p.requires_grad for p in loaded.parameters()] == [
            p.requires_grad for p in pruned.parameters()
        ]
    if name == "recurrent":
        assert loaded.get_parameter("head.weight") is loaded.get_parameter("embed.weight")
    fxprune.save(loaded, path)
    assert same(fxprune.load(make, path), pruned, x)


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """Neither the original weights nor the pruned network are there."""
    expected = {}
    for name, (make, x) in MODELS.items():
        pruned = fxprune.prune(seeded(make), x, 0.5)
        fxprune.save(pruned, tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            found = pruned(x)
        rows = found if isinstance(found, list) else [found]
        expected |= {f"{name}.{i}": row.contiguous() for i, row in enumerate(rows)}
    save_file(expected, tmp_path / "expected.safetensors")
    code = f"""
        import sys, torch, fxprune
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from safetensors.torch import load_file
        from test_saving import MODELS
        torch.set_num_threads(1)
        folder = Path({str(tmp_path)!r})
        expected = load_file(folder / "expected.safetensors")
        for name, (make, x) in MODELS.items():
            with torch.no_grad():
                found = fxprune.load(make, folder / f"{{name}}.safetensors")(x)
            for i, row in enumerate(found if isinstance(found, list) else [found]):
                assert torch.equal(row, expected[f"{{name}}.{{i}}"]), name
        print("all the same")
    """
    lines = [line[8:] for line in code.strip("\n").splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.strip() == "all the same", done.stderr


def test_after_training_and_in_training_mode(tmp_path: Path) -> None:
    pruned = fxprune.prune(seeded(Plain), IMAGE, 0.5).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    pruned(IMAGE).square().sum().backward()
    optimizer.step()
    path = tmp_path / "trained.safetensors"
    fxprune.save(pruned, path)
    loaded = fxprune.load(Plain, path)
    assert loaded.training
    assert same(loaded.eval(), pruned.eval(), IMAGE)
    loaded(IMAGE).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_pruned_twice_and_in_steps(tmp_path: Path) -> None:
    """Every plan on the way is in the file; a schedule has one plan for all of its steps."""
    model, path = seeded(Plain), tmp_path / "twice.safetensors"
    twice = fxprune.prune(fxprune.prune(model, IMAGE, 0.5), IMAGE, 0.5)
    fxprune.save(twice, path)
    assert same(fxprune.load(Plain, path), twice, IMAGE)
    for step in fxprune.schedule(model, IMAGE, ratio=0.5, steps=2):
        last = step.model
    fxprune.save(last, path)
    assert same(fxprune.load(Plain, path), last, IMAGE)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["fxprune"])["plans"] == 1


def test_types_and_memory_formats(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    model = seeded(Plain).to(torch.bfloat16).to(memory_format=torch.channels_last)
    x = IMAGE.bfloat16()
    pruned = fxprune.prune(model, x, 0.5)
    fxprune.save(pruned, path)
    loaded = fxprune.load(Plain, path)
    assert same(loaded, pruned, x)
    assert loaded.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)
    given = seeded(Plain)
    assert same(fxprune.load(given, path), pruned, x)
    assert given.conv.weight.dtype == torch.float32


def test_other_programs_read_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pruned = fxprune.prune(seeded(Plain), IMAGE, 0.5)
    fxprune.save(pruned, path)
    pruned.load_state_dict(load_file(path), strict=False)
    assert set(load_file(path)) == {*pruned.state_dict(), "scale"}


def test_the_given_network_is_not_changed(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", seeded(Constant, 3).train()
    fxprune.save(fxprune.prune(seeded(Constant), IMAGE, 0.5), path)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    fxprune.load(model, path)
    assert model.training
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_a_meta_model_is_enough_where_nothing_else_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pruned = fxprune.prune(seeded(Plain), IMAGE, 0.5)
    fxprune.save(pruned, path)
    with torch.device("meta"):
        empty = Plain()
    assert same(fxprune.load(empty, path), pruned, IMAGE)
    calls: list[bool] = []

    def make() -> nn.Module:
        model = Plain()
        calls.append(model.conv.weight.is_meta)
        return model

    fxprune.load(make, path)
    assert calls == [True]


def test_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pruned = fxprune.prune(seeded(Plain), IMAGE, 0.5)
    with pytest.raises(OutputError, match="which plan made this Plain"):
        fxprune.save(Plain(), path)
    with pytest.raises(OutputError, match=r"end in \.safetensors \(weights with their plan\)"):
        fxprune.save(pruned, tmp_path / "a.pt")
    with pytest.raises(OutputError, match=r"conv\.weight.* on the meta device"):
        fxprune.save(fxprune.prune(Plain().to("meta"), IMAGE, 0.5, importance="random"), path)
    assert list(tmp_path.iterdir()) == []
    fxprune.save(pruned, path)
    with pytest.raises(PlanError, match=r"'conv\.weight' it has shape \(8, 3, 3, 3\), Plain has shape \(9"):
        fxprune.load(lambda: Plain(9), path)
    with pytest.raises(CheckpointError, match="a function that makes one, got a int"):
        fxprune.load(3, path)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="made a int"):
        fxprune.load(lambda: 3, path)  # type: ignore[arg-type, return-value]
    save_file(load_file(path), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="holds no plan"):
        fxprune.load(Plain, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="there is no file"):
        fxprune.load(Plain, tmp_path / "nowhere.safetensors")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    fxprune.save(fxprune.prune(seeded(Plain), IMAGE, 0.5), path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change, words in (
        ({"conv.weight": torch.zeros(5, 3, 3, 3)}, r"shapes differ: conv\.weight \(file \[5, 3"),
        ({"../../x": torch.zeros(1)}, r"has no \.\./\.\./x"),
        ({"head.bias": None}, r"the file lacks head\.bias"),
    ):
        changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, other, metadata=metadata)
        with pytest.raises(CheckpointError, match=words):
            fxprune.load(Plain, other)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choose=st.data())
def test_damaged_files(tmp_path: Path, choose: st.DataObject) -> None:
    """Whatever became of the bytes, either the file is refused or the network runs."""
    whole = tmp_path / "a.safetensors"
    if not whole.exists():
        fxprune.save(fxprune.prune(seeded(Plain), IMAGE, 0.5), whole)
    data = bytearray(whole.read_bytes())
    if choose.draw(st.booleans()):
        data = data[: choose.draw(st.integers(0, len(data) - 1))]
    else:
        for _ in range(choose.draw(st.integers(1, 4))):
            data[choose.draw(st.integers(0, min(len(data), 6000) - 1))] = choose.draw(st.integers(0, 255))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(data)
    try:
        loaded = fxprune.load(Plain, broken)
    except FxpruneError:
        return
    assert loaded(IMAGE).shape == (2, 5)


class Sparse(nn.Module):
    """Keeps sparse tensors: one that the network reads, and one for others alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("neighbours", torch.eye(4).roll(1, 0).to_sparse())
        self.register_buffer("heads", torch.eye(2).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.neighbours, self.b(self.a(x).relu()))


@pytest.mark.parametrize("into", ["graph", "module"])
def test_sparse_buffers_stay_sparse(tmp_path: Path, into: str) -> None:
    torch.manual_seed(0)
    net, x = Sparse().eval(), torch.randn(4, 6)
    plan = fxprune.plan(net, x, ratio=0.5, into=into)
    pruned = plan.apply(net)
    assert pruned.get_parameter("a.weight").shape == (8, 6)
    assert pruned.get_buffer("heads").is_sparse
    assert fxprune.verify(net, pruned, plan, x).exact
    fxprune.save(pruned, tmp_path / "net.safetensors")
    again = fxprune.load(Sparse, tmp_path / "net.safetensors")
    assert again.get_buffer("neighbours").is_sparse
    assert torch.equal(again.eval()(x), pruned(x))
    other = Sparse()
    other.load_state_dict(net.state_dict())
    other.neighbours = torch.eye(4).to_sparse()
    with pytest.raises(VerificationError, match="node"):
        fxprune.verify(other.eval(), pruned, plan, x)
