"""A convolution: what its arguments mean, and which axis of its weight runs over which channels.

Whatever a model calls, it comes down to ``aten.convolution(x, weight, bias, stride, padding, dilation,
transposed, output_padding, groups)``. With ``k`` the kernel's sizes, weights are ``(out, in / groups, *k)``,
transposed ones ``(in, out / groups, *k)``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .nodes import operator_name

OPERATOR = "convolution"
"""What all convolutions come down to."""

FUNCTIONS = (OPERATOR, *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in "123"))
"""Names of everything that a node may call."""


@dataclass(frozen=True)
class Convolution:
    """How a convolution goes over its input; sequences have a number for each dimension of space.

    Attributes:
        stride: steps between windows; between inputs, if ``transposed``.
        padding: zeros at both ends; cut off at both ends, if ``transposed``.
        dilation: steps between the entries of a window.
        transposed: inputs are spread over windows, instead of windows being read.
        more: what a transposed convolution adds to the size of its output.
        groups: parts of the channels that are convolved by themselves.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    more: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, args: Sequence[Any]) -> Convolution:
        """From the arguments of ``aten.convolution``, of which one number may stand for all dimensions."""
        space = args[1].dim() - 2
        stride, padding, dilation, more = (
            tuple(numbers) * (space if len(numbers) == 1 else 1)
            for numbers in (args[3], args[4], args[5], args[7])
        )
        return cls(stride, padding, dilation, args[6], more, args[8])

    @property
    def inner(self) -> int:
        """The axis of the weight that runs over the input's channels (of one group, unless transposed)."""
        return 0 if self.transposed else 1

    @property
    def outer(self) -> int:
        """The axis of the weight that runs over the output's channels (of one group, if transposed)."""
        return 1 - self.inner


def with_fitting_groups(args: Sequence[Any]) -> list[Any]:
    """Arguments of ``aten.convolution`` with as many groups as the channels of input and weight make."""
    x, weight, before, transposed, after = args[0], args[1], args[2:6], args[6], args[7:8]
    groups = args[8] if transposed else x.shape[1] // weight.shape[1]
    return [x, weight, *before, transposed, *after, groups]


def groups_argument(node: fx.Node) -> tuple[int, str]:
    """Where the number of groups stands in a node's arguments: its place and its name."""
    return (8 if operator_name(node) == OPERATOR else 6), "groups"


def is_transposed(node: fx.Node) -> bool:
    """Whether a node that calls one of :data:`FUNCTIONS` calls a transposed convolution."""
    name = operator_name(node)
    return bool(node.args[6]) if name == OPERATOR else "transpose" in name
