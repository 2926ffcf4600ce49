"""In a notebook plans, groups and analyses show themselves; here the same HTML goes into files.

pip install fxprune
python examples/guides/notebooks.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import fxprune


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


torch.manual_seed(0)
model, x = Net().eval(), torch.randn(4, 3, 16, 16)
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
