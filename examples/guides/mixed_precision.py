"""Fine-tune a pruned network with mixed precision, and keep the state of its optimiser.

pip install fxprune
python examples/guides/mixed_precision.py
"""

import torch
import torchvision
from torch import nn

import fxprune

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.randn(4, 3, 32, 32)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
labels = torch.tensor([0, 1, 2, 3])


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    # On a GPU: device_type="cuda", float16, and torch.amp.GradScaler around the step, as for any network.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(network(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


model.train()
for _ in range(3):
    step(model, optimizer)

# Weights stay in float32; momentum and variance are narrowed as the weights are.
plan = fxprune.plan(model, x, ratio=0.5)
pruned = plan.apply(model)
narrowed = plan.apply_to_optimizer(optimizer, model, pruned)
losses = [step(pruned, narrowed) for _ in range(20)]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
assert {p.dtype for p in pruned.parameters()} == {torch.float32}
