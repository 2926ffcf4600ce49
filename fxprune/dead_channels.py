"""Channels that do no work, removed without changing the result.

A channel is dead where everything that makes it is zero (masks of ``torch.nn.utils.prune``, training with a
penalty on whole channels), or where a batch normalisation or a depthwise filter multiplies it by zero: it is
the same number for every input. Where that number is zero at all layers that read the channel, or these
multiply it by zeros, nothing changes when it goes. Where it is another (a bias, the shift of a batch
normalisation that a ReLU lets through), what it adds to a layer is looked at: where that is the same at all
places, for all inputs and at other sizes of these, it goes into the layer's bias, or into the running mean
behind it. Where it is not (a convolution adds less beside padding, a sum adds more over more places), or the
layer can take up nothing, one such channel stays for all, as constants are multiples of each other: the
weights with which the layer reads the others are added to its own, times these multiples. Where that cannot
be done either, the channel stays. Notes say what stays, and why.

A channel of which there is a copy (the same weights, shifts and statistics make both) goes, too: the weights
with which the layers read the two are added up.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from . import convolution
from .api import analyze, plan
from .coupling.graph import CouplingGraph, tree_values
from .coupling.groups import Group, Member
from .coupling.roles import Use
from .errors import VerificationError
from .graph_module import Interpreter
from .inputs import normalize
from .nodes import mutable, operator_name
from .origins import remember
from .passes import rewrite
from .planning.plan import PruningPlan
from .region_program import RegionLink, RegionProgram, handed, joined
from .sizes import changes, guarded, resized

__all__ = ["lossless", "without_dead_channels"]

_RUNS = 3
"""How many random inputs are looked at, beside the given ones."""
_SAME = 1e-6
"""Differences up to this share of the largest entry are rounding."""
_EXACT = 1e-9
"""The same in double precision."""
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
    looked_at = bool(graph.captured.trials) or bool(guarded(graph.captured.program.graph))
    made, pruned = without_dead_channels(graph, args, kwargs, any_size=not looked_at)
    remember(pruned, model, [made])
    return pruned.train(model.training)


def without_dead_channels(
    graph: CouplingGraph, args: tuple[Any, ...], kwargs: dict[str, Any], any_size: bool = False
) -> tuple[PruningPlan, nn.Module]:
    """The plan and the narrower network.

    Args:
        graph: the analysis of a network in evaluation mode.
        args: real positional inputs.
        kwargs: real keyword inputs.
        any_size: the network is for sizes that the analysis has not looked at, too; then nothing is folded.

    Raises:
        VerificationError: as :func:`lossless`.
    """
    search = _Search(graph, args, kwargs, any_size)
    removed = {group.name: gone for group in graph.groups if (gone := search.superfluous(group))}
    made = plan(graph, 0.0).with_removed(removed)
    while wrong := {problem.group for problem in made.check(graph) if problem.group in made.removed}:
        search.keep(made, wrong, "rows would lose unequal shares")
        made = made.without(*wrong)
    while violations := (rewritten := rewrite(graph, made.removed)).violations:
        first = violations[0]
        wrong = search.around(first.node) & made.removed.keys() or set(made.removed)
        search.keep(made, wrong, f"node {first.node}: {first.reason}")
        made = made.without(*wrong)
    notes = dict.fromkeys(filter(None, (remark.said(made) for remark in search.remarks)))
    made = replace(made, notes=(*made.notes, *notes), settings={"lossless": True}, costs={})
    folded = search.folded(made.removed)
    pruned = rewritten.materialize(folded)
    worst = _apart(search.module, pruned, args, kwargs)
    if not worst <= _ALLOWED:
        # Where values are sorted or decide, rounding may change which come: much less of it does not.
        given = pytree.tree_map(_double, (args, kwargs))
        with contextlib.suppress(Exception):  # the code may want single precision
            worst = _apart(_copied(search.module).double(), _copied(pruned).double(), *given)
    if not worst <= _ALLOWED:
        raise VerificationError(
            f"the network without its dead channels differs from the original by {worst:.1e}, allowed is "
            f"{_ALLOWED:.0e}. Please report this; fxprune.prune is not concerned."
        )
    return made, pruned


def _calls(program: RegionProgram, model: nn.Module, given: Any) -> list[tuple[str, Any]]:
    """Run ``model`` once: with which arguments the regions are called, by their paths, in order."""
    calls: list[tuple[str, Any]] = []

    def note(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        clone = partial(pytree.tree_map_only, Tensor, lambda t: t.detach().clone())
        calls.append((path, (clone(args), clone(kwargs))))

    hooks = [
        model.get_submodule(region.path).register_forward_pre_hook(
            partial(note, region.path), with_kwargs=True
        )
        for region in program.regions
    ]
    try:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, given)
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _apart(one: nn.Module, other: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Largest relative difference of what two networks give."""
    with torch.no_grad():
        wanted, got = (
            module(*pytree.tree_map_only(Tensor, Tensor.clone, args), **kwargs) for module in (one, other)
        )
    return _difference(wanted, got)


def _copied(model: nn.Module) -> nn.Module:
    """A copy; what a hook computed is no leaf of autograd, which ``deepcopy`` refuses."""
    tensors = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})


