"""``fxprune prune``, ``plan`` and ``apply``: load, plan, rewrite, verify, compare, write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    BUDGETS,
    WITH_DATA,
    add_results,
    add_selection,
    add_source,
    check_source,
    existing,
    fill_outputs,
)  # fmt: skip
from .options import given as given_options

if TYPE_CHECKING:
    from ..planning.plan import PruningPlan
    from .loading import Loaded
    from .progress import Progress

    _SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["NOTHING_REMOVED", "add_parsers"]

NOTHING_REMOVED = 3
"""Exit code where something should have been removed and nothing was."""

_OUT = (
    "write the pruned network here; may be repeated: FILE.safetensors as weights with the plan, which "
    "can be trained "
    "on (fxprune.load), FILE.pt2 as an exported program, FILE.onnx, FILE.aoti.pt2 as compiled code"
)

_DESCRIPTION = """\
Remove a share of the channels, heads and hidden units of a network, and write the smaller network.

What has to go together is found by the analysis: no layer lists, no head counts, no "do not prune the
classifier". Before anything is written, the result is checked to compute what the original computes
with the removed weights set to zero."""

_EPILOG = """\
examples:
  fxprune prune torchvision:resnet18 --ratio 0.5 --out resnet18-half.safetensors --out resnet18-half.pt2
      random weights: shows what becomes of the shape, the size and the speed; the first file can be trained
      on, the second is for inference
  fxprune prune torchvision:resnet18 --weights DEFAULT --ratio 0.3 --out resnet18.pt2
      torchvision's pretrained weights (they are downloaded)
  fxprune prune torchvision:resnet50 --macs 0.5 --global --round-to 8 --keep layer1 --out resnet50.pt2
      half of the multiply-accumulates, taken where it hurts least, in widths that hardware likes
  fxprune prune torchvision:vit_b_16 --checkpoint mine.safetensors --exact-only
      your own weights; leaves alone what a layer norm runs over
  fxprune prune mynets.resnet:build --checkpoint mine.pt --input-shape 1,3,32,32 --out small.pt2
      your own model: build() in mynets/resnet.py, found from the current folder

  fxprune prune torchvision:ssdlite320_mobilenet_v3_large --out narrow.safetensors
      detection models are captured in parts, and cannot be exported as a whole
  fxprune prune timm:convnext_atto --dry-run
  fxprune prune hf:folder/with/config.json --calibrate texts.safetensors --out narrow.safetensors

In Python, the files are used with:
  model = fxprune.load(torchvision.models.resnet18, "resnet18-half.safetensors")
  model = torch.export.load("resnet18-half.pt2").module()

