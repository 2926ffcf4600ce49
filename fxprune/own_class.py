"""Results in the model's own class.

The result is a copy of the module tree in which parameters, the numbers that layers keep of their widths, and
numbers in attributes of the user's modules (:mod:`.capture.numbers`) are narrowed, and whose ``forward`` and
other methods are the user's own. What the passes would have written into a graph shows what that takes: the
new value of an attribute is solved from the literals that come from it. The proof is that the copy's own
``forward``, captured again, does in every node what the narrowing predicts. Where it does not, dimensions
that the code links by a count (``C // self.num_heads``) lose the same share; where that does not help, or
there is no such link, the dimension keeps its extent.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .branches_in_class import StandIns, without_zeros
from .calls import as_one, generation
from .capture import recapture
from .capture.numbers import (
    Comparison,
    Number,
    Origin,
    Place,
    Size,
    evaluate,
    mark,
    numbers,
    parts,
    places,
    unmarked,
    write,
)
from .capture.twin import Twin, twin_on_meta, twin_with_parameters_of
from .coupling.units import Label, Value
from .errors import CaptureError, ExampleInputsError, FxpruneError
from .files import few, told
from .graph_module import clone_module
from .inputs import to_meta
from .nodes import describe_source, operator_name
from .origins import keep_config
from .other_ways import numbers_of_other_ways
from .passes import Narrowing, Rewritten
from .passes.check import Violation, check
from .passes.modules import narrowed_attributes
from .passes.movements import NarrowConstants, PickFromTables, SelectMovements
from .program import Program, named_modules, named_tensors
from .trees import flatten


def copy_of(
    model: nn.Module, tensors: Mapping[int, torch.Tensor], modules: Mapping[int, nn.Module] | None = None
) -> nn.Module:
    """A deep copy of ``model`` with other tensors, and other modules where ``modules`` has any, by ``id``.

    No tensor is copied but those in plain attributes.

    Raises:
        CaptureError: if the class cannot be copied.
    """
    memo: dict[int, Any] = {**tensors, **(modules or {})}
    for _, module in named_modules(model):
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    layers = [(memo[id(m)], m) for _, m in named_modules(model) if id(m) in (modules or {})]
    for layer, original in layers:  # whose handles are to remove the hooks of the copy
        memo.update({id(original.__dict__[name]): layer.__dict__[name] for name in _TABLES})
    try:
        new = copy.deepcopy(model, memo)
        for layer, original in layers:
            _hook(layer, original, memo)
        return new
    except Exception as error:  # whatever a user's class raises
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({told(error)}), as a result in its "
            f'own class needs. Next: make copy.deepcopy(model) work, or use into="graph".'
        ) from error


def _hook(layer: nn.Module, original: nn.Module, memo: dict[int, Any]) -> None:
    """Give a narrowed layer the hooks of its original, which tracing has followed and left out of it."""
    for name in _HOOKS:
        hooks, left = original.__dict__[name], layer.__dict__[name]
        own = [(k, left[k] if k in left else copy.deepcopy(hook, memo)) for k, hook in hooks.items()]
        left.clear()
        left.update(own)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = tuple(n for n, held in nn.Module().__dict__.items() if "_hooks" in n and isinstance(held, dict))


def marked_copy(model: nn.Module) -> tuple[nn.Module, list[Comparison]]:
    """A copy that shares its tensors with ``model``, and whose numbers remember their attributes."""
    new = Twin(model, lambda tensor: tensor).model
    return new, mark(new)


@dataclass(frozen=True)
class InOwnClass(Rewritten):
    """A rewritten program, and what it takes to have the same in the model's own class.

    Attributes:
        model: the original.
        attributes: new numbers in attributes of the copy.
        stand_ins: what takes the place of residual branches that go.
    """

    model: nn.Module
    attributes: Mapping[Place, int]
    stand_ins: StandIns

    def on_meta(self) -> nn.Module:
        """The copy with its tensors on meta."""
        return build(self.model, self.program, self.attributes, self.stand_ins)

    def materialize(self, instead: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        new = build(self.model, self.narrowed(instead), self.attributes, self.stand_ins)
        config = getattr(self.model, "config", None)
        if config is not None and any("." in place.name for place in self.attributes):
            keep_config(new, config)  # what the class was built from
        return new


@dataclass(frozen=True)
class Generation:
    """A call with a cache and the decode step that follows it, which ``generate()`` will make.

    They are run on shapes alone, of the model, and of what is to take its place; on the inputs themselves
    where the code asks for values.

    Attributes:
        args: positional inputs of both calls.
        kwargs: their keyword inputs.
        on_meta: whether they are on meta, and the networks have to be.
        shapes: of the model's outputs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    on_meta: bool
    shapes: list[Any]

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Generation | None, str]:
        """None for a class that does not generate with a cache, or cannot on these inputs; a note on that."""
        calls = generation(model, args, kwargs)
        if calls is None:
            return None, ""
        shapes_alone = any(t.is_meta for t in [*flatten(calls)[0], *model.state_dict().values()])
        why = ""
        for on_meta in (True,) if shapes_alone else (True, False):
            inputs, named = to_meta(calls) if on_meta else calls
            found = Generation(inputs, named, on_meta, [])
            try:
                found.shapes[:] = found._run(model)
                return found, ""
            except Exception as error:  # noqa: BLE001  whatever a user's class raises
                why = told(error).splitlines()[0][:200]
        return None, f"the decode step of generate() could not be run ({why}); verify runs it"

    def fails(self, rewritten: InOwnClass) -> str:
        """How the decode step of the narrowed class fails, or empty."""
        try:
            if self.on_meta:
                shapes = self._run(rewritten.on_meta())
            else:
                with rewritten.materialized() as new:
                    shapes = self._run(new)
        except Exception as error:  # noqa: BLE001  as above
            return f"the decode step of generate() fails without them ({told(error)})"
        return (
            "" if shapes == self.shapes else "the decode step of generate() gives other shapes without them"
        )

    def _run(self, model: nn.Module) -> list[Any]:
        twin = (twin_on_meta(model) if self.on_meta else twin_with_parameters_of(model)).eval()
        args, kwargs = copy.deepcopy((self.args, self.kwargs))  # which a forward may write into
        with torch.no_grad():
            outputs = as_one(twin, kwargs)(*args, **kwargs)
        tensors, structure = flatten(outputs)
        found = zip(structure.leaves, tensors, strict=True)
        return [(str(leaf), tuple(tensor.shape)) for leaf, tensor in found if not leaf.inside]


