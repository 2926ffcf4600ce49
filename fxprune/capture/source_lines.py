"""Which line of the user's code runs; frames of PyTorch, of this library and of made code do not count."""

from __future__ import annotations

import functools
import os
import sys
from types import FrameType

import torch

_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep
_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, _OWN, "<")


@functools.cache
def _is_skipped(file: str) -> bool:
    return file.startswith(_SKIPPED)


def user_frame() -> FrameType | None:
    """The innermost frame of the user's code that runs now; not what called this library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_skipped(frame.f_code.co_filename):
        frame = frame.f_back
    outer = frame
    while outer is not None and not outer.f_code.co_filename.startswith(_OWN):
        outer = outer.f_back
    return frame if outer is not None else None


def here() -> str:
    """The line of the user's code that runs now, as :func:`blame` gives it."""
    frame = user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: " if frame else ""


def blame(error: BaseException) -> str:
    """The innermost line of the user's code in a traceback."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not _is_skipped(code.co_filename):
            where = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}: "
        trace = trace.tb_next
    return where


__all__ = ["blame", "here", "user_frame"]
