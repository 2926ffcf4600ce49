"""Pruned networks as files without code: ``.safetensors`` that hold weights, and the plans that lead to them.

Whoever has the class of the original network needs nothing else: :func:`load` makes one without weights,
lets the plans narrow it, and fills it. Nothing in the file is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import files
from .errors import CheckpointError, OutputError
from .files import few, first_line
from .graph_module import clone_module
from .inputs import dense, meta_like
from .origins import made_in_training, plans_of, reshaped
from .planning.plan import PruningPlan
from .program import exchange, named_modules, named_tensors

__all__ = ["load", "plans_in", "save"]

_HEADER, _PLAN = "fxprune", "fxprune.plan.{}"
"""Keys of a file's metadata."""
_VERSION = 1


def save(pruned: nn.Module, path: str | Path, plan: PruningPlan | Sequence[PruningPlan] | None = None) -> int:
    """Write a pruned network to a ``.safetensors`` file that :func:`load` reads.

    The file holds the tensors of ``pruned.state_dict()`` under their names (a tied one once, under its first
    name), and buffers and constants that are not in it; its metadata hold the plans and the versions of
    fxprune and torch. Other programs read the weights as they do those of any such file.

    Args:
        pruned: what :func:`fxprune.prune`, ``plan.apply`` or a schedule returned, trained further or not.
        path: the file; it appears there only when it is whole.
        plan: the plan that made ``pruned`` of the original, or several that did so one after the other. Only
            needed where ``pruned`` does not know them, because some other code has copied it.

    Returns:
        The size of the file in bytes.

    Raises:
        OutputError: if the file cannot be written, if no plan is known, if a tensor has no values, or if
            layers have got other shapes or names since (an adapter, say), which no plan gives.
    """
    path = Path(path)
    files.check_output(path, (".safetensors",))
    given = (plan,) if isinstance(plan, PruningPlan) else tuple(plan or ())
    plans = given or plans_of(pruned)
    if not plans:
        raise OutputError(
            f"cannot write {path}: nobody knows which plan made this {type(pruned).__name__}, and "
            "without it the weights fit no network; give fxprune.save the plan"
        )
    changed = reshaped(pruned) if not given else ""
    if changed:
        raise OutputError(
            f"cannot write {path}: {changed}, so that nothing could open the file; a layer was replaced, "
            f"resized or wrapped since {type(pruned).__name__} was pruned. Next: merge adapters (LoRA, say), "
            f"or save them by their own library; replace a layer before pruning, or keep state_dict() and "
            f"load it into plan.apply(model) once the layer is replaced there, too."
        )
    tensors, formats = _stored(pruned, path)
    header = {
        "version": _VERSION,
        "fxprune": _version(),
        "torch": torch.__version__,
        "model": plans[0].model,
        "training": pruned.training,
        "captured_in_training": made_in_training(pruned),
        **formats,
        "plans": len(plans),
    }
    metadata = {_HEADER: json.dumps(header)}
    metadata.update({_PLAN.format(number): made.to_json() for number, made in enumerate(plans)})

    def write(draft: Path) -> None:
        save_file(tensors, draft, metadata=metadata)
        plans_in(draft)

    return files.write(path, write)


def load(
    model: nn.Module | Callable[[], nn.Module], path: str | Path, device: torch.device | str | None = None
) -> nn.Module:
    """Read what :func:`save` wrote.

    Args:
        model: a function that returns the original network (its class, where that takes no arguments), or
            such a network. A function is called on the meta device, where weights take neither memory nor
            time, and only once more without where that is not enough (constants that are no buffers, numbers
            that are computed from buffers). A network is not changed, and its weights are not used.
        path: the file.
        device: where the tensors go; by default to where the given network has its own, else to the CPU.

    Returns:
        The network that was saved, bit for bit, in the mode (train or eval) in which it was.

    Raises:
        CheckpointError: if the file cannot be read, was not written by :func:`save`, or does not fit the
        model. PlanError: if the model is of another architecture; says where they differ.
    """
    path = Path(path)
    if device is None:
        own = next((t for _, t in named_tensors(model)), None) if isinstance(model, nn.Module) else None
        device = own.device if own is not None and not own.is_meta else "cpu"
    saved = _read(path, device)
    try:
        found = _filled(_on_meta(model), saved, path)
        if not list(_empty(found)):
            return found
    except Exception:  # noqa: BLE001 - whatever the model's own code says to tensors without values
        pass
    found = _filled(_with_values(model), saved, path)
    empty = list(_empty(found))
    if empty:
        raise CheckpointError(
            f"{path} does not hold the values of {few(empty)}, and the model that was given has none, "
            "either; "
            f"give fxprune.load a function that makes the model"
        )
    return found


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class _Saved:
    """What is in a file."""

    header: Mapping[str, Any]
    plans: tuple[PruningPlan, ...]
    tensors: dict[str, Tensor]


