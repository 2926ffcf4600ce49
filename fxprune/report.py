"""What can be narrowed in a network, what cannot, and what would help: for people, and as plain data."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .coupling.graph import CouplingGraph
from .coupling.groups import Group
from .coupling.outputs import hold_zeros
from .planning.cost_model import CostModel
from .region_program import Region, RegionProgram
from .repeats import common, joined, starred

MOST = 12
"""Lines of a table in short form."""
WIDTH = 110
"""Of the text."""


@dataclass(frozen=True)
class Share:
    """How much of something can be removed.

    Attributes:
        total: all of it.
        prunable: what would go if all units of all groups went; the rest is frozen.
    """

    total: int
    prunable: int

    @property
    def frozen(self) -> int:
        return self.total - self.prunable


@dataclass(frozen=True)
class GroupEntry:
    """A group of the coupling graph.

    Attributes:
        name: the group's name, for ``plan.removed`` and ``where``.
        units: how many can be removed.
        rows: rows of equal length that they lie in; 1 where they are free.
        members: axes of parameters and buffers that are narrowed together.
        exact: whether the pruned network equals the masked one.
        because: what makes it inexact, with the node; empty if exact.
        params: parameter entries that go if all of its units go.
        macs: multiply-accumulates that go with them.
    """

    name: str
    units: int
    rows: int
    members: tuple[str, ...]
    exact: bool
    because: str
    params: int
    macs: int


@dataclass(frozen=True)
class FrozenEntry:
    """An axis of a parameter that stays.

    Attributes:
        axis: name of the parameter and dimension.
        size: of the axis.
        reason: why it stays.
        node: the graph node that froze it.
        source: ``file:line in function`` of that node, or empty.
        remedy: what would free it, or empty.
    """

    axis: str
    size: int
    reason: str
    node: str
    source: str
    remedy: str


@dataclass(frozen=True)
class BranchEntry:
    """A residual branch that can be removed as a whole.

    Attributes:
        name: for ``branches`` of :class:`fxprune.Selection`.
        params: parameter entries that go with it.
        macs: multiply-accumulates that go with it.
        source: ``file:line in function`` of the addition, or empty.
    """

    name: str
    params: int
    macs: int
    source: str


@dataclass(frozen=True)
class RegionEntry:
    """A submodule that is captured, where the model as a whole cannot be.

    Attributes:
        path: the submodule.
        rung: how it was captured; empty for a layer that is called as it is.
        params: its parameter entries.
        linked: regions from which something comes to it that may become narrower.
        outside: its parameters and buffers that the code around the regions uses, too; they stay.
    """

    path: str
    rung: str
    params: Share
    linked: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Made by :meth:`fxprune.CouplingGraph.report`; printing it shows the short form.

    Attributes:
        model: class name of the model.
        rung: the rung of the capture ladder that was used.
        capture: what was captured and how, and why no rung before could.
        params: parameter entries.
        macs: multiply-accumulates of one forward pass over the example inputs.
        groups: what can be removed together, the largest share of parameters first.
        blocks: the same with the groups of repeated blocks in one entry: numbers in which they differ are
            ``*``, members are those of the first, costs those of all.
        frozen: what stays.
        regions: the submodules that were captured; empty if the whole model was.
        refused: submodules that could not be captured, and why.
        zeros: outputs that hold zeros in place of what is removed, in a sentence; empty where there are none.
        advice: what would make much more removable; empty where nothing is known that would.
        sizes: which sizes of the inputs are free and which are pinned, in a sentence.
        branches: residual branches that can be removed as a whole, in the order of the graph.
    """

    model: str
    rung: str
    capture: str
    params: Share
    macs: Share
    groups: tuple[GroupEntry, ...]
    blocks: tuple[GroupEntry, ...]
    frozen: tuple[FrozenEntry, ...]
    regions: tuple[RegionEntry, ...] = ()
    refused: tuple[str, ...] = ()
    zeros: str = ""
    advice: str = ""
    sizes: str = ""
    branches: tuple[BranchEntry, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def text(self, all: bool = False) -> str:
        """The report as text.

        Args:
            all: one line for every group and axis, where the short form joins repeated blocks and leaves out
                what comes after the first dozen.
        """
        console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
        for part in self.parts(all):
            console.print(part)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.parts()

    def parts(self, all: bool = False) -> Iterator[Any]:
        """What rich prints one below the other."""
        yield Text(self.capture)
        if self.sizes:
            yield Text(f"sizes of the inputs: {self.sizes}")
        table = _table("", ("total", "right"), ("can be removed", "right"), ("frozen", "right"))
        for name, share in (("parameters", self.params), ("MACs", self.macs)):
            total = max(share.total, 1)
            table.add_row(
                name, f"{share.total:,}", f"{share.prunable / total:.1%}", f"{share.frozen / total:.1%}"
            )
        yield table
        yield Text()
        if self.regions:
            yield Text(f"{len(self.regions)} regions; the code around them stays as it is")
            yield self._region_table()
            yield from (Text(f"not captured: {refusal}") for refusal in self.refused)
            yield Text()
        groups = self.groups if all else self.blocks
        exact = sum(group.exact for group in self.groups)
        units = sum(group.units for group in self.groups)
        yield Text(f"{len(self.groups)} groups ({exact} exact) of {units:,} units")
        if groups:
            yield self._group_table(groups if all else groups[:MOST])
            yield from _left_out(len(groups) - MOST, "groups", all)
        yield Text()
        if self.branches:
            yield Text(f"{len(self.branches)} residual branches, which can go as a whole")
            branches = self.branches if all else _joined_branches(self.branches)
            yield self._branch_table(branches if all else branches[:MOST])
            yield from _left_out(len(branches) - MOST, "branches", all)
            yield Text()
        frozen = self.frozen if all else _joined_frozen(self.frozen)
        yield Text(f"{len(self.frozen)} frozen axes")
        for entry in frozen if all else frozen[:MOST]:
            yield _frozen_text(entry)
        yield from _left_out(len(frozen) - MOST, "frozen axes", all)
        for said in filter(None, (self.zeros, self.advice)):
            yield Text(f"\n{said}")

    def _region_table(self) -> Table:
        table = _table(
            "region", ("parameters", "right"), ("can be removed", "right"), ("captured by", "left"),
            ("fed by", "left"),
        )  # fmt: skip
        for region in self.regions:
            share = region.params
            table.add_row(
                Text(region.path, overflow="fold"),
                f"{share.total:,}",
                f"{share.prunable / share.total:.1%}" if share.total else "-",
                region.rung or "called as it is",
                Text(", ".join(region.linked), overflow="fold"),
            )
        return table

    def _branch_table(self, branches: tuple[BranchEntry, ...]) -> Table:
        table = _table("branch", ("params", "right"), ("MACs", "right"), ("added at", "left"))
        for branch in branches:
            table.add_row(
                Text(branch.name, overflow="fold"),
                f"{branch.params / max(self.params.total, 1):.1%}",
                f"{branch.macs / max(self.macs.total, 1):.1%}",
                Text(branch.source, overflow="fold"),
            )
        return table

    def _group_table(self, groups: tuple[GroupEntry, ...]) -> Table:
        right = [(name, "right") for name in ("units", "axes", "params", "MACs")]
        table = _table("group", *right, ("exact", "left"))
        for group in groups:
            rows = f" in {group.rows} rows" if group.rows > 1 else ""
            table.add_row(
                Text(group.name, overflow="fold"),
                f"{group.units}{rows}",
                f"{len(group.members)}",
                f"{group.params / max(self.params.total, 1):.1%}",
                f"{group.macs / max(self.macs.total, 1):.1%}",
                Text("yes" if group.exact else f"no: {group.because}"),
            )
        return table


def alike_groups(groups: Iterable[Group]) -> list[list[Group]]:
    """The groups of repeated blocks together: of the same size, and alike but for numbers in their names."""
    alike: dict[Any, list[Group]] = {}
    for group in groups:
        key = (starred(group.name), group.size, len(group.members), starred(group.inexact_because))
        alike.setdefault(key, []).append(group)
    return list(alike.values())


def report(graph: CouplingGraph) -> Report:
    """See :meth:`fxprune.CouplingGraph.report`."""
    costs = CostModel(graph)

    def sizes(gone: Any) -> Any:
        alive = np.ones(costs.prunable.size, dtype=bool)
        alive[gone] = False
        return costs.sizes(alive)

    def left(gone: Any) -> tuple[int, int]:
        return costs.params(sizes(gone)), costs.macs(sizes(gone))

    def region(found: Region) -> RegionEntry:
        everything: list[Any] = [[], costs.prunable]
        own, least = (costs.params(sizes(gone), f"{found.path}.") for gone in everything)
        linked = tuple(dict.fromkeys(link.source for link in found.links))
        return RegionEntry(found.path, found.rung, Share(own, own - least), linked, found.outside)

    params, macs = left([])
    least_params, least_macs = left(costs.prunable)
    lone = [[group] for group in graph.groups]

    def entry(groups: list[Group]) -> GroupEntry:
        first = groups[0]
        own_params, own_macs = left(np.concatenate([group.units for group in groups]))
        return GroupEntry(
            joined([group.name for group in groups]),
            first.size,
            max((len(rows) for rows in first.balance), default=1),
            tuple(str(member.axis) for member in first.members),
            first.exact,
            common([group.inexact_because for group in groups]),
            params - own_params,
            macs - own_macs,
        )

    def entries(groups: Iterable[list[Group]]) -> tuple[GroupEntry, ...]:
        return tuple(sorted(map(entry, groups), key=lambda found: -found.params))

    captured = graph.captured
    program = captured.program
    parts = program if isinstance(program, RegionProgram) else None
    return Report(
        captured.class_name,
        captured.rung,
        captured.report,
        Share(params, params - least_params),
        Share(macs, macs - least_macs),
        entries(lone),
        entries(alike_groups(graph.groups)),
        tuple(
            FrozenEntry(
                str(entry.axis),
                graph.captured.program.tensors[entry.axis.name].shape[entry.axis.dim],
                entry.reason,
                entry.node,
                entry.source,
                entry.remedy,
            )
            for entry in graph.frozen
        ),
        tuple(map(region, parts.regions)) if parts is not None else (),
        parts.refused if parts is not None else (),
        hold_zeros(tuple(graph.fill_outputs)),
        graph.advice,
        str(graph.sizes),
        tuple(
            BranchEntry(name, branch.entries, costs.branch(branch).macs, branch.source)
            for name, branch in graph.branches.items()
        ),
    )


def _joined_branches(entries: tuple[BranchEntry, ...]) -> tuple[BranchEntry, ...]:
    """Branches that are alike in one entry; what goes is that of all."""
    alike: dict[Any, list[BranchEntry]] = {}
    for entry in entries:
        alike.setdefault((starred(entry.name), entry.params, entry.macs, entry.source), []).append(entry)
    return tuple(
        BranchEntry(
            joined([entry.name for entry in same]),
            sum(entry.params for entry in same),
            sum(entry.macs for entry in same),
            same[0].source,
        )
        for same in alike.values()
    )


def _joined_frozen(entries: tuple[FrozenEntry, ...]) -> tuple[FrozenEntry, ...]:
    """Axes that are frozen for the same reason at the same place in one entry."""
    alike: dict[Any, list[FrozenEntry]] = {}
    for entry in entries:
        key = (starred(entry.axis), entry.size, starred(entry.reason), entry.source, entry.remedy)
        alike.setdefault(key, []).append(entry)
    return tuple(
        FrozenEntry(
            joined([entry.axis for entry in same]),
            same[0].size,
            common([entry.reason for entry in same]),
            common([entry.node for entry in same]),
            same[0].source,
            same[0].remedy,
        )
        for same in alike.values()
    )


def _table(first: str, *columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left")
    return table


def _left_out(count: int, what: str, all: bool) -> Iterator[Text]:
    if count > 0 and not all:
        yield Text(f"... and {count} more {what} (all of them: --all, or report.text(all=True))")


def _frozen_text(entry: FrozenEntry) -> Text:
    at = f" at {entry.node}" if entry.node else ""
    source = f" ({entry.source})" if entry.source else ""
    remedy = f"\n  what to do: {entry.remedy}" if entry.remedy else ""
    return Text(f"{entry.axis}, {entry.size} wide: {entry.reason}{at}{source}{remedy}")


__all__ = [
    "BranchEntry",
    "FrozenEntry",
    "GroupEntry",
    "RegionEntry",
    "Report",
    "Share",
    "alike_groups",
    "report",
]
