"""A second size is looked at on shapes alone where that tells as much as the labels would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from patterns import CASES
from torch import Tensor, nn

import fxprune
from fxprune.coupling import other_sizes
from fxprune.coupling.operator_calls import OperatorCalls, UnlikeError


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


@pytest.mark.parametrize(
    ("forward", "labels"), [(plain, False), (tokens, False), (mixed, True), (folded, True)]
)
def test_labels_are_looked_at_again_only_where_a_call_asks_for_it(
    forward: Any, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = counted(monkeypatch)
    net = network(forward, a=conv(3, 8), b=conv(8, 2), norm=nn.BatchNorm2d(8))
    fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert runs[0] is False
    assert (True in runs) is labels


def found(case: Any) -> Iterator[Any]:
    graph = fxprune.analyze(case.build().eval(), case.inputs)
    yield from ((group.name, group.size, group.exact, [m.axis for m in group.members]) for group in graph)
    yield from (str(frozen) for frozen in graph.frozen)


@pytest.mark.parametrize("name", sorted(CASES)[::6])
def test_shapes_tell_what_the_labels_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = list(found(CASES[name]))

    def unlike(self: OperatorCalls) -> Any:
        def follow(*call: Any) -> None:
            raise UnlikeError("another operator")

        return follow

    monkeypatch.setattr(OperatorCalls, "follow", unlike)
    assert list(found(CASES[name])) == quick
