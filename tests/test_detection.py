"""torchvision's detectors, each kind at small widths: pruned by regions, exact, and trained with targets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import difference, masked, same_structure, snapshot, stir
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

import fxprune
from fxprune.api import graph_for

SIZES: dict[str, Any] = {"min_size": 64, "max_size": 96}
ANCHORS = ((8, 16), (24, 32), (48, 60))


def pyramid(width: int = 8) -> nn.Module:
    """Two maps and a third that is pooled, as deep as each other."""
    layers = [nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()]
    return BackboneWithFPN(nn.Sequential(*layers), {"2": "0", "4": "1"}, [8, 12], width)


def anchors() -> AnchorGenerator:
    return AnchorGenerator(ANCHORS, ((1.0,),) * 3)


def two_stages(kind: Callable[..., nn.Module], **heads: Any) -> nn.Module:
    return kind(
        pyramid(),
        **SIZES,
        rpn_anchor_generator=anchors(),
        rpn_post_nms_top_n_test=12,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        box_head=TwoMLPHead(72, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        box_score_thresh=0.0,
        box_detections_per_img=5,
        **heads,
    )


def masks() -> nn.Module:
    pool = MultiScaleRoIAlign(["0", "1"], 4, 2)
    heads = {"mask_head": MaskRCNNHeads(8, (8, 12), 1), "mask_predictor": MaskRCNNPredictor(12, 8, 3)}
    return two_stages(detection.MaskRCNN, mask_roi_pool=pool, **heads)


def keypoints() -> nn.Module:
    pool = MultiScaleRoIAlign(["0", "1"], 4, 2)
    heads = {
        "keypoint_head": KeypointRCNNHeads(8, (8, 12)),
        "keypoint_predictor": KeypointRCNNPredictor(12, 4),
    }
    return two_stages(detection.KeypointRCNN, keypoint_roi_pool=pool, **heads)


def retina() -> nn.Module:
    return detection.RetinaNet(pyramid(), 3, **SIZES, anchor_generator=anchors(), score_thresh=0.0)


def fcos() -> nn.Module:
    """With 32 channels: its heads normalise them in 32 groups of one."""
    generator = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    options: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 9}
    return detection.FCOS(pyramid(32), 3, **SIZES, anchor_generator=generator, **options)


def ssd() -> nn.Module:
    generator = DefaultBoxGenerator([[2], [2], [2]], scales=[0.1, 0.3, 0.6, 0.9], steps=[4, 8, 16])
    backbone = pyramid()
    del backbone.out_channels  # SSD wants one for each map, and looks for itself
    return SSD(backbone, generator, (64, 64), 3, score_thresh=0.0, detections_per_img=9)


def targets() -> list[dict[str, Tensor]]:
    """For two images."""
    found = []
    for i in range(2):
        boxes = torch.tensor([[4.0, 6, 30, 34], [20, 10, 44, 40]], dtype=torch.double) + i
        shapes = torch.zeros(2, 48, 64, dtype=torch.uint8)
        shapes[:, 10:30, 8:28] = 1
        points = torch.tensor([[[10.0, 12, 1], [20, 20, 1], [25, 30, 1], [28, 16, 1]]] * 2)
        labels = torch.tensor([1, 2])
        found.append({"boxes": boxes, "labels": labels, "masks": shapes, "keypoints": points})
    return found


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: two_stages(detection.FasterRCNN), 0.32),
        (masks, 0.32),
        (keypoints, 0.36),
        (retina, 0.32),
        (fcos, 0.32),
        (ssd, 0.45),  # half of it are the heads, whose outputs stay
    ],
    ids=["faster", "mask", "keypoint", "retina", "fcos", "ssd"],
)
def test_detector(make: Callable[[], nn.Module], kept: float) -> None:
    """Backbone, neck and heads narrow together; images of other sizes and targets give what they ought to."""
    torch.manual_seed(0)
    model = stir(make()).double().eval()
    before = snapshot(model)
    images = [torch.rand(3, 48, 64, dtype=torch.double)]
    plan = fxprune.plan(model, (images,), ratio=0.5)
    pruned = plan.apply(model)
    assert type(pruned) is type(model)
    assert list(pruned.state_dict()) == list(model.state_dict())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (pruned, model)]
    assert sizes[0] / sizes[1] <= kept, (sizes[0] / sizes[1], plan.notes)
    assert fxprune.verify(model, pruned, plan, (images,)).exact

    reference = masked(model, graph_for(plan, model), plan).double().eval()
    others = [torch.rand(3, 60, 40, dtype=torch.double), torch.rand(3, 34, 66, dtype=torch.double)]
    with torch.no_grad():
        for batch in (images, others):
            wanted, got = reference(batch), pruned(batch)
            assert len(got[0]["boxes"])
            assert same_structure(wanted, got)
            assert difference(got, wanted) < 1e-8
    images = [torch.rand(3, 48, 64, dtype=torch.double) for _ in range(2)]
    losses = []
    for network in (reference, pruned):
        torch.manual_seed(1)  # the detectors sample proposals
        losses.append(network.train()(images, targets()))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss)
    sum(losses[1].values()).backward()
    assert all(p.grad is not None for p in pruned.parameters())
    copy.deepcopy(pruned).eval()(others)
    assert snapshot(model) == before
