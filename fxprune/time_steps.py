"""Recurrent layers do the same at every time step.

So a few steps tell what they couple, and which shapes they give. PyTorch makes some twenty calls for each
step of ``nn.LSTM``, and a second of speech has a hundred steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

aten = torch.ops.aten

STEPS = 3
"""How many. The first starts from a given state, the second from one that is coupled as the first left it,
and so do all that follow; one more is for certainty."""

_PADDED = frozenset([aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input])
_PACKED = frozenset([aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data])
RECURRENT = _PADDED | _PACKED
"""Operators that go through a sequence (see :class:`torch.nn.LSTM`): one of shape ``(T, N, C)`` or, batch
first, ``(N, T, C)``, or a packed one, ``(sum of the lengths, C)``."""
FUNCTIONS = RECURRENT | {getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
"""The same, and the functions by which :class:`torch.nn.LSTM` and its like call them."""


def as_called(target: Any) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, a recurrent layer, cell or function makes one call, not those PyTorch makes of it."""
    recurrent = isinstance(target, (nn.RNNBase, nn.RNNCellBase)) or target in FUNCTIONS
    return torch._C._AutoDispatchBelowAutograd() if recurrent else contextlib.nullcontext()


def time(func: Any, args: Any) -> int:
    """The dimension of the first argument of ``func``, one of :data:`RECURRENT`, that has the time steps."""
    return 1 if func in _PADDED and args[-1] else 0


def over_few(func: Any, args: Any, run: Callable[[Any, Any], Any]) -> Any:
    """What a call of one of :data:`RECURRENT` gives on meta tensors.

    Args:
        func: the operator.
        args: its arguments.
        run: makes the call for the first time steps.
    """
    dim = time(func, args)
    length, few = args[0].shape[dim], STEPS
    if func in _PACKED:  # the rows are those of the first step, then those of the second ...
        rows = args[1]
        few = length if rows.is_meta else int(rows[:STEPS].sum())
        args = (args[0], rows[:STEPS] if few < length else rows, *args[2:])
    if few >= length:
        return run(func, args)
    output, *states = run(func, (aten.slice.Tensor(args[0], dim, 0, few), *args[1:]))
    steps = output if dim == 0 else aten.transpose.int(output, 0, 1)  # as they lie in memory
    # All of them repeated, not one: what is the same along a dimension may be cut to what it meets.
    more = aten.repeat.default(steps, (math.ceil(length / few), *(1 for _ in steps.shape[1:])))
    every = aten.clone.default(aten.slice.Tensor(more, 0, 0, length))
    return (every if dim == 0 else aten.transpose.int(every, 0, 1), *states)


__all__ = ["FUNCTIONS", "RECURRENT", "as_called", "over_few", "time"]
