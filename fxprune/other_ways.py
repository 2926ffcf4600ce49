"""Other methods than ``forward``: ``forward_split`` for an exporter, ``reset_classifier`` for another task.

No example call takes them, so what they read of the module's attributes has not been seen. Where such a
method takes what ``forward`` takes and returns what it returns, it has to do so in the narrowed class, too;
what a number has to be for that is found by trying. Where it makes layers anew, the numbers that these keep
say which attributes their widths come from.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .calls import as_one
from .capture.numbers import Number, Place, evaluate, mark, places, write
from .capture.twin import twin_on_meta
from .inputs import to_meta
from .program import named_modules, named_tensors, unwrapped
from .trees import flatten


def numbers_of_other_ways(
    model: nn.Module, narrow: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Place, int]:
    """New numbers for attributes of ``narrow``, without which other ways through its modules would fail.

    A number is replaced where one method needs it, and one width of the module's own will do; or where a
    method makes a layer with it in the place of one that has become narrower. All is run on copies, on
    shapes.

    Args:
        model: the original.
        narrow: its narrowed copy; values of its tensors do not matter.
        args: positional inputs of the call that both are for.
        kwargs: its keyword inputs.
    """
    made = {
        place: width
        for name in _makers(model)
        for place, width in _numbers_of_maker(model, narrow, name, args, kwargs).items()
    }
    return {**made, **_numbers_of_ways(model, narrow, args, kwargs)}


def _numbers_of_ways(
    model: nn.Module, narrow: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Place, int]:
    """What methods called ``forward_...`` need."""
    ways = list(_ways(model, narrow))
    if not ways:
        return {}
    model, narrow = (twin_on_meta(each).eval() for each in (model, narrow))
    args, kwargs = to_meta(args), to_meta(kwargs)
    paths = {path for path, _, _ in ways}
    seen, now = (_calls(each, paths, args, kwargs) for each in (model, narrow))
    found: dict[Place, int] = {}
    for path, method, names in ways:
        if path not in seen or path not in now:
            continue
        old, new = model.get_submodule(path), narrow.get_submodule(path)
        if _shapes(old, method, *seen[path][:2]) != seen[path][2]:
            continue  # something else than forward
        given, named, wanted = now[path]
        if _shapes(new, method, given, named) == wanted:
            continue
        fits = []
        for name in names:
            before = new.__dict__[name]
            for width in _widths(new, before):
                new.__dict__[name] = width
                if _shapes(new, method, given, named) == wanted:
                    fits.append((name, width))
            new.__dict__[name] = before
        if len(fits) == 1:
            found[Place(path, fits[0][0])] = fits[0][1]
    return found


_OTHERS = 3
"""How many outputs the layers that are made anew are to have."""


def _makers(model: nn.Module) -> Iterator[str]:
    """Methods of a model called ``reset_...`` that need one number."""
    inner = unwrapped(model)
    if inner is not model:
        return
    for name in dir(type(model)):
        function = getattr(type(model), name, None) if name.startswith("reset_") else None
        if inspect.isfunction(function):
            needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            if len(needed) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in needed):
                yield name


def _numbers_of_maker(
    model: nn.Module, narrow: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Place, int]:
    """What the method ``name`` of a model reads to make layers anew that fit the narrowed ones."""

    def after(twin: nn.Module) -> Any:
        """The shapes of the outputs, once the method was called."""
        with contextlib.suppress(Exception), torch.no_grad(), torch.device("meta"):  # whatever a class raises
            getattr(twin, name)(_OTHERS)
            return _described(as_one(twin, kwargs)(*to_meta(args), **to_meta(kwargs)))
        return None

    marked, twin = twin_on_meta(model).eval(), twin_on_meta(narrow).eval()
    mark(marked)
    before, kept = {id(module) for module in marked.modules()}, dict(named_modules(narrow))
    held = list(marked.modules())  # so that no new one gets the address of one that goes
    wanted = after(marked)
    if wanted is None or after(twin) == wanted:
        return {}
    del held
    found: dict[Place, int] = {}
    for path, module in named_modules(marked):
        for key, value in module.__dict__.items() if id(module) not in before and path in kept else ():
            width = kept[path].__dict__.get(key)
            if isinstance(value, Number) and type(width) is int:
                found.update(_solved(value, width))
    twin = twin_on_meta(narrow).eval()
    for place, width in found.items():
        write(twin, place, width)
    return found if after(twin) == wanted else {}


def _solved(number: Number, value: int) -> dict[Place, int]:
    """What the one attribute that a number is computed from has to be so that it is ``value``."""
    within = set(places(number.origin))
    if len(within) != 1:
        return {}
    (place,) = within
    fits = [n for n in range(1, int(number) + 1) if evaluate(number.origin, {place: n}) == value]
    return {place: fits[0]} if len(fits) == 1 else {}


def _ways(model: nn.Module, narrow: nn.Module) -> Iterator[tuple[str, str, list[str]]]:
    """Methods called ``forward_...`` of modules that have changed, which name attributes whose numbers have
    not: the path of the module, the method, and the attributes.
    """
    new = dict(named_modules(narrow))
    for path, module in named_modules(model):
        if type(module).__module__.startswith("torch."):
            continue
        methods = {
            name: code
            for kind in type(module).__mro__
            for name, function in vars(kind).items()
            if name.startswith("forward_") and (code := getattr(function, "__code__", None)) is not None
        }
        own = {name for name, value in module.__dict__.items() if type(value) is int}
        ways = [(name, own.intersection(code.co_names)) for name, code in methods.items()]
        if not any(names for _, names in ways):
            continue
        if path not in new or _shapes_of(module) == _shapes_of(new[path]):
            continue
        for name, names in ways:
            stale = sorted(n for n in names if module.__dict__[n] == new[path].__dict__.get(n))
            if stale:
                yield path, name, stale


def _shapes_of(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for _, tensor in named_tensors(module)]


def _widths(module: nn.Module, below: int) -> list[int]:
    """Extents of the module's tensors, and equal parts of them."""
    sizes = {size for shape in _shapes_of(module) for size in shape}
    return sorted({size // n for size in sizes for n in range(1, 9) if size % n == 0 and size // n < below})


def _calls(
    model: nn.Module, paths: set[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """What the modules at ``paths`` are given when ``model`` runs, and the shapes that they return."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    def note(path: str, _: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        found.setdefault(path, (given, named, _described(out)))

    handles = [
        model.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True)
        for path in paths
    ]
    try:
        with torch.no_grad():
            as_one(model, kwargs)(*args, **kwargs)
    except Exception:  # noqa: BLE001  a forward may read values, which there are none of; what ran has been seen
        pass
    for handle in handles:
        handle.remove()
    return found


def _shapes(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a method returns, on shapes; None where it does not take these inputs or fails."""
    function = getattr(module, method)
    try:
        inspect.signature(function).bind(*args, **kwargs)
        with torch.no_grad():
            return _described(function(*args, **kwargs))
    except Exception:  # noqa: BLE001  whatever a user's class raises
        return None


def _described(outputs: Any) -> Any:
    tensors, structure = flatten(outputs)
    return [(str(leaf), tuple(t.shape)) for leaf, t in zip(structure.leaves, tensors, strict=True)]


__all__ = ["numbers_of_other_ways"]
