"""Whether a captured graph is the model, seen without weights: it makes the same calls of operators.

While a model is traced, its code may see that values are no tensors (``h.__class__ is torch.Tensor``), and
take another branch than it does for its users. So both run without weights, and what they return is compared
by its formula: the operators, the numbers and the tensors that it is computed from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import known_shapes
from .capture.recording import RESHAPES
from .capture.twin import Twin
from .coupling.leaf_calls import call_plain
from .inputs import meta_like
from .program import Program, named_modules, named_tensors
from .time_steps import as_called
from .trees import flatten

_IDENTITIES = frozenset(["detach", "alias", "lift_fresh"])
"""Operators that give what they are given; a graph holds more of them than the model."""
_FEW = 4096
"""Up to so many entries, tensors that have values are compared by these, whatever they were computed by."""

_UNFILLED = ("empty", "new_empty")
"""Beginnings of the names of operators whose results have no values yet; random ones, say, are to follow."""

_PLAIN = frozenset([type(None), bool, int, float, torch.dtype])


def same_calls(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model and what was captured of it return and write the same; in doubt, no.

    What is made of inputs and constants alone has its values; what weights are part of has none.

    Args:
        model: the model, in the mode that is compared; not changed.
        program: what was captured of it.
        args: inputs; of those on the meta device the shapes alone count.
        kwargs: the same by name.
    """
    try:
        return _Comparison(model, program).run(args, kwargs)
    except Exception:  # noqa: BLE001  whatever code raises that asks for values
        return False


