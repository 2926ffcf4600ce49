"""Time fxprune against Torch-Pruning 1.6.1 on torchvision's classification models.

Each model has a process of its own, with a limit to its memory and to the time of each run. In it the two
tools take turns on fresh copies, several rounds, and the median counts. What is timed:

- Torch-Pruning: ``MagnitudePruner(...)`` (which builds its dependency graph) and ``step()``. It is told what
  it needs to know: the classifier that must stay, and the head counts.
- fxprune: ``fxprune.prune(model, x, ratio=0.5)``: capture, analysis, plan, rewrite and shape check. It is
  told nothing.

A model "survives" when it still runs and gives outputs of the same shape. One that a tool fails on, or that
takes it longer than the limit, is listed as such. The geometric mean is over the models that survive both.

    pip install -e '.[bench]'
    python examples/benchmarks/against_torch_pruning.py resnet18 densenet201
    python examples/benchmarks/against_torch_pruning.py --results results.jsonl > table.md      # all 80

Progress goes to stderr, a Markdown table to stdout. With ``--results`` figures are kept as soon as
they are there: after an interruption the same command goes on with the models that are missing.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import IO, Any

RATIO = 0.5
# Inception cannot take smaller images, and Swin-v2 is made for these; everything else is timed at 224.
SIZES = {"inception_v3": 299, "swin_v2_t": 256, "swin_v2_s": 256, "swin_v2_b": 256}
PEER, OURS = "torch-pruning", "fxprune"
_START = 120  # seconds that a process may take before its first run


@dataclass
class Result:
    """What one tool did to one model.

    Attributes:
        seconds: of each round.
        params: parameter entries that are left.
        failure: why the result does not run, or why there is none; None when all is well.
    """

    seconds: list[float] = field(default_factory=list)
    params: int = 0
    failure: str | None = None

    @property
    def survived(self) -> bool:
        return bool(self.seconds) and self.failure is None


# The worker: one model, in a process of its own. It writes one JSON object a line.


def worker(name: str, rounds: int, tools: Sequence[str]) -> None:
    """Time the tools on one model, in turns, after a warm-up on a tiny one."""
    import torch
    from torch import nn

    warnings.simplefilter("ignore")
    size = SIZES.get(name, 224)
    inputs = torch.randn(1, 3, size, size)
    prune: dict[str, Callable[[nn.Module, Any], nn.Module]] = {PEER: with_peer, OURS: with_fxprune}

    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    for tool in tools:
        prune[tool](tiny, torch.randn(1, 3, 8, 8))
    pristine = build(name)
    report(params=count_params(pristine))
    failed: set[str] = set()
    for turn in range(rounds):
        # Ours goes first once, so that there is a figure when the peer never ends; then they take turns.
        for tool in tools if turn % 2 else reversed(tools):
            if tool in failed:
                continue
            model = copy.deepcopy(pristine)
            shape = output_shape(model, inputs) if turn == 0 else None
            report(tool=tool, started=True)
            gc.collect()
            start = time.perf_counter()
            try:
                pruned = prune[tool](model, inputs)
                seconds = time.perf_counter() - start
                if shape is not None and output_shape(pruned, inputs) != shape:
                    raise RuntimeError("outputs of another shape")
                report(tool=tool, seconds=seconds, params=count_params(pruned))
                del pruned
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                report(tool=tool, failure=f"{type(error).__name__}: {lines[0][:100]}".rstrip(": "))
                failed.add(tool)
            del model


def report(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def build(name: str) -> Any:
    from torchvision.models import get_model

    return get_model(name, weights=None).eval()


def output_shape(model: Any, inputs: Any) -> list[int]:
    import torch

    with torch.no_grad():
        return list(model(inputs).shape)


def count_params(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def with_peer(model: Any, inputs: Any) -> Any:
    """Torch-Pruning, told the classifier and the head counts; it changes ``model`` in place."""
    import torch_pruning as tp
    from torch import nn

    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    # SqueezeNet's classifier is a convolution.
    ignored += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1000]
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=ignored,
        num_heads=heads,
    )
    pruner.step()
    return model


def with_fxprune(model: Any, inputs: Any) -> Any:
    import fxprune

    return fxprune.prune(model, inputs, ratio=RATIO)


# The parent: starts workers, watches their limits, makes the table.


def measure(name: str, rounds: int, limit: float, memory: float) -> tuple[int, dict[str, Result]]:
    """Time both tools on one model; when one of them breaks a limit, the other is timed alone.

    Args:
        name: of a torchvision model.
        rounds: how often each tool is run.
        limit: seconds for each run.
        memory: resident gigabytes (1e9 bytes) for each process.

    Returns:
        The number of parameters before, and the result of each tool.
    """
    params, results = run_worker(name, rounds, (PEER, OURS), limit, memory)
    for tool, other in ((PEER, OURS), (OURS, PEER)):
        # What the other tool's breach cut short is run again in peace.
        if results[other].failure and results[tool].failure is None and len(results[tool].seconds) < rounds:
            again, alone = run_worker(name, rounds, (tool,), limit, memory)
            params = params or again
            if len(alone[tool].seconds) >= len(results[tool].seconds):
                results[tool] = alone[tool]
    return params, results


def run_worker(
    name: str, rounds: int, tools: Sequence[str], limit: float, memory: float
) -> tuple[int, dict[str, Result]]:
    """One worker process, ended when it breaks a limit; what it had reported by then counts."""
    command = [sys.executable, __file__, name, "--worker", ",".join(tools), "--rounds", str(rounds)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        breach = watch(process, out, limit, memory)
        for stream in (out, err):
            stream.seek(0)
        # A worker that is ended while it writes leaves a last line without an end.
        facts = [json.loads(line) for line in out if line.startswith("{") and line.endswith("\n")]
        complaints = err.read().strip().splitlines()

    params, busy = 0, None
    results = {tool: Result() for tool in tools}
    for fact in facts:
        if "tool" not in fact:
            params = fact["params"]
            continue
        result, busy = results[fact["tool"]], None
        if "started" in fact:
            busy = fact["tool"]
        elif "failure" in fact:
            result.failure = fact["failure"]
        else:
            result.seconds.append(fact["seconds"])
            result.params = fact["params"]
    if process.returncode:
        reason = breach or (complaints[-1] if complaints else f"exit code {process.returncode}")
        for tool in tools if busy is None else (busy,):
            if not results[tool].seconds or busy == tool:
                results[tool].failure = results[tool].failure or reason
    return params, results


def watch(process: subprocess.Popen[Any], out: IO[str], limit: float, memory: float) -> str | None:
    """Wait for a process; end it when it breaks a limit, and say which. It reports every step to ``out``."""
    import psutil

    watched, last, written = psutil.Process(process.pid), time.monotonic(), 0
    try:
        while process.poll() is None:
            time.sleep(0.1)
            try:
                resident = watched.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            if resident > memory * 1e9:
                return f"over {memory:g} GB"
            size = os.fstat(out.fileno()).st_size
            if size != written:
                last, written = time.monotonic(), size
            # Before the first report it imports and builds the model.
            if time.monotonic() - last > limit + (0 if written else _START):
                return f"over {limit:g} s"
        return None
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@dataclass
class Row:
    """One model's line of the table."""

    name: str
    params: int
    peer: Result
    ours: Result
    setting: str

    @classmethod
    def read(cls, line: str) -> Row:
        """From a line of a results file."""
        facts = json.loads(line)
        return cls(**{**facts, "peer": Result(**facts["peer"]), "ours": Result(**facts["ours"])})

    @property
    def speedup(self) -> float | None:
        """Times faster than the peer, where both survive."""
        if not (self.peer.survived and self.ours.survived):
            return None
        return median(self.peer.seconds) / median(self.ours.seconds)

    def cells(self) -> list[str]:
        def seconds(result: Result) -> str:
            return f"{median(result.seconds):.3g}" if result.survived else result.failure or "not run"

        def kept(result: Result) -> str:
            return f"{result.params / self.params:.2f}" if result.survived and self.params else "-"

        factor = f"{self.speedup:.1f}" if self.speedup else "-"
        return [
            self.name,
            seconds(self.peer),
            seconds(self.ours),
            factor,
            kept(self.peer),
            kept(self.ours),
        ]


