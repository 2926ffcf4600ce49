"""The torch.export rung: models that symbolic tracing cannot follow."""

from __future__ import annotations

import contextlib
import copy
import io
import operator
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import CaptureError, OutputError
from fxprune.exporting import capture_program


def tensor_only(x: Any) -> None:
    """Asks for what no symbolic value answers."""
    if not issubclass(x.__class__, Tensor):
        raise TypeError("not a tensor")


class Cache:
    """State that is handed out and taken in again."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.name = "cache"


@dataclass
class Output:
    logits: Tensor
    cache: Cache | None = None


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, key_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, key_heads, width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * key_heads * self.head_dim)
        self.o = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("freq", torch.logspace(0, -1, 4), persistent=False)

    @torch.no_grad()
    def table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(x.shape[1])[:, None] * self.freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x.transpose(1, 2))
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        rest = x[..., self.head_dim :]  # empty: partial rotary with everything rotated
        return torch.cat([x * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        batch, length, _ = x.shape
        k, v = self.kv(x).split(self.key_heads * self.head_dim, dim=-1)
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (t.view(batch, length, self.key_heads, self.head_dim).transpose(1, 2) for t in (k, v))
        q, k = self.rotate(q), self.rotate(k)
        if cache is not None:
            cache.layers.append((k, v))
        repeat = self.heads // self.key_heads
        k, v = (
            t[:, :, None]
            .expand(batch, self.key_heads, repeat, length, -1)
            .reshape(batch, self.heads, length, -1)
            for t in (k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.o(out.transpose(1, 2).reshape(batch, length, -1)))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


class Language(nn.Module):
    """A decoder in the manner of those of common libraries, with a cache and an output class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.norms = nn.ModuleList(Norm(32) for _ in range(3))
        self.attention = Attention()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(
        self, tokens: Tensor, scale: float = 1.0, cache: Cache | None = None, use_cache: bool = True
    ) -> Output:
        tensor_only(tokens)
        if use_cache and cache is None:
            cache = Cache()
        x = self.embed(tokens) * scale
        x = x + self.attention(self.norms[0](x), cache)
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * value)
        return Output(self.head(self.norms[2](x)), cache)


@pytest.fixture
def language() -> Language:
    torch.manual_seed(0)
    return Language().eval()


TOKENS = torch.arange(14).reshape(2, 7)


class Stateful(nn.Module):
    def forward(self, x: Tensor) -> Cache:
        return Cache()


def test_exported_programs_leave_batch_and_length_free(language: Language) -> None:
    """Heads pick columns of a table by ``take_along_dim``, which would build the length in."""
    pruned = fxprune.prune(language, TOKENS, ratio=0.5)
    exported = capture_program(pruned.eval(), (TOKENS,), {})
    assert exported.sizes == "any batch, length"
    longer = torch.arange(33).reshape(3, 11) % 20
    found = exported.program.module()(longer)
    torch.testing.assert_close(found["logits"], pruned(longer).logits)
    with pytest.raises(OutputError, match="returns a Cache, in which no tensors are seen"):
        capture_program(Stateful(), (TOKENS,), {})


class Halved(nn.Module):
    """Runs at multiples of four alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        z = F.interpolate(self.second(y).relu(), scale_factor=2.0)
        return self.last(torch.cat([y, z], 1))


class Filled(nn.Module):
    """Runs at any size; its graph is right at multiples of four, and refuses others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 5, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self.first(x).relu()
        if height % 4 != 0 or width % 4 != 0:
            x = F.pad(x, (0, -width % 4, 0, -height % 4))
        return self.last(x)


@pytest.mark.parametrize("network", [Halved, Filled])
def test_exported_programs_take_the_multiples_that_the_network_takes(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    pruned = fxprune.prune(network().eval(), x, ratio=0.5)
    exported = capture_program(pruned.eval(), (x,), {})
    assert exported.sizes == "any batch; height, width in multiples of 4"
    program = exported.program.module()
    for shape in ((2, 3, 16, 16), (1, 3, 24, 20), (5, 3, 8, 64)):  # the example's, too
        other = torch.randn(shape)
        torch.testing.assert_close(program(other), pruned(other))
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.randn(2, 3, 18, 16))