@dataclass(frozen=True, eq=False)
class _Reading:
    """How a node reads the channels of a group.

    Attributes:
        node: the node.
        given: the node whose value it reads.
        dims: the dimensions of that value that hold the channels, rows first.
        units: the unit of each index of these, -1 for none.
    """

    node: fx.Node
    given: fx.Node
    dims: tuple[int, ...]
    units: NDArray[np.int64]

    def channels(self, value: Tensor) -> Tensor:
        """What is read, ``(indices, places)``."""
        others = [d for d in range(value.dim()) if d not in self.dims]
        return value.permute(*self.dims, *others).reshape(self.units.size, -1)

    def alone(self, value: Tensor, units: Mask) -> Tensor:
        """As ``value``, with these units as they are at its first place, and zeros for all else."""
        here = np.where(self.units >= 0, units[self.units], False)
        at = [slice(None) if d in self.dims else slice(1) for d in range(value.dim())]
        shape = [value.shape[d] if d in self.dims else 1 for d in range(value.dim())]
        mask = torch.from_numpy(np.ascontiguousarray(here.transpose(np.argsort(self.dims))))
        constant = value[tuple(at)] * mask.reshape(shape).to(value.device)
        return constant.expand(value.shape).double()


@dataclass(frozen=True, eq=False)
class _Fold:
    """What removed channels add to a layer: the sum goes into ``tensor``, times ``sign``.

    Attributes:
        group: the group that they are of.
        units: which channels; those of them that go are folded.
        reading: how the layer reads them.
        made: the dimension of its result with the channels that it makes.
        tensor: what takes it up.
        sign: 1, or -1 for what is subtracted.
    """

    group: Group
    units: Mask
    reading: _Reading
    made: int
    tensor: str
    sign: int


@dataclass(frozen=True, eq=False)
class _Merge:
    """Multiples of channels that a layer reads: their weights are added to those of the channels that stay.

    Attributes:
        group: the group that they are of.
        member: the axis of the layer's weight.
        kept: by unit that goes the one that stays.
        factors: by unit that goes how many times the one that stays it is; where there is none, once.
    """

    group: Group
    member: Member
    kept: Mapping[int, int]
    factors: Mapping[int, float] = field(default_factory=dict)

    def moved(self, weight: Tensor, gone: Set[int]) -> Tensor:
        """``weight`` with the entries of these units added to those that stay, and zeros left there."""
        dims = [*self.member.over, self.member.axis.dim]
        rest = [d for d in range(weight.dim()) if d not in dims]
        rows = _by_index(weight.detach().double(), self.member).clone()
        places = _places(self.member.units)
        for unit in gone:
            from_, to = (torch.tensor(places.get(u, []), dtype=torch.long) for u in (unit, self.kept[unit]))
            if len(from_) != len(to):
                raise ValueError(f"unit {unit} has {len(from_)} indices, the one that stays {len(to)}")
            rows[to] += self.factors.get(unit, 1.0) * rows[from_]
            rows[from_] = 0
        shape = [weight.shape[d] for d in (*dims, *rest)]
        back = [[*dims, *rest].index(d) for d in range(weight.dim())]
        return rows.reshape(shape).permute(*back).contiguous().to(weight.dtype)


@dataclass(frozen=True, eq=False)
class _Remark:
    """Something to say of some units of a group, once it is known which of them go.

    Attributes:
        group: the group.
        units: the units.
        text: what is to be said, after how many they are.
        gone: whether it is said of those that go, or of those that stay.
    """

    group: Group
    units: Mask
    text: str
    gone: bool = False

    def said(self, plan: PruningPlan) -> str:
        """The note on a plan, or nothing, where it is true of no unit."""
        removed = _none(self.group)
        removed[list(plan.removed.get(self.group.name, ()))] = True
        count = int((self.units & (removed if self.gone else ~removed)).sum())
        return f"{count} {self.text}" if count else ""


