"""Hold budgets against what an outside counter says of the network that comes out.

For each model, share and metric, ``fxprune.prune(model, x, budget=fxprune.Budget(metric=share))`` is run, and
what is left is counted on the result: parameters by adding up its tensors, multiply-accumulates by torch's
``FlopCounterMode`` on a forward pass. The achieved figure must lie in [0.99, 1] of the budget; with
``--round-to`` it must not exceed it. Weights are random, inputs one image of the model's size.

    python examples/benchmarks/budgets.py
    python examples/benchmarks/budgets.py --round-to 8 --scope global resnet50 timm:deit_tiny_patch16_224

Prints a table in Markdown; exit code 1 says that a budget was missed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fxprune

MODELS = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "mnasnet1_0",
    "squeezenet1_1", "shufflenet_v2_x1_0", "regnet_x_400mf", "regnet_y_400mf", "densenet121", "googlenet",
    "convnext_tiny", "swin_t", "timm:vit_small_patch16_224", "timm:deit_tiny_patch16_224",
    "timm:resmlp_12_224", "timm:ghostnet_100", "timm:poolformer_s12", "timm:edgenext_xx_small",
]  # fmt: skip
METRICS = ("params", "macs")
SHARES = (0.8, 0.5, 0.25)


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model in evaluation mode and an image for it."""
    source, _, bare = name.rpartition(":")
    if source == "timm":
        import timm

        model = timm.create_model(bare)
        size = model.default_cfg["input_size"]
    else:
        import torchvision

        extra = {"init_weights": True, "aux_logits": False} if bare in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(bare, **extra)
        size = (3, 299, 299) if bare == "inception_v3" else (3, 224, 224)
    return model.eval(), torch.randn(1, *size)


def cost(model: torch.nn.Module, inputs: torch.Tensor) -> dict[str, int]:
    """What torch itself counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    params = {id(p): p.numel() for p in model.parameters()}
    return {"params": sum(params.values()), "macs": counter.get_total_flops() // 2}


def main() -> int:
    parser = argparse.ArgumentParser(description="hold budgets against an outside counter")
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision names, or timm:NAME")
    parser.add_argument("--scope", default="local", choices=["local", "global", "isomorphic"])
    parser.add_argument("--round-to", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    cells = [(metric, share) for metric in METRICS for share in SHARES]
    print("| model | " + " | ".join(f"{metric} {share}" for metric, share in cells) + " | s a budget |")
    print("|---|" + "---:|" * (len(cells) + 1))
    missed, uses = [], []
    for name in options.models:
        model, inputs = build(name)
        before = cost(model, inputs)
        row, start = [], time.process_time()
        for metric, share in cells:
            arguments: dict[str, Any] = {"scope": options.scope, "round_to": options.round_to}
            try:
                pruned = fxprune.prune(model, inputs, budget=fxprune.Budget(**{metric: share}), **arguments)
            except fxprune.FxpruneError as error:
                row.append(type(error).__name__)
                missed.append(f"{name} {metric} {share}: {error}")
                continue
            left = cost(pruned, inputs)[metric]
            use = left / (share * before[metric])
            row.append(f"{left / before[metric]:.4f}")
            uses.append(use)
            if not (0 if options.round_to else 0.99) <= use <= 1:
                missed.append(f"{name} {metric} {share}: {use:.4f} of the budget is used")
        seconds = (time.process_time() - start) / len(cells)
        print(f"| {name.partition(':')[2] or name} | " + " | ".join(row) + f" | {seconds:.1f} |", flush=True)
    print(f"\nOf {len(options.models)} models x {len(cells)} budgets, {len(missed)} were missed;", end=" ")
    middle = sorted(uses)[len(uses) // 2]
    print(f"least use {min(uses):.4f}, largest {max(uses):.4f}, in the middle {middle:.4f}.")
    print(f"scope {options.scope}, round_to {options.round_to}, torch {torch.__version__},", end=" ")
    print(f"fxprune {fxprune.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    print(*missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
