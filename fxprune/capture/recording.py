"""What a trace has made, node by node, and whether another run of the model makes the same.

A model is traced more than once: in its other mode, and with inputs of other sizes. Mostly its code does the
same again. To see that no second graph is needed: while the model runs, each call that would become a node is
held against the node that the first trace made there, and the run ends at the first one that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..guards import check_decision
from ..nodes import operator_name
from .merge import Call, same_constant, same_module

_STEADY = frozenset([bool, int, float, torch.dtype, torch.device, torch.Size, torch.Tensor])
"""Types of what does not change once it is made; tensors change their shapes by operators of these names:"""
RESHAPES = frozenset(
    ["resize_", "resize_as_", "set_", "as_strided_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_",
     "unsqueeze_", "assign"]
)  # fmt: skip


class PartedError(BaseException):
    """A run makes another call than the recorded one. No model's code catches it."""


@dataclass
class Recording:
    """What one trace has made.

    Attributes:
        calls: each node, with what it calls: kind, target, arguments and keyword arguments.
        augmented: by node the augmented assignment (``+=``) that it was written as.
        added: modules that are not the model's, by path.
        constants: tensors that are not the model's, by name.
        asked: modules whose training flags the code of a call has asked for, by call.
        given: what is no tensor among the arguments of a call.
        complete: whether the trace has ended, and its nodes are as they were made.
    """

    calls: list[tuple[fx.Node, tuple[Any, ...]]] = field(default_factory=list)
    augmented: dict[fx.Node, str] = field(default_factory=dict)
    added: dict[str, nn.Module] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    asked: dict[tuple[Call, ...], dict[str, None]] = field(default_factory=dict)
    given: dict[Call, Any] = field(default_factory=dict)
    complete: bool = False

    def steady(self, seen: Mapping[fx.Node, Any]) -> Mapping[fx.Node, Any]:
        """Of what nodes were ``seen`` to be at the end of a trace what they were when they were made."""
        if any(operator_name(node) in RESHAPES for node, _ in self.calls):
            return {}
        return {node: value for node, value in seen.items() if type(value) in _STEADY}

    def same_tables(self, other: Recording) -> bool:
        """Whether another trace has added the same modules and constants, and assigned in the same way."""
        return (
            self.augmented == other.augmented
            and self.added.keys() == other.added.keys()
            and self.constants.keys() == other.constants.keys()
            and all(same_module(module, other.added[path]) for path, module in self.added.items())
            and all(same_constant(tensor, other.constants[name]) for name, tensor in self.constants.items())
        )


class Following:
    """Gives the nodes of a recording again, one after the other, as long as the same calls are made."""

    def __init__(self, recording: Recording) -> None:
        self._rest = iter(recording.calls)

    def node(self, call: tuple[Any, ...]) -> fx.Node:
        """The node of the next call.

        Raises:
            PartedError: if the recorded trace made another call here, or none.
        """
        node, made = next(self._rest, (None, None))
        if node is None or not _same(_asked(made), _asked(call)):
            raise PartedError
        return node

    def is_done(self) -> bool:
        """Whether all calls have been made."""
        return next(self._rest, None) is None


def _asked(call: Any) -> Any:
    """A call; of a decision on sizes what is asked, whatever the answer."""
    _, target, args, _ = call
    return (target, args[0], args[2]) if target is check_decision else call


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are the very same nodes, and equal values of the same types."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b):
        return False
    if kind is tuple or kind is list:
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, fx.Node):
        return False
    if kind is slice:
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    try:
        return bool(a == b) or (kind is float and a != a and b != b)
    except Exception:  # noqa: BLE001  whatever a user's class raises
        return False


__all__ = ["RESHAPES", "Following", "PartedError", "Recording"]
