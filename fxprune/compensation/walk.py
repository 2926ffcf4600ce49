"""Two networks side by side over many batches: the original and the narrowed one, node by node.

All batches go through one stretch of the graph before the next one begins. Between two stretches only the
values that are still needed are kept. So each node is run once a batch, however many layers are changed on
the way, and what a layer reads comes from layers that have been changed already.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..graph_module import Interpreter
from ..importance.products import Products, Site
from .batches import Values


@dataclass(frozen=True, eq=False)
class Product:
    """One call of a product: where it is, what it read and what it put out."""

    site: Site
    input: torch.Tensor
    output: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Norm:
    """One call of a batch normalisation with running statistics."""

    input: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor | None
    eps: float

    @property
    def scale(self) -> torch.Tensor:
        """What a channel is multiplied by, ``(channels,)``."""
        scale = (self.var.double() + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.detach().double()


@dataclass
class Seen:
    """What the ATen calls of a node were, in order."""

    products: list[Product] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)


class _Look(Products):
    """Collects products with parameters and batch normalisations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, self._product)
        self.found = Seen()

    def _product(self, site: Site, x: torch.Tensor, y: torch.Tensor, bias: Any) -> None:
        self.found.products.append(Product(site, x, y, bias))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if "running_mean" in names:
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            mean, var = given["running_mean"], given.get("running_var")
            if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
                x = given.get("input", args[0])
                eps = float(given.get("eps", given.get("epsilon", 1e-5)))
                self.found.norms.append(Norm(x, mean, var, given.get("weight"), eps))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Runner:
    """Runs parts of a graph module.

    Args:
        module: in evaluation mode.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.place = {node.name: number for number, node in enumerate(self.nodes)}
        self._interpreter = Interpreter(module, garbage_collect_values=False)
        self._looking = _Look(module)
        self._last: list[list[fx.Node]] = [[] for _ in self.nodes]
        for number, node in enumerate(self.nodes):
            last = max((self.place[user.name] for user in node.users), default=number)
            self._last[last].append(node)

    def start(self, inputs: list[Any]) -> Values:
        """The values at the beginning: those of the placeholders."""
        places = [node for node in self.nodes if node.op == "placeholder"]
        return dict(zip(places, inputs, strict=True))

    def taken(self, values: Values, other: Runner) -> Values:
        """The ``values`` of another runner of the same graph, in the same mode, for this one.

        Where a network does something else in training, each of its modules has nodes of its own.
        """
        return {self.nodes[other.place[node.name]]: value for node, value in values.items()}

    def first(self, tensors: Collection[str]) -> int:
        """The place of the first node that reads one of these tensors; 0 where none is seen to."""
        places: list[int] = []
        for place, node in enumerate(self.nodes):
            if node.op == "get_attr" and node.target in tensors:
                places += [self.place[user.name] for user in node.users]
            elif node.op == "call_module" and any(name.startswith(f"{node.target}.") for name in tensors):
                places.append(place)
        return min(places, default=0)

    def run(self, values: Values, start: int, stop: int, free: bool = True) -> None:
        """Run the nodes ``start .. stop - 1``; forget what is not needed any more, if ``free``."""
        self._interpreter.env = values
        for number in range(start, stop):
            node = self.nodes[number]
            if node.op not in ("placeholder", "get_attr"):
                for needed in node.all_input_nodes:
                    if needed.op == "get_attr":  # what it gives may have been changed
                        values[needed] = self._interpreter.run_node(needed)
                values[node] = self._interpreter.run_node(node)
                for needed in node.all_input_nodes:
                    if needed.op == "get_attr":
                        values.pop(needed, None)
            if free:
                self.forget(values, number)

    def forget(self, values: Values, number: int) -> None:
        """Forget what is not needed after a node."""
        for gone in self._last[number]:
            if gone.op != "output":
                values.pop(gone, None)

    def look(self, values: Values, number: int) -> Seen:
        """What one node does, on these values, which stay as they are; its output is in them afterwards."""
        with self._looking:
            self.run(values, number, number + 1, free=False)
        found, self._looking.found = self._looking.found, Seen()  # nothing is to be held here
        return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without gradients and fused attention, and with Python's cycle collector, which rests in a stage."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    collecting = gc.isenabled()
    gc.enable()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if not collecting:
            gc.disable()
