"""Set channels of ten CNNs and two transformers to zero, remove them with fxprune.lossless, and compare.

    python examples/benchmarks/lossless.py                 # all networks, in both ways; writes LOSSLESS.md
    python examples/benchmarks/lossless.py resnet18 bert   # some, without a file

Two ways of zeroing 30 to 60 % of the channels (another share for each network):

- *whole*: all that makes a channel (weights, biases, scales and shifts), as training with a penalty on whole
  channels leaves it. Every channel so zeroed should go.
- *trained*: ``torch.nn.utils.prune.ln_structured`` on every convolution (of transformers, on the first layer
  of each feed-forward part), followed by 20 steps of training. Shifts of batch normalisations stay and are
  trained: the channels become constants. In a residual stream a channel is dead only where all layers that
  add to it were given the same mask; a depthwise filter of zeros alone makes its channel dead.

Random weights, with statistics of batch normalisations as after training. The time is that of the result as
a share of the network's: forward passes of the batch on one thread in turns, the median of 11 ratios.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as masks

import fxprune

CNNS = (
    "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121",
    "efficientnet_b0", "regnet_y_400mf", "squeezenet1_1", "mnasnet0_5",
)  # fmt: skip
TRANSFORMERS = ("vit", "bert")
SHARES = (0.3, 0.45, 0.6)
STAY = re.compile(r"(\d+) dead channels of (\S+) stay: (.*)")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and a batch."""
    if name == "vit":
        from torchvision.models import VisionTransformer

        return VisionTransformer(64, 8, 6, 6, 192, 768, num_classes=10), torch.randn(4, 3, 64, 64)
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
            vocab_size=500,
        )  # fmt: skip
        return BertForSequenceClassification(config), torch.randint(0, 500, (4, 48))
    from torchvision import models

    return models.get_model(name, num_classes=10, weights=None), torch.randn(4, 3, 96, 96)


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """In evaluation mode, with measured statistics, shifts of both signs, and a head that is not zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None
    if x.is_floating_point():
        with torch.no_grad():
            model.train()
            for _ in range(2):
                model(torch.randn_like(x))
    return model.eval()


def whole(model: nn.Module, x: torch.Tensor, share: float) -> tuple[nn.Module, int]:
    """All that makes a channel at zero."""
    plan = fxprune.plan(model, x, share, "random", where=lambda group: group.exact)
    zeroed = copy.deepcopy(model)
    zeroed.load_state_dict(plan.mask(model).state_dict())
    return zeroed, sum(len(units) for units in plan.removed.values())


def trained(model: nn.Module, x: torch.Tensor, share: float) -> tuple[nn.Module, int]:
    """Masks on the filters of convolutions or feed-forward layers, and a little training."""
    model = copy.deepcopy(model)
    layers = {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Conv2d) and module.out_channels > 16 and "conv_proj" not in path)
        or path.endswith(("mlp.0", "intermediate.dense"))
    }
    for module in layers.values():
        masks.ln_structured(module, "weight", share, n=2, dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    target = torch.arange(len(x)) % 2
    model.train()
    for _ in range(20):
        found: Any = model(x)
        loss = nn.functional.cross_entropy(getattr(found, "logits", found), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in layers.values():
        masks.remove(module, "weight")
    model.eval()
    return model, zeroed_units(model, x)


def zeroed_units(model: nn.Module, x: torch.Tensor) -> int:
    """Units of which all that makes them is zero, or a depthwise filter that they pass."""
    count = 0
    for group in fxprune.analyze(model, x):
        alive: set[int] = set()
        seen: set[int] = set()
        stopped: set[int] = set()
        for member in group.producers:
            axis = member.axis.dim
            filled = member.tensor.detach().movedim(axis, 0).flatten(1).ne(0).any(1).tolist()
            units = member.units.reshape(-1, member.units.shape[-1])[0].tolist()
            full = {unit for unit, any_ in zip(units, filled, strict=True) if any_ and unit >= 0}
            empty = {unit for unit in units if unit >= 0} - full
            if member.consuming:
                stopped |= empty
            else:
                seen |= empty | full
                alive |= full
        count += len((seen - alive) | stopped)
    return count


def held(notes: Iterable[str], left: int) -> str:
    """How many of the ``left`` dead channels stay, and why, in a few words."""
    found: collections.Counter[str] = collections.Counter()
    merged = {group for note in notes for group in re.findall(r"of (\S+) are read as multiples", note)}
    for number, group, reason in (m.groups() for m in map(STAY.match, notes) if m):
        if "equally long" in reason:
            reason = "rows"
        elif group in merged:
            reason = "for others"
        elif "differs between places" in reason or "no bias" in reason:
            reason = "padding"
        found[reason] += int(number)
    if left > found.total():
        found["meet others"] = left - found.total()
    return ", ".join(f"{count} {why}" for why, count in found.most_common())


def time_left(model: nn.Module, smaller: nn.Module, x: torch.Tensor) -> float:
    """The time of ``smaller`` as a share of that of ``model``."""
    ratios = []
    with torch.no_grad():
        for _ in range(12):
            times = []
            for network in (model, smaller):
                start = time.perf_counter()
                network(x)
                times.append(time.perf_counter() - start)
            ratios.append(times[1] / times[0])
    return sorted(ratios[1:])[5]


def line(name: str, how: Callable[..., tuple[nn.Module, int]], share: float, notes: bool) -> str:
    torch.manual_seed(0)
    model, x = network(name)
    zeroed, count = how(settled(model, x), x, share)
    smaller = fxprune.lossless(zeroed, x)
    plan = smaller.meta["fxprune"]
    removed = sum(len(units) for units in plan.removed.values())
    other = torch.randn_like(x) if x.is_floating_point() else x.flip(1)
    with torch.no_grad():
        wanted, got = (torch.as_tensor(getattr(y := m(other), "logits", y)) for m in (zeroed, smaller))
    difference = float((wanted - got).abs().max() / wanted.abs().max())
    before, after = (fxprune.count(m, x) for m in (zeroed, smaller))
    stay = held(plan.notes, count - removed)
    if notes:
        print("\n".join(note for note in plan.notes if " channels of " in note))
    return (
        f"| {name} | {how.__name__} | {share:.0%} | {count} | {removed} | {stay} | {difference:.0e} "
        f"| {before.params / 1e6:.2f} M | {after.params / before.params:.3f} "
        f"| {after.macs / before.macs:.3f} | {time_left(zeroed, smaller, x):.2f} |"
    )


HEADING = """\
# Channels that do no work, removed by `fxprune.lossless`

