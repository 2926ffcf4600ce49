"""A second size is looked at on shapes alone where that tells as much as the labels would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from patterns import CASES
from torch import Tensor, nn

import fxprune
from fxprune.coupling import other_sizes
from fxprune.coupling.operator_calls import OperatorCalls, UnlikeError, _repeats
from fxprune.coupling.units import Axis, Label, Value


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each run at another size whether it had labels."""
    runs: list[bool] = []
    interpret = other_sizes.interpret

    def count(program: Any, inputs: Any, **options: Any) -> Any:
        runs.append(options.get("labels", True))
        return interpret(program, inputs, **options)

    monkeypatch.setattr(other_sizes, "interpret", count)
    return runs


def network(forward: Any, **layers: nn.Module) -> nn.Module:
    net: nn.Module = type("Network", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        setattr(net, name, layer)
    return net.eval()


def conv(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1)


def plain(self: Any, x: Tensor) -> Tensor:
    x = self.norm(self.a(x)).relu()
    pooled: Tensor = self.b(x + torch.sigmoid(x.mean((2, 3), keepdim=True))).mean((2, 3))
    return pooled


def tokens(self: Any, x: Tensor) -> Tensor:
    """Labels by themselves in each reshape."""
    n, _, h, w = x.shape
    found: Tensor = self.b(self.a(x).reshape(n, 8, h * w)[:, :, : h * w - 1].flatten(2).unsqueeze(-1))
    return found


def mixed(self: Any, x: Tensor) -> Tensor:
    """Channels that go where positions were, by the sizes of the image."""
    n, _, h, w = x.shape
    found: Tensor = self.b(self.a(x).flatten(2).transpose(1, 2).reshape(n, 8, h, w))
    return found


def folded(self: Any, x: Tensor) -> Tensor:
    """Channels together with the batch."""
    n, _, h, w = x.shape
    found: Tensor = self.b(self.a(x).reshape(n * 8, 1, h, w).relu().reshape(n, 8, h, w))
    return found


def behind(self: Any, x: Tensor) -> Tensor:
    """Channels in front of a width that changes, put together with it."""
    n, _, h, w = x.shape
    found: Tensor = self.b(self.a(x).transpose(2, 3).reshape(n, 8 * w, h).relu().reshape(n, 8, w, h))
    return found


def stretched(self: Any, x: Tensor) -> Tensor:
    """As many entries of the batch as go into the channels that there are."""
    n, _, h, w = x.shape
    found: Tensor = self.b(self.a(x).reshape(n // 2, 16, h, w).reshape(n, 8, h, w))
    return found


def transposed(self: Any, x: Tensor) -> Tensor:
    """Channels of which each is followed by the same of the other entries of the batch."""
    n, _, h, w = x.shape
    found: Tensor = self.b(self.a(x).transpose(0, 1).reshape(8 * n, h, w).reshape(n, 8, h, w))
    return found


def padded(self: Any, x: Tensor) -> Tensor:
    """Positions are padded to a multiple of four, and cut off again; the shape is copied where need be."""
    _, _, h, w = x.shape
    y = nn.functional.pad(self.a(x), (0, -w % 4, 0, -h % 4))
    found: Tensor = self.b(y[:, :, :h, :w].contiguous())
    return found


def wider(self: Any, x: Tensor) -> Tensor:
    """Channels are padded by the size of the image."""
    y = nn.functional.pad(self.a(x), (0, 0, 0, 0, x.shape[2] - 8, 8 - x.shape[2]))
    found: Tensor = self.b(y)
    return found


def cut(self: Any, x: Tensor) -> Tensor:
    """All channels for these sizes, and fewer for others."""
    found: Tensor = self.b(
        nn.functional.pad(self.a(x)[:, : 16 - x.shape[2]], (0, 0, 0, 0, 0, x.shape[2] - 8))
    )
    return found


def rotated(self: Any, x: Tensor) -> Tensor:
    """A table of positions by frequencies, computed from the sizes and a buffer, meets channels."""
    n, _, h, w = x.shape
    angles = torch.arange(h * w)[:, None] * self.table
    y = self.a(x).flatten(2).transpose(1, 2) * angles.cos()
    found: Tensor = self.b(y.transpose(1, 2).reshape(n, 8, h, w))
    return found


def prefixed(self: Any, x: Tensor) -> Tensor:
    """Positions with one more in front of them, as models look for sequences that are packed together."""
    rows = torch.arange(x.shape[2])[None].expand(x.shape[0], -1)
    follows = torch.cat([rows[:, :1] - 1, rows], 1).diff(dim=1) == 1
    found: Tensor = self.b(self.a(x) * follows[:, None, :, None])
    return found


def attend(self: Any, x: Tensor) -> Tensor:
    """Attention of as many positions as there are embeddings, entry by entry of the batch."""
    y = self.a(x).flatten(2).transpose(1, 2) + self.positions
    found: Tensor = self.b(
        self.attention(y, y, y, need_weights=False)[0].transpose(1, 2).unflatten(2, (4, 4))
    )
    return found


def example(forward: Any) -> nn.Module:
    net = network(forward, a=conv(3, 8), b=conv(8, 2), norm=nn.BatchNorm2d(8))
    net.register_buffer("table", torch.rand(8))
    return net


FORWARDS = [
    (plain, False), (tokens, False), (mixed, True), (folded, False), (behind, True), (stretched, False),
    (transposed, True), (padded, False), (wider, True), (cut, True), (rotated, False),
    (prefixed, False),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "labels"), FORWARDS)
def test_labels_are_looked_at_again_only_where_a_call_asks_for_it(
    forward: Any, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = counted(monkeypatch)
    fxprune.analyze(example(forward), torch.randn(2, 3, 8, 8))
    assert runs[0] is False
    assert (True in runs) is labels


@pytest.mark.parametrize("width", [5, 8, 13])
def test_channels_in_front_of_a_width_are_looked_at_with_labels(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the other width is a multiple, so that the labels of the one are as long as a period."""
    net, x = example(behind), torch.randn(2, 3, 8, width)
    expected = with_labels(net, x, monkeypatch)
    runs = counted(monkeypatch)
    assert list(found(net, x)) == expected
    assert True in runs


@pytest.mark.parametrize(
    ("ids", "over", "dim", "period", "repeats"),
    [
        ([0, 1, 0, 1], (), 1, 2, True),
        ([0, 1, 0, 1], (), 1, 4, True),
        ([0, 1, 0, 1], (), 1, 1, False),
        ([0, 0, 1, 1], (), 1, 2, False),
        ([[0, 1], [0, 1]], (0,), 0, 1, True),
        ([[0, 1], [2, 3]], (0,), 0, 1, False),
        ([[0, 1], [2, 3], [0, 1], [2, 3]], (0,), 0, 2, True),
        ([0, 1, 2, 3], (), 0, 1, True),  # labels of another dimension
    ],
)
def test_repeated_labels(ids: Any, over: tuple[int, ...], dim: int, period: int, repeats: bool) -> None:
    label = Label(np.array(ids) + 1, over, Axis("weight", 0))
    value = Value((4 if not over else len(ids), len(np.array(ids).T)), [None, label])
    assert _repeats(value, dim, period) is repeats


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_looked_at_on_shapes_alone(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which operators PyTorch makes the linear layers within depends on strides, and so on the batch."""
    layers = {"a": conv(3, 8), "b": conv(8, 2), "attention": nn.MultiheadAttention(8, 2, batch_first=True)}
    net, x = network(attend, **layers), torch.randn(batch, 3, 4, 4)
    net.register_parameter("positions", nn.Parameter(torch.randn(16, 8)))
    expected = with_labels(net, x, monkeypatch)
    runs = counted(monkeypatch)
    assert list(found(net, x)) == expected
    assert runs
    assert True not in runs


def found(net: nn.Module, inputs: Any) -> Iterator[Any]:
    graph = fxprune.analyze(net.eval(), inputs)
    yield from ((group.name, group.size, group.exact, [m.axis for m in group.members]) for group in graph)
    yield from (str(frozen) for frozen in graph.frozen)


def with_labels(net: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is found where labels are looked at again in any case."""

    def unlike(self: OperatorCalls, run: Any) -> Any:
        def follow(*call: Any) -> None:
            raise UnlikeError("another operator")

        return follow

    with monkeypatch.context() as patch:
        patch.setattr(OperatorCalls, "follow", unlike)
        return list(found(net, inputs))


@pytest.mark.parametrize("name", sorted(CASES)[::6])
def test_shapes_tell_what_the_labels_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = CASES[name].build(), CASES[name].inputs
    assert list(found(net, inputs)) == with_labels(net, inputs, monkeypatch)


@pytest.mark.parametrize("forward", [forward for forward, _ in FORWARDS])
@pytest.mark.parametrize("batch", [1, 2])
def test_so_they_do_for_these_networks(forward: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = example(forward), torch.randn(batch * (1 + (forward is stretched)), 3, 8, 8)
    assert list(found(net, inputs)) == with_labels(net, inputs, monkeypatch)
