"""The shortcuts to shapes agree with PyTorch's own meta kernels, or step aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.coupling.meta_shapes import SHORTCUTS
from fxprune.value_dependent import SHAPES

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


conv = aten.convolution.default
IMAGE, CHANNELS, ROWS = (2, 6, 9, 7), (6,), (5, 6)
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (conv, (meta(*IMAGE), meta(8, 6, 3, 3), meta(8), [2, 1], [1, 0], [1, 2], False, [0, 0], 1)),
    (aten.convolution.default, (meta(*IMAGE), meta(6, 1, 3, 3), None, [1], [1], [1], False, [0], 6)),
    (aten.convolution.default, (meta(2, 6, 9), meta(8, 3, 2), None, [3], [0], [1], False, [0], 2)),
    (conv, (meta(*IMAGE), meta(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1)),
    (aten.native_batch_norm.default, (meta(*IMAGE), *(meta(*CHANNELS) for _ in range(4)), False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (meta(*IMAGE), *(meta(*CHANNELS) for _ in range(4)), True, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 5, 6), [6], meta(6), meta(6), 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 5, 6), [5, 6], None, None, 1e-5)),
    (aten.addmm.default, (meta(4), meta(*ROWS), meta(6, 4))),
    (aten.addmm.default, (meta(5, 4), meta(*ROWS), meta(6, 4))),
    (aten.addmm.default, (meta(4), meta(*ROWS), meta(4, 6).t())),
    (aten.mm.default, (meta(*ROWS), meta(6, 4))),
    *(
        (aten.linear.default, (x, meta(4, 6), *bias))
        for x in (meta(*ROWS), meta(2, *ROWS), meta(6), meta(6, 5).t())
        for bias in ((), (None,), (meta(4),))
    ),
    (aten.bmm.default, (meta(3, *ROWS), meta(3, 6, 4))),
    (aten.mean.dim, (meta(*IMAGE), [-1, -2], True)),
    (aten.cat.default, ([meta(*IMAGE), meta(2, 3, 9, 7), meta(*IMAGE)], 1)),
    (aten.cat.default, ([meta(*ROWS), meta(2, 6)],)),
    (aten.cat.default, ([meta(*ROWS), meta(*ROWS)], -1)),
    (aten.cat.default, ([meta(*ROWS), meta(0)], 0)),
    (aten.cat.default, ([meta(*ROWS), meta(*ROWS, dtype=torch.float64)], 0)),
    (aten.mean.dim, (meta(*IMAGE), [0, 2], False)),
    *(
        (aten.mul.Tensor, (meta(*a), meta(*b)))
        for a, b in (((5, 1), (1, 6)), ((1, 6), (5, 6)), ((2, 3, 1, 1), (2, 3, 5, 4)), ((2, 1, 4), (1, 3, 1)))
    ),
    (aten._softmax.default, (meta(*ROWS), -1, False)),
    (aten._safe_softmax.default, (meta(*ROWS), -1)),
    *(
        (op, (meta(*ROWS), other))
        for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
        for other in (meta(*ROWS), meta(5, 1), meta(6), meta(3, 5, 6), meta(*ROWS, dtype=torch.float64))
    ),
    *((op, (meta(*ROWS), 2)) for op in (aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar)),
    *(
        (op, (meta(*ROWS, dtype=dtype),))
        for op, shortcut in SHORTCUTS.items()
        if shortcut.__name__ in ("_unary", "_in_place") and op._overloadname == "default"
        for dtype in (torch.float32, torch.bfloat16)
    ),
    (aten.add_.Tensor, (meta(*ROWS), meta(*ROWS))),
    (aten.mul_.Tensor, (meta(*ROWS), meta(*ROWS))),
    (aten.mul_.Tensor, (meta(*ROWS), meta(6))),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_agrees(number: int) -> None:
    """Same shape, dtype and strides of the first result, where the shortcut answers at all."""
    operator, args = CALLS[number]
    short = SHORTCUTS[operator](args, {})
    if short is None:
        return
    own, general = (r if isinstance(r, Tensor) else r[0] for r in (short, operator(*args)))
    assert (own.shape, own.dtype, own.stride()) == (general.shape, general.dtype, general.stride())


def test_every_shortcut_is_taken() -> None:
    """Each has a call above that it answers; what depends on values has no general kernel to agree with."""
    answered = {operator for operator, args in CALLS if SHORTCUTS[operator](args, {}) is not None}
    assert answered == set(SHORTCUTS) - set(SHAPES)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten.mm.default, (meta(5, 6), meta(5, 4))),
        (aten.linear.default, (meta(5, 6), meta(4, 5))),
        (aten.linear.default, (meta(5, 6), meta(4, 6), meta(3))),
        (aten.linear.default, (meta(5, 6), meta(4, 6, dtype=torch.float64))),
        (aten.cat.default, ([meta(5, 6), meta(5, 4)], 0)),
        (aten.cat.default, ([meta(5, 6), meta(5, 6)], 2)),
        (aten.addmm.default, (meta(3), meta(5, 6), meta(6, 4))),
        (aten.convolution.default, (meta(2, 5, 9, 7), meta(8, 6, 3, 3), None, [1], [0], [1], False, [0], 1)),
        (aten.native_layer_norm.default, (meta(2, 5, 6), [7], meta(7), meta(7), 1e-5)),
        (aten.add.Tensor, (meta(5, 6), meta(4, 6))),
    ],
)
def test_steps_aside(operator: Any, args: tuple[Any, ...]) -> None:
    """What PyTorch refuses, a shortcut must not answer."""
    assert SHORTCUTS[operator](args, {}) is None