Written by `lossless.py`, {date}; Python {python}, torch {torch}, torchvision {torchvision}, transformers \
{transformers}, {machine}, 1 thread; average load {load:.1f} on {cores} cores.

`zeroed`: channels of which all that makes them is zero, or a depthwise filter that they pass; `removed`: what
`lossless` took; `difference`: the largest one of the outputs on other inputs, as a share of the largest
entry; then parameters before, and what is left of parameters, multiply-accumulates and time (shares of 1).

`stay`: dead channels that are left, by the reason in the plan's notes:

- *for others*: a constant that a layer reads beside padding, or without a bias, cannot go into a bias. One
  such channel stays for all of the layer, or of each row of a grouped convolution: their weights are added
  to its own.
- *padding*: a constant in front of a depthwise convolution that pads is another image behind it for each
  channel, which the sizes of the input decide on: no other channel and no bias can stand for it. A constant
  that is alone in front of another layer that can take up nothing is counted here, too.
- *meet others*: the constant is multiplied by a gate (squeeze and excitation) that depends on the input.
- *rows*: the rows of a grouped convolution have to lose equally many channels; one of them has fewer dead
  ones.

A channel may stay for two reasons, and is counted for both.

| network | how | share | zeroed | removed | stay | difference | parameters | left | MACs left | time left |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join((*CNNS, *TRANSFORMERS))}")
    parser.add_argument("--notes", action="store_true", help="say which dead channels stay, and why")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for number, name in enumerate(options.networks or (*CNNS, *TRANSFORMERS)):
        for how in (whole, trained):
            lines.append(line(name, how, SHARES[number % len(SHARES)], options.notes))
            print(lines[-1], flush=True)
    if not options.networks:
        heading = HEADING.format(
            date=datetime.date.today(), python=platform.python_version(), machine=platform.machine(),
            load=os.getloadavg()[2], cores=os.cpu_count(),
            **{name: metadata.version(name) for name in ("torch", "torchvision", "transformers")},
        )  # fmt: skip
        Path(__file__).with_name("LOSSLESS.md").write_text(heading + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