@dataclass
class _Search:
    graph: CouplingGraph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    any_size: bool
    """Whether there are sizes of the inputs at which it could not be run."""
    remarks: list[_Remark] = field(default_factory=list)
    folds: list[_Fold] = field(default_factory=list)
    merges: list[_Merge] = field(default_factory=list)

    def __post_init__(self) -> None:
        captured = self.graph.captured
        self.program = captured.program
        self.nodes = list(self.program.graph.nodes)
        self.values = self.graph.run.values
        self.module = self.program.result(captured.class_name).eval()
        self.seen: dict[str, list[dict[str, Any]]] = {}
        """By node, for each run, what the nodes gave that it reads, by their names."""
        self.carried = self._carried()
        self.scaled: dict[str, list[fx.Node]] = {}
        """By the tensor with which they multiply each channel, the normalisations that do."""
        for node in self.nodes:
            self.scaled.setdefault(self._scale(node), []).append(node)
        self._observe()

    def superfluous(self, group: Group) -> list[int]:
        """Positions in ``group`` of the units that may go: dead ones, and copies of others."""
        dead = self.dead(group)
        return sorted([*dead, *self.copies(group, set(dead))])

    def copies(self, group: Group, dead: Set[int]) -> list[int]:
        """Positions in ``group`` of units that are the same as others that stay."""
        if not group.exact or any(len(atoms) > 1 for atoms in group.balance):
            return []
        reading = [m for m in group.members if m.consuming]
        making = [m for m in group.members if not m.consuming]
        if not reading or not any(m.producing for m in making) or any(m.producing for m in reading):
            return []
        kept = _alike(group, making, dead)
        if not kept or self._ends(group):
            return []
        merges: list[_Merge] = []
        for node in {use.node: None for member in reading for use in member.consuming}:
            members = [member for member in reading if node in {use.node for use in member.consuming}]
            if not any(merge.member in members for merge in merges):
                merge = self._merge(group, members, kept)
                if merge is None:
                    return []
                merges.append(merge)
        self.merges += merges
        copies = _none(group)
        copies[list(kept)] = True
        text = f"channels of {group.name} are copies of others: both are read as one"
        self.remarks.append(_Remark(group, copies, text, gone=True))
        return list(kept)

    def _merge(
        self,
        group: Group,
        members: Iterable[Member],
        kept: Mapping[int, int],
        factors: Mapping[int, float] | None = None,
    ) -> _Merge | None:
        """How the weight of a layer is moved so that it gives the same; None if there is no such way.

        Args:
            group: the group.
            members: axes of the layer's tensors; of a weight and its mask the weight can be moved.
            kept: see :class:`_Merge`.
            factors: see :class:`_Merge`; None for copies, which every run can tell apart.
        """
        for member in members:
            merge, name = _Merge(group, member, kept, factors or {}), member.axis.name
            try:
                changed = {name: merge.moved(self.program.tensors[name], kept.keys())}
            except ValueError:
                continue
            nodes = {use.node for use in member.consuming}
            every = factors is None
            if self._sole(name) and all(self._unchanged(node, changed, _SAME, every) for node in nodes):
                return merge
        return None

    def dead(self, group: Group) -> list[int]:
        """Positions in ``group`` of the dead units that may go; notes why others stay."""
        producers = [(m, use) for m in group.members for use in m.producing]
        if not producers:
            return []
        zero = {use.node: self._zero(group, member) for member, use in producers}
        scales = [(m, node) for m in group.members for node in self.scaled.get(m.axis.name, ())]
        zero |= {node: self._zero(group, member) for member, node in scales}
        given_to: dict[tuple[fx.Node, fx.Node | None], list[tuple[Member, Use]]] = {}
        for member, use in _consumers(group):  # a weight and its mask, say, are one reader
            given_to.setdefault((use.node, self._given(use)), []).append((member, use))
        unread: dict[tuple[fx.Node, fx.Node | None], Mask] = {
            reader: np.logical_or.reduce([self._zero(group, member) for member, _ in pairs])
            for reader, pairs in given_to.items()
        }
        """By reader the units that its weight multiplies by zeros: what they are does not matter there."""
        gone: Mask = np.logical_or.reduce([*zero.values()])
        if unread:
            gone = gone | np.logical_and.reduce([*unread.values()])
        if not gone.any():
            return []
        if not group.exact:
            self._stay(group, np.logical_and.reduce([*zero.values()]), group.inexact_because)
            return []
        constant = self._constant(group, zero)
        home = self._home(group)
        if home is not None:
            return self._inside(group, home, np.logical_or.reduce([*zero.values()]))
        same = [
            constant.get(given, _none(group)) | unread[node, given]
            for node, given in given_to
            if given is not None
        ]
        self._meet(group, gone & ~np.logical_and.reduce([gone, *same]), constant)
        gone = np.logical_and.reduce([gone, *same])
        readings = []
        for (node, given), pairs in given_to.items():
            use = pairs[0][1]
            if given is None:
                self._stay(group, gone, f"what {use.at} reads arises inside of it")
                return []
            whole = not any(_part(*pair) for pair in pairs)
            reading = self._reading(group, node, given) if whole else None
            if reading is None:
                self._stay(group, gone, f"how {use.at} reads them is not seen")
                return []
            readings.append(([member for member, _ in pairs], use, reading, unread[node, given]))
        ends = self._ends(group)
        for node, inputs in ends.items():
            zeros = [constant.get(given, _none(group)) & self._zeros(group, node, given) for given in inputs]
            every = np.logical_or if operator_name(node) in _PRODUCTS else np.logical_and
            here = every.reduce(zeros)
            self._stay(group, gone & ~here, f"they are not zero at {node.name}")
            gone &= here
        if not readings and not ends:
            self._stay(group, gone, "no node of the graph shows what reads them")
            return []
        folds: list[_Fold] = []
        merges: list[_Merge] = []
        stay = _none(group)  # for others
        for members, use, reading, nothing in readings:
            steady, carried = self._read(group, reading)
            steady |= nothing
            carried &= ~nothing
            self._stay(group, gone & ~steady, f"at {use.at} they depend on the place")
            gone &= steady
            here = gone & carried
            if not here.any():
                continue
            fold, reason = self._fold(group, use, reading, here)
            if fold is not None:
                folds.append(fold)
                continue
            text = f"they are not zero at {use.at}, {reason}"
            merge = self._one_for_all(group, members, reading, here, stay & steady & carried)
            if merge is not None:
                merges.append(merge)
                stay[list(merge.kept.values())] = True
                merged = _none(group)
                merged[list(merge.kept)] = True
                here &= ~merged
                many = f"dead channels of {group.name} are read as multiples of others that stay: {text}"
                self.remarks.append(_Remark(group, merged, many, gone=True))
            self._stay(group, here, text)
            gone &= ~here
        if gone.all():
            gone[0] = False  # one has to stay
        self.folds += folds
        self.merges += merges
        return self._balanced(group, gone)

    def _one_for_all(
        self, group: Group, members: Sequence[Member], reading: _Reading, units: Mask, others: Mask
    ) -> _Merge | None:
        """Constants of which a layer reads multiples: one of each such kind stays, for the others.

        Args:
            group: the group.
            members: axes of the layer's tensors that have these channels.
            reading: how the layer reads them.
            units: units that are the same wherever they are read there, and not zero.
            others: such units that stay anyway.
        """
        if self.any_size:
            return None
        seen = self.seen[reading.node.name][0][reading.given.name]
        constants = reading.channels(seen)[:, 0].double().cpu().numpy()
        weight = members[0].units
        read, written, width = _places(reading.units), _places(weight), weight.shape[-1]
        kinds: dict[Any, list[int]] = {}
        """Units that the layer reads in the same rows of its weight."""
        for unit in np.flatnonzero(units | others).tolist():
            rows = tuple(index // width for index in written.get(unit, ()))
            kinds.setdefault((rows, len(read[unit])), []).append(unit)
        kept: dict[int, int] = {}
        factors: dict[int, float] = {}
        for left in kinds.values():
            while left:
                values = constants[np.array([read[unit] for unit in left])]
                sizes = np.abs(values).max(1)
                # One that is large, so that no factor is; better one that stays anyway.
                first = int(np.where(others[left], 10 * sizes, sizes).argmax())
                place = int(np.abs(values[first]).argmax())
                times = values[:, place] / values[first, place]
                multiple = np.abs(values - times[:, None] * values[first]).max(1) <= _SAME * sizes
                multiple[first] = False
                for unit, factor in zip(np.array(left)[multiple].tolist(), times[multiple], strict=True):
                    if units[unit]:
                        kept[unit], factors[unit] = left[first], float(factor)
                multiple[first] = True
                left = [unit for unit, done in zip(left, multiple, strict=True) if not done]
        return self._merge(group, members, kept, factors) if kept else None

    def _home(self, group: Group) -> fx.Node | None:
        """The node with all tensors of a group, which begins and ends there; None if there is none such.

        Queries, keys and values of ``nn.MultiheadAttention`` do.
        """
        nodes = {use.node for member in group.members for use in member.uses}
        node = nodes.pop() if len(nodes) == 1 else None
        if node is None or group.name in self.carried[node]:
            return None
        return node if all(self._has(node, member.axis.name) for member in group.members) else None

    def _inside(self, group: Group, node: fx.Node, gone: Mask) -> list[int]:
        """Of a group that begins and ends in one node the units without which the node gives the same.

        Those are tried that a weight of zeros makes, and where these do something, those that are zero.
        """
        made = [self._zero(group, member) for member in group.members if not member.consuming]
        for units in ((gone,) if not self.any_size else ()) + (gone & np.logical_and.reduce(made),):
            changed: dict[str, Tensor] = {}
            for member in group.members:
                name = member.axis.name
                weight = changed.get(name, self.program.tensors[name])
                changed[name] = _without(weight, member, units)
            if units.any() and self._unchanged(node, changed, _EXACT):
                self._stay(group, gone & ~units, f"{node.name} gives something else without")
                units = units.copy()
                if units.all():
                    units[0] = False
                return self._balanced(group, units)
        self._stay(group, gone, f"{node.name} gives something else without them")
        return []

    def _has(self, node: fx.Node, name: str) -> bool:
        """Whether a node computes with the tensor of this name itself, not with what is made of it."""
        if node.op == "call_module":
            path, _, own = name.rpartition(".")
            layer = self.module.get_submodule(str(node.target))
            inside = path == node.target or path.startswith(f"{node.target}.")
            return inside and name.removeprefix(f"{node.target}.") in dict(_tensors(layer)) and bool(own)
        return any(n.op == "get_attr" and n.target == name for n in node.all_input_nodes)

    def _unchanged(
        self, node: fx.Node, tensors: Mapping[str, Tensor], allowed: float, every: bool = True
    ) -> bool:
        """Whether a node gives the same in every run with other tensors in these places.

        Args:
            node: the node.
            tensors: the tensors, by name.
            allowed: differences up to this share of the largest entry are rounding.
            every: look at every run, in place of one for each size.
        """
        runs = self.seen.get(node.name, [])
        if not every:
            sizes = {str(pytree.tree_map_only(Tensor, lambda t: t.shape, run)): run for run in runs}
            runs = list(sizes.values())
        if not runs or not all(self._has(node, name) for name in tensors):
            return False
        return all(
            _difference(self._gives(node, values), self._gives(node, values, tensors)) <= allowed
            for values in runs
        )

    def _gives(
        self, node: fx.Node, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> Any:
        """What a node gives in double precision.

        Args:
            node: the node.
            values: what it reads, by node.
            tensors: tensors of the network that stand in for its own, by name.
        """
        tensors = tensors or {}
        own = pytree.tree_map(_double, dict(values))
        own |= {
            n.name: tensors[str(n.target)].double()
            for n in node.all_input_nodes
            if n.op == "get_attr" and str(n.target) in tensors
        }
        args, kwargs = mutable(map_arg((node.args, node.kwargs), lambda n: own[n.name]))
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_function":
                function: Any = node.target
                return function(*args, **kwargs)
            layer = _copied(self.module.get_submodule(str(node.target))).double()
            inside = dict(_tensors(layer))
            for name, tensor in tensors.items():
                inside[name.removeprefix(f"{node.target}.")].copy_(tensor)
            return layer(*args, **kwargs)

    def folded(self, removed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors that take up what the removed units add, or their weights, by name."""
        found: dict[str, Tensor] = {}
        for merge in self.merges:
            gone = merge.kept.keys() & set(removed.get(merge.group.name, ()))
            name = merge.member.axis.name
            tensor = found.setdefault(name, _like(self.program.tensors[name]))
            with torch.no_grad():
                tensor.copy_(merge.moved(tensor, gone))
        for fold in self.folds:
            units = _none(fold.group)
            units[list(removed.get(fold.group.name, ()))] = True
            units &= fold.units
            if units.any():
                added, _ = self._added(fold.reading, fold.made, units)
                tensor = found.setdefault(fold.tensor, _like(self.program.tensors[fold.tensor]))
                with torch.no_grad():
                    tensor += (fold.sign * added).to(tensor)
        return found

    def around(self, name: str) -> set[str]:
        """The groups whose channels the node ``name`` carries, or reads."""
        near = [n for node in self.nodes if node.name == name for n in (node, *node.all_input_nodes)]
        return set().union(*(self.carried[n] for n in near))

    def keep(self, plan: PruningPlan, names: Iterable[str], reason: str) -> None:
        """Note why what a plan removes of some groups stays."""
        for group in self.graph.groups:
            if group.name in names:
                units = _none(group)
                units[list(plan.removed[group.name])] = True
                self.remarks.append(_Remark(group, units, f"channels of {group.name} stay: {reason}"))

    def _stay(self, group: Group, units: Mask, reason: str) -> None:
        self.remarks.append(_Remark(group, units, f"dead channels of {group.name} stay: {reason}"))

    def _balanced(self, group: Group, gone: Mask) -> list[int]:
        """Positions of as many of the units as can go; each row of a balanced set loses as many."""
        left = _balanced(group, gone)
        self._stay(group, gone & ~left, "rows (of a grouped convolution, of heads) have to stay equally long")
        return [int(unit) for unit in np.flatnonzero(left)]

    def _observe(self) -> None:
        """Note what the consumers read: for the given inputs, random ones, and some of other sizes."""
        wanted = {use.node for group in self.graph.groups for _, use in _consumers(group)}
        wanted |= {node for group in self.graph.groups for node in self._ends(group)}
        wanted |= {node for group in self.graph.groups if (node := self._home(group)) is not None}
        wanted |= {node for node in self.nodes if operator_name(node) in (*_PRODUCTS, _ATTENTION)}
        self.seen |= {node.name: [] for node in wanted}
        seen = self.seen
        generator = torch.Generator().manual_seed(0)

        def random(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            if not leaf.dim():  # a number, which may have to be positive
                return leaf * (1 + torch.rand((), generator=generator).to(leaf))
            return (3 * torch.randn(leaf.shape, generator=generator)).to(leaf)

        own = {id(tensor) for tensor in self.program.tensors.values()}

        def copied(leaf: Any) -> Any:
            return leaf.detach().clone() if isinstance(leaf, Tensor) and id(leaf) not in own else leaf

        class Watch(Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.name in seen:
                    inputs = {node.name: self.env[node] for node in n.all_input_nodes}
                    seen[n.name].append(pytree.tree_map(copied, inputs))
                return super().run_node(n)

        program, inputs, pieces = self.program, (self.args, self.kwargs), self.program.pieces()
        regions = program if isinstance(program, RegionProgram) else None

        def run(given: Any) -> None:
            for path, call in _calls(regions, self.module, given) if regions else [("", given)]:
                part(path, pieces[path].bind(*call))

        def part(path: str, args: list[Any]) -> Any:
            view = regions.graph_module(self.module, path) if regions else self.module
            return Watch(view).run(*pytree.tree_map(copied, args)) if view is not None else None

        def parts(calls: list[tuple[str, list[Any]]], links: Mapping[str, Sequence[RegionLink]]) -> None:
            """Run regions without the code around them; what goes from one to another is as it comes."""
            outputs: dict[str, Any] = {}
            for path, args in calls:
                names = [str(node.target) for node in pieces[path].placeholders()]
                for link in links[path]:
                    place = names.index(link.input)
                    args[place] = joined(args[place], ((outputs[link.source], link.output, link.leaf),))
                outputs[path] = part(path, args)

        def runs(function: Callable[..., None], *given: Any) -> bool:
            try:
                function(*given)
            except Exception:  # noqa: BLE001  a table may end, which shapes do not tell
                return False
            return True

        with torch.no_grad():
            run(inputs)
            for _ in range(_RUNS):
                if regions:
                    runs(run, pytree.tree_map(random, inputs))  # the code around may refuse what is random
                else:
                    run(pytree.tree_map(random, inputs))
            if regions:
                calls = [
                    (path, pieces[path].bind(*call)) for path, call in _calls(regions, self.module, inputs)
                ]
                links = {region.path: region.links for region in regions.regions}
                self.any_size = not any(
                    runs(parts, [(path, resized(args, change)) for path, args in calls], links)
                    for change in changes([args for _, args in calls])
                )
            elif self.graph.other_sizes:
                given = pytree.tree_map(random, resized(inputs, self.graph.other_sizes))
                self.any_size |= not runs(run, given)

    def _zero(self, group: Group, member: Member) -> Mask:
        """The units whose entries in a weight that makes them are all zero."""
        tensor = _effective(self.module, member)
        if tensor is None or tensor.shape != member.tensor.shape:
            return _none(group)
        empty = (_by_index(tensor, member) == 0).all(1).tolist()
        found: Mask = np.ones(group.size, dtype=bool)
        present = _none(group)
        for index, unit in enumerate(member.units.reshape(-1).tolist()):
            if unit >= 0:
                present[unit] = True
                found[unit] &= empty[index]
        return found & present

    def _scale(self, node: fx.Node) -> str:
        """Name of the tensor with which a normalisation of each channel multiplies it; empty for none."""
        if node.op == "call_module":
            layer = self.module.get_submodule(str(node.target))
            return f"{node.target}.weight" if isinstance(layer, _NormBase) else ""
        if node.op != "call_function" or operator_name(node) not in _NORMS:
            return ""
        weight = _argument(node, "weight")
        return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""

    def _constant(self, group: Group, zero: Mapping[fx.Node, Mask]) -> dict[fx.Node, Mask]:
        """For each node that carries the group's channels the units that are the same for all inputs."""
        found: dict[fx.Node, Mask] = {}
        for node in self.nodes:
            if group.name not in self.carried[node]:
                continue
            made = zero.get(node, _none(group))
            inputs = [n for n in node.all_input_nodes if not self._fixed(n)]
            carrying = {n: found[n] for n in inputs if n in found}
            name = operator_name(node)
            beside = name in ("cat", "concat") or node.target in (handed, joined)
            if carrying and (beside or len(carrying) == len(inputs)):
                made = made | np.logical_and.reduce([*carrying.values()])
            elif carrying and name in (*_PRODUCTS, _ATTENTION):  # zero times anything
                zeros = [mask & self._zeros(group, node, n) for n, mask in carrying.items()]
                every = np.logical_and if name == _ATTENTION else np.logical_or
                made = made | every.reduce(zeros)
            found[node] = made
        return found

    def _meet(self, group: Group, zero: Mask, constant: Mapping[fx.Node, Mask]) -> None:
        """Note where units that something makes zero are no longer the same number for all inputs."""
        left = zero.copy()
        for node, here in constant.items():
            before = [constant[n] for n in node.all_input_nodes if n in constant]
            lost = left & ~here & np.logical_or.reduce([_none(group), *before])
            if lost.any():
                text = f"channels of {group.name} that a layer makes zero stay: at {node.name} they meet"
                self.remarks.append(_Remark(group, lost, f"{text} others that are not"))
            left &= ~lost

    def _carried(self) -> dict[fx.Node, set[str]]:
        """For each node the groups whose channels its value has."""
        owner = {int(unit): group.name for group in self.graph.groups for unit in group.units}
        known: dict[int, set[str]] = {}
        found: dict[fx.Node, set[str]] = {}
        for node in self.nodes:
            own = found[node] = set()
            for value in tree_values(self.values.get(node)):
                labels = [value.label(d) for d in range(len(value.shape))] if value.state is None else []
                for label in filter(None, labels):
                    if id(label.ids) not in known:
                        classes = set(self.graph.classes(label.ids.reshape(-1)).tolist())
                        known[id(label.ids)] = {owner[c] for c in classes if c in owner}
                    own |= known[id(label.ids)]
        return found

    def _ends(self, group: Group) -> dict[fx.Node, list[fx.Node]]:
        """The nodes at which channels of the group end in another way than in a weight, and what they read.

        Sums over channels, and products of two values (queries and keys).
        """
        consumers = {(use.node, self._given(use)) for _, use in _consumers(group)}
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if group.name in self.carried[node] or not list(tree_values(self.values.get(node))):
                continue
            for given in node.all_input_nodes:
                if (
                    group.name in self.carried[given]
                    and (node, given) not in consumers
                    and operator_name(node) not in _PARTS
                    and node.target is not joined
                ):
                    found.setdefault(node, []).append(given)
        return found

    def _fixed(self, node: fx.Node) -> bool:
        values = list(tree_values(self.values.get(node)))
        return node.op == "get_attr" or (bool(values) and all(value.fixed for value in values)) or not values

    def _given(self, use: Use) -> fx.Node | None:
        """The node whose value a product reads: of a convolution, what it pads itself counts as read."""
        node = use.node
        if use.argument is None and node.op == "call_module" and node.args:
            layer, given = self.module.get_submodule(str(node.target)), node.args[0]
            return given if isinstance(layer, _ConvNd) and isinstance(given, fx.Node) else None
        return use.input

    def _reading(self, group: Group, node: fx.Node, given: fx.Node) -> _Reading | None:
        """How a node reads the channels; None where that cannot be seen."""
        values = list(tree_values(self.values.get(given)))
        runs = self.seen.get(node.name, [])
        if len(values) != 1 or not runs or any(given.name not in run for run in runs):
            return None
        place = {int(unit): i for i, unit in enumerate(group.units)}
        found = []
        for dim in range(len(values[0].shape)):
            label = values[0].label(dim)
            if label is None:
                continue
            classes = self.graph.classes(label.ids.reshape(-1))
            units = np.array([place.get(int(c), -1) for c in classes], dtype=np.int64)
            if (units >= 0).any():
                found.append(_Reading(node, given, (*label.over, dim), units.reshape(label.ids.shape)))
        return found[0] if len(found) == 1 else None

    def _zeros(self, group: Group, node: fx.Node, given: fx.Node) -> Mask:
        """The units that were zero in every run where ``node`` reads them."""
        reading = self._reading(group, node, given)
        if reading is None:
            return _none(group)
        steady, carried = self._read(group, reading)
        return steady & ~carried

    def _read(self, group: Group, reading: _Reading) -> tuple[Mask, Mask]:
        """For each unit whether it is the same number wherever it is read, and whether that is not zero."""
        rows = [reading.channels(values[reading.given.name]) for values in self.seen[reading.node.name]]
        channels = torch.cat(rows, 1)
        steady, carried = np.ones(group.size, dtype=bool), _none(group)
        scale = max(float(channels.abs().max()), 1e-30)
        same = ((channels - channels[:, :1]).abs() <= _SAME * scale).all(1).tolist()
        zero = (channels == 0).all(1).tolist()
        for index, unit in enumerate(reading.units.reshape(-1).tolist()):
            if unit >= 0:
                steady[unit] &= same[index]
                carried[unit] |= not zero[index]
        return steady, carried

    def _added(
        self, reading: _Reading, made: int, units: Mask, number: int = 0, factors: float = 0.0
    ) -> tuple[Tensor, float]:
        """What these units add to a layer: a mean for each channel that it makes, and how far they deviate.

        Args:
            reading: how the layer reads them.
            made: see :class:`_Fold`.
            units: which.
            number: of the run.
            factors: how far the factors are from one that they get: with any, nothing cancels by chance.
        """
        node = reading.node
        values = self.seen[node.name][number]
        alone = reading.alone(values[reading.given.name], units)
        if factors:
            shape = [size if d in reading.dims else 1 for d, size in enumerate(alone.shape)]
            random = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            alone = alone * (1 + factors * random.to(alone.device))

        def run(given: Tensor) -> Tensor:
            return self._gives(node, {**values, reading.given.name: given})

        difference = run(alone) - run(torch.zeros_like(alone))
        added = difference.movedim(made, 0).flatten(1)
        mean = added.mean(1)
        return mean, float((added - mean[:, None]).abs().max())

    def _fold(self, group: Group, use: Use, reading: _Reading, units: Mask) -> tuple[_Fold | None, str]:
        """Where what the units add to a layer can go; or why it cannot go anywhere."""
        if use.operator not in (convolution.OPERATOR, "linear", "addmm", "mm"):
            return None, "which is no linear layer and no convolution"
        made = reading.dims[-1] if use.operator == convolution.OPERATOR else -1
        target, sign = self._takes_up(use.node, made)
        if not target:
            return None, "which has no bias that could take up what they add"
        if self.any_size:
            return None, "and what they add there at other sizes of the inputs is not known"
        shapes = [run[reading.given.name].shape for run in self.seen[reading.node.name]]
        sizes = [number for number, shape in enumerate(shapes) if shape not in shapes[:number]]
        means, deviations = zip(*(self._added(reading, made, units, n, 0.5) for n in sizes), strict=True)
        most = float(means[0].abs().max())
        apart = max(float((mean - means[0]).abs().max()) for mean in means)  # in the model's own precision
        fits = means[0].shape == self.program.tensors[target].shape
        if not fits or max(deviations) > _EXACT * most or apart > _SAME * most:
            return None, "and what they add differs between places (beside padding, say) or between sizes"
        return _Fold(group, units, reading, made, target, sign), ""

    def _takes_up(self, node: fx.Node, made: int) -> tuple[str, int]:
        """The tensor to which a constant may be added, and with which sign; an empty name for none."""
        bias = self._own(node, "bias")
        if bias:
            return bias, 1
        behind, values = list(node.users), list(tree_values(self.values.get(node)))
        across = len(values) == 1 and made % len(values[0].shape) == 1  # what it normalises
        mean = self._own(behind[0], "running_mean") if len(behind) == 1 and across else ""
        return mean, -1

    def _own(self, node: fx.Node, what: str) -> str:
        """The tensor ``bias`` of a layer, or the ``running_mean`` of a normalisation, that no other uses."""
        found: Any = None
        if node.op == "call_module":
            layer = self.module.get_submodule(str(node.target))
            kinds = (_ConvNd, nn.Linear) if what == "bias" else (_BatchNorm,)
            calls = [n for n in self.nodes if n.op == "call_module" and n.target == node.target]
            if isinstance(layer, kinds) and len(calls) == 1 and getattr(layer, what, None) is not None:
                found = f"{node.target}.{what}"
        elif node.op == "call_function":
            layers = _LAYERS if what == "bias" else _BATCH_NORMS
            given = _argument(node, what) if operator_name(node) in layers else None
            if isinstance(given, fx.Node) and given.op == "get_attr" and len(given.users) == 1:
                found = str(given.target)
        tensor = self.program.tensors.get(found)
        if tensor is None or (what == "running_mean" and trains(node)):
            return ""
        return str(found) if self._sole(str(found)) else ""

    def _sole(self, name: str) -> bool:
        """Whether a tensor has this name only, and is read at one place."""
        tensor = self.program.tensors[name]
        readers = [
            n for n in self.nodes if n.op == "get_attr" and self.program.tensors.get(n.target) is tensor
        ]
        names = [name for name, other in self.program.tensors.items() if other is tensor]
        return len(names) == 1 and len(readers) <= 1


_PRODUCTS = ("mul", "multiply", "matmul", "bmm", "einsum")
_ATTENTION = "scaled_dot_product_attention"
_PARTS = (
    "getitem",
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "unbind",
    "select",
    "slice",
    "narrow",
)
"""What takes some of the channels, and leaves the others to other nodes."""
_LAYERS = (
    "linear",
    "addmm",
    *convolution.FUNCTIONS,
)


_BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_NORMS = (*_BATCH_NORMS, "instance_norm")


def trains(node: fx.Node) -> bool:
    """Whether a function is called as in training: it draws random numbers, or measures its input."""
    return node.op == "call_function" and _argument(node, "training") is True


def _argument(node: fx.Node, name: str) -> Any:
    """The argument of a function that has this name; None if there is none."""
    target: Any = node.target
    if name in node.kwargs:
        return node.kwargs[name]
    if operator_name(node) == "addmm" and name == "bias":
        return node.args[0] if len(node.args) == 3 and not node.kwargs else None
    for signature in get_signature_for_torch_op(target) or _signature(target):
        names = list(signature.parameters)
        if name in names and names.index(name) < len(node.args):
            return node.args[names.index(name)]
    return None


def _signature(target: Any) -> list[inspect.Signature]:
    """Of a function that is written in Python."""
    try:
        return [inspect.signature(target)] if inspect.isfunction(target) else []
    except ValueError:
        return []


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _places(units: NDArray[np.int64]) -> dict[int, list[int]]:
    """By unit the indices at which it stands."""
    found: dict[int, list[int]] = {}
    for index, unit in enumerate(units.reshape(-1).tolist()):
        found.setdefault(unit, []).append(index)
    return found


def _by_index(tensor: Tensor, member: Member) -> Tensor:
    """The entries of a member's tensor for each index of its units, ``(indices, others)``."""
    dims = [*member.over, member.axis.dim]
    rest = [d for d in range(tensor.dim()) if d not in dims]
    return tensor.permute(*dims, *rest).reshape(member.units.size, -1)


def _without(tensor: Tensor, member: Member, units: Mask) -> Tensor:
    """``tensor`` with zeros for these units."""
    dims = [*member.over, member.axis.dim]
    here = np.where(member.units >= 0, units[member.units], False)
    shape = [tensor.shape[d] if d in dims else 1 for d in range(tensor.dim())]
    mask = torch.from_numpy(np.ascontiguousarray(here.transpose(np.argsort(dims)))).reshape(shape)
    return tensor.detach().masked_fill(mask.to(tensor.device), 0)


def _alike(group: Group, making: Sequence[Member], but: Set[int]) -> dict[int, int]:
    """By unit an earlier one for which all entries of these members are the same."""
    entries: list[list[bytes]] = [[] for _ in range(group.size)]
    for member in making:
        rows = _by_index(member.tensor.detach(), member).double().cpu().numpy()
        for index, unit in enumerate(member.units.reshape(-1).tolist()):
            if unit >= 0:
                entries[unit].append(hashlib.sha256(rows[index].tobytes()).digest())
    first: dict[bytes, int] = {}
    found = {}
    for unit, parts in enumerate(entries):
        if unit not in but and parts:
            same = first.setdefault(b"".join(parts), unit)
            if same != unit:
                found[unit] = same
    return found


def _none(group: Group) -> Mask:
    return np.zeros(group.size, dtype=bool)


def _like(tensor: Tensor) -> Tensor:
    """A copy; a parameter where it is one."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


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


def _balanced(group: Group, gone: Mask) -> Mask:
    """As many of the units as every row of a balanced set can lose."""
    gone = gone.copy()
    for atoms in group.balance:
        if len(atoms) < 2:
            continue
        count = min(int(gone[row].sum()) for row in atoms)
        if len({len(row) for row in atoms}) > 1:
            count = 0
        for row in atoms:
            count = min(count, len(row) - 1)
        for row in atoms:
            gone[row[np.flatnonzero(gone[row])[count:]]] = False
    return gone


def _difference(wanted: Any, got: Any) -> float:
    """Largest difference of two trees of tensors, as a share of the largest entry."""
    ones, others = ([t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)] for tree in (wanted, got))
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.is_floating_point() and one.numel():
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)))
    return worst
