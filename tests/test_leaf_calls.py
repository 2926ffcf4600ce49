"""Plain leaf modules make the ATen calls that the dispatcher would have seen, or run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune
from fxprune.coupling.interpreter import _is_composite
from fxprune.coupling.leaf_calls import PLAIN_MODULES, call_plain

aten = torch.ops.aten
Calls = list[tuple[Any, ...]]


class Recorder(TorchDispatchMode):
    """Lists the ATen calls under it, without tensors that are only made up on the way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Calls = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not aten.linear.default and _is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func is not aten.empty.memory_format:
            same = aten._unsafe_view.default if func is aten.view.default else func  # as in 2.14
            self.calls.append((same, describe(args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def describe(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: (id(t), tuple(t.shape)) if t.dim() < 2 else t.shape, tree)


def direct(module: nn.Module, x: Tensor) -> tuple[Any, Calls]:
    """The result and the calls of the short way; the result is None where there is none."""
    calls: Calls = []

    def make(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        same = aten._unsafe_view.default if operator is aten.view.default else operator
        calls.append((same, describe(args), kwargs))
        return operator(*args, **kwargs)

    tensors: dict[str, Any] = {**module._parameters, **module._buffers}
    return call_plain(module, (x,), {}, tensors.__getitem__, make), calls


IMAGE, TOKENS, ROWS = (2, 4, 6, 5), (2, 3, 4), (2, 4)
PLAIN: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (nn.Identity, IMAGE),
    *[
        (lambda bias=bias: nn.Linear(4, 6, bias=bias), shape)  # type: ignore[misc]
        for bias in (False, True)
        for shape in (ROWS, TOKENS, (2, 3, 5, 4))
    ],
    (lambda: nn.Linear(4, 6), (4,)),
    (lambda: nn.Linear(4, 6, bias=False), (4,)),
    (lambda: nn.Dropout(), ROWS),
    (lambda: nn.Dropout1d(inplace=True), TOKENS),
    (lambda: nn.Dropout2d(), IMAGE),
    (lambda: nn.Dropout3d(), (2, 4, 3, 3, 3)),
    *[
        (lambda kind=kind, inplace=inplace: kind(inplace=inplace), shape)  # type: ignore[misc]
        for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU)
        for inplace in (False, True)
        for shape in (IMAGE, ROWS)
    ],
    (lambda: nn.Hardtanh(-2, 3), ROWS),
    (nn.Sigmoid, IMAGE),
    (nn.Tanh, IMAGE),
    (nn.GELU, TOKENS),
    (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=2), IMAGE),
    (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), IMAGE),
    (lambda: nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
    (lambda: nn.BatchNorm1d(4), ROWS),
    (lambda: nn.BatchNorm1d(4), (2, 4, 5)),
    (lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), IMAGE),
    (lambda: nn.BatchNorm2d(4, affine=False), IMAGE),
    (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    (lambda: nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    (lambda: nn.LayerNorm(4), TOKENS),
    (lambda: nn.LayerNorm((3, 4), elementwise_affine=False), TOKENS),
    (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    (lambda: nn.AdaptiveAvgPool2d((1, 1)), (2, 4, 1, 1)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_same_calls(number: int, training: bool) -> None:
    make, shape = PLAIN[number]
    module = make().to("meta").train(training)
    x = torch.empty(shape, device="meta")
    with torch.no_grad():
        result, calls = direct(module, x)
        with torch._C._AutoDispatchBelowAutograd(), Recorder() as recorder:
            wanted = module(x)
    if result is None:
        assert isinstance(module, nn.modules.dropout._DropoutNd)
        assert training
        return
    assert calls == recorder.calls
    assert (result is x) == (wanted is x)
    assert (result.shape, result.stride()) == (wanted.shape, wanted.stride())


def test_every_kind_is_tested() -> None:
    assert {type(make()) for make, _ in PLAIN} == set(PLAIN_MODULES)


class Doubled(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


def patched() -> nn.Module:
    module = nn.ReLU()
    module.forward = lambda input: input.sin()  # type: ignore[method-assign]
    return module


def computed() -> nn.Module:
    module = nn.Linear(4, 6)
    weight = module.weight
    del module.weight
    module.weight = weight.detach() * 2  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Doubled, ROWS),
        (hooked, ROWS),
        (patched, ROWS),
        (computed, ROWS),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 6)), ROWS),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)), IMAGE),
        (lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGE),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE),
        (lambda: nn.Conv2d(4, 6, 3), (4, 6, 5)),
        (lambda: nn.BatchNorm2d(4), TOKENS),
        (lambda: nn.BatchNorm1d(4), (1, 4)),
        (lambda: nn.GELU("tanh"), ROWS),
        (lambda: nn.AdaptiveAvgPool2d(2), IMAGE),
        (lambda: nn.AdaptiveAvgPool2d(1), (4, 6, 5)),
    ],
)
def test_anything_else_runs(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    result, calls = direct(make(), torch.zeros(shape))
    assert result is None
    assert calls == []


class Net(nn.Module):
    """Convolutions, grouped ones among them, squeeze and excitation, a shared and two plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.SiLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(12, 6, 1)
        self.excite = nn.Conv2d(6, 12, 1)
        self.gate = nn.Hardsigmoid()
        self.shared = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.grouped(self.depthwise(x))
        x = x * self.gate(self.excite(self.squeeze(self.pool(x))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.norm(self.shared(self.shared(tokens)))).mean(1)


@pytest.mark.parametrize("training", [False, True])
def test_same_analysis(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, members and reasons are those of the long way."""
    model, x = Net().train(training), torch.zeros(2, 3, 8, 8)
    short = fxprune.analyze(model, x)
    monkeypatch.setattr("fxprune.coupling.leaf_calls.PLAIN_MODULES", {})
    long = fxprune.analyze(model, x)
    assert [repr(group) for group in short] == [repr(group) for group in long]
    assert [list(map(repr, group.members)) for group in short] == [
        list(map(repr, group.members)) for group in long
    ]
    for a, b in zip(short, long, strict=True):
        assert all((m.units == n.units).all() for m, n in zip(a.members, b.members, strict=True))
    assert [str(frozen) for frozen in short.frozen] == [str(frozen) for frozen in long.frozen]
