"""Remove what masks have set to zero: after torch.nn.utils.prune, without any loss.

pip install fxprune
python examples/guides/lossless.py
"""

import torch
from torch import nn
from torch.nn.utils import prune as masks

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

# 1. A mask on whole channels, with training behind it: the masked channels stay zero.
masks.ln_structured(model.body[3], "weight", amount=0.5, n=2, dim=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# 2. What they still add (a bias, through the ReLU) goes into the next layer's bias.
smaller = fxprune.lossless(model, x)
with torch.no_grad():
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)
assert smaller.get_parameter("head.weight").shape == (10, 12)

# 3. Dead channels that had to stay are named, with the reason.
plan = smaller.meta["fxprune"]
print(plan)