def _stored(pruned: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What goes into the file: tensors by name, and the names of those that are no plain contiguous ones."""
    state = pruned.state_dict(keep_vars=True)
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise OutputError(f"cannot write {path}: the state dict holds {few(others)}, which are no tensors")
    state = {**state, **{name: t for name, t in named_tensors(pruned) if name not in state}}
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise OutputError(f"cannot write {path}: {few(empty)} are on the meta device and have no values")
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    formats = {
        "channels_last": [name for name in first.values() if _is_channels_last(state[name])],
        "sparse": [name for name in first.values() if state[name].is_sparse],
    }
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in first.values():
        tensor = dense(state[name].detach()).contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return tensors, formats


def _is_channels_last(tensor: Tensor) -> bool:
    memory_format = _LAST.get(tensor.dim())
    return (
        memory_format is not None
        and tensor.layout is torch.strided
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=memory_format)
    )


def _version() -> str:
    from . import __version__

    return __version__


def plans_in(path: Path) -> tuple[Mapping[str, Any], tuple[PruningPlan, ...]]:
    """What a file of :func:`save` says about itself, and its plans in order; no tensor is read.

    Raises:
        CheckpointError: if it cannot be read, or is no such file.
        PlanError: if a plan in it is malformed.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if _HEADER not in metadata:
        raise CheckpointError(f"{path} holds no plan; fxprune.load reads what fxprune.save has written")
    try:
        header = json.loads(metadata[_HEADER])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} was written by another fxprune than this ({_version()}), which reads version {_VERSION}"
        )
    plans: list[PruningPlan] = []
    while _PLAN.format(len(plans)) in metadata:
        plans.append(PruningPlan.from_json(metadata[_PLAN.format(len(plans))]))
    if len(plans) != header.get("plans") or not plans:
        raise CheckpointError(f"{path} holds {len(plans)} plans, and should hold {header.get('plans')!r}")
    return header, tuple(plans)


_UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, OverflowError)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); it may be cut short or damaged"
    )


def _read(path: Path, device: torch.device | str) -> _Saved:
    header, plans = plans_in(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            # Cloned, because kernels round differently where memory is not aligned as torch aligns it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return _Saved(header, plans, tensors)


def _made(factory: Callable[[], nn.Module]) -> nn.Module:
    if not callable(factory):
        raise CheckpointError(
            f"fxprune.load takes a module or a function that makes one, got a {type(factory).__name__}"
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the function made a {type(model).__name__}, not a torch.nn.Module")
    return model


def _with_values(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The network as it is made, or one that shares the tensors of the given one."""
    return clone_module(model, lambda _, tensor: tensor) if isinstance(model, nn.Module) else _made(model)


def _on_meta(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A network like the given one, without weights."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            return _made(model)
    made: dict[int, Tensor] = {}

    def empty(_: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            like = meta_like(tensor)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if parameter else like
        return made[id(tensor)]

    return clone_module(model, empty)


def _filled(model: nn.Module, saved: _Saved, path: Path) -> nn.Module:
    """The network that the plans make of ``model``, with the tensors of the file."""
    _retype(model, saved.tensors)
    found = model.train(saved.header.get("captured_in_training") is True)
    for plan in saved.plans:
        found = plan.apply(found)
    _fill(found, saved, path)
    return found.train(saved.header.get("training") is True)


def _retype(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the tensors of ``model`` the dtypes that they have in the file: the graph may depend on them."""
    made: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model):
        if name in tensors and tensors[name].dtype != tensor.dtype:
            new = tensor.detach().to(tensors[name].dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
    exchange(model, made)


def _fill(model: nn.Module, saved: _Saved, path: Path) -> None:
    """Put the tensors of the file in their places."""
    named = dict(named_tensors(model))
    unknown = [name for name in saved.tensors if name not in named]
    given = {id(named[name]): name for name in saved.tensors if name in named}
    state = model.state_dict(keep_vars=True)
    missing = [name for name, tensor in state.items() if id(tensor) not in given]
    wrong = [
        f"{name} (file {list(tensor.shape)}, network {list(named[name].shape)})"
        for name, tensor in saved.tensors.items()
        if name in named and tensor.shape != named[name].shape
    ]
    problems = [
        f"{what} {few(names)}"
        for what, names in (
            ("the network has no", unknown),
            ("the file lacks", missing),
            ("shapes differ:", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit what its plan makes of this {type(model).__name__}: "
            f"{'; '.join(problems)}. What to do: "
            f"make the network with the same arguments as the one that was pruned"
        )
    last, sparse = _names(saved.header, "channels_last"), _names(saved.header, "sparse")
    new: dict[int, Tensor] = {}
    for number, name in given.items():
        old, value = named[name], saved.tensors[name]
        if name in last and value.dim() in _LAST:
            value = value.contiguous(memory_format=_LAST[value.dim()])
        if name in sparse and not isinstance(old, nn.Parameter):
            value = value.to_sparse()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(
                value, old.requires_grad and (value.is_floating_point() or value.is_complex())
            )
        new[number] = value
    exchange(model, new)


def _names(header: Mapping[str, Any], key: str) -> set[str]:
    found = header.get(key)
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _empty(model: nn.Module) -> Iterator[str]:
    """Names of the tensors that a network holds, as parameters, buffers or else, and that have no values."""
    for path, module in named_modules(model):
        tables = [module.__dict__[registry] for registry in ("_parameters", "_buffers")]
        rest = {
            k: v
            for k, v in vars(module).items()
            if k not in ("_modules", "_parameters", "_buffers", "_graph")
        }
        for name, value in (item for table in (*tables, rest) for item in table.items()):
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(value)):
                yield f"{path}.{name}" if path else name
