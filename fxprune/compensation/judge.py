"""What the outputs of a network lose by a decision, compensation included, on held-out calibration data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..coupling.branches import Branch
from ..coupling.graph import CouplingGraph
from ..importance.calibration import across_ranks
from ..importance.products import Products, Site
from ..passes.remove_branches import remove_branches
from . import compensated
from .batches import Pick, read, series
from .choice import classes
from .outputs import Difference, own, private, tensors
from .walk import quiet

_BATCHES = 4
"""Batches of calibration data that tries are compensated with; so many others compare them, if there are."""

_SAMPLES, _NUMBERS = 128, 1 << 25
"""Outputs are compared on batches that hold about so many samples, or give so many numbers."""


class Judge:
    """Compares narrowed networks with the original on calibration data.

    Args:
        graph: an analysis of the original.
        batches: calibration data; of them the first few are looked at.
        pick: see :data:`.batches.Pick`.
        seed: for the positions of large inputs that are looked at.

    Attributes:
        where: on which data it compares, for people: on few batches, nothing can be held out.

    Raises:
        CalibrationError: for data that are empty, or do not fit the model.
    """

    @staticmethod
    def can(graph: CouplingGraph) -> bool:
        """Whether the network can be run as a whole: not where only parts of it are captured."""
        return list(graph.whole.captured.program.pieces()) == [""]

    def __init__(self, graph: CouplingGraph, batches: Iterable[Any], pick: Pick | None, seed: int) -> None:
        self.program = graph.whole.captured.program
        self.pick, self.seed = pick, seed
        some = list(itertools.islice(series(batches), 2 * _BATCHES))
        self.fitted, held = some[:_BATCHES], some[_BATCHES:] or some
        apart = len(some) > _BATCHES
        part = "calibration data that the compensation did not see"
        self.where = part if apart else f"the {len(some)} batches of calibration data"
        device = next((tensor.device for tensor in self.program.tensors.values()), torch.device("cpu"))
        dense = private(self.program).module().eval()
        self.probes: list[list[Any]] = []
        self.wanted: list[Any] = []
        self.classes: dict[int, int] = {}
        product: tuple[torch.Tensor, int] | None = None

        def see(site: Site, x: torch.Tensor, y: torch.Tensor, bias: Any) -> None:
            nonlocal product
            product = y, site.channel

        samples = numbers = 0
        with quiet():
            for values in read(self.program, held, pick, device):
                with Products(dense, see):
                    out = dense.forward(*own(values))
                self.classes = classes(out, *product) if product is not None else {}
                product = None
                self.probes.append(values)
                self.wanted.append(out)
                leaves = tensors(values)
                samples += leaves[0].shape[0] if leaves and leaves[0].dim() else 1
                numbers += sum(leaf.numel() for leaf in tensors(out))
                if samples >= _SAMPLES or numbers >= _NUMBERS:
                    break

    def without(self, branches: Sequence[Branch]) -> float:
        """What is lost of the outputs without these branches, and with nothing to make up for them."""
        return self._lost(private(remove_branches(self.program, branches)).module())

    def narrowed(
        self, module: nn.Module, graph: CouplingGraph, removed: Mapping[str, Sequence[int]]
    ) -> float:
        """What is lost of the outputs by a narrowed network, which is compensated before, in place."""
        compensated(module, graph, removed, self.fitted, self.pick, seed=self.seed)
        return self._lost(module)

    def _lost(self, module: nn.Module) -> float:
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        difference = Difference(self.classes)
        with quiet():
            for values, wanted in zip(self.probes, self.wanted, strict=True):
                difference.add(wanted, module.forward(*own(values)))
        for part, mode in modes:
            part.training = mode
        loss = torch.tensor(difference.lost(), dtype=torch.float64)
        sums, ranks = across_ranks({("outputs",): loss}, 1)  # so that all ranks decide alike
        return float(sums["outputs",]) / ranks


__all__ = ["Judge"]
