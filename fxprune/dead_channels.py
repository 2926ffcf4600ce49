"""Channels that do no work, removed without changing the result.

A channel is dead where everything that makes it is zero (masks of ``torch.nn.utils.prune``, training with a
penalty on whole channels): it is the same number for every input. Where that number is zero at all layers
that read the channel, nothing changes when it goes. Where it is another (a bias, the shift of a batch
normalisation that a ReLU lets through), what it adds to a linear layer or to a convolution without padding
goes into that layer's bias, or into the running mean behind it; where a layer can take up nothing, the
channel stays, and a note says why.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from .api import analyze, plan
from .coupling.graph import CouplingGraph, tree_values
from .coupling.groups import Group, Member
from .coupling.roles import Use
from .errors import VerificationError
from .inputs import normalize
from .origins import remember

__all__ = ["lossless"]

_RUNS = 3
"""How many random inputs are looked at, beside the given ones."""
_SAME = 1e-6
"""Differences up to this share of the largest entry are rounding."""
_ALLOWED = 1e-4
"""Largest relative difference of the result, in the precision of the model."""

Mask = NDArray[np.bool_]


def lossless(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of ``model`` without the channels that do no work; it computes the same, up to rounding.

    Args:
        model: the model; it is not changed, and is looked at in evaluation mode.
        example_inputs: real inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Returns:
        The narrower network, in the mode of ``model``; its ``meta["fxprune"]`` holds the plan, whose notes
        say which dead channels had to stay, and why.

    Raises:
        CaptureError, ExampleInputsError: as :func:`fxprune.analyze`.
        VerificationError: if the result differs from the model on the example inputs; then it is not
        returned.
    """
    twin = _copied(model).eval()
    graph = analyze(twin, example_inputs, fill_outputs=())
    args, kwargs = normalize(example_inputs)
    search = _Search(graph, twin, args, kwargs)
    removed = {group.name: gone for group in graph.groups if (gone := search.removable(group))}
    made = plan(graph, 0.0).with_removed(removed)
    while wrong := {problem.group for problem in made.check(graph) if problem.group in made.removed}:
        search.notes += [f"dead channels of {name} stay, as rows would lose unequal shares" for name in wrong]
        made = made.without(*wrong)
    notes = tuple(dict.fromkeys(search.notes))
    made = replace(made, notes=(*made.notes, *notes), settings={"lossless": True}, costs={})
    filled = _copied(twin)
    search.fold(filled, made.removed)
    pruned = made.apply(filled)
    with torch.no_grad():
        wanted, got = twin(*args, **kwargs), pruned(*args, **kwargs)
    worst = _difference(wanted, got)
    if not worst <= _ALLOWED:
        raise VerificationError(
            f"the network without its dead channels differs from the original by {worst:.1e}, allowed is "
            f"{_ALLOWED:.0e}. Please report this; fxprune.prune is not concerned."
        )
    remember(pruned, model, [made])
    return pruned.train(model.training)


def _copied(model: nn.Module) -> nn.Module:
    """A copy; what a hook computed is no leaf of autograd, which ``deepcopy`` refuses."""
    tensors = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})


@dataclass(frozen=True)
class _Fold:
    """What removed channels add to a layer: the sum goes into ``tensor``, times ``sign``."""

    group: str
    tensor: str
    sign: int
    added: Tensor
    """``(units, outputs)``: what each unit adds."""


