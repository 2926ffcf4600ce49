"""What is left of small networks' accuracy on scikit-learn's digits, with and without calibration data.

A residual network, a vision transformer and an LSTM (which reads an image row by row) are trained for a
minute, pruned to shares of their parameters, and measured on images that neither trained nor calibrated::

    python examples/benchmarks/accuracy_digits.py
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fxprune

SHARES = (0.8, 0.6, 0.4, 0.25)
TRAIN, CALIBRATE = 1000, 256


class Residual(nn.Module):
    """A stem, three residual blocks, an average, a classifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Patches of 2x2, three layers before a mean over patches."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(torch.zeros(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 96, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(x).mean(1))


class Rows(nn.Module):
    """A recurrent layer of two levels over the rows of an image."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x[:, 0])[0][:, -1])


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """AdamW with a falling rate; images are shifted by up to a pixel."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps = epochs * (len(x) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(model(torch.roll(x[batch], shift, (2, 3))), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images, in percent, that are given their label."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    digits: Any = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.images[:, None], dtype=torch.float32)[order] / 8 - 1
    y = torch.tensor(digits.target)[order]
    data = list(x[:CALIBRATE].split(32))
    test = x[TRAIN:], y[TRAIN:]
    print(
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, seed {options.seed}\n"
    )
    print(
        "| network | parameters kept | L2 | L2, statistics | one call | seconds |\n|---|---|---|---|---|---|"
    )
    for model in (Residual(), Transformer(), Rows()):
        train(model, x[:TRAIN], y[:TRAIN], options.epochs)
        name = type(model).__name__
        print(f"| {name} | 1 | {accuracy(model, *test):.1f} | | | |", flush=True)
        for share in SHARES:
            budget = fxprune.Budget(params=share)
            plain = fxprune.prune(model, x[:1], budget=budget)
            statistics = fxprune.compensate(plain, model, data, least_squares=False)
            start = time.perf_counter()
            one_call = fxprune.prune(model, x[:1], budget=budget, calibrate=data)
            seconds = time.perf_counter() - start
            found = [accuracy(pruned, *test) for pruned in (plain, statistics, one_call)]
            figures = " | ".join(f"{figure:.1f}" for figure in found)
            print(f"| {name} | {share} | {figures} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
