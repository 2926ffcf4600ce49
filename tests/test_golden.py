"""Graphs before and after, as text: one file for each rewrite, and for each kind of refusal.

``pytest tests/test_golden.py --update-goldens`` writes the files anew; read the diff.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxprune
from fxprune.api import graph_for
from fxprune.nodes import copy_graph
from fxprune.passes import PIPELINE, Pass, rewrite
from fxprune.program import Program

HERE = Path(__file__).parent / "golden"
WIDTHS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_embeddings",
    "embedding_dim", "embed_dim", "num_heads", "head_dim", "qk_width", "v_width", "scale",
)  # fmt: skip
"""Attributes of modules that are shown."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(x + y).mean((2, 3)))


class HardCoded(nn.Module):
    """Attention with 2 heads of 4 written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).split([8, 8, 8], dim=-1)
        q = q.view(-1, 6, 2, 4).transpose(1, 2)
        k = k.view(-1, 6, 2, 4).transpose(1, 2)
        v = v.view(-1, 6, 2, 4).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) / 2.0).softmax(-1)
        return self.head(x + self.proj((weights @ v).transpose(1, 2).reshape(-1, 6, 8)))


class MovedBoundary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.first(x).chunk(3, dim=1)
        y = torch.cat([c, a, b], dim=1)
        front, back = y.split([5, 7], dim=1)
        return self.last(torch.cat([back.relu(), front], dim=1))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y.view(-1, 2, 4, 4, 4).transpose(1, 2).contiguous().view(-1, 8, 4, 4)
        return self.last(y)


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(F.relu6(self.depthwise(self.first(x)))))


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Rotary(nn.Module):
    """A table of angles that is computed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        angles = torch.arange(8, dtype=y.dtype, device=y.device) / 8
        return self.last(y * angles.cos())


class HiddenConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * y.shape[-1] ** -0.5)


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.layer_norm(self.first(x), (8,), self.weight, self.bias))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.pixel_shuffle(self.first(x), 2))


@fx.wrap
def split_in_half(x: Tensor) -> Tensor:
    """The width is a number inside a function that torch.fx keeps whole."""
    half = x.shape[-1] // 2
    return x.reshape(x.shape[0], 2, half).transpose(1, 2).reshape(x.shape[0], 2 * half) * half**-0.5


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(split_in_half(self.first(x)).relu())


class Padded(nn.Module):
    """Slices, a padding and an expansion with literal sizes; a roll over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 4, 1)
        self.shift = nn.Parameter(torch.randn(1, 10, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[:, 2:8]
        y = F.pad(y, (0, 0, 0, 0, 0, 4))
        return self.last(torch.roll(y + self.shift.expand(1, 10, 4, 4), 3, 1))


class Shared(nn.Module):
    """Two heads of 6 columns times one table, of which each head then needs its own columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 12), nn.Linear(12, 5)
        self.register_buffer("rates", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x).view(-1, 6, 2, 6) * self.rates.cos()).flatten(2))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(torch.renorm(self.first(x), 2, 0, 1.0))))


class TwoOutputs(nn.Module):
    """What leaves the network keeps its width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.last(self.middle(y).relu()), y


class States(NamedTuple):
    """A result, and what is returned beside it."""

    last: Tensor
    first: Tensor


class HiddenOutput(TwoOutputs):
    """What is returned beside the result holds zeros where channels went."""

    def forward(self, x: Tensor) -> States:
        y = self.first(x)
        y = y + self.middle(y).relu()
        return States(self.last(y), y)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x).relu())


@dataclass(frozen=True)
class Golden:
    """A network and what its golden file is there to show."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    intent: str


IMAGE, TOKENS, VECTOR = (2, 3, 4, 4), (2, 6, 3), (2, 3)
GOLDENS = [
    Golden("residual", Residual, IMAGE, "A residual network: the stem and the branch's end go together."),
    Golden(
        "hard_coded_views",
        HardCoded,
        TOKENS,
        "Literals of split, view and reshape follow; heads are balanced.",
    ),
    Golden("moved_boundary", MovedBoundary, IMAGE, "A chunk becomes a split; each part's size is read off."),
    Golden("channel_shuffle", Shuffle, IMAGE, "View, transpose, view become one index_select."),
    Golden(
        "grouped_convolutions", Groups, IMAGE, "Depthwise goes channel by channel, groups stay equally wide."
    ),
    Golden("multihead_attention", Multihead, TOKENS, "The module is replaced by one with an explicit scale."),
    Golden("computed_constant", Rotary, TOKENS, "What arange makes is narrowed by an inserted index_select."),
    Golden(
        "shared_table", Shared, TOKENS, "A table that serves two heads stays; each picks its own columns."
    ),
    Golden("hidden_constant", HiddenConstant, TOKENS, "C ** -0.5 keeps the original C."),
    Golden(
        "functional_norm", FunctionalNorm, TOKENS, "The literal shape of F.layer_norm follows; it is inexact."
    ),
    Golden("pixel_shuffle", PixelShuffle, IMAGE, "Four channels go for each one behind the pixel shuffle."),
    Golden("wrapped_function", Wrapped, VECTOR, "A function kept whole by torch.fx.wrap is traced into."),
    Golden("slices", Padded, IMAGE, "Slice bounds, padding and expand sizes follow; a roll becomes a pick."),
    Golden(
        "refused_unknown_operator", Unknown, TOKENS, "An operator without a rule freezes what it touches."
    ),
    Golden("filled_output", HiddenOutput, VECTOR, "A hidden state that is returned keeps its shape only."),
    Golden("refused_output", TwoOutputs, VECTOR, "Axes of outputs stay; nobody has to say so."),
    Golden(
        "refused_embedding_entries",
        Embedding,
        (2, 6),
        "Entries are looked up by number and stay; features go.",
    ),
]


