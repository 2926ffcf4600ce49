"""Compile and prune in one step: the backend fxprune of torch.compile.

pip install fxprune
python examples/guides/compile.py
"""

import torch
import torchvision
from torch.nn.utils import prune

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

# Only what changes nothing. Masks of torch.nn.utils.prune are made final first: a weight that is computed
# from a mask in each call is no parameter, whose channels could go.
masked = torchvision.models.resnet18(num_classes=10).eval()
prune.ln_structured(masked.layer1[0].conv1, "weight", 0.5, n=2, dim=0)
prune.remove(masked.layer1[0].conv1, "weight")
masked.layer1[0].bn1.bias.data[masked.layer1[0].conv1.weight.flatten(1).eq(0).all(1)] = 0
lossless = torch.compile(masked, backend=backend, options={"mode": "lossless", "inner": "eager"})
with torch.no_grad():
    torch.testing.assert_close(lossless(x), masked(x), rtol=1e-4, atol=1e-5)
assert state_dict(lossless)["layer1.0.conv1.weight"].shape[0] == 32
