"""Compile and prune in one step: the backend fxprune of torch.compile.

pip install fxprune
python examples/guides/compile.py
"""

import torch
from torch import nn

import fxprune
from fxprune.backend import backend, parameters, state_dict


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

# Where fxprune is installed, backend="fxprune" does, without any import.
# "inner" compiles the narrow graph; "inductor" unless given. All arguments of fxprune.plan are options.
fast = torch.compile(model, backend=backend, options={"ratio": 0.5, "importance": "l1", "inner": "eager"})
with torch.no_grad():
    y = fast(x)
    # Another batch size is compiled again, and loses the same channels.
    torch.testing.assert_close(fast(x[:2]), y[:2], rtol=1e-4, atol=1e-5)

# The narrow weights, under all the names of the model; and the ones to train.
assert state_dict(fast)["head.weight"].shape == (10, 12)
print(sum(p.numel() for p in parameters(fast)), "of", sum(p.numel() for p in model.parameters()))

# A plan that was made with data, or read from a file, in place of a ratio.
plan = fxprune.plan(model, x, ratio=0.25)
planned = torch.compile(Net().eval(), backend=backend, options={"plan": plan, "inner": "eager"})
planned(x)
