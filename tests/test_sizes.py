"""What is right for the example's sizes is right for others, or is said and refused."""

import copy

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PinnedError


class Mixing(nn.Module):
    """``how(t, n, c, h, w)`` brings ``t: (N, HW, C)`` back to ``(N, C, H, W)``."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.o = how, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.a(x).relu()
        return self.o(x + self.how(self.b(x).flatten(2).transpose(1, 2), n, 16, h, w))


DEPEND = {
    "reshape": lambda t, n, c, h, w: t.reshape(n, c, h, w),
    "view": lambda t, n, c, h, w: t.contiguous().view(n, c, h, w),
    "rows": lambda t, n, c, h, w: t.reshape(n, h, c, w).transpose(1, 2),
    "columns": lambda t, n, c, h, w: t.reshape(n, w, h * c).reshape(n, c, h, w),
}


def equal_at(model, sizes, ratio=0.5):
    """Whether the result is the masked original at all of these image sizes."""
    example = torch.randn(2, 3, *sizes[0])
    plan = fxprune.plan(model, example, ratio=ratio)
    masked, pruned = copy.deepcopy(model).double(), plan.apply(model)
    for name, mask in plan.masks(model).items():
        masked.get_parameter(name).data.mul_(mask)
    pruned = pruned.double()
    for size in sizes:
        z = torch.randn(2, 3, *size).double()
        torch.testing.assert_close(pruned(z), masked(z))
    return plan, pruned


@pytest.mark.parametrize("name", DEPEND)
def test_what_meets_elsewhere_at_another_size_stays(name):
    torch.manual_seed(0)
    net = Mixing(DEPEND[name]).eval()
    equal_at(net, [(2, 2), (2, 4), (4, 4), (3, 5)])
    frozen = {str(f.axis): f.reason for f in fxprune.analyze(net, torch.randn(2, 3, 2, 2)).frozen}
    assert frozen["a.weight[0]"]


def test_what_meets_alike_at_any_size_narrows():
    torch.manual_seed(0)
    net = Mixing(lambda t, n, c, h, w: t.transpose(1, 2).reshape(n, -1, h, w)).eval()
    _, pruned = equal_at(net, [(2, 2), (2, 4), (4, 4), (3, 5)])
    assert pruned.a.weight.shape[0] == 8


class One(nn.Module):
    """Does something else with a batch of one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        t = self.a(x).relu()
        return self.b(t * 2 if x.shape[0] == 1 else t)


def test_a_batch_of_one_that_is_another_matter_is_refused():
    net = One().eval()
    plan = fxprune.plan(net, torch.randn(1, 16), ratio=0.5)
    assert any("batch size" in note for note in plan.notes)
    pruned = plan.apply(net)
    assert pruned(torch.randn(1, 16)).shape == (1, 16)
    with pytest.raises(PinnedError, match=r"'x' has size 4 in dimension 0.*Next:"):
        pruned(torch.randn(4, 16))


def test_any_other_batch_of_one_is_free():
    class Plain(One):
        def forward(self, x):
            if len(x.shape) != 2:
                raise ValueError("expected rows")
            return self.b(self.a(x).relu())

    plan = fxprune.plan(Plain().eval(), torch.randn(1, 16), ratio=0.5)
    assert not any("batch size" in note for note in plan.notes)
