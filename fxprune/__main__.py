"""``python -m fxprune`` is the ``fxprune`` command, also where its script is not on the path."""

import sys

from fxprune.cli import main

sys.exit(main())