def build(
    model: nn.Module, program: Program, attributes: Mapping[Place, int], stand_ins: StandIns
) -> nn.Module:
    """A copy of ``model`` with the tensors and layers of ``program`` and these numbers in its attributes.

    ``stand_ins`` take the place of what the program has no tensors for.
    """
    tensors = {id(tensor): program.tensors.get(name, tensor) for name, tensor in named_tensors(model)}
    own = dict(named_modules(model))
    modules: dict[int, nn.Module] = {}
    for path, layer in program.modules.items():
        if path in own:
            modules[id(own[path])] = _layer(path, layer, program)
    new = copy_of(model, tensors, modules)
    for path, module in named_modules(new):
        _plain(module)
        if id(own[path]) not in modules:
            shapes = {
                key: tuple(tensor.shape)
                for key, tensor in [*module._parameters.items(), *module._buffers.items()]
                if tensor is not None
            }
            before = {
                key: tuple(tensor.shape)
                for key, tensor in [*own[path]._parameters.items(), *own[path]._buffers.items()]
                if tensor is not None
            }
            if shapes != before and not isinstance(module, nn.MultiheadAttention):
                module.__dict__.update(narrowed_attributes(module, shapes))
    for place, value in attributes.items():
        write(new, place, value)
    stand_ins.put_into(new)
    for module in new.modules():
        for key, hook in [*module._forward_pre_hooks.items()]:
            if getattr(hook, "until_narrowed", False):
                del module._forward_pre_hooks[key]
    return new


