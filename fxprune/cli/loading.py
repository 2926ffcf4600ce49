"""From the command line's words to a model: ``MODEL``, ``--weights``, ``--checkpoint``, ``--input-shape``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import importance
from ..capture.source_lines import blame
from ..errors import CheckpointError, ExampleInputsError, FxpruneError, ModelSpecError
from ..files import few, first_line, load_checkpoint, read_tensors, told
from ..importance.calibration import kind as kind_of
from ..importance.calibration import run
from ..inputs import normalize
from .options import Shape, parse_model, parse_shape
from .progress import shapes as shapes_of

__all__ = ["Loaded", "check_runs", "load", "load_data", "load_source"]


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, with what to run it on.

    Attributes:
        model: the model, on the device where its maker put it.
        inputs: example inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        weights: where the weights come from, for people.
        inputs_from: where the example inputs come from, for people.
    """

    model: nn.Module
    inputs: Any
    weights: str
    inputs_from: str


def load_source(options: argparse.Namespace) -> Loaded:
    """:func:`load` as the options of :func:`add_source` ask for."""
    return load(
        options.model,
        weights=options.weights,
        checkpoint=options.checkpoint,
        shapes=[parse_shape(text) for text in options.input_shape],
        seed=options.seed,
    )


def load(
    spec: str,
    *,
    weights: str | None = None,
    checkpoint: Path | None = None,
    shapes: Sequence[Shape] = (),
    seed: int = 0,
) -> Loaded:
    """Make the model that ``spec`` names, with its weights and example inputs.

    Args:
        spec: ``torchvision:NAME`` or ``package.module:factory``.
        weights: name of one of torchvision's pretrained weights, for example ``DEFAULT``.
        checkpoint: file with a state dict, which must fit the model exactly.
        shapes: shape of each positional input (a list of them for a list of tensors), which then is random;
            none asks the model's maker.
        seed: of random weights and inputs.

    Raises:
        ModelSpecError: there is no such model or weights, or they cannot be made.
        CheckpointError: the checkpoint cannot be read or does not fit.
        ExampleInputsError: nobody says what the model's inputs look like.
    """
    kind, name = parse_model(spec, weights)
    own_inputs: Any = None
    shape: Shape | None = None
    torch.manual_seed(seed)
    if kind == "torchvision":
        model, shape = _torchvision_model(name, weights)
    elif kind == "timm":
        model, shape = _timm_model(name, weights)
    elif kind == "hf":
        model, own_inputs = _hugging_face_model(Path(name))
    else:
        module = _import(kind)
        torch.manual_seed(seed)  # the import may have drawn numbers, and happens only once
        model, own_inputs = _factory_model(module, kind, name)
    model.eval()
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        raise ModelSpecError(
            f"{spec} gives a model without weights ({few(empty)} on the meta device); build it on the CPU, "
            "or use the Python interface (fxprune.analyze), which needs no weights"
        )
    if checkpoint is not None:
        changed = load_checkpoint(model, checkpoint)
        origin = f"from {checkpoint}" + (f" ({', '.join(changed)})" if changed else "")
    elif weights is not None:
        origin = f"{kind}'s {weights}"
    elif kind in ("torchvision", "timm"):
        origin = "random (for real ones use --weights DEFAULT or --checkpoint FILE)"
    else:
        origin = f"as {spec} makes them (--checkpoint FILE loads others)"

    torch.manual_seed(seed)  # the inputs do not depend on how the weights were made
    if shapes:
        return Loaded(model, _random_inputs(model, shapes), origin, "random, of --input-shape")
    if own_inputs is not None:
        return Loaded(model, own_inputs, origin, f"example_inputs of {kind}")
    if shape is not None:
        return Loaded(model, _random_inputs(model, [shape]), origin, "random, of the model's default size")
    advice = (
        ""
        if kind in ("torchvision", "timm", "hf")
        else f", or let {kind} define `example_inputs` (a tensor, tuple or dict)"
    )
    raise ExampleInputsError(
        f"{spec} does not say what its inputs look like: add --input-shape (one for each input in order, "
        f"for example --input-shape 1,3,224,224){advice}"
    )


