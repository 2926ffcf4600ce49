"""What holds of every network: of those that the other tests have, by kinds, and of a sample of three zoos.

Each is analysed once, and four things are asked of it. Every axis of every parameter is in a group or said to
stay. Nothing of the user's model is written. At ratio 0 the result has the model's outputs, gradients and
buffers in both modes. And ``verify``, which runs the user's own model, finds no difference in either mode,
nor at another size.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import test_gradients
import test_heads
import test_known_values
import test_modes
import test_numbers
import test_one_head
import test_order_of_uses
import test_quantization
import test_sizes
import test_wrappers
import test_writes
import torch
import torchvision
from oracle import call, difference, same_structure
from test_nothing_stays_in_silence import OTHERS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune

TOLERANCE = 1e-4
"""Largest relative difference between a result and its model, in float32."""


@dataclass(frozen=True)
class Network:
    """How to make a network, what it is called with, and what is asked of it.

    Attributes:
        build: makes the network.
        inputs: as fxprune takes them.
        sizes: whether it must compare at another size.
        calls: how many calls after each other are compared; one where the notes say that state is lost.
    """

    build: Callable[[], Any]
    inputs: Any
    sizes: bool = True
    calls: int = 2


SEQUENCE = torch.randn(2, 6, 16)
MAP = torch.randn(2, 3, 8, 8)
NODES = torch.randn(10, 16)
NETWORKS: dict[str, Network] = {}


def add(
    kind: str, networks: dict[str, Any] | Iterable[Any], build: Callable[[Any], Any], inputs: Any, **what: Any
) -> None:
    """Networks of one kind, each made by ``build`` of an item (of the value, where these have names)."""
    named = networks.items() if isinstance(networks, dict) else [(n.__name__, n) for n in networks]
    for name, item in named:
        NETWORKS[f"{kind}: {name}"] = Network(lambda item=item: build(item), inputs, **what)


def made(item: Any) -> Any:
    """A network of a class, or of a function that makes one."""
    return item()


class Twofold(nn.Module):
    """Takes another way through its layers while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            one, two = x.split(8, 1)
            return self.c(torch.cat([self.b(one), two], 1))
        x = x.clone()
        x[:, :8] = self.b(x[:, :8].clone())
        return self.c(x)


class Momentum(nn.Module):
    """A teacher that follows its student within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for student, teacher in zip(self.q.parameters(), self.k.parameters(), strict=True):
                teacher.data = teacher.data * 0.9 + student.data * 0.1
        return self.q(a), self.k(b)


class Recurrent(nn.Module):
    """Keeps its state for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o, self.h = nn.GRU(6, 32, batch_first=True), nn.Linear(32, 4), None

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.r(x, self.h)
        self.h = h.detach()
        return self.o(y)


def normed(kind: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), kind(16), nn.ReLU(), nn.Conv2d(16, 8, 3))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def quantised(by_channel: bool) -> nn.Module:
    return test_quantization.prepared(training=True, by_channel=by_channel)


add("numbers of sizes", test_numbers.IDIOMS, test_numbers.Net, SEQUENCE)
lengths = [test_known_values.by_length, test_known_values.by_item]
add("lengths", lengths, test_known_values.Middle, (SEQUENCE, torch.tensor([6, 5])))
add("sizes as tensors", test_known_values.SIZES, test_known_values.Middle, SEQUENCE)
edges = [test_known_values.loops_removed, test_known_values.places, test_known_values.selected]
add("graphs", edges, test_known_values.Graph, (NODES, torch.randint(0, 10, (2, 40))))
add("experts", [torch.where], test_known_values.Experts, SEQUENCE)
lists = torch.randn(24, 16), [2, 5, 7, 10]
add("lists", test_known_values.LISTS, test_known_values.Parts, lists, sizes=False)
add("sizes", test_sizes.DEPEND, test_sizes.Mixing, torch.randn(2, 3, 2, 2))
sized = [test_sizes.Cached, test_sizes.Anchors, test_sizes.Folding, Twofold]
add("sizes", sized, made, MAP)
add("sizes", [test_sizes.Halving], made, torch.randn(1, 3, 32, 32))
add("sizes", [test_sizes.Windows], made, torch.randn(2, 32, 8))
add("sizes", [test_sizes.One], made, torch.randn(1, 16), sizes=False)
add("sizes", [test_sizes.Expanding], made, torch.randint(0, 10, (1, 6)))
add("ends", test_sizes.ENDS, test_sizes.Ends, torch.randn(1, 3, 4, 4))
norms = [test_modes.PlainNorm, test_modes.MixedIn, test_modes.FrozenNorm]
add("norms", norms, normed, torch.randn(4, 3, 8, 8))
add("autograd functions", test_gradients.OPS, lambda op: test_gradients.Net(op, True), torch.randn(2, 4, 8))
add("written", test_writes.FOLLOWED, lambda f: test_writes.build(f)[0], MAP)
add("written", list(test_writes.NOTED), lambda f: test_writes.build(f)[0], MAP, calls=1)
add("written", [Momentum], made, (torch.randn(2, 8), torch.randn(2, 8)))
add("written", [Recurrent], made, torch.randn(2, 5, 6), calls=1)
uses = [test_order_of_uses.Penalty, test_order_of_uses.Merged]
add("uses", uses, made, MAP)
add("heads", test_heads.NETS, made, torch.randn(2, 5, 6))
for name, (build, inputs) in OTHERS.items():
    NETWORKS[f"other: {name}"] = Network(build, inputs)
