"""Write pruned networks of different families as ``.pt2`` and ONNX, run the files, and compare the outputs.

    python examples/benchmarks/exports.py                # all families; writes EXPORTS.md
    python examples/benchmarks/exports.py YOLOv8n BERT   # some, without a file

Each network is made with random weights, half of its channels are removed, and :func:`fxprune.export` writes
the rest. The file is then run with batches of 1 and 4 and, where it says that other sizes are free, with
larger images or longer texts. The difference is the largest one as a share of the largest entry; beside it
stands the *rounding*: the same between the network in single and in double precision. Outputs must differ
between inputs, or equality would say nothing: statistics of batch normalisations are measured first, constant
parameters (scales, shifts, heads of zeros) become random, and the *spread* is the standard deviation over the
inputs of what the network gives, averaged over its entries, as a share of the largest. Families whose library
is not installed are left out.
"""

import argparse
import copy
import datetime
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import FxpruneError


class Lists(nn.Module):
    """A network whose outputs are a class of a library, as a tuple of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)[0]


def vision(name: str, size: int = 64) -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    return torchvision.models.get_model(name, num_classes=10), torch.randn(2, 3, size, size)


def timm_model(name: str, size: int = 64, **arguments: Any) -> tuple[nn.Module, torch.Tensor]:
    import timm

    return timm.create_model(name, num_classes=10, **arguments), torch.randn(2, 3, size, size)


def llama() -> tuple[nn.Module, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.randint(0, 100, (2, 12))


def bert() -> tuple[nn.Module, torch.Tensor]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    return BertModel(config), torch.randint(0, 100, (2, 12))


def unet() -> tuple[nn.Module, torch.Tensor]:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet("resnet18", encoder_weights=None), torch.randn(2, 3, 64, 64)


def yolo() -> tuple[nn.Module, torch.Tensor]:
    from ultralytics.nn.tasks import DetectionModel

    return Lists(DetectionModel("yolov8n.yaml", verbose=False)), torch.randn(2, 3, 64, 64)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "ResNet-18": lambda: vision("resnet18"),
    "VGG-11": lambda: vision("vgg11_bn"),
    "DenseNet-121": lambda: vision("densenet121"),
    "MobileNetV3-S": lambda: vision("mobilenet_v3_small"),
    "ShuffleNetV2": lambda: vision("shufflenet_v2_x0_5"),
    "SqueezeNet": lambda: vision("squeezenet1_1"),
    "EfficientNet-B0": lambda: vision("efficientnet_b0"),
    "RegNetY-400MF": lambda: vision("regnet_y_400mf"),
    "ConvNeXt-atto": lambda: timm_model("convnext_atto"),
    "ViT-tiny": lambda: timm_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "Swin-T": lambda: vision("swin_t"),
    "U-Net": unet,
    "YOLOv8n": yolo,
    "Llama (GQA)": llama,
    "BERT": bert,
}


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """In evaluation mode, with measured statistics, and no parameter that is constant."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            nn.init.uniform_(parameter, *((0.5, 1.5) if parameter.any() else (-0.2, 0.2)))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    for norm in norms:
        norm.train().momentum = None
    if norms:
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(8, *x.shape[1:]))
    return model.eval()


def spread(outputs: list[torch.Tensor]) -> float:
    """How far the entries lie apart for different inputs; the least over the outputs of a network."""
    return min(float(t.std(0).mean() / t.abs().max()) for t in outputs)


def difference(wanted: list[torch.Tensor], got: Any) -> float:
    """The largest difference of two lists of tensors, as a share of the largest entry of each."""
    others = [t for t in pytree.tree_leaves(got) if isinstance(t, torch.Tensor)]
    assert len(wanted) == len(others), f"{len(wanted)} outputs were expected, {len(others)} came"
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, others, strict=True))


def different(x: torch.Tensor, batch: int, size: int) -> torch.Tensor:
    """Inputs like ``x``: so many, of this height and width, or of this length."""
    torch.manual_seed(1)
    if x.is_floating_point():
        return torch.randn(batch, x.shape[1], size, size)
    return torch.randint(0, 100, (batch, size))


def one(family: str, folder: Path) -> tuple[str, ...]:
    """The row of a family: spread, sizes, rounding, and for each kind of file the largest difference."""
    torch.manual_seed(0)
    model, x = FAMILIES[family]()
    pruned = fxprune.prune(settled(model, x), x, ratio=0.5).eval()

    def run(given: torch.Tensor, network: nn.Module = pruned) -> list[torch.Tensor]:
        with torch.no_grad():
            found = pytree.tree_leaves(network(given))
        return [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()]

    example = x.shape[-1]
    given = different(x, 4, example)
    outputs = run(given)
    precise = run(given.double() if given.is_floating_point() else given, copy.deepcopy(pruned).double())
    found = [f"{difference(precise, outputs):.0e}"]
    for kind in (".pt2", ".onnx"):
        try:
            written = fxprune.export(pruned, x, folder / f"file{kind}")
        except FxpruneError as error:
            found.append(str(error).splitlines()[0])
            continue
        loaded = runner(written.path)
        sizes = [example]
        if "width" in written.sizes or "length" in written.sizes:
            sizes += [] if "as in" in written.sizes else [2 * example]
        batches = (1, 4) if "any batch" in written.sizes else (len(x),)
        worst = 0.0
        for size in sizes:
            for batch in batches:
                given = different(x, batch, size)
                with torch.no_grad():
                    worst = max(worst, difference(run(given), loaded(given)))
        found.append(f"{worst:.0e}")
    said = f"batch {' and '.join(map(str, batches))}; {' and '.join(map(str, sizes))}"
    return family, f"{spread(outputs):.1g}", written.sizes.split(" (")[0], said, *found


def runner(path: Path) -> Callable[[torch.Tensor], Any]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]


def heading() -> str:
    names = ("torch", "torchvision", "timm", "transformers", "onnxruntime", "ultralytics")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return (
        "# Exported networks\n\n"
        f"Written by `exports.py`, {datetime.date.today()}; Python {platform.python_version()}, {versions}. "
        "Random weights, ratio 0.5.\n"
        "`.pt2` and ONNX: the largest difference from the pruned network over all batches and sizes that "
        "were run, as a share of the\nlargest entry; `rounding`: the same between that network in single and "
        "in double precision; `spread`: how far entries lie\napart for other inputs (a standard deviation)"
        ", also as a share of the largest entry. Where a network without training\ngives nearly the same for "
        "all inputs, rounding is a large share of the spread already.\n\n"
        "| network | spread | sizes that the file takes | were run | rounding | `.pt2` | ONNX |\n"
        "|---|---|---|---|---|---|---|\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all of them by default")
    options = parser.parse_args()
    lines = []
    for family in options.families or FAMILIES:
        start = time.perf_counter()
        with TemporaryDirectory() as folder:
            try:
                row = one(family, Path(folder))
            except ImportError as error:
                print(f"{family}: left out ({error})", flush=True)
                continue
        lines.append(f"| {' | '.join(row)} |\n")
        print(lines[-1].strip(), f"({time.perf_counter() - start:.0f} s)", flush=True)
    if not options.families:
        Path(__file__).with_name("EXPORTS.md").write_text(heading() + "".join(lines))


if __name__ == "__main__":
    main()
