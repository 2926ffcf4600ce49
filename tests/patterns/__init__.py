"""Small networks, each with one awkward operator or idiom, by theme; ``test_patterns.py`` judges them.

Each case is a forward function with its layers. ``narrows`` lists the parameters that must have become
smaller (``a`` stands for ``a.weight``), so that no case passes because nothing was pruned.
"""

from . import (
    attention,
    complex_numbers,
    constants,
    convolutions,
    dropout,
    exceptions,
    functions,
    keywords,
    movement,
    normalization,
    recurrence,
    selection,
    sharing,
    signatures,
    splitting,
)
from .cases import CASES, Case

__all__ = [
    "CASES",
    "Case",
    "attention",
    "complex_numbers",
    "constants",
    "convolutions",
    "dropout",
    "exceptions",
    "functions",
    "keywords",
    "movement",
    "normalization",
    "recurrence",
    "selection",
    "sharing",
    "signatures",
    "splitting",
]
