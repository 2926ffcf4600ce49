"""Reports and notebooks: HTML and SVG in one piece, which need no network and no script to be shown."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from . import files
from .compensation.report import Compensation
from .coupling.graph import CouplingGraph, tree_values
from .coupling.groups import Group
from .coupling.roles import module_of
from .errors import ImportanceError
from .importance import BUILT_IN, score
from .passes.remove_branches import without_branches
from .planning.cost_model import CostModel
from .planning.plan import PruningPlan
from .repeats import common, joined, starred
from .report import Report, alike_groups

__all__ = ["draw", "graph_html", "group_html", "plan_html", "report_html", "write_report"]

_STYLE = """
.fx{font:14px/1.45 system-ui,sans-serif;max-width:90rem}.fx h1{font-size:1.35rem;margin:.2rem 0}
.fx h2{font-size:1.1rem;margin:1.8rem 0 .2rem}.fx p{margin:.3rem 0}.fx code{font-size:.92em}
.fx .wide{overflow:auto;max-height:36rem;margin:.6rem 0}.fx table{border-collapse:collapse}
.fx th,.fx td{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
.fx th,.fx td.n,.fx code{white-space:nowrap}.fx .t{display:inline-block;min-width:14rem}
.fx td.n,.fx th.n{text-align:right;font-variant-numeric:tabular-nums}
.fx tr{border-bottom:1px solid rgba(128,140,155,.3)}
.fx .bar{display:inline-block;width:9rem;height:.7rem;background:rgba(128,140,155,.25)}
.fx .bar i{display:block;height:100%}
.fx .of{display:flex;flex-wrap:wrap;max-width:9rem}.fx .of i{width:.5rem;height:.8rem;margin:0 1px 1px 0}
"""

_MOST_ROWS = 400
"""Rows of a table; repeated blocks are joined first."""


def plan_html(plan: PruningPlan) -> str:
    """What becomes of each group, as in ``plan.text()``, with bars."""
    alike: dict[Any, list[str]] = {}
    for narrowed in plan:
        alike.setdefault((starred(narrowed.group), narrowed.size, narrowed.kept), []).append(narrowed.group)
    rows = [
        (_code(joined(groups)), size, kept, _bar(kept / size)) for (_, size, kept), groups in alike.items()
    ]
    return _page(
        repr(plan),
        [_costs(plan.counts()), _table(("group", "units", "kept", ""), rows), _list(plan.notes)],
    )


def group_html(group: Group) -> str:
    """A group's members."""
    rows = [
        (_code(str(m.axis)), "x".join(map(str, m.tensor.shape)), ", ".join(sorted(m.roles)))
        for m in group.members
    ]
    return _page(repr(group), [_table(("axis", "shape", "role"), rows)])


def graph_html(graph: CouplingGraph) -> str:
    """The report of an analysis: what can be removed, and what is frozen, where, why, and what would help."""
    report = graph.report()
    return _page(
        f"{report.model}: {len(graph)} groups",
        [
            _text(report.capture),
            _shares(report),
            _groups(graph, report, None),
            _branches(report, ()),
            _frozen(graph),
        ],
    )


def report_html(graph: CouplingGraph, plan: PruningPlan, compensation: Compensation | None = None) -> str:
    """One page on what a plan does to a network: costs by block, groups, the graph, what is held, and why.

    Args:
        graph: the analysis.
        plan: the plan.
        compensation: what became of the layers that are left, or None where they stay as they were.
    """
    graph = graph.whole
    report = graph.report()
    left = without_branches(graph, plan.branches)
    costs = _Costs(graph, left, plan)
    sizes = f"sizes of the inputs: {report.sizes}"
    parts = [
        _text(report.capture),
        _text(sizes) if report.sizes and sizes not in plan.notes else "",
        _heading("What it costs"),
        _costs(costs.totals()),
        _blocks(costs),
        _branches(report, plan.branches),
        _heading("Groups: what goes together, and how much of it"),
        _groups(left, left.report() if plan.branches else report, plan),
        *_compensation(compensation),
        _heading("The network"),
        _text(
            "A line for each node that carries channels, with squares in the colours of their groups; lines "
            "at the left lead from where a value is made to where it is read."
        ),
        _wide(_svg(graph)),
        _heading("What is held, and why"),
        _list(plan.notes),
        _frozen(graph),
    ]
    page = _page(f"{report.model}, pruned", parts)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta name="color-scheme" content="light dark"><title>{_esc(report.model)}, pruned</title>'
    )
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{page}</body></html>'


