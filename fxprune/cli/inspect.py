"""``fxprune inspect``: what can be narrowed in a network, what cannot, and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_output, add_source, check_source, fill_outputs

if TYPE_CHECKING:
    _SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_inspect_parser", "run"]

_DESCRIPTION = """\
Say how a network was captured, which shares of its parameters and multiply-accumulates can be removed, which
channels and hidden units go together, and what is frozen: where, why, and what would help. Nothing is
computed but shapes."""

_EPILOG = """\
examples:
  fxprune inspect torchvision:resnet18
  fxprune inspect mynets.resnet:build --input-shape 1,3,32,32 --all
  fxprune inspect torchvision:vit_b_16 --json | jq '.frozen[].reason'"""


def add_inspect_parser(commands: _SubParsers) -> None:
    """Add the ``inspect`` command and its options to the command line's parser."""
    parser = commands.add_parser(
        "inspect",
        help="say what can be removed from a network and what cannot",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_source(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="every group and axis in a line of its own")
    add_output(output)


def run(options: argparse.Namespace) -> int:
    """Run ``fxprune inspect``: the report on stdout.

    Raises:
        FxpruneError: what cannot be done, and what to do next.
    """
    import fxprune

    check_source(options)

    from .loading import load_source  # from here on torch is needed
    from .progress import Progress, show

    progress = Progress(options.quiet)
    with progress.step("load") as say:
        loaded = load_source(options)
        say(options.model)
    with progress.step("analyse") as say:
        graph = fxprune.analyze(
            loaded.model, loaded.inputs, free_outputs=options.free_output, fill_outputs=fill_outputs(options)
        )
        report = graph.report()
        say("done")
    if options.json:
        show(report.as_dict())
    else:
        progress.out(report.text(all=options.all))
    return 0