def test_decoder_narrows_and_keeps_its_interface(language: Language) -> None:
    inputs = {"tokens": TOKENS}
    plan = fxprune.plan(language, inputs, ratio=0.5)
    assert fxprune.analyze(language, inputs).captured.rung == "torch.export"
    pruned = plan.apply(language)
    assert list(pruned.state_dict()) == list(language.state_dict())
    assert pruned.get_parameter("head.weight") is pruned.get_parameter("embed.weight")
    sizes = {name: tuple(p.shape) for name, p in pruned.named_parameters()}
    assert sizes["embed.weight"] == (20, 16)  # the residual stream
    assert sizes["attention.q.weight"] == (16, 16)
    assert sizes["attention.kv.weight"] == (16, 16)
    assert sizes["up.weight"] == (32, 16)
    assert not plan.held
    fxprune.verify(language, pruned, plan, inputs)
    wanted, got = language(TOKENS), pruned(TOKENS)
    assert type(got) is Output
    assert got.logits.shape == wanted.logits.shape
    assert type(got.cache) is Cache
    assert got.cache.name == "cache"
    assert got.cache.layers[0][0].shape == (2, 2, 7, 4)  # state is as narrow as the network
    assert (
        "cache is an object that forward takes in again" in fxprune.analyze(language, inputs).captured.report
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_exact_groups_equal_the_masked_original_at_any_size(language: Language, batch: int) -> None:
    tokens = TOKENS[:batch]
    plan = fxprune.plan(language, tokens, ratio=0.5, where=lambda group: group.exact)
    pruned = plan.apply(language)
    masked = plan.mask(language)
    with torch.no_grad():
        for size in ((1, 7), (3, 7), (2, 4), (5, 12)):
            other = torch.randint(20, size)
            torch.testing.assert_close(pruned(other).logits, masked(other).logits)


def test_result_may_be_cast(language: Language) -> None:
    pruned = fxprune.prune(language, {"tokens": TOKENS})
    before = pruned(TOKENS).logits
    wide = copy.deepcopy(pruned).double()
    torch.testing.assert_close(wide(TOKENS).logits.float(), before)


def test_dropout_follows_train_and_eval(language: Language) -> None:
    pruned = fxprune.prune(language, {"tokens": TOKENS})
    torch.testing.assert_close(pruned(TOKENS).logits, pruned(TOKENS).logits, rtol=0, atol=0)
    pruned.train()
    assert not torch.equal(pruned(TOKENS).logits, pruned(TOKENS).logits)
    pruned(TOKENS).logits.sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_result_pickles_copies_and_prunes_again(language: Language) -> None:
    pruned = fxprune.prune(language, {"tokens": TOKENS})
    stream = io.BytesIO()
    torch.save(pruned, stream)
    stream.seek(0)
    for again in (torch.load(stream, weights_only=False), copy.deepcopy(pruned)):
        torch.testing.assert_close(again(TOKENS).logits, pruned(TOKENS).logits)
    twice = fxprune.prune(pruned, {"tokens": TOKENS})
    assert twice.get_parameter("up.weight").shape[0] == 16


def test_values_that_are_no_tensors_are_those_of_the_capture(language: Language) -> None:
    pruned = fxprune.prune(language, {"tokens": TOKENS, "use_cache": False})
    assert pruned(TOKENS).cache is None
    assert pruned(tokens=TOKENS, use_cache=False).cache is None
    with pytest.raises(ValueError, match=r"use_cache.*was False"):
        pruned(TOKENS, use_cache=True)


class Nested(nn.Module):
    """Takes its tensors in a dict and in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, pair: dict[str, Any], plus: tuple[Tensor, Any]) -> dict[str, Tensor]:
        tensor_only(pair["x"])
        return {"y": self.b(torch.relu(self.a(pair["x"] + plus[0] * pair["by"])))}


def test_nested_inputs() -> None:
    plus = (torch.randn(2, 4), None)
    inputs = ({"x": torch.randn(2, 4), "by": 2.0}, plus)
    model = Nested()
    pruned = fxprune.prune(model, inputs, ratio=0.5)
    assert pruned.a.weight.shape == (4, 4)
    assert pruned(*inputs)["y"].shape == (2, 3)
    with pytest.raises(ValueError, match="'pair' was a tree"):
        pruned({"x": inputs[0]["x"], "by": 3.0}, plus)


class Traced(Nested):
    """The same by symbolic tracing."""

    def forward(self, pair: dict[str, Any], plus: tuple[Tensor, Any]) -> dict[str, Tensor]:
        return {"y": self.b(torch.relu(self.a(pair["x"] + plus[0] * pair["by"])))}


def test_numbers_inside_of_inputs_are_those_of_the_capture() -> None:
    """Symbolic tracing burns them in, too, and says so."""
    x, plus = torch.randn(2, 4), (torch.randn(2, 4), None)
    pruned = fxprune.prune(Traced(), ({"x": x, "by": 2.0}, plus))
    assert pruned({"x": x, "by": 2.0}, plus)["y"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"'pair' was 2\.0 when .* got 3\.0"):
        pruned({"x": x, "by": 3.0}, plus)


class Mutating(nn.Module):
    """Writes into slices and into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        self.calls.add_(1)
        x = self.norm(self.first(x))
        x[:, :4] = x[:, :4] * 2
        return self.last(x.relu_()).mean((2, 3))


def test_mutation_and_batch_norm() -> None:
    _, pruned = check(
        Mutating().eval(), torch.randn(2, 3, 6, 6), narrows=["first.weight", "norm.weight"], exact=True
    )
    before, mean = int(pruned.calls), pruned.norm.running_mean.clone()
    pruned(torch.randn(2, 3, 6, 6))
    assert int(pruned.calls) == before + 1
    torch.testing.assert_close(pruned.norm.running_mean, mean)
    pruned.train()(torch.randn(2, 3, 6, 6))
    assert not torch.equal(pruned.norm.running_mean, mean)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        return self.b(self.a(x).relu()).view(2, 3)


def test_fixed_batch_is_reported() -> None:
    graph = fxprune.analyze(FixedBatch(), torch.randn(2, 4))
    assert "batch: pinned at 2, because torch.export" in graph.report().text().replace("\n", " ")
    assert fxprune.analyze(Mutating(), torch.randn(1, 3, 6, 6)).sizes.free


class AlwaysOn(nn.Dropout):
    """Drops in evaluation, too, as for Monte-Carlo estimates."""

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        return F.dropout(x, self.p, True)


def test_a_layer_with_its_own_forward_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 64), AlwaysOn(), nn.Linear(64, 3)).eval()
    pruned = fxprune.prune(model, torch.randn(2, 4)).eval()
    x = torch.randn(2, 4)
    assert not torch.equal(pruned(x), pruned(x))


