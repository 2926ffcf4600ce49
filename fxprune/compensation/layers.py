"""Layer after layer: statistics and least squares.

In the order of the graph, each product of a parameter with a value (a linear layer, a convolution, a step of
a recurrent layer) is given the weights with which it comes nearest to what the original's computes, from what
it reads in the narrowed network, whose earlier layers have been compensated already. Where the outputs are
added to another value, a residual stream, what that value lacks is made up for as well. A shift of the mean
goes into the layer's own bias, or into the running mean of the batch normalisation that follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..coupling.units import Value
from ..importance.calibration import progress
from ..importance.products import Site
from ..nodes import ADDS, operator_name
from ..passes import Narrowing
from ..passes.parameters import narrow as narrowed
from ..program import named_tensors
from .batches import BatchValues, Values
from .moments import BIAS_ONLY, FIRST, RIDGES, Problem, inputs, matrix, outputs, places, write
from .report import LayerEntry
from .walk import Norm, Product, Runner

_POSITIONS, _PER_ENTRY = 1 << 16, 64
"""Positions of a product that are looked at: at least this many, and this many for each entry that it
reads."""

_AT_ONCE = 1 << 26
"""Numbers that are looked at at once."""

_ENTRIES = 6000
"""Largest number of entries that a product may read: the work grows with the third power."""

_SAME = frozenset(["dropout", "dropout_", "contiguous", "clone", "alias", "detach", "feature_dropout"])


@dataclass(frozen=True, eq=False)
class _Fit:
    """(Part of) a parameter, what is added to its products, and what was seen of them."""

    site: Site
    bias: torch.Tensor | None
    problem: Problem


class Layers:
    """Compensates a narrowed network, in place.

    Args:
        dense: the original, in evaluation mode; it is only run.
        narrow: the narrowed network, in evaluation mode; its parameters and buffers are changed.
        narrowing: what was removed.
        least_squares: change weights; if not, only biases and statistics.
        seed: for the choice of positions.
    """

    def __init__(
        self,
        dense: fx.GraphModule,
        narrow: fx.GraphModule,
        narrowing: Narrowing,
        least_squares: bool = True,
        seed: int = 0,
    ) -> None:
        self.dense, self.narrow = Runner(dense), Runner(narrow)
        self.narrowing, self.least_squares = narrowing, least_squares
        self.entries: list[LayerEntry] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.names: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for name, tensor in named_tensors(narrow):
            if tensor.numel():
                self.tensors.setdefault(self.names.setdefault(_memory(tensor), name), tensor)
        self.readers = self._readers()
        self.norms: dict[str, Norm] = {}
        self.products: Counter[str] = Counter()
        self.absorbing: dict[str, str] = {}
        self.first = FIRST  # the strength to try first: that of the layer before

    def run(self, state: BatchValues) -> list[LayerEntry]:
        """Go through the network once; ``state`` holds both networks' inputs for each batch."""
        self._at = (0, 0)
        for name, what in progress(self._stages(state.get(0)[1]), "layers"):
            reached = self._reached(state, name)
            if name in self.norms:
                self._statistics(reached, name, what)
            else:
                self._solve(reached, len(state), name, what)
            for _ in reached:  # where nothing can be done, they come here nevertheless
                pass
        return self.entries

    def _reached(self, state: BatchValues, name: str) -> Iterator[tuple[Values, Values]]:
        """Both networks' values for each batch, when it has come to a node, which is not run yet."""
        start, stop = self._at, (self.dense.place[name], self.narrow.place[name])
        for number in range(len(state)):
            wanted, own = state.get(number)
            if start != stop:
                self.dense.run(wanted, start[0], stop[0])
                self.narrow.run(own, start[1], stop[1])
                state.put(number, (wanted, own))
            yield wanted, own
        self._at = stop

    # -- what there is to do --------------------------------------------------------------------

    def _readers(self) -> Counter[str]:
        """How many nodes read each parameter or buffer, under whatever name."""
        count: Counter[str] = Counter()
        own = {
            name: self.names.get(_memory(tensor), name) for name, tensor in named_tensors(self.narrow.module)
        }
        for node in self.narrow.nodes:
            if node.op == "get_attr":
                count[own.get(str(node.target), str(node.target))] += len(node.users)
            elif node.op == "call_module":
                path = f"{node.target}."
                count.update({first for name, first in own.items() if name.startswith(path)})
        return count

    def _stages(self, inputs: Values) -> list[tuple[str, str]]:
        """Nodes, and the parameter or running mean that is changed at each, in order."""
        values = dict(inputs)
        found: dict[tuple[str, str], None] = {}
        for number, node in enumerate(self.narrow.nodes):
            if node.op in ("placeholder", "get_attr", "output"):
                self.narrow.run(values, number, number + 1)
                continue
            seen = self.narrow.look(values, number)
            self.narrow.forget(values, number)
            self.products[node.name] = len(seen.products)
            for product in seen.products:
                if self.least_squares or self._own_bias(product.bias) is not None:
                    found[node.name, product.site.name] = None
            if len(seen.norms) == 1 and not seen.products:
                mean = self.names.get(_memory(seen.norms[0].mean))
                if mean is not None:
                    self.norms[node.name] = seen.norms[0]
                    found[node.name, mean] = None
        stages = []
        for node_name, name in found:
            if node_name not in self.dense.place:
                self._skip(name, "at a node that the original does not have")
            elif self.readers[name] > 1:
                self._skip(name, "used at several places")
            else:
                stages.append((node_name, name))
        if self.least_squares:
            means = {node: mean for node, mean in stages if node in self.norms}
            for node_name, name in stages:
                after = self._chain(node_name)
                if (
                    node_name not in self.norms
                    and self.products[node_name] == 1
                    and after
                    and after[0] in means
                ):
                    self.absorbing[name] = after[0]
            taken = {(node, means[node]) for node in self.absorbing.values()}
            stages = [stage for stage in stages if stage not in taken]
        return stages

    def _skip(self, name: str, reason: str) -> None:
        if not any(entry.name == name for entry in self.entries):
            self.entries.append(LayerEntry(name, "least squares", reason=reason))

    def _chain(self, name: str) -> list[str]:
        """Nodes that follow one by one: batch normalisations, what changes nothing, at last an addition."""
        node = self.narrow.nodes[self.narrow.place[name]]
        found: list[str] = []
        while len(node.users) == 1:
            (user,) = node.users
            added = operator_name(user) in ADDS and len(user.all_input_nodes) == 2
            if not (added or user.name in self.norms or self._same(user)):
                break
            found.append(user.name)
            node = user
            if added:
                break
        return found

    def _same(self, node: fx.Node) -> bool:
        """Whether a node gives back what it is given, in evaluation mode."""
        if node.op == "call_module":
            module = self.narrow.module.get_submodule(str(node.target))
            return type(module) in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
        return operator_name(node) in _SAME and len(node.all_input_nodes) == 1

    # -- least squares --------------------------------------------------------------------------

    def _solve(self, reached: Iterator[tuple[Values, Values]], batches: int, node: str, name: str) -> None:
        """Change the weights of the product with the parameter ``name``."""
        found = self._parts(reached, batches, node, name)
        if isinstance(found, str):
            self._skip(name, found)
            return
        norm = self.norms.get(self.absorbing.get(name, ""))
        ridges = RIDGES if self.least_squares else (BIAS_ONLY,)
        for part in found:
            bias = self._own_bias(part.bias)
            shiftable = bias is not None or norm is not None
            change, ridge, before, after = part.problem.best(shiftable, ridges, self.first)
            reason = "" if change is not None else "no change is better on held-out calibration data"
            self.entries.append(LayerEntry(name, "least squares", before, after, ridge, reason))
            if change is None:
                continue
            self.first = min(ridge, RIDGES[-1])
            write(part.site, self.tensors[name].detach(), change[:, :, :-1])
            shift = change[:, :, -1].reshape(-1)
            if bias is not None:
                bias += shift.to(bias)
            elif norm is not None:
                norm.mean.sub_(shift.to(norm.mean))

    def _parts(
        self, reached: Iterator[tuple[Values, Values]], batches: int, node: str, name: str
    ) -> str | list[_Fit]:
        """What was seen over all batches of each used part of a parameter; or why there is nothing."""
        parts: dict[Any, _Fit] = {}
        for number, (wanted, own) in enumerate(reached):
            got = self._calls(self.narrow, own, node, name)
            aims = self._calls(self.dense, wanted, node, name)
            if len(got) != len(aims):
                return "called another number of times by the original"
            missing = self._missing(node, wanted, own) if len(got) == 1 else None
            for mine, aim in zip(got, aims, strict=True):
                target = self._target(aim)
                if target is None or target.shape != mine.output.shape:
                    return "its outputs have no counterpart in the original"
                if missing is not None and missing.shape == target.shape:
                    target = target + missing
                weight = matrix(mine.site, self.tensors[name])
                entries = weight.shape[2]
                if entries > _ENTRIES:
                    return f"it reads {entries:,} entries, more than {_ENTRIES:,}"
                most = max(_POSITIONS, _PER_ENTRY * entries) // (batches * len(got)) + 1
                most = min(most, _AT_ONCE // (entries + weight.shape[1]))
                at = places(mine.site, mine.output, most, self.generator)
                u, y = inputs(mine.site, mine.input, at), outputs(mine.site, mine.output, at)
                if u.shape[1] != entries or y.shape[1] != weight.shape[1]:
                    return "its inputs are laid out in a way that is not known"
                key = tuple((part.start, part.stop) for part in mine.site.region)
                part = parts.setdefault(key, _Fit(mine.site, mine.bias, Problem()))
                t = outputs(mine.site, target, at)
                part.problem.add(u, t - y, t, number, batches)
        if not all(part.problem.held.count and part.problem.fit.count for part in parts.values()):
            return "too little data to hold some out"
        return list(parts.values())

    def _calls(self, runner: Runner, values: Values, node: str, name: str) -> list[Product]:
        found = runner.look(dict(values), runner.place[node]).products
        return [product for product in found if product.site.name == name]

    def _own_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to a product, to be written to: (part of) a parameter that nothing else reads."""
        name = self.names.get(_memory(bias)) if bias is not None else None
        if bias is None or name is None or self.readers[name] != 1:
            return None
        return bias.detach().reshape(-1) if bias.is_contiguous() else None

    def _target(self, aim: Product) -> torch.Tensor | None:
        """What is left of the original's outputs."""
        graph = self.narrowing.graph
        tensor = graph.captured.program.tensors.get(aim.site.name)
        label = graph.labels(tensor)[aim.site.outer] if tensor is not None else None
        kept = self.narrowing.kept(label)
        if kept is None:
            return aim.output
        if kept.over:
            return None
        part = aim.site.region[aim.site.outer]
        index = kept.index[(kept.index >= part.start) & (kept.index < part.stop)] - part.start
        return aim.output.index_select(aim.site.channel, torch.from_numpy(index).to(aim.output.device))

    def _missing(self, name: str, wanted: Values, own: Values) -> torch.Tensor | None:
        """What is missing from the value that is added to a product later on, in the product's own scale."""
        chain = self._chain(name)
        if self.products[name] != 1 or not chain or chain[-1] in self.norms:
            return None
        last = self.narrow.nodes[self.narrow.place[chain[-1]]]
        others = [node for node in last.all_input_nodes if node.name not in {name, *chain}]
        if operator_name(last) not in ADDS or len(others) != 1 or others[0] not in own:
            return None
        if "alpha" in last.kwargs or len(last.args) > 2:
            return None
        value = self.narrowing.tree(others[0].name)
        target = next((value for node, value in wanted.items() if node.name == others[0].name), None)
        if not isinstance(value, Value) or not isinstance(target, torch.Tensor):
            return None
        labels = [value.label(d) for d in range(len(value.shape))]
        got = own[others[0]]
        if target.dim() != len(labels):
            return None
        target = narrowed(target, labels, self.narrowing)
        if target.shape != got.shape:
            return None
        missing: torch.Tensor = target - got
        for step in chain:
            if step in self.norms:
                scale = self.norms[step].scale
                scale = torch.where(scale.abs() < 1e-6, torch.inf, scale).to(missing.dtype)
                missing = missing / scale.reshape(1, -1, *[1] * (missing.dim() - 2))
        return missing

    # -- statistics -----------------------------------------------------------------------------

    def _statistics(self, reached: Iterator[tuple[Values, Values]], node: str, name: str) -> None:
        """Measure the mean and the variance of what a batch normalisation reads, over all batches."""
        parts: Sequence[Any] = []
        count = 0
        shift: torch.Tensor | None = None
        for _, own in reached:
            (norm,) = self.narrow.look(dict(own), self.narrow.place[node]).norms
            x = norm.input.double().movedim(1, 0).flatten(1)
            shift = x.mean(1) if shift is None else shift  # sums of squares are those about a mean
            x = x - shift[:, None]
            sums = x.sum(1), x.square().sum(1)
            parts = sums if not parts else [a + b for a, b in zip(parts, sums, strict=True)]
            count += x.shape[1]
        norm, (total, squares) = self.norms[node], parts
        assert shift is not None
        if count < 2:
            self._skip(name, "too little data")
            return
        mean = total / count
        norm.mean.copy_(mean + shift)
        norm.var.copy_(((squares - count * mean.square()) / (count - 1)).clamp(min=0))
        self.entries.append(LayerEntry(name, "statistics"))


def _memory(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins, also of a part of it."""
    return tensor.untyped_storage().data_ptr()