def _random_inputs(model: nn.Module, shapes: Sequence[Shape]) -> tuple[Any, ...]:
    """Normally distributed inputs, with the type and device of the model's first floating parameter.

    Where the model has embeddings and does not run on these, whole numbers that all its tables have take the
    place of those with which it runs.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]

    def random(shape: Shape, whole: bool) -> Any:
        if isinstance(shape, list):
            return [random(one, whole) for one in shape]
        try:
            if whole:
                return torch.randint(min(tables), shape, device=like.device)
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        except (RuntimeError, TypeError, ValueError) as error:  # larger than memory, or than an integer
            sizes = ",".join(map(str, shape))
            raise ExampleInputsError(
                f"cannot make an input of --input-shape {sizes}: {first_line(error)}; give smaller sizes"
            ) from error

    kinds = [tuple(False for _ in shapes)]
    if tables and len(shapes) <= _MOST_KINDS:
        kinds = list(itertools.product((False, True), repeat=len(shapes)))
    for kind in kinds:
        inputs = tuple(random(shape, whole) for shape, whole in zip(shapes, kind, strict=True))
        if kind is kinds[0]:
            first = inputs
        if len(kinds) == 1 or _runs(model, inputs):
            return inputs
    return first


_MOST_KINDS = 4
"""Inputs of which each may be of either kind."""


def check_runs(loaded: Loaded) -> None:
    """Run the model once, for commands that do so without having analysed it.

    Raises:
        ExampleInputsError: it fails.
    """
    args, kwargs = normalize(loaded.inputs)
    try:
        with torch.no_grad():
            loaded.model(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises
        raise ExampleInputsError(
            f"{type(loaded.model).__name__} does not run on its inputs ({shapes_of(args, kwargs)}: "
            f"{loaded.inputs_from}): {blame(error)}{told(error)}"
        ) from error


def _runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        return False
    return True


# torchvision


def _torchvision_model(name: str, weights: str | None) -> tuple[nn.Module, Shape | None]:
    """Build one of torchvision's models; also gives the inputs of a classifier or detector, else None."""
    from torchvision import models

    known = models.list_models()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=4)
        advice = f"did you mean {' or '.join(close)}?" if close else f"it has {len(known)}, such as resnet18"
        raise ModelSpecError(f"torchvision has no model {name!r}; {advice}")
    choices = models.get_model_weights(name)
    if weights is not None and weights not in choices.__members__:
        raise ModelSpecError(
            f"torchvision:{name} has no weights {weights!r}; it has {', '.join(choices.__members__)}"
        )
    options: dict[str, Any] = {"weights": weights}
    builder = inspect.signature(models.get_model_builder(name)).parameters
    if weights is None and "weights_backbone" in builder:
        options["weights_backbone"] = None  # by default it downloads a backbone even for random weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet and Inception announce a change of initialisation
            model: nn.Module = models.get_model(name, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if weights is None:
            raise ModelSpecError(f"torchvision cannot build {name}: {first_line(error)}") from error
        raise ModelSpecError(
            f"cannot load the weights {weights} of torchvision:{name}: {first_line(error)}; check the "
            "network, or "
            "load a file with --checkpoint FILE"
        ) from error

    transforms = choices["DEFAULT"].transforms() if "DEFAULT" in choices.__members__ else None
    if weights is not None:
        transforms = choices[weights].transforms()
    if type(transforms).__name__ == "ObjectDetection":  # a list of images of any size
        return model, [(3, 480, 640)]
    crop = getattr(transforms, "crop_size", None)
    if type(transforms).__name__ != "ImageClassification" or not crop:
        return model, None
    # A model that is built for one size says so; its best weights may be for another (ViT-H/14).
    size = getattr(model, "image_size", crop[0])
    return model, (1, 3, size, size)


# timm and Hugging Face


def _timm_model(name: str, weights: str | None) -> tuple[nn.Module, Shape | None]:
    """Build one of timm's models; also gives the shape of its images."""
    try:
        import timm
    except ImportError as error:
        raise ModelSpecError("timm: models need the package timm: pip install timm") from error
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        close = difflib.get_close_matches(name.lower(), known, n=4)
        advice = f"did you mean {' or '.join(close)}?" if close else f"it has {len(known)}, such as resnet18"
        raise ModelSpecError(f"timm has no model {name!r}; {advice}")
    tagged = name if weights in (None, "DEFAULT") else f"{name}.{weights}"
    try:
        model: nn.Module = timm.create_model(tagged, pretrained=weights is not None)
    except Exception as error:
        raise ModelSpecError(
            f"timm cannot build {tagged}: {first_line(error)}; check the network and the name of the "
            "weights, or "
            "load a file with --checkpoint FILE"
        ) from error
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    return model, (1, *size) if size else None


def _hugging_face_model(folder: Path) -> tuple[nn.Module, Any]:
    """Build the model that a folder of Hugging Face describes, with its weights where they are in there.

    The class is the one that the configuration names, and must be one of the installed transformers: no
    code of the folder is run.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelSpecError("hf: models need the package transformers: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        names = [name for name in config.architectures or () if hasattr(transformers, name)]
        kind: Any = getattr(transformers, names[0]) if names else transformers.AutoModel
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            model: Any = kind.from_pretrained(folder, local_files_only=True)
        elif names:
            model = kind(config)
        else:
            model = kind.from_config(config)
    except Exception as error:
        raise ModelSpecError(f"transformers cannot build {folder}: {first_line(error)}") from error
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # what a cache would hold is no result
    return model, _dummy_inputs(model)


def _dummy_inputs(model: nn.Module) -> Any:
    """Inputs of a Hugging Face model, of the kind that its main input says; None for other kinds."""
    config: Any = model.config
    main = getattr(model, "main_input_name", "")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        sizes = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn((1, channels, *sizes), dtype=like.dtype, device=like.device)}
    if main == "input_ids" and hasattr(config, "vocab_size"):
        ids = torch.randint(0, config.vocab_size, (1, 16), device=like.device)
        inputs = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :8]
        return inputs
    return None


def load_criterion(spec: str | None, data: Any) -> Any:
    """A criterion by name, with the data that it needs, or what ``package.module:name`` is.

    Raises:
        ModelSpecError: there is no such criterion.
    """
    if spec is None or ":" not in spec:
        found = {"activation": importance.Activation, "wanda": importance.Wanda}.get(spec or "")
        return spec if found is None else found(data)
    kind, _, name = spec.rpartition(":")
    target = _target(_import(kind), kind, name)
    if isinstance(target, importance.Criterion) or (callable(target) and _required(target)):
        return target
    return _call(target, spec, "give a criterion")


def load_data(spec: str, loaded: Loaded) -> Any:
    """Inputs for calibration, from a file of tensors or from ``package.module:loader``.

    Args:
        spec: the file or the loader.
        loaded: the model, which is run on the first batch.

    Raises:
        CheckpointError: a file that cannot be read, or holds no tensors.
        ModelSpecError: there is no such loader, or the model does not take what it gives.
    """
    data = _data(spec)
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, dict, str)):
        raise ModelSpecError(
            f"{spec} gave a value of type {type(data).__name__}; it should be a list of batches, a data "
            "loader, or a function without arguments that returns one"
        )
    batch = next(iter(data), None) if not isinstance(data, Iterator) else None
    if batch is not None:
        try:
            with torch.no_grad():
                run(loaded.model, batch)
        except (FxpruneError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ModelSpecError(
                f"the model does not take the first batch that --calibrate {spec} gives, a {kind_of(batch)}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
    return data


def _data(spec: str) -> Any:
    path = Path(spec)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        found = [tensor for tensor in read_tensors(path).values() if tensor.dim()]
        if not found:
            raise CheckpointError(f"--calibrate {path} holds single numbers alone; give tensors of inputs")
        return [tuple(found)] if len(found) > 1 else [found[0]]
    kind, colon, name = spec.rpartition(":")
    if not (colon and kind and name):
        raise ModelSpecError(
            f"cannot read --calibrate {spec!r}: write FILE.pt, FILE.safetensors or package.module:loader"
        )
    target = _target(_import(kind), kind, name)
    return _call(target, spec, "give batches") if callable(target) else target


# package.module:factory


def _factory_model(module: ModuleType, module_name: str, path: str) -> tuple[nn.Module, Any]:
    """Call ``path`` of the module; also gives the module's own example inputs, or None."""
    target = _target(module, module_name, path)
    spec = f"{module_name}:{path}"
    model = target if isinstance(target, nn.Module) else _call(target, spec, "make a model")
    if not isinstance(model, nn.Module):
        raise ModelSpecError(
            f"{spec} gave a value of type {type(model).__name__}, not a torch.nn.Module; name a function "
            "without arguments that returns a module, a module class, or a module"
        )
    inputs = getattr(module, "example_inputs", None)
    if inputs is not None and callable(inputs):
        inputs = _call(inputs, f"{module_name}:example_inputs", "make example inputs")
    if inputs is not None and not isinstance(inputs, (Tensor, tuple, dict)):
        raise ExampleInputsError(
            f"{module_name}:example_inputs is a {type(inputs).__name__}; it should be a tensor, a tuple of "
            "positional inputs, a dict of keyword inputs, or a function that returns one of these"
        )
    return model, inputs


def _target(module: ModuleType, module_name: str, path: str) -> Any:
    """What a dotted path in a module leads to."""
    target: Any = module
    for attribute in path.split("."):
        if not hasattr(target, attribute):
            names = [n for n, v in vars(target).items() if callable(v) and not n.startswith("_")]
            close = difflib.get_close_matches(attribute, names, n=3) or sorted(names)[:5]
            raise ModelSpecError(
                f"{module_name} ({_file(module)}) has no {path!r}"
                + (f"; it has {', '.join(close)}" if close else "")
            )
        target = getattr(target, attribute)
    return target


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module; its folder comes first, as with ``python file.py``."""
    if not path.is_file():
        raise ModelSpecError(f"there is no file {path}")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(path.stem, module)  # classes in it are found by name
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # as a script without `if __name__ == "__main__":` does
        raise ModelSpecError(f"running {path} failed: {type(error).__name__}: {first_line(error)}") from error
    return module


def _import(name: str) -> ModuleType:
    """Import a module, or run a file; the current directory comes first, as with ``python -m``."""
    if name.endswith(".py"):
        return _import_file(Path(name))
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise ModelSpecError(
                f"there is no module {missing!r} (looked in {here} and in the Python environment); run "
                "fxprune where `import` finds it, or write torchvision:NAME"
            ) from error
        raise ModelSpecError(f"importing {name} failed: {first_line(error)}; install it first") from error
    except (Exception, SystemExit) as error:
        raise ModelSpecError(
            f"importing {name} failed: {type(error).__name__}: {first_line(error)}"
        ) from error


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _call(target: Any, spec: str, purpose: str) -> Any:
    if not callable(target):
        raise ModelSpecError(f"{spec} is a {type(target).__name__}, which cannot {purpose}; name a function")
    if required := _required(target):
        raise ModelSpecError(
            f"{spec} needs arguments ({', '.join(required)}), and fxprune calls it without any; name a "
            "function without required arguments"
        )
    try:
        return target()
    except (Exception, SystemExit) as error:
        raise ModelSpecError(
            f"{spec} failed to {purpose}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _file(module: ModuleType) -> str:
    """Where a module comes from; a folder without code is a module, too."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "built in")