def _layer(path: str, layer: nn.Module, program: Program) -> nn.Module:
    def owned(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return program.tensors.get(f"{path}.{name}")

    new = clone_module(layer, owned)
    for module in new.modules():
        _plain(module)
    return new


def _plain(module: nn.Module) -> None:
    for name, value in module.__dict__.items():
        if isinstance(value, Number) or (type(value) in (tuple, list) and any(map(_is_number, value))):
            module.__dict__[name] = unmarked(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number)


def read(model: nn.Module, place: Place) -> int:
    """The number that ``model`` keeps at ``place``."""
    *holders, name = place.name.split(".")
    owner: Any = model.get_submodule(place.path)
    for holder in holders:
        owner = owner.__dict__[holder]
    found = owner.__dict__[name]
    return int(found if place.item is None else found[place.item])


def left_behind(model: nn.Module, run: Iterable[str], attributes: Mapping[Place, int]) -> list[str]:
    """Notes on what stays as it is because no call has shown what it would have to be.

    Args:
        model: the original.
        run: names of the parameters that the calls have used.
        attributes: new numbers in attributes of the copy.
    """
    tensors = dict(named_tensors(model))
    used = {id(tensors[name]) for name in run if name in tensors}
    idle: list[str] = []
    for path, module in named_modules(model):
        if idle and f"{path}.".startswith(f"{idle[-1]}."):
            continue
        own = [id(parameter) for parameter in module.parameters()]
        if path and own and used.isdisjoint(own):
            idle.append(path)
    notes = []
    if idle:
        notes.append(
            f"the example did not run {few(idle)}: they stay as wide as they are, and a call that does run "
            f"them may fail. Next: give fxprune.Calls such a call, too"
        )
    for place, value in attributes.items():
        old = read(model, place)
        same = [
            name
            for name, number in model.get_submodule(place.path).__dict__.items()
            if type(number) is int and number == old != 1 and Place(place.path, name) not in attributes
        ]
        if same and place.item is None and "." not in place.name:
            notes.append(f"{place} becomes {value}; still {old}: {few(same)}, which no call has read")
    return notes


# -- which attributes change -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Equation:
    """What the number at an origin has to be.

    Attributes:
        origin: where the number comes from; a number where it stands in the code itself.
        value: what it has to be.
        node: the node whose literal it is; empty for a question.
        dim: the dimension of the node's output that it is the extent of, if that is known.
    """

    origin: Origin
    value: int | float
    node: str = ""
    dim: int | None = None


def solve(
    model: nn.Module,
    before: Program,
    after: Program,
    narrowing: Narrowing,
    literal: bool,
    asked: Iterable[Comparison] = (),
) -> tuple[dict[Place, int], list[Violation]]:
    """Numbers for attributes of ``model`` from which its own code would make the literals of ``after``.

    Every literal with an origin, narrowed or not, is an equation, as are the answers to questions that have
    to stay what they were. Where two contradict each other, the attribute stays what it is; then some
    literals are not what they would have to be, which are the violations.

    Args:
        model: the original.
        before: what was captured of its marked copy.
        after: what the passes made of it.
        narrowing: what goes.
        literal: whether plain numbers in ``before`` stand in the code, or may also have been read off shapes.
        asked: questions and the numbers that answer them as before.
    """
    equations = [*_equations(before, after, narrowing), *(_Equation(c.origin, c.other) for c in asked)]
    old = {place: read(model, place) for e in equations for place in places(e.origin)}
    sizes = _sizes(equations, narrowing)
    wanted: dict[Place, set[int]] = defaultdict(set)
    for equation in equations:
        if isinstance(equation.origin, Place):
            wanted[equation.origin].add(int(equation.value))
    known: dict[Place, int] = {
        place: next(iter(values)) if len(values) == 1 else old[place] for place, values in wanted.items()
    }
    for equation in sorted(equations, key=lambda e: len(set(places(e.origin)))):
        missing = set(places(equation.origin)) - known.keys()
        values: dict[Place | Size, int] = dict([*sizes.items(), *old.items(), *known.items()])
        if not missing or _holds(equation, values):
            continue
        found = {
            place: value
            for place in missing
            for value in range(old[place] - 1, 0, -1)
            if _holds(equation, {**values, place: value})
        }
        if len(found) == 1:  # of all its numbers only this one can make it hold; its least such value
            known.update(found)
    values = dict([*sizes.items(), *old.items(), *known.items()])
    unmet = [
        violation
        for e in equations
        if e.node and (literal or isinstance(e.origin, Place)) and not _holds(e, values)
        for violation in _unmet(e, equations, narrowing)
    ]
    return {place: value for place, value in known.items() if value != old[place]}, unmet


def _sizes(equations: Iterable[_Equation], narrowing: Narrowing) -> dict[Place | Size, int]:
    """What the sizes that equations depend on become."""
    found = {part for e in equations for part in parts(e.origin) if isinstance(part, Size)}
    return {size: narrowing.size(narrowing.tree(size.node), size.dim) for size in found}


def _unmet(equation: _Equation, equations: list[_Equation], narrowing: Narrowing) -> list[Violation]:
    """What to say of an equation that does not hold.

    A number that has to stay what it was (a scale) keeps the dimensions that are as wide as what it is
    computed from. Else all that the number is computed from and for has to lose the same share.
    """
    reason = f"the code says {_text(equation.origin)}"
    within = list(parts(equation.origin))
    if equation.dim is None:
        wide = [
            Violation(other.node, f"{reason}, which has to stay what it is", (other.dim,))
            for other in equations
            if other.dim is not None
            and not isinstance(other.origin, (Place, Size, int))
            and other.origin in within
            and narrowing.narrows(_label(narrowing, other.node, other.dim))
        ]
        if wide:
            return wide
    dims = () if equation.dim is None else (equation.dim,)
    same = [e for e in equations if e.origin == equation.origin and e.dim is not None]
    if any(e.value != equation.value and e.node == equation.node for e in same):
        return [
            Violation(equation.node, f"{reason} of all parts", dims, (f"{equation.node}[{equation.dim}]",))
        ]
    most = max((e.value for e in same), default=0)
    if isinstance(equation.origin, tuple) and any(e.value < most for e in same):
        also = f"{reason}, which is {most} elsewhere"
        return [Violation(e.node, also, (e.dim,)) for e in same if e.value < most and e.dim is not None]
    ties = {f"{part.node}[{part.dim}]" for part in within if isinstance(part, Size)}
    if ties:
        numbers_in = set(places(equation.origin))
        ends = [e for e in equations if e is equation or e.origin in numbers_in]
        ties.update(f"{e.node}[{e.dim}]" for e in ends if e.dim is not None)
    return [Violation(equation.node, reason, dims, tuple(sorted(ties)))]


def _label(narrowing: Narrowing, name: str, dim: int) -> Label | None:
    value = narrowing.tree(name)
    return value.label(dim) if isinstance(value, Value) else None


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/", "pow": "**"}


def _text(origin: Origin) -> str:
    """An origin for people, the same for all modules of a kind."""
    if isinstance(origin, Place):
        return f"self.{origin.name}" + ("" if origin.item is None else f"[{origin.item}]")
    if isinstance(origin, Size):
        return f"shape[{origin.dim}]"
    if isinstance(origin, tuple):
        left, right = (f"({_text(o)})" if isinstance(o, tuple) else _text(o) for o in origin[1:])
        return f"{left} {_SIGNS[origin[0]]} {right}"
    return str(origin)


def _holds(equation: _Equation, values: Mapping[Place | Size, int]) -> bool:
    try:
        return math.isclose(evaluate(equation.origin, values), equation.value, rel_tol=1e-12)
    except (ArithmeticError, TypeError):  # a root of a negative number is none
        return False


def _equations(before: Program, after: Program, narrowing: Narrowing) -> Iterator[_Equation]:
    rewritten = {node.name: node for node in after.graph.nodes}
    for node in before.graph.nodes:
        new = rewritten.get(node.name)
        if new is None or not _makes_tensors(node, narrowing):
            continue  # what a number is computed from follows by itself
        leaves, written = numbers(node.args, node.kwargs), numbers(new.args, new.kwargs)
        origins: Mapping[int, Origin] = node.meta.get("origins", {})
        same = len(leaves) == len(written)
        if not same:
            if operator_name(node) == "split" and isinstance(new.args[1], (list, tuple)) and 1 in origins:
                dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
                last = narrowing.tree(node.name)[-1].shape
                rest, dim = last[dim] < leaves[1], dim % len(last)
                for size in dict.fromkeys(new.args[1][:-1] if rest else new.args[1]):
                    yield _Equation(origins[1], int(size), node.name, dim)  # of parts that are all as wide
                continue
            put_together = _entries(node, len(written) - 1)
            if put_together is None:
                continue
            origins = {place + 1: origin for place, origin in put_together.items()}
        value = narrowing.value(node)
        sizes = value is not None and len(value.shape) == len(written) - 1  # a view's
        for at, number in enumerate(written):
            if same and isinstance(leaves[at], fx.Node):
                origin = computed_from(leaves[at], narrowing)
                given = narrowing.tree(leaves[at].name) if isinstance(number, fx.Node) else number
                follows = isinstance(number, fx.Node) and not any(places(origin or 0))
                if isinstance(given, (int, float)) and origin is not None and not follows:
                    yield _Equation(origin, given, node.name, at - 1 if sizes else None)
            elif type(number) is int and (at in origins or (same and type(leaves[at]) is int)):
                origin = origins[at] if at in origins else leaves[at]
                if origin != number:
                    yield _Equation(origin, number, node.name, at - 1 if sizes else None)


def computed_from(number: Any, narrowing: Narrowing) -> Origin | None:
    """Where a number comes from that a graph computes; None where that is not known."""
    if not isinstance(number, fx.Node):
        return number if isinstance(number, (int, float)) else None
    name, args = operator_name(number), number.args
    shape: Any = args[0] if name == "getitem" else number
    dim: Any = args[1] if len(args) > 1 else None
    if isinstance(dim, int) and isinstance(shape, fx.Node) and shape.args:
        all_sizes = (operator_name(shape), *shape.args[1:]) in (("size",), ("getattr", "shape"))
        value = narrowing.value(shape.args[0])
        if value is not None and (all_sizes or name == "size"):
            tensor: Any = shape.args[0]
            return Size(tensor.name, dim % len(value.shape))
    if name not in _SIGNS or len(args) != 2 or number.kwargs:
        return None
    known: Mapping[int, Origin] = number.meta.get("origins", {})
    left, right = (known.get(at) or computed_from(arg, narrowing) for at, arg in enumerate(args))
    return None if left is None or right is None else (name, left, right)


def _entries(view: fx.Node, count: int) -> dict[int, Origin] | None:
    """Origins of the entries of a shape that the code puts together: ``x.size()[:-1] + (self.width,)``."""
    sizes = view.args[1] if len(view.args) > 1 else None
    if not isinstance(sizes, fx.Node) or operator_name(sizes) != "add":
        return None
    left, right = sizes.args
    if isinstance(left, fx.Node) == isinstance(right, fx.Node):
        return None
    origins: Mapping[int, Origin] = sizes.meta.get("origins", {})
    if isinstance(left, fx.Node):
        length = len(numbers(right, {}))
        return {count - length + at - 1: origin for at, origin in origins.items()}
    return dict(origins)


def _makes_tensors(node: fx.Node, narrowing: Narrowing) -> bool:
    return any(isinstance(leaf, Value) for leaf in pytree.tree_leaves(narrowing.tree(node.name)))


# -- the proof ---------------------------------------------------------------------------------------


def rewrite_in_class(
    model: nn.Module,
    questions: list[Comparison],
    rewritten: Rewritten,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str],
    stand_ins: StandIns,
) -> InOwnClass:
    """What ``rewritten`` does to a graph, done to a copy of ``model``; violations say where that falls short.

    Args:
        model: the original.
        questions: what the marked copy's code asked while it was captured.
        rewritten: the rewritten graph of its marked copy, without violations of its own.
        args: positional inputs.
        kwargs: keyword inputs.
        dissolve: functions that were traced into.
        stand_ins: what takes the place of residual branches that go.
    """
    narrowing = rewritten.narrowing
    captured = narrowing.graph.captured
    before = captured.program
    hopeless = _beyond(before, narrowing)
    if hopeless:
        return InOwnClass(rewritten.program, narrowing, tuple(hopeless), model, {}, stand_ins)
    with _empty(rewritten.program, before) as empty:
        return _proved(model, questions, rewritten, empty, args, kwargs, dissolve, stand_ins)


