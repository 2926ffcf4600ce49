"""The ``fxprune`` command; ``python -m fxprune`` is it, too, where its script is not on the path."""

import sys


def main() -> int:
    """Run the command line; an interrupt while it is imported ends it as any other does."""
    try:
        from fxprune import cli

        return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
