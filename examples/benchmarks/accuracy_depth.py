"""Depth against width: what is left of two networks where whole residual branches may go, and where not.

A ResNet-20 on CIFAR-10 (weights and images as for ``accuracy_resnet20.py``; its 10,000 test images measure)
and a vision transformer of six layers that is trained here on scikit-learn's digits (``accuracy_digits.py``;
797 digits measure). Each is pruned to a share of its MACs, and of its latency at a batch of one on this
machine, with ``depth=False`` and ``depth=True``, without labels and in one shot. Latencies are measured again
at the end, all networks of a budget in turns::

    python examples/benchmarks/accuracy_depth.py --weights resnet20_cifar10.safetensors --images package

"lost" is the mean square difference of the outputs from the original's, as a share of their variance, on
calibration data (``Compensation.after``).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accuracy_digits as digits
import accuracy_resnet20 as cifar
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

import fxprune
from fxprune.measure import measure_latency

_LAYERS = 6


def resnet(weights: Path, folder: Path) -> tuple[nn.Module, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The network, calibration batches, and what measures."""
    model = cifar.ResNet(blocks=3)
    model.load_state_dict(load_file(weights))
    images = cifar.images(folder / "data_batch_1.png")[: cifar.CALIBRATION]
    labels = torch.tensor(json.loads((folder / "test_lables.json").read_text()))
    return model.eval(), list(images.split(cifar.BATCH)), cifar.images(folder / "test_batch.png"), labels


def transformer(epochs: int) -> tuple[nn.Module, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """As :func:`resnet`."""
    data: Any = load_digits()
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images[:, None], dtype=torch.float32)[order] / 8 - 1
    y = torch.tensor(data.target)[order]
    model = digits.Transformer()
    layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True)
    model.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
    digits.train(model, x[: digits.TRAIN], y[: digits.TRAIN], epochs)
    return model, list(x[: digits.CALIBRATE].split(32)), x[digits.TRAIN :], y[digits.TRAIN :]


def rows(
    name: str,
    model: nn.Module,
    data: list[torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    budgets: list[fxprune.Budget],
) -> Iterator[str]:
    """Lines of the table."""
    x = data[0][:1]
    yield f"| {name} | | | {cifar.accuracy(model, *test):.2f} | | | | | |"
    for budget in budgets:
        pruned, seconds = {}, {}
        for depth in (False, True):
            start = time.perf_counter()
            pruned[depth] = fxprune.prune(model, x, budget=budget, calibrate=data, depth=depth).eval()
            seconds[depth] = time.perf_counter() - start
        networks = {"dense": model, "width": pruned[False], "depth": pruned[True]}
        times = measure_latency(networks, (x,), min_run_time=3.0, precision=0.02)
        for depth, way in ((False, "width"), (True, "depth")):
            found: Any = pruned[depth].meta
            ((metric, share),) = budget.settings().items()
            macs = fxprune.count(pruned[depth], x).macs / fxprune.count(model, x).macs
            cells = [
                name,
                f"{metric} {share:g}",
                "depth, too" if depth else "widths alone",
                f"{cifar.accuracy(pruned[depth], *test):.2f}",
                f"{found['compensation'].after:.3g}",
                f"{macs:.2f}",
                f"{times[way] / times['dense']:.2f}",
                ", ".join(found["fxprune"].branches) or "none",
                f"{seconds[depth]:.0f}",
            ]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of the ResNet-20; without, it is left out")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--latency", type=float, nargs="*", default=[0.7, 0.5])
    parser.add_argument("--macs", type=float, nargs="*", default=[0.6, 0.4])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", choices=["resnet", "transformer"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budgets = [fxprune.Budget(latency=share) for share in options.latency]
    budgets += [fxprune.Budget(macs=share) for share in options.macs]
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, one thread\n")
    print(
        "| network | budget | what may go | accuracy | lost | MACs | latency | branches that went | seconds |"
    )
    print(f"|{'---|' * 9}")
    if options.only != "resnet":
        model, data, *test = transformer(options.epochs)
        for line in rows(f"ViT, {_LAYERS} layers", model, data, (test[0], test[1]), budgets):
            print(line, flush=True)
    if options.only != "transformer" and options.weights is not None:
        model, data, *test = resnet(options.weights, options.images)
        for line in rows("ResNet-20", model, data, (test[0], test[1]), budgets):
            print(line, flush=True)


if __name__ == "__main__":
    main()
