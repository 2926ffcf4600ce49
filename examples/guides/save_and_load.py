"""Save a pruned network and load it elsewhere: without pickle, without the original weights.

pip install fxprune
python examples/guides/save_and_load.py
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
pruned = fxprune.prune(model, x, ratio=0.5)

with TemporaryDirectory() as folder:
    file = Path(folder) / "narrow.safetensors"
    fxprune.save(pruned, file)  # weights, plan, form and versions in one file

    # 1. With the class: a fresh network without weights is narrowed and filled.
    again = fxprune.load(Net, file)
    assert torch.equal(again(x), pruned(x))

    # 2. Trained further, and saved again: the plan travels with the network.
    with torch.no_grad():
        again.get_parameter("head.bias").add_(1)
    fxprune.save(again, file)
    assert torch.equal(fxprune.load(Net, file)(x), again(x))

# 3. Other checkpoints of the same network, as plain dicts.
plan = fxprune.plan(model, x, ratio=0.5)
narrow = plan.apply(model)
narrow.load_state_dict(plan.apply_state_dict(Net().state_dict()))

# 4. The plan alone is readable text; a copy of the model on the meta device is enough to use it.
loaded = fxprune.PruningPlan.from_json(plan.to_json())
with torch.device("meta"):
    shapes = Net()
assert loaded.apply_state_dict(model.state_dict(), shapes)["head.weight"].shape == (10, 12)
