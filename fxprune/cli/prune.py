"""``fxprune prune``: load, analyse, plan, rewrite, verify, compare, write."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import nn

import fxprune

from ..errors import RatioError
from ..files import check_output
from ..importance import BUILT_IN
from ..inputs import normalize
from ..measure import Count, count, measure_latency
from .export import check_whole, export, write
from .loading import add_source, fill_outputs, load_source

if TYPE_CHECKING:
    _SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_prune_parser", "run"]

_DESCRIPTION = """\
Remove a share of the channels, heads and hidden units of a network, and write the smaller network.

What has to go together is found by the analysis: no layer lists, no head counts, no "do not prune the
classifier". Before anything is written, the result is checked to compute what the original computes
with the removed weights set to zero."""

_EPILOG = """\
examples:
  fxprune prune torchvision:resnet18 --ratio 0.5 --out resnet18-half.pt2
      random weights: shows what becomes of the shape, the size and the speed
  fxprune prune torchvision:resnet18 --weights DEFAULT --ratio 0.3 --out resnet18.pt2
      torchvision's pretrained weights (they are downloaded)
  fxprune prune torchvision:resnet50 --macs 0.5 --global --round-to 8 --keep layer1 --out resnet50.pt2
      half of the multiply-accumulates, taken where it hurts least, in widths that hardware likes
  fxprune prune torchvision:vit_b_16 --checkpoint mine.safetensors --exact-only
      your own weights; leaves alone what a layer norm runs over
  fxprune prune mynets.resnet:build --checkpoint mine.pt --input-shape 1,3,32,32 --out small.pt2
      your own model: build() in mynets/resnet.py, found from the current folder

  fxprune prune torchvision:ssdlite320_mobilenet_v3_large --out narrow.safetensors
      weights and plan: for what cannot be exported as a whole, such as detection models

In Python, the files are used with:
  model = torch.export.load("resnet18-half.pt2").module()

  model = fxprune.load(original, "narrow.safetensors")  # original: the class, or a function that makes it

