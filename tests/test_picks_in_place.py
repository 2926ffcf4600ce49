"""Strided slices, shuffles and in-place operators: a pick by number makes a copy, and a slice does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import check
from torch import Tensor, nn

import fxprune


class Net(nn.Module):
    """One linear layer, what is being tested, and a layer of its width or of half of it."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor], exported: bool) -> None:
        super().__init__()
        self.first, self.all, self.part = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(16, 4)
        self.mix = nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(32))
        self.body, self.exported = body, exported

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and not isinstance(x, Tensor):
            raise TypeError("not a tensor")
        return self.body(self, self.first(x))


def shuffled(y: Tensor) -> Tensor:
    return y.unflatten(-1, (2, 16)).transpose(-1, -2).reshape(y.shape)


def added_then_sliced(net: Net, y: Tensor) -> Tensor:
    y = y.add_(net.bias)
    return net.part(y[..., ::2].sigmoid() * y[..., 1::2])


def added_aside_then_sliced(net: Net, y: Tensor) -> Tensor:
    y.add_(net.bias)
    return net.part(y[..., ::2].sigmoid() * y[..., 1::2])


def added_then_shuffled(net: Net, y: Tensor) -> Tensor:
    return net.all(shuffled(y.add_(net.bias)).relu())


def added_to_a_copy(net: Net, y: Tensor) -> Tensor:
    return net.all(y.flip(-1).add_(net.bias) + y)


def sliced_then_added(net: Net, y: Tensor) -> Tensor:
    part = y[..., ::2]
    y.mul_(2.0)
    return net.part(part)


def written_through_a_slice(net: Net, y: Tensor) -> Tensor:
    y[..., ::2].mul_(2.0)
    return net.all(y)


def slice_assigned(net: Net, y: Tensor) -> Tensor:
    y[..., 1::2] = y[..., ::2].sigmoid()
    return net.all(y.relu())


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(
    ("body", "narrows"),
    [
        (added_then_sliced, True),
        (added_aside_then_sliced, True),
        (added_then_shuffled, True),
        (added_to_a_copy, True),
        (slice_assigned, True),
        (sliced_then_added, False),
        (written_through_a_slice, False),
    ],
)
def test_a_copy_is_picked_only_where_it_will_do(
    body: Callable[[Net, Tensor], Tensor], narrows: bool, exported: bool
) -> None:
    check(Net(body, exported), torch.rand(3, 8), narrows=["first.weight"] if narrows else [], shrinks=narrows)


def unwritten_memory(net: Net, y: Tensor) -> Tensor:
    joined = y.new_empty(y.shape[0], 32)
    joined[:, :16].copy_(y[:, :16].sigmoid())
    joined[:, 16:].copy_(y[:, 16:])
    return net.all(nn.functional.layer_norm(joined, (32,)))


def complex_after_a_norm(net: Net, y: Tensor) -> Tensor:
    mixed = net.mix(nn.functional.layer_norm(y, (32,)))  # sums of fewer terms: other roundings
    pairs = torch.view_as_complex(mixed.unflatten(-1, (16, 2)).contiguous())
    return net.all(torch.view_as_real(pairs * pairs).flatten(1))


@pytest.mark.parametrize("body", [unwritten_memory, complex_after_a_norm])
def test_node_by_node(body: Callable[[Net, Tensor], Tensor]) -> None:
    """Slices of memory that is not written yet, and complex values, are compared behind a narrowed norm."""
    model, x = Net(body, True), torch.rand(3, 8)
    plan = fxprune.plan(model, x)
    assert plan.removed
    del [torch.rand(3, 32, dtype=torch.float64) for _ in range(64)][:]  # leaves numbers behind
    assert fxprune.verify(model, plan.apply(model), plan, x).skipped


class One(nn.Module):
    """Goes on with one channel of six, picked by its number, or with all but for what is done to one."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.pick = nn.Conv2d(3, 6, 1), pick
        self.b = nn.Conv2d(pick(torch.zeros(1, 6, 1, 1)).shape[1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pick(self.a(x).relu()))


def doubled(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2::4] *= 2
    return x


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda x: x[:, 2::4],
    "from the end": lambda x: x[:, -2::5],
    "list": lambda x: x[:, [2]],
    "tensor": lambda x: x.index_select(1, torch.tensor([2])),
    "slice": lambda x: x[:, 2:3],
    "number": lambda x: x[:, 2].unsqueeze(1),
    "several": lambda x: torch.cat([x[:, [4]], x[:, 2::4], x[:, 1:3]], 1),
    "in place": doubled,
}


@pytest.mark.parametrize("into", ["graph", "module"])
@pytest.mark.parametrize("name", ONE)
def test_one_channel_that_is_picked_is_the_same_one_where_others_go(name: str, into: str) -> None:
    torch.manual_seed(0)
    net, x = One(ONE[name]).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        net.a.weight[:2] *= 1e-3  # these go, and all that follow get other numbers
    plan = fxprune.plan(net, x, ratio=0.4, into=into)
    pruned = plan.apply(net)
    assert into == "module" or name == "in place" or pruned.get_parameter("a.weight").shape[0] < 6
    assert fxprune.verify(net, pruned, plan, x).exact
