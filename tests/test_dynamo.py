"""Graphs that ``torch.compile`` hands to a backend: parameters and buffers arrive as inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune.errors import CaptureError
from fxprune.importance import Taylor, Wanda


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=g) for g in (1, 2)])
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.relu(self.bn(self.conv(x))) * self.scale
        for block in self.blocks:
            x = F.dropout(x + block(x), 0.1, self.training)
        return {"logits": self.fc(x.mean((2, 3)))}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 48)
        self.position = nn.Parameter(torch.randn(1, 7, 48))
        self.norm = nn.LayerNorm(48)
        self.qkv = nn.Linear(48, 144)
        self.out = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position
        q, k, v = self.qkv(self.norm(x)).view(-1, 7, 3, 4, 12).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 7, 48)
        return (x + self.out(y)).mean(1)


def compiled(
    model: Callable[..., Any], dynamic: bool | None = None, **options: Any
) -> tuple[Callable[..., Any], list[SimpleNamespace]]:
    """``model`` under a backend that prunes, and what that backend saw at each call."""
    seen: list[SimpleNamespace] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = tuple(example_inputs)
        plan = fxprune.plan(gm, inputs, **options)
        pruned = plan.apply(gm)
        verdict = fxprune.verify(gm, pruned, plan, inputs)
        seen.append(
            SimpleNamespace(
                plan=plan,
                pruned=pruned,
                verdict=verdict,
                masks=plan.masks(gm),
                counts=(fxprune.count(gm, inputs), fxprune.count(pruned, inputs)),
                gm=gm,
                inputs=inputs,
            )
        )
        return pruned.forward

    return torch.compile(model, backend=backend, dynamic=dynamic), seen


def masked(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of ``model`` without the entries that a plan removes; by the model's own names."""
    twin = copy.deepcopy(model)
    for name, mask in masks.items():
        twin.get_parameter(name).data.mul_(mask)
    return twin


def test_convolutions_and_residuals() -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    model(torch.randn(1, 3, 8, 8))
    fast, seen = compiled(model, ratio=0.5)
    got = fast(x)
    (run,) = seen
    torch.testing.assert_close(got["logits"], masked(model, run.masks)(x)["logits"])
    assert run.verdict.exact
    state = run.pruned.state_dict()
    assert set(state) == set(model.state_dict()) - {"bn.num_batches_tracked"}  # which nothing reads
    assert state["blocks.1.weight"].shape == (4, 2, 3, 3)
    assert state["bn.running_var"].shape == (4,)
    assert state["scale"].shape == (4, 1, 1)
    assert "scale" in dict(run.pruned.named_buffers())
    assert run.counts[0].params == sum(p.numel() for p in model.parameters())
    assert run.counts[1].params == sum(p.numel() for p in run.pruned.parameters()) < run.counts[0].params
    assert run.counts[0].macs == fxprune.count(model, x).macs


def test_attention_with_numbers_in_its_views() -> None:
    model, x = Attention().eval(), torch.randn(2, 7, 5)
    fast, seen = compiled(model, ratio=0.5, where=lambda group: group.exact)
    got = fast(x)
    (run,) = seen
    torch.testing.assert_close(got, masked(model, run.masks)(x))
    assert run.pruned.get_parameter("qkv.weight").shape == (72, 48)
    assert run.verdict.exact


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 2, dropout=0.1, **options)
        self.query = nn.Linear(5, 12)
        self.key, self.value = nn.Linear(5, self.attend.kdim), nn.Linear(5, self.attend.vdim)
        self.out = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        x, weights = self.attend(q, k, v, key_padding_mask=padding)
        return self.out(x) + weights.sum(-1).T[..., None]


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 8, "vdim": 10}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_attention_layers_are_opened(options: dict[str, Any]) -> None:
    training = "kdim" in options
    model, x = Attend(**options).train(training), torch.randn(3, 2, 5)
    inputs = (x, torch.tensor([[False, False, False], [False, False, True]]))
    fast, seen = compiled(model, ratio=0.5)
    got = fast(*inputs)
    (run,) = seen
    assert run.verdict.exact
    if not training:
        torch.testing.assert_close(got, masked(model, run.masks)(*inputs))
    direct = fxprune.prune(model, inputs, ratio=0.5)
    assert run.counts[1].params == sum(p.numel() for p in direct.parameters())


