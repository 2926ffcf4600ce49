"""What modules do in a ``train()`` of their own: keep norms in evaluation, or more than that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..files import told
from ..graph_module import Switch
from ..program import named_modules, own_train
from .twin import twin_on_meta


def switches(model: nn.Module) -> Mapping[str, Mapping[bool, Switch]]:
    """By the path of each module with a ``train()`` of its own what that does, in either mode.

    It runs on a copy of the model on shapes alone. A module that refuses both modes, as that of an exported
    program does, has none that could be followed.
    """
    found: dict[str, Mapping[bool, Switch]] = {}
    for path, module in named_modules(model):
        if own_train(module):
            after = {mode: _after(module, mode) for mode in (False, True)}
            if any(switch.flags for switch in after.values()):
                found[path] = after
    return found


def _after(module: nn.Module, mode: bool) -> Switch:
    twin = twin_on_meta(module)
    before = _attributes(twin)
    try:
        twin.train(mode)
    except Exception as error:  # noqa: BLE001  whatever a user's method raises
        return Switch({}, told(error))
    after = _attributes(twin)
    changed = sorted({name for name in {**before, **after} if before.get(name) is not after.get(name)})
    more = f"changes {', '.join(changed[:3])}" if changed else ""
    return Switch({path: inner.training for path, inner in named_modules(twin)}, more)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What modules hold but their flags; numbers and the like as they are, objects by identity."""
    found = {}
    for path, inner in named_modules(module):
        tables = (inner.__dict__, inner._parameters, inner._buffers, inner._modules)
        for name, value in ((n, v) for table in tables for n, v in table.items()):
            if name != "training" and not isinstance(value, dict):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


__all__ = ["switches"]
