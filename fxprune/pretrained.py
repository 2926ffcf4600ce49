"""Files of narrowed networks whose classes have a ``config``.

A network is written in the way of its own library only if the class, built from a configuration that gives
its shapes (:mod:`.configurations`), computes the same with its weights. Else it is written with its plan, in
a file that the library does not take for its own.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import _pytree as pytree

from . import files
from .calls import as_one
from .configurations import Solved, builder, changed, has_config, name_of, shapes_of, solve_configs
from .errors import CheckpointError, OutputError
from .inputs import in_dtype_of, normalize, restore_inputs
from .origins import config_before, plans_of
from .program import exchange, let_go
from .saving import load, save
from .trees import flatten

__all__ = ["Saved", "computes_the_same", "from_pretrained", "said_by_config", "save_pretrained"]

_WEIGHTS, _ABOUT = "fxprune.safetensors", "fxprune.json"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Saved:
    """What :func:`save_pretrained` wrote.

    Attributes:
        directory: where.
        config: the integers of the configuration that changed, by name; None where no configuration says
            what the network is, so that :func:`from_pretrained` is needed to open it.
        reason: why no configuration does, or empty.
    """

    directory: Path
    config: Mapping[str, int] | None
    reason: str = ""

    def __str__(self) -> str:
        if self.config is not None:
            changed = ", ".join(f"{name}={value}" for name, value in self.config.items()) or "nothing"
            return f"{self.directory}: opens with from_pretrained of its own library; changed: {changed}"
        return f"{self.directory}: opens with fxprune.from_pretrained; {self.reason}"


# -- files -------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, directory: str | Path, example_inputs: Any = None) -> Saved:
    """Write a narrowed network of a class that has a ``config`` (transformers, diffusers).

    If a configuration gives its shapes, and the class built from it computes the same with its weights, then
    the files are those of the library itself, and its ``from_pretrained(directory)`` opens them where fxprune
    is not installed. ``uniform=True`` makes it so wherever it can be. Else weights and plans are written,
    which :func:`from_pretrained` opens; the library does not take them for its own.

    Args:
        model: what :func:`fxprune.prune` gave with ``into="module"``, trained further or not.
        directory: is made if it is not there; files in it that are in the way are replaced.
        example_inputs: real inputs to compare the two networks on; by default random ones of the shapes that
            the plan was made with.

    Returns:
        What was written, and if no configuration says what the network is, which tensors differ.

    Raises:
        OutputError: if the model has no configuration or no plan, or the files cannot be written.
    """
    directory = Path(directory)
    build, plans = builder(model), plans_of(model)
    if build is None:
        raise OutputError(_no_config(model))
    if not plans:
        raise OutputError(
            f"nobody knows which plan made this {type(model).__name__}; save what fxprune.prune or plan.apply"
            f' gave with into="module".'
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} is no directory and cannot be made: {error.strerror}.") from error
    if example_inputs is None:
        args, kwargs = restore_inputs(in_dtype_of(model, plans[0].inputs))
    else:
        args, kwargs = normalize(example_inputs, several=True)
    said, twin, reason = said_by_config(model, args, kwargs)
    if twin is not None:
        if hasattr(model, "generation_config"):
            twin.generation_config = copy.deepcopy(model.generation_config)
        _move(partial(_write, twin), directory)
        for name in (_WEIGHTS, _ABOUT):
            (directory / name).unlink(missing_ok=True)
        before: dict[str, int] = {}
        for plan in plans:
            before.update(plan.config)
        return Saved(directory, {**before, **(said or {})})
    original: Any = config_before(model)
    try:
        with torch.device("meta"):
            build(original)
    except Exception as error:
        raise OutputError(
            f"{type(model).__name__} cannot be built from its configuration alone ({type(error).__name__}: "
            f"{files.first_line(error)}). Next: fxprune.save writes the weights with their plan, and "
            f"fxprune.load opens them with a function that makes the original."
        ) from error
    about = {
        "fxprune_pretrained": 1,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "reason": reason,
    }

    def write(folder: Path) -> None:
        save(model, folder / _WEIGHTS)
        (folder / _ABOUT).write_text(json.dumps(about, indent=1))
        original_config = original if callable(getattr(original, "save_pretrained", None)) else None
        if original_config is not None:
            original_config.save_pretrained(folder)
        else:
            (folder / "config.json").write_text(json.dumps(dict(original), indent=1, default=str))

    _move(write, directory)
    return Saved(directory, None, reason)


def _no_config(model: nn.Module) -> str:
    """Why a network cannot be saved by a configuration, and what to do."""
    kind = type(model).__name__
    if isinstance(model, fx.GraphModule):
        return f'this {kind} is a graph. Prune with into="module", or write it by fxprune.save.'
    for path, module in getattr(model, "named_modules", tuple)():
        if path and has_config(module) and plans_of(module):
            inner = f"the narrowed {type(module).__name__} at {path}"
            return f"{kind} wraps {inner}. Save that; of a model with adapters, when they are merged into it."
    return (
        f"{kind} has no config that it could be built from; fxprune.save writes the weights with their plan."
    )


def said_by_config(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], solved: Solved | None = None
) -> tuple[dict[str, int] | None, Any, str]:
    """The integers of a configuration from which the class makes ``model``, shapes and meaning.

    Args:
        model: a narrowed network of a class that has a ``config``.
        args: positional inputs to compare the two networks on; those on meta are filled with random values.
        kwargs: keyword inputs.
        solved: what :func:`solve_configs` gives for its shapes, where that is known.

    Returns:
        The integers that change, by name, and a network that was built from them and has the very parameters
        and buffers of ``model``; both None where there is no such configuration, and why.
    """
    build = builder(model)
    assert build is not None
    found, why = solved or solve_configs(model, shapes_of(model))
    error = None
    for values in found:
        twin = _with_tensors_of(model, partial(build, changed(model.config, values)))
        error = _difference(model, twin, *_real(model, (args, kwargs)))
        if error <= _TOLERANCE:
            return {name_of(key): value for key, value in values.items()}, twin, ""
        let_go(twin)
    if error is None:
        return None, None, why()
    reason = (
        f"the configuration with these shapes means another network (its outputs differ by {error:.0e}): "
        f"what it computes from widths, as the scale of attention or rotary angles, has changed"
    )
    return None, None, reason


def _with_tensors_of(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """A new network that has the parameters and buffers of ``model``, and needs memory only for what else it
    computes from its configuration.
    """
    thread = get_ident()

    def without_values(_: nn.Module, name: str, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or parameter.is_meta or get_ident() != thread:
            return None  # as it is
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    replace: Callable[..., None] = without_values  # type: ignore[assignment]  # torch takes the result, too
    hook = register_module_parameter_registration_hook(replace)
    try:
        twin = make()
    finally:
        hook.remove()
    twin.to(_dtype(model)).train(model.training)
    values = model.state_dict()
    new = {id(own): _like(own, values[name]) for name, own in twin.state_dict(keep_vars=True).items()}
    exchange(twin, new)
    return twin


def _like(own: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, own.requires_grad) if isinstance(own, nn.Parameter) else values


def computes_the_same(
    one: nn.Module, other: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether two networks do so in evaluation mode; inputs as for :func:`said_by_config`."""
    return _difference(one, other, *_real(one, (args, kwargs))) <= _TOLERANCE