def _proved(
    model: nn.Module,
    questions: list[Comparison],
    rewritten: Rewritten,
    empty: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dissolve: frozenset[str],
    stand_ins: StandIns,
) -> InOwnClass:
    """As :func:`rewrite_in_class`, with the program's tensors in ``empty``."""
    narrowing = rewritten.narrowing
    captured = narrowing.graph.captured
    before = captured.program
    known: list[Comparison] = []
    ways: dict[Place, int] | None = None
    while True:
        literal = captured.rung.startswith("symbolic")
        attributes, unmet = solve(model, before, rewritten.program, narrowing, literal, known)
        if unmet:
            return InOwnClass(rewritten.program, narrowing, tuple(unmet), model, attributes, stand_ins)
        attributes = {**(ways or {}), **attributes}
        candidate = build(model, empty, attributes, stand_ins)
        asked = mark(candidate)
        try:
            after = recapture(captured, candidate, args, kwargs, dissolve)
        except (CaptureError, ExampleInputsError) as error:
            answers = _other_answers(questions, asked, known)
            if answers:
                known += answers
                continue
            if ways:
                ways = {}
                continue
            found = _blamed(before, narrowing, error)
            return InOwnClass(rewritten.program, narrowing, tuple(found), model, attributes, stand_ins)
        if stand_ins.modules:
            after = without_zeros(after, before, narrowing.graph.inputs)
        after = replace(after, free_outputs=before.free_outputs)
        found = _differences(before, rewritten.program, after, narrowing)
        answers = _other_answers(questions, asked, known) if found else []
        if answers:
            known += answers
            continue
        if not found and ways is None:
            ways = numbers_of_other_ways(model, build(model, empty, attributes, stand_ins), args, kwargs)
            if ways:
                continue
        elif found and ways:  # without them it was right
            ways = {}
            continue
        notes = tuple(
            f"{place} becomes {number}: no call has read it, but a method beside forward needs it so to "
            f"return what forward returns, or to make layers that fit; only shapes were compared"
            for place, number in (ways or {}).items()
            if attributes[place] == number
        )
        return InOwnClass(
            rewritten.program, narrowing, tuple(found), model, attributes, stand_ins, notes=notes
        )