class Counting(nn.Module):
    """Reads a number off a buffer that it has just written to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        return self.b(self.a(x).relu() * self.calls.add_(1).item())


def test_analysis_never_writes_to_buffers() -> None:
    model = Counting()
    with contextlib.suppress(CaptureError):
        fxprune.prune(model, torch.randn(2, 4))
    assert model.calls.item() == 0


class Strides(nn.Module):
    """Reads numbers off a tensor that is no parameter, as detection heads do of their strides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.strides = torch.tensor([2.0, 4.0])
        self.shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        self.shape = x.new_zeros(2)
        y = self.b(self.a(x).relu())
        return sum(y * stride.item() for stride in self.strides)  # type: ignore[return-value]


def test_numbers_read_off_constants() -> None:
    model = Strides().eval()
    check(model, torch.randn(2, 3, 6, 6), narrows=["a.weight", "b.weight"], exact=True)
    assert model.shape is None or not isinstance(model.shape, torch._subclasses.FakeTensor)


class Unkeyed(dict[str, Any]):
    """A container that was registered without keys."""


pytree.register_pytree_node(
    Unkeyed, lambda d: (list(d.values()), list(d)), lambda v, k: Unkeyed(zip(k, v, strict=True))
)


class InOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, by: Tensor | None = None) -> Unkeyed:
        tensor_only(x)
        x = x if mask is None else x * mask
        return Unkeyed(y=self.b(self.a(x * by).relu()))


def test_inputs_left_out_before_others_that_are_given() -> None:
    x, by = torch.randn(2, 4), torch.randn(2, 4)
    model = InOrder()
    pruned = fxprune.prune(model, (x, None, by))
    assert pruned.a.weight.shape == (4, 4)
    for result in (pruned(x, None, by), pruned(x, by=by)):
        assert type(result) is Unkeyed
        assert result["y"].shape == (2, 3)


class Routed(nn.Module):
    """Rows are sent to the expert that a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.up = nn.Parameter(torch.randn(2, 8, 16) / 4)
        self.down = nn.Parameter(torch.randn(2, 16, 8) / 4)
        self.into, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        x = self.into(x)
        weight, choice = self.router(x).softmax(-1).topk(1, dim=-1)
        order = choice[:, 0].argsort()
        ends = F.one_hot(choice[:, 0], 2).sum(0).cumsum(0).to(torch.int32)
        rows = x[order]
        hidden = torch._grouped_mm(rows, self.up, offs=ends).relu()
        out = torch._grouped_mm(hidden, self.down, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return self.head(x + out[back] * weight)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="grouped products of float32 have no fake kernel")
def test_experts_narrow_in_hidden_units_and_stream() -> None:
    graph = fxprune.analyze(Routed(), torch.randn(8, 4))
    members = {str(member.axis) for group in graph for member in group.members}
    assert {"up[1]", "up[2]", "down[1]", "down[2]", "into.weight[0]", "head.weight[1]"} <= members
    reasons = {str(f.axis): f.reason for f in graph.frozen}
    assert "experts are chosen at run time" in reasons["up[0]"]
    assert "router.weight[0]" in reasons


def test_capture_leaves_the_compiler_as_it_was() -> None:
    """Tables of the compiler are made at its first import, which may happen while a model is traced."""
    script = """
