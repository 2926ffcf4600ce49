"""Prune to a budget: parameters, multiply-accumulates, bytes or milliseconds.

pip install fxprune
python examples/guides/budgets.py
"""

import torch
import torchvision

import fxprune

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.randn(4, 3, 32, 32)

# A number up to 1 is the share to keep, a larger one an amount; all that is given holds.
budget = fxprune.Budget(macs=0.5, params=4_000_000)
plan = fxprune.plan(model, x, budget=budget)
print(plan)
pruned = plan.apply(model)
before, after = fxprune.count(model, x), fxprune.count(pruned, x)
print(f"parameters {before.params} -> {after.params}, MACs {before.macs} -> {after.macs}")
assert after.macs <= 0.5 * before.macs
assert after.params <= 4_000_000

# The file size, in megabytes. (latency=0.6 measures on the device of the model; it takes longer.)
small = fxprune.prune(model, x, budget=fxprune.Budget(size_mb=10))
assert sum(t.numel() * t.element_size() for t in small.state_dict().values()) <= 10_000_000
