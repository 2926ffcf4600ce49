"""Properties of the result: what kind of thing it is, what it keeps, and what can be done with it."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import pickletools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import call, masked, snapshot, stir
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxprune
from fxprune import PruningPlan, capture


class Vision(nn.Module):
    """Residuals, a batch norm, a gate, a literal view, functional and module dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 1))
                for _ in range(2)
            ]
        )
        self.gate = nn.Conv2d(16, 16, 1, groups=4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16 * 16, 5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.body:
            x = x + layer(x)
        x = F.max_pool2d(x * torch.sigmoid(self.gate(x)), 2)
        return self.head(F.dropout(self.drop(x.view(-1, 256)), 0.1, self.training))


class Language(nn.Module):
    """A tied embedding, positions, attention with literal heads, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 16)
        self.positions = nn.Parameter(torch.randn(6, 16))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.words(words) * scale + self.positions
        q, k, v = self.qkv(self.norm(x)).view(-1, 6, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 6, 16))
        return {"logits": self.head(x)}


class Shuffled(nn.Module):
    """Picks by number, and a constant computed in the graph: both need inserted nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 3, 4).transpose(1, 2).reshape(-1, 12)
        x = x.roll(5, 1) + torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)
        return self.b(F.relu(x))


class Attention(nn.Module):
    """An attention layer that has to become one of fxprune's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x)[0])


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "vision": (Vision, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "language": (Language, torch.arange(24).view(4, 6) % 11),
    "shuffled": (Shuffled, torch.randn(4, 6, generator=torch.Generator().manual_seed(0))),
    "attention": (Attention, torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str, **options: Any) -> tuple[nn.Module, Any, PruningPlan, fx.GraphModule]:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = stir(build())
    plan = fxprune.plan(model, inputs, ratio=options.pop("ratio", 0.5), **options)
    return model, inputs, plan, plan.apply(model)


def logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same state, by name and bit."""
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)


# -- what it is -----------------------------------------------------------------------------------