@contextlib.contextmanager
def _empty(program: Program, before: Program) -> Iterator[Program]:
    """``program`` with tensors of its shapes, on the devices of the originals, whose values do not matter.

    At the end their memory goes, whatever still refers to them.
    """
    made: dict[int, torch.Tensor] = {}
    tensors, own = {}, []
    for name, tensor in program.tensors.items():
        if id(tensor) not in made:
            old = before.tensors[name]
            new = tensor.detach()
            if tensor.is_meta and not old.is_meta:
                new = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
                own.append(new.untyped_storage())
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            made[id(tensor)] = new
        tensors[name] = made[id(tensor)]
    try:
        yield replace(program, tensors=tensors)
    finally:
        for storage in own:
            storage.resize_(0)


def _other_answers(
    questions: list[Comparison], asked: list[Comparison], known: list[Comparison]
) -> list[Comparison]:
    """Questions that the original answered by yes and the copy by no: what the numbers would have to be."""
    were = {(q.origin, q.own) for q in questions if q.own == q.other}
    found = []
    for question in asked:
        origin = question.origin
        if question.own != question.other and any(o == origin for o, _ in were):
            answer = Comparison(origin, question.other, question.other)
            if answer not in known and answer not in found:
                found.append(answer)
    return found


def _beyond(program: Program, narrowing: Narrowing) -> list[Violation]:
    """What only a graph can do: picks by number, and an explicit scale of attention."""
    found = []
    for name in SelectMovements().requires(program, narrowing):
        node = next(node for node in program.graph.nodes if node.name == name)
        taken = narrowing.take(node)
        if taken is not None:
            origin, take = taken
            found.append(Violation(origin, "channels are moved by number", (take.dim,)))
    for name in NarrowConstants().requires(program, narrowing):
        value = narrowing.value(next(node for node in program.graph.nodes if node.name == name))
        assert value is not None
        dims = tuple(d for d in range(len(value.shape)) if narrowing.narrows(value.label(d)))
        found.append(Violation(name, "a constant that is counted up meets narrower values", dims))
    for user, _, picks in PickFromTables().requires(program, narrowing):
        value = narrowing.value(next(node for node in program.graph.nodes if node.name == user))
        assert value is not None
        dims = tuple(dict.fromkeys(pick.dim + len(value.shape) for pick in picks))
        found.append(Violation(user, "a table (of rotary angles, say) stays as wide as it is", dims))
    for node in program.graph.nodes:
        if operator_name(node) == "scaled_dot_product_attention" and node.kwargs.get("scale") is None:
            query: Any = node.args[0] if node.args else node.kwargs["query"]
            value = narrowing.value(query)
            if value is not None and narrowing.shape(value)[-1] != value.shape[-1]:
                reason = "attention's own scale would follow the width of its heads"
                found.append(Violation(query.name, reason, (len(value.shape) - 1,)))
    for name, tensor in program.extras.items():
        labels = narrowing.graph.labels(tensor)
        dims = tuple(d for d, label in enumerate(labels) if narrowing.narrows(label))
        if dims:
            found.append(Violation(name, "a tensor that is written down in the code", dims))
    return found