import torch, fxprune
class Branch(torch.nn.Module):
    def forward(self, x): return x if x.sum() > 0 else -x
class Lines(torch.nn.Module):
    def forward(self, x): return x + torch.linspace(0, 1, 4)
try:
    fxprune.analyze(Branch(), torch.randn(2, 4))
except fxprune.FxpruneError:
    pass
torch.compile(Lines(), backend="eager", fullgraph=True)(torch.randn(4))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr


def test_what_cannot_be_exported_is_an_error_with_every_reason() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"(?s)symbolic tracing:.*torch\.export:"):
        fxprune.analyze(Branch(), torch.randn(2, 3))


def test_sizes_from_values_end_an_export_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection models have them at their end, which torch.export takes many seconds to reach."""

    class Picking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tensor_only(x)
            x = x[x.sum(1) > 0]
            reached.append(len(x.shape))
            return x

    reached: list[int] = []
    exported: list[Any] = []
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exported.append(args))
    with pytest.raises(CaptureError, match=r"nonzero.* depend on values"):
        fxprune.analyze(Picking(), torch.randn(2, 3))
    assert len(reached) < 2  # when it is run to find regions
    assert not exported


class Fractional(nn.Module):
    """The exported graph draws the places of windows channel by channel, by a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        tensor_only(x)
        return self.b(F.fractional_max_pool2d(self.a(x), 2, output_size=3))


def test_random_numbers_of_channels() -> None:
    """They are as many as there are channels left."""
    model, x = Fractional(), torch.randn(2, 3, 4, 4)
    plan = fxprune.plan(model, x)
    pruned = plan.apply(model)
    assert pruned.get_parameter("a.weight").shape[0] == 4
    assert pruned(x).shape == (2, 4, 3, 3)
    assert fxprune.verify(model, pruned, plan, x).exact


class Caching(nn.Module):
    """Makes a table again when the shape is another one than before, as detectors do with their anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.shape = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu())
        if self.shape != x.shape:
            self.shape, self.table = x.shape, torch.arange(x.shape[3], dtype=x.dtype)
        return x + self.table


def test_a_model_that_ran_before_is_exported_alike() -> None:
    """A comparison that only control flow asked for is not in the graph, where it would pin the batch."""
    for ran in (False, True):
        model, x = Caching().eval(), torch.randn(2, 3, 8, 8)
        if ran:
            model(torch.randn(3, 3, 8, 8))
        pruned = fxprune.prune(model, x, ratio=0.5)
        assert not any(node.target is operator.ne for node in pruned.graph.nodes)
        assert "any batch" in capture_program(pruned, (x,), {}).sizes


class Ensemble(nn.Module):
    """What ``torch.vmap`` calls is written for one sample."""

    def __init__(self, nested: bool, between: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.between, self.nested = nn.Linear(6, 16), nn.Linear(16, 3), between, nested

    def forward(self, x: Tensor) -> Tensor:
        def one(sample: Tensor) -> Tensor:
            return self.b(self.a(sample).relu())

        return self.between(torch.vmap(torch.vmap(one) if self.nested else one)(x))


@pytest.mark.parametrize("nested", [False, True])
def test_what_torch_vmap_calls_narrows(nested: bool) -> None:
    torch.manual_seed(0)
    model, x = Ensemble(nested, nn.Linear(3, 2)).eval(), torch.randn(4, 5, 6)
    plan = fxprune.plan(model, x, ratio=0.5)
    pruned = plan.apply(model)
    assert pruned.get_parameter("a.weight").shape == (8, 6)
    assert fxprune.verify(model, pruned, plan, x).exact
    same = fxprune.prune(model, x, ratio=0.0)
    other = torch.randn(3, 7, 6)
    torch.testing.assert_close(same(other), model(other))


def test_under_torch_vmap_dropout_would_stay_in_one_mode() -> None:
    with pytest.raises(CaptureError, match=r"torch.vmap at .*test_export.py.* leaves between \(Dropout\)"):
        fxprune.analyze(Ensemble(False, nn.Dropout()).eval(), torch.randn(4, 6))