@pytest.mark.parametrize("golden", GOLDENS, ids=[golden.name for golden in GOLDENS])
def test_golden(golden: Golden, update_goldens: bool) -> None:
    """The text of the graphs is what the file says, and the result is right."""
    model, x = golden.model(), torch.randn(golden.shape)
    if golden.name == "refused_embedding_entries":
        x = torch.randint(10, golden.shape)
    model.eval()
    plan = fxprune.plan(model, x, ratio=0.5, importance=_scattered)
    pruned = plan.apply(model)
    assert fxprune.verify(model, pruned, plan, x).error < 1e-8
    text = "\n".join(_text(golden, model, plan, pruned, x)) + "\n"
    path = HERE / f"{golden.name}.txt"
    if update_goldens:
        path.write_text(text)
    assert path.exists(), f"there is no {path.name}; run with --update-goldens"
    difference = difflib.unified_diff(
        path.read_text().splitlines(), text.splitlines(), "golden", "now", lineterm=""
    )
    assert path.read_text() == text, "\n".join(difference)


def test_every_pass_has_a_golden() -> None:
    """A new pass has a file here that shows what it does."""
    acted: set[str] = set()

    def between(rewriting: Pass, before: Program, after: Program) -> None:
        if after is not before:
            acted.add(type(rewriting).__name__)

    for golden in GOLDENS:
        if golden.name.startswith("refused"):
            continue
        model, x = golden.model().eval(), torch.randn(golden.shape)
        plan = fxprune.plan(model, x, ratio=0.5, importance=_scattered)
        rewrite(graph_for(plan, model), plan.removed, between)
    assert acted == {"NarrowParameters", *(type(rewriting).__name__ for rewriting in PIPELINE)}


def test_no_golden_is_left_over() -> None:
    """Every file belongs to a test, and none names a machine."""
    assert {path.stem for path in HERE.iterdir()} == {golden.name for golden in GOLDENS}
    for path in HERE.iterdir():
        assert ".py" not in path.read_text()


def _text(
    golden: Golden, model: nn.Module, plan: fxprune.PruningPlan, pruned: fx.GraphModule, x: Tensor
) -> Iterator[str]:
    graph = graph_for(plan, model)
    yield from ("INTENT", f"  {golden.intent}", "", "BEFORE")
    yield from _nodes(fxprune.prune(model, x, ratio=0), x)
    yield from ("", "GROUPS")
    for group in graph:
        yield f"  {group!r}, loses {len(plan.removed.get(group.name, []))}"
        for member in group.members:
            over = f" over {list(member.over)}" if member.over else ""
            yield f"    {member.axis}{over} of {list(member.tensor.shape)}"
    yield from ("", "FROZEN")
    for frozen in graph.frozen:
        remedy = f"; {frozen.remedy}" if frozen.remedy else ""
        yield f"  {frozen.axis}: {frozen.reason} at {frozen.node}{remedy}"
    yield from ("", "AFTER")
    if plan.held or plan.dissolved:
        yield f"  held: {list(plan.held)}, dissolved: {list(plan.dissolved)}"
    yield from _nodes(pruned, x)


def _scattered(group: fxprune.Group) -> list[int]:
    """Scores that depend on nothing but the position, in no simple order."""
    return [unit * unit * 5 % 13 for unit in range(group.size)]


class _Shapes(fx.Interpreter):
    """Remembers the shape of every node's result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.shapes[n.name] = _show(pytree.tree_map_only(Tensor, lambda t: list(t.shape), result))
        return result


def _nodes(module: fx.GraphModule, x: Tensor) -> Iterator[str]:
    """One line for each node: name, target, inputs with literals, output shape, parameter shapes."""
    interpreter = _Shapes(module)
    with torch.no_grad():
        interpreter.run(x)
    for node in module.graph.nodes:
        target = node.target if isinstance(node.target, str) else _get_qualified_name(node.target)
        target = target.rpartition("test_golden.")[2]
        inputs = [_show(a) for a in node.args] + [
            f"{key}={_show(value)}" for key, value in node.kwargs.items()
        ]
        line = f"  {node.name} = {node.op} {target}({', '.join(inputs)}) -> {interpreter.shapes[node.name]}"
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            widths = ", ".join(
                f"{name}={_show(getattr(leaf, name))}" for name in WIDTHS if hasattr(leaf, name)
            )
            parameters = ", ".join(f"{name} {list(p.shape)}" for name, p in leaf.named_parameters())
            line += f"  {type(leaf).__name__}({widths}) {{{parameters}}}"
        yield line


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, slice):
        return ":".join(
            "" if bound is None else _show(bound) for bound in (value.start, value.stop, value.step)
        )
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_show(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def test_names_of_erased_nodes_are_not_given_again() -> None:
    """A result is compared with its original node by node, by their names."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.relu, (x,))
    graph.output(graph.call_function(torch.relu, (x,)))
    graph.erase_node(first)
    for _ in range(2):
        graph, nodes = copy_graph(graph)
        with graph.inserting_before(nodes["relu_1"]):
            assert graph.call_function(torch.relu, (nodes["x"],)).name not in ("relu", "relu_1")
