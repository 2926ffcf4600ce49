"""Networks that do one thing in training and another in evaluation: one graph for both.

Where control flow asks for a module's training flag, the calls that follow differ from mode to mode. Such a
graph holds the calls of both. Node metadata ``"only"`` is the condition under which a node runs; a node
without it always does. Where a value comes from one node or from another, a call of :func:`either` stands.
The analysis follows all of it, so that what is removed fits both; what runs is a graph without the calls of
the other mode, made by :func:`in_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .errors import CaptureError, ModeError
from .graph_record import MODES
from .nodes import writes

Flags = Mapping[str, bool]
"""Training flags of modules, by path."""
Condition = tuple[tuple[str, bool], ...]
"""Modules and the flags that they must have: these, or all of them the opposite."""


def either(condition: Condition, this: Any, other: Any) -> Any:
    """In the graph for both modes: ``this`` where the condition holds, else ``other``.

    Called on meta tensors alone. Two tensors must have one shape; the result goes with both.

    Raises:
        CaptureError: if they have not.
    """
    if isinstance(this, torch.Tensor) and isinstance(other, torch.Tensor):
        if this.shape != other.shape or this.dtype != other.dtype:
            raise CaptureError(
                f"{_said(condition)}, the network goes on with a tensor of shape {tuple(this.shape)}, "
                f"otherwise with one of shape {tuple(other.shape)}"
            )
        return torch.where(torch.empty((), dtype=torch.bool, device="meta"), this, other)
    return this if isinstance(this, torch.Tensor) else other


def holds(condition: Condition, flags: Flags) -> bool:
    """Whether the condition holds for these flags.

    Raises:
        ModeError: if it does for some modules and not for others.
    """
    found = {flags[path] == flag for path, flag in condition}
    if len(found) > 1:
        said = _said(tuple((path, flags[path]) for path, _ in condition))
        raise ModeError(
            f"this mix of modes was not captured: {said}. Put these modules into one mode, or prune the "
            f"model while they are in these modes."
        )
    return found != {False}


def deciding(graph: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose training flags decide what of ``graph`` runs."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        conditions = [node.meta.get("only", ()), node.meta.get("given", ())]
        conditions += [node.args[0]] if node.target is either else []
        found |= {str(path): None for condition in conditions for path, _ in condition}
    return tuple(found)


def in_mode(graph: fx.Graph, flags: Flags) -> fx.Graph:
    """What of ``graph`` runs where the modules of :func:`deciding` have these training flags.

    Raises:
        ModeError: if that was not captured: a mix of modes, or a mode in which the model could not be traced.
    """
    new = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target is either:
            picked = node.args[1] if holds(node.args[0], flags) else node.args[2]
            if all(n in env for n in _nodes(picked)):
                env[node] = map_arg(picked, env.__getitem__)
            continue
        if not holds(node.meta.get("only", ()), flags) or any(n not in env for n in inputs):
            continue
        wrong = [(path, flags[path]) for path, flag in node.meta.get("given", ()) if flags[path] != flag]
        if wrong:
            raise ModeError(
                f"{_said(tuple(wrong))}, the network does what was not captured"
                f"{node.meta.get('because', '')}. Prune the model in this mode for a result that runs in it."
            )
        if node.op == "output":
            made = new.output(map_arg(node.args[0], env.__getitem__), node.type)
        else:
            env[node] = made = new.node_copy(node, env.__getitem__)
        made.meta = {key: value for key, value in node.meta.items() if key not in MODES}
    for old in reversed(list(graph.nodes)):  # what only the other mode looks at
        made = env.get(old) if old.target is not either else None
        if not isinstance(made, fx.Node) or made.users or not old.users:
            continue
        if old.op in ("get_attr", "call_function", "call_method") and not writes(old):
            new.erase_node(made)
    new._codegen = graph._codegen
    return new


def renamed(node: fx.Node, rename: Callable[[str], str]) -> None:
    """Give the modules that a node's conditions name other paths."""
    for kind in ("only", "given"):
        if kind in node.meta:
            node.meta[kind] = tuple((rename(path), flag) for path, flag in node.meta[kind])
    if node.target is either:
        condition: Any = node.args[0]
        node.update_arg(0, tuple((rename(path), flag) for path, flag in condition))


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(tree, found.append)
    return found


def _said(condition: Condition) -> str:
    """``with layer.norm in training mode``."""
    by_mode: dict[bool, list[str]] = {}
    for path, flag in condition:
        by_mode.setdefault(flag, []).append(path or "the model")
    return " and ".join(
        f"with {', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''} in "
        f"{'training' if flag else 'evaluation'} mode"
        for flag, paths in by_mode.items()
    )


__all__ = ["Condition", "Flags", "deciding", "either", "holds", "in_mode", "renamed"]
