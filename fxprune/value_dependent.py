"""Functions whose results have sizes that depend on values, on shapes alone.

How long the sequences of a batch are is a matter of values. What is known of ``pack_padded_sequence`` and
``pad_packed_sequence`` from shapes is enough to follow the features: here, all sequences are as long as
the longest. Of boxes, all may be left.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .errors import CaptureError
from .nn import assign
from .nodes import is_assertion, mutable
from .time_steps import as_called


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

FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "arange", "linspace", "logspace", "eye")
"""Functions of torch that make tensors of numbers alone."""


def call_on_shapes(node: fx.Node, args: Any, kwargs: Any, module: Callable[[str], nn.Module]) -> Any:
    """What a node gives on shapes alone.

    Args:
        node: a call.
        args: its positional arguments, with meta tensors in the place of nodes.
        kwargs: the same by name.
        module: gives the graph's modules by path, on the meta device.
    """
    if node.op == "call_method":
        if node.target in ("cpu", "cuda"):
            return args[0]
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if is_assertion(node, args):
        return None
    if node.op == "call_function":
        if getattr(node.target, "__name__", "") in (*FACTORIES, "tensor", "as_tensor"):
            kwargs = {**kwargs, "device": "meta"}
        args, kwargs = mutable(args), mutable(kwargs)
        target: Any = ON_SHAPES.get(node.target, node.target)
        with as_called(target):
            return target(*args, **kwargs)
    layer = module(str(node.target))
    with as_called(layer):
        return layer.forward(*args, **kwargs)


def kept_whole() -> tuple[tuple[Callable[..., Any], ...], tuple[ModuleType, ...]]:
    """Functions that tracing does not enter, and modules in which code may look them up."""
    found = {name: sys.modules[name] for name in _VISION if name in sys.modules}
    if len(found) == len(_VISION):
        boxes: Any = found[_VISION[-1]]
        ON_SHAPES.setdefault(boxes.nms, boxes.nms)
        ON_SHAPES.setdefault(boxes.batched_nms, partial(_suppress, boxes.nms))
    einx: Any = sys.modules.get("einx")  # whose functions solve for sizes, as numbers
    solving = [f for f in vars(einx).values() if isinstance(f, FunctionType)] if einx is not None else []
    homes = (rnn, *found.values(), *filter(None, [einx]))
    return (*ON_SHAPES, *solving), homes


def _suppress(
    nms: Callable[..., Tensor], boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float
) -> Tensor:
    """``boxes: (N, 4)``, ``scores, idxs: (N)``: the numbers of those that are kept."""
    return nms(boxes + idxs[:, None], scores, iou_threshold)


_VISION = ("torchvision.ops", "torchvision.ops.boxes")
AS_LIST = frozenset(["tolist", "numpy"])


def _all_places(args: Any, kwargs: Any, fewer: int = 0) -> Tensor:
    return torch.empty(args[0].numel() - fewer, args[0].dim(), dtype=torch.int64, device="meta")


def _all_picked(args: Any, kwargs: Any, fewer: int = 0) -> Tensor | None:
    """Where masks choose, all may be chosen; None for any other index."""
    indices: list[Any] = []
    for index in args[1]:
        masks = index is not None and index.dtype == torch.bool
        whole = torch.empty(index.numel() - fewer, dtype=torch.int64, device="meta") if masks else index
        indices += [whole] * (index.dim() if masks else 1)
    if len(indices) == len(args[1]) and all(a is b for a, b in zip(indices, args[1], strict=True)):
        return None
    return cast(Tensor, aten.index.Tensor(args[0], indices))


def _all_selected(args: Any, kwargs: Any, fewer: int = 0) -> Tensor:
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    return torch.empty(math.prod(shape) - fewer, dtype=args[0].dtype, device="meta")


def _products(args: Any, kwargs: Any, fewer: int = 0) -> Tensor | None:
    """Rows ``(S, K)`` times ``(E, K, N)``: ``(S, N)``, in types that the general kernel refuses on shapes."""
    x, weight = args[:2]
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        return None
    return torch.empty(x.shape[0], weight.shape[2], dtype=kwargs.get("out_dtype") or x.dtype, device="meta")


aten = torch.ops.aten
SHAPES: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _all_places,
    aten.index.Tensor: _all_picked,
    aten._unsafe_index.Tensor: _all_picked,
    aten.masked_select.default: _all_selected,
    aten._grouped_mm.default: _products,
}
"""Operators that do not run on shapes alone, or not always, and what makes results of the right shape; where
that gives None, the operator itself is to be asked. How many entries a mask selects is for the values to say;
here it selects all of them."""


class OnShapes(TorchDispatchMode):
    """While it lasts, operators in :data:`SHAPES` run on shapes alone.

    Args:
        fewer: how many entries masks leave out.

    Attributes:
        by_values: whether one of them was called whose result has a size that depends on values.
    """

    def __init__(self, fewer: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fewer = fewer
        self.by_values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = SHAPES.get(func)
        out = shape(args, kwargs or {}, self.fewer) if shape is not None else None
        if out is None:
            return func(*args, **(kwargs or {}))
        self.by_values |= func is not aten._grouped_mm.default
        return out


def is_lengths(node: fx.Node) -> bool:
    """Whether a node reads values off a tensor that only say how long packed sequences are."""
    used = {user.target for user in node.users}
    return node.op == "call_method" and node.target in AS_LIST and used == {rnn.pack_padded_sequence}
