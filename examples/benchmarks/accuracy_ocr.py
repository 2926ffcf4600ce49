"""What is left of a trained text recogniser after pruning in one shot, without labels or training.

The network is PP-OCRv4's recogniser as the PyPI package rapidocr-onnxruntime 1.4.4 carries it (``pip download
--no-deps rapidocr-onnxruntime==1.4.4``, then unpack the wheel), which onnx2torch 1.5.15 turns into a module.
Lines of random letters are drawn with the fonts of matplotlib: 64 calibrate, 64 others measure::

    python examples/benchmarks/accuracy_ocr.py --model ch_PP-OCRv4_rec_infer.onnx

Accuracy is one less the edit distance between what is read and what was written, as a share of the characters
written; spaces do not count. It is below zero where more is read than was written.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnx
import torch
from onnx2torch import convert
from onnx2torch.node_converters import batch_norm
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import fxprune

LINES, BATCH, SIZE = 64, 16, (48, 320)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def network(path: Path) -> tuple[nn.Module, list[str]]:
    """The recogniser, ``(batch, 3, height, width)`` to ``(batch, time, characters)``, and the characters."""
    read = onnx.load(path)
    names = next(prop.value for prop in read.metadata_props if prop.key == "character")
    nodes = []
    for node in read.graph.node:  # the converter looks for weights among the initializers
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            read.graph.initializer.append(tensor)
        else:
            nodes.append(node)
    del read.graph.node[:]
    read.graph.node.extend(nodes)
    for dim, size in zip(read.graph.input[0].type.tensor_type.shape.dim, (BATCH, 3, *SIZE), strict=True):
        dim.dim_value = size
    batch_norm._BN_CLASS_FROM_SPATIAL_RANK[-2] = nn.BatchNorm2d  # of a value whose rank is not in the file
    return convert(onnx.shape_inference.infer_shapes(read)).eval(), ["", *names.splitlines(), " "]


def lines(seed: int) -> tuple[torch.Tensor, list[str]]:
    """Drawn lines, ``(lines, 3, height, width)`` from -1 to 1 with noise, and what they say."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    images, texts = [], []
    for _ in range(LINES):
        letters = string.ascii_letters + string.digits + "   .,"
        text = "".join(rng.choices(letters, k=rng.randint(8, 16))).strip()
        kind = rng.choice(["DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf"])
        paper, ink = 255 - rng.randint(0, 40), rng.randint(0, 80)
        image = Image.new("RGB", SIZE[::-1], (paper,) * 3)
        font = ImageFont.truetype(str(FONTS / kind), rng.randint(24, 32))
        ImageDraw.Draw(image).text((4, rng.randint(2, 10)), text, font=font, fill=(ink,) * 3)
        pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
        images.append((pixels + 0.05 * noise.standard_normal(pixels.shape)).transpose(2, 0, 1))
        texts.append(text.replace(" ", ""))
    return torch.from_numpy(np.stack(images)).float(), texts


def distance(one: str, other: str) -> int:
    """Characters that must be put in, taken out or changed."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        new = [i]
        for j, b in enumerate(other, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
        row = new
    return row[-1]


@torch.no_grad()
def accuracy(model: nn.Module, characters: list[str], images: torch.Tensor, texts: list[str]) -> float:
    """See the top of the file."""
    found: list[str] = []
    for batch in images.split(BATCH):
        for best in model(batch).argmax(-1):
            found.append("".join(characters[c] for c in torch.unique_consecutive(best)).replace(" ", ""))
    wrong = sum(distance(a, b) for a, b in zip(found, texts, strict=True))
    return 1 - wrong / sum(map(len, texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, characters = network(options.model)
    (data, _), test = lines(1), lines(2)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, one thread\n")
    print("| parameters kept | one call | L2 | seconds of the processor |\n|---|---|---|---|")
    print(f"| 1 | {accuracy(model, characters, *test):.3f} | | |")
    for kept in options.kept:
        settings: Any = {"budget": fxprune.Budget(params=kept)}
        start = time.process_time()
        ours = fxprune.prune(model, data[:1], **settings, calibrate=list(data.split(BATCH)))
        seconds = time.process_time() - start
        plain = fxprune.prune(model, data[:1], **settings)
        cells = [f"{accuracy(network, characters, *test):.3f}" for network in (ours, plain)]
        print(f"| {kept:g} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
