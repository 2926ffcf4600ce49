"""Shapes that are remembered are those that operators give, and are found out once."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune import known_shapes

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(out: Any) -> Any:
    if isinstance(out, (tuple, list)):
        return type(out), [facts(part) for part in out]
    return out.shape, out.stride(), out.dtype, out.device


X, COLUMNS = meta(2, 3, 8), meta(2, 8, 3).transpose(1, 2)
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.mul.Tensor, (X, X), {}),
    (aten.mul.Tensor, (COLUMNS, X), {}),
    (aten.mul.Tensor, (X, meta(8, dtype=torch.float64)), {}),
    (aten.mul.Scalar, (meta(3, dtype=torch.int64), 2), {}),
    (aten.mul.Scalar, (meta(3, dtype=torch.int64), 2.0), {}),
    (aten.sum.dim_IntList, (X, [1]), {}),
    (aten.sum.dim_IntList, (X, [1], True), {}),
    (aten.max.dim, (X, 1), {}),
    (aten.clone.default, (COLUMNS,), {}),
    (aten.clone.default, (COLUMNS,), {"memory_format": torch.contiguous_format}),
    (aten.zeros.default, ([2, 3],), {"device": torch.device("meta")}),
    (aten.cat.default, ([X, COLUMNS], 1), {}),
]


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda n: f"{CALLS[n][0]}-{n}")
def test_what_is_remembered_is_what_the_operator_gives(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_shapes, "_found", {})
    func, args, kwargs = CALLS[number]
    ran = []

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        ran.append(func)
        return func(*args, **kwargs)

    for other, values, names in CALLS:  # which must not be taken for this one
        if other is func:
            known_shapes.result(other, values, names, run)
    ran.clear()
    again = [known_shapes.result(func, args, kwargs, run) for _ in range(2)]
    assert not ran
    assert [facts(out) for out in again] == [facts(func(*args, **kwargs))] * 2
    assert again[0] is not again[1]


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (X, [6, 8])),
        (aten.add_.Tensor, (X, X)),
        (aten.mul.Tensor, (torch.ones(2), X[..., :2])),
    ],
)
def test_views_writes_and_values_are_never_remembered(
    func: Any, args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[Any, Any] = {}
    monkeypatch.setattr(known_shapes, "_found", found)
    known_shapes.result(func, args, {}, lambda func, args, kwargs: X)
    assert not found


def test_the_mode_gives_the_shapes_that_torch_gives() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, device="meta").eval()
    for _ in range(2):
        with torch.no_grad(), known_shapes.Remembered():
            found = layer(meta(3, 2, 8))
        assert facts(found) == facts(layer(meta(3, 2, 8)).detach())


def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[Any, Any] = {}
    monkeypatch.setattr(known_shapes, "_found", found)
    monkeypatch.setattr(known_shapes, "_MOST", 4)
    for size in range(1, 12):
        known_shapes.result(aten.relu.default, (meta(size),), {}, lambda func, args, kwargs: func(*args))
        assert len(found) <= 4


SLICED = meta(2, 6, 8)[:, 2:]
FUNCTIONS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    ("view", (X, 6, 8), {}),
    ("view", (X, torch.Size([3, 16])), {}),
    ("transpose", (X, 1, 2), {}),
    ("transpose", (COLUMNS, 1, 2), {}),
    ("mean", (X, -1), {"keepdim": True}),
    ("reshape", (COLUMNS, 6, 8), {}),
    ("reshape", (SLICED, 8, -1), {}),
    ("float", (meta(3, dtype=torch.int64),), {}),
    (operator.getitem, (X, (slice(None), None, 0)), {}),
    (operator.getitem, (X, (..., slice(0, 4))), {}),
    (operator.getitem, (X, (..., slice(0, None))), {}),
    (operator.mul, (X, 2), {}),
    (operator.mul, (X, meta(8, dtype=torch.float64)), {}),
    (torch.cat, ([X, COLUMNS], 1), {}),
    (torch.nn.functional.silu, (X,), {}),
]


def called(function: Any, args: Any, kwargs: Any) -> Any:
    return (getattr(Tensor, function) if isinstance(function, str) else function)(*args, **kwargs)


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_so_is_what_functions_and_methods_give(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[Any, Any] = {}
    monkeypatch.setattr(known_shapes, "_found", found)
    for function, args, kwargs in FUNCTIONS:
        known_shapes.of_call(function, args, kwargs, partial(called, function, args, kwargs))
    assert len(found) == len(FUNCTIONS)
    function, args, kwargs = FUNCTIONS[number]
    again = known_shapes.of_call(function, args, kwargs, lambda: pytest.fail("ran again"))
    assert facts(again) == facts(called(function, args, kwargs))


def twice(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("contiguous", (X,)),  # its argument
        ("add_", (X, 1)),
        ("split", (X, 1)),  # several
        ("size", (X, 1)),
        (operator.getitem, (X, (slice(None), slice(1, 2)))),  # a part that does not begin where memory does
        (operator.getitem, ([X, COLUMNS], 1)),  # a part of a list
        (operator.mul, (torch.ones(3), 2)),  # with values
        (torch.nn.functional.relu, (X, True)),
        (twice, (X,)),  # somebody else's function
    ],
)
def test_all_else_runs_each_time(function: Any, args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_shapes, "_found", found := {})
    made = known_shapes.of_call(function, args, {}, partial(called, function, args, {}))
    assert not found
    if isinstance(made, Tensor) and made.is_meta:
        assert facts(made) == facts(called(function, args, {}))


def test_parts_with_ends_of_an_unknown_kind_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end may be a number that remembers where it is from."""

    class Marked(int):
        pass

    monkeypatch.setattr(known_shapes, "_found", {})
    for stop in (4, 3, 2):
        part = (X, (..., slice(None, Marked(stop))))
        made = known_shapes.of_call(operator.getitem, part, {}, partial(called, operator.getitem, part, {}))
        assert made.shape[-1] == stop


def test_arguments_in_other_places_of_memory_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_shapes, "_found", {})
    whole = meta(3, 4)
    for rows in (whole[:2], whole[1:]):
        made = known_shapes.of_call("view", (rows, 8), {}, partial(called, "view", (rows, 8), {}))
        assert made.storage_offset() == rows.storage_offset()
