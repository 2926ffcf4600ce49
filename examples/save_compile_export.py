"""A pruned network goes where models go: files without code, plans, torch.compile, exported programs.

Run it as ``python examples/save_compile_export.py``; it writes into a temporary folder.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn.utils import prune as masks

import fxprune
from fxprune.backend import backend, state_dict


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
pruned = plan.apply(model)
print(plan)  # ends with parameters and multiply-accumulates before and after

with TemporaryDirectory() as name:
    folder = Path(name)

    # 1. Weights and plan in one file. Whoever has the class needs neither the original weights nor pickle.
    fxprune.save(pruned, folder / "narrow.safetensors")
    again = fxprune.load(Net, folder / "narrow.safetensors")
    assert torch.equal(again(x), pruned(x))

    # 2. The plan alone, as text: to be read, compared, edited, and applied to any copy of the network.
    plan.save(folder / "plan.json")
    gentler = fxprune.PruningPlan.load(folder / "plan.json").without("body.0.weight[0]")
    print(plan.diff(gentler))
    assert gentler.apply(model).get_parameter("body.0.weight").shape[0] == 16

    # 3. An exported program, for inference, with any batch size. "narrow.onnx" would write ONNX.
    written = fxprune.export(pruned, x, folder / "narrow.pt2")
    print(written.batch)
    program = torch.export.load(folder / "narrow.pt2").module()
    torch.testing.assert_close(program(x[:1]), pruned(x[:1]))

# 4. torch.compile; once fxprune is installed, backend="fxprune" does without any import.
options = {"ratio": 0.5, "inner": "eager"}  # "inner" compiles the narrow graph: "inductor" unless given
fast = torch.compile(model, backend=backend, options=options)
with torch.no_grad():
    torch.testing.assert_close(fast(x), pruned(x))
assert state_dict(fast).keys() == model.state_dict().keys()

# 5. Without any loss: channels that a mask has set to zero go, and the result stays the same.
masked = Net().eval()
masks.ln_structured(masked.body[3], "weight", amount=0.25, n=2, dim=0)
smaller = fxprune.lossless(masked, x)
with torch.no_grad():
    torch.testing.assert_close(smaller(x), masked(x), rtol=1e-4, atol=1e-5)
print("channels of the second convolution:", smaller.get_parameter("body.3.bias").shape[0], "of 24")
assert smaller.get_parameter("body.3.bias").shape[0] == 18