@pytest.mark.parametrize(("first", "masking"), [(False, "none"), (True, "padding"), (False, "both")])
def test_fused_encoder_layers_are_opened(first: bool, masking: str) -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, norm_first=first, activation="gelu")
    model = nn.Module().eval()
    model.layers = nn.ModuleList([nn.Linear(5, 12), layer, nn.Linear(12, 4)]).eval()
    masks = {
        "src_mask": torch.ones(3, 3, dtype=torch.bool).triu(1) if masking in ("attention", "both") else None,
        "src_key_padding_mask": torch.tensor([[False, False, True]] * 2)
        if masking in ("padding", "both")
        else None,
    }

    def forward(x: torch.Tensor) -> torch.Tensor:
        embed, layer, head = model.layers
        return head(layer(embed(x), **masks))

    x = torch.randn(2, 3, 5)
    with torch.no_grad():
        fast, seen = compiled(forward, ratio=0.5, where=lambda group: group.exact)
        got = fast(x)
        (run,) = seen
        assert [n for n in run.gm.graph.nodes if "encoder_layer" in str(n.target)]
        assert run.verdict.exact
        for name, parameter in layer.named_parameters():
            (mask,) = [m for n, m in run.masks.items() if n.endswith(name)] or [torch.ones(())]
            parameter.mul_(mask)
        torch.testing.assert_close(got, forward(x))
    assert run.counts[1].params < 0.8 * run.counts[0].params


def test_inexact_groups_are_verified_node_by_node() -> None:
    fast, seen = compiled(nn.Sequential(Attention(), nn.Linear(48, 3)).eval(), ratio=0.5)
    fast(torch.randn(2, 7, 5))
    assert not seen[0].verdict.exact
    assert seen[0].verdict.compared > 5
    assert seen[0].pruned.get_parameter("0.position").shape == (1, 7, 24)


def test_the_batch_may_be_dynamic() -> None:
    model = Attention().eval()
    fast, seen = compiled(model, ratio=0.5, where=lambda group: group.exact)
    x = torch.randn(3, 7, 5)
    torch._dynamo.mark_dynamic(x, 0)
    fast(x)
    assert any(isinstance(value, torch.SymInt) for value in seen[0].inputs)
    other = torch.randn(5, 7, 5)
    torch.testing.assert_close(fast(other), masked(model, seen[0].masks)(other))
    assert len(seen) == 1