HEADER = ["model", f"{PEER}, s", f"{OURS}, s", "times faster", f"kept, {PEER}", f"kept, {OURS}"]


def summary(rows: Sequence[Row]) -> str:
    """The geometric mean, the slowest case, and who survives how many."""
    factors = {row.name: row.speedup for row in rows if row.speedup}
    lines = [
        f"{PEER} survives {sum(row.peer.survived for row in rows)} of {len(rows)} models, "
        f"{OURS} {sum(row.ours.survived for row in rows)}."
    ]
    if factors:
        mean = math.exp(sum(map(math.log, factors.values())) / len(factors))
        least = min(factors, key=lambda name: factors[name])
        lines.append(
            f"Geometric mean over the {len(factors)} that survive both: {mean:.1f} times faster; "
            f"least: {factors[least]:.1f} ({least})."
        )
    return " ".join(lines)


def setting(rounds: int) -> str:
    """Date, versions and machine."""
    versions = ", ".join(
        f"{package} {metadata.version(package)}" for package in ("torch", "torchvision", "torch-pruning")
    )
    try:
        ours = metadata.version("fxprune")
    except metadata.PackageNotFoundError:
        ours = "from the source tree"
    import psutil
    import torch

    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}; fxprune {ours}, {versions}, "
        f"Python {platform.python_version()}; {cpu_model()}, {psutil.cpu_count()} CPUs "
        f"({torch.get_num_threads()} threads), {psutil.virtual_memory().total / 1e9:.0f} GB, "
        f"{platform.system()}; ratio {RATIO}, median of {rounds} runs."
    )


