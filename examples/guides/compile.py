"""Compile and prune in one step: the backend fxprune of torch.compile.

pip install fxprune
python examples/guides/compile.py
"""

import torch
import torchvision

import fxprune
from fxprune.backend import backend, parameters, state_dict

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.randn(4, 3, 32, 32)

# Where fxprune is installed, backend="fxprune" does, without any import.
# "inner" compiles the narrow graph; "inductor" unless given. All arguments of fxprune.plan are options.
fast = torch.compile(model, backend=backend, options={"ratio": 0.5, "importance": "l1", "inner": "eager"})
with torch.no_grad():
    y = fast(x)
    # Another batch size is compiled again, and loses the same channels.
    torch.testing.assert_close(fast(x[:2]), y[:2], rtol=1e-4, atol=1e-5)

# The narrow weights, under all the names of the model; and the ones to train.
assert state_dict(fast)["fc.weight"].shape == (10, 256)
print(sum(p.numel() for p in parameters(fast)), "of", sum(p.numel() for p in model.parameters()))

# A plan that was made with data, or read from a file, in place of a ratio.
plan = fxprune.plan(model, x, ratio=0.25)
planned = torch.compile(model, backend=backend, options={"plan": plan, "inner": "eager"})
planned(x)
