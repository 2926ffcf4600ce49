"""Results in the model's own class: attributes are rewritten, its methods stay what they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import snapshot, stir
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.capture.numbers import Number
from fxprune.errors import CaptureError, SelectionError, VerificationError

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dim = heads, dim // heads, dim
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        assert c == self.dim
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = self.attend(q, k, v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim)
        return self.proj(out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v


class Fused(Attention):
    """Its scale is that of the width of its heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Rotary(Attention):
    """Its heads meet a table."""

    angles: Tensor

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__(dim, heads)
        self.register_buffer("angles", torch.rand(16, dim // heads), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = self.angles[: q.shape[2]]
        return super().attend(q * angles, k * angles, v)


class Net(nn.Module):
    """With a method, tied weights, dropout, batch norm, a module that forward does not use, and a hook."""

    def __init__(self, kind: type[Attention] = Attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList([kind(), kind()])
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32))
        self.out, self.twin = nn.Linear(32, 5), nn.Linear(32, 5)
        self.twin.weight = self.out.weight
        self.unused = nn.Linear(3, 3)
        self.seen: list[str] = []
        self.blocks[0].register_forward_hook(lambda module, args, out: out * 1.5)
        stir(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.norm(self.inp(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        x = x + self.mlp(x)
        return self.out(x) + self.twin(x)


def pruned(model: nn.Module, inputs: Any = X, **options: Any) -> tuple[fxprune.PruningPlan, nn.Module]:
    """The plan and the result, which must equal the masked original, and share nothing with it."""
    before = snapshot(model)
    plan = fxprune.plan(model, inputs, into="module", **options)
    result = plan.apply(model)
    assert snapshot(model) == before
    assert type(result) is type(model)
    mine = {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()}
    assert mine.isdisjoint(t.untyped_storage().data_ptr() for t in result.state_dict().values() if t.numel())
    assert list(result.state_dict()) == list(model.state_dict())
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    masked, own = (copy.deepcopy(m).double().eval() for m in (plan.mask(model), result))
    if all(group.exact for group in fxprune.analyze(model, inputs) if group.name in plan.removed):
        with torch.no_grad():
            wide = [a.double() if a.is_floating_point() else a for a in args]
            torch.testing.assert_close(own(*wide), masked(*wide))
    fxprune.verify(model, result, plan, inputs)
    return plan, result


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_numbers_in_attributes_are_rewritten() -> None:
    model = Net()
    plan, result = pruned(model)
    assert isinstance(result, Net)
    attention: Any = result.blocks[0]
    assert (attention.num_heads, attention.head_dim, attention.dim) == (4, 4, 16)
    assert attention.scale == 8**-0.5, "the scale stays that of the original heads"
    assert type(attention.dim) is int
    assert parameters(result) == parameters(fxprune.prune(model, X))
    assert not plan.held
    assert (result.inp.out_features, result.mlp[0].out_features) == (16, 32)
    assert result.embed(X).shape == (2, 6, 16), "other methods go on working"
    assert result.twin.weight is result.out.weight
    assert result.unused.weight.shape == (3, 3)
    assert len(result.blocks[0]._forward_hooks) == 1
    assert result.seen == []
    assert result.seen is not model.seen
    assert result.meta["fxprune"] == plan  # type: ignore[index]


def test_both_modes_and_training_go_on() -> None:
    _, result = pruned(Net().train())
    assert result.training
    assert not torch.equal(result(X), result(X)), "dropout is at work"
    result.eval()
    assert torch.equal(result(X), result(X))
    result.train()(X).sum().backward()
    assert all(p.grad is not None for n, p in result.named_parameters() if not n.startswith("unused"))


@pytest.mark.parametrize("kind", [Fused, Rotary])
def test_what_a_head_dim_implies_stays_and_whole_heads_go(kind: type[Attention]) -> None:
    model = Net(kind)
    plan, result = pruned(model)
    attention: Any = result.blocks[1]
    assert (attention.num_heads, attention.head_dim) == (2, 8)
    assert parameters(result) <= 1.05 * parameters(fxprune.prune(model, X))
    assert any("test_own_class.py" in note and 'into="graph"' in note for note in plan.notes)


class Counted(nn.Module):
    """Attention that takes the width of a head from the width of the stream, as Swin and CaiT do."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = 4, fused
        self.inp, self.out = nn.Linear(8, 24), nn.Linear(24, 3)
        self.q, self.kv, self.proj = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 24)
        stir(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = (q * (c // self.heads) ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(x + self.proj(attended.transpose(1, 2).reshape(b, n, c)))


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_linked_by_a_count_loses_the_same_share(fused: bool) -> None:
    plan, result = pruned(Counted(fused), ratio=0.6)
    assert (result.inp.out_features, result.heads) == (12, 2)
    assert result.kv.out_features == 24
    assert "lose the same share: the code says shape[2] // self.heads" in " ".join(plan.notes)
    # where the width of the stream is to stay, heads do, too
    assert pruned(Counted(fused), ratio=0.6, keep="inp")[1].heads == 4


class Paths(nn.Module):
    """Parts of one width, which is computed from two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.paths = 16, 2
        self.inp, self.out = nn.Linear(8, 16), nn.Linear(6, 3)
        self.each = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        stir(self)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.inp(x), self.width // self.paths, -1)
        return self.out(self.each[0](parts[0]) + self.each[1](parts[1]).relu())


def test_parts_of_one_width_stay_so() -> None:
    for options in (
        {"ratio": 0.5},
        {"ratios": {"each.0": 0.5}, "ratio": 0.25},
        {"ratio": 0.4, "scope": "global"},
    ):
        _, result = pruned(Paths(), **options)
        assert result.each[0].in_features == result.each[1].in_features == result.width // 2 < 8


def test_a_budget_counts_what_goes_along() -> None:
    budget = fxprune.Budget(params=0.5)
    plan, result = pruned(Counted(True), budget=budget, scope="global")
    left = plan.settings["left"]["params"]
    assert left == parameters(result) <= 0.5 * parameters(Counted(True))


class Literal(nn.Module):
    """Says its width in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, 12)
        return self.third(self.second(x).relu())


def test_what_the_code_says_is_held_with_its_line() -> None:
    plan, result = pruned(Literal())
    assert isinstance(result, Literal)
    assert (result.first.out_features, result.second.out_features) == (12, 6)
    (note,) = (note for note in plan.notes if "the code says 12" in note)
    line = Path(__file__).read_text().split("view(-1, 12)")[0].count("\n") + 1
    assert f"test_own_class.py:{line} in forward" in note
    again = fxprune.PruningPlan.from_json(plan.to_json())
    assert again.into == "module"
    assert type(again.apply(Literal())) is Literal


def test_convolutions_and_their_numbers() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
            self.depth = nn.Conv2d(16, 16, 3, groups=16)
            self.norm, self.out = nn.GroupNorm(4, 16), nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.depth(self.stem(x))
            return self.out(x * x.mean((2, 3), keepdim=True))

    x = torch.randn(2, 3, 8, 8)
    _, result = pruned(Conv(), x)
    conv: Any = result
    assert (conv.depth.groups, conv.depth.in_channels, conv.stem[1].num_features) == (8, 8, 8)
    assert conv(torch.randn(3, 3, 16, 16)).shape == (3, 5, 12, 12), "other sizes go on working"


class TwoWays(nn.Module):
    """An exporter would take the other way, which reads what forward does not."""

    def __init__(self) -> None:
        super().__init__()
        self.half, self.kind = 16, 16
        self.wide, self.out = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.wide(x).chunk(2, 1)
        return self.out(torch.cat([first, first * second], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        first, second = self.wide(x).split((self.half, self.half), 1)
        return self.out(torch.cat([first, first * second], 1))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.wide(x) * self.kind


def test_other_ways_through_a_module_go_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), TwoWays(), nn.Conv2d(4, 3, 1)).eval()
    x = torch.randn(1, 3, 4, 4)
    narrow = fxprune.prune(model, x, 0.5, into="module")
    block: Any = narrow[1]  # type: ignore[index]
    assert (block.half, block.kind) == (8, 16)
    assert any(note.startswith("1.half becomes 8") for note in narrow.meta["fxprune"].notes)  # type: ignore[index,union-attr]
    hidden = torch.randn(1, block.wide.in_channels, 4, 4)
    torch.testing.assert_close(block.forward_split(hidden), block(hidden))


def test_control_flow_on_values_stays_that_of_the_class() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            while y.sum() > 0:
                y = y - 1
            return y

    _, result = pruned(Loop())
    assert type(result.body) is nn.Sequential  # no graph in its place


def test_verify_sees_a_number_that_is_wrong() -> None:
    model = Net()
    plan, result = pruned(model, where=lambda group: group.exact)
    result.blocks[0].scale = 0.1  # type: ignore[union-attr,assignment]
    with pytest.raises(
        VerificationError, match=r"evaluation mode, Net\.forward differs by .* from the masked"
    ):
        fxprune.verify(model, result, plan, X)
    with pytest.raises(VerificationError, match=r"qkv\.weight has shape .* by the plan"):
        fxprune.verify(model, model, plan, X)


def test_what_cannot_be_had_is_named() -> None:
    class Shy(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("shy")

    with pytest.raises(CaptureError, match=r"Shy cannot be copied.*shy.*deepcopy.*into=\"graph\""):
        fxprune.prune(Shy(), X, into="module")
    with pytest.raises(SelectionError, match="'graph', 'module'; got 'class'"):
        fxprune.plan(Net(), X, into="class")
    with pytest.raises(SelectionError, match="fill_outputs"):
        fxprune.plan(Net(), X, into="module", fill_outputs="output")


def test_numbers_remember_where_they_come_from() -> None:
    from fxprune.capture.numbers import Place, evaluate

    asked: list[Any] = []
    heads, dim = Number.of(4, Place("a", "heads"), asked), Number.of(8, Place("a", "dim"), asked)
    width = 3 * heads * dim - 0 * heads
    assert (width, repr(width), type(copy.deepcopy(width))) == (96, "96", int)
    assert evaluate(width.origin, {Place("a", "heads"): 2, Place("a", "dim"): 5}) == 30
    assert {heads: "x"}[4] == "x"
    assert type(heads / 2) is float
    assert heads != 5
    assert [(q.own, q.other) for q in asked][-1] == (4, 5)


def small(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small random model of Hugging Face's, and its inputs."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "intermediate_size": 48}
    config = {
        "Llama": lambda: transformers.LlamaConfig(**sizes, **heads, num_key_value_heads=2),
        "GPT2": lambda: transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32
        ),
    }[name]()
    config.pad_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    kinds = {"Llama": transformers.LlamaForCausalLM, "GPT2": transformers.GPT2LMHeadModel}
    return kinds[name](config).eval(), {"input_ids": torch.randint(50, (2, 7)), "use_cache": False}


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_language_models_generate(name: str) -> None:
    model, inputs = small(name)
    plan = fxprune.plan(model, inputs, into="module", where=lambda group: group.exact)
    result: Any = plan.apply(model)
    assert type(result) is type(model)
    assert parameters(result) == parameters(fxprune.prune(model, inputs, where=lambda group: group.exact))
    masked: Any = plan.mask(model).double()
    with torch.no_grad():
        prompt = inputs["input_ids"]
        want = masked.generate(prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(result.double().generate(prompt, max_new_tokens=8, do_sample=False), want)
