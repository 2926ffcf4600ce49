"""What captured graphs check when they run: that the inputs are like the example in all that was pinned.

Where a graph is traced again, its checks become nodes of the new one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.fx.node import has_side_effect

from .errors import PinnedError


@has_side_effect
def check_number(value: Any, expected: Any, where: str) -> None:
    """Refuse inputs whose values lead elsewhere: ``value`` is what was ``expected`` for the example.

    Args:
        value: a number, or a tensor of one entry.
        expected: the number that the graph was made with.
        where: the line of the model that asks for it.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_number, (value, expected, where), {})
    elif value != expected:
        got = value.item() if isinstance(value, Tensor) else value
        raise PinnedError(
            f"{where} asks for a value that was {expected!r} for the example inputs, and the graph goes on "
            f"from there; for these inputs it is {got!r}. Next: analyse the model again with an example like "
            f"these inputs."
        )


@has_side_effect
def check_decision(value: Any, expected: Any, where: str, lengths: tuple[Any, ...] = ()) -> None:
    """Refuse inputs whose sizes lead elsewhere: what the model's code asks of them is as in the example.

    Args:
        value: a number that is computed from sizes.
        expected: what it was for the example, and the graph goes on from there.
        where: the line of the model that asks for it.
        lengths: of the inputs. Where all are one any answer will do; empty where none but ``expected`` does.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_decision, (value, expected, where, lengths), {})
        return
    if isinstance(expected, bool):  # of sizes that torch.compile and torch.export leave free, no == is taken
        same = expected if value else not expected
    else:
        same = value == expected
    if not same and not (lengths and all(length == 1 for length in lengths)):
        raise PinnedError(
            f"{where} asks for a number that depends on the sizes of the inputs: it was {expected!r} for the "
            f"example inputs, and the graph goes on from there; for these inputs it is {value!r}. Next: "
            f"analyse the model again with an example of these sizes."
        )


@has_side_effect
def check_size(
    tensor: Tensor | fx.Proxy,
    name: str,
    dim: int,
    expected: int,
    step: int,
    role: str = "",
    because: str = "",
    at_most: bool = False,
) -> None:
    """Refuse an input of a size that the graph is not right for.

    Args:
        tensor: the input.
        name: its name.
        dim: the dimension.
        expected: the size in the example.
        step: sizes that differ from it by a multiple of this are right; 0 where it must be ``expected``.
        role: what the dimension is: batch, length, height ...
        because: why no other size is right.
        at_most: whether no larger size is.
    """
    if isinstance(tensor, fx.Proxy):
        given = (tensor, name, dim, expected, step, role, because, at_most)
        tensor.tracer.create_proxy("call_function", check_size, given, {})
        return
    size = tensor.shape[dim]
    # No == with the example's size where others are right: torch.export would leave that one size out.
    is_right = (size - expected) % step == 0 if step else size == expected
    if not is_right or (at_most and size > expected):
        by = f" by a multiple of {step}" if step > 1 else ""
        wanted = f"{expected}" + (f" or less{by}" if at_most else f", or differs from it{by}" if step else "")
        reason = f": {because}" if because else ""
        which = f" ({role})" if role else ""
        raise PinnedError(
            f"the input {name!r} has size {size} in dimension {dim}{which}; the graph was made for size "
            f"{wanted}{reason}. Next: analyse the model again with an example of the new size, or bring the "
            f"input to size {expected}."
        )


CHECKS = frozenset([check_decision, check_number, check_size])
"""All of them; on shapes alone they have nothing to say."""

__all__ = ["CHECKS", "check_decision", "check_number", "check_size"]
