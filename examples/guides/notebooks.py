"""In a notebook plans, groups and analyses show themselves; here the same HTML goes into files.

pip install fxprune
python examples/guides/notebooks.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision

import fxprune

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.randn(4, 3, 32, 32)
graph = fxprune.analyze(model, x)
plan = fxprune.plan(graph, ratio=0.5)

with TemporaryDirectory() as name:
    folder = Path(name)
    # In a notebook a cell that ends with `graph`, `plan` or `graph.groups[0]` shows this.
    for thing in (graph, plan, graph.groups[0]):
        (folder / f"{type(thing).__name__}.html").write_text(thing._repr_html_(), encoding="utf-8")
    graph.draw(folder / "groups.svg")  # the network, coloured by groups
    print(sorted(path.name for path in folder.iterdir()))
    assert "<svg" in (folder / "groups.svg").read_text(encoding="utf-8")
