"""Write a pruned network as ONNX; it is run in onnxruntime and compared first.

pip install fxprune
python examples/guides/onnx.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from torch import nn

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
pruned = fxprune.prune(model, x, ratio=0.5)

with TemporaryDirectory() as folder:
    written = fxprune.export(pruned, x, Path(folder) / "narrow.onnx")
    print(written.batch, "-", written.checked)  # any batch size - equal in onnxruntime, with two batch sizes
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        (got,) = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), pruned(x[:batch]).detach(), rtol=1e-4, atol=1e-4)
