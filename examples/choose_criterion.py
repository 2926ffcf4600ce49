"""Criteria compared on one small network: what the loss is when half of the hidden units go, by each.

    python examples/choose_criterion.py             # a few seconds

It asserts what it prints, and runs as one of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.importance import KFAC, Activation, Fisher, Magnitude, Taylor, Wanda


def make_data(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of three classes in 16 features, of which the last 8 are silent."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        x = torch.randn(64, 16, generator=generator)
        x[:, 8:] = 0
        batches.append((x, x[:, :3].square().argmax(1)))
    return batches


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """Fifteen passes over the data."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(15):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """The mean of the loss over all batches."""
    return sum(float(F.cross_entropy(model(x), y)) for x, y in data) / len(data)


def main() -> None:
    """Train, prune by each criterion, compare."""
    torch.manual_seed(0)
    data = make_data(20)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 3))
    train(model, data)
    inputs = [x for x, _ in data]

    criteria: dict[str, Any] = {
        "random": "random",
        "weights: L2 over all members": "l2",
        "weights: L1 of the filters": Magnitude(1, members="root"),
        "activations: mean size": Activation(inputs),
        "weights x activations": Wanda(inputs),
        "loss, first order": Taylor(nn.CrossEntropyLoss(), data),
        "loss, second order": Fisher(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), data),
        "loss, second order by channel": KFAC(nn.CrossEntropyLoss(), data),
    }
    print(f"{'unpruned':32} {mean_loss(model, data):.3f}")
    losses = {}
    for name, importance in criteria.items():
        pruned = fxprune.prune(model, data[0][0], ratio=0.5, importance=importance)
        losses[name] = mean_loss(pruned, data)
        print(f"{name:32} {losses[name]:.3f}   {pruned.meta['fxprune'].settings['importance']}")
    assert min(loss for name, loss in losses.items() if "loss" in name) < losses["random"]


if __name__ == "__main__":
    main()
