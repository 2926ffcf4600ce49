"""Numbers that a forward makes of sizes stay in the graph, so that the result takes other sizes."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fxprune

einops = pytest.importorskip("einops")
from einops.layers.torch import Rearrange, Reduce  # noqa: E402


class Net(nn.Module):
    """Two layers with ``how(self, t, x)`` between them; ``t: (N, L, 32)``, ``x: (N, L, 16)``."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.w = nn.Parameter(torch.randn(32))
        self.split, self.pool = Rearrange("n l (h d) -> n h l d", h=4), Reduce("n l d -> n d", "mean")

    def forward(self, x):
        if len(x.shape) != 3:
            raise ValueError("expected a batch of sequences")
        return self.b(self.how(self, self.a(x), x))


def helper(tensor):
    return len(tensor)


def attend(q, k, n, h):
    q, k = (einops.rearrange(t, "(n l) (h d) -> n h l d", n=n, h=h) for t in (q, k))
    return einops.rearrange(q * k, "n h l d -> n l (h d)")


IDIOMS = {
    "len": lambda s, t, x: t.reshape(len(x), -1, 4, 8).flatten(2),
    "len in a helper": lambda s, t, x: t.reshape(helper(x), -1, 32),
    "int of a size": lambda s, t, x: t.reshape(int(x.shape[0]), int(x.shape[1]), 32),
    "int of a product": lambda s, t, x: t.reshape(int(len(x) * 1.0), -1, 32),
    "torch.Size": lambda s, t, x: t.reshape(torch.Size((x.shape[0], x.shape[1], 4, 8))).flatten(2),
    "zeros": lambda s, t, x: t + torch.zeros(size=(len(x), 1, 1)),
    "expand": lambda s, t, x: torch.cat([t, s.w.expand(len(t), 1, -1)], 1)[:, :-1],
    "math.prod": lambda s, t, x: t.reshape(math.prod(x.shape[:-1]), 32).reshape(len(x), -1, 32),
    "np.prod": lambda s, t, x: t.reshape(int(np.prod(x.shape[:-1])), 32).reshape(len(x), -1, 32),
    "np.array": lambda s, t, x: t.reshape(int(np.array([x.shape[0], 1]).max()), -1, 32),
    "np.log": lambda s, t, x: t * int(np.ceil(np.log(x.shape[1]))),
    "np.sqrt": lambda s, t, x: t / np.sqrt(x.shape[1]).item(),
    "np.float64": lambda s, t, x: np.float64(2.0) * x.shape[1] * t,
    "torch.tensor": lambda s, t, x: t / torch.tensor([x.shape[0], x.shape[1]]).prod(),
    "check": lambda s, t, x: torch._check(x.shape[1] <= 100, lambda: "too long") or t,
    "check_with": lambda s, t, x: torch._check_with(ValueError, len(x) * x.shape[1] < 100, lambda: "") or t,
    "type is int": lambda s, t, x: (
        t * (2.0 if type(x.shape[1]) is int and type(s.b.in_features) is int else 1.0)
    ),
    "type as a key": lambda s, t, x: t * {int: 2.0, float: 3.0}[type(len(x))],
    "type of a tensor": lambda s, t, x: t * (2.0 if type(t) is torch.Tensor else 1.0),
    "type of a size": lambda s, t, x: t * (2.0 if type(x.shape) is torch.Size else 1.0),
    "type of a type": lambda s, t, x: t * (2.0 if isinstance(type("New", (), {}), type) else 1.0),
    "callable": lambda s, t, x: t * (x.shape[1]() if callable(x.shape[1]) else x.shape[1]),
    "rearrange": lambda s, t, x: einops.rearrange(
        einops.rearrange(t, "n l (h d) -> n h l d", h=4), "n h l d -> n l (h d)"
    ),
    "rearrange a batch": lambda s, t, x: attend(t.flatten(0, 1), t.flatten(0, 1), len(x), 4),
    "rearrange a list": lambda s, t, x: einops.rearrange([t, t], "s n l c -> s n l c")[0],
    "reduce": lambda s, t, x: t + einops.reduce(t, "n l d -> n 1 d", "mean"),
    "repeat": lambda s, t, x: t + einops.repeat(t[:, 0], "n d -> n l d", l=x.shape[1]),
    "einsum": lambda s, t, x: einops.einsum(t, t, "n l d, n l d -> n l d"),
    "pack": lambda s, t, x: einops.unpack(*einops.pack([t], "n * d"), "n * d")[0],
    "layers": lambda s, t, x: einops.rearrange(s.split(t), "n h l d -> n l (h d)") + s.pool(t)[:, None],
    "parse_shape": lambda s, t, x: t * einops.parse_shape(t, "n l _")["l"],
}


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_take_any_batch_and_length(name):
    net = Net(IDIOMS[name]).eval()
    x = torch.randn(2, 6, 16)
    graph = fxprune.analyze(net, x)
    assert graph.captured.rung.startswith("symbolic tracing"), graph.captured.report
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned, masked = plan.apply(net), copy.deepcopy(net)
    assert pruned.a.weight.shape == (16, 16)
    for name, mask in plan.masks(net).items():
        masked.get_parameter(name).data.mul_(mask)
    for size in ((2, 6), (5, 6), (1, 7)):
        z = torch.randn(*size, 16)
        torch.testing.assert_close(pruned(z), masked(z))


