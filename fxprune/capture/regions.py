"""The region rung: the largest submodules that can be captured, where the model as a whole cannot be.

The model is run once on the example inputs, on a copy, to see what each of its submodules is called with.
Then the tree is searched from the top: what another rung can capture becomes a region; of what it cannot,
the children are tried. The Python code around the regions stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError, FxpruneError
from ..inputs import describe_inputs, restore_inputs
from ..program import Program, Skeleton
from ..regions import RegionProgram, unite
from .symbolic import is_leaf

Calls = tuple[tuple[Any, ...], dict[str, Any]]
Whole = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Program]
"""Captures one module on meta inputs; raises CaptureError or ExampleInputsError where it cannot."""


def find(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Whole) -> RegionProgram:
    """Capture the largest submodules of ``model`` that ``whole`` can capture.

    Args:
        model: the model; it is not run itself, and not changed.
        args: its positional inputs, real ones.
        kwargs: its keyword inputs, real ones.
        whole: how one submodule is captured.

    Raises:
        CaptureError: if the model does not run, or no submodule with parameters can be captured.
    """
    seen = observe(model, args, kwargs)
    found: dict[str, tuple[Program, Any]] = {}
    refusals: list[str] = []
    visited = {model}

    def search(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if child in visited or next(child.parameters(), None) is None:
                continue
            visited.add(child)
            full = f"{path}.{name}" if path else name
            calls = seen.calls.get(full)
            if calls is None:
                search(child, full)
                continue
            if is_leaf(child):
                continue  # nothing in it but its boundary
            try:
                found[full] = (_one(child, calls, whole), calls[0])
            except FxpruneError as refusal:
                refusals.append(f"{full}: {str(refusal).strip().splitlines()[0]}")
                search(child, full)

    search(model, "")
    if not found:
        reasons = "; ".join(refusals[:4]) or "no submodule with parameters was called"
        raise CaptureError(f"no part of it can be captured, either ({reasons})")
    outside = seen.outside(set(found))
    parts = {path: (*part, _beneath(path, outside)) for path, part in found.items()}
    return unite(model, Skeleton.of(model), parts, tuple(refusals))


def again(model: nn.Module, regions: Mapping[str, Any], whole: Whole) -> RegionProgram:
    """Capture regions that are known already, as :func:`describe` describes them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for path, region in regions.items():
        if path not in modules:
            raise CaptureError(f"{type(model).__name__} has no submodule {path!r}.")
        found[path] = (
            _one(modules[path], [region["inputs"]], whole),
            region["inputs"],
            tuple(region["outside"]),
        )
    return unite(model, Skeleton.of(model), found, ())


def describe(program: Program) -> dict[str, Any]:
    """The regions of a program as plain data; empty where it covers its model."""
    regions = program.regions if isinstance(program, RegionProgram) else ()
    return {r.path: {"inputs": r.inputs, "outside": list(r.outside)} for r in regions}


def real_inputs(
    model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Calls]:
    """Arguments of each piece of ``program``, by its path, when ``model`` evaluates ``args`` and ``kwargs``.

    Of a region that is called several times, those of its first call; a region that is not called is
    left out.
    """
    if not isinstance(program, RegionProgram):
        return {"": (args, kwargs)}
    return observe(model, args, kwargs, {region.path for region in program.regions}).kept


def _one(module: nn.Module, calls: list[Any], whole: Whole) -> Program:
    """The program of ``module``, which must be the same for all ``calls``."""
    odd = next((call for call in calls if isinstance(call, FxpruneError)), None)
    if odd is not None:
        raise odd
    program = whole(module, *restore_inputs(calls[0]))
    code = str(program.graph)
    for other in calls[1:]:
        if str(whole(module, *restore_inputs(other)).graph) != code:
            raise CaptureError("its graph differs from call to call")
    return program


def _beneath(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith(f"{path}."))


@dataclass
class Observed:
    """What was seen when a model ran.

    Attributes:
        calls: by path of a submodule the distinct descriptions of its arguments.
        kept: by path the arguments of the first call, for paths that were asked for.
        users: by name of a parameter or buffer the stacks of submodules in which it was used.
        names: the names of each tensor, one for each module that owns it.
    """

    calls: dict[str, list[Any]] = field(default_factory=dict)
    kept: dict[str, Calls] = field(default_factory=dict)
    users: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    names: list[list[str]] = field(default_factory=list)

    def outside(self, regions: set[str]) -> tuple[str, ...]:
        """Tensors of ``regions`` that are also used, or owned, by a module in none of them."""

        def within(path: str) -> bool:
            return any(path.startswith(f"{region}.") for region in regions)

        found: list[str] = []
        for names in self.names:
            stacks = self.users.get(names[0], ())
            if not all(map(within, names)) or any(regions.isdisjoint(stack) for stack in stacks):
                found += filter(within, names)
        return tuple(found)


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keep: set[str] | None = None
) -> Observed:
    """Run a copy of ``model`` and watch its submodules.

    Parameters are shared with the copy, which runs without gradients; buffers and other state are its own.
    The state of the random number generators is restored. Given ``keep``, the paths of which to keep real
    inputs, it runs in evaluation mode.

    Raises:
        CaptureError: if the model cannot be copied, or does not run.
    """
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    if any(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in tensors):
        raise CaptureError(
            "its parts can only be found by running it, and the model or its inputs are on meta"
        )
    try:
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:  # whatever a user's attributes raise
        raise CaptureError(f"it cannot be copied: {type(error).__name__}: {error}") from error
    if keep is not None:
        twin.eval()
    watch = _Watch(twin, keep)
    handles = list(watch.hooks(twin))
    devices = {t.device for t in tensors if isinstance(t, torch.Tensor) and t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad(), watch:
            twin(*_copied(args), **_copied(kwargs))
    except Exception as error:  # whatever a user's forward raises
        raise CaptureError(
            f"it does not run on the example inputs: {type(error).__name__}: {str(error).strip()}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return watch.seen


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, keep: set[str] | None) -> None:
        super().__init__()
        self.seen = Observed()
        self.keep = keep
        self.stack: list[str] = []
        same: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    same.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
        self.names = {key: names[0] for key, names in same.items()}
        self.seen.names = list(same.values())

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            path = paths[module]
            self.stack.append(path)
            if self.keep is None:
                try:
                    call: Any = describe_inputs(args, kwargs)
                except FxpruneError as error:
                    call = error
                calls = self.seen.calls.setdefault(path, [])
                if call not in calls:
                    calls.append(call)
            elif path in self.keep and path not in self.seen.kept:
                self.seen.kept[path] = _copied((args, kwargs))

        def leave(*_: Any) -> None:
            self.stack.pop()

        paths = {module: path for path, module in model.named_modules()}
        for module in paths:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            yield module.register_forward_pre_hook(enter, prepend=False, with_kwargs=True)
            yield module.register_forward_hook(leave, prepend=True, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.keep is None:
            for leaf in pytree.tree_leaves((args, kwargs)):
                name = self.names.get(id(leaf))
                if name is not None:
                    self.seen.users.setdefault(name, set()).add(tuple(self.stack))
        return func(*args, **(kwargs or {}))


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, tree)
