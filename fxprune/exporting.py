"""Networks as files for other programs: exported programs (``.pt2``), ONNX, packages of AOTInductor.

Sizes of the inputs (batch, length, height, width) stay free where the network allows that; what is written is
run and compared first, at another size, too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import files
from .errors import OutputError
from .files import few, first_line
from .graph_module import Interpreter
from .inputs import normalize
from .program import named_modules
from .region_program import RegionModule
from .sizes import BATCH, LAST, NEAR, Change, Place, changes, decided, finer, places, resized, step

__all__ = ["Exported", "Written", "capture_program", "check_whole", "export"]

_NEAR = 1e-4
"""How near the outputs of another runtime have to be, as a share of the largest entry."""


@dataclass(frozen=True)
class Exported:
    """An exported program.

    Attributes:
        program: what ``torch.export.save`` writes.
        sizes: what it says about the sizes of the inputs, for people.
        change: at which other sizes it was run; empty where all are as in the example.
    """

    program: ExportedProgram
    sizes: str
    change: Change = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A file that :func:`export` wrote.

    Attributes:
        path: the file.
        bytes: its size.
        sizes: which sizes of the inputs it takes, for people.
        checked: how it was compared with the network, for people.
    """

    path: Path
    bytes: int
    sizes: str
    checked: str


def export(model: nn.Module, example_inputs: Any, path: str | Path) -> Written:
    """Write a network, pruned or not, for other programs.

    What it returns beside tensors (key/value caches) is left out, and an output class becomes a dict.

    Args:
        model: the network. It is exported in evaluation mode, and is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        path: ``.pt2`` for an exported program of ``torch.export``, ``.onnx`` for ONNX, ``.aoti.pt2`` for a
        package
            of AOTInductor, which holds compiled code for this kind of machine. The file appears there
            only when it is whole. None of them can be trained: :func:`fxprune.save` keeps that form.

    Raises:
        OutputError: if the network cannot be exported, if a program that is needed is missing, or if what was
            written does not compute what the network does.
    """
    path = Path(path)
    kind = files.check_output(path, tuple(_WRITERS))
    writer = _WRITERS[kind.suffix]
    args, kwargs = normalize(example_inputs)
    check_whole(path, tuple(name for name, m in named_modules(model) if isinstance(m, RegionModule)))
    modes = {module: module.training for module in model.modules()}
    try:
        with quiet(), torch.no_grad():
            exported = capture_program(model.eval(), args, kwargs)
            found: list[str] = []
            size = files.write(path, lambda draft: found.append(writer(exported, draft, model, args, kwargs)))
            lines = _open_decisions(model, (args, kwargs), exported.change) if kind.suffix != ".pt2" else []
    finally:
        for module, training in modes.items():
            module.training = training
    return Written(path, size, exported.sizes + _unchecked(kind, lines), found[0])


def _unchecked(kind: files.Format, lines: list[str]) -> str:
    """That a file takes sizes at which it is wrong: those for which the model's code decides otherwise."""
    if not lines:
        return ""
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    where = f"({lines[0]}{more})"
    return f"; not those for which the code decides otherwise, which {kind.holds} does not refuse {where}"


def _open_decisions(model: nn.Module, given: Any, change: Change) -> list[str]:
    """The lines of the model that decide by sizes which ``change`` changes.

    A program of torch.export refuses sizes for which they decide otherwise; no other file does.
    """
    if not isinstance(model, fx.GraphModule) or not change or not decided(model.graph):
        return []
    here, there = (_numbers(model, *inputs) for inputs in (given, resized(given, change)))
    moves: set[fx.Node] = set()
    for node, found in here.items():
        if found != there.get(node) or not moves.isdisjoint(node.all_input_nodes):
            moves.add(node)
    return decided(model.graph, moves)