def test_names_are_put_back():
    before = {name: globals().get(name) for name in ("len", "int", "float", "callable", "isinstance", "type")}
    size = torch.Size
    fxprune.analyze(Net(IDIOMS["len"]), torch.randn(2, 6, 16))
    assert {name: globals().get(name) for name in before} == before
    assert torch.Size is size


def test_names_mean_what_they_meant():
    """To code that handles no proxies, ``int``, ``torch.Size`` and the like are what they were."""
    seen = SimpleNamespace(found=[])  # a list that a function holds is copied with the model

    def look(self, t, x):
        said = isinstance(3, int), isinstance(True, int), isinstance(3.0, int), int("7"), float("2")
        seen.found.append(said)
        seen.found.append((np.zeros(2, dtype=int).dtype, issubclass(bool, int), int == type(3)))  # noqa: E721, UP003
        seen.found.append((torch.Size([1, 2]), isinstance(torch.Size([1]), torch.Size)))
        return t.reshape(len(x), -1, 32)

    fxprune.analyze(Net(look), torch.randn(2, 6, 16))
    assert seen.found[-3] == (True, True, False, 7, 2.0)
    assert seen.found[-2] == (np.dtype(int), True, True)
    assert seen.found[-1] == (torch.Size([1, 2]), True)


class Doubled(nn.Module):
    """Asks for types by identity, of an attribute and of its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.heads = nn.Linear(16, 32), nn.Linear(32, 16), 4

    def forward(self, x):
        if type(self.heads) is not int or type(x) is not torch.Tensor:
            raise TypeError("heads are whole numbers, and the input is a tensor")
        return self.b(self.a(x).unflatten(-1, (self.heads, -1)).flatten(-2).relu())


@pytest.mark.parametrize("into", ["graph", "module"])
def test_types_by_identity(into):
    net, x = Doubled().eval(), torch.randn(2, 6, 16)
    assert fxprune.analyze(net, x).captured.rung == "symbolic tracing"
    plan = fxprune.plan(net, x, ratio=0.5, into=into)
    pruned = plan.apply(net)
    assert pruned.a.weight.shape == (16, 16)
    assert fxprune.verify(net, pruned, plan, x)


def test_checks_stay_in_the_graph():
    net = Net(IDIOMS["check"]).eval()
    pruned = fxprune.prune(net, torch.randn(2, 6, 16), ratio=0.5)
    with pytest.raises(AssertionError, match="too long"):
        pruned(torch.randn(2, 101, 16))
    with pytest.raises(fxprune.errors.ExampleInputsError, match="too long"):
        fxprune.analyze(net, torch.randn(2, 101, 16))


def test_einx():
    einx = pytest.importorskip("einx")
    net = Net(lambda s, t, x: einx.id("n h l d -> n l (h d)", einx.id("n l (h d) -> n h l d", t, h=4))).eval()
    x = torch.randn(2, 6, 16)
    pruned = fxprune.prune(net, x, ratio=0.5)
    assert pruned.a.weight.shape == (16, 16)
    assert pruned(torch.randn(3, 5, 16)).shape == (3, 5, 16)