def cpu_model() -> str:
    """The processor's name, from where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def classification_models() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="torchvision models (default: all 80)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each tool, of which the median counts (default: 5)"
    )
    parser.add_argument("--limit", type=float, default=60, help="seconds for each run (default: 60)")
    parser.add_argument(
        "--memory", type=float, default=15, help="gigabytes for each model's process (default: 15)"
    )
    parser.add_argument(
        "--results", type=Path, help="file to keep results in, a line a model; what it holds is not run again"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.models[0], options.rounds, options.worker.split(","))
        return

    names = classification_models()
    unknown = [name for name in options.models if name not in names]
    if unknown:
        parser.error(f"no torchvision classification model: {', '.join(unknown)}")
    names = options.models or names
    rows: dict[str, Row] = {}
    if options.results is not None and options.results.exists():
        lines = options.results.read_text().splitlines(keepends=True)
        kept = [Row.read(line) for line in lines if line.endswith("\n")]
        rows = {row.name: row for row in kept if row.name in names}
    try:
        for number, name in enumerate(names, 1):
            if name in rows:
                continue
            params, results = measure(name, options.rounds, options.limit, options.memory)
            row = rows[name] = Row(name, params, results[PEER], results[OURS], setting(options.rounds))
            cells = "  ".join(f"{key}: {value}" for key, value in zip(HEADER, row.cells(), strict=True))
            print(f"{number}/{len(names)}  {cells}", file=sys.stderr, flush=True)
            if options.results is not None:
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    except KeyboardInterrupt:
        print("interrupted; the table holds what there is", file=sys.stderr)
    print(table([rows[name] for name in names if name in rows]))


def table(rows: Sequence[Row]) -> str:
    """Settings, a Markdown table, and the summary."""
    lines = [*sorted({row.setting for row in rows}), "", f"| {' | '.join(HEADER)} |"]
    lines.append(f"|---|{'---:|' * (len(HEADER) - 1)}")
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row.cells())} |" for row in rows]
    return "\n".join([*lines, "", summary(rows)])


if __name__ == "__main__":
    main()