def _numbers(model: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """What each node gives that is no tensor, as sizes are."""
    found: dict[fx.Node, Any] = {}

    class Watch(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                found[n] = value
            return value

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    Watch(model).run(*bound.args, *bound.kwargs.values())
    return found


def check_whole(path: Path, regions: Any) -> None:
    """Make sure that what was captured can be written at ``path``.

    Raises:
        OutputError: a file of a kind that needs the whole network was asked for, but only ``regions`` of it
        are
            graphs.
    """
    wanted = files.format_of(path)
    if regions and wanted is not None and wanted.whole:
        raise OutputError(
            f"cannot write {path}: the model could be captured in parts only ({few(regions)}), and the "
            f"code around them cannot be exported; try {path.with_suffix('.safetensors')}, which holds the "
            f"narrow weights and the plan"
        )


def capture_program(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Exported:
    """Export ``model``, with sizes of the inputs left free where it allows that.

    What is taken for a batch, a length, a height or a width: see :func:`fxprune.sizes.places`. A program with
    free sizes is kept only if it gives the model's own output, at the example's sizes and at others;
    otherwise fewer sizes are left free, and in the end none.

    Raises:
        OutputError: ``torch.export`` refuses the model with fixed sizes, too.
    """
    plain = _returning_tensors(model, args, kwargs)
    given = (args, dict(kwargs))
    reason, refused = "no input has a size that may change", set()
    decides = isinstance(model, fx.GraphModule) and bool(decided(model.graph))
    for tried in filter(None, changes(given)):
        kinds = frozenset(tried)
        by_steps = any(abs(how) != NEAR for kind, how in tried.items() if kind != BATCH)
        # torch.export does not come to an end where code decides by remainders (the windows of a Swin).
        if kinds in refused or (by_steps and (decides or min(tried.values()) < -NEAR)):
            continue
        try:
            other, wanted = _elsewhere(plain, given, tried)
        except Exception as error:  # noqa: BLE001 - the model's own
            reason = first_line(error)
            continue
        change = _finest(plain, given, tried) if by_steps else tried
        if change != tried:
            other, wanted = _elsewhere(plain, given, change)
        try:
            program = _export_free(plain, given, other, wanted, change)
        except Exception as error:  # noqa: BLE001 - torch.export has no error class of its own
            reason = first_line(error)
            refused.add(kinds)
            continue
        return Exported(program, _said(given, change), change)
    try:
        program = torch.export.export(plain, args, dict(kwargs))
    except Exception as error:
        raise OutputError(
            f"torch.export refuses the pruned model: {first_line(error)}. The model itself is sound: in "
            "Python, "
            "fxprune.prune returns it, and fxprune.save writes it"
        ) from error
    return Exported(program, f"the example's sizes only; others were refused ({reason})")


def _elsewhere(plain: nn.Module, given: Any, change: Change) -> tuple[Any, Any]:
    """The inputs at other sizes, and what the model gives for them."""
    other = resized(given, change)
    with torch.no_grad():
        return other, plain(*other[0], **other[1])


def _finest(plain: nn.Module, given: Any, change: Change) -> Change:
    """``change``, or one by the smallest equal part of it by which, and by twice and three times which, sizes
    may be larger.
    """
    for parts in finer(given, change):
        try:
            for times in (3, 2, 1):
                _elsewhere(plain, given, {**change, **{kind: how * times for kind, how in parts.items()}})
        except Exception:  # noqa: BLE001 - the model's own
            continue
        return {**change, **parts}
    return change


def _multiple(place: Place, change: Change) -> int:
    """What a size must be a multiple of, 1 for any; 0 where it is the example's; below 0 where it is at most
    that.
    """
    how = change.get(place.kind, 0)
    if how <= 0:
        return how
    return 1 if place.kind == BATCH else step(place, how)


def _said(given: Any, change: Change) -> str:
    """Which sizes are free, for people; a last dimension that is not holds features, as far as is known."""
    found = places(given)
    multiples = {place.name: _multiple(place, change) for place in found if place.kind in change}
    free = [name for name, multiple in multiples.items() if multiple == 1]
    most = dict.fromkeys(
        f"{place.name} up to {place.size}" for place in found if change.get(place.kind, 0) < 0
    )
    fixed = dict.fromkeys(place.name for place in found if place.kind not in (*change, LAST))
    said = ([f"any {', '.join(free)}"] if free else []) + list(most)
    for multiple in sorted({multiple for multiple in multiples.values() if multiple > 1}):
        names = [name for name in multiples if multiples[name] == multiple]
        said.append(f"{', '.join(names)} in multiples of {multiple}")
    return "; ".join(said) + (f"; {', '.join(fixed)} as in the example" if fixed else "")


class _TensorsOnly(nn.Module):
    """A network around another; its outputs are trees of tensors and numbers, as other programs want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

        @functools.wraps(model.forward)  # with its signature, from which the inputs have their names
        def forward(*args: Any, **kwargs: Any) -> Any:
            return tensors_only(model(*args, **kwargs))

        self.forward = forward


def _returning_tensors(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """``model``, or one around it where it returns what is neither tensor nor number (a key/value cache).

    Raises:
        OutputError: nothing else is returned.
    """
    with torch.no_grad():
        found = model(*args, **kwargs)
    if all(leaf is None or isinstance(leaf, (Tensor, bool, int, float)) for leaf in tree_leaves(found)):
        return model
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(tensors_only(found))):
        raise OutputError(
            f"the network returns a {type(found).__name__}, in which no tensors are seen, so that a file "
            "would give nothing. Next: have it return tensors, in tuples, lists, dicts or dataclasses"
        )
    return _TensorsOnly(model)


_NOTHING = object()


def tensors_only(tree: Any) -> Any:
    """``tree`` without what is neither a tensor nor a number; other mappings and dataclasses become dicts."""
    found = _plain(tree)
    return () if found is _NOTHING else found


def _plain(tree: Any) -> Any:
    if isinstance(tree, (Tensor, bool, int, float)):
        return tree
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = {entry.name: getattr(tree, entry.name) for entry in fields(tree)}
    if isinstance(tree, Mapping):
        items = {key: _plain(value) for key, value in tree.items()}
        return {key: value for key, value in items.items() if value is not _NOTHING} or _NOTHING
    if isinstance(tree, (list, tuple)):
        listed = [value for value in map(_plain, tree) if value is not _NOTHING]
        if tree and not listed:
            return _NOTHING
        return listed if isinstance(tree, list) else tuple(listed)
    return _NOTHING


def _export_free(model: nn.Module, given: Any, other: Any, wanted: Any, change: Change) -> ExportedProgram:
    """The program whose sizes of these kinds are free.

    Args:
        model: the network.
        given: positional and keyword inputs of the example.
        other: the same at other sizes, with which it is exported: torch.export builds a size of 1 in.
        wanted: what the model gives for these.
        change: the kinds of sizes that may change.
    """
    leaves, tree = tree_flatten(given)
    free: list[dict[int, Any] | None] = [None] * len(leaves)
    named: dict[str, Any] = {}
    for place in places(given):
        if place.kind in change:
            entry = free[place.leaf] = free[place.leaf] or {}
            multiple = _multiple(place, change)
            name = "batch" if place.kind == BATCH else f"{place.name}_{place.size}"
            if multiple > 1:
                entry[place.dim] = multiple * named.setdefault(name, Dim(name, min=1))
            else:
                entry[place.dim] = named.setdefault(name, Dim(name)) if place.kind == BATCH else Dim.DYNAMIC
    positional, keywords = tree_unflatten(free, tree)
    with _Gather():
        program = torch.export.export(model, *other, dynamic_shapes=(*positional, *keywords.values()))
    written = program.module()
    with torch.no_grad():
        _compare(wanted, written(*other[0], **other[1]))
        _compare(model(*given[0], **given[1]), written(*given[0], **given[1]))
    return program


def take_along_dim(source: Tensor, index: Tensor, dim: int) -> Tensor:
    """As ``torch.take_along_dim``, which has the sizes of the example built in once exported or compiled.

    Heads pick their columns from a table (of rotary positions) with it.

    Args:
        source: of any shape.
        index: positions along ``dim``; all other dimensions broadcast with those of ``source``.
        dim: the dimension.
    """
    dim %= source.dim()
    others = [[size for d, size in enumerate(t.shape) if d != dim] for t in (source, index)]
    shape = list(torch.broadcast_shapes(*others))
    shape.insert(dim, -1)
    return torch.gather(source.expand(shape), dim, index.expand(shape))


class _Gather(TorchFunctionMode):
    """Has :func:`take_along_dim` in place of torch's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.take_along_dim and len(args) == 3:
            func = take_along_dim
        return func(*args, **(kwargs or {}))


def _compare(expected: Any, found: Any) -> None:
    """Raise AssertionError where two trees of tensors are not near each other."""
    ones, others = (
        [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (expected, found)
    )
    if len(ones) != len(others):
        raise AssertionError(f"{len(ones)} outputs were expected, {len(others)} came")
    for one, other in zip(ones, others, strict=True):
        scale = float(one.abs().max()) if one.is_floating_point() and one.numel() else 1.0
        nearest = _NEAR * max(scale, 1e-3)
        torch.testing.assert_close(other, one, rtol=_NEAR, atol=nearest, equal_nan=True, check_stride=False)


def _write_program(
    exported: Exported, draft: Path, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    torch.export.save(exported.program, draft, extra_files={"fxprune": _FOR_INFERENCE})
    torch.export.load(draft)
    return "read back"


_FOR_INFERENCE = (
    "This program is for inference: it holds one mode of the network, and no module tree. The form that "
    "can be "
    "trained is what fxprune.save writes to a .safetensors file."
)


def _write_onnx(
    exported: Exported, draft: Path, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise OutputError(
            "ONNX needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    program = torch.onnx.export(exported.program, (), dynamo=True, verbose=False, external_data=False)
    assert program is not None
    program.save(str(draft))
    try:
        import onnxruntime
    except ImportError:
        return "not checked (pip install onnxruntime lets fxprune run it)"
    session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
    plain = _returning_tensors(model, args, kwargs)
    sizes = [(args, dict(kwargs))]
    if exported.change:
        sizes.append(resized((args, dict(kwargs)), exported.change))
    for own_args, own_kwargs in sizes:
        given = [leaf for leaf in tree_leaves((own_args, own_kwargs)) if isinstance(leaf, Tensor)]
        names = [entry.name for entry in session.get_inputs()]
        if len(names) != len(given):  # an input that the network does not read is no input of the file
            return f"not checked: the file takes {len(names)} of {len(given)} inputs"
        got = session.run(None, dict(zip(names, (t.detach().cpu().numpy() for t in given), strict=True)))
        expected = [leaf for leaf in tree_leaves(plain(*own_args, **own_kwargs)) if isinstance(leaf, Tensor)]
        _compare([t.cpu() for t in expected], [torch.from_numpy(value) for value in got])
    return "equal in onnxruntime" + (", at other sizes of the inputs, too" if len(sizes) > 1 else "")


def _write_package(
    exported: Exported, draft: Path, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    made = torch._inductor.aoti_compile_and_package(exported.program, package_path=str(draft))
    found = torch._inductor.aoti_load_package(made)(*args, **kwargs)
    _compare(_returning_tensors(model, args, kwargs)(*args, **kwargs), found)
    return "equal when it runs"


_Writer = Callable[[Exported, Path, nn.Module, tuple[Any, ...], Mapping[str, Any]], str]

_WRITERS: dict[str, _Writer] = {".pt2": _write_program, ".onnx": _write_onnx, ".aoti.pt2": _write_package}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch warns and logs about its own attempts and its machine from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