exit codes: 0 done, 1 the result is not what the plan says, 2 another error (one line says which), 3 nothing
was removed although something should have been, 130 interrupted"""


def add_parsers(commands: _SubParsers) -> None:
    """Add the commands that narrow a network."""
    parser = _parser(
        commands, "prune", "make a network narrower and write it", _DESCRIPTION, _EPILOG, run_prune
    )
    add_source(parser)
    add_selection(parser)
    result = add_results(parser, _OUT)
    result.add_argument("--plan-out", metavar="FILE", type=Path, help="write the plan here, FILE.json")
    result.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write a page here, FILE.html, on what goes, what stays, and why",
    )
    result.add_argument(
        "--dry-run", action="store_true", help="plan only: say what would go, and write no network"
    )
    result.add_argument("--no-latency", action="store_true", help="do not measure the latency")
    result.add_argument("--no-verify", action="store_true", help="do not hold the result against the model")
    parser = _parser(
        commands,
        "plan",
        "decide what to remove, and write that",
        "Decide what to remove from a network, and write the decision: a plan file can be read, "
        "compared, edited, "
        "and applied to any copy of the network.",
        "example:\n  fxprune plan torchvision:resnet18 --macs 0.5 --global --out plan.json",
        run_prune,
    )
    parser.set_defaults(dry_run=True, no_latency=True, no_verify=True, plan_out=None, report=None)
    add_source(parser)
    add_selection(parser)
    add_results(parser, "write the plan here, FILE.json")
    parser = _parser(
        commands,
        "apply",
        "narrow a network by a plan",
        "Narrow a network by a plan file, verify the result, and write it.",
        "example:\n  fxprune apply torchvision:resnet18 plan.json --checkpoint mine.pt --out "
        "half.safetensors",
        run_apply,
    )
    add_source(parser)
    parser.add_argument("plan", metavar="PLAN", type=existing, help="a plan file, FILE.json")
    result = add_results(parser, _OUT)
    result.add_argument("--no-latency", action="store_true", help="do not measure the latency")
    result.add_argument("--no-verify", action="store_true", help="do not hold the result against the model")


def _parser(
    commands: _SubParsers, name: str, short: str, description: str, epilog: str, run: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def run_prune(options: argparse.Namespace) -> int:
    """Run ``fxprune prune`` or ``plan``: progress on stderr, the table and the verdict on stdout.

    Raises:
        FxpruneError: what cannot be done, and what to do next; then no file has been written.
    """
    import fxprune

    from ..errors import BudgetError, SelectionError
    from ..files import check_output

    check_source(options)
    others = [flag for flag in given_options(options) if flag != "--lossless"]
    if options.lossless and others:
        raise SelectionError(f"--lossless decides alone what goes; leave out {' and '.join(others)}")
    if options.importance in WITH_DATA and not options.calibrate:
        raise SelectionError(f"--importance {options.importance} needs inputs: add --calibrate DATA")
    names = [flag.strip("-").replace("-", "_") for flag, _, _ in BUDGETS]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if given and options.ratio is not None:
        raise BudgetError(f"--ratio and --{next(iter(given))} contradict each other: leave one of them out")
    planning = options.command == "plan"
    plan_files = [*(options.out if planning else []), *([options.plan_out] if options.plan_out else [])]
    outs = [] if planning else options.out
    for path in plan_files:
        check_output(path, (".json",), [options.checkpoint])
    for path in outs:
        check_output(path, _SUFFIXES, [options.checkpoint])
    if options.report is not None:
        check_output(options.report, (".html",), [options.checkpoint])

    from ..exporting import check_whole  # from here on torch is needed
    from ..origins import plans_of
    from .loading import load_source
    from .progress import Progress, show

    budget = fxprune.Budget(**given, compiled=options.compiled) if given else None
    progress = Progress(options.quiet)
    with progress.step("model") as say:
        loaded = load_source(options)
        say(options.model)
    _say_source(progress, loaded)
    with progress.step("capture") as say:
        graph = fxprune.analyze(
            loaded.model, loaded.inputs, free_outputs=options.free_output, fill_outputs=fill_outputs(options)
        )
        say(graph.captured.summary)
    if graph.sizes.free:  # else it is among the notes
        progress.note("sizes", f"of the inputs: {graph.sizes}")
    for path in outs:
        check_whole(path, graph.captured.regions)
    if options.lossless:
        with progress.step("lossless") as say:
            pruned = fxprune.lossless(loaded.model, loaded.inputs)
            plan = plans_of(pruned)[-1]
            say("\n".join(["channels that do no work", *plan.notes]))
    else:
        pruned = None
        plan, selection = _planned(options, progress, loaded, graph, given, budget)
    wanted = bool(options.ratio != 0 or options.heads or options.branch)
    write = partial(_write_decision, options, progress, graph, plan, plan_files)
    if options.dry_run:
        files = write()
        if options.json:
            show({**_plan_data(options, plan), "files": files})
        else:
            progress.out(str(plan))
        return NOTHING_REMOVED if wanted and not (plan.removed or plan.branches) else 0
    fit = selection if options.calibrate and not options.lossless else None
    return _carry_out(options, progress, loaded, plan, wanted, fit, write, pruned)


def _write_decision(
    options: argparse.Namespace,
    progress: Progress,
    graph: Any,
    plan: PruningPlan,
    plan_files: list[Path],
    compensation: Any = None,
) -> list[dict[str, Any]]:
    """Write the plan and the report, where they are asked for."""
    from ..pages import write_report
    from .progress import size

    files: list[dict[str, Any]] = []
    for path in plan_files:
        plan.save(path)
        files.append({"path": str(path), "bytes": path.stat().st_size, "holds": "the plan"})
        progress.note("write", f"{path}, the plan")
    if options.report is not None:
        with progress.step("write") as say:
            written = write_report(graph, plan, options.report, compensation)
            files.append({"path": str(options.report), "bytes": written, "holds": "the report"})
            say(f"{options.report}, {size(written)}, the report")
    return files


def _planned(
    options: argparse.Namespace,
    progress: Progress,
    loaded: Loaded,
    graph: Any,
    given: dict[str, float],
    budget: Any,
) -> tuple[PruningPlan, Any]:
    """The plan that the options ask for, and the selection that they are."""
    import fxprune

    from .loading import load_criterion, load_data

    data = load_data(options.calibrate, loaded) if options.calibrate else None
    selection = fxprune.Selection(
        options.ratio,
        load_criterion(options.importance, data) or ("auto" if options.calibrate else "l2"),
        _is_exact if options.exact_only else None,
        options.seed,
        scope=options.scope,
        round_to=options.round_to,
        max_ratio=options.max_ratio,
        keep=options.keep,
        budget=budget,
        heads=options.heads,
        branches=options.branch,
        depth="auto" if options.depth is None else options.depth,
        into=options.into,
        calibrate=data,
    )
    with progress.step("plan") as say:
        plan = fxprune.plan(graph, selection)
        asked = ", ".join(f"{name} {value:g}" for name, value in given.items())
        asked = asked or f"ratio {plan.settings['ratio']:g}"
        asked += f", heads {options.heads:g}" if options.heads else ""
        scope = plan.settings.get("scope")
        ranked = f", {scope} ranking" if scope else ""
        exact = ", exact groups only" if options.exact_only else ""
        by = options.importance or ("calibration" if options.calibrate else "l2")
        say("\n".join([f"{asked} by {by}{ranked}{exact}", *plan.notes]))
    return plan, selection


_SUFFIXES = (".pt2", ".safetensors", ".onnx", ".aoti.pt2")


def run_apply(options: argparse.Namespace) -> int:
    """Run ``fxprune apply``; as :func:`run_prune`."""
    from ..files import check_output

    check_source(options)
    for path in options.out:
        check_output(path, _SUFFIXES, [options.checkpoint, options.plan])

    from ..exporting import check_whole  # from here on torch is needed
    from ..planning.plan import PruningPlan
    from .loading import load_source
    from .progress import Progress

    plan = PruningPlan.load(options.plan)
    for path in options.out:
        check_whole(path, plan.regions)
    progress = Progress(options.quiet)
    with progress.step("model") as say:
        loaded = load_source(options)
        say(options.model)
    _say_source(progress, loaded)
    return _carry_out(options, progress, loaded, plan, bool(plan.removed or plan.branches))


def _say_source(progress: Progress, loaded: Loaded) -> None:
    from ..inputs import normalize
    from .progress import shapes

    progress.note("weights", loaded.weights)
    progress.note("inputs", f"{shapes(*normalize(loaded.inputs))}: {loaded.inputs_from}")


def _carry_out(
    options: argparse.Namespace,
    progress: Progress,
    loaded: Loaded,
    plan: PruningPlan,
    wanted: bool,
    selection: Any = None,
    write: Callable[..., list[dict[str, Any]]] | None = None,
    pruned: Any = None,
) -> int:
    """Rewrite, verify, compare and write, also the decision, with ``write``.

    What is given as ``pruned`` was compared already.
    """
    import fxprune

    from ..exporting import export, quiet
    from ..inputs import normalize
    from ..measure import count, measure_latency
    from ..origins import plans_of
    from .progress import costs, number, show, size, table

    model, inputs = loaded.model, loaded.inputs
    args, kwargs = normalize(inputs)
    with progress.step("rewrite") as say:
        verdict = "" if pruned is None else "the same as the original, up to rounding"
        pruned = plan.apply(model) if pruned is None else pruned
        before, after = count(model, inputs), count(pruned, inputs)
        added = [note for made in plans_of(pruned)[-1:] for note in made.notes if note not in plan.notes]
        say("\n".join([f"{number(before.params)} -> {number(after.params)} parameters", *added]))
    removed = before.params != after.params
    if wanted and not removed:
        progress.note(
            "note",
            "nothing was removed: no channel is known to do no work"
            if getattr(options, "lossless", False)
            else "nothing was removed: every group is frozen, left out, or too small for this ratio "
            f"(fxprune inspect {options.model} says what is frozen and why)",
        )
    if options.no_verify:
        verdict = verdict or "not verified (--no-verify)"
    elif not verdict:
        with progress.step("verify") as say:
            verdict = str(fxprune.verify(model, pruned, plan, inputs))
            say("done")
    if selection is not None:
        with progress.step("fit") as say:
            pruned = fxprune.compensate(
                pruned, model, selection.calibrate, pick=selection.pick, seed=selection.seed
            )
            say(str(pruned.meta["compensation"]).splitlines()[0])
    seconds: dict[str, float] = {}
    if not options.no_latency:
        with progress.step("latency") as say, nullcontext() if options.debug else quiet():
            seconds = measure_latency({"before": model, "after": pruned}, args, kwargs)
            say("measured, in turns")
    files = write(pruned.meta.get("compensation")) if write is not None else []
    for path in options.out:
        with progress.step("write") as say:
            if path.suffix == ".safetensors":
                files.append(
                    {"path": str(path), "bytes": fxprune.save(pruned, path), "holds": "weights and plan"}
                )
                say(f"{path}, {size(files[-1]['bytes'])}, weights and plan")
            else:
                written = export(pruned, inputs, path)
                files.append({"path": str(path), "bytes": written.bytes, "sizes": written.sizes})
                files[-1]["checked"] = written.checked
                say(f"{path}, {size(written.bytes)}, {written.sizes}; {written.checked}")
    if not options.out:
        progress.note("write", "no file (--out FILE.safetensors or FILE.pt2 writes one)")
    elif all(path.suffix != ".safetensors" for path in options.out):
        beside = f"--out {options.out[0].name.split('.')[0]}.safetensors"
        progress.note("note", f"for inference only; {beside} writes a form that can be trained, too")
    if options.json:
        show(
            {
                **_plan_data(options, plan),
                "before": costs(before),
                "after": costs(after),
                "verdict": verdict,
                "seconds": seconds,
                "files": files,
            }
        )
    else:
        progress.out(table(before, after, seconds))
        progress.out(verdict)
    return NOTHING_REMOVED if wanted and not removed else 0


def _plan_data(options: argparse.Namespace, plan: PruningPlan) -> dict[str, Any]:
    groups = {
        narrowed.group: {"units": narrowed.size, "kept": narrowed.kept}
        for narrowed in plan
        if narrowed.removed
    }
    return {
        "command": options.command,
        "model": options.model,
        "groups": groups,
        "units": sum(plan.sizes.values()),
        "removed": sum(map(len, plan.removed.values())),
        "notes": list(plan.notes),
        "settings": dict(plan.settings),
    }


def _is_exact(group: Any) -> bool:
    exact: bool = group.exact
    return exact
