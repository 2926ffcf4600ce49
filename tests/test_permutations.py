"""Chains of movements: what they permute is found without moving anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.coupling.permutations import find_permutation

SHAPE = (2, 12, 3, 4)

CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "shuffle": lambda x: x.view(2, 3, 4, 3, 4).transpose(1, 2).reshape(2, 12, 3, 4),
    "sizes": lambda x: x.view(x.size(0), 3, -1, 3, 4).transpose(1, 2).contiguous().view(x.shape),
    "through three factors": lambda x: x.reshape(2, 2, 3, 2, 3, 4).permute(0, 3, 2, 1, 4, 5).flatten(1, 3),
    "two chains": lambda x: x.view(2, 3, 4, 12).transpose(1, 2).reshape(2, 12, 12).view(2, 4, 3, 12)
    .movedim(2, 1).reshape(SHAPE),
    "there and back": lambda x: x.view(2, 3, 4, 12).transpose(1, 2).transpose(1, 2).reshape(SHAPE),
    "a further dimension": lambda x: x.view(2, 12, 12).view(2, 3, 4, 12).swapaxes(1, 2).reshape(SHAPE),
    "two dimensions": lambda x: x.view(2, 3, 4, 3, 2, 2).permute(0, 2, 1, 3, 5, 4).reshape(SHAPE),
    "across dimensions": lambda x: x.view(2, 3, 4, 12).permute(0, 3, 2, 1).reshape(SHAPE),
    "cut across": lambda x: x.view(2, 9, 16).transpose(1, 2).reshape(SHAPE),
    "another dimension": lambda x: x.view(2, 12, 3, 2, 2).transpose(3, 4).reshape(SHAPE),
    "batch": lambda x: x.transpose(0, 1).view(12, 2, 12).transpose(0, 1).reshape(SHAPE),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_agrees_with_numbers(name: str) -> None:
    """Moving the numbers of the entries says the same."""
    probe = torch.arange(288).reshape(SHAPE)
    graph = fx.Tracer().trace(CHAINS[name])  # type: ignore[arg-type]
    x = next(iter(graph.nodes))
    views = [node for node in graph.nodes if node.args and node.args[0] is x and node.target != "size"]
    views = [node for node in views if node.target is not getattr]
    found = find_permutation(views[0], {x: torch.empty(SHAPE, device="meta")})
    moved = CHAINS[name](probe)
    orders = [(dim, _order(probe, moved, dim)) for dim in range(4)]
    permuted = [(dim, order) for dim, order in orders if order is not None]
    if torch.equal(moved, probe) or not permuted:
        assert found is None
    else:
        assert found is not None
        assert found.dim == permuted[0][0]
        assert np.array_equal(found.index, permuted[0][1].numpy())


def _order(probe: Tensor, moved: Tensor, dim: int) -> Tensor | None:
    line = moved[tuple(slice(None) if d == dim else 0 for d in range(4))]
    order = line // probe.stride(dim) % probe.shape[dim]
    return order if torch.equal(probe.index_select(dim, order), moved) else None


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return self.b(self.a(x).view(n, 3, 4, h, w).transpose(1, 2).reshape(n, 12, h, w))


def test_activations_of_any_size() -> None:
    """Finding a shuffle takes no memory for each entry: these are 200 billion."""
    graph = fxprune.analyze(Shuffled(), torch.empty(64, 3, 1 << 14, 1 << 14, device="meta"))
    assert [group.size for group in graph.groups] == [12]
    assert all(len(rows) == 1 for rows in graph.groups[0].balance)
