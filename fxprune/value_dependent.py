"""Functions whose results have sizes that depend on values, on shapes alone.

How long the sequences of a batch are is a matter of values. What is known of ``pack_padded_sequence`` and
``pad_packed_sequence`` from shapes is enough to follow the features: here, all sequences are as long as
the longest. Of boxes, all may be left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CaptureError
from .nn import assign


def _pack(
    input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> rnn.PackedSequence:
    """``input: (T, N, *)``, or ``(N, T, *)`` with ``batch_first``; packed ``(T N, *)``."""
    if batch_first:
        input = input.transpose(0, 1)
    with _disable_current_modes():  # a recurrent layer takes these numbers with their values
        batch_sizes = torch.full(input.shape[:1], input.shape[1], dtype=torch.int64, device="cpu")
    return rnn.PackedSequence(input.flatten(0, 1), batch_sizes)


def _pad(
    sequence: rnn.PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The padded sequences ``(T, N, *)``, or ``(N, T, *)`` with ``batch_first``; their lengths ``(N)``."""
    steps = len(sequence.batch_sizes)
    padded = sequence.data.unflatten(0, (steps, -1))
    batch = padded.shape[1]
    if total_length is not None:
        padded = F.pad(padded, [0] * (2 * padded.dim() - 1) + [total_length - steps])
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    return (padded.transpose(0, 1) if batch_first else padded), lengths


def _assigned(tensor: Tensor, value: Tensor) -> None:
    """What is assigned stands where the tensor stood, index by index."""
    if tensor.shape != value.shape:
        raise CaptureError(
            f"forward puts a tensor of shape {tuple(value.shape)} into .data of one of shape "
            f"{tuple(tensor.shape)}"
        )
    tensor.copy_(value)


ON_SHAPES: dict[Any, Callable[..., Any]] = {
    rnn.pack_padded_sequence: _pack,
    rnn.pad_packed_sequence: _pad,
    assign: _assigned,
}
"""What to call in place of these functions where only shapes are known."""


def kept_whole() -> tuple[tuple[Callable[..., Any], ...], tuple[ModuleType, ...]]:
    """Functions that tracing does not enter, and modules in which code may look them up."""
    found = {name: sys.modules[name] for name in _VISION if name in sys.modules}
    if len(found) == len(_VISION):
        boxes: Any = found[_VISION[-1]]
        ON_SHAPES.setdefault(boxes.nms, boxes.nms)
        ON_SHAPES.setdefault(boxes.batched_nms, partial(_suppress, boxes.nms))
    return tuple(ON_SHAPES), (rnn, *found.values())


def _suppress(
    nms: Callable[..., Tensor], boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float
) -> Tensor:
    """``boxes: (N, 4)``, ``scores, idxs: (N)``: the numbers of those that are kept."""
    return nms(boxes + idxs[:, None], scores, iou_threshold)


_VISION = ("torchvision.ops", "torchvision.ops.boxes")
AS_LIST = frozenset(["tolist", "numpy"])


def is_lengths(node: fx.Node) -> bool:
    """Whether a node reads values off a tensor that only say how long packed sequences are."""
    used = {user.target for user in node.users}
    return node.op == "call_method" and node.target in AS_LIST and used == {rnn.pack_padded_sequence}
