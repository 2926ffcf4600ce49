"""Write a pruned network as a program of torch.export or as ONNX; what is written is read back and compared.

pip install fxprune
python examples/guides/export.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
import torchvision

import fxprune

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.randn(4, 3, 32, 32)
pruned = fxprune.prune(model, x, ratio=0.5)

with TemporaryDirectory() as folder:
    # 1. For PyTorch, C++ included. It is for inference: fxprune.save writes what can be trained.
    written = fxprune.export(pruned, x, Path(folder) / "narrow.pt2")
    print(written.sizes)  # any batch, height, width
    program = torch.export.load(written.path).module()
    torch.testing.assert_close(program(x[:1]), pruned(x[:1]))

    # 2. ONNX, which takes any batch and images of any size, too.
    written = fxprune.export(pruned, x, Path(folder) / "narrow.onnx")
    print(written.checked)  # equal in onnxruntime, at other sizes of the inputs, too
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        (got,) = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), pruned(x[:batch]).detach(), rtol=1e-4, atol=1e-4)
