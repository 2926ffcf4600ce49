"""Hooks on gradients that a forward registers (``h.register_hook``), which a graph does not have.

Tracing sees no gradients, so the calls leave nothing behind, on any rung. All that can be done is to say so.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

from torch import nn

from ..program import named_modules

_CALLS = frozenset(["register_hook", "register_post_accumulate_grad_hook", "register_multi_grad_hook"])


def note_on_gradient_hooks(model: nn.Module) -> str:
    """What to say of the modules whose forward names such a call; empty if none does."""
    kinds: dict[type, str] = {}
    for path, module in named_modules(model):
        kinds.setdefault(type(module), path or type(module).__name__)
    found = [path for kind, path in kinds.items() if _registers(kind)]
    if not found:
        return ""
    return (
        f"the forward of {found[0]} registers hooks on gradients, which a graph has not: gradients that "
        f'they change are others in the result. into="module" keeps them.'
    )


def _registers(kind: type) -> bool:
    """Whether the forward of a class, or a method that it names, names such a call."""
    if kind.__module__.startswith("torch."):
        return False
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        method: Any = getattr(kind, name, None)
        code = getattr(method, "__code__", None)
        if name in seen or not isinstance(code, CodeType):
            continue
        seen.add(name)
        names = _names(code)
        if names & _CALLS:
            return True
        todo += sorted(names)
    return False


def _names(code: CodeType) -> set[str]:
    """All names in a function, and in those that are defined within it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


__all__ = ["note_on_gradient_hooks"]
