"""Random numbers that follow from a seed, and leave those that the user draws afterwards as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_KINDS = ("cuda", "xpu")


@contextlib.contextmanager
def drawn(seed: int | None = None) -> Iterator[None]:
    """Seed the generators of the processor and of all devices in use, and put them back afterwards.

    A device is in use once PyTorch has initialised it. Until then ``torch.manual_seed`` would keep a stack
    trace for each call, and ``torch.random.fork_rng`` would look for devices each time.

    Args:
        seed: where the numbers start; None for where the generators are.
    """
    modules = {kind: torch.get_device_module(kind) for kind in _KINDS}
    kind = next((kind for kind, module in modules.items() if module.is_initialized()), "")
    devices = list(range(modules[kind].device_count())) if kind else []
    with torch.random.fork_rng(devices, device_type=kind or _KINDS[0]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if kind:
                modules[kind].manual_seed_all(seed)
        yield


__all__ = ["drawn"]
