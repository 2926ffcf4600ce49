"""The options that several commands share. Nothing here needs torch, so that ``--help`` comes at once."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import ExampleInputsError, ModelSpecError

CRITERIA = ("l1", "l2", "random", "bn_scale", "lamp", "fpgm", "synflow")
"""Criteria that need nothing but weights; a test compares this with ``fxprune.importance.BUILT_IN``."""

WITH_DATA = ("activation", "wanda")
"""Criteria that need inputs, which ``--calibrate`` gives."""

WITH_LOSS = ("taylor", "fisher", "hessian", "kfac", "snip")
"""Criteria that need a loss, too, and so a line of Python."""

BUDGETS = (
    ("--params", "KEEP", "budget: parameters to keep, a share such as 0.5 or a number such as 5e6"),
    ("--macs", "KEEP", "budget: multiply-accumulates to keep, a share such as 0.5 or a number such as 2e9"),
    ("--size-mb", "MB", "budget: size of the weights in units of 10^6 bytes; all budgets given are met"),
    (
        "--latency",
        "KEEP",
        "budget: time of a forward pass to keep, a share such as 0.6 or milliseconds from 1 on",
    ),
)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what says which model to load, and on which inputs to run it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, hf:FOLDER (of Hugging Face), package.module:factory or "
        "file.py:factory, where factory is a function without arguments that returns the model, a module "
        "class, "
        "or a module",
    )
    source = parser.add_argument_group("weights and inputs")
    weights = source.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", metavar="NAME", help="pretrained weights of a torchvision or timm model, such as DEFAULT"
    )
    weights.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=existing,
        help="state dict to load: .safetensors, or .pt (read without running any code in it)",
    )
    source.add_argument(
        "--input-shape",
        metavar="SIZES",
        action="append",
        default=[],
        help="shape of an input, such as 1,3,224,224, or '[3,480,640; 3,320,320]' for a list of two tensors; "
        "once for each input, in order (default: a torchvision classifier's own image size, an image for a "
        "detector, or what the factory's module defines as example_inputs)",
    )
    source.add_argument(
        "--free-output",
        metavar="NAME",
        action="append",
        default=[],
        help="an output that may become narrower: encoder_last_hidden_state, hidden_states.*, 1 in a tuple, "
        "output where there is but one, auto for those that keep several layers wide; may be repeated "
        "(default: all keep their widths)",
    )
    source.add_argument(
        "--fill-output",
        metavar="NAME",
        action="append",
        help="an output that keeps its shape and holds zeros in place of what is removed; 'none' for none; "
        "may be repeated (default: auto, what is returned beside the result and keeps several layers wide, "
        "such as encoder_last_hidden_state)",
    )
    source.add_argument(
        "--seed", type=_seed, default=0, help="of random weights, inputs and scores (default: 0)"
    )


_SHAPE_HINT = (
    "write the sizes with commas, for example --input-shape 1,3,224,224; for an input that is a list of "
    "tensors --input-shape '[3,480,640; 3,320,320]'"
)
Shape = tuple[int, ...] | list[tuple[int, ...]]
"""Sizes of a tensor, or of each tensor in a list."""


def _number(kind: Callable[[str], float], fits: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """Reads a number and asks whether it fits, as the ``type`` of an option."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return read


_share = _number(float, lambda value: 0 <= value < 1, "a share: 0 <= share < 1, such as 0.5")
_largest = _number(float, lambda value: 0 < value <= 1, "a largest share: 0 < share <= 1, such as 0.9")
_amount = _number(float, lambda value: 0 < value < math.inf, "an amount to keep, larger than 0")
_positive = _number(int, lambda value: value >= 1, "a whole number from 1 on")
_some = _number(int, lambda value: value >= 0, "a whole number from 0 on")
_seed = _number(int, lambda value: 0 <= value < 2**63, "a whole number, 0 <= seed < 2**63")


