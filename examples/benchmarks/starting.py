"""How long imports, ``--help`` and usage errors take, in turns, each in a fresh process.

    python examples/benchmarks/starting.py --turns 10

The first turn is not counted: it compiles bytecode and fills the caches of the operating system. Where
``PYTHONDONTWRITEBYTECODE`` is set, nothing is compiled once and for all, and fxprune looks slower than it is.
"""

import argparse
import datetime
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata

RUNS = {
    "import torch": ["-c", "import torch"],
    "import fxprune": ["-c", "import fxprune"],
    "from fxprune import prune": ["-c", "from fxprune import prune"],
    "from fxprune import *": ["-c", "from fxprune import *"],
    "fxprune --help": ["-m", "fxprune", "--help"],
    "fxprune prune --ratio x": ["-m", "fxprune", "prune", "resnet18", "--ratio", "x"],
    "fxprune prone": ["-m", "fxprune", "prone"],
}


def processor() -> float:
    """Seconds of processor time that processes have taken that this one started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
    for turn in range(options.turns + 1):
        for name, arguments in RUNS.items():
            start, used = time.perf_counter(), processor()
            subprocess.run([sys.executable, *arguments], capture_output=True)
            if turn:
                seconds[name].append((time.perf_counter() - start, processor() - used))
    print(f"{datetime.date.today()}, Python {platform.python_version()}, torch {metadata.version('torch')}")
    print("| | median | least | processor time, median |\n|---|---:|---:|---:|")
    for name, turns in seconds.items():
        wall, cpu = zip(*turns, strict=True)
        print(
            f"| `{name}` | {statistics.median(wall):.2f} s | {min(wall):.2f} s | "
            f"{statistics.median(cpu):.2f} s |"
        )


if __name__ == "__main__":
    main()
