"""Rebuilding: a short fit by gradients, part by part, to what the original computes.

A part ends where everything that is computed from weights so far goes through one value: after a residual
block, after the attention half and the MLP half of a transformer's layer. Its weights are fitted to bring
that value near the original's, from what the narrowed network gives the part, by AdamW on batches that are
not held out. What does best on those that are is kept; where that is the beginning, nothing changes.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..coupling.units import Value
from ..importance.calibration import progress
from ..passes import Narrowing
from ..passes.parameters import narrow as narrowed
from .batches import BatchValues, Values
from .outputs import own
from .report import LayerEntry
from .walk import Runner

_RATE = 3e-3
"""Largest change of a weight in a step, as a share of the root mean square of its tensor."""

_LOOKS = 5
"""How often held-out data are looked at."""


_Place = tuple[int, int, int, int]
"""The nodes of a part: where they begin and end in the narrowed network, and in the original."""


class Rebuild:
    """Fits the parts of a narrowed network, in place.

    Args:
        dense: runs the original.
        narrow: runs the narrowed network, whose parameters are changed.
        narrowing: what was removed.
        steps: number of steps for each part.
        free: the parameters that may be changed: those that are used at one place.
        seed: for the order of batches.
    """

    def __init__(
        self, dense: Runner, narrow: Runner, narrowing: Narrowing, steps: int, free: set[str], seed: int
    ) -> None:
        self.dense, self.narrow, self.narrowing = dense, narrow, narrowing
        self.steps, self.free = steps, free
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = dict(narrow.module.named_parameters(remove_duplicate=False))

    def run(self, state: BatchValues) -> list[LayerEntry]:
        """Go through the network once; ``state`` holds both networks' inputs for each batch."""
        entries = []
        start = start_dense = 0
        for end in progress(self._ends(), "parts"):
            name = self.narrow.nodes[end].name
            stop, stop_dense = end + 1, self.dense.place[name] + 1
            entry = self._fit(state, (start, stop, start_dense, stop_dense))
            if entry is not None:
                entries.append(entry)
            for number in range(len(state)):
                wanted, mine = state.get(number)
                self.dense.run(wanted, start_dense, stop_dense)
                self.narrow.run(mine, start, stop)
                state.put(number, (wanted, mine))
            start, start_dense = stop, stop_dense
        return entries

    def _ends(self) -> list[int]:
        """Places of the nodes with which parts end."""
        nodes = self.narrow.nodes
        weighted: set[fx.Node] = set()
        for node in nodes:
            before = node.all_input_nodes
            if self._own(node) or any(other in weighted or other.op == "get_attr" for other in before):
                weighted.add(node)
        last = {node: max((self.narrow.place[u.name] for u in node.users), default=-1) for node in nodes}
        ends, since = [], False
        for place, node in enumerate(nodes):
            since |= bool(self._own(node))
            live = [n for n in nodes[: place + 1] if n in weighted and last[n] > place]
            output = isinstance(self.narrowing.tree(node.name), Value)
            if since and live == [node] and output and node.name in self.dense.place:
                ends.append(place)
                since = False
        return ends

    def _own(self, node: fx.Node) -> list[str]:
        """The parameters that a node reads and that may be changed."""
        if node.op == "call_module":
            path = f"{node.target}."
            return [name for name in self.parameters if name.startswith(path) and name in self.free]
        read = [str(before.target) for before in node.all_input_nodes if before.op == "get_attr"]
        return [name for name in read if name in self.free and name in self.parameters]

    def _fit(self, state: BatchValues, place: _Place) -> LayerEntry | None:
        """Fit one part; None where there is nothing to fit, or nothing to judge it by."""
        start, stop = place[:2]
        names = {name for node in self.narrow.nodes[start:stop] for name in self._own(node)}
        fitted = [
            self.parameters[name] for name in sorted(names) if self.parameters[name].is_floating_point()
        ]
        held = [n for n in range(len(state)) if n % 4 == 3] if len(state) >= 4 else []
        train = [n for n in range(len(state)) if n not in held]
        if not fitted or not held:
            return None
        needed = [parameter.requires_grad for parameter in fitted]
        best = [parameter.detach().clone() for parameter in fitted]
        rms = [float(parameter.detach().float().square().mean().sqrt()) for parameter in fitted]
        groups = [{"params": [p], "lr": max(_RATE * size, 1e-8)} for p, size in zip(fitted, rms, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        before = least = self._mean_error(state, held, place)
        try:
            for parameter in fitted:
                parameter.requires_grad_(True)
            for step in range(self.steps):
                number = train[int(torch.randint(len(train), (1,), generator=self.generator))]
                wanted, mine = state.get(number)
                with torch.enable_grad():
                    loss = self._error(wanted, mine, place)
                    gradients = torch.autograd.grad(loss, fitted, allow_unused=True)
                for parameter, gradient in zip(fitted, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                if (step + 1) % max(self.steps // _LOOKS, 1) == 0 or step + 1 == self.steps:
                    error = self._mean_error(state, held, place)
                    if error < least:
                        least, best = error, [parameter.detach().clone() for parameter in fitted]
        finally:
            for parameter, value, was in zip(fitted, best, needed, strict=True):
                parameter.grad = None
                parameter.requires_grad_(was)
                parameter.detach().copy_(value)
        name = self.narrow.nodes[stop - 1].name
        reason = "" if least < before else "no change is better on held-out calibration data"
        return LayerEntry(name, "rebuilding", before, least, reason=reason)

    def _mean_error(self, state: BatchValues, numbers: list[int], place: _Place) -> float:
        errors = []
        for number in numbers:
            wanted, mine = state.get(number)
            errors.append(float(self._error(wanted, mine, place)))
        return sum(errors) / len(errors)

    def _error(self, wanted: Values, mine: Values, place: _Place) -> torch.Tensor:
        """Mean square difference of the part's value from the original's, as a share of that one's."""
        start, stop, start_dense, stop_dense = place
        with torch.no_grad():
            there = own(wanted)
            self.dense.run(there, start_dense, stop_dense)
            target = there[self.dense.nodes[stop_dense - 1]].detach()
            value = self.narrowing.tree(self.narrow.nodes[stop - 1].name)
            target = narrowed(
                target, [value.label(d) for d in range(len(value.shape))], self.narrowing
            ).float()
        here = own(mine)
        self.narrow.run(here, start, stop)
        got: torch.Tensor = here[self.narrow.nodes[stop - 1]].float()
        return (got - target).square().mean() / target.square().mean().clamp(min=1e-20)


def free(module: nn.Module, readers: dict[str, int]) -> set[str]:
    """Names of the parameters that are used at one place."""
    return {name for name, _ in module.named_parameters() if readers.get(name) == 1}
