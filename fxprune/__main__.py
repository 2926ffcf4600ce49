"""The ``fxprune`` command; ``python -m fxprune`` is it, too, where its script is not on the path."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """As :func:`fxprune.cli.main`; 130 after an interrupt, also one while the command line is imported."""
    try:
        from fxprune import cli

        return cli.main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