def _write(model: Any, folder: Path) -> None:
    """In the way of the model's own library."""
    model.save_pretrained(folder)


def from_pretrained(directory: str | Path) -> nn.Module:
    """Open what :func:`save_pretrained` wrote: the narrowed network in its own class.

    Nothing in the files is run; the class has to be installed.

    Raises:
        CheckpointError: if the directory holds no such files, or the class is not there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no directory {directory}. fxprune.from_pretrained opens what fxprune.save_pretrained "
            f"wrote, and downloads nothing."
        )
    config = _read(directory / "config.json")
    if not (directory / _ABOUT).exists() and not (directory / _WEIGHTS).exists():
        return _of_the_library(directory, config)
    kind = _class(str(_read(directory / _ABOUT).get("class")))

    def make() -> nn.Module:
        try:
            if hasattr(kind, "config_class"):
                return kind(kind.config_class.from_pretrained(directory)).eval()
            return kind.from_config(config).eval()
        except Exception as error:
            raise CheckpointError(
                f"{kind.__name__} cannot be built from {directory / 'config.json'}: {type(error).__name__}: "
                f"{files.first_line(error)}"
            ) from error

    return load(make, directory / _WEIGHTS)


def _of_the_library(directory: Path, config: Mapping[str, Any]) -> nn.Module:
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    for library in ("transformers", "diffusers"):
        try:
            kind = getattr(importlib.import_module(library), str(name), None)
        except ImportError:
            continue
        if kind is not None:
            try:
                opened: nn.Module = kind.from_pretrained(directory)
            except Exception as error:
                raise CheckpointError(
                    f"{directory} cannot be opened by {name}.from_pretrained of {library} "
                    f"({type(error).__name__}: {files.first_line(error)}). If a trainer has "
                    f"written it, its configuration says the widths only with uniform=True. Else the plan "
                    f"makes a network that its weights fit: plan.apply(model), and load_state_dict."
                ) from error
            return opened
    raise CheckpointError(
        f"{directory / 'config.json'} names no class of networks."
        if name is None
        else f"{directory} is of the class {name}, which no library that is installed has."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {files.first_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not hold what fxprune.save_pretrained writes.")
    return found


def _class(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"the network is of the class {name}, which is not installed here.") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"{name} is no class of networks.")
    return found


def _move(write: Callable[[Path], Any], directory: Path) -> None:
    """Write files into a folder beside, and move them into ``directory`` when all are there."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fxprune-") as folder:
            write(Path(folder))
            for path in sorted(Path(folder).iterdir()):
                os.replace(path, directory / path.name)
    except OutputError:
        raise
    except Exception as error:
        raise OutputError(
            f"writing {directory} failed: {type(error).__name__}: {files.first_line(error)}"
        ) from error


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _real(model: nn.Module, tree: Any) -> Any:
    """Inputs with values where ``tree`` has none; whole numbers are small, as tokens of any vocabulary."""
    drawn, device = torch.Generator().manual_seed(0), next(model.parameters()).device

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=drawn).to(device, tensor.dtype)
        if tensor.dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool, device=device)
        return torch.randint(0, 2, tensor.shape, generator=drawn).to(device, tensor.dtype)

    return pytree.tree_map_only(Tensor, real, tree)


def _difference(one: nn.Module, other: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Largest relative difference of the outputs, in evaluation mode."""
    device = next(one.parameters()).device
    outputs = []
    for module in (one, other.to(device)):
        training = module.training
        with torch.no_grad():
            several = as_one(module.eval(), kwargs)
            tensors = flatten(several(*copy.deepcopy(args), **copy.deepcopy(kwargs)))[0]
        module.train(training)
        outputs.append([t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()])
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        return math.inf
    worst = 0.0
    for a, b in zip(*outputs, strict=True):
        size = float(a.abs().max()) if a.numel() else 0.0
        apart = float((a - b).abs().max()) if a.numel() else 0.0
        worst = max(worst, apart / (size or 1.0) if not math.isnan(apart) else math.inf)
    return worst