def test_numbers_of_modules_may_be_dynamic() -> None:
    """With ``dynamic=True`` numbers that modules hold are inputs, and views take a ``torch.Size``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(6, 16), nn.Linear(16, 4), nn.LayerNorm(6, eps=1e-4)
            self.gain = 0.25

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            y = torch.addmm(self.up.bias, x.view(-1, x.size(-1)), self.up.weight.t())
            y = y.view((*x.size()[:-1], 16)) * self.gain
            past = torch.tensor([], dtype=y.dtype, device=y.device)  # an empty cache
            return self.down(F.dropout(torch.cat([past, y], dim=1), 0.5, self.training))

    model, x = Net().eval(), torch.randn(2, 3, 6)
    fast, seen = compiled(model, dynamic=True, ratio=0.5)
    got = fast(x)
    (run,) = seen
    torch.testing.assert_close(got, masked(model, run.masks)(x))
    assert run.verdict.exact
    assert run.pruned.get_parameter("up.weight").shape == (8, 6)
    fast(torch.randn(5, 4, 6))
    assert len(seen) == 1


def test_functions_of_several_modules() -> None:
    encoder, decoder = nn.Linear(4, 8), nn.Linear(8, 2)
    gain = nn.Parameter(torch.rand(8))

    def forward(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return decoder(F.relu(encoder(x)) * gain)

    fast, seen = compiled(forward, ratio=0.5)
    x = torch.randn(2, 4)
    got = fast(x, gain)
    names = dict(seen[0].pruned.named_parameters())
    assert names["encoder.weight"].shape == (4, 4)
    assert names["decoder.weight"].shape == (2, 4)
    assert sorted(tuple(p.shape) for p in names.values()) == [(2,), (2, 4), (4,), (4,), (4, 4)]
    keep = seen[0].masks["encoder.bias"]
    torch.testing.assert_close(got, decoder(F.relu(encoder(x)) * gain * keep))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3)
        self.w = nn.Parameter(torch.randn(8, 4, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(input=self.a(x), weight=self.w, groups=2)
        return self.b(torch.chunk(input=x, chunks=2, dim=1)[1])


def test_arguments_by_keyword() -> None:
    model, x = Keywords().eval(), torch.randn(2, 3, 8, 8)
    fast, seen = compiled(model, ratio=0.5)
    got = fast(x)
    torch.testing.assert_close(got, masked(model, seen[0].masks)(x))
    assert seen[0].pruned.get_parameter("w").shape == (4, 2, 3, 3)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            x = self.embed(i)
            return self.head(x + self.down(F.gelu(self.up(x))))

    model, i = Tied().eval(), torch.randint(0, 11, (2, 5))
    fast, seen = compiled(model, ratio=0.5)
    got = fast(i)
    torch.testing.assert_close(got, masked(model, seen[0].masks)(i))
    assert sum(p.shape[0] == 11 for p in seen[0].pruned.parameters()) == 1


def test_training_trains_the_narrow_parameters() -> None:
    model = Residual().train()
    before = copy.deepcopy(model.state_dict())
    fast, seen = compiled(model, ratio=0.5)
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    F.cross_entropy(fast(x)["logits"], y).backward()
    pruned = seen[0].pruned
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    assert all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(fast(x)["logits"], y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(seen) == 1
    assert pruned.get_buffer("bn.num_batches_tracked") == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_parameters_that_are_passed_in_are_ignored() -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    fast, seen = compiled(model, ratio=0.5)
    expected = fast(x)["logits"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert torch.equal(fast(x)["logits"], expected)
    assert len(seen) == 1


def test_a_tensor_that_is_no_buffer_stays_an_input() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)
            self.shift = torch.zeros(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.relu(self.up(x))) + self.shift

    model, x = Shifted().eval(), torch.randn(2, 4)
    fast, seen = compiled(model, ratio=0.5)
    before = fast(x)
    model.shift = torch.ones(2)
    torch.testing.assert_close(fast(x), before + 1)
    assert "shift" not in seen[0].pruned.state_dict()


def test_the_plan_is_data() -> None:
    texts: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = tuple(example_inputs)
        plan = fxprune.plan(gm, inputs, ratio=0.5, keep="blocks.0")
        again = fxprune.PruningPlan.from_json(plan.to_json())
        assert again == plan
        texts.append(again.to_json())
        return again.apply(gm).forward

    x = torch.randn(2, 3, 8, 8)
    torch.compile(Residual().eval(), backend=backend)(x)
    torch._dynamo.reset()
    torch.compile(Residual().eval(), backend=backend)(x)
    assert len(texts) == 2


def test_criteria_that_run_the_network() -> None:
    model, x = Residual().eval(), torch.randn(4, 3, 8, 8)
    plans: list[fxprune.PruningPlan] = []

    def logits(out: Any) -> torch.Tensor:
        return out["logits"] if isinstance(out, dict) else out[0]

    def criteria(batch: tuple[Any, ...]) -> list[Any]:
        return [
            Taylor(lambda net, inputs: logits(net(*inputs)).square().sum(), [batch]),
            Wanda([batch], lambda net, inputs: net(*inputs)),
        ]

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = tuple(example_inputs)
        plans.extend(fxprune.plan(gm, inputs, ratio=0.5, importance=c) for c in criteria(inputs))
        return gm.forward

    torch.compile(model, backend=backend)(x)
    wanted = [fxprune.plan(model, x, ratio=0.5, importance=c) for c in criteria((x,))]
    assert all(plan.removed for plan in plans)
    assert [plan.removed for plan in plans] == [plan.removed for plan in wanted]
    assert all(p.grad is None for p in model.parameters())


def test_fake_inputs_do_where_the_graph_knows_its_tensors() -> None:
    widths: list[int] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        fakes = tuple(n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder")
        pruned = fxprune.prune(gm, fakes, ratio=0.5)
        widths.append(pruned.get_parameter("qkv.weight").shape[0])
        known = {n: n.meta.pop("grapharg") for n in gm.graph.nodes if "grapharg" in n.meta}
        with pytest.raises(CaptureError, match=r"embed_parameters_weight.*only its shape is known.*backend"):
            fxprune.prune(gm, fakes, ratio=0.5)
        for node, argument in known.items():
            node.meta["grapharg"] = argument
        return gm.forward

    x = torch.randn(3, 7, 5)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(Attention().eval(), backend=backend)(x)
    assert widths == [72]


def test_after_compilation_the_graph_has_lost_its_tensors() -> None:
    fast, seen = compiled(Residual().eval(), ratio=0.5)
    fast(torch.randn(2, 3, 8, 8))
    with pytest.raises(CaptureError, match="inside of the backend"):
        seen[0].plan.apply(seen[0].gm)


def test_graphs_between_breaks_keep_their_boundary() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.a(x))
            torch._dynamo.graph_break()
            return self.c(F.relu(self.b(x)))

    model, x = Broken().eval(), torch.randn(2, 4)
    fast, seen = compiled(model, ratio=0.5)
    got = fast(x)
    torch.testing.assert_close(got, masked(model, seen[0].masks | seen[1].masks)(x))
    assert not seen[0].plan.removed
    assert seen[1].pruned.get_parameter("b.weight").shape == (4, 8)


@pytest.mark.parametrize("training", [False, True])
def test_checkpointed_blocks_narrow(training: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                y = F.relu(self.a(x))
                return F.relu(self.b(y)), y + torch.tensor(1.5)

            x, y = checkpoint(block, x, use_reentrant=False)
            return self.c(x) + y.mean()

    model, x = Checkpointed().train(training), torch.randn(2, 4)
    fast, seen = compiled(model, ratio=0.5, where=lambda group: group.exact)
    got = fast(x)
    torch.testing.assert_close(got, masked(model, seen[0].masks)(x))
    assert seen[0].pruned.get_parameter("c.weight").shape == (2, 3)
    assert {name for name, _ in seen[0].pruned.named_children()} == {"a", "b", "c"}
    got.sum().backward()
    assert seen[0].pruned.get_parameter("a.weight").grad is not None


def test_other_blocks_are_refused() -> None:
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, weight)
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with pytest.raises(CaptureError, match=r"the graph holds cond at .*test_dynamo.py:\d+"):
            fxprune.prune(gm, tuple(example_inputs), ratio=0.5)
        return gm.forward

    torch.compile(forward, backend=backend)(torch.randn(2, 4), nn.Parameter(torch.randn(8, 4)))


def test_modules_of_exported_programs() -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    module = torch.export.export(model, (x,)).module()
    plan = fxprune.plan(module, x, ratio=0.5)
    pruned = plan.apply(module)
    assert fxprune.verify(module, pruned, plan, x).exact
    torch.testing.assert_close(pruned(x)["logits"], masked(model, plan.masks(module))(x)["logits"])
    assert pruned.get_parameter("conv.weight").shape == (4, 3, 3, 3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.last = nn.Linear(5, 12), nn.Linear(20, 8), nn.Linear(8, 3)
        self.rnn = nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.out(self.rnn(self.into(x))[0]).relu())


def test_recurrent_layers() -> None:
    """Dynamo breaks the graph at them unless it is told not to; then they narrow like any other.

    Up to torch 2.14 it leaves the whole forward to Python there, and hands no graph to a backend.
    """
    model, x = Recurrent().eval(), torch.randn(2, 4, 5)
    fast, seen = compiled(model)
    assert fast(x).shape == (2, 4, 3)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert len(seen) == (2 if version >= (2, 15) else 0)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        fast, seen = compiled(model)
        got = fast(x)
    (run,) = seen
    torch.testing.assert_close(got, masked(model, run.masks)(x))
    assert run.pruned.get_parameter("into.weight").shape == (6, 5)
    assert run.pruned.get_parameter("out.weight").shape[0] == 4
