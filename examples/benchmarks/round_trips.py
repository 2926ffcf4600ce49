"""Saves pruned networks, and loads them in a fresh process that has no original weights: equal bit for bit?

    python examples/benchmarks/round_trips.py                      # all that are installed
    python examples/benchmarks/round_trips.py resnet50 swin_t      # some

A line for each network and form: the size of the file, and whether the outputs are the same.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune


def image(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name, weights=None)
        return model

    return make


def detector() -> nn.Module:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, intermediate_size=256)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 500}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=8, num_key_value_heads=2, use_cache=False, **sizes)
    )


def yolo() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False)


def inputs(name: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    if name in ("bert", "llama"):
        return {"input_ids": torch.randint(0, 500, (1, 12), generator=generator)}
    if name == "faster_rcnn":
        return ([torch.rand(3, 240, 320, generator=generator)],)
    side = 64 if name == "yolov8n" else 224
    return torch.randn(1, 3, side, side, generator=generator)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": image("resnet50"),
    "densenet121": image("densenet121"),
    "vit_b_16": image("vit_b_16"),
    "swin_t": image("swin_t"),
    "bert": bert,
    "llama": llama,
    "yolov8n": yolo,
    "faster_rcnn": detector,
}


def outputs(model: nn.Module, given: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = (
            model(**given)
            if isinstance(given, dict)
            else model(*(given if isinstance(given, tuple) else (given,)))
        )
    leaves = found.values() if isinstance(found, dict) else [found]
    return [leaf for value in leaves for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def save(name: str, into: str, folder: Path) -> int:
    torch.manual_seed(1)
    model = NETWORKS[name]().eval()
    pruned = fxprune.prune(model, inputs(name), 0.5, into=into).eval()
    torch.save(outputs(pruned, inputs(name)), folder / f"{name}.{into}.pt")
    return fxprune.save(pruned, folder / f"{name}.{into}.safetensors")


def load(name: str, into: str, folder: Path) -> None:
    wanted = torch.load(folder / f"{name}.{into}.pt", weights_only=True)
    torch.manual_seed(99)
    found = outputs(fxprune.load(NETWORKS[name], folder / f"{name}.{into}.safetensors"), inputs(name))
    same = len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    print("the same" if same else "DIFFERENT", flush=True)


def main() -> None:
    """Save here, load there."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
        return
    for name in sys.argv[1:] or NETWORKS:
        for into in ("graph", "module"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    size = save(name, into, Path(folder))
                    command = [sys.executable, __file__, "--load", name, into, folder]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    said = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
                    print(f"{name:<12} {into:<7} {size / 1e6:7.1f} MB  {said}", flush=True)
                except (ImportError, fxprune.FxpruneError) as error:
                    print(
                        f"{name:<12} {into:<7} {type(error).__name__}: {str(error).splitlines()[0][:90]}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
