"""Keep the outputs near with some unlabelled inputs, and no training.

pip install fxprune
python examples/guides/calibration.py
"""

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
batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]

# 1. One call: the data choose what goes, and the layers that are left make up for it.
pruned = fxprune.prune(model, x, ratio=0.5, calibrate=batches)

# 2. The same in steps; a plan that was made otherwise can be compensated, too.
plan = fxprune.plan(model, x, ratio=0.5)
plain, better = plan.apply(model), fxprune.compensate(plan, model, batches)


def distance(network: nn.Module) -> float:
    with torch.no_grad():
        return float((network(x) - model(x)).norm() / model(x).norm())


print(f"relative distance: plain {distance(plain):.3f}, compensated {distance(better):.3f}")
assert distance(better) < distance(plain)
assert pruned.get_parameter("head.weight").shape == (10, 12)