@every_model
def test_kind(name: str) -> None:
    """A GraphModule with the class name of the model, its plan, and only smaller parameters."""
    model, inputs, plan, pruned = made(name)
    assert isinstance(pruned, fx.GraphModule)
    assert type(pruned).__name__ == type(model).__name__
    assert pruned.meta["fxprune"] == plan
    assert fxprune.prune(model, inputs, ratio=0.5).meta["fxprune"] == plan
    assert sum(p.numel() for p in pruned.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    pruned.graph.lint()
    assert [n.target for n in pruned.graph.nodes if n.op == "placeholder"] == [
        "words" if "words" in pruned.code else "x"
    ]


@every_model
def test_state_dict(name: str) -> None:
    """The keys of the original in its order, all of it loadable, non-persistent buffers left out."""
    model, inputs, plan, pruned = made(name)
    assert list(pruned.state_dict()) == list(model.state_dict())
    fresh = plan.apply(MODELS[name][0]())
    assert fresh.load_state_dict(pruned.state_dict()).missing_keys == []
    assert torch.equal(*(logits(call(m.eval(), inputs)) for m in (pruned, fresh)))
    if name == "vision":
        assert pruned.get_buffer("scratch").shape == (3,)
        assert "scratch" not in pruned.state_dict()


@every_model
def test_parameters_are_slices(name: str) -> None:
    """Each parameter is the original's with some indices left out, as the members of the groups say."""
    model, inputs, plan, pruned = made(name)
    graph = fxprune.analyze(model, inputs)
    twin = masked(model, graph, plan)
    new = dict(pruned.named_parameters(remove_duplicate=False))
    kept: dict[int, dict[int, set[int]]] = {}
    uneven = set()
    for group in graph.groups:
        gone = set(plan.removed.get(group.name, ()))
        for member in group.members:
            if member.over:
                uneven.add(id(member.tensor))
            elif member.trainable:
                alive = [i for i, unit in enumerate(member.units.tolist()) if unit not in gone]
                axes = kept.setdefault(id(member.tensor), {})
                axes[member.axis.dim] = axes.get(member.axis.dim, set(alive)) & set(alive)
    for name_, old in model.named_parameters(remove_duplicate=False):
        if id(old) in uneven:
            continue
        wanted = old
        for dim, alive in kept.get(id(old), {}).items():
            wanted = wanted.index_select(dim, torch.tensor(sorted(alive)))
        assert torch.equal(new[name_], wanted), name_
    for name_, old in twin.named_parameters(remove_duplicate=False):  # nothing that survives is lost
        left, had = new[name_].detach().abs().sum(), old.detach().abs().sum()
        assert torch.isclose(left, had, rtol=1e-4), name_


def test_rows_with_columns_of_their_own_are_slices() -> None:
    """A grouped convolution keeps, in each group, entries of that group."""
    model, _, _, pruned = made("vision")
    old, new = model.get_parameter("gate.weight"), pruned.get_parameter("gate.weight")
    assert new.shape == (8, 2, 1, 1)
    for group in range(4):
        values = {round(v, 6) for v in old[4 * group : 4 * group + 4].flatten().tolist()}
        assert {round(v, 6) for v in new[2 * group : 2 * group + 2].flatten().tolist()} <= values


def test_tied_parameters_stay_tied() -> None:
    """One parameter under two names stays one."""
    _, _, _, pruned = made("language")
    assert pruned.get_parameter("head.weight") is pruned.get_parameter("words.weight")
    assert [n for n, _ in pruned.named_parameters()].count("head.weight") == 0
    twin = pickle.loads(pickle.dumps(pruned))
    assert twin.get_parameter("head.weight") is twin.get_parameter("words.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype) -> None:
    """Parameters and buffers keep their dtype; scores do not overflow."""
    build, inputs = MODELS["vision"]
    model = stir(build()).to(dtype)
    pruned = fxprune.prune(model, inputs.to(dtype), ratio=0.5)
    for key, tensor in model.state_dict().items():
        assert pruned.state_dict()[key].dtype == tensor.dtype
    assert pruned.eval()(inputs.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["vision", "language"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_plan_fits_copies_of_other_types_and_devices(name: str, dtype: torch.dtype) -> None:
    """What is decided for one floating-point type, or for shapes alone, holds for all copies."""
    build, inputs = MODELS[name]
    model = stir(build()).eval()

    def cast(tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

    other = copy.deepcopy(model).to(dtype)
    plan = fxprune.plan(model, inputs, importance="random")
    again = fxprune.plan(other, cast(inputs), importance="random")
    assert again.removed == plan.removed
    pruned = plan.apply(other)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert fxprune.verify(other, pruned, plan, cast(inputs)).error < 1e-8
    shapes = {name: tensor.shape for name, tensor in pruned.state_dict().items()}
    for twin in (model, copy.deepcopy(model).to("meta")):
        assert {name: tensor.shape for name, tensor in again.apply(twin).state_dict().items()} == shapes


def test_memory_format() -> None:
    """Channels-last weights stay channels-last."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    model = model.to(memory_format=torch.channels_last)
    inputs = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    pruned = fxprune.prune(model, inputs, ratio=0.5)
    weight = pruned.get_parameter("2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert pruned.get_parameter("4.weight").is_contiguous()
    assert pruned(inputs).shape == (2, 5)


def test_flags() -> None:
    """``requires_grad`` of each parameter and ``training`` of each submodule are kept."""
    model = Vision()
    model.stem.eval()
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    before = snapshot(model)
    pruned = fxprune.prune(model, MODELS["vision"][1], ratio=0.5)
    assert pruned.training
    assert not pruned.get_submodule("stem").training
    assert not pruned.get_submodule("stem.1").training
    assert pruned.get_submodule("drop").training
    frozen = [name for name, p in pruned.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]
    assert snapshot(model) == before
    pruned = fxprune.prune(model.eval(), MODELS["vision"][1], ratio=0.5)
    assert not any(module.training for module in pruned.modules())


def test_hooks_and_gradients_are_not_taken_along() -> None:
    """The result starts without gradients; the original's gradients stay where they are."""
    model, inputs = Vision(), MODELS["vision"][1]
    model(inputs).sum().backward()
    gradient = model.head.weight.grad.clone()
    pruned = fxprune.prune(model, inputs, ratio=0.5)
    assert all(p.grad is None for p in pruned.parameters())
    assert torch.equal(model.head.weight.grad, gradient)


# -- what can be done with it ---------------------------------------------------------------------


@every_model
def test_deepcopy(name: str) -> None:
    """A copy is equal, independent, and still knows its plan."""
    _, inputs, plan, pruned = made(name)
    twin = copy.deepcopy(pruned)
    assert twin.meta["fxprune"] == plan
    assert equal(pruned, twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not equal(pruned, twin)
    assert logits(call(pruned.eval(), inputs)).abs().sum() > 0


@every_model
def test_pickle(name: str, tmp_path: Path) -> None:
    """Pickles, and loads in a process that has never seen the model's class."""
    _, inputs, plan, pruned = made(name)
    pruned.eval()
    data = pickle.dumps(pruned)
    twin = pickle.loads(data)
    assert isinstance(twin, fx.GraphModule)
    assert twin.meta["fxprune"] == plan
    assert equal(pruned, twin)
    assert not twin.training
    wanted = logits(call(pruned, inputs))
    assert torch.equal(logits(call(twin, inputs)), wanted)
    assert "test_result" not in {argument for _, argument, _ in pickletools.genops(data)}  # no such module
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    assert equal(torch.load(buffer, weights_only=False), pruned)
    torch.save((data, inputs, wanted), tmp_path / "pickled.bin")
    script = (
        "import pickle, sys, torch\n"
        "data, inputs, wanted = torch.load(sys.argv[1])\n"
        "out = pickle.loads(data)(inputs)\n"
        "out = out['logits'] if isinstance(out, dict) else out\n"
        "assert torch.allclose(out, wanted, atol=1e-5)\n"
    )
    if name in ("vision", "attention"):
        root = str(Path(fxprune.__file__).parents[1])
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "pickled.bin")], check=True, cwd=root, timeout=120
        )


class Tables(nn.Module):
    """Computes from buffers and numbers alone, by functions of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("table", torch.linspace(0, 1, 6))
        self.plain = torch.arange(6.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.max_pool2d(F.relu(self.a(x)), 1) * torch.outer(self.table.cos(), self.plain))
        return x.to(torch.float64).add(torch.arange(x.shape[-1])).flip([-1])[..., 1:].float()


@pytest.mark.parametrize("rung", ["symbolic tracing", "torch.export"])
def test_pickles_compute_from_buffers(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a result computes from its buffers is computed anew by what was pickled."""
    monkeypatch.setattr(capture, "RUNGS", {rung: capture.RUNGS[rung]})
    x = torch.randn(2, 4, 6, 6)
    pruned = fxprune.prune(Tables().eval(), x)
    twin = pickle.loads(pickle.dumps(pruned))
    assert [str(n) for n in twin.graph.nodes] == [str(n) for n in pruned.graph.nodes]
    assert torch.equal(twin(x), pruned(x))
    for model in (pruned, twin):
        model.get_buffer("table").copy_(torch.randn(6).sort()[0])
    assert not torch.equal(twin(x), pruned(x))
    twin.get_buffer("table").copy_(pruned.get_buffer("table"))
    assert torch.equal(twin(x), pruned(x))


@every_model
def test_class_name_survives_pickling(name: str) -> None:
    """What was loaded prints under the name of the model."""
    _, _, _, pruned = made(name)
    assert type(pickle.loads(pickle.dumps(pruned))).__name__ == type(pruned).__name__


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_pickle_of_a_graph_that_was_not_rewritten(ratio: float) -> None:
    """Where no node had to change, the result pickles and compiles all the same."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(model, x, ratio=ratio)
    assert torch.equal(pickle.loads(pickle.dumps(pruned))(x), pruned(x))
    assert torch.equal(copy.deepcopy(pruned)(x), pruned(x))


@every_model
@pytest.mark.filterwarnings("ignore")
def test_compile(name: str) -> None:
    """``torch.compile`` takes it whole."""
    _, inputs, _, pruned = made(name)
    pruned.eval()
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(call(compiled, inputs)), logits(call(pruned, inputs)))


@every_model
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_export(name: str, strict: bool) -> None:
    """``torch.export`` takes it, with a batch size that may vary, and the same parameter names."""
    _, inputs, _, pruned = made(name)
    pruned.eval()
    batch = {
        next(n.target for n in pruned.graph.nodes if n.op == "placeholder"): {
            0: torch.export.Dim("batch", min=2, max=64)
        }
    }
    program = torch.export.export(pruned, (inputs,), dynamic_shapes=batch, strict=strict)
    for given in (inputs, torch.cat([inputs, inputs])):
        torch.testing.assert_close(logits(program.module()(given)), logits(pruned(given)))
    assert {n for n, _ in pruned.named_parameters(remove_duplicate=False)} >= set(
        program.graph_signature.parameters
    )


@every_model
def test_trains(name: str) -> None:
    """One step of an optimiser changes every parameter that the loss depends on."""
    _, inputs, _, pruned = made(name)
    before = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    optimizer = torch.optim.SGD(pruned.train().parameters(), lr=0.1)
    first = logits(call(pruned, inputs)).square().mean()
    first.backward()
    optimizer.step()
    changed = [n for n, p in pruned.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == len(before)
    assert torch.isfinite(first)


def test_modes_are_obeyed() -> None:
    """Batch norm and both dropouts follow ``train()`` and ``eval()``, however the model was captured."""
    for training in (True, False):
        model, inputs = stir(Vision()).train(training), MODELS["vision"][1]
        pruned = fxprune.prune(model, inputs, ratio=0.5)
        pruned.eval()
        mean = pruned.get_buffer("stem.1.running_mean").clone()
        assert torch.equal(pruned(inputs), pruned(inputs))
        assert torch.equal(pruned.get_buffer("stem.1.running_mean"), mean)
        pruned.train()
        assert not torch.equal(pruned(inputs), pruned(inputs))
        assert not torch.equal(pruned.get_buffer("stem.1.running_mean"), mean)
        pruned.get_submodule("drop").p = 0.0  # the functional one is left
        assert not torch.equal(pruned(inputs), pruned(inputs))


@pytest.mark.parametrize(
    "look",
    [
        lambda pruned, x: inspect.signature(pruned.forward).parameters["x"],
        lambda pruned, x: inspect.signature(type(pruned).forward).parameters["x"],
        lambda pruned, x: "def forward(self, x)" in pruned.code and "def forward" in str(pruned),
        lambda pruned, x: torch.equal(fx.symbolic_trace(nn.Sequential(pruned))(x), pruned(x)),
        lambda pruned, x: torch.equal(nn.Sequential(pruned)(x), fx.Interpreter(pruned).run(x)),
        pytest.param(
            lambda pruned, x: torch.equal(
                torch.compile(nn.Sequential(pruned), backend="eager", fullgraph=True)(x), pruned(x)
            ),
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.8."), reason="Dynamo of torch 2.8 breaks the graph once there"
            ),
        ),
        lambda pruned, x: torch.export.export(nn.Sequential(pruned), (x,)),
        lambda pruned, x: pickle.loads(pickle.dumps(pruned)).code,
    ],
)
def test_code_is_there_when_something_looks(look: Callable[[Any, Tensor], Any]) -> None:
    """It is generated late; each of these is the first to ask for it."""
    pruned = fxprune.prune(Vision().eval(), torch.zeros(1, 3, 8, 8))
    assert "_code" not in vars(pruned)
    assert look(pruned, torch.randn(1, 3, 8, 8))


def test_recompile_after_an_edit() -> None:
    pruned, x = fxprune.prune(Vision().eval(), torch.zeros(1, 3, 8, 8)), torch.randn(1, 3, 8, 8)
    before = pruned(x)
    for node in pruned.graph.nodes:
        if node.target is torch.sigmoid:
            node.target = torch.tanh
    assert "tanh" in pruned.recompile().src
    assert not torch.allclose(pruned(x), before)


def test_signature() -> None:
    """Inputs go by position or by name, as in the model."""
    model, words, _, pruned = made("language")
    pruned.eval()
    assert torch.equal(pruned(words)["logits"], pruned(words=words)["logits"])
    with pytest.raises(TypeError):
        pruned()
    both = {"words": words, "scale": 2.0}
    pruned = fxprune.prune(model, both, ratio=0.5).eval()
    assert torch.equal(pruned(words, scale=2.0)["logits"], pruned(**both)["logits"])
    with pytest.raises(ValueError, match=r"scale.*2\.0.*3\.0"):
        pruned(words, scale=3.0)


# -- plans ----------------------------------------------------------------------------------------


@every_model
def test_plan_goes_through_json(name: str) -> None:
    """Equal after a round trip, plain data, and the same result."""
    model, _, plan, pruned = made(name)
    text = plan.to_json()
    again = PruningPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert json.loads(text)["fxprune_plan"] == 2
    assert equal(again.apply(model), pruned)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert type(model).__name__ in repr(plan)
    assert all(group in plan.text(all=True) for group in plan.sizes)


@every_model
@pytest.mark.parametrize("importance", ["l1", "l2", "random"])
def test_same_plan_twice(name: str, importance: str) -> None:
    """The same arguments give the same plan, whatever the state of random generators."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build()
    plans = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        state = torch.get_rng_state()
        plans.append(fxprune.plan(copy.deepcopy(model), inputs, importance=importance, seed=7).to_json())
        assert torch.equal(torch.get_rng_state(), state)
    assert plans[0] == plans[1]
    if importance == "random":
        assert fxprune.plan(model, inputs, importance="random", seed=8).to_json() != plans[0]


@every_model
def test_plan_on_a_copy_and_on_other_weights(name: str) -> None:
    """A plan belongs to an architecture, not to an object."""
    model, inputs, plan, pruned = made(name)
    assert equal(plan.apply(copy.deepcopy(model)), pruned)
    torch.manual_seed(9)
    other = stir(MODELS[name][0]())
    fxprune.verify(other, plan.apply(other), plan, inputs)


@every_model
def test_ratio_zero_changes_nothing(name: str) -> None:
    """Nothing removed: the same parameters, and bit-identical outputs."""
    model, inputs, plan, pruned = made(name, ratio=0)
    assert not plan.removed
    assert equal(model, pruned)
    wanted, got = (logits(call(m.eval(), inputs)) for m in (model, pruned))
    assert torch.equal(wanted, got)


def test_plan_made_without_weights() -> None:
    """A plan of the meta model is the plan of the real one, where scores do not need weights."""
    build, inputs = MODELS["vision"]
    with torch.device("meta"):
        hollow = build()
    plan = fxprune.plan(hollow, inputs, importance="random", seed=3)
    assert plan == fxprune.plan(build(), inputs, importance="random", seed=3)
    assert all(p.device.type == "meta" for p in plan.apply(hollow).parameters())


# -- choosing -------------------------------------------------------------------------------------


def test_weakest_units_go() -> None:
    """Magnitudes decide, over all members of a group."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[[1, 4, 6]] *= 1e-3
        model[0].bias[[1, 4, 6]] *= 1e-3
        model[2].weight[:, [1, 4, 6]] *= 1e-3
    for importance in ("l1", "l2"):
        plan = fxprune.plan(model, torch.zeros(2, 6), ratio=0.4, importance=importance)
        assert plan.removed == {"0.weight[0]": [1, 4, 6]}


def test_importance_of_ones_own() -> None:
    """A function of a group decides; ties go by position; any kind of sequence will do."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(2, 6)
    seen = []

    def last_goes_first(group: fxprune.Group) -> Tensor:
        seen.append((group.name, group.size, [str(m.axis) for m in group.members]))
        return torch.arange(group.size, 0, -1)

    plan = fxprune.plan(model, x, ratio=0.5, importance=last_goes_first)
    assert plan.removed == {"0.weight[0]": [4, 5, 6, 7]}
    assert plan.settings["importance"] == "last_goes_first"
    assert seen == [("0.weight[0]", 8, ["0.weight[0]", "0.bias[0]", "2.weight[1]"])]
    for kind in (list, tuple, np.array, torch.tensor):
        same = fxprune.plan(model, x, importance=lambda group, kind=kind: kind([1.0] * group.size))
        assert same.removed == {"0.weight[0]": [0, 1, 2, 3]}


def test_importance_may_read_members() -> None:
    """Members hold the tensors, and say which index belongs to which unit."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def by_bias(group: fxprune.Group) -> np.ndarray[Any, Any]:
        scores = np.zeros(group.size)
        for member in group.members:
            if str(member.axis) == "0.bias[0]":
                np.add.at(scores, member.units, member.tensor.detach().abs().numpy())
        return scores

    plan = fxprune.plan(model, torch.zeros(2, 6), importance=by_bias)
    assert plan.removed["0.weight[0]"] == sorted(model[0].bias.detach().abs().argsort()[:4].tolist())


def test_where() -> None:
    """Only groups that the predicate takes are narrowed."""
    model, inputs, _, _ = made("vision")
    names = [group.name for group in fxprune.analyze(model, inputs)]
    assert len(names) > 1
    for name in names:
        plan = fxprune.plan(model, inputs, where=lambda group, name=name: group.name == name)
        assert list(plan.removed) == [name]
        fxprune.verify(model, plan.apply(model), plan, inputs)
    assert not fxprune.plan(model, inputs, where=lambda group: False).removed


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9, 0.99])
def test_every_group_keeps_its_share(ratio: float) -> None:
    """The floor of the share goes from every row, and something always stays."""
    for name in MODELS:
        model, inputs, plan, pruned = made(name, ratio=ratio)
        if plan.held:
            continue
        for group in fxprune.analyze(model, inputs):
            gone = set(plan.removed.get(group.name, ()))
            assert len(gone) < group.size
            for atoms in group.balance:
                for row in atoms:
                    assert len(gone & set(row.tolist())) == min(int(ratio * row.size + 1e-9), row.size - 1)
        fxprune.verify(model, pruned, plan, inputs)


@every_model
def test_order_of_groups_is_irrelevant(name: str) -> None:
    """Removing group by group in any order, on the pruned network, gives the widths of one plan."""
    model, inputs, plan, pruned = made(name)
    shuffled = PruningPlan.from_json(
        json.dumps({**json.loads(plan.to_json()), "removed": dict(reversed(list(plan.removed.items())))})
    )
    assert shuffled == plan
    assert equal(shuffled.apply(model), pruned)
    one_by_one: nn.Module = model
    for group in reversed(list(plan.removed)):
        step = fxprune.plan(one_by_one, inputs, where=lambda g, group=group: g.name == group)
        one_by_one = step.apply(one_by_one)
    assert [p.shape for p in one_by_one.parameters()] == [p.shape for p in pruned.parameters()]


# -- what users read ------------------------------------------------------------------------------


def test_analysis_is_readable() -> None:
    """Groups, members and the graph have one-line descriptions that name what they are about."""
    model, inputs, plan, _ = made("language")
    graph = fxprune.analyze(model, inputs)
    assert "Language" in repr(graph)
    assert len(graph) == len(list(graph)) == len(graph.groups)
    for group in graph:
        assert group.name in repr(group)
        assert ("exact" if group.exact else group.inexact_because) in repr(group)
        assert "\n" not in repr(group)
        assert len(group) == group.size == group.units.size
        for member in group.members:
            assert str(member.axis) in repr(member)
    norm = next(g for g in graph if any(m.axis.name == "norm.weight" for m in g.members))
    assert not norm.exact
    assert "norm" in norm.inexact_because
    assert set(plan.sizes) == {group.name for group in graph}


def test_explain() -> None:
    """What goes with an axis, each step with the graph node and the line of the user's code."""
    model, inputs, _, _ = made("vision")
    graph = fxprune.analyze(model, inputs)
    explanation = graph.explain("stem.0.weight", 0)
    paths = {str(axis): path for axis, path in explanation.paths.items()}
    for axis in ("stem.1.weight[0]", "stem.1.running_mean[0]", "body.0.2.weight[0]", "body.1.0.weight[1]"):
        assert axis in paths
        assert all(link.node for link in paths[axis])
        assert any("test_result.py:" in link.source and "in forward" in link.source for link in paths[axis])
        assert axis in str(explanation)
    assert explanation.frozen is None
    assert explanation.groups
    lines = str(explanation).splitlines()
    assert len(set(lines)) == len(lines)
    assert str(graph.explain("stem.0.weight", -4)) == str(explanation)
    end = graph.explain("head.weight", 0)
    assert end.frozen is not None
    assert not end.groups
    assert "output of the model" in str(end)


def test_explain_joins_the_steps_of_repeated_blocks() -> None:
    """A residual stream over fifty blocks: a line for each step of a block."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(50)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            return self.last(x)

    explanation = fxprune.analyze(Deep(), torch.zeros(2, 3)).explain("first.weight", 0)
    assert len(explanation.paths) > 100
    text = str(explanation)
    assert len(text.splitlines()) < 20
    assert "blocks.*.0.weight[1] <- " in text
    assert "(x49)" in text or "(x50)" in text


def test_explain_takes_either_name_of_a_tied_parameter() -> None:
    """The second name leads to the same axis."""
    model, inputs, _, _ = made("language")
    graph = fxprune.analyze(model, inputs)
    assert str(graph.explain("head.weight", 1)) == str(graph.explain("words.weight", 1))


def test_frozen() -> None:
    """Each frozen axis comes with a reason, the node and the source line."""
    for name in MODELS:
        model, inputs, _, _ = made(name)
        for entry in fxprune.analyze(model, inputs).frozen:
            assert entry.reason
            assert entry.node, entry
            assert "test_result.py:" in entry.source or entry.node == "output", entry
            assert str(entry.axis) in str(entry)


def test_networkx() -> None:
    """The coupling graph is a ``networkx`` graph whose edges know their causes."""
    import networkx as nx

    model, inputs, _, _ = made("vision")
    graph = fxprune.analyze(model, inputs)
    for group in graph:
        axes = [member.axis for member in group.members]
        assert all(axis in graph.networkx for axis in axes)
        assert all(nx.has_path(graph.networkx, axes[0], axis) for axis in axes[1:])
    assert all(isinstance(n, fx.Node) for *_, nodes in graph.networkx.edges(data="nodes") for n in nodes)


def test_analysis_touches_nothing() -> None:
    """Nothing is written to the model or to torch, also where tracing fails half-way."""

    class Fails(Vision):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) + torch.arange(8)
            return x if x.sum() > 0 else self.head(x)

    fast, flag = torch.backends.mha.get_fastpath_enabled(), nn.Module.__dict__.get("training")
    default, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    for model, inputs in ((Vision(), MODELS["vision"][1]), (Fails(), MODELS["vision"][1])):
        before = snapshot(model)
        try:
            fxprune.analyze(model, inputs)
        except fxprune.FxpruneError:
            assert isinstance(model, Fails)
        assert snapshot(model) == before
        assert isinstance(model.training, bool)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert nn.Module.__dict__.get("training") is flag
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (default, grad)


PICKS: dict[str, Callable[[Tensor], Any]] = {
    "argsort": lambda y: y.argsort(1),
    "argmax": lambda y: y.argmax(1),
    "argmax of all": lambda y: y.argmax(),
    "max": lambda y: y.max(1, keepdim=True),
    "sort": lambda y: torch.sort(y, dim=1, descending=True),
    "topk": lambda y: torch.topk(y, 6, dim=1),
}


class Ties(nn.Module):
    """Picks by size from entries of which several are equal but for rounding."""

    def __init__(self, pick: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.pick = nn.Linear(6, 32), nn.Linear(32, 3), pick

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        return self.pick(torch.cat([y, y * 3 / 3, self.b(self.a(x).relu() * 1.0), y + 1e-17], 1))


@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
def test_verify_lets_rounding_decide_between_equals(pick: Callable[[Tensor], Any]) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = Ties(pick).eval(), torch.randn(2, 5, 6)
        pruned = fxprune.prune(model, x)
        assert fxprune.verify(model, pruned, pruned.meta["fxprune"], x).exact
        picking = next(node for node in pruned.graph.nodes if node.name.startswith("cat")).next
        with pruned.graph.inserting_before(picking):  # the same numbers from other places
            rolled = pruned.graph.call_function(torch.roll, (picking.args[0], 1, 1))
        picking.args = (rolled, *picking.args[1:])
        pruned.recompile()
        with pytest.raises(fxprune.VerificationError, match=f"at node {picking.name}"):
            fxprune.verify(model, pruned, pruned.meta["fxprune"], x)


class Recorder(nn.Module):
    """Registers a hook when it is first called, and returns what the hook has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(6, 12), nn.ReLU()), nn.Linear(12, 4)
        self.c = nn.Linear(12, 4)
        self.seen: list[Tensor] = []
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.a.register_forward_hook(lambda module, args, result: self.seen.append(result))
            self.ready = True
        self.seen.clear()
        y = self.b(self.a(x))
        assert len(self.seen) == 1
        return y + self.c(self.seen[0])


@pytest.mark.parametrize("rung", [None, *capture.RUNGS])
def test_hooks_that_forward_registers_do_not_stay(rung: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do they pile up, from rung to rung, on a model that has not been called before."""
    if rung is not None:
        monkeypatch.setattr(capture, "RUNGS", {rung: capture.RUNGS[rung]})
    model, x = Recorder().eval(), torch.rand(2, 6)
    pruned = fxprune.prune(model, x)
    assert not model.ready
    assert not model.a._forward_hooks
    fxprune.verify(model, pruned, pruned.meta["fxprune"], x)
    assert pruned(x).shape == model(x).shape


def test_constants_made_in_forward_leave_the_model_alone() -> None:
    """A tensor made in ``forward`` does not become an attribute of the user's model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.tensor(2.0) + torch.arange(12))

    model = Net()
    before = snapshot(model)
    pruned = fxprune.prune(model, torch.zeros(2, 6), ratio=0.5)
    assert snapshot(model) == before
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert pruned.get_parameter("a.weight").shape == (6, 6)
