"""Names of blocks that repeat, joined: ``blocks.0.fc`` and ``blocks.1.fc`` as ``blocks.*.fc (x2)``."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["common", "joined", "starred"]


def starred(text: str) -> str:
    """``text`` with ``*`` for each number, but for those in brackets, which are dimensions."""
    return re.sub(r"(?<![\[\d])\d+", "*", text)


def common(texts: Sequence[str]) -> str:
    """The text that all are alike in, with ``*`` for numbers that differ."""
    parts = [re.split(r"(\d+)", text) for text in dict.fromkeys(texts)]
    if len({len(words) for words in parts}) > 1:
        return texts[0]
    return "".join(words[0] if len(set(words)) == 1 else "*" for words in zip(*parts, strict=True))


def joined(names: Sequence[str]) -> str:
    """One name for all, with how many there are."""
    return names[0] if len(names) == 1 else f"{common(names)} (x{len(names)})"