def existing(text: str) -> Path:
    """The path of a file that is read, as the ``type`` of an option."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def _data(text: str) -> str:
    """Where inputs for calibration come from; a file has to be there."""
    return text if ":" in text else str(existing(text))


def check_source(options: argparse.Namespace) -> None:
    """Read what :func:`add_source` has added, before anything is imported for it.

    Raises:
        ModelSpecError, ExampleInputsError: as :func:`parse_model` and :func:`parse_shape`.
    """
    parse_model(options.model, options.weights)
    for text in options.input_shape:
        parse_shape(text)


def parse_model(spec: str, weights: str | None = None) -> tuple[str, str]:
    """The two halves of ``MODEL``: ``torchvision`` and a name, a module or a file and a factory.

    Raises:
        ModelSpecError: it does not have two, there are no such ``weights`` for its kind, or there is no such
            file or folder.
    """
    kind, colon, name = spec.partition(":")
    if ".py:" in spec:  # a path may hold colons
        kind, colon, name = spec.rpartition(":")
    if not (colon and kind and name):
        raise ModelSpecError(
            f"cannot read the model name {spec!r}: write torchvision:NAME, for example torchvision:resnet18, "
            "timm:NAME, hf:FOLDER, package.module:factory, for example mynets.resnet:build, or "
            "file.py:factory"
        )
    if weights is not None and kind not in ("torchvision", "timm"):
        raise ModelSpecError(
            f"--weights {weights} is for torchvision: and timm: models only; {spec} gets its weights from "
            "its own factory or from --checkpoint FILE"
        )
    if kind == "hf" and not (Path(name) / "config.json").is_file():
        raise ModelSpecError(
            f"there is no {Path(name) / 'config.json'}; hf: takes a folder on the disk, as save_pretrained "
            "writes it"
        )
    if kind.endswith(".py") and not Path(kind).is_file():
        raise ModelSpecError(f"there is no file {kind}")
    return kind, name


def parse_shape(text: str) -> Shape:
    """Read sizes such as ``1,3,224,224`` or ``1x3x224x224``, in brackets those of a list of tensors.

    Raises:
        ExampleInputsError: the text is something else, or a size is not positive.
    """
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        return [_parse_sizes(part, text) for part in inner[1:-1].split(";")]
    return _parse_sizes(text, text)


def _parse_sizes(part: str, text: str) -> tuple[int, ...]:
    words = part.lower().replace("x", ",").split(",")
    try:
        shape = tuple(int(word) for word in words)
    except ValueError:
        raise ExampleInputsError(f"cannot read --input-shape {text!r}: {_SHAPE_HINT}") from None
    if min(shape) < 1:
        raise ExampleInputsError(f"--input-shape {text!r} has a size below 1: {_SHAPE_HINT}")
    return shape


def fill_outputs(options: argparse.Namespace) -> list[str]:
    """The outputs that ``--fill-output`` names."""
    given: list[str] | None = options.fill_output
    return ["auto"] if given is None else [] if given == ["none"] else given


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add what says how much of a network goes, and from where."""
    pruning = parser.add_argument_group("what to remove")
    pruning.add_argument(
        "--ratio",
        type=_share,
        help="share of the units of every group to remove, 0 <= RATIO < 1 (default: 0.5, which leaves about "
        "a quarter of the parameters; no default where a budget is given)",
    )
    pruning.add_argument(
        "--lossless",
        action="store_true",
        help="remove only channels that do no work, such as those that masks or sparse training have set to "
        "zero; the result stays the same",
    )
    for flag, metavar, what in BUDGETS:
        pruning.add_argument(flag, metavar=metavar, type=_amount, help=what)
    pruning.add_argument(
        "--compiled", action="store_true", help="hold the latency under torch.compile (default: eager)"
    )
    ranking = pruning.add_mutually_exclusive_group()
    ranking.add_argument(
        "--global",
        dest="scope",
        action="store_const",
        const="global",
        default="auto",
        help="rank all units of the network together, so that layers that matter less lose more (default: "
        "every group loses the same share; with --calibrate and a budget, what is best on held-out data)",
    )
    ranking.add_argument(
        "--isomorphic",
        dest="scope",
        action="store_const",
        const="isomorphic",
        help="rank together only the groups that are built alike: the hidden layers of all blocks, say",
    )
    pruning.add_argument(
        "--round-to",
        metavar="N",
        type=_positive,
        help="leave a multiple of N units in every row; most hardware is fastest at multiples of 8",
    )
    pruning.add_argument(
        "--max-ratio",
        type=_largest,
        default=1.0,
        help="largest share that any group may lose, whatever its scores (default: 1, all but one unit)",
    )
    pruning.add_argument(
        "--keep",
        metavar="NAME",
        action="append",
        default=[],
        help="leave the output of this layer as wide as it is; layer1, layer1.*.conv2; may be repeated",
    )
    pruning.add_argument(
        "--heads",
        type=_share,
        default=0.0,
        help="share of whole attention heads (and of groups of grouped convolutions and group norms) to "
        "remove, 0 <= HEADS < 1; what remains is narrowed as all else (default: 0)",
    )
    pruning.add_argument(
        "--branch",
        metavar="NAME",
        action="append",
        default=[],
        help="remove this residual branch as a whole; fxprune inspect names those that can go; repeatable",
    )
    pruning.add_argument(
        "--depth",
        metavar="N",
        nargs="?",
        type=_some,
        const=True,
        help="with --calibrate and a budget, let whole residual branches go where that costs the outputs "
        "less than narrower layers, N of them at most; 0 for none (default: for a latency only)",
    )
    pruning.add_argument(
        "--into",
        choices=["graph", "module"],
        default="graph",
        help="form of the result: a graph, in which every number can be rewritten (default), or the model's "
        "own class with its own methods, in which what its code says stays",
    )
    pruning.add_argument(
        "--importance",
        metavar="CRITERION",
        type=_criterion,
        help=f"which units go first: those with the least by {', '.join(CRITERIA)}, with --calibrate also "
        f"by {', '.join(WITH_DATA)}, or by any criterion of fxprune.importance or function of a group: "
        "package.module:name or file.py:name (default: l2; with --calibrate what its data say)",
    )
    pruning.add_argument(
        "--exact-only",
        action="store_true",
        help="prune only where the result is exact: no normalisation or mean runs over the narrowed axis",
    )
    pruning.add_argument(
        "--calibrate",
        metavar="DATA",
        type=_data,
        help="inputs without labels, by which units are chosen and the layers that are left make up for what "
        "went: FILE.pt or FILE.safetensors with a tensor of inputs, or package.module:loader",
    )