exit codes: 0 done, 2 an error (one line says which), 130 interrupted"""

_BUDGETS = (
    ("--params", "KEEP", "budget: parameters to keep, a share such as 0.5 or a number such as 5e6"),
    ("--macs", "KEEP", "budget: multiply-accumulates to keep, a share such as 0.5 or a number such as 2e9"),
    ("--size-mb", "MB", "budget: size of the weights in units of 10^6 bytes; all budgets given are met"),
    (
        "--latency",
        "KEEP",
        "budget: time of a forward pass to keep, a share such as 0.6 or milliseconds from 1 on",
    ),
)


def add_prune_parser(commands: _SubParsers) -> None:
    """Add the ``prune`` command and its options to the command line's parser."""
    parser = commands.add_parser(
        "prune",
        help="make a network narrower and write it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_source(parser)
    pruning = parser.add_argument_group("what to remove")
    pruning.add_argument(
        "--ratio",
        type=float,
        help="share of the units of every group to remove, 0 <= RATIO < 1 (default: 0.5, which leaves about "
        "a quarter of the parameters; no default where a budget is given)",
    )
    for flag, metavar, what in _BUDGETS:
        pruning.add_argument(flag, metavar=metavar, type=float, help=what)
    pruning.add_argument(
        "--compiled", action="store_true", help="hold the latency under torch.compile (default: eager)"
    )
    ranking = pruning.add_mutually_exclusive_group()
    ranking.add_argument(
        "--global",
        dest="scope",
        action="store_const",
        const="global",
        default="local",
        help="rank all units of the network together, so that layers that matter less lose more (default: "
        "every group loses the same share)",
    )
    ranking.add_argument(
        "--isomorphic",
        dest="scope",
        action="store_const",
        const="isomorphic",
        help="rank together only the groups that are built alike: the hidden layers of all blocks, say",
    )
    pruning.add_argument(
        "--round-to",
        metavar="N",
        type=int,
        help="leave a multiple of N units in every row; most hardware is fastest at multiples of 8",
    )
    pruning.add_argument(
        "--max-ratio",
        type=float,
        default=1.0,
        help="largest share that any group may lose, whatever its scores (default: 1, all but one unit)",
    )
    pruning.add_argument(
        "--keep",
        metavar="NAME",
        action="append",
        default=[],
        help="leave the output of this layer as wide as it is; layer1, layer1.*.conv2; may be repeated",
    )
    pruning.add_argument(
        "--heads",
        type=float,
        default=0.0,
        help="share of whole attention heads (and of groups of grouped convolutions and group norms) to "
        "remove, 0 <= HEADS < 1; what remains is narrowed as all else (default: 0)",
    )
    pruning.add_argument(
        "--into",
        choices=["graph", "module"],
        default="graph",
        help="form of the result: a graph, in which every number can be rewritten (default), or the model's "
        "own class with its own methods, in which what its code says stays",
    )
    pruning.add_argument(
        "--importance",
        choices=list(BUILT_IN),
        default="l2",
        help="which units go first: those whose weights have the smallest norm (l2), or by another criterion "
        "that needs no data (default: l2)",
    )
    pruning.add_argument(
        "--exact-only",
        action="store_true",
        help="prune only where the result is exact: no normalisation or mean runs over the narrowed axis",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="write the pruned network here: FILE.pt2 as an exported program, "
        "FILE.safetensors as weights with the plan that narrows the original",
    )
    result.add_argument("--no-latency", action="store_true", help="do not measure the latency")
    result.add_argument("--debug", action="store_true", help="show the full traceback of an error")


def run(options: argparse.Namespace) -> int:
    """Run ``fxprune prune``: progress on stderr, the table and the verdict on stdout.

    Raises:
        FxpruneError: what cannot be done, and what to do next; then no file has been written.
    """
    if options.ratio is not None and not 0 <= options.ratio < 1:
        raise RatioError(
            f"--ratio {options.ratio:g} is out of range: it is a share, 0 <= ratio < 1, such as 0.5"
        )
    if not 0 <= options.heads < 1:
        raise RatioError(
            f"--heads {options.heads:g} is out of range: it is a share, 0 <= heads < 1, such as 0.25"
        )
    names = [flag.strip("-").replace("-", "_") for flag, _, _ in _BUDGETS]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    budget = fxprune.Budget(**given, compiled=options.compiled) if given else None
    if options.out is not None:
        check_output(options.out, (".pt2", ".safetensors"))

    progress = _Progress(Console(stderr=True, highlight=False))
    with progress.step("model") as say:
        loaded = load_source(options)
        model, inputs = loaded.model, loaded.inputs
        args, kwargs = normalize(inputs)
        say(options.model)
    progress.note("weights", loaded.weights)
    progress.note("inputs", f"{_shapes(args, kwargs)}: {loaded.inputs_from}")

    with progress.step("capture") as say:
        graph = fxprune.analyze(
            model, inputs, free_outputs=options.free_output, fill_outputs=fill_outputs(options)
        )
        say(str(graph.captured.report))
    if options.out is not None:
        check_whole(options.out, graph.captured.regions)
    with progress.step("plan") as say:
        plan = fxprune.plan(
            graph,
            ratio=options.ratio,
            importance=options.importance,
            where=_is_exact if options.exact_only else None,
            seed=options.seed,
            scope=options.scope,
            round_to=options.round_to,
            max_ratio=options.max_ratio,
            keep=options.keep,
            budget=budget,
            heads=options.heads,
            into=options.into,
        )
        asked = (
            ", ".join(f"{name} {value:g}" for name, value in given.items())
            or f"ratio {plan.settings['ratio']:g}"
        )
        asked += f", heads {options.heads:g}" if options.heads else ""
        ranked = "" if options.scope == "local" else f", {options.scope} ranking"
        exact = ", exact groups only" if options.exact_only else ""
        say("\n".join([f"{asked} by {options.importance}{ranked}{exact}", *plan.notes]))
    with progress.step("rewrite") as say:
        pruned: nn.Module = plan.apply(model)
        before, after = count(model, inputs), count(pruned, inputs)
        say(f"{_number(before.params)} -> {_number(after.params)} parameters")
    if (options.ratio != 0 or options.heads) and before.params == after.params:
        progress.note(
            "note",
            "nothing was removed: every group is frozen, left out, or too small for this ratio "
            "(in Python, fxprune.analyze(model, inputs).frozen says what is frozen and why)",
        )
    with progress.step("verify") as say:
        verdict = str(fxprune.verify(model, pruned, plan, inputs))
        say("done")
    seconds: dict[str, float] = {}
    if not options.no_latency:
        with progress.step("latency") as say, _quiet(not options.debug):
            seconds = measure_latency({"before": model, "after": pruned}, args, kwargs)
            say("measured, in turns")
    if options.out is not None and options.out.suffix == ".safetensors":
        with progress.step("write") as say:
            say(f"{options.out}, {_bytes(fxprune.save(pruned, options.out, plan))}, weights and plan")
    elif options.out is not None:
        with progress.step("export") as say, _quiet(not options.debug):
            exported = export(pruned, args, kwargs)
            size = write(exported, options.out)
            say(f"{options.out}, {_bytes(size)}, {exported.batch}")
    else:
        progress.note("export", "not written (--out FILE.pt2 or FILE.safetensors writes it)")

    stdout = Console(highlight=False)
    stdout.print(_table(before, after, seconds))
    stdout.print(verdict, markup=False, soft_wrap=True)
    return 0


def _is_exact(group: Any) -> bool:
    exact: bool = group.exact
    return exact


class _Progress:
    """One line for each finished step, and on a terminal a spinner for the one that runs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, name: str, text: str) -> None:
        """Print a step's line; further lines of ``text`` are indented below the first."""
        first, *rest = text.strip().splitlines() or [""]
        lines = [f"{name:>8}  {first}", *(f"{'':8}  {line}" for line in rest)]
        self.console.print("\n".join(lines), markup=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Any]:
        """Time a step; what it passes to the function that it is given becomes its line."""
        start = time.perf_counter()
        text: list[str] = []
        with self.console.status(f"{name} ..."):
            yield text.append
        first, *rest = "\n".join(text).strip().splitlines() or [""]
        taken = f" ({time.perf_counter() - start:.1f} s)"
        self.note(name, "\n".join([first + taken, *rest]))


@contextmanager
def _quiet(on: bool) -> Iterator[None]:
    """Keep what torch warns and logs about its own attempts and its machine from the terminal."""
    if not on:
        yield
        return
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _table(before: Count, after: Count, seconds: dict[str, float]) -> Table:
    """The comparison: each row a cost before and after, and what is left of it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("before", "after", "left"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, float, float, Any]] = [
        ("parameters", before.params, after.params, _number),
        ("MACs", before.macs, after.macs, _number),
        ("weights on disk", before.bytes, after.bytes, _bytes),
    ]
    if seconds:
        rows.append(("latency", seconds["before"], seconds["after"], _time))
    for name, old, new, form in rows:
        table.add_row(name, form(old), form(new), f"{new / old:.2f}x" if old else "-")
    return table


def _scaled(value: float, units: list[tuple[float, str]]) -> str:
    """``value`` in the largest of the descending units that it fills, with three digits or more."""
    for size, unit in units:
        if value >= size:
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {unit}".strip()
    return f"{value:g}"


def _number(value: float) -> str:
    return _scaled(value, [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")])


def _bytes(value: float) -> str:
    return _scaled(value, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")])


def _time(seconds: float) -> str:
    return _scaled(seconds, [(1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")])


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The shapes of the top-level inputs, for people."""

    def shape(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(shape, value))}]"
        return (
            "x".join(map(str, value.shape)) or "scalar" if hasattr(value, "shape") else type(value).__name__
        )

    return ", ".join([*map(shape, args), *(f"{name} {shape(value)}" for name, value in kwargs.items())])
