"""The ``fxprune`` command: ``main`` reads the command line, runs a subcommand, turns errors into one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from ..errors import FxpruneError, VerificationError
from . import after, prune
from .inspect import add_inspect_parser

__all__ = ["main"]

_DESCRIPTION = """\
Make a trained PyTorch network physically narrower. The result is a new, smaller network with the same
inputs and outputs; the network that is read stays as it is."""

_EPILOG = """\
example:
  fxprune prune torchvision:resnet18 --ratio 0.5 --out resnet18-half.safetensors --out resnet18-half.pt2

`fxprune COMMAND --help` has more.

exit codes: 0 done, 1 a network does not compute what its plan says, 2 another error (one line says which),
3 nothing was removed although something should have been, 130 interrupted; files are only ever written
whole"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes those of this process.

    Returns:
        0 when all went well, 1 where a network does not compute what its plan says, 2 after another error
        (one line on stderr says which), 3 where nothing was removed.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` (code 0) and malformed arguments (code 2).
        Exception: any error as it is, with ``--debug``.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest:
        close = difflib.get_close_matches(rest[0], _flags(parser, options.command), n=1)
        nearest = f"; did you mean {close[0]}?" if close else ""
        parser.prog += f" {options.command}" if options.command else ""
        parser.error(f"{parser.prog} does not take {' '.join(rest)}{nearest}")
    if options.command is None:
        parser.print_help()
        return 0
    try:
        code: int = options.run(options)
        return code
    except FxpruneError as error:
        if options.debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, VerificationError) else 2
    except (Exception, SystemExit) as error:  # a factory, a criterion or a loader may also leave the process
        if options.debug:
            raise
        sys.stderr.write(f"error: unexpected {_unexpected(error)}\n")
    return 2


class _WholeNames(argparse.ArgumentParser):
    """Takes options by their whole names, so that a new one never changes what an old command says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and where there is more, in place of a page of options."""
        self.exit(2, f"error: {message} ({self.prog} --help says more)\n")


def _flags(parser: argparse.ArgumentParser, command: str | None) -> list[str]:
    """The long options of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as usage, contextlib.suppress(SystemExit):
        parser.parse_args([*([command] if command else []), "--help"])
    return sorted({*re.findall(r"--[a-z][a-z-]*", usage.getvalue())})


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _WholeNames(
        prog="fxprune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"fxprune {_version('fxprune')} (torch {_version('torch')}, Python {sys.version.split()[0]})",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    prune.add_parsers(commands)
    add_inspect_parser(commands)
    after.add_parsers(commands)
    return parser


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _unexpected(error: BaseException) -> str:
    """What no error of ours says, and the innermost line that is neither this library's nor PyTorch's."""
    from ..capture.source_lines import blame
    from ..files import told

    what, where = told(error).splitlines()[0], blame(error).rstrip(": ")
    if where:
        return (
            f"{what}, raised at {where} (--debug shows how it came there; where that is no code of yours, "
            "please report it)"
        )
    return f"{what} (--debug shows where; please report it, this is not your mistake)"
