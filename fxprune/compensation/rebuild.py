"""Rebuilding: a short fit by gradients, part by part, to what the original computes.

A part ends where everything that is computed from parameters and inputs so far goes through one value: after
a residual block, after the attention half and the MLP half of a transformer's layer. What is computed without
either (angles, masks, a bias of positions) may run past it. The part's weights are fitted to bring that value
near the original's, from what the narrowed network gives the part, by AdamW on batches that are not held out.
What does best on those that are is kept; where that is the beginning, nothing changes.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..coupling.units import Value
from ..importance.calibration import progress
from ..passes import Narrowing
from ..passes.parameters import narrow as narrowed
from .batches import BatchValues, Values
from .moments import evened
from .outputs import own
from .report import LayerEntry
from .walk import Runner

_RATE = 3e-3
"""Largest change of a weight in a step, as a share of the root mean square of its tensor."""

_LOOKS = 5
"""How often held-out data are looked at."""


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
            for number in range(len(state)):  # the original goes first, and holds what is wanted
                wanted, mine = state.get(number)
                self.dense.run(wanted, start_dense, stop_dense)
                state.put(number, (wanted, mine))
            entry = self._fit(state, start, stop)
            if entry is not None:
                entries.append(entry)
            for number in range(len(state)):
                wanted, mine = state.get(number)
                self.narrow.run(mine, start, stop)
                state.put(number, (wanted, mine))
            start, start_dense = stop, stop_dense
        return entries

    def _ends(self) -> list[int]:
        """Places of the nodes with which parts end."""
        nodes = self.narrow.nodes
        weighted: set[fx.Node] = set()
        for node in nodes:
            weighs = self._read(node) or any(other in weighted for other in node.all_input_nodes)
            if weighs and self._varies(node):
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

    def _varies(self, node: fx.Node) -> bool:
        """Whether a node may give a tensor that depends on inputs: not sizes, nor what weights alone give."""
        tree = self.narrowing.tree(node.name)
        values = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value)]
        return tree is None or any(not value.fixed for value in values)

    def _read(self, node: fx.Node) -> list[str]:
        """The parameters that a node reads."""
        if node.op == "call_module":
            return [name for name in self.parameters if name.startswith(f"{node.target}.")]
        read = [str(before.target) for before in node.all_input_nodes if before.op == "get_attr"]
        return [name for name in read if name in self.parameters]

    def _own(self, node: fx.Node) -> list[str]:
        """Those that may be changed."""
        return [name for name in self._read(node) if name in self.free]

    def _fit(self, state: BatchValues, start: int, stop: int) -> LayerEntry | None:
        """Fit the nodes of one part; None where there is nothing to fit, or nothing to judge it by."""
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
        before = least = self._mean_error(state, held, start, stop)
        try:
            for parameter in fitted:
                parameter.requires_grad_(True)
            for step in range(self.steps):
                number = train[int(torch.randint(len(train), (1,), generator=self.generator))]
                wanted, mine = state.get(number)
                with torch.enable_grad():
                    loss = self._error(wanted, mine, start, stop)
                    gradients = torch.autograd.grad(loss, fitted, allow_unused=True)
                for parameter, gradient in zip(fitted, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                if (step + 1) % max(self.steps // _LOOKS, 1) == 0 or step + 1 == self.steps:
                    error = self._mean_error(state, held, start, stop)
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

    def _mean_error(self, state: BatchValues, numbers: list[int], start: int, stop: int) -> float:
        errors = []
        for number in numbers:
            wanted, mine = state.get(number)
            errors.append(float(self._error(wanted, mine, start, stop)))
        return sum(errors) / len(errors)

    def _error(self, wanted: Values, mine: Values, start: int, stop: int) -> torch.Tensor:
        """Mean square difference of the part's value from the original's, as a share of that one's.

        Positions with values far larger than all others do not decide alone: see :func:`.moments.evened`.
        """
        node = self.narrow.nodes[stop - 1]
        value = self.narrowing.tree(node.name)
        labels = [value.label(d) for d in range(len(value.shape))]
        target = wanted[self.dense.nodes[self.dense.place[node.name]]].detach()
        target = narrowed(target, labels, self.narrowing).float()
        here = own(mine)
        self.narrow.run(here, start, stop)
        got: torch.Tensor = here[node].float()
        channels = [d for d, label in enumerate(labels) if label is not None]
        if channels:
            target, got = (x.movedim(channels[-1], 0).flatten(1)[None] for x in (target, got))
            factors = evened(target)
            target, got = target * factors, got * factors
        return (got - target).square().mean() / target.square().mean().clamp(min=1e-20)


def free(module: nn.Module, readers: dict[str, int]) -> set[str]:
    """Names of the parameters that are used at one place."""
    return {name for name, _ in module.named_parameters() if readers.get(name) == 1}
