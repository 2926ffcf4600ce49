"""A model with more than one way in: narrow it so that all of them go on working.

pip install fxprune
python examples/guides/several_calls.py
"""

import torch
from torch import nn

import fxprune


class Towers(nn.Module):
    """Images and texts, brought into one space."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 16))
        self.words = nn.Embedding(50, 24)
        self.text = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 16))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.image(image)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text(self.words(tokens).mean(1))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.encode_image(image) @ self.encode_text(tokens).T


def calls(count: int) -> fxprune.Calls:
    image, tokens = torch.randn(count, 12), torch.randint(50, (count, 7))
    return fxprune.Calls(model, [(image, tokens), ("encode_image", image), ("encode_text", tokens)])


torch.manual_seed(0)
model = Towers().eval()

# 1. Each call is its inputs, or the name of a method with them. What is removed fits all of them.
plan = fxprune.plan(model, calls(3), ratio=0.5, into="module")
small = plan.apply(model)
print(plan)
print(fxprune.verify(model, small, plan, calls(3)))

# 2. The result is of the model's own class, and the methods are its own.
assert type(small) is Towers
assert small.encode_text(torch.randint(50, (5, 7))).shape == (5, 16)
assert small.image[0].out_features == 32

# 3. Of one call alone, what only the others put out is not known to be an output, and is narrowed.
alone = fxprune.prune(model, (torch.randn(3, 12), torch.randint(50, (3, 7))), ratio=0.5, into="module")
print(
    "the space that is shared:",
    small.image[2].out_features,
    "wide; forward alone:",
    alone.image[2].out_features,
)
assert (small.image[2].out_features, alone.image[2].out_features) == (16, 8)