NETWORKS["one head"] = Network(lambda: test_one_head.Stacked(1, False), torch.randn(2, 5, 8))
NETWORKS["compiled"] = Network(lambda: compiled(test_wrappers.net()), MAP)
NETWORKS["fake quantised"] = Network(lambda: quantised(True), test_quantization.IMAGE)


def zoo() -> None:
    """Small members of the families of torchvision, timm and transformers."""
    models, few = torchvision.models, {"num_classes": 5}
    image = torch.randn(2, 3, 32, 32)
    bottlenecks: Any = models.resnet.Bottleneck
    found: dict[str, Callable[[], nn.Module]] = {
        "mobilenet_v3": lambda: models.mobilenet_v3_small(**few),
        "shufflenet_v2": lambda: models.shufflenet_v2_x0_5(**few),
        "squeezenet": lambda: models.squeezenet1_1(**few),
        "mnasnet": lambda: models.mnasnet0_5(**few),
        "densenet": lambda: models.DenseNet(8, (2, 2), 16, **few),
        "resnext": lambda: models.ResNet(bottlenecks, [1, 1, 1, 1], groups=4, width_per_group=4, **few),
        "vit": lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, **few),
        "swin": lambda: models.SwinTransformer(
            [4, 4], 16, [1, 1], [2, 4], [2, 2], stochastic_depth_prob=0.0, **few
        ),
    }
    for name, build in found.items():
        NETWORKS[f"torchvision: {name}"] = Network(build, image)
    tests = ["byobnet", "convnext2", "efficientnet_gn", "mambaout", "nfnet", "resnet", "vit", "vit3"]
    for name in tests if importlib.util.find_spec("timm") else ():
        size = {"img_size": 32} if "vit" in name else {}
        NETWORKS[f"timm: {name}"] = Network(partial(of_timm, f"test_{name}", **size), image)
    words = {"input_ids": torch.randint(0, 50, (2, 6))}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    wide = {"intermediate_size": 32, "num_attention_heads": 4, **small}
    kinds: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "Llama": ("ForCausalLM", words, {**wide, "num_key_value_heads": 2}),
        "GPT2": ("LMHeadModel", words, {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}),
        "Bert": ("Model", words, wide),
        "Mamba": ("ForCausalLM", words, {**small, "state_size": 4}),
        "Mixtral": ("ForCausalLM", words, {**wide, "num_key_value_heads": 2, "num_local_experts": 4}),
        "ViT": ("Model", image, {**wide, "image_size": 32, "patch_size": 8}),
    }
    for name, (kind, inputs, options) in kinds.items() if importlib.util.find_spec("transformers") else ():
        NETWORKS[f"transformers: {name}"] = Network(partial(of_transformers, name, kind, options), inputs)


def of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def of_transformers(name: str, kind: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**options))


zoo()


def unaccounted(model: nn.Module, graph: fxprune.CouplingGraph) -> list[str]:
    """Axes of parameters that are in no group and not among the frozen ones."""
    known = {str(member.axis) for group in graph.groups for member in group.members}
    assert all(frozen.reason for frozen in graph.frozen)
    known |= {str(frozen.axis) for frozen in graph.frozen}
    return [
        f"{name}[{dim}]"
        for name, parameter in model.named_parameters()
        for dim, size in enumerate(parameter.shape)
        if size > 1 and f"{name}[{dim}]" not in known
    ]


def fingerprint(value: Any, seen: set[int] | None = None) -> Any:
    """All tensors (with the memory that they lie in), modules, containers and attributes of a model."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        content = hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return id(value), value._version, value.data_ptr(), value.requires_grad, content.hexdigest()
    if id(value) in seen:
        return id(value)
    if isinstance(value, (dict, list, tuple, set)):
        items = value.items() if isinstance(value, dict) else value
        return type(value), [fingerprint(item, seen | {id(value)}) for item in items]
    if isinstance(value, (nn.Module, SimpleNamespace)):
        seen.add(id(value))
        return id(value), type(value), {k: fingerprint(v, seen) for k, v in vars(value).items()}
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def outcome(network: nn.Module, inputs: Any, training: bool, calls: int) -> tuple[Any, dict[str, Any]]:
    """Outputs of some calls in this mode; the gradients and buffers that they leave behind."""
    network = network.train(training)
    network.zero_grad()
    names = dict(network.named_buffers())
    outputs = [call(network, inputs) for _ in range(calls)]
    floats = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    sum(t.abs().square().sum() for t in floats).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return outputs, {**gradients, **{name: network.get_buffer(name) for name in names}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_promises(name: str) -> None:
    network = NETWORKS[name]
    model, inputs = network.build(), network.inputs
    before = fingerprint(model)
    graph = fxprune.analyze(model, inputs)
    assert unaccounted(model, graph) == []
    plan = fxprune.plan(graph, ratio=0.5)
    verdict = fxprune.verify(graph, plan.apply(graph), plan, inputs)
    assert verdict.modes == ("evaluation", "training"), verdict
    assert verdict.inputs > 1 or not network.sizes, verdict
    same = fxprune.plan(graph, ratio=0.0).apply(graph)
    assert fingerprint(model) == before
    for training in (False, True):
        (want, wanted), (got, found) = (
            outcome(copy.deepcopy(m), inputs, training, network.calls) for m in (model, same)
        )
        assert same_structure(want, got)
        assert difference(got, want) < TOLERANCE
        for key, value in wanted.items():
            assert (value is None) == (found[key] is None), key
            assert value is None or difference(found[key], value) < TOLERANCE, key
