"""What a forward does beside computing its result: it keeps tensors, and writes into them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..program import named_modules
from .twin import holds


class AttributesBefore:
    """What modules hold in attributes before a forward runs, and what it leaves there for its next call."""

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[str, Any, list[Any]]] = []
        seen: set[int] = set()
        for path, module in named_modules(model):
            if id(module) not in seen:
                seen.add(id(module))
                prefix = f"{path}." if path else ""
                for table in (module._buffers, module._parameters, module._modules, module.__dict__):
                    if table:
                        self._tables.append((prefix, table, dict(table)))
                for name, value in module.__dict__.items():
                    if name not in _TABLES and not name.endswith("_hooks") and holds(value):
                        self._contents.append((f"{prefix}{name}", value, _content(value)))

    def replaced(self, kind: type) -> Iterator[tuple[str, torch.Tensor | None, Any, Callable[[Any], None]]]:
        """What forward has put into attributes.

        Gives the name, the tensor from before (None where there was none), the new value, which is a
        ``kind``, and a function that writes the attribute.
        """
        for prefix, table, earlier in self._tables:
            for name in _touched(table, earlier):
                if not isinstance(table.get(name), kind):
                    continue
                before = earlier.get(name)

                def write(value: Any, table: dict[str, Any] = table, name: str = name) -> None:
                    table[name] = value

                known = before if isinstance(before, torch.Tensor) else None
                yield f"{prefix}{name}", known, table[name], write

    def changed(self, kind: type) -> list[str]:
        """Names of attributes in which forward has left something else than a ``kind``."""
        names = [
            f"{prefix}{name}"
            for prefix, table, earlier in self._tables
            for name in _touched(table, earlier)
            if name not in _TABLES
            and not isinstance(table.get(name), kind)
            and not _same(table.get(name, self), earlier.get(name, self))
        ]
        names += [name for name, value, before in self._contents if not _same(_content(value), before)]
        return list(dict.fromkeys(names))


def not_kept(names: list[str]) -> list[str]:
    """The note on what forward leaves in these attributes; none where there is nothing."""
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"what forward leaves in {', '.join(names[:3])}{more} is not kept"]


_TABLES = ("_buffers", "_parameters", "_modules", "_non_persistent_buffers_set")


def _touched(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Names that stand for another object than before, or for none any more."""
    found = [name for name, value in now.items() if value is not before.get(name, before)]
    return found if len(now) - len(found) == len(before) else [*found, *(n for n in before if n not in now)]


def _content(value: Any, depth: int = 3) -> Any:
    """What a container or an object holds, in lists."""
    if not holds(value) or not depth:
        return value
    items = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    found = [*items, *items.values()] if items is not None else value
    return [_content(item, depth - 1) for item in found]


def _same(now: Any, before: Any) -> bool:
    """Whether nothing was assigned, or a plain value that is equal."""
    if now is before:
        return True
    if type(now) in (tuple, list) and type(before) is type(now) and len(now) == len(before):
        return all(map(_same, now, before))
    plain = (bool, int, float, str)
    return isinstance(now, plain) and isinstance(before, plain) and now == before


AUGMENTED = {
    "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "truediv",
    "__ifloordiv__": "floordiv", "__imod__": "mod", "__ipow__": "pow", "__iand__": "and_",
    "__ior__": "or_", "__ixor__": "xor", "__ilshift__": "lshift", "__irshift__": "rshift",
}  # fmt: skip
"""Augmented assignments, and the operators that torch.fx takes them for."""

_IN_PLACE = {"truediv": "div_", "floordiv": "floor_divide_", "mod": "remainder_", "and_": "bitwise_and_",
             "or_": "bitwise_or_", "xor": "bitwise_xor_", "lshift": "bitwise_left_shift_",
             "rshift": "bitwise_right_shift_"}  # fmt: skip
_VIEWS = frozenset([
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis", "swapaxes",
    "swapdims", "t", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "contiguous", "detach", "data",
    "getitem", "getattr", "select", "narrow", "chunk", "split", "tensor_split", "hsplit", "vsplit", "dsplit",
    "unbind", "unfold", "diagonal", "as_strided", "real", "imag", "view_as_real", "view_as_complex", "to",
    "type", "float", "double", "half", "bfloat16", "dropout", "relu", "broadcast_to", "ravel",
    "split_with_sizes", "unsafe_chunk", "unsafe_split", "adjoint", "stop_gradient",
])  # fmt: skip
"""Functions whose result may share memory with their first argument."""
_ALIASING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
             nn.AlphaDropout, nn.FeatureAlphaDropout)  # fmt: skip
_SIZES = frozenset(["size", "dim", "numel", "item", "len", "nelement", "stride", "ndimension", "tolist"])


def write_in_place(
    graph: fx.Graph, augmented: Mapping[fx.Node, str], module: Callable[[str], nn.Module]
) -> list[fx.Node]:
    """Turn ``y = y + z`` that was ``y += z`` into ``y.add_(z)`` where somebody else sees the memory of ``y``.

    torch.fx takes the one for the other; they differ where ``y`` is a view, or has another name.

    Args:
        graph: changed in place.
        augmented: the operator for each node that was such an assignment, in the order of the graph.
        module: gives the graph's modules by path.

    Returns:
        The nodes that were changed.
    """
    if not augmented:
        return []
    nodes = list(graph.nodes)
    changed = []
    order = {node: place for place, node in enumerate(nodes)}

    def aliases(node: fx.Node) -> fx.Node | None:
        """The node whose memory this one may share."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if node.op == "call_module":
            leaf = module(str(node.target))
            return node.args[0] if isinstance(leaf, _ALIASING) or getattr(leaf, "inplace", False) else None
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        shares = name in _VIEWS or (name.endswith("_") and not name.startswith("_"))
        return node.args[0] if shares and node.op in ("call_method", "call_function") else None

    def seen(first: fx.Node, after: fx.Node) -> bool:
        """Whether memory of ``first`` is read later than ``after``, or belongs to somebody else."""
        family, todo = {first}, [first]
        while todo:
            node = todo.pop()
            if node.op in ("placeholder", "get_attr"):
                return True
            if any(order[user] > order[after] for user in node.users):
                return True
            source = aliases(node)
            near = [source] if source is not None else []
            near += [user for user in node.users if user is not after and aliases(user) is node]
            todo += [n for n in near if n not in family]
            family.update(near)
        return False

    for node, operator_name in augmented.items():
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and not _is_number(first) and seen(first, node):
            node.op, node.target = "call_method", _IN_PLACE.get(operator_name, f"{operator_name}_")
            changed.append(node)
    return changed


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes sizes rather than tensors."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if name in _SIZES or (name == "getattr" and node.args[1] in ("shape", "ndim")):
        return True
    module = getattr(node.target, "__module__", "")
    inputs = node.all_input_nodes
    return module in ("_operator", "math", "builtins") and bool(inputs) and all(map(_is_number, inputs))


__all__ = ["AUGMENTED", "AttributesBefore", "not_kept", "write_in_place"]
