"""Rewrite: passes that turn a program and a narrowing into a narrower program.

A pass never changes what was analysed; it returns a new :class:`~fxprune.program.Program` that shares
what stayed the same. The graph is copied once, by the first pass that edits it. Passes know nothing of
importance or budgets: everything that they need is in the :class:`~fxprune.passes.base.Narrowing`.
"""

if __name__ != "fxprune.passes":
    raise ImportError(f"the folder passes/ is the package fxprune.passes; import that, not {__name__!r}")

from .base import Narrowing, Pass
from .pipeline import PIPELINE, Rewritten, rewrite

__all__ = ["PIPELINE", "Narrowing", "Pass", "Rewritten", "rewrite"]