def _criterion(text: str) -> str:
    """The name of a criterion, or where it is found."""
    if ":" in text or text in (*CRITERIA, *WITH_DATA):
        return text
    if text in WITH_LOSS:
        raise argparse.ArgumentTypeError(
            f"{text} needs a loss: write a file.py with criterion = fxprune.importance.NAME(loss, batches), "
            "and give file.py:criterion"
        )
    close = difflib.get_close_matches(text, (*CRITERIA, *WITH_DATA, *WITH_LOSS), n=1)
    nearest = f"; did you mean {close[0]}?" if close else ""
    known = ", ".join((*CRITERIA, *WITH_DATA))
    raise argparse.ArgumentTypeError(
        f"there is no criterion {text!r}, but {known}, package.module:name and file.py:name{nearest}"
    )


def given(options: argparse.Namespace) -> list[str]:
    """The options that say what to remove, as far as they are not left at what they are without."""
    parser = argparse.ArgumentParser()
    add_selection(parser)
    flags = {
        name: f"--{getattr(options, name) if name == 'scope' else name.replace('_', '-')}"
        for name, value in vars(parser.parse_args([])).items()
        if getattr(options, name) != value
    }
    return list(flags.values())


def add_results(parser: argparse.ArgumentParser, what: str) -> argparse._ArgumentGroup:
    """Add where results go, and how much is said."""
    result = parser.add_argument_group("result")
    result.add_argument("--out", metavar="FILE", type=Path, action="append", default=[], help=what)
    add_output(result)
    return result


def add_output(parser: argparse._ActionsContainer) -> None:
    """Add how much is said, and how."""
    parser.add_argument("--json", action="store_true", help="plain data on stdout in place of tables")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