class _Comparison:
    """A model and its graph, both without weights, side by side.

    Layers with parameters that both call as a whole are run in the graph alone.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        own = {id(tensor) for _, tensor in named_tensors(model)}
        self.twin = Twin(model, lambda t: _without_values(t) if id(t) in own else _copy(t))
        named = {**program.extras, **program.tensors}
        made = {id(tensor): _without_values(tensor) for tensor in named.values()}
        self.tensors = {name: made[id(tensor)] for name, tensor in program.tensors.items()}
        extras = {name: made[id(tensor)] for name, tensor in program.extras.items()}
        self.graph: nn.Module = replace(program, tensors=self.tensors, extras=extras).module()
        self.called: dict[Any, Any] = {}  # what layers have returned, by call
        known = {id(made[id(tensor)]): _place(tensor) for tensor in named.values()}
        known |= {id(new): _place(old) for old, new in self.twin.tensors.values()}
        table: dict[Any, int] = {}
        self.of_graph, self.of_model = (_Formulas(table, known) for _ in range(2))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether both come to the same."""
        inside = self._take_layers()
        own = {name: tensor for name, tensor in self.tensors.items() if name not in inside}
        its = {name: tensor for name, tensor in named_tensors(self.twin.model) if name not in inside}
        found = self.of_graph.of(self.graph.forward, _copied(args), _copied(kwargs), own)
        result: bool = found == self.of_model.of(self.twin.model, _copied(args), _copied(kwargs), its)
        return result

    def _take_layers(self) -> set[str]:
        """Have the layers that both call make one call each; gives the names of their tensors."""
        modules, graphs = dict(named_modules(self.model)), dict(named_modules(self.graph))
        inside: set[str] = set()
        for path in self.program.modules:
            layer = modules.get(path)
            names = [name for name, _ in named_tensors(layer)] if layer is not None else []
            if layer is None or not names:
                continue
            inside.update(f"{path}.{name}" for name in names)
            if self.twin.of(layer) is layer:
                raise LookupError(f"{path} has no twin")  # its own forward is not to be replaced
            run: Any = graphs[path].forward
            for owner, formulas, how in (
                (graphs[path], self.of_graph, run),
                (self.twin.of(layer), self.of_model, None),
            ):
                owner.__dict__["forward"] = partial(self._call, id(layer), formulas, how)
        return inside

    def _call(self, layer: int, formulas: _Formulas, run: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = layer, formulas.formula(args), formulas.formula(kwargs)
        with _disable_current_modes():
            if run is not None and call not in self.called:
                self.called[call] = _on_shapes(run, _without(args), _without(kwargs))
            # A call that the graph does not make has no result here, and ends the comparison.
            result = _like(self.called[call])
        for place, tensor in enumerate(_tensors(result)):
            formulas.name(tensor, (call, place))
        return result


def _on_shapes(run: Any, args: Any, kwargs: Any) -> Any:
    """What ``run``, the forward of a layer, returns on shapes alone."""
    layer = run.__self__
    plain = call_plain(
        layer,
        args,
        kwargs,
        partial(getattr, layer),
        lambda func, given, named: known_shapes.result(func, given, named, _run),
    )
    if plain is not None:
        return plain
    with known_shapes.Remembered(), as_called(layer):
        return run(*args, **kwargs)


def _like(tree: Any) -> Any:
    """The same with other tensors."""
    if type(tree) is torch.Tensor:
        return meta_like(tree)
    return pytree.tree_map_only(torch.Tensor, meta_like, tree)


def _copied(tree: Any) -> Any:
    """Copies of inputs, to which code may write."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t if t.is_meta else _copy(t), tree)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with its values."""
    new = tensor.detach().cpu().clone()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor for one of floating point; a copy of any other, of which code may ask the values."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta_like(tensor), tensor.requires_grad)
    if tensor.is_meta or tensor.is_floating_point() or tensor.is_complex():
        return meta_like(tensor)
    return _copy(tensor)


def _place(tensor: torch.Tensor) -> Any:
    """Where a tensor of the model stands in memory; on the meta device, which tensor it is."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Formulas(TorchDispatchMode):
    """Numbers every tensor by its formula, while code runs.

    Two tensors have the same number where the same operators make them of the same tensors and numbers.
    """

    def __init__(self, table: dict[Any, int], known: Mapping[int, Any]) -> None:
        """
        Args:
            table: the number of each formula that was met, shared by the runs that are compared.
            known: by id, what stands for tensors that nothing is called for.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._table, self._known = table, known
        self._numbers: dict[int, int] = {}
        self._written: dict[int, int] = {}  # by storage, what was last written there
        self._since: dict[int, int | None] = {}  # the same when a tensor got its number
        self._alive: list[Any] = []  # ids stay theirs
        self._draws = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever compiled; the guard against it would cost at every call

    def of(
        self, code: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Any:
        """The formulas of what ``code`` returns, and of what it writes to ``tensors``."""
        for place, leaf in enumerate(_tensors((args, kwargs))):
            self.name(leaf, ("input", place))
        before = {name: self._read(tensor) for name, tensor in tensors.items()}
        with torch.no_grad(), self:
            output = code(*args, **kwargs)
        returned = [self._read(leaf) for leaf in flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        after = {name: self._read(tensor) for name, tensor in tensors.items()}
        return returned, {name: number for name, number in after.items() if number != before[name]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, written, in_place, random, on_device = _facts(func)
        if on_device:
            kwargs = {
                **kwargs,
                "device": torch.device("meta" if random or name.startswith(_UNFILLED) else "cpu"),
            }
        call: tuple[Any, ...] = (name, self.formula(args), self.formula(kwargs))
        tensors = _tensors((args, kwargs))
        if random:  # without values, so that the numbers that other threads draw stay theirs
            self._draws += 1
            call = (*call, self._draws)
            if written and not args[0].is_meta:
                raise NotImplementedError(f"{name} fills a tensor that has values")
        if random or (any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors)):
            args, kwargs = _without((args, kwargs))
        if in_place and args[0].is_meta:
            result = args[0]  # which has no values to change
        else:
            result = known_shapes.result(func, args, kwargs, _run)
        if name in _IDENTITIES or name == "clone":
            self.name(result, self._number_of(args[0]) if name in _IDENTITIES else self._read(args[0]))
            return result
        changed: list[torch.Tensor] = []
        if written:
            arguments = func._schema.arguments
            given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
            changed = [tensor for key in written for tensor in _tensors({**given, **kwargs}.get(key))]
            copied = name == "copy" and (args[0].shape, args[0].dtype) == (args[1].shape, args[1].dtype)
            for place, tensor in enumerate(changed):
                number = self._number(self._read(args[1]) if copied else (call, place))
                self._written[_storage(tensor)] = number
                if tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                    self.name(tensor, number)  # as a new one
        for place, leaf in enumerate(_tensors(result)):
            if not any(leaf is tensor for tensor in changed):
                self.name(leaf, (call, place))
        return result

    def name(self, tensor: torch.Tensor, formula: Any) -> None:
        """Give a new tensor its formula, or the number of that."""
        self._alive.append(tensor)
        self._numbers[id(tensor)] = self._number(formula)
        self._since[id(tensor)] = self._written.get(_storage(tensor))

    def formula(self, value: Any) -> Any:
        """What stands for an argument as it is now."""
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if isinstance(value, torch.Tensor):
            return self._read(value)
        if isinstance(value, (tuple, list)):
            return tuple([self.formula(item) for item in value])
        if isinstance(value, Mapping):
            return tuple([(name, self.formula(item)) for name, item in value.items()])
        return None if kind is torch.device else (kind, value)

    def _number(self, formula: Any) -> int:
        """The number of a formula; a number is that of its own."""
        return formula if type(formula) is int else self._table.setdefault(formula, len(self._table))

    def _number_of(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._numbers:
            # Of one that came from nowhere nothing is known: no other is the same.
            self.name(tensor, self._known.get(id(tensor), object()))
        return self._numbers[id(tensor)]

    def _read(self, tensor: torch.Tensor) -> Any:
        if not tensor.numel():
            return tensor.dtype, tensor.shape
        if not tensor.is_meta and tensor.numel() <= _FEW and tensor.layout is torch.strided:
            with _disable_current_modes():
                values = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return tensor.dtype, tensor.shape, values
        number = self._number_of(tensor)
        what = self._written.get(_storage(tensor))
        return number if what == self._since[id(tensor)] else (number, what)


@functools.cache
def _facts(func: Any) -> tuple[str, tuple[str, ...], bool, bool, bool]:
    """What an operator is.

    Its name without the mark of those that write; which arguments it writes to; whether it returns the first
    of them in the shape that it had; whether it draws random numbers; whether it takes a device.
    """
    schema = func._schema
    written = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    plain = schema.name.removeprefix("aten::")
    first = schema.arguments[0].name if schema.arguments else ""
    in_place = written == (first,) and plain.endswith("_") and plain not in RESHAPES
    name = f"{plain.removesuffix('_') if written else plain}.{schema.overload_name}".removesuffix(".")
    random = torch.Tag.nondeterministic_seeded in func.tags
    return name, written, in_place, random, any(a.name == "device" for a in schema.arguments)


def _without(tree: Any) -> Any:
    """The tree without the values of its tensors."""
    if not tree or all(type(item) is torch.Tensor and item.is_meta for item in tree):
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda t: t if t.is_meta else meta_like(t), tree)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


__all__ = ["same_calls"]
