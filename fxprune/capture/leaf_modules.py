"""Modules that a capture calls as one node each, and the hooks around calls of modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError
from ..graph_module import clone_module
from ..module_registry import leaf_for, own_kind


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as one node: those of ``torch.nn`` that do not merely contain, classes that
    inherit all that these compute, and those that were registered (:func:`fxprune.register_module`).
    """
    if "forward" in vars(module):  # which need not be that of its class
        return False
    if leaf_for(module) is not None:
        return True
    kind = type(module)
    if kind.__module__ == "torch.ao.quantization.stubs":
        return kind.__qualname__ != "QuantWrapper"
    if kind.__module__.startswith("torch.ao.nn."):  # also those that inherit from Sequential
        return True
    kind = own_kind(kind)  # type: ignore[arg-type]  # a class is hashable
    holds = kind is nn.Module or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return kind.__module__.startswith(("torch.nn.", "fxprune.nn")) and not holds


def _user_hooks(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Those of others than torch, whose own give modules their weights, or observe them."""
    return {
        key: hook
        for key, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("torch.")
    }


def hooked(module: nn.Module) -> bool:
    """Whether calling a module calls hooks of a user's."""
    return bool(module._forward_hooks or module._forward_pre_hooks) and bool(
        _user_hooks({**module._forward_hooks, **module._forward_pre_hooks})
    )


def with_hooks(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``forward(*args, **kwargs)`` with the hooks of ``module`` around it, as ``torch`` calls them."""
    for key, hook in _user_hooks(module._forward_pre_hooks).items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    out = forward(*args, **kwargs)
    for key, hook in _user_hooks(module._forward_hooks).items():
        given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, out)
        out = out if changed is None else changed
    return out


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module, with the same tensors, without hooks of a user's."""
    new = clone_module(module, lambda _, tensor: tensor, share=True)
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        mine = _user_hooks(getattr(module, table))
        new.__dict__[table] = OrderedDict(
            (k, hook) for k, hook in getattr(module, table).items() if k not in mine
        )
    return new


def refuse_torchscript(module: nn.Module) -> None:
    """Raises CaptureError for a module that TorchScript has compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(module).__name__} was compiled by TorchScript, which hides what it computes. Use the "
            f"module that it was made from."
        )


__all__ = ["hooked", "is_leaf", "refuse_torchscript", "with_hooks", "without_hooks"]