def _differences(
    before: Program, rewritten: Program, after: Program, narrowing: Narrowing
) -> list[Violation]:
    """Where the copy's own code does not do what the narrowing predicts."""
    for old, new in zip(before.graph.nodes, after.graph.nodes, strict=False):
        if (old.name, old.op) != (new.name, new.op) or _target(old) != _target(new):
            return [Violation(old.name, f"the code goes another way ({new.name} in its place)")]
    if len(before.graph.nodes) != len(after.graph.nodes):
        return [Violation("output", "the code goes another way")]
    found = _numbers_that_differ(before, rewritten, after, narrowing)
    return found or check(after, narrowing)


def _target(node: fx.Node) -> Any:
    return node.target if isinstance(node.target, str) else operator_name(node)


def _numbers_that_differ(
    before: Program, rewritten: Program, after: Program, narrowing: Narrowing
) -> list[Violation]:
    """Literals of the copy's code that are others than those that the passes wrote."""
    nodes = {node.name: node for node in rewritten.graph.nodes}
    found = []
    for old, new in zip(before.graph.nodes, after.graph.nodes, strict=True):
        wanted = nodes.get(old.name)
        if wanted is None or wanted.op != new.op or not _makes_tensors(old, narrowing):
            continue
        leaves, others = numbers(new.args, new.kwargs), numbers(wanted.args, wanted.kwargs)
        if len(leaves) != len(others):
            continue  # shapes and units will tell
        pairs = [(a, b) for a, b in zip(leaves, others, strict=True) if _plain_number(a) and _plain_number(b)]
        if any(a != b for a, b in pairs):
            value = narrowing.value(old)
            dims: tuple[int, ...] = ()
            if value is not None and len(value.shape) <= len(leaves):
                own = leaves[-len(value.shape) :], others[-len(value.shape) :]
                dims = tuple(
                    d
                    for d, (a, b) in enumerate(zip(*own, strict=True))
                    if _plain_number(a) and _plain_number(b) and a != b and narrowing.narrows(value.label(d))
                )
            a, b = next((a, b) for a, b in pairs if a != b)
            found.append(Violation(old.name, f"the code says {a} where {b} is needed", dims))
    return found


