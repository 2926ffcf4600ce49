"""Write the API reference into a folder, from the docstrings: ``python .ci/reference.py site``.

Needs ``pip install -e '.[docs]'``. A warning is an error here, and so is a reference to a name of fxprune's
that there is not.
"""

import functools
import importlib
import re
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc import docstrings, render

PUBLIC = (
    "fxprune",
    "fxprune.passes",
    "fxprune.importance",
    "fxprune.errors",
    "fxprune.backend",
    "fxprune.nn",
)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
convert = docstrings.convert


def resolve(name: str) -> None:
    """Raise LookupError unless ``name``, which begins with ``fxprune``, is there."""
    found = importlib.import_module("fxprune")
    for part in name.split(".")[1:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
            except (ImportError, AttributeError):
                if part in getattr(found, "__dataclass_fields__", ()):
                    return
                raise LookupError(f"a docstring refers to {name}, which there is not") from None


@functools.cache  # pdoc empties it when it starts again
def plain(text: str, docformat: str, source: Path | None) -> str:
    """Roles of Sphinx as code, to which pdoc adds links."""
    for name in ROLE.findall(text):
        if name.startswith("fxprune."):
            resolve(name)
    return convert(ROLE.sub(r"`\1`", text), docformat, source)


def main(folder: str) -> None:
    docstrings.convert = plain
    warnings.simplefilter("error")
    # Names that only type checkers import stay as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    package = importlib.import_module("fxprune")
    render.configure(docformat="google", footer_text=f"fxprune {package.__version__}")
    pdoc.pdoc(*PUBLIC, output_directory=Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
