"""Choosing with compensation in mind: what can be given up best once the others make up for it.

A consumer ``y = W u`` of a group reads ``u``, of second moments ``A``. With ``H = A^-1``, the least mean
square error that is left when the entries ``S`` of ``u`` go, and the other weights are the best without them,
is ``tr(W_S (H_SS)^-1 W_S')``: the optimal brain surgeon (Hassibi and Stork, NeurIPS 1992) for whole columns.
Units go one after the other, the cheapest first, and ``W`` and ``H`` are updated each time. So of two units
that carry the same one goes, and the other stays.

How much each group gives follows from measurement: every group alone gives half of its units, its consumers
make up for it, and the outputs of the network are compared with what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..calls import as_one
from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group, Member
from ..coupling.units import Axis, Ids
from ..importance.base import Criterion, Scores
from ..importance.calibration import Sums, collect, progress
from ..importance.magnitude import magnitude
from ..importance.products import Products, Site
from ..inputs import normalize
from ..nodes import operator_name
from ..planning.cost_model import CostModel
from .batches import Pick
from .moments import evened, inputs, matrix, places, write
from .outputs import Difference, own, private, tensors
from .walk import Runner, quiet

_ENTRIES = 5000
"""Largest number of entries that a consumer may read."""

_POSITIONS = 1 << 12
"""Positions of a product that are looked at in each batch."""

_RIDGE = 1e-3
"""Share of the mean square that is added to each, so that the moments can be inverted."""

_PROBES, _SAMPLES, _NUMBERS = 4, 64, 1 << 25
"""Outputs are compared on so many batches, or on as many as hold so many samples, or give so many numbers."""

_STEPS = 64
"""A group is given up in about so many steps at least."""


_NOTHING = 2 * _RIDGE
"""Units with no more than this share of a group's errors may be dead: what is lost without them says nothing
about the others."""


@dataclass(frozen=True, eq=False)
class _Read:
    """Second moments of what one or more consumers read.

    Attributes:
        mean: ``(n,)``.
        second: about the mean, if that can be made up for, and with a ridge that makes it positive definite;
            ``(n, n)``.
    """

    mean: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, sums: torch.Tensor, centred: bool) -> _Read:
        """From sums of ``u u'``, a one being the last entry of ``u``."""
        n = sums.shape[0] - 1
        count = float(sums[n, n])
        mean, plain = sums[:n, n] / count, sums[:n, :n] / count
        if centred:
            plain = plain - mean[:, None] * mean[None, :]
        floor = plain.diagonal().mean().clamp(min=1e-20)
        one = torch.eye(n, dtype=plain.dtype)
        ridge, failed = _RIDGE, True
        while failed:  # rounding may leave moments of a low rank with eigenvalues below zero
            second = plain + ridge * floor * one
            ridge, failed = 10 * ridge, bool(torch.linalg.cholesky_ex(second).info)
        return cls(mean, second)


@dataclass(frozen=True, eq=False)
class _Consumer:
    """A product that reads the channels of a group.

    Attributes:
        site: where.
        units: the unit of each entry that it reads, -1 for none; ``(n,)``.
        parameter: the whole parameter.
        read: moments of what it reads.
        shift: name of the tensor that takes up a shift of the mean, with its sign; None where nothing can.
    """

    site: Site
    units: Ids
    parameter: torch.Tensor
    read: _Read
    shift: tuple[str, int] | None

    @property
    def weight(self) -> torch.Tensor:
        """``(outputs, n)``, a copy in double."""
        return matrix(self.site, self.parameter.detach())[0].double().cpu()

    def solved(self, gone: Ids) -> torch.Tensor:
        """The best weights without these units, zero at theirs, ``(outputs, n)``."""
        dead = torch.from_numpy(np.isin(self.units, gone))
        alive = ~dead
        second, weight = self.read.second, self.weight
        change = torch.linalg.solve(second[alive][:, alive], second[alive][:, dead] @ weight[:, dead].mT)
        new = torch.zeros_like(weight)
        new[:, alive] = weight[:, alive] + change.mT
        return new


