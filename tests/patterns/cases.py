"""What all patterns are made of: the decorator that registers a network, inputs, and common layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


VECTOR = random(4, 6)
TOKENS = random(2, 5, 12)
SERIES = random(2, 3, 16)
IMAGE = random(2, 3, 8, 8)
VOLUME = random(2, 3, 4, 4, 4)
WORDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 0]])

Layers = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what is to become of it."""

    build: Callable[[], nn.Module]
    inputs: Any
    narrows: list[str]
    expected: dict[str, Any]


CASES: dict[str, Case] = {}


def case(
    inputs: Any, layers: Callable[[], Layers], narrows: str = "", **expected: Any
) -> Callable[[Any], Any]:
    """Register the decorated function as the ``forward`` of a network with these ``layers``.

    Args:
        inputs: what the network is called with.
        layers: makes modules and parameters, by name.
        narrows: names of parameters, or of modules for their ``weight``.
        expected: further arguments of the oracle. Groups must be exact unless it says otherwise.
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        kind = type(forward.__name__, (nn.Module,), {"forward": forward, "__module__": forward.__module__})

        def build() -> nn.Module:
            torch.manual_seed(0)
            net = kind()
            for name, layer in layers().items():
                setattr(net, name, layer)
            return net

        made = layers()
        names = [
            n if "." in n or isinstance(made[n], nn.Parameter) else f"{n}.weight" for n in narrows.split()
        ]
        assert forward.__name__ not in CASES
        CASES[forward.__name__] = Case(build, inputs, names, {"exact": True, **expected})
        return forward

    return register


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, **{"padding": kernel // 2, **options})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def two_convs(width: int = 8, into: int | None = None) -> Callable[[], Layers]:
    return lambda: {"a": conv(3, width), "b": conv(width if into is None else into, 4)}


def two_linears(width: int = 12, into: int | None = None) -> Callable[[], Layers]:
    return lambda: {"a": nn.Linear(6, width), "b": nn.Linear(width if into is None else into, 4)}


def qkv() -> Layers:
    return {"q": nn.Linear(12, 24), "k": nn.Linear(12, 24), "v": nn.Linear(12, 24), "o": nn.Linear(24, 12)}
