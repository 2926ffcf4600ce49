"""ultralytics: prune a YOLO in its own class, predict, train it with ultralytics' own trainer, export it.

    pip install fxprune ultralytics onnx onnxruntime
    python examples/guides/ultralytics_yolo.py
    python examples/guides/ultralytics_yolo.py yolo11n.yaml

A YOLOv8n (or what is named) with random weights and four small images stand for your own; no downloads.
"""

import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import fxprune

torch.manual_seed(0)
yolo = YOLO(sys.argv[1] if len(sys.argv) > 1 else "yolov8n.yaml", verbose=False)
original = yolo.model.eval()
image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)

# 1. Prune. The result is a DetectionModel, which a `YOLO` takes in place of its own.
narrow = fxprune.prune(original, torch.randn(1, 3, 64, 64), ratio=0.5, into="module")
masked = narrow.meta["fxprune"].mask(original)  # with the removed weights at zero
assert type(narrow) is type(original)

# 2. Predict, at any size: the boxes are those of the masked original.
for size in (64, 128):
    boxes = []
    for model in (narrow, masked):
        yolo.model, yolo.predictor = model, None
        (found,) = yolo.predict(image, imgsz=size, conf=1e-5, device="cpu", verbose=False)
        boxes.append(found.boxes.data)
    assert len(boxes[0]) > 0
    torch.testing.assert_close(*boxes)


class Trainer(DetectionTrainer):
    """Trains the network that it is given; ultralytics' own would build one from the YAML file."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        return weights


def widths(model):
    return [layer.out_channels for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]


with tempfile.TemporaryDirectory() as directory:
    # 3. Train for an epoch. The checkpoint holds the narrowed network; to load it, fxprune has to be there.
    folder = Path(directory)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(4):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), np.roll(image, 16 * i))
        (folder / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: thing}}\n")

    before = narrow.model[0].conv.weight.detach().clone()
    yolo.model, yolo.predictor, yolo.ckpt = narrow, None, {"model": narrow}
    yolo.train(
        Trainer, data=data, epochs=1, imgsz=64, batch=2, workers=0, device="cpu", project=folder, plots=False,
    )  # fmt: skip
    assert not torch.equal(narrow.model[0].conv.weight, before)
    assert widths(yolo.model) == widths(narrow) != widths(original)
    print(f"trained: {sum(widths(original))} -> {sum(widths(yolo.model))} channels")

    # 4. Export by ultralytics' own exporter.
    file = yolo.export(format="onnx", imgsz=64, device="cpu", simplify=False)
    images = torch.rand(1, 3, 64, 64)
    (exported,) = onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = yolo.model.float().eval()(images)[0]
    torch.testing.assert_close(torch.from_numpy(exported), expected, rtol=1e-3, atol=1e-3)