class _Elimination:
    """Units go one after the other, and consumers that read the same make up for them.

    Args:
        consumers: with the same moments and units. Of their weights no more than ``W' W`` is needed, and
            those of all of them add up.
        size: number of units of the group.
    """

    def __init__(self, consumers: list[_Consumer], size: int) -> None:
        read, units = consumers[0].read, consumers[0].units
        self.size = size
        self.gram = torch.zeros_like(read.second)
        for consumer in consumers:
            weight = consumer.weight
            gram = weight.mT @ weight
            self.gram += gram / max(float((gram * read.second).sum()), 1e-30)  # errors are shares
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(read.second))
        self.left = torch.ones(len(units), dtype=torch.bool)
        order = np.argsort(units, kind="stable")
        by_count: dict[int, list[tuple[int, Ids]]] = {}
        for unit, at in zip(*_runs(units[order], order), strict=True):
            if unit >= 0:
                by_count.setdefault(at.size, []).append((unit, at))
        self.entries = [
            (torch.tensor([unit for unit, _ in found]), torch.from_numpy(np.stack([at for _, at in found])))
            for found in by_count.values()
        ]
        """Units, and the entries of each, ``(units, entries)``; all with equally many."""

    def errors(self) -> torch.Tensor:
        """The error that each unit adds if it goes next, as a share of the outputs' square; ``(size,)``."""
        found = torch.zeros(self.size, dtype=torch.float64)
        for units, index in self.entries:
            if index.shape[1] == 1:
                at = index[:, 0]
                found[units] = self.gram.diagonal()[at] / self.inverse.diagonal()[at]
            else:
                rows, columns = index[:, :, None], index[:, None, :]
                solved = torch.linalg.solve(self.inverse[rows, columns], self.gram[rows, columns])
                found[units] = solved.diagonal(dim1=1, dim2=2).sum(1)
        return found

    def remove(self, gone_units: torch.Tensor) -> None:
        """The others make up for these units."""
        entries, self.entries = self.entries, []
        going = []
        for units, index in entries:
            goes = torch.isin(units, gone_units)
            going.append(index[goes].flatten())
            self.entries.append((units[~goes], index[~goes]))
        gone = torch.cat(going) if going else torch.empty(0, dtype=torch.int64)
        if not len(gone):
            return
        across, part = self.inverse[:, gone], self.gram[:, gone]
        solved = torch.linalg.solve(across[gone], across.mT)
        # The weights become W - W[:, gone] @ solved, and what is left of H likewise.
        self.inverse.addmm_(across, solved, alpha=-1)
        self.gram.addmm_(part, solved, alpha=-1)
        self.gram.addmm_(solved.mT, part[gone] @ solved - part.mT)
        self.left[gone] = False
        if 4 * int(self.left.sum()) < 3 * len(self.left):  # the work grows with the square of what is there
            self._forget()

    def _forget(self) -> None:
        """Keep only the entries that have not gone."""
        new = torch.cumsum(self.left, 0) - 1
        self.inverse = self.inverse[self.left][:, self.left]
        self.gram = self.gram[self.left][:, self.left]
        self.entries = [(units, new[index]) for units, index in self.entries]
        self.left = self.left[self.left]


def _runs(values: Ids, items: Ids) -> tuple[list[int], list[Ids]]:
    """The distinct ones of sorted ``values``, and the ``items`` that stand at each."""
    if not values.size:
        return [], []
    starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    return values[starts].tolist(), np.split(items, starts[1:])


