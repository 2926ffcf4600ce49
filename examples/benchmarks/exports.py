"""Write pruned networks of different families as ``.pt2`` and ONNX, run the files, and compare the outputs.

    python examples/benchmarks/exports.py --table

Each network is made with random weights, half of its channels are removed, and :func:`fxprune.export` writes
the rest. The file is then run with batches of 1 and 4; the largest difference is a share of the
largest entry of the output. Families whose library is not installed are left out.
"""

import argparse
import time
from collections.abc import Callable
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


def difference(wanted: Any, got: Any) -> float:
    """The largest difference of two trees of tensors, as a share of the largest entry of each."""
    ones, others = (
        [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in (wanted, got)
    )
    assert len(ones) == len(others), f"{len(ones)} outputs were expected, {len(others)} came"
    return max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in zip(ones, others, strict=True)
    )


def one(family: str, folder: Path, batches: tuple[int, ...] = (1, 4)) -> dict[str, str]:
    """What becomes of one family, by kind of file."""
    torch.manual_seed(0)
    model, x = FAMILIES[family]()
    pruned = fxprune.prune(model.eval(), x, ratio=0.5).eval()
    found = {}
    for kind in (".pt2", ".onnx"):
        start = time.perf_counter()
        try:
            written = fxprune.export(pruned, x, folder / f"file{kind}")
        except FxpruneError as error:
            found[kind] = str(error).splitlines()[0]
            continue
        run = runner(written.path)
        worst = 0.0
        sizes = batches if written.batch == "any batch size" else (len(x),)
        with torch.no_grad():
            for batch in sizes:
                given = x[:1].repeat(batch, *[1] * (x.dim() - 1))
                wanted = pytree.tree_leaves(pruned(given))
                worst = max(worst, difference([t for t in wanted if isinstance(t, torch.Tensor)], run(given)))
        found[kind] = f"{worst:.0e}, batch {sizes}, {time.perf_counter() - start:.0f} s"
    return found


def runner(path: Path) -> Callable[[torch.Tensor], Any]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all of them by default")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    rows = []
    for family in options.families or FAMILIES:
        with TemporaryDirectory() as folder:
            try:
                found = one(family, Path(folder))
            except ImportError as error:
                print(f"{family}: left out ({error})", flush=True)
                continue
        rows.append((family, found[".pt2"], found[".onnx"]))
        if not options.table:
            print(*rows[-1], sep="  ", flush=True)
    if options.table:
        print("| network | `.pt2` | ONNX |\n|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
