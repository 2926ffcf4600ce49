"""Prune in steps and train in between; the optimiser, the rate schedule and the average go along.

    python examples/prune_and_train.py               # a small residual network on 8 × 8 digits, some seconds
    python examples/prune_and_train.py --epochs 20   # as it would be done in earnest

The digits are scikit-learn's, if it is installed (it is no dependency); else noisy patterns of the same size.
It asserts what it says, and runs as one of the tests.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A stem, three blocks, a classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, 8, 8)`` and labels ``(n,)``."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        labels = torch.arange(1797) % 10
        patterns = torch.rand(10, 1, 8, 8)
        return patterns[labels] + 0.3 * torch.randn(1797, 1, 8, 8), labels
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are recognised."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def main(epochs: int = 2, steps: int = 3, ratio: float = 0.5) -> None:
    """Train, narrow in steps with training in between, and compare."""
    torch.manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(images))
    test, rest = order[:360], order[360:]
    x = images[:2]

    model = ResNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    rounds = epochs * (steps + 1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def train(network: nn.Module, sparse: fxprune.regularize.GroupNorm | None = None) -> None:
        """Some epochs, with whatever optimiser, scheduler and average are current."""
        network.train()
        for _ in range(epochs):
            for batch in rest[torch.randperm(len(rest))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(images[batch]), labels[batch]).backward()
                if sparse is not None:
                    sparse.step()  # adds to the gradients
                optimizer.step()
                average.update_parameters(network)
            scheduler.step()

    # Sparse training: weak groups shrink before anything is removed.
    train(model, fxprune.regularize.GroupNorm(fxprune.analyze(model, x), model, strength=1e-3))
    print(f"{'original':<10} accuracy {accuracy(model, images[test], labels[test]):.3f}")

    for step in fxprune.schedule(model, x, ratio=ratio, steps=steps, curve="cubic"):
        # The state of the optimiser is narrowed with the weights, so that training goes on as it was.
        optimizer = step.plan.apply_to_optimizer(optimizer, step.previous, step.model)
        scheduler.optimizer = optimizer
        narrowed = AveragedModel(step.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        narrowed.module.load_state_dict(
            step.plan.apply_state_dict(average.module.state_dict(), step.previous)
        )
        narrowed.n_averaged.copy_(average.n_averaged)
        average = narrowed

        before = accuracy(step.model, images[test], labels[test])
        train(step.model)
        after = accuracy(step.model, images[test], labels[test])
        cost = fxprune.count(step.model, x)
        print(
            f"step {step.number:<5} accuracy {before:.3f} narrowed, {after:.3f} trained; "
            f"{cost.params} parameters, {cost.macs // len(x)} MACs an image"
        )

    pruned, whole = step.model, fxprune.count(model, x)
    assert cost.params < 0.35 * whole.params
    assert cost.macs < 0.35 * whole.macs
    # What went in all steps is one plan for the original: the same narrow network from any checkpoint of it.
    again = step.total.apply(model)
    assert [p.shape for p in again.parameters()] == [p.shape for p in pruned.parameters()]
    final = accuracy(pruned, images[test], labels[test])
    averaged = accuracy(average.module, images[test], labels[test])
    print(f"{'pruned':<10} accuracy {final:.3f}, of the moving average {averaged:.3f}")
    print(f"{'at once':<10} accuracy {accuracy(again, images[test], labels[test]):.3f}, without training")
    assert max(final, averaged) > 0.8


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=2, help="epochs before, and after each step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels to remove in the end")
    options, _ = parser.parse_known_args()
    main(options.epochs, options.steps, options.ratio)
