"""``python -m fxprune.cli`` is the ``fxprune`` command, also where the package is not installed."""

import sys

from fxprune.cli import main

sys.exit(main())
