"""``fxprune verify``, ``export``, ``count`` and ``bench``: for networks, and for what was made of them."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .options import add_output, add_results, add_source, check_source, existing

if TYPE_CHECKING:
    from torch import nn

    from .loading import Loaded
    from .progress import Progress

    _SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers"]

_PRUNED = "weights that fxprune wrote, FILE.safetensors, or a plan, FILE.json"


def add_parsers(commands: _SubParsers) -> None:
    """Add the commands that look at networks, or write them in another form."""
    for name, short, needed, run in (
        ("verify", "check that a pruned network computes what its plan says", True, _verify),
        ("export", "write a network, pruned or not, for other programs", False, _export),
        ("count", "count parameters, multiply-accumulates and bytes", False, _count),
        ("bench", "measure how long a forward pass takes", False, _bench),
    ):
        parser = commands.add_parser(name, help=short, description=f"{short[0].upper()}{short[1:]}.")
        parser.set_defaults(run=run)
        add_source(parser)
        parser.add_argument(
            "--pruned", metavar="FILE", type=existing, required=needed, help=f"what was made of it: {_PRUNED}"
        )
        if name == "export":
            add_results(
                parser, "FILE.pt2, FILE.onnx, FILE.aoti.pt2 or, of a plan, FILE.safetensors; may be repeated"
            )
            continue
        if name == "bench":
            parser.add_argument("--compiled", action="store_true", help="under torch.compile, too")
        add_output(parser)


def _start(options: argparse.Namespace) -> tuple[Progress, Loaded, nn.Module | None]:
    """Load the network, and what ``--pruned`` makes of it, as the first step that is shown."""
    import fxprune

    from ..errors import CheckpointError

    path = options.pruned
    check_source(options)
    if path is not None and path.suffix not in (".json", ".safetensors"):
        raise CheckpointError(f"cannot read {path}: --pruned takes {_PRUNED}")

    from .loading import check_runs, load_source  # from here on torch is needed
    from .progress import Progress

    progress = Progress(options.quiet)
    with progress.step("load") as say:
        plan = fxprune.PruningPlan.load(path) if path is not None and path.suffix == ".json" else None
        loaded, pruned = load_source(options), None
        if options.command in ("export", "bench"):  # the others look at shapes first
            check_runs(loaded)
        if path is not None:
            pruned = plan.apply(loaded.model) if plan is not None else fxprune.load(loaded.model, path)
        say(options.model if path is None else f"{options.model}, {path}")
    return progress, loaded, pruned


def _verify(options: argparse.Namespace) -> int:
    progress, loaded, pruned = _start(options)
    import fxprune

    from ..errors import PlanError
    from ..origins import plans_of
    from .progress import show

    assert pruned is not None
    plans = plans_of(pruned)
    if len(plans) != 1:
        raise PlanError(
            f"{options.pruned} was pruned {len(plans)} times; verify compares one plan with the original"
        )
    with progress.step("verify") as say:
        verdict = fxprune.verify(loaded.model, pruned, plans[0], loaded.inputs)
        say("done")
    if options.json:
        show({"command": "verify", "model": options.model, "verdict": str(verdict)})
    else:
        progress.out(str(verdict))
    return 0


def _export(options: argparse.Namespace) -> int:
    import fxprune

    from ..errors import OutputError
    from ..files import check_output
    from .progress import show, size

    if not options.out:
        raise OutputError("nothing to write: add --out FILE.pt2, FILE.onnx or FILE.aoti.pt2")
    for path in options.out:
        check_output(
            path, (".pt2", ".onnx", ".aoti.pt2", ".safetensors"), [options.checkpoint, options.pruned]
        )
    progress, loaded, pruned = _start(options)
    from ..exporting import export

    files: list[dict[str, Any]] = []
    for path in options.out:
        with progress.step("write") as say:
            if path.suffix == ".safetensors":
                files.append({"path": str(path), "bytes": fxprune.save(pruned or loaded.model, path)})
                say(f"{path}, {size(files[-1]['bytes'])}, weights and plan")
                continue
            written = export(pruned or loaded.model, loaded.inputs, path)
            say(f"{path}, {size(written.bytes)}, {written.sizes}; {written.checked}")
            files.append({**asdict(written), "path": str(path)})
    if options.json:
        show({"command": "export", "model": options.model, "files": files})
    return 0


def _count(options: argparse.Namespace) -> int:
    progress, loaded, pruned = _start(options)
    from ..measure import count
    from .progress import costs, number, show, size, table

    before = count(loaded.model, loaded.inputs)
    after = count(pruned, loaded.inputs) if pruned is not None else None
    if options.json:
        data = {"command": "count", "model": options.model, "before": costs(before)}
        show({**data, **({"after": costs(after)} if after is not None else {})})
    elif after is not None:
        progress.out(table(before, after, {}))
    else:
        progress.out(
            f"parameters {number(before.params)}\nMACs {number(before.macs)}\nweights on disk "
            f"{size(before.bytes)}"
        )
    return 0


def _bench(options: argparse.Namespace) -> int:
    progress, loaded, pruned = _start(options)
    import torch

    from ..exporting import quiet
    from ..inputs import normalize
    from ..measure import measure_latency
    from .progress import duration, show

    models: dict[str, Any] = {"before": loaded.model, **({"after": pruned} if pruned is not None else {})}
    if options.compiled:
        models |= {f"{name}, compiled": torch.compile(model) for name, model in models.items()}
    args, kwargs = normalize(loaded.inputs)
    with progress.step("measure") as say, nullcontext() if options.debug else quiet():
        seconds = measure_latency(models, args, kwargs)
        say("in turns")
    if options.json:
        show({"command": "bench", "model": options.model, "seconds": seconds})
    else:
        progress.out("\n".join(f"{name:<20}{duration(value):>12}" for name, value in seconds.items()))
    return 0
