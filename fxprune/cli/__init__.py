"""The ``fxprune`` command: ``main`` reads the command line, runs a subcommand, turns errors into one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from ..errors import FxpruneError
from .inspect import add_inspect_parser
from .prune import add_prune_parser

__all__ = ["main"]

_DESCRIPTION = """\
Make a trained PyTorch network physically narrower. The result is a new, smaller network with the same
inputs and outputs; the network that is read stays as it is."""

_EPILOG = """\
example:
  fxprune prune torchvision:resnet18 --ratio 0.5 --out resnet18-half.pt2

`fxprune prune --help` and `fxprune inspect --help` have more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes those of this process.

    Returns:
        0 when all went well, 2 after an error (one line on stderr says which), 130 when interrupted.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` (code 0) and malformed arguments (code 2).
        Exception: any error as it is, with ``--debug``.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except FxpruneError as error:
        if options.debug:
            raise
        sys.stderr.write(f"error: {error}\n")
    except Exception as error:
        if options.debug:
            raise
        sys.stderr.write(
            f"error: unexpected {type(error).__name__}: {_first_line(error)} "
            "(--debug shows where; please report it, this is not your mistake)\n"
        )
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxprune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"fxprune {_version()} (torch {torch.__version__}, Python {sys.version.split()[0]})",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add_prune_parser(commands)
    add_inspect_parser(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("fxprune")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
