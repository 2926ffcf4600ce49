"""Prune to a budget: parameters, multiply-accumulates, bytes or milliseconds.

pip install fxprune
python examples/guides/budgets.py
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

# A number up to 1 is the share to keep, a larger one an amount; all that is given holds.
budget = fxprune.Budget(macs=0.5, params=3000)
plan = fxprune.plan(model, x, budget=budget)
print(plan)
pruned = plan.apply(model)
before, after = fxprune.count(model, x), fxprune.count(pruned, x)
print(f"parameters {before.params} -> {after.params}, MACs {before.macs} -> {after.macs}")
assert after.macs <= 0.5 * before.macs
assert after.params <= 3000

# The file size, in megabytes. (latency=0.6 measures on the device of the model; it takes longer.)
small = fxprune.prune(model, x, budget=fxprune.Budget(size_mb=0.01))
assert sum(t.numel() * t.element_size() for t in small.state_dict().values()) <= 10_000
