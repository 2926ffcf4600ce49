"""Check that analyses and plans take time in proportion to the graph, and memory apart from the weights.

- Time: ``fxprune.analyze`` of a plain residual network of n and of 2n blocks. Twice the blocks should take
  about twice the time (the bar is 2.2).
- Memory: the peak resident memory of ``fxprune.analyze`` on torchvision's ViT-H/14 (633 million parameters,
  2.5 GB), built on the meta device, above what the process held after the imports (the bar is 200 MB).
- Layers: ``fxprune.plan`` of a Llama of the widths of 8 B parameters on the meta device, with 2 and with more
  layers. Sixteen times the layers should take at most 5 times as long (needs transformers; else left out).

Times are of the processor. Each figure comes from a process of its own. Exit code 1 says that a bar was
missed.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --blocks 100 --model vit_l_16 --layers 80
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

TIME_BAR = 2.2
MEMORY_BAR = 200e6
LAYERS_BAR = 5.0


def residual_network(blocks: int, width: int = 16) -> Any:
    """A stem, ``blocks`` plain residual blocks of one width, and a classifier."""
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(Block() for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    ).eval()


def measure_time(blocks: int, rounds: int) -> dict[str, float]:
    """Median seconds of the analysis of ``blocks`` and of twice as many, in turns, after a warm-up."""
    import torch

    import fxprune

    inputs = torch.randn(1, 3, 32, 32)
    fxprune.analyze(residual_network(2), inputs)
    seconds: dict[int, list[float]] = {blocks: [], 2 * blocks: []}
    for _ in range(rounds):
        for size, times in seconds.items():
            model = residual_network(size)
            start = time.process_time()
            fxprune.analyze(model, inputs)
            times.append(time.process_time() - start)
    return {"once": median(seconds[blocks]), "twice": median(seconds[2 * blocks])}


def measure_memory(name: str) -> dict[str, float]:
    """Peak bytes of the analysis of a torchvision model on the meta device, above those after the imports."""
    import torch
    from torchvision.models import get_model

    import fxprune

    held = resident()
    with torch.device("meta"):
        model = get_model(name, weights=None).eval()
        inputs = torch.empty(1, 3, 224, 224)
    start = time.process_time()
    fxprune.analyze(model, inputs)
    seconds = time.process_time() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": peak() - held, "held": held, "weights": size, "seconds": seconds}


def measure_layers(layers: int) -> dict[str, float]:
    """Seconds for the plan of a Llama with 2 layers, and with ``layers``; none without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return {}
    import torch

    import fxprune

    def plan(count: int) -> float:
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=count, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256, use_cache=False,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
            inputs = {"input_ids": torch.ones(1, 16, dtype=torch.long)}
        start = time.process_time()
        fxprune.plan(model, inputs, ratio=0.5, importance="random")
        return time.process_time() - start

    plan(1)
    return {"two": plan(2), "more": plan(layers)}


def resident() -> float:
    """Resident bytes of this process now (the peak so far, where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak()
    return pages * resource.getpagesize()


def peak() -> float:
    """The most resident bytes that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks", type=int, default=40, help="residual blocks of the smaller network (default: 40)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each size, of which the median counts (default: 5)"
    )
    parser.add_argument(
        "--model", default="vit_h_14", help="torchvision model whose memory is measured (default: vit_h_14)"
    )
    parser.add_argument("--layers", type=int, default=32, help="layers of the deeper Llama (default: 32)")
    parser.add_argument("--worker", choices=["time", "memory", "layers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "time":
        print(json.dumps(measure_time(options.blocks, options.rounds)))
        return 0
    if options.worker == "memory":
        print(json.dumps(measure_memory(options.model)))
        return 0
    if options.worker == "layers":
        print(json.dumps(measure_layers(options.layers)))
        return 0

    shared = ["--blocks", str(options.blocks), "--rounds", str(options.rounds), "--model", options.model]
    took = in_a_process("--worker", "time", *shared)
    ratio = took["twice"] / took["once"]
    print(
        f"time: {options.blocks} blocks {took['once']:.3f} s, {2 * options.blocks} blocks "
        f"{took['twice']:.3f} s: {ratio:.2f} times (bar: {TIME_BAR})"
    )
    held = in_a_process("--worker", "memory", *shared)
    print(
        f"memory: {options.model}, {held['weights'] / 1e9:.2f} GB of weights: {held['bytes'] / 1e6:.0f} MB "
        f"above the {held['held'] / 1e6:.0f} MB after the imports (bar: {MEMORY_BAR / 1e6:.0f}), "
        f"in {held['seconds']:.2f} s"
    )
    deep = in_a_process("--worker", "layers", "--layers", str(options.layers))
    slower = deep["more"] / deep["two"] if deep else 0.0
    if deep:
        print(
            f"layers: Llama of 2 {deep['two']:.2f} s, of {options.layers} {deep['more']:.2f} s: "
            f"{slower:.1f} times (bar for 32: {LAYERS_BAR})"
        )
    missed = options.layers == 32 and slower > LAYERS_BAR
    return int(ratio > TIME_BAR or held["bytes"] > MEMORY_BAR or missed)


if __name__ == "__main__":
    sys.exit(main())
