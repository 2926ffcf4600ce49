"""What a forward does beside computing its result: gradients of its own, and tensors that it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction

from ..program import named_modules

Apply = Callable[..., Any]


@contextlib.contextmanager
def autograd_functions(meet: Callable[[type, Apply, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """While it lasts, ``Function.apply(*args)`` returns ``meet(Function, apply, args, kwargs)``.

    Blocks under ``torch.utils.checkpoint`` are run as if they stood there themselves.
    """
    inherited = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            block, _, *inputs = args
            return block(*inputs)
        return meet(cls, inherited.__get__(None, cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = inherited


class Kept:
    """Tensors that modules hold as buffers and as plain attributes, before a forward runs."""

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        seen: set[int] = set()
        for path, module in named_modules(model):
            if id(module) not in seen:
                seen.add(id(module))
                prefix = f"{path}." if path else ""
                for table in (module._buffers, module.__dict__):
                    if table:
                        self._tables.append((prefix, table, dict(table)))

    def replaced(self, kind: type) -> Iterator[tuple[str, torch.Tensor | None, Any, Callable[[Any], None]]]:
        """What forward has put into attributes.

        Gives the name, the tensor from before (None where there was none), the new value, which is a
        ``kind``, and a function that writes the attribute.
        """
        for prefix, table, earlier in self._tables:
            new = [n for n, v in table.items() if v is not earlier.get(n) and isinstance(v, kind)]
            for name in new:
                before = earlier.get(name)

                def write(value: Any, table: dict[str, Any] = table, name: str = name) -> None:
                    table[name] = value

                known = before if isinstance(before, torch.Tensor) else None
                yield f"{prefix}{name}", known, table[name], write


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


def write_in_place(graph: fx.Graph, module: Callable[[str], nn.Module]) -> None:
    """Turn ``y = y + z`` that was ``y += z`` into ``y.add_(z)`` where somebody else sees the memory of ``y``.

    torch.fx takes the one for the other; they differ where ``y`` is a view, or has another name.
    """
    nodes = list(graph.nodes)
    if not any("augmented" in node.meta for node in nodes):
        return
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

    for node in nodes:
        operator_name = node.meta.pop("augmented", None)
        first = node.args[0] if node.args else None
        if operator_name and isinstance(first, fx.Node) and not _is_number(first) and seen(first, node):
            node.op, node.target = "call_method", _IN_PLACE.get(operator_name, f"{operator_name}_")


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


__all__ = ["AUGMENTED", "Kept", "autograd_functions", "write_in_place"]
