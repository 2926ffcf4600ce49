"""How many analyses (captures and couplings) one use of fxprune makes, and how long it takes.

    python examples/benchmarks/analyses.py [resnet50 vit_b_16 ...]

Prints a table in Markdown. Times are those of the CPU for one thread, the least of three runs; Python's
cycle collector runs before each, so that no run pays for what another has left.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

import fxprune

MODELS = ("resnet50", "vit_b_16", "mobilenet_v3_small", "densenet121")
RUNS = 3


class Counter:
    """Counts the captures and couplings of the process."""

    def __init__(self) -> None:
        self.captures = self.couplings = 0
        capture, couple = fxprune.analysis.capture, fxprune.coupling.graph.interpret

        def counted_capture(*args: Any, **kwargs: Any) -> Any:
            self.captures += 1
            return capture(*args, **kwargs)

        def counted_coupling(*args: Any, **kwargs: Any) -> Any:
            self.couplings += 1
            return couple(*args, **kwargs)

        fxprune.analysis.capture = counted_capture
        fxprune.coupling.graph.interpret = counted_coupling

    def of(self, use: Callable[[], Any]) -> tuple[int, int, float]:
        """Captures, couplings and seconds of one use."""
        seconds = []
        for _ in range(RUNS):
            gc.collect()
            self.captures = self.couplings = 0
            start = time.process_time()
            use()
            seconds.append(time.process_time() - start)
        return self.captures, self.couplings, min(seconds)


def uses(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The uses that are counted, by name."""

    def around() -> None:
        plan = fxprune.plan(model, x)
        pruned = plan.apply(model)
        fxprune.verify(model, pruned, plan, x)
        plan.masks(model)
        plan.apply_state_dict(model.state_dict(), model)

    return {
        "prune": lambda: fxprune.prune(model, x),
        "plan, apply": lambda: fxprune.plan(model, x).apply(model),
        "plan, apply, verify, masks, state dict": around,
        "schedule of 3 steps": lambda: list(fxprune.schedule(model, x, 0.5, steps=3)),
    }


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    counter = Counter()
    print("| model | use | captures | couplings | CPU ms | times prune |")
    print("|---|---|--:|--:|--:|--:|")
    for name in sys.argv[1:] or MODELS:
        model, x = torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224)
        fxprune.prune(model, x)
        first = 0.0
        for use, function in uses(model, x).items():
            captures, couplings, seconds = counter.of(function)
            first = first or seconds
            print(
                f"| {name} | {use} | {captures} | {couplings} | {1e3 * seconds:.0f} | {seconds / first:.2f} |"
            )


if __name__ == "__main__":
    main()
