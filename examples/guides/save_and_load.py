"""Save a pruned network and load it elsewhere: without pickle, without the original weights.

pip install fxprune
python examples/guides/save_and_load.py
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision

import fxprune

torch.manual_seed(0)
factory = partial(torchvision.models.resnet18, num_classes=10)
model = factory().eval()
x = torch.randn(4, 3, 32, 32)
pruned = fxprune.prune(model, x, ratio=0.5)

with TemporaryDirectory() as folder:
    file = Path(folder) / "narrow.safetensors"
    fxprune.save(pruned, file)  # weights, plan, form and versions in one file

    # 1. With the class: a fresh network without weights is narrowed and filled.
    again = fxprune.load(factory, file)
    assert torch.equal(again(x), pruned(x))

    # 2. Trained further, and saved again: the plan travels with the network.
    with torch.no_grad():
        again.get_parameter("fc.bias").add_(1)
    fxprune.save(again, file)
    assert torch.equal(fxprune.load(factory, file)(x), again(x))

# 3. Other checkpoints of the same network, as plain dicts.
plan = fxprune.plan(model, x, ratio=0.5)
narrow = plan.apply(model)
narrow.load_state_dict(plan.apply_state_dict(factory().state_dict()))

# 4. The plan alone is readable text; a copy of the model on the meta device is enough to use it.
loaded = fxprune.PruningPlan.from_json(plan.to_json())
with torch.device("meta"):
    shapes = factory()
assert loaded.apply_state_dict(model.state_dict(), shapes)["fc.weight"].shape == (10, 256)
