"""Whatever a forward writes, the user's model stays as it is; what is written is followed or noted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture import shape_tracer
from fxprune.errors import CaptureError

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Convolutions, and whatever a case adds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(3, 16, 3, bias=False)
        self.b.weight.requires_grad_(False)
        self.head = nn.Conv2d(16, 4, 1)
        self.register_buffer("mean", torch.zeros(16))
        self.scale = torch.ones(1)  # neither parameter nor buffer
        self.calls = 0
        self.history: list[Any] = []
        self.table: dict[str, Any] = {"last": None, "nested": [torch.ones(2)]}
        self.state = SimpleNamespace(h=None, count=torch.zeros(1))

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x)
        return out.relu()


# -- followed: the result does the same -------------------------------------------------------------------


def data_is_assigned(self: Any, x: Tensor) -> Tensor:
    self.b.weight.data = self.a.weight.data * 2
    return self.b(x).relu()


def data_is_copied(self: Any, x: Tensor) -> Tensor:
    self.b.weight.data.copy_(self.a.weight)
    return self.b(x).relu()


def teacher(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for p, q in zip(self.a.parameters(), self.b.parameters(), strict=True):
            q.data = q.data * 0.9 + p.data * 0.1
    return self.a(x) + self.b(x)


def teacher_in_place(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weights = dict(self.a.named_parameters())
        for name, p in self.b.named_parameters():
            p.mul_(0.9).add_(weights[name], alpha=0.1)
    return self.a(x) + self.b(x)


def parameters_are_summed(self: Any, x: Tensor) -> Tensor:
    penalty = sum(p.pow(2).mean() for p in self.head.parameters())
    return self.features(x) * penalty


def buffer_is_averaged(self: Any, x: Tensor) -> Tensor:
    y = self.features(x)
    with torch.no_grad():
        self.mean.mul_(0.5).add_(y.mean((0, 2, 3)), alpha=0.5)
    return y - self.mean[:, None, None]


def module_casts_itself(self: Any, x: Tensor) -> Tensor:
    self.a = self.a.to(torch.float32)
    return self.features(x)


FOLLOWED = [data_is_assigned, data_is_copied, teacher, teacher_in_place, parameters_are_summed,
            buffer_is_averaged, module_casts_itself]  # fmt: skip


# -- noted: the result computes the same, and does not keep what is written -------------------------------


def state_is_kept(self: Any, x: Tensor) -> Tensor:
    y = self.features(x)
    if self.state.h is not None:
        y = y + self.state.h
    self.state.h = y.detach()
    return y


def attribute_is_set(self: Any, x: Tensor) -> Tensor:
    self.seen = self.features(x)
    return self.seen


def calls_are_counted(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.features(x)


def list_grows(self: Any, x: Tensor) -> Tensor:
    y = self.features(x)
    self.history.append(y)
    return y


def dict_is_filled(self: Any, x: Tensor) -> Tensor:
    self.table["last"] = y = self.features(x)
    return y


def buffer_is_registered(self: Any, x: Tensor) -> Tensor:
    y = self.features(x)
    self.register_buffer("late", y.mean())
    return y


def plain_tensor_is_written(self: Any, x: Tensor) -> Tensor:
    self.scale.add_(1.0)
    return self.features(x)


def module_is_replaced(self: Any, x: Tensor) -> Tensor:
    self.b = self.a
    out: Tensor = self.b(x)
    return out.relu()


NOTED = {
    state_is_kept: "state",
    attribute_is_set: "seen",
    calls_are_counted: "calls",
    list_grows: "history",
    dict_is_filled: "table",
    buffer_is_registered: "late",
    plain_tensor_is_written: "scale",
    module_is_replaced: "b",
}


def build(forward: Forward) -> tuple[nn.Module, Tensor]:
    def run(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.head(forward(self, x))
        return out

    torch.manual_seed(0)
    kind = type("Writer", (Net,), {"forward": run})
    return kind().eval(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("forward", FOLLOWED, ids=lambda f: f.__name__)
def test_what_is_written_is_followed(forward: Forward) -> None:
    """Call after call, with a step of training between: the same results, and the same weights."""
    model, x = build(forward)
    plan = fxprune.plan(model, x, ratio=0.0)
    assert not plan.notes
    results = []
    for network in (copy.deepcopy(model), plan.apply(model)):
        outputs = [network(x)]
        outputs[0].sum().backward()
        with torch.no_grad():
            network.get_parameter("a.weight").mul_(1.5)
        results.append((*outputs, network(x), network.get_parameter("a.weight").grad, network.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forward", NOTED, ids=lambda f: f.__name__)
def test_what_is_lost_is_noted(forward: Forward) -> None:
    model, x = build(forward)
    plan = fxprune.plan(model, x, ratio=0.5)
    assert " ".join(plan.notes).count(f"what forward leaves in {NOTED[forward]} is not kept") == 1


def gradient_is_assigned(self: Any, x: Tensor) -> Tensor:
    self.a.weight.grad = None
    return self.features(x)


def real_part_is_assigned(self: Any, x: Tensor) -> Tensor:
    y = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    y.real = y.imag
    return self.features(torch.view_as_real(y).flatten(-2))


@pytest.mark.parametrize("forward", [gradient_is_assigned, real_part_is_assigned], ids=lambda f: f.__name__)
def test_what_cannot_be_followed_names_its_line(forward: Forward) -> None:
    model, x = build(forward)
    with pytest.raises(CaptureError, match=rf"test_writes.py:\d+ in {forward.__name__}"):
        shape_tracer.trace_with_shapes(model, (x,), {})