def _plain_number(leaf: Any) -> bool:
    return type(leaf) in (int, float)


def _blamed(program: Program, narrowing: Narrowing, error: FxpruneError) -> list[Violation]:
    """The narrowed nodes of the line at which the copy's code failed."""
    text = str(error)
    reason = text.strip().splitlines()[0][:300]
    found = []
    for node in program.graph.nodes:
        source = node.meta.get("source")
        if source and f"{source[0]}:{source[1]} " in text and _touched(node, narrowing):
            found.append(Violation(node.name, reason))
    if not found:
        found = [Violation(node.name, reason) for node in program.graph.nodes if _touched(node, narrowing)][
            :1
        ]
    return found


def _touched(node: fx.Node, narrowing: Narrowing) -> bool:
    return any(narrowing.changed(near) for near in (node, *node.all_input_nodes))


def holds(program: Program, narrowing: Narrowing, violations: Iterable[Violation]) -> dict[str, Violation]:
    """What to hold so that the ``violations`` go away, by the names that :meth:`CouplingGraph.hold` takes.

    A line of code says the same in every layer, so all nodes of the same line and kind are held; so are
    dimensions that were to lose the same share in vain.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, Violation] = {}
    for violation in violations:
        if violation.ties:
            found.update(dict.fromkeys(violation.ties, violation))
            continue
        node = nodes.get(violation.node)
        alike = [node] if node is None or not violation.dims else _alike(program, node)
        for other in alike:
            name = other.name if other is not None else violation.node
            value = narrowing.value(other) if other is not None else None
            if value is not None and len(value.shape) <= max(violation.dims, default=0):
                continue
            if violation.dims and other is not None and not _makes_tensors(other, narrowing):
                continue  # a size that the same line reads
            for dim in violation.dims:
                found[f"{name}[{dim}]"] = violation
            if not violation.dims:
                found[name] = violation
    return found


def _alike(program: Program, node: fx.Node) -> list[fx.Node]:
    """All nodes that the same line of code makes by the same operator."""
    source = node.meta.get("source")
    if not source:
        return [node]
    return [
        other
        for other in program.graph.nodes
        if other.meta.get("source") == source and other.op == node.op and _target(other) == _target(node)
    ] or [node]


def line_notes(program: Program, held: Mapping[str, Violation], tied: bool = False) -> list[str]:
    """One note for each line of code that holds dimensions, or lets them lose the same share, for people."""
    says = "lets {} lose the same share" if tied else "keeps {} as wide as it is"
    nodes = {node.name: node for node in program.graph.nodes}
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, violation in held.items():
        node = nodes.get(violation.node)
        lines[describe_source(node) or violation.node, violation.reason].append(name)
    notes = []
    for (line, reason), names in lines.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        also = "needs no such thing" if tied else "narrows it"
        notes.append(f'{line} {says.format(shown)}: {reason}; into="graph" {also}')
    return notes


__all__ = [
    "Generation",
    "InOwnClass",
    "build",
    "copy_of",
    "holds",
    "left_behind",
    "line_notes",
    "marked_copy",
    "read",
    "rewrite_in_class",
    "solve",
]