@dataclass
class _Search:
    graph: CouplingGraph
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    folds: list[_Fold] = field(default_factory=list)

    def __post_init__(self) -> None:
        program = self.graph.captured.program
        self.nodes = list(program.graph.nodes)
        self.values = self.graph.run.values
        self.wanted = {use.input for group in self.graph.groups for _, use in _consumers(group)} - {None}
        self.seen = self._observe() if not self.graph.captured.regions else {}
        if self.graph.captured.regions:
            self.notes.append("the model was captured in parts; its dead channels are not looked for")

    def removable(self, group: Group) -> list[int]:
        """Positions in ``group`` of the units that may go; notes why dead ones stay."""
        producers = [(m, use) for m in group.members for use in m.producing]
        if not producers or self.graph.captured.regions:
            return []
        zero = {use.node: self._zero(group, member) for member, use in producers}
        if not any(mask.any() for mask in zero.values()):
            return []
        if not group.exact:
            self._stay(group, int(np.logical_and.reduce([*zero.values()]).sum()), group.inexact_because)
            return []
        constant = self._constant(group, zero)
        dead: Mask = np.ones(group.size, dtype=bool)
        for _, use in _consumers(group):
            if use.input is None:
                self._stay(group, int(dead.sum()), f"what {use.node.name} reads arises inside of it")
                return []
            dead &= constant.get(use.input, np.zeros(group.size, dtype=bool))
        gone = dead.copy()
        folds: list[_Fold] = []
        for member, use in _consumers(group):
            value = self._values_of(group, member, use)
            if value is None:
                self._stay(group, int(gone.sum()), f"{use.node.name} reads them in another order")
                return []
            steady, carried = value
            if not steady[gone].all():
                self._stay(group, int((gone & ~steady).sum()), f"at {use.node.name} they depend on the place")
            gone &= steady
            nonzero = gone & carried
            if nonzero.any():
                fold, reason = self._fold(group, member, use)
                if fold is None:
                    self._stay(group, int(nonzero.sum()), reason)
                    gone &= ~nonzero
                else:
                    folds.append(fold)
        if gone.all():
            gone[0] = False  # one has to stay
        gone = _balanced(group, gone)
        self.folds += folds
        return [int(unit) for unit in np.flatnonzero(gone)]

    def fold(self, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> None:
        """Put what the removed units add into the layers of ``model`` that read them, in place."""
        named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for fold in self.folds:
                gone = list(removed.get(fold.group, ()))
                if gone:
                    tensor = named[fold.tensor]
                    tensor += (fold.sign * fold.added[gone].sum(0)).to(tensor.dtype)

    def _stay(self, group: Group, count: int, reason: str) -> None:
        if count:
            self.notes.append(f"{count} dead channels of {group.name} stay: {reason}")

    def _observe(self) -> dict[fx.Node, list[Tensor]]:
        """What the consumers read, for the given inputs and for random ones."""
        program = self.graph.captured.program
        module = program.module()
        generator = torch.Generator().manual_seed(0)
        seen: dict[fx.Node, list[Tensor]] = {node: [] for node in self.wanted if node is not None}
        by_name = {node.name: node for node in seen}

        def random(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return (3 * torch.randn(leaf.shape, generator=generator)).to(leaf)
            return leaf

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.name in by_name and isinstance(result, Tensor):
                    seen[by_name[n.name]].append(result.detach().clone())
                return result

        inputs = program.bind(self.args, self.kwargs)
        with torch.no_grad():
            for number in range(_RUNS + 1):
                given = inputs if not number else pytree.tree_map(random, inputs)
                Watch(module).run(*pytree.tree_map_only(Tensor, Tensor.clone, given))
        return seen

    def _zero(self, group: Group, member: Member) -> Mask:
        """The units whose entries in a weight that makes them are all zero."""
        tensor = _effective(self.model, member)
        if tensor is None or member.units.ndim != 1 or tensor.shape != member.tensor.shape:
            return np.zeros(group.size, dtype=bool)
        axis = member.axis.dim
        rest = [d for d in range(tensor.dim()) if d != axis]
        empty = (
            (tensor == 0).all(dim=rest)
            if len(rest) == 1
            else (tensor == 0).movedim(axis, 0).flatten(1).all(1)
        )
        found: Mask = np.ones(group.size, dtype=bool)
        present = np.zeros(group.size, dtype=bool)
        units = member.units
        for index, unit in enumerate(units.tolist()):
            if unit >= 0:
                present[unit] = True
                found[unit] &= bool(empty[index])
        return found & present

    def _constant(self, group: Group, zero: Mapping[fx.Node, Mask]) -> dict[fx.Node, Mask]:
        """For each node that carries the group's channels the units that are the same for all inputs."""
        own = {int(c) for c in group.units}
        found: dict[fx.Node, Mask] = {}
        for node in self.nodes:
            if not self._carries(node, own):
                continue
            made = zero.get(node, np.zeros(group.size, dtype=bool))
            inputs = [n for n in node.all_input_nodes if not self._fixed(n)]
            carrying = [n for n in inputs if self._carries(n, own)]
            if carrying and (len(carrying) == len(inputs) or node.target in (torch.cat, torch.concat)):
                made = made | np.logical_and.reduce([found[n] for n in carrying if n in found])
            found[node] = made
        return found

    def _carries(self, node: fx.Node, own: set[int]) -> bool:
        for value in tree_values(self.values.get(node)):
            if value.state is not None:
                continue
            for dim in range(len(value.shape)):
                label = value.label(dim)
                if label is not None and own & set(self.graph.classes(label.ids.reshape(-1)).tolist()):
                    return True
        return False

    def _fixed(self, node: fx.Node) -> bool:
        values = list(tree_values(self.values.get(node)))
        return node.op == "get_attr" or (bool(values) and all(value.fixed for value in values)) or not values

    def _values_of(self, group: Group, member: Member, use: Use) -> tuple[Mask, Mask] | None:
        """For each unit whether it is the same number wherever it is read, and whether that is not zero."""
        channels = self._channels(member, use)
        if channels is None:
            return None
        steady, carried = np.ones(group.size, dtype=bool), np.zeros(group.size, dtype=bool)
        scale = max(float(channels.abs().max()), 1e-30)
        first = channels[:, :1]
        same = ((channels - first).abs() <= _SAME * scale).all(1)
        zero = (channels == 0).all(1)
        for index, unit in enumerate(member.units.tolist()):
            if unit >= 0:
                steady[unit] &= bool(same[index])
                carried[unit] |= not bool(zero[index])
        return steady, carried

    def _channels(self, member: Member, use: Use) -> Tensor | None:
        """What is read: ``(indices of the axis, places)``; None where that cannot be seen."""
        if use.input is None or _part(member, use) or member.units.ndim != 1 or not use.dims:
            return None
        rows = []
        for seen in self.seen.get(use.input, ()):
            order = [*use.dims, *(d for d in range(seen.dim()) if d not in use.dims)]
            rows.append(seen.permute(order).flatten(len(use.dims)).flatten(0, len(use.dims) - 1))
        found = torch.cat(rows, 1) if rows else None
        return found if found is not None and len(found) == len(member.units) else None

    def _fold(self, group: Group, member: Member, use: Use) -> tuple[_Fold | None, str]:
        """What the units add to the layer at ``use``, and where that goes; or why it cannot go anywhere."""
        name = use.node.name
        weight = _effective(self.model, member)
        channels = self._channels(member, use)
        layer = self._layer(use.node)
        if layer is None or weight is None or channels is None:
            return None, f"they are not zero at {name}, which is no layer with a bias"
        if isinstance(layer, _ConvNd):
            if layer.transposed or layer.groups > 1 or any(_padding(layer)):
                what = "pads" if any(_padding(layer)) else "is grouped or transposed"
                return (
                    None,
                    f"they are not zero at {name}, which {what}, so that they add to each place differently",
                )
            per_channel = weight.flatten(2).sum(2).T
        elif isinstance(layer, nn.Linear):
            per_channel = weight.T
        else:
            return None, f"they are not zero at {name}, which is no linear layer and no convolution"
        target, sign = self._takes_up(use.node, layer)
        if not target:
            return None, f"they are not zero at {name}, which has no bias that could take up what they add"
        added = torch.zeros(group.size, per_channel.shape[1], dtype=torch.float64)
        for index, unit in enumerate(member.units.tolist()):
            if unit >= 0:
                added[unit] += channels[index, 0].double() * per_channel[index].double()
        return _Fold(group.name, target, sign, added), ""

    def _layer(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return self.model.get_submodule(str(node.target))

    def _takes_up(self, node: fx.Node, layer: nn.Module) -> tuple[str, int]:
        """The tensor to which a constant may be added, and with which sign."""
        calls = [n for n in self.nodes if n.op == "call_module" and n.target == node.target]
        if len(calls) > 1:
            return "", 0
        if getattr(layer, "bias", None) is not None:
            return f"{node.target}.bias", 1
        behind = [self._layer(user) for user in node.users]
        if len(behind) == 1 and isinstance(behind[0], _BatchNorm) and behind[0].running_mean is not None:
            (user,) = node.users
            if sum(n.op == "call_module" and n.target == user.target for n in self.nodes) == 1:
                return f"{user.target}.running_mean", -1
        return "", 0


def _consumers(group: Group) -> Iterator[tuple[Member, Use]]:
    for member in group.members:
        for use in member.consuming:
            yield member, use


def _part(member: Member, use: Use) -> bool:
    """Whether the product uses only some of the weight."""
    sizes = [range(size)[s] for s, size in zip(use.region or (), member.tensor.shape, strict=False)]
    return any(len(taken) < size for taken, size in zip(sizes, member.tensor.shape, strict=False))


def _effective(model: nn.Module, member: Member) -> Tensor | None:
    """The weight that a layer computes with: under masks or parametrizations another than its parameter."""
    path, _, name = member.axis.name.rpartition(".")
    computed = path.partition(".parametrizations.")
    try:
        if computed[1]:
            owner, attribute = model.get_submodule(computed[0]), computed[2]
        else:
            owner, attribute = model.get_submodule(path), name.removesuffix("_orig")
        if attribute != name:
            for hook in owner._forward_pre_hooks.values():
                hook(owner, ())
        found: Any = getattr(owner, attribute, None)
    except (AttributeError, TypeError):
        return None
    return found.detach() if isinstance(found, Tensor) else None


def _padding(layer: _ConvNd) -> tuple[int, ...]:
    padding: Any = layer.padding
    return (int(padding != "valid"),) if isinstance(padding, str) else tuple(padding)


def _balanced(group: Group, gone: Mask) -> Mask:
    """As many of the units as every row of a balanced set can lose."""
    for band in group.balance:
        if len(band) < 2:
            continue
        count = min(int(gone[row].sum()) for row in band)
        if len({len(row) for row in band}) > 1:
            count = 0
        for row in band:
            count = min(count, len(row) - 1)
        for row in band:
            gone[row[np.flatnonzero(gone[row])[count:]]] = False
    return gone


def _difference(wanted: Any, got: Any) -> float:
    """Largest difference of two trees of tensors, as a share of the largest entry."""
    ones, others = ([t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)] for tree in (wanted, got))
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        if one.is_floating_point() and one.numel():
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)))
    return worst
