"""Damage plan files at random, read them, and see that nothing but a clear error comes of it.

    python examples/benchmarks/fuzz_plans.py --cases 100000

A case is the text of a plan of a small network (as a graph, in its own class with the widths in its
configuration, or without a branch), damaged once to four times: characters or lines lost, doubled or
replaced, values of the JSON tree replaced by other kinds, absurd numbers, long ranges, paths, deep nesting.
Reading it must give a plan or a ``PlanError``; a plan that is read must be written and read again as the same
plan; and applying it (each tenth) must give a network or an error of fxprune's. Reports the slowest
case, and how much memory the process took more than before.
"""

import argparse
import collections
import json
import random
import resource
import time
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.errors import FxpruneError, PlanError

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3.5, 10**9, 10**30, -(10**18), "", "0-3, 7", "0-999999999999", "5-1", "a",
    "../../etc/passwd", 2, 4,
    "0-3," * 5000, [], {}, [[]], [10**12, 10**12], {"a": 1}, [-1], [0, 0], "\x00", "é", "NaN",
)  # fmt: skip


class Config:
    """Integers that the class is built from."""

    def __init__(
        self, base: int = 8, width: int = 12, groups: int = 4, layers: int = 1, heads: int | None = None
    ) -> None:
        self.base, self.width, self.groups, self.layers, self.heads = base, width, groups, layers, heads

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        return cls(**values)


class Net(nn.Module):
    """A residual block, a group convolution and a classifier; a configuration says how many and how wide."""

    config_class = Config

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or Config()
        base, width, groups = self.config.base, self.config.width, self.config.groups
        self.stem = nn.Conv2d(3, base, 3, padding=1)
        self.inner = nn.Sequential(
            nn.Conv2d(base, width, 1), nn.ReLU(), nn.Conv2d(width, base, 1, groups=groups)
        )
        self.more = nn.ModuleList(nn.Linear(base, base) for _ in range(self.config.layers))
        self.head = nn.Linear(base, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        z = (y + self.inner(y)).mean((2, 3))
        for layer in self.more:
            z = z + layer(z)
        return self.head(z)


def spots(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(spot for key, value in items for spot in spots(value, (*path, key)))]


def damaged(text: str, draw: random.Random) -> str:
    """The text after one change."""
    if draw.random() < 0.6:
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            tree = None
        path = draw.choice(spots(tree))
        if path:
            owner = tree
            for key in path[:-1]:
                owner = owner[key]
            what = draw.random()
            if what < 0.2:
                del owner[path[-1]]
            elif what < 0.3 and isinstance(owner, dict):
                owner[draw.choice(("", "x[0]", "../x", "model", "sizes", "layers", "heads"))] = owner.pop(
                    path[-1]
                )
            elif what < 0.33:
                owner[path[-1]] = "DEEP"
            else:
                owner[path[-1]] = draw.choice(ODD)
            return json.dumps(tree).replace('"DEEP"', "[" * 5000 + "]" * 5000)
    start = draw.randrange(len(text) + 1)
    end = min(len(text), start + draw.choice((1, 1, 5, 50, 500)))
    return text[:start] + draw.choice(("", "9", '"', "}", "[", "-", text[start:end] * 2)) + text[end:]


def run(cases: int, seed: int = 0) -> tuple[collections.Counter[str], float]:
    """How often each outcome came, and the seconds of the slowest case; raises for what must not happen."""
    torch.manual_seed(0)
    model, draw, slowest, x = Net().eval(), random.Random(seed), 0.0, torch.randn(1, 3, 8, 8)
    plans = [
        fxprune.plan(model, x, ratio=0.5),
        fxprune.plan(model, x, ratio=0.5, into="module", uniform=True),
        fxprune.plan(model, x, ratio=0.5, branches=["more"]),
    ]
    good = [plan.to_json() for plan in plans]
    assert '"config"' in good[1]
    assert '"branches"' in good[2]
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(cases):
        text = draw.choice(good)
        for _ in range(draw.randint(1, 4)):
            text = damaged(text, draw)
        start = time.perf_counter()
        try:
            read = fxprune.PruningPlan.from_json(text)
        except PlanError:
            outcomes["refused"] += 1
        else:
            assert fxprune.PruningPlan.from_json(read.to_json()) == read, text
            outcomes["read"] += 1
            if number % 10 == 0:
                try:
                    read.apply(model)
                    outcomes["applied"] += 1
                except FxpruneError:
                    outcomes["not applied, with an error of fxprune's"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return outcomes, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    outcomes, slowest = run(options.cases, options.seed)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"torch {torch.__version__}, {options.cases} cases in {time.perf_counter() - start:.0f} s")
    for name, count in outcomes.most_common():
        print(f"{count:>8}  {name}")
    print(f"slowest case {slowest:.2f} s; {more:.0f} MB more than at the start")


if __name__ == "__main__":
    main()
