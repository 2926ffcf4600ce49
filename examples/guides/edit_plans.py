"""A plan is data: print it, edit it, compare it, check it, apply it.

pip install fxprune
python examples/guides/edit_plans.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision

import fxprune

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.randn(4, 3, 32, 32)
plan = fxprune.plan(model, x, ratio=0.5)
print(plan)  # ends with parameters and multiply-accumulates before and after

# 1. Leave a group whole, or choose the channels yourself.
gentler = plan.without("layer1.0.conv1.weight[0]")
own = plan.with_removed({"layer4.0.conv1.weight[0]": [0, 1, 2]})
print(plan.diff(own))
assert own.apply(model).get_parameter("layer4.0.conv1.weight").shape[0] == 509
assert gentler.apply(model).get_parameter("layer1.0.conv1.weight").shape[0] == 64

# 2. What an edit breaks is said before anything is built.
for problem in plan.with_removed({"layer4.0.conv1.weight[0]": range(512)}).check(model):
    print(problem)

# 3. Where is one group tied to which others? And what goes with one channel?
graph = fxprune.analyze(model, x)
print(graph.explain("layer4.0.conv1.weight", 0))

# 4. As a file, it is text that people can read.
with TemporaryDirectory() as folder:
    plan.save(Path(folder) / "plan.json")
    assert fxprune.PruningPlan.load(Path(folder) / "plan.json") == plan
