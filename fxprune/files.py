"""Files: which formats there are, how they are read, and how they are written, so that none is half there."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, OutputError

if TYPE_CHECKING:  # the command line checks names of files before it imports torch
    from torch import Tensor, nn

__all__ = [
    "FORMATS",
    "Format",
    "check_output",
    "few",
    "first_line",
    "format_of",
    "load_checkpoint",
    "read_tensors",
    "told",
    "write",
]


@dataclass(frozen=True)
class Format:
    """A kind of file that fxprune writes.

    Attributes:
        suffix: the end of the file's name.
        holds: what is in it, for people.
        whole: whether only a network that was captured as a whole can be written so.
    """

    suffix: str
    holds: str
    whole: bool = False


FORMATS: dict[str, Format] = {
    known.suffix: known
    for known in (
        Format(".pt2", "an exported program", whole=True),
        Format(".safetensors", "weights with their plan"),
        Format(".onnx", "an ONNX model", whole=True),
        Format(".aoti.pt2", "a package of AOTInductor", whole=True),
        Format(".json", "a plan"),
        Format(".html", "a report"),
        Format(".svg", "a drawing"),
    )
}
"""By suffix. A further one is an entry here, and a function that writes it, by way of :func:`write`."""


def format_of(path: Path) -> Format | None:
    """The format that the end of the file's name stands for, the longest that fits; None for no format."""
    fitting = [known for known in FORMATS.values() if path.name.endswith(known.suffix) and path.stem]
    return max(fitting, key=lambda known: len(known.suffix), default=None)


def check_output(path: Path, suffixes: Collection[str], read: Iterable[Path | None] = ()) -> Format:
    """Make sure, before any work is done, that a file of one of these formats can be written at ``path``.

    Args:
        path: the file to write.
        suffixes: of the formats.
        read: the files that are read, which are not to be overwritten.

    Raises:
        OutputError: the suffix is another, ``path`` is a folder, or its folder is missing or not writable, or
            it is one of the files that are read.
    """
    if any(other is not None and _are_same(path, other) for other in read):
        raise OutputError(f"cannot write {path}: it is a file that is read, and would be lost; name another")
    found = format_of(path)
    if found is None or found.suffix not in suffixes:
        kinds = ", ".join(f"{suffix} ({FORMATS[suffix].holds})" for suffix in suffixes)
        other = path.with_suffix(next(iter(suffixes)))
        raise OutputError(f"cannot write {path}: its name has to end in {kinds}; try {other}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder.absolute()}; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: the folder {folder.absolute()} takes no files ({error.strerror}); name "
            "another one"
        ) from error
    return found


def _are_same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:  # one of them is not there
        return a.resolve() == b.resolve()


def write(path: Path, save: Callable[[Path], Any]) -> int:
    """Write a file to a temporary name beside ``path``, and move it there only when ``save`` is done.

    Args:
        path: the file; what is there already stays until the new one is whole.
        save: writes the file at the path that it is given.

    Returns:
        The size of the file in bytes.

    Raises:
        OutputError: ``save`` or the move fails; ``path`` is as it was before.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fxprune-") as folder:
            draft = Path(folder) / path.name
            save(draft)
            plain = Path(folder) / "plain"
            plain.touch()
            draft.chmod(plain.stat().st_mode)  # safetensors lets nobody but the owner read what it writes
            size = draft.stat().st_size
            os.replace(draft, path)
    except Exception as error:
        raise OutputError(f"writing {path} failed: {type(error).__name__}: {first_line(error)}") from error
    return size


# Checkpoints

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""How other programs wrap a state dict in a checkpoint."""
_DEEPEST = 3
"""How often they do so."""
_PREFIXES = ("module", "_orig_mod")
"""What ``DataParallel`` and ``torch.compile`` put before the names of what they hold."""


def load_checkpoint(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a state dict into ``model``, in place; every name and shape must agree.

    A state dict inside of a usual wrapper (``{"state_dict": ...}``) is found, names that ``DataParallel`` or
    ``torch.compile`` have given a prefix are known without it, and a name that is missing because the
    tensor is tied to one that is there (as safetensors stores it) is no error.

    Args:
        model: the model to fill.
        path: a ``.safetensors`` file, or a file that ``torch.load(weights_only=True)`` opens.

    Returns:
        What was taken off around the names, for people; empty for a plain state dict of this model.

    Raises:
        CheckpointError: the file cannot be read, holds something else, or does not fit the model.
    """
    from torch import Tensor

    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    read, nests = _read(path)
    state = _without_prefixes(read, own)
    parts = {part for name in read.keys() - state.keys() for part in name.split(".")}
    prefixes = sorted(parts.intersection(_PREFIXES))
    present = {id(own[name]) for name in state if name in own}
    missing = [name for name, tensor in own.items() if name not in state and id(tensor) not in present]
    unexpected = [name for name in state if name not in own]
    problems = []
    if missing:
        problems.append(f"it lacks {few(missing)}")
    if unexpected:
        problems.append(f"the model has no {few(unexpected)}")
    misshapen = [
        f"{name} (file {list(tensor.shape)}, model {list(own[name].shape)})"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if misshapen:
        problems.append(f"shapes differ: {few(misshapen)}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. What to do: load a "
            "checkpoint of "
            f"this very architecture, or name a factory that builds the right one"
        )
    model.load_state_dict(state, strict=False)  # strictly checked above, with better words
    nested = [f"found under {' > '.join(map(repr, nests))}"] if nests else []
    return (*nested, *(f"names without {part + '.'!r}" for part in prefixes))


def _without_prefixes(state: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """``state`` under the names of the model, where only prefixes keep it from having them."""
    if any(name in own for name in state):
        return state
    stripped = {
        ".".join(part for part in name.split(".") if part not in _PREFIXES): tensor
        for name, tensor in state.items()
    }
    return stripped if len(stripped) == len(state) and any(name in own for name in stripped) else state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a ``.safetensors`` file, or in one that ``torch.load(weights_only=True)`` opens.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """As :func:`read_tensors`, with the names under which the tensors are nested in the file."""
    import torch
    from safetensors.torch import load_file
    from torch import Tensor

    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a file of plain tensors, or is damaged; fxprune runs no code from checkpoints. "
            "Save one with torch.save(model.state_dict(), ...) or safetensors"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); it may be cut short, "
            "damaged, "
            "or of another kind: write it again with torch.save(model.state_dict(), ...) or safetensors"
        ) from error
    nests: list[str] = []
    for _ in range(_DEEPEST):
        inner = [key for key in _WRAPPERS if isinstance(found, Mapping) and key in found]
        if not inner or not isinstance(found[inner[0]], Mapping):
            break
        nests.append(inner[0])
        found = found[inner[0]]
    if isinstance(found, Tensor):
        found = {"": found}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, not a state dict (names and tensors); save one with "
            "torch.save(model.state_dict(), ...)"
        )
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        what = f"{few(others)}, which are no tensors" if others else "no tensors"
        raise CheckpointError(
            f"{path} is not a state dict: it holds {what}; save one with torch.save(model.state_dict(), ...)"
        )
    return dict(found), nests


# Wording


def few(names: Iterable[str], most: int = 3) -> str:
    """Name the first few, and say how many more there are."""
    listed = list(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def told(error: BaseException) -> str:
    """The kind of an error and, where it has one, its message."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def first_line(error: BaseException) -> str:
    """First line of an error's message, without a final full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
