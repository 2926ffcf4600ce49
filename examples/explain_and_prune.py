"""The tour of the README as a script: analyse, explain, plan, apply, verify, and narrow what is exact.

    python examples/explain_and_prune.py            # a small vision transformer, a second or two

It asserts what it prints, and runs as one of the tests.
"""

from __future__ import annotations

import torch
import torchvision

import fxprune


def main() -> None:
    """Narrow a vision transformer to half its widths."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    ).eval()
    torch.nn.init.normal_(model.heads.head.weight)  # torchvision begins with a head of zeros
    x = torch.randn(2, 3, 32, 32)

    graph = fxprune.analyze(model, x)
    print(graph)
    explanation = graph.explain("encoder.layers.encoder_layer_0.mlp.0.weight", 0)
    print(explanation)
    assert {str(axis) for axis in explanation.paths} == {
        "encoder.layers.encoder_layer_0.mlp.0.bias[0]",
        "encoder.layers.encoder_layer_0.mlp.3.weight[1]",
    }
    print(*graph.frozen, sep="\n")
    assert "heads.head.weight[0]" in {str(frozen.axis) for frozen in graph.frozen}

    plan = fxprune.plan(model, x, ratio=0.5, importance="l2")
    print(plan)
    pruned = plan.apply(model)
    verdict = fxprune.verify(model, pruned, plan, x)
    print(verdict)
    assert not verdict.exact, "the layer norms run over the residual stream, which is narrowed"

    exact = fxprune.prune(model, x, ratio=0.5, where=lambda group: group.exact)
    print(fxprune.verify(model, exact, exact.meta["fxprune"], x))
    before, half, inner = (fxprune.count(net, x) for net in (model, pruned, exact))
    print(before, half, inner, sep="\n")
    assert half.params < 0.30 * before.params
    assert half.params < inner.params < before.params


if __name__ == "__main__":
    main()