def write_report(
    graph: CouplingGraph, plan: PruningPlan, path: Path, compensation: Compensation | None = None
) -> int:
    """Write :func:`report_html` to a file, which appears there only when it is whole; its size in bytes.

    Raises:
        OutputError: if it cannot be written.
    """
    files.check_output(path, (".html",))
    text = report_html(graph, plan, compensation)
    return files.write(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def draw(graph: CouplingGraph, path: str | Path) -> None:
    """See :meth:`fxprune.CouplingGraph.draw`."""
    path = Path(path)
    files.check_output(path, (".svg",))
    text = _svg(graph)
    files.write(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _esc(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _code(text: str) -> str:
    return f"<code>{_esc(text)}</code>"


def _text(text: str) -> str:
    return f"<p>{_esc(text)}</p>"


def _why(text: str) -> str:
    """A sentence in a table, which needs some width to be read."""
    return f"<span class=t>{_esc(text)}</span>" if text else ""


def _heading(text: str) -> str:
    return f"<h2>{_esc(text)}</h2>"


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_esc(text)}</li>" for text in texts) + "</ul>" if texts else ""


def _colour(number: int) -> str:
    return f"hsl({number * 137.508 % 360:.0f} 60% 52%)"  # the golden angle: neighbours differ


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{share:.1%};background:#3572b0"></i></span>'


def _squares(colours: Mapping[str, str]) -> str:
    """A square in the colour of each group; its name is shown where the pointer rests."""
    squares = "".join(
        f'<i style="background:{colour}" title="{_esc(name)}"></i>' for name, colour in colours.items()
    )
    return f'<span class="of" style="width:{9 * len(colours)}px">{squares}</span>'


def _page(title: str, parts: Iterable[str]) -> str:
    return f'<div class="fx"><style>{_STYLE}</style><h1>{_esc(title)}</h1>{"".join(parts)}</div>'


def _wide(content: str) -> str:
    """What may be larger than the window, in a box that scrolls."""
    return f'<div class="wide">{content}</div>'


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Strings are HTML already; columns with whole numbers are set to the right."""
    numeric = [any(isinstance(row[i], int) for row in rows) for i in range(len(names))]

    def cell(tag: str, value: Any, number: bool) -> str:
        text = f"{value:,}" if isinstance(value, int) else value
        return f"<{tag} class=n>{text}</{tag}>" if number else f"<{tag}>{text}</{tag}>"

    lines = ["".join(cell("th", _esc(name), n) for name, n in zip(names, numeric, strict=True))]
    lines += [
        "".join(cell("td", v, n) for v, n in zip(row, numeric, strict=True)) for row in rows[:_MOST_ROWS]
    ]
    more = f"<p>and {len(rows) - _MOST_ROWS} more</p>" if len(rows) > _MOST_ROWS else ""
    return _wide("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>") + more


def _costs(counts: Mapping[str, Sequence[int]]) -> str:
    names = {"params": "parameters", "macs": "multiply-accumulates"}
    rows = [
        (names.get(name, name), a, b, _bar(b / max(a, 1)), f"{b / max(a, 1):.1%}")
        for name, (a, b) in counts.items()
    ]
    return _table(("", "before", "after", "", "left"), rows) if rows else ""


def _shares(report: Any) -> str:
    rows = [
        (name, share.total, share.prunable, _bar(share.prunable / max(share.total, 1)))
        for name, share in (("parameters", report.params), ("multiply-accumulates", report.macs))
    ]
    return _table(("", "total", "can be removed", ""), rows)


def _branches(report: Report, gone: Sequence[str]) -> str:
    """The residual branches that can go as a whole, and which do; alike ones are joined."""
    alike: dict[Any, list[str]] = {}
    for branch in report.branches:
        key = starred(branch.name), branch.params, branch.macs, branch.name in gone
        alike.setdefault(key, []).append(branch.name)
    rows = [
        (_code(joined(names)), params, macs, "goes" if goes else "stays")
        for (_, params, macs, goes), names in alike.items()
    ]
    return _table(("residual branch", "parameters", "multiply-accumulates", ""), rows) if rows else ""


def _compensation(done: Compensation | None) -> list[str]:
    """What each step of a compensation brought."""
    if done is None:
        return []
    rows = [
        (_code(entry.name), entry.step, f"{entry.before:.3g}", f"{entry.after:.3g}", _why(entry.reason))
        for entry in done.layers
    ]
    said = (
        f"The outputs differ from the original's by {done.before:.3g} of their variance as narrowed, by "
        f"{done.after:.3g} afterwards ({done.batches} calibration batches)."
    )
    errors = "Errors are mean squares, as a share of what the layer should give."
    named = ("layer", "step", "error before", "after", "as it was, because")
    return [
        _heading("What compensation brought"),
        _text(f"{said} {errors if rows else ''}"),
        _table(named, rows) if rows else "",
        _list(done.notes),
    ]


class _Costs:
    """What a network costs, as a whole and by block, before and after a plan.

    Args:
        graph: the analysis of the whole network.
        left: that without the residual branches that go.
        plan: what else goes.
    """

    def __init__(self, graph: CouplingGraph, left: CouplingGraph, plan: PruningPlan) -> None:
        before = CostModel(graph)
        after = before if left is graph else CostModel(left)
        self.graph = graph
        self._both = ((before, before.full), (after, after.sizes(after.alive(plan.removed))))

    def _of(self, start: str) -> NDArray[np.int64]:
        """Parameters, multiply-accumulates and bytes of what begins so, before and after: ``(6,)``."""
        kinds = (CostModel.params, CostModel.macs, CostModel.bytes)
        return np.array([kind(model, sizes, start) for kind in kinds for model, sizes in self._both])

    def totals(self) -> dict[str, list[int]]:
        """As :meth:`fxprune.PruningPlan.counts`."""
        counts = self._of("").tolist()
        return {"params": counts[:2], "macs": counts[2:4]}

    def blocks(self) -> dict[str, NDArray[np.int64]]:
        """By path of each block what it costs without the blocks inside of it, so that all add up to all.

        The empty path has what stands outside of all others.
        """
        names = [name.split(".")[:-1] for name in self.graph.tensor_names()]
        containers = {tuple(path[:depth]) for path in names for depth in range(len(path))}
        paths = list(dict.fromkeys([*(_block_of(path, containers) for path in names), ""]))
        found: dict[str, NDArray[np.int64]] = {}
        for path in sorted(paths, key=len, reverse=True):
            within = f"{path}." if path else ""
            found[path] = self._of(within) - sum(
                own for name, own in found.items() if name.startswith(within)
            )
        return {path: found[path] for path in paths if found[path].any()}


def _block_of(path: Sequence[str], containers: Collection[tuple[str, ...]]) -> str:
    """The path of the block that a layer is in: of ``layers.0.mlp.fc`` it is ``layers.0``.

    A block is a module with modules in it and a number in its name; of a ``blocks.0`` with ``blocks.0.0`` in
    it, the latter is one. A layer outside of all blocks stands for itself where it has a number
    (``features.3``), else for what the network calls by the first part of its name (``head``).
    """
    numbered = [
        any(sign.isdigit() for sign in part) and tuple(path[: i + 1]) in containers
        for i, part in enumerate(path)
    ]
    if any(numbered):
        first = numbered.index(True)
        depth = first + next((i for i, block in enumerate(numbered[first:]) if not block), len(path) - first)
    else:
        depth = next((i + 1 for i, part in enumerate(path) if part.isdigit()), min(1, len(path)))
    return ".".join(path[:depth])


def _blocks(costs: _Costs) -> str:
    """Parameters, MACs and bytes by block before and after; blocks that cost the same are joined."""
    found = costs.blocks()
    alike: dict[Any, list[str]] = {}
    for path, counts in found.items():
        alike.setdefault((starred(path), *counts.tolist()), []).append(path)
    rows = []
    for (_, before, after, *others), paths in alike.items():
        inside = any(path.startswith(f"{paths[0]}.") for path in found if paths[0])
        name = f"{_code(joined(paths))}{', each' if len(paths) > 1 else ', the rest' if inside else ''}"
        name = name if paths[0] else "outside of all blocks"
        rows.append((name, before, after, _bar(after / before) if before else "", *others))
    names = ("block", "parameters before", "after", "", "MACs before", "after", "bytes before", "after")
    return _table(names, rows)


def _groups(graph: CouplingGraph, report: Report, plan: PruningPlan | None) -> str:
    """A line for each group, those alike joined: how much of it goes and, where known, by which scores."""
    colours = {group.name: _colour(i) for i, group in enumerate(graph.groups)}
    params = {entry.name: entry.params for entry in report.groups}
    removed = plan.removed if plan is not None else {}
    alike: dict[tuple[int, int], list[Group]] = {}
    for number, groups in enumerate(alike_groups(graph.groups)):
        for group in groups:
            kept = group.size - len(removed.get(group.name, ()))
            alike.setdefault((number, kept), []).append(group)
    scores = _scores(graph, plan) if plan is not None else {}
    rows = []
    order = sorted(alike.items(), key=lambda item: -sum(params[group.name] for group in item[1]))
    for (_, kept), groups in order:
        first = groups[0]
        row = [
            _code(joined([group.name for group in groups])),
            _squares({group.name: colours[group.name] for group in groups}),
            first.size,
            *([kept, _bar(kept / first.size)] if plan is not None else []),
            len(first.members),
            *(_histogram(groups, scores, removed) if scores else []),
            "yes" if first.exact else _why(f"no: {common([group.inexact_because for group in groups])}"),
        ]
        rows.append(row)
    left = ("left", "") if plan is not None else ()
    by = ("units by score", "largest that goes") if scores else ()
    names = ("group", "", "units", *left, "axes", *by, "exact")
    said = ""
    if scores and plan is not None:
        said = _text(
            f"Scores by {plan.settings['importance']}, from the least to the largest; what goes is red."
        )
    return said + _table(names, rows)


_BINS = 24


def _scores(graph: CouplingGraph, plan: PruningPlan) -> dict[str, NDArray[np.float64]]:
    """By group the scores that a plan was made with.

    Only of criteria that read nothing but weights: the others would have to run the network again.
    """
    importance, seed = plan.settings.get("importance"), plan.settings.get("seed", 0)
    if importance not in BUILT_IN or not plan.removed:
        return {}
    try:
        scored = score(graph, str(importance), int(seed))
        return {group.name: np.asarray(scored(group), dtype=np.float64) for group in graph.groups}
    except ImportanceError:  # weights without values, or a criterion that wants data
        return {}


def _histogram(
    groups: Sequence[Group], scores: Mapping[str, NDArray[np.float64]], removed: Mapping[str, Sequence[int]]
) -> tuple[str, str]:
    """Bars: how many units have such a score, with those that go at the bottom; and the largest that goes."""
    found = np.concatenate([scores[group.name] for group in groups])
    gone = np.concatenate(
        [
            np.isin(np.arange(group.size), np.array(removed.get(group.name, ()), dtype=np.int64))
            for group in groups
        ]
    )
    bounds = float(found.min()), float(found.max())
    all_counts, edges = np.histogram(found, _BINS, bounds if bounds[1] > bounds[0] else None)
    gone_counts, _ = np.histogram(found[gone], edges)
    most, high = max(int(all_counts.max()), 1), 28
    bars = []

    def bar(i: int, top: int, tall: int, colour: str) -> None:
        if tall:
            bars.append(f'<rect x="{7 * i}" y="{top}" width="6" height="{tall}" fill="{colour}"/>')

    for i, (every, out) in enumerate(zip(all_counts.tolist(), gone_counts.tolist(), strict=True)):
        tall, low = round(high * every / most), round(high * out / most)
        bar(i, high - tall, tall - low, "#8fa1b5")
        bar(i, high - low, low, "#c0392b")
    drawn = f'<svg width="{7 * _BINS}" height="{high}">{"".join(bars)}</svg>'
    return drawn, f"{found[gone].max():.3g}" if gone.any() else ""


def _frozen(graph: CouplingGraph) -> str:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for entry in graph.frozen:
        key = starred(str(entry.axis)), starred(entry.reason), entry.remedy
        alike.setdefault(key, []).append(str(entry.axis))
    rows = [(_code(joined(axes)), _why(reason), _why(remedy)) for (_, reason, remedy), axes in alike.items()]
    return _table(("frozen axis", "why", "what would help"), rows)


def _svg(graph: CouplingGraph) -> str:
    """The network from top to bottom: a line for each node that carries channels, arcs where it skips one.

    Nodes that carry none are left out, but for inputs and outputs; what comes through them comes from what
    they read.
    """
    carried = _carried(graph)
    shown = [
        node
        for node in graph.captured.program.graph.nodes
        if carried.get(node) or node.op in ("placeholder", "output")
    ]
    place = {node: i for i, node in enumerate(shown)}
    through: dict[fx.Node, frozenset[int]] = {}
    high, left = 15, 130
    parts = []
    for node in graph.captured.program.graph.nodes:
        sources: frozenset[int] = frozenset().union(*(through[source] for source in node.all_input_nodes))
        row = place.get(node)
        if row is None:
            through[node] = sources if _is_tensor(graph, node) else frozenset()
            continue
        through[node] = frozenset([row])
        y = row * high + high
        numbers = sorted(carried.get(node, ()))
        for i, number in enumerate(numbers):
            name = _esc(graph.groups[number].name)
            parts.append(
                f'<rect x="{left + 8 * i}" y="{y - 9}" width="7" height="11" fill="{_colour(number)}">'
                f"<title>{name}</title></rect>"
            )
        path = module_of(node)
        inside = f" <tspan>{_esc(path)}</tspan>" if path and node.op != "call_module" else ""
        name = node.target if node.op == "call_module" else node.name
        parts.append(f'<text x="{left + 8 * len(numbers) + 5}" y="{y}">{_esc(name)}{inside}</text>')
        for start in sorted(sources):
            if row - start > 1:
                y1 = start * high + high - 4
                bend = left - min(120, 12 + 3 * (row - start))
                parts.append(f'<path d="M{left - 3} {y1} C{bend} {y1} {bend} {y - 4} {left - 3} {y - 4}"/>')
    height = len(shown) * high + 2 * high
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" '
        'style="font:11px ui-monospace,monospace">'
        "<style>path{fill:none;stroke:#8fa1b5;stroke-opacity:.6}text{fill:currentColor}tspan{fill:#8fa1b5}"
        "</style>" + "".join(parts) + "</svg>"
    )


def _is_tensor(graph: CouplingGraph, node: fx.Node) -> bool:
    """Whether a node gives tensors, not sizes or other numbers."""
    return any(True for _ in tree_values(graph.run.values.get(node)))


def _carried(graph: CouplingGraph) -> Mapping[fx.Node, set[int]]:
    """For each node the numbers of the groups whose channels its output has."""
    owner = {int(unit): i for i, group in enumerate(graph.groups) for unit in group.units}
    known: dict[int, set[int]] = {}
    found: dict[fx.Node, set[int]] = {}
    for node, tree in graph.run.values.items():
        own: set[int] = set()
        for value in tree_values(tree):
            for dim in range(len(value.shape)):
                label = value.label(dim)
                if label is None:
                    continue
                if id(label.ids) not in known:
                    classes = set(graph.classes(label.ids.reshape(-1)).tolist())
                    known[id(label.ids)] = {owner[c] for c in classes if c in owner}
                own |= known[id(label.ids)]
        found[node] = own
    return found
