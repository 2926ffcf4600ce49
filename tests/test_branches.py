"""Residual branches: found in the graph, removed as a whole, carried by plans, files and masks."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import difference, stir
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import coupling, iterative
from fxprune.errors import PlanError, SelectionError
from fxprune.passes import remove_branches


class Unit(nn.Module):
    """A residual unit of one of several kinds."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv1, self.bn1 = nn.Conv2d(width, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, width, 1), nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.kind == "act":
            f += x
            return self.act(f)
        if self.kind == "scaled":
            return torch.add(x, self.scale * f, alpha=0.5)
        return self.drop(f) * self.scale + x


class Nested(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Conv2d(width, width, 1),
            Unit("act", width),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.inner(self.first(x)))


class Residual(nn.Module):
    def __init__(self, units: list[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.units = nn.Sequential(*units)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.post = nn.LayerNorm(12), nn.LayerNorm(12), post
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, 12), nn.Sequential(Block(post), Block(post))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def network(seed: int) -> Residual:
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    units = [
        Nested(8) if kind == "nested" else Unit(kind, 8)
        for kind in chosen.choices(["act", "scaled", "plain", "nested"], k=3)
    ]
    return stir(Residual(units)).eval()


def by_hand(model: nn.Module, graph: fxprune.CouplingGraph, names: Any) -> nn.Module:
    """The model with everything that the branches own at zero."""
    masked = copy.deepcopy(model).double()
    own = dict(masked.named_parameters())
    with torch.no_grad():
        for name in names:
            for tensor in graph.branches[name].tensors:
                if tensor in own:
                    own[tensor].zero_()
    return masked


@pytest.mark.parametrize("seed", range(4))
def test_every_subset_of_branches_leaves_what_zeros_would(seed: int) -> None:
    model, x = network(seed), torch.randn(2, 3, 6, 6)
    graph = fxprune.analyze(model, x)
    assert len(graph.branches) >= 3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for count in range(1, len(graph.branches) + 1):
        for names in itertools.combinations(graph.branches, count):
            pruned = fxprune.prune(graph, 0.0, branches=names)
            assert not any(name in pruned.state_dict() for n in names for name in graph.branches[n].tensors)
            masked, narrow = by_hand(model, graph, names), pruned.double()
            for training in (False, True):
                masked.train(training)
                narrow.train(training)
                for module in [*masked.modules(), *narrow.modules()]:
                    if isinstance(module, nn.Dropout):
                        module.eval()
                wanted, got = masked(x.double()), narrow(x.double())
                assert difference(got, wanted) < 1e-8
            got.sum().backward()  # nothing that is needed was written over
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("post", [False, True])
def test_halves_of_transformer_blocks_go_by_themselves(post: bool) -> None:
    torch.manual_seed(0)
    model, x = Transformer(post).eval(), torch.randn(2, 6, 5)
    graph = fxprune.analyze(model, x)
    assert len(graph.branches) == 4
    for names in ([*graph.branches][:1], [*graph.branches][1::2], [*graph.branches]):
        pruned = fxprune.prune(graph, 0.5, branches=names)
        plan = pruned.meta["fxprune"]
        assert plan.branches == tuple(names)
        assert plan.removed
        fxprune.verify(model, pruned, plan, x)


def test_a_plan_with_branches_is_carried_through(tmp_path: Any) -> None:
    model, x = network(0), torch.randn(2, 3, 6, 6)
    graph = fxprune.analyze(model, x)
    name = next(iter(graph.branches))
    plan = fxprune.plan(model, x, 0.5, branches=[name])
    assert plan.branches == (name,)
    assert name in str(plan)
    assert "1 residual branch" in repr(plan)
    before, after = plan.counts()["params"]
    again = fxprune.PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert not plan.diff(again)
    assert "branches" in str(plan.diff(fxprune.plan(model, x, 0.5)))
    pruned = again.apply(model)
    assert before == sum(p.numel() for p in model.parameters())
    assert after == sum(p.numel() for p in pruned.parameters())
    fxprune.save(pruned, tmp_path / "pruned.safetensors")
    loaded = fxprune.load(lambda: Residual(list(network(0).units)), tmp_path / "pruned.safetensors")
    assert torch.equal(loaded.eval()(x), pruned.eval()(x))
    assert plan.apply_state_dict(model.state_dict(), model).keys() == pruned.state_dict().keys()
    masked = plan.mask(model)
    assert difference(pruned(x), masked(x)) < 1e-4
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    narrowed = plan.apply_to_optimizer(optimizer, model, plan.apply(model))
    assert sum(len(g["params"]) for g in narrowed.param_groups) == len([*pruned.parameters()])


def test_a_budget_counts_from_the_network_with_all_branches() -> None:
    model, x = network(0), torch.randn(2, 3, 6, 6)
    name = next(iter(fxprune.analyze(model, x).branches))
    pruned = fxprune.prune(model, x, budget=fxprune.Budget(params=0.5), branches=[name])
    share = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.4 < share <= 0.5


def test_what_is_left_is_compensated_towards_the_original() -> None:
    model, x = network(1), torch.randn(2, 3, 6, 6)
    names = [*fxprune.analyze(model, x).branches][-1:]
    batches = [torch.randn(8, 3, 6, 6) for _ in range(8)]
    pruned = fxprune.prune(model, x, 0.0, branches=names, calibrate=batches)
    found = pruned.meta["compensation"]
    assert 0 < found.after < found.before


def test_plans_with_branches_follow_each_other() -> None:
    model, x = network(3), torch.randn(2, 3, 6, 6)
    one, two, *_ = fxprune.analyze(model, x).branches
    first = fxprune.plan(model, x, 0.3, branches=[one])
    pruned = first.apply(model)
    second = fxprune.plan(pruned, x, 0.4, branches=[two])
    both = first.then(second, model)
    assert set(both.branches) == {one, two}
    wanted = second.apply(pruned).state_dict()
    got = both.apply(model).state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    rest = iterative.since(both, first, model)
    assert (rest.branches, rest.removed) == (second.branches, second.removed)
    with pytest.raises(PlanError, match=f"keeps residual branches that the first removes .{one}"):
        iterative.since(fxprune.plan(model, x, 0.6), first, model)


def test_a_schedule_with_branches_ends_where_one_step_does() -> None:
    model, x = network(3), torch.randn(2, 3, 6, 6)
    name = next(iter(fxprune.analyze(model, x).branches))
    steps = list(fxprune.schedule(model, x, 0.5, steps=2, branches=[name]))
    assert steps[0].plan.branches == (name,)
    assert steps[1].plan.branches == ()
    assert steps[1].total.branches == (name,)
    once = fxprune.prune(model, x, 0.5, branches=[name])
    shapes = {key: tensor.shape for key, tensor in steps[1].model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in once.state_dict().items()}


class Odd(nn.Module):
    """What looks like a residual branch, and is none that can go."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem = kind, nn.Conv2d(3, 8, 1)
        self.conv, self.down, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if self.kind == "projection":
            return self.head(self.down(x) + self.conv(x))
        if self.kind == "not zero":
            return self.head(x + torch.sigmoid(self.conv(x)))
        if self.kind == "no parameters":
            return self.head(x + torch.relu(x))
        if self.kind == "broadcast":
            return self.head(x.mean((2, 3), keepdim=True) + self.conv(x))
        if self.kind == "shared":
            return self.head(self.conv(x + self.conv(x)))
        if self.kind == "written":
            return self.head(x + self.conv(x.relu_()))
        if self.kind == "adds a shared parameter":
            return self.head(self.down(x + (self.conv(x) + self.down.bias[:, None, None])))
        if self.kind == "adds a shared layer":
            return self.head(self.down(x + (self.conv(x) + self.down(x))))
        if self.kind == "ends in a shared layer":
            return self.head(self.down(x + self.down(self.conv(x))))
        if self.kind == "reads a shared parameter":
            return self.head(self.down(x + self.conv(x * self.down.bias[:, None, None])))
        inside = self.conv(x)
        return self.head(x + self.down(inside)), inside


SHARED = [("adds a", "parameter"), ("adds a", "layer"), ("ends in a", "layer")]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("projection", ""), ("no parameters", ""), ("shared", ""), ("broadcast", ""),
        ("not zero", "zero where its parameters are"), ("read", "read elsewhere"),
        *[(f"{what} shared {kind}", "zero where its parameters are") for what, kind in SHARED],
    ],
)  # fmt: skip
def test_what_cannot_go_is_left_alone(kind: str, reason: str) -> None:
    graph = fxprune.analyze(Odd(kind).eval(), torch.randn(2, 3, 4, 4))
    assert not graph.branches
    assert reason in "".join(graph.kept_additions.values())


def test_a_branch_may_read_what_others_read() -> None:
    model, x = Odd("reads a shared parameter").eval(), torch.randn(2, 3, 4, 4)
    plan = fxprune.plan(model, x, 0.0, branches=["conv"])
    assert fxprune.verify(model, plan.apply(model), plan, x)


def test_a_stream_that_is_written_in_place_is_still_the_stream() -> None:
    model, x = Odd("written").eval(), torch.randn(2, 3, 4, 4)
    graph = fxprune.analyze(model, x)
    for name in graph.branches:
        pruned = fxprune.prune(graph, 0.0, branches=[name])
        assert difference(pruned.double()(x.double()), by_hand(model, graph, [name])(x.double())) < 1e-8


def test_unknown_branches_are_named_with_those_there_are() -> None:
    model, x = network(0), torch.randn(2, 3, 6, 6)
    with pytest.raises(SelectionError, match=r"no residual branch 'units.9'.*nearest is 'units.*There are"):
        fxprune.plan(model, x, 0.5, branches=["units.9"])
    with pytest.raises(SelectionError, match="takes a list of names"):
        fxprune.plan(model, x, 0.5, branches="units.0")
    plan = fxprune.plan(model, x, 0.5)
    text = plan.to_json().replace('"free_outputs"', '"branches": ["nowhere"],\n "free_outputs"')
    with pytest.raises(PlanError, match="no residual branch 'nowhere'"):
        fxprune.PruningPlan.from_json(text).apply(model)


def test_an_explanation_names_the_branch_and_what_it_takes_along() -> None:
    torch.manual_seed(0)
    model = Residual([Unit("plain", 8)]).eval()
    graph = fxprune.analyze(model, torch.randn(2, 3, 6, 6))
    (branch,) = graph.branches.values()
    assert graph.explain("units.0.conv1.weight", 0).branches == (branch,)
    text = str(graph.explain("units.0.bn2.weight", 0))
    assert f"in the residual branch {branch.name}: {branch.entries:,} parameters" in text
    assert "takes along units.0.scale, units.0.conv1.weight" in text
    assert not graph.explain("stem.weight", 0).branches


def test_they_are_looked_for_only_where_one_is_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find them, the network is run once more."""
    looked: list[Any] = []
    find = coupling.graph.find_branches
    monkeypatch.setattr(coupling.graph, "find_branches", lambda graph: looked.append(graph) or find(graph))
    model, x = stir(Residual([Unit("act", 8), Unit("act", 8)])).eval(), torch.randn(2, 3, 6, 6)
    fxprune.prune(model, x, 0.5)
    fxprune.plan(model, x, 0.5).apply(model)
    assert not looked
    graph = fxprune.analyze(model, x)
    assert fxprune.plan(graph, 0.5, branches=[next(iter(graph.branches))]).branches
    assert looked


@pytest.mark.parametrize("seed", range(2))
def test_branches_go_from_a_copy_in_the_models_own_class(seed: int, tmp_path: Any) -> None:
    model, x = network(seed), torch.randn(2, 3, 6, 6)
    graph = fxprune.analyze(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for names in ([*graph.branches][:1], [*graph.branches]):
        plan = fxprune.plan(model, x, 0.4, branches=names, into="module")
        narrow = plan.apply(model)
        assert type(narrow) is type(model)
        assert fxprune.verify(model, narrow, plan, x).exact
        gone = {name for n in names for name in graph.branches[n].tensors}
        own, theirs = narrow.state_dict(), fxprune.prune(graph, 0.4, branches=names).state_dict()
        assert {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in theirs.items()}
        assert not gone & own.keys()
        fxprune.save(narrow, tmp_path / "narrow.safetensors")
        opened = fxprune.load(lambda: network(seed), tmp_path / "narrow.safetensors")
        for other in (opened, copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
            assert torch.equal(other(x), narrow(x))
        narrow.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor, cache: list[Tensor]) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        cache.append(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Decoder(nn.Module):
    """Blocks whose branches are modules, with scales of the block's own; tokens are counted in a cache."""

    def __init__(self, counted: int | None = None) -> None:
        super().__init__()
        self.embed, self.head, self.counted = nn.Embedding(20, 12), nn.Linear(12, 20), counted
        self.position = nn.Embedding(32, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.attentions = nn.ModuleList(Attention() for _ in range(2))
        self.scales = nn.ParameterList(torch.rand(12) + 0.5 for _ in range(2))

    def generate(self) -> None:
        """As classes of transformers have it."""

    def forward(self, input_ids: Tensor, use_cache: bool = False, past: Past | None = None) -> Any:
        past, cache = past or Past(), [[], []]
        first = past.length if self.counted is not None else 0
        x = self.embed(input_ids) + self.position(torch.arange(first, first + input_ids.shape[1]))
        for number in range(2):
            f, _ = self.attentions[number](self.norms[number](x), cache=cache[number])
            x = x + self.scales[number] * f
        logits = self.head(x)
        if not use_cache:
            return logits
        kept = cache[self.counted or 0]
        return Step(logits, Past(kept[0].shape[2] if kept else 0))


@dataclass
class Past:
    length: int = 0


class Step:
    def __init__(self, logits: Tensor, past: Past) -> None:
        self.logits, self.past = logits, past


def test_whole_submodules_and_parameters_of_their_parents_go() -> None:
    model, x = Decoder().eval(), torch.randint(0, 20, (2, 5))
    graph = fxprune.analyze(model, x)
    assert list(graph.branches) == ["attentions.0", "attentions.1"]
    for names in ([*graph.branches][:1], [*graph.branches]):
        plan = fxprune.plan(model, x, 0.0, branches=names, into="module")
        narrow = plan.apply(model)
        assert fxprune.verify(model, narrow, plan, x).exact
        left = dict(narrow.named_parameters())
        assert not any(name in left for n in names for name in graph.branches[n].tensors)
        assert "returns zeros" in str(narrow.get_submodule(names[0]))


def test_a_branch_whose_cache_the_decode_step_counts_stays() -> None:
    model, x = Decoder(counted=0).eval(), {"input_ids": torch.randint(0, 20, (2, 5))}
    fxprune.plan(model, x, branches=["attentions.1"], into="module")
    with pytest.raises(SelectionError, match=r"attentions.0 cannot go.*put into the cache.*into=.graph"):
        fxprune.plan(model, x, branches=["attentions.0"], into="module")


def test_a_branch_that_is_no_modules_output_stays_with_its_line() -> None:
    model, x = Transformer(False).eval(), torch.randn(2, 6, 5)
    name = next(iter(fxprune.analyze(model, x).branches))
    with pytest.raises(SelectionError, match=r"cannot go from Transformer.*test_branches.py:\d+ in forward"):
        fxprune.plan(model, x, branches=[name], into="module")


@pytest.mark.parametrize("broken", ["copies", "stream"])
def test_a_broken_removal_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "copies":  # the sum is not copied where it is written into
        monkeypatch.setattr(coupling.branches._Search, "written_later", lambda *_: False)
    else:  # what is added is kept in place of the stream
        monkeypatch.setattr(remove_branches, "remove_branches", lambda program, branches: program)
    torch.manual_seed(0)
    model, x = stir(Residual([Unit("act", 8), Unit("act", 8)])).eval(), torch.randn(2, 3, 6, 6)
    graph = fxprune.analyze(model, x)
    pruned = fxprune.prune(graph, 0.0, branches=[*graph.branches])
    left = [name for name in pruned.state_dict() if "conv" in name]
    if broken == "stream":
        assert left
        return
    assert not left
    loss = pruned.train()(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
