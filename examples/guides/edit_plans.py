"""A plan is data: print it, edit it, compare it, check it, apply it.

pip install fxprune
python examples/guides/edit_plans.py
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
plan = fxprune.plan(model, x, ratio=0.5)
print(plan)  # ends with parameters and multiply-accumulates before and after

# 1. Leave a group whole, or choose the channels yourself.
gentler = plan.without("body.0.weight[0]")
own = plan.with_removed({"body.3.weight[0]": [0, 1, 2]})
print(plan.diff(own))
assert own.apply(model).get_parameter("head.weight").shape == (10, 21)
assert gentler.apply(model).get_parameter("body.0.weight").shape[0] == 16

# 2. What an edit breaks is said before anything is built.
for problem in plan.with_removed({"body.3.weight[0]": range(24)}).check(model):
    print(problem)

# 3. Where is one group tied to which others? And what goes with one channel?
graph = fxprune.analyze(model, x)
print(graph.explain("body.3.weight", 0))