@dataclass(frozen=True, eq=False)
class Reconstruction(Criterion):
    """What the consumers of a group cannot make up for.

    ``s(u)`` is the error that ``u`` adds to the outputs of the group's consumers when it goes, after all
    units with lower scores, and the weights that are left are the best without it: see
    :mod:`fxprune.compensation.choice`. With ``cost`` the errors are those of the network's outputs, as
    measured by giving up half of each group alone, for each parameter, multiply-accumulate, ... that the unit
    saves, so that groups can be ranked together.

    Groups that no product consumes alone (queries and keys, which are multiplied with each other) are ordered
    by the mean squares of what is multiplied, as seen on the data; where these are not seen, by the size of
    their weights.

    Attributes:
        data: batches, as for ``calibrate`` of :class:`fxprune.Selection`; gone through once.
        pick: from a batch to the inputs.
        cost: ``"params"``, ``"macs"``, ``"activations"`` or ``"size_mb"``; None if groups are not compared.
    """

    data: Iterable[Any] | None = None
    pick: Pick | None = None
    cost: str | None = None

    def prepare(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Callable[[Group], Scores]:
        """See :meth:`Criterion.prepare`."""
        seen = _Seen.of(graph, model, self.data or (), self.pick, seed)
        by_class = magnitude(graph, 2)
        found = {}
        for group in progress(graph.groups, "groups"):
            consumers = seen.consumers(group)
            squares = by_class[group.units] ** 2 if consumers else seen.products(group)
            squares = by_class[group.units] ** 2 if squares is None else squares
            found[group.name] = _Given(group, consumers, *_order(group, consumers, squares))
        seen.forget()
        worth = _Worth(graph, self.cost, seen).of(list(found.values())) if self.cost else {}
        scores = _ByAxis()
        for name, given in found.items():
            values = np.empty(given.group.size)
            values[given.order] = np.maximum.accumulate(given.added) * worth.get(name, 1.0)
            scores.add(given.group, values)
        return scores


class _ByAxis:
    """Scores of units by where they are: in another analysis the same axes may form other groups."""

    def __init__(self) -> None:
        self.known: dict[tuple[Axis, tuple[int, ...]], Scores] = {}

    def add(self, group: Group, scores: Scores) -> None:
        """The scores of a group, ``(group.size,)``."""
        for member in group.members:
            at = self._at(member)
            inside = member.units >= 0
            at[inside] = np.fmax(at[inside], scores[member.units[inside]])

    def __call__(self, group: Group) -> Scores:
        """Scores of a group, ``(group.size,)``; what was in no group before goes last."""
        found = np.full(group.size, np.nan)
        for member in group.members:
            inside = member.units >= 0
            np.fmax.at(found, member.units[inside], self._at(member)[inside])
        return np.where(np.isnan(found), np.nanmax(found, initial=0.0), found)

    def _at(self, member: Member) -> Scores:
        key = member.axis, member.units.shape
        return self.known.setdefault(key, np.full(member.units.shape, np.nan))


@dataclass(frozen=True, eq=False)
class _Given:
    """A group, what reads it, the order in which its units go, and the error that each adds."""

    group: Group
    consumers: list[_Consumer]
    order: Ids
    added: Scores


def _order(group: Group, consumers: list[_Consumer], squares: Scores) -> tuple[Ids, Scores]:
    """The units in the order in which they go, and the error that each adds; no consumers: ``squares``."""
    if not consumers:
        order = np.argsort(squares, kind="stable")
        return order, squares[order] / max(float(squares.sum()), 1e-300)
    alike: dict[tuple[int, bytes], list[_Consumer]] = {}
    for consumer in consumers:
        alike.setdefault((id(consumer.read), consumer.units.tobytes()), []).append(consumer)
    eliminations = [_Elimination(own, group.size) for own in alike.values()]
    alive = torch.arange(group.size)
    gone: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    while len(alive):
        errors = sum((elimination.errors() for elimination in eliminations), torch.zeros(()))[alive]
        count = max(1, min(len(alive) // 8, group.size // _STEPS))
        lowest = torch.argsort(errors, stable=True)[:count]
        gone.append(alive[lowest])
        added.append(errors[lowest].clamp(min=0))
        for elimination in eliminations:
            elimination.remove(gone[-1])
        alive = alive[~torch.isin(alive, gone[-1])]
    return torch.cat(gone).numpy(), torch.cat(added).double().numpy()


class _Worth:
    """What a unit's error counts for: as measured at the network's outputs, for each thing that it saves.

    Args:
        graph: the analysis.
        metric: what is saved.
        seen: with inputs of the model, on which the outputs are compared.
    """

    def __init__(self, graph: CouplingGraph, metric: str, seen: _Seen) -> None:
        self.program = private(graph.captured.program)
        self.costs, self.metric = CostModel(graph), metric
        whole = list(self.program.pieces()) == [""]
        self.probes = seen.probes if whole else []  # parts of a model cannot be run on its inputs
        self.classes = seen.classes

    def of(self, groups: list[_Given]) -> dict[str, float]:
        """For each group the factor of its errors."""
        halves = {given.group.name: _half(given) for given in groups}
        saved = {}
        for name, gone in halves.items():
            full, less = self.costs({}), self.costs({name: gone.tolist()})
            saved[name] = max(_amount(full, self.metric) - _amount(less, self.metric), 1e-9) / max(
                gone.size, 1
            )
        found = {name: 1 / cost for name, cost in saved.items()}
        if not self.probes:
            return found
        with quiet():
            for given, measured in self._measured(groups, halves):
                first = np.isin(given.order, halves[given.group.name])
                predicted = float(given.added[first].sum())
                found[given.group.name] *= measured / max(predicted, 1e-12)
        return found

    def _measured(self, groups: list[_Given], halves: dict[str, Ids]) -> Iterator[tuple[_Given, float]]:
        """What is lost of the outputs when a group alone gives half of its units."""
        dense = Runner(self.program.module().eval())
        end = len(dense.nodes)
        outputs = []
        for probe in self.probes:
            values = dense.start(own(self.program.bind(*probe)))
            dense.run(values, 0, end)
            outputs.append(values[dense.nodes[-1]])
        state = [dense.start(own(self.program.bind(*probe))) for probe in self.probes]
        given_at = []
        for given in groups:
            gone = halves[given.group.name]
            if gone.size:
                tensors = self._changed(given, gone)
                given_at.append((dense.first(tensors), given, gone))
        place = 0
        for start, given, gone in progress(sorted(given_at, key=lambda item: item[0]), "groups alone"):
            for values in state:
                dense.run(values, place, start)
            place = max(place, start)
            tensors = dict(self.program.tensors) | self._changed(given, gone)
            other = Runner(replace(self.program, tensors=tensors).module().eval())
            difference = Difference(self.classes)
            for values, wanted in zip(state, outputs, strict=True):
                rest = other.taken(own(values), dense)
                other.run(rest, place, end)
                difference.add(wanted, rest[other.nodes[-1]])
            yield given, difference.lost()

    def _changed(self, given: _Given, gone: Ids) -> dict[str, torch.Tensor]:
        """The tensors that are others without these units, by all of their names."""
        originals = self.program.tensors
        changed: dict[int, torch.Tensor] = {}

        def writable(tensor: torch.Tensor) -> torch.Tensor:
            return changed.setdefault(id(tensor), tensor.detach().clone())

        if not given.consumers or not given.group.exact:
            for member in given.group.members:
                original = originals.get(member.axis.name)
                if original is not None and member.masked and member.trainable:
                    _mask(writable(original), member, gone)
        for consumer in given.consumers:
            weight = writable(originals[consumer.site.name])
            new = consumer.solved(gone)
            write(consumer.site, weight, new.to(weight)[None] - matrix(consumer.site, weight))
            if consumer.shift is not None:
                name, sign = consumer.shift
                shifted = writable(originals[name])
                shifted += (sign * ((consumer.weight - new) @ consumer.read.mean)).to(shifted)
        found = {}
        for name, tensor in originals.items():
            if id(tensor) in changed:
                made = changed[id(tensor)]
                is_parameter = isinstance(tensor, nn.Parameter)
                found[name] = nn.Parameter(made, requires_grad=False) if is_parameter else made
        return found


def _amount(count: Any, metric: str) -> float:
    return float(count.bytes if metric == "size_mb" else getattr(count, metric))


def _half(given: _Given) -> Ids:
    """Half of the units of each row, those that go first; more where half of them add no error."""
    place = np.empty(given.group.size, dtype=np.int64)
    place[given.order] = np.arange(given.group.size)
    rows = [row[np.argsort(place[row])] for band in given.group.balance for row in band] or [given.order]
    gone = given.order[:0]
    for share in (1 / 2, 3 / 4, 7 / 8, 1):
        gone = np.concatenate([row[: min(int(share * row.size), row.size - 1)] for row in rows])
        if given.added[place[gone]].sum() > _NOTHING * given.added.sum():
            break
    return gone


def _mask(tensor: torch.Tensor, member: Member, gone: Ids) -> None:
    """Zeros where a member holds units that are ``gone``."""
    dead = torch.from_numpy(np.isin(member.units, gone)).to(tensor.device)
    dims = (*member.over, member.axis.dim)
    order = sorted(range(len(dims)), key=lambda place: dims[place])
    shape = [tensor.shape[d] if d in dims else 1 for d in range(tensor.dim())]
    tensor.masked_fill_(dead.permute(order).reshape(shape), 0)


@dataclass(eq=False)
class _Seen:
    """What consumers read, added up over the data.

    Attributes:
        graph: the analysis.
        sums: moments of what each product reads; sums of squares of what those put out that make the
            channels of a group that nothing consumes alone.
        sites: the products that read the channels of a group.
        biases: names of what is added to them.
        probes: inputs of the model, of the first batches.
        reads: moments in use, see :meth:`_read`.
        classes: tensors among the model's outputs that its last product gives, as scores of classes are, by
            their place, and the dimension in which that product's outputs are.
        names: the first name of each parameter.
        added: first names of the biases of the products whose outputs were summed up.
    """

    graph: CouplingGraph
    sums: Sums
    sites: dict[Any, Site]
    biases: dict[Any, str]
    probes: list[Any] = field(default_factory=list)
    reads: dict[Any, list[tuple[torch.Tensor, _Read]]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, graph: CouplingGraph, model: nn.Module, data: Iterable[Any], pick: Pick | None, seed: int
    ) -> _Seen:
        """Run the model over all batches."""
        every = [*model.named_parameters(remove_duplicate=False)]
        first = {id(tensor): name for name, tensor in reversed(every)}
        found = cls(graph, {}, {}, {})
        found.names = {name: first[id(tensor)] for name, tensor in every}
        wanted = {member.axis.name for group in graph.groups for member in group.consumers}
        wanted |= {found.names[name] for name in wanted & found.names.keys()}
        alone = [group for group in graph.groups if not group.consumers]
        made = {(member.axis.name, member.axis.dim) for group in alone for member in group.producers}
        made |= {(found.names[name], dim) for name, dim in made if name in found.names}
        memory = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(seed)
        samples = numbers = 0
        last: tuple[Any, torch.Tensor, torch.Tensor] | None = None  # what was read, and its moments
        product: tuple[torch.Tensor, int] | None = None  # the last output, and its channels

        def step(batch: Any, sums: Sums) -> None:
            nonlocal samples, numbers, last, product

            def see(site: Site, x: torch.Tensor, y: torch.Tensor, bias: Any) -> None:
                nonlocal last, product
                product = y, site.channel
                if (site.name, site.outer) in made and not site.batched and site.groups == 1:
                    squares = y.movedim(site.channel, 0).flatten(1).float().square().sum(1).double()
                    made_by = (site.name, site.outer)
                    sums.setdefault(made_by, squares.new_zeros(site.shape[site.outer]))
                    sums[made_by][site.region[site.outer]] += squares
                    if bias is not None and bias.untyped_storage().data_ptr() in memory:
                        found.added.add(memory[bias.untyped_storage().data_ptr()])
                if site.name not in wanted or site.groups > 1 or site.batched:
                    return
                key = (site.name, tuple((part.start, part.stop) for part in site.region))
                alike = _memory(x), site.convolution, site.channel, site.shape[2:]
                if last is None or last[0] != alike:
                    at = places(site, y, _POSITIONS, generator)
                    u = inputs(site, x, at)[0]
                    if u.shape[0] > _ENTRIES:
                        return
                    u = torch.cat([u, u.new_ones(1, u.shape[1])]) * evened(u[None])
                    last = alike, x, (u @ u.mT).double()  # as long as it is held, its memory is no other's
                square = last[2]
                found.sites[key] = site
                if bias is not None and bias.untyped_storage().data_ptr() in memory:
                    found.biases[key] = memory[bias.untyped_storage().data_ptr()]
                sums[key] = sums[key] + square if key in sums else square

            given = batch if pick is None else pick(batch)
            args, kwargs = normalize(tuple(given) if type(given) is list else given, True)
            with Products(model, see):
                out = as_one(model, kwargs)(*args, **kwargs)
            if len(found.probes) < _PROBES and samples < _SAMPLES and numbers < _NUMBERS:
                found.probes.append((args, kwargs))
                numbers += sum(leaf.numel() for leaf in tensors(out))
                leaves = tensors((args, kwargs))
                samples += leaves[0].shape[0] if leaves and leaves[0].dim() else 1
            if product is not None:
                found.classes = classes(out, *product)
            last = product = None

        found.sums, _ = collect("Reconstruction", model, data, step, seed, gradients=False)
        return found

    def consumers(self, group: Group) -> list[_Consumer]:
        """The products that read the channels of a group; none unless all that are known were seen."""
        found = []
        tensors = self.graph.captured.program.tensors
        for member in group.consumers:
            own_keys = [
                key
                for key in self.sites
                if tensors.get(key[0]) is member.tensor or key[0] == member.axis.name
            ]
            keys = [key for key in own_keys if self.sites[key].inner == member.axis.dim]
            if not keys or member.over or len(keys) > 1:
                return []
            (key,) = keys
            site = self.sites[key]
            n = matrix(site, member.tensor.detach()).shape[2]
            if self.sums[key].shape[0] != n + 1:
                return []
            part = site.region[site.inner]
            units = member.units[part.start : part.stop]
            shift = self._shift(key, member)
            read = self._read(key, shift is not None)
            found.append(_Consumer(site, np.repeat(units, n // units.size), member.tensor, read, shift))
        return found

    def products(self, group: Group) -> Scores | None:
        """Mean squares of what a unit adds to the products of values that its channels take part in.

        The channels that different parameters make (queries and keys) are factors of the same products, so
        their squares are multiplied: the mean square of a product of independent values.

        Returns:
            ``(group.size,)``, up to a factor; None where something else than what was seen has to do with it.
        """
        found: Scores = np.ones(group.size)
        for member in group.members:
            name = self.names.get(member.axis.name, member.axis.name)
            sums = self.sums.get((name, member.axis.dim))
            if "produces" in member.roles and sums is not None and not member.over:
                inside = member.units >= 0
                squares = sums.double().cpu().numpy()[inside]
                squares = np.bincount(member.units[inside], squares, group.size)
                found *= squares / max(float(squares.sum()), 1e-300)
            elif member.trainable and name not in self.added:
                return None
        return found

    def forget(self) -> None:
        """Let go of the sums; what consumers read is held by them."""
        self.sums.clear()
        self.reads.clear()

    def _read(self, key: Any, centred: bool) -> _Read:
        """The moments of what a product reads, one object for all that read the same."""
        sums = self.sums[key].double().cpu()
        alike = self.reads.setdefault((centred, *sums.shape, float(sums.sum())), [])
        for other, read in alike:
            if torch.equal(other, sums):
                return read
        alike.append((sums, _Read.of(sums, centred)))
        return alike[-1][1]

    def _shift(self, key: Any, member: Member) -> tuple[str, int] | None:
        """The bias, or the running mean of the batch normalisation that follows, and the sign of a shift."""
        if key in self.biases:
            name = self.biases[key]
            tensor = self.graph.captured.program.tensors.get(name)
            outer = self.sites[key].outer
            return (name, 1) if tensor is not None and tensor.numel() == member.tensor.shape[outer] else None
        for use in member.consuming:
            users = list(use.node.users)
            name = _running_mean(users[0]) if len(users) == 1 else ""
            if name in self.graph.captured.program.tensors:
                return name, -1
        return None


def classes(out: Any, y: torch.Tensor, channel: int) -> dict[int, int]:
    """Tensors of ``out`` that are all of a product's outputs ``y``, and where they have its channels."""
    found = {}
    for place, leaf in enumerate(tensors(out)):
        if (
            leaf.untyped_storage()._cdata == y.untyped_storage()._cdata
            and leaf.numel() == y.numel()
            and y.shape[channel] > 1
        ):
            for d in range(leaf.dim()):
                if (leaf.shape[d], leaf.stride(d)) == (y.shape[channel], y.stride(channel)):
                    found[place] = d
    return found


def _memory(x: torch.Tensor) -> tuple[Any, ...]:
    """What tells a tensor's values from all others' while it is alive."""
    version = object() if x.is_inference() else x._version
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), version


def _running_mean(node: fx.Node) -> str:
    """Name of the running mean of a batch normalisation; empty for other nodes."""
    if node.op == "call_module":
        return f"{node.target}.running_mean"
    if "batch_norm" in operator_name(node):
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        return next((name for name in names if name.endswith("running_mean")), "")
    return ""


__all__ = ["Reconstruction", "classes"]
