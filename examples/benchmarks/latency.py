"""Hold latency budgets against a clock of their own.

For each model, share and mode, ``fxprune.prune(model, x, budget=fxprune.Budget(latency=share))`` is asked for
a network that takes that share of the original's time. What comes is then timed here, apart from fxprune's
own measurements: the original and the result in turns, one pass each; the median of each one's times
is what counts. The share that is measured must be within 15 % of the one that was asked for.

    python examples/benchmarks/latency.py  # three models, share 0.6, eager and compiled
    python examples/benchmarks/latency.py resnet50 --shares 0.8 0.6 0.4 --modes eager
    python examples/benchmarks/latency.py --threads 1 --out latency.md

A network takes about a minute eager and a few minutes compiled (every candidate is compiled anew, which takes
a C++ compiler). Nothing else should run meanwhile: turns and medians keep out what other processes
take only to some degree. Columns of the table:

- asked: the share that was asked for;
- estimate: what the table of ATen calls says of the result. It knows no fixed costs and no fusion, and may be
  far from the others: fxprune corrects what it asks of it by timing candidates ("tries");
- fxprune: the share that fxprune measured, and reports, when it accepted the result;
- measured: the share that this script measured afterwards; "off" is how far it is from the one asked for;
- fastest: the same from the fastest pass of each in place of the median, as a check on noise;
- ms: medians of the original and of the result; MACs: the share of multiply-accumulates that is left;
- s: seconds that planning took.

Prints a table in Markdown; exit code 1 says that a share was missed by more than 15 %.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

MODELS = ("resnet50", "mobilenet_v2", "timm:vit_small_patch16_224")
MODES = ("eager", "compiled")
BAR = 0.15


def build(name: str) -> Any:
    """A model with random weights, in evaluation mode, from torchvision or timm."""
    import torch

    torch.manual_seed(0)
    source, _, bare = name.rpartition(":")
    if source == "timm":
        import timm

        return timm.create_model(bare).eval()
    import torchvision

    return torchvision.models.get_model(bare).eval()


def in_turns(models: dict[str, Any], x: Any, seconds: float) -> dict[str, list[float]]:
    """Seconds of single passes of each model, which take turns; every second round in reverse order."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for model in models.values():
            for _ in range(3):
                model(x)
        start = time.perf_counter()
        order = list(models)
        while time.perf_counter() - start < seconds * len(models) or len(times[order[0]]) < 11:
            for name in order:
                begin = time.perf_counter()
                models[name](x)
                times[name].append(time.perf_counter() - begin)
            order.reverse()
    return times


def row(name: str, share: float, mode: str, options: argparse.Namespace) -> tuple[str, bool]:
    """A row of the table, and whether the share was met."""
    import torch

    import fxprune

    model, x = build(name), torch.randn(options.batch, 3, 224, 224)
    compiled = mode == "compiled"
    budget = fxprune.Budget(latency=share, compiled=compiled, table=options.table)
    start = time.perf_counter()
    pruned = fxprune.prune(model, x, budget=budget)
    took = time.perf_counter() - start
    settings = pruned.meta["fxprune"].settings
    pair = {"original": model, "result": pruned}
    if compiled:
        torch.compiler.reset()
        pair = {key: torch.compile(net, dynamic=False) for key, net in pair.items()}
    times = in_turns(pair, x, options.seconds)
    middle = {key: median(values) for key, values in times.items()}
    measured = middle["result"] / middle["original"]
    fastest = min(times["result"]) / min(times["original"])
    off = measured / share - 1
    own = settings["measured"]
    macs = fxprune.count(pruned, x).macs / fxprune.count(model, x).macs
    cells = (
        name.rpartition(":")[2], mode, f"{share:g}", f"{settings['left']['latency']:.2f}",
        f"{own['latency']:.3f}", f"{measured:.3f}", f"{off:+.1%}", f"{fastest:.3f}",
        f"{middle['original'] * 1e3:.1f} -> {middle['result'] * 1e3:.1f}", f"{macs:.2f}",
        f"{own['tries']}", f"{took:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |", abs(off) <= BAR


def about(options: argparse.Namespace) -> str:
    """Date, versions, machine."""
    import torch

    import fxprune
    from fxprune.planning.latency import device_name

    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "timm")]
    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}; fxprune {fxprune.__version__}, "
        f"{', '.join(versions)}, Python {platform.python_version()}; {device_name(torch.device('cpu'))}, "
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {platform.system()}; "
        f"batch {options.batch}, random weights, {options.seconds:g} s a network."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision names, or timm:NAME")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6], help="shares to ask for (0.6)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="(both)")
    parser.add_argument("--batch", type=int, default=1, help="images in a pass (1)")
    parser.add_argument("--threads", type=int, help="threads of torch (as torch has it)")
    parser.add_argument("--seconds", type=float, default=15, help="to time each network in the end (15)")
    parser.add_argument(
        "--table", type=Path, help="file for the table of ATen calls (one in ~/.cache/fxprune)"
    )
    parser.add_argument("--out", type=Path, help="write the table here, too")
    options = parser.parse_args()

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    lines = [
        about(options),
        "",
        "| model | mode | asked | estimate | fxprune | measured | off | fastest | ms | MACs | tries | s |",
        "|---|---|" + "---:|" * 10,
    ]
    print(*lines, sep="\n", flush=True)
    missed = 0
    for name in options.models:
        for mode in options.modes:
            for share in options.shares:
                line, met = row(name, share, mode, options)
                missed += not met
                lines.append(line)
                print(line, flush=True)
    count = len(lines) - 4
    lines += ["", f"{count - missed} of {count} within {BAR:.0%} of what was asked for."]
    print(*lines[-2:], sep="\n")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
