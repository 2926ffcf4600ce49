"""How much importance goes: plans of fxprune and of Torch-Pruning 1.6.1, judged by one and the same score.

One shot, the same criterion (L2 over all members of a group), the same ratio in every group, the same random
weights. What Torch-Pruning removed is read off its result: every weight is a different number, so the
entries that are left say which channels were kept. For each group, the scores of the removed units are added
up; the table shows their share in the scores of all units, over the groups of which both removed something,
and in how many groups fxprune's share is the larger one. Lower is better. A unit is what fxprune calls so;
Torch-Pruning ties many of them together (the same channels in every head), and has less to choose from. It
does not narrow the attention of torchvision's vision transformer; "plain" is that model with an attention of
linear layers, which it does narrow.

Two scores are used, each for fxprune's ranking and for judging both plans: fxprune's own (the norm of all
parameter entries that go with a unit), and Torch-Pruning's (the mean over convolutions, linear layers and
normalisations of the sums of squares of their weights; groups of which it does not see every unit are left
out).

    pip install -e '.[bench]'
    python examples/benchmarks/removed_scores.py
    python examples/benchmarks/removed_scores.py resnet50 --ratio 0.3
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torchvision.models import get_model

import fxprune
from fxprune.importance import Magnitude, score

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vit_b_16", "vit_b_16 plain")


class PlainAttention(nn.Module):
    """Multi-head self-attention of linear layers, with no width written down: Torch-Pruning can narrow it."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        width, self.heads = source.embed_dim, source.num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """``(batch, tokens, width)`` as query, key and value."""
        rows = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*rows)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


def build(name: str) -> nn.Module:
    """The model with random weights, no two of one tensor alike."""
    torch.manual_seed(0)
    name, *plain = name.split()
    model = get_model(name, weights=None).eval()
    if plain:
        for block in model.encoder.layers:
            block.self_attention = PlainAttention(block.self_attention)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() == 1 else parameter.std().item() or 0.02
            parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.dim() == 1))
    return model


def with_peer(model: nn.Module, x: torch.Tensor, ratio: float) -> nn.Module:
    """Torch-Pruning, told the classifier and the head counts; it works on a copy."""
    model = copy.deepcopy(model)
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            heads[module] = module.num_heads
        if isinstance(module, PlainAttention):
            heads.update(dict.fromkeys((module.q, module.k, module.v), module.heads))
    pruner = tp.pruner.MagnitudePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
        num_heads=heads,
    )
    pruner.step()
    return model


def removed_by(group: fxprune.Group, after: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Positions of the units of which nothing is left, read off the largest member."""
    member = max((m for m in group.members if m.trainable), key=lambda m: m.tensor.numel())
    left = np.isin(member.tensor.detach().numpy(), after[member.axis.name].detach().numpy())
    kept = (*member.over, member.axis.dim)
    share = left.mean(tuple(d for d in range(left.ndim) if d not in kept))
    share = share.transpose([sorted(kept).index(d) for d in kept])
    best = np.zeros(group.size)
    inside = member.units >= 0
    np.maximum.at(best, member.units[inside], share[inside])
    return np.flatnonzero(best < 0.2)  # a few numbers occur twice in a large tensor by chance


def measured_by_peer(model: nn.Module) -> Callable[[fxprune.Member], bool]:
    """Whether Torch-Pruning's criterion looks at a member."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)

    def looks(member: fxprune.Member) -> bool:
        path, _, name = member.axis.name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), kinds)

    return looks


def seen(group: fxprune.Group, looks: Callable[[fxprune.Member], bool]) -> bool:
    """Whether a criterion that looks at these members sees every unit of a group."""
    units = [np.unique(member.units) for member in group.members if looks(member)]
    return len(np.setdiff1d(np.concatenate([*units, [-1]]), [-1])) == group.size


def compare(name: str, ratio: float) -> str:
    """A row of the table for each score."""
    model = build(name)
    x = torch.randn(1, 3, 224, 224)
    graph = fxprune.analyze(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = dict(with_peer(model, x, ratio).named_parameters())
    theirs = {group.name: removed_by(group, after) for group in graph}
    rows = []
    looks = measured_by_peer(model)
    choices = {
        "fxprune's": (Magnitude(), lambda group: True, 1),
        "torch-pruning's": (
            Magnitude(reduce="mean", members=looks),
            lambda group: seen(group, looks),
            2,
        ),
    }
    for whose, (criterion, where, power) in choices.items():
        plan = fxprune.plan(model, x, ratio, importance=criterion, where=where)
        scores = score(graph, criterion, 0, model)
        both = [g for g in graph if len(plan.removed.get(g.name, ())) and len(theirs[g.name])]
        balanced = [g for g in both if max(map(len, g.balance)) > 1]
        for what, groups in {"all": both, "with heads": balanced}.items():
            if not groups:
                continue
            values = {g.name: scores(g) ** power for g in groups}
            gone = [
                {g.name: values[g.name][table[g.name]].sum() for g in groups}
                for table in (theirs, plan.removed)
            ]
            units = [sum(len(table[g.name]) for g in groups) for table in (theirs, plan.removed)]
            total = sum(v.sum() for v in values.values())
            worse = sum(gone[1][g.name] > gone[0][g.name] * (1 + 1e-6) for g in groups)
            rows.append(
                f"| {name} | {whose} | {what} {len(groups)} of {len(graph)} | {units[0]} | {units[1]} | "
                f"{sum(gone[0].values()) / total:.4f} | {sum(gone[1].values()) / total:.4f} | {worse} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--ratio", type=float, default=0.5)
    options = parser.parse_args()
    packages = ("torch", "torchvision", "torch-pruning")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    now = datetime.datetime.now(datetime.timezone.utc)
    print(f"{now:%Y-%m-%d}; fxprune {fxprune.__version__}, {versions}, Python {platform.python_version()};")
    print(f"{platform.machine()}, {platform.system()}; ratio {options.ratio}, random weights.\n")
    print("| model | score | groups | units gone, tp | fxprune | score gone, tp | fxprune | worse groups |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in options.models:
        print(compare(name, options.ratio), flush=True)


if __name__ == "__main__":
    main()
