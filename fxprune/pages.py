"""Reports and notebooks: HTML and SVG in one piece, which need no network and no script to be shown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from . import files
from .compensation.report import Compensation
from .coupling.graph import CouplingGraph, tree_values
from .coupling.groups import Group
from .errors import ImportanceError
from .importance import BUILT_IN, score
from .passes.remove_branches import without_branches
from .planning.cost_model import CostModel
from .planning.plan import PruningPlan
from .repeats import joined, starred
from .report import GroupEntry, Report

__all__ = ["draw", "graph_html", "group_html", "plan_html", "report_html", "write_report"]

_STYLE = """
.fx{font:14px/1.45 system-ui,sans-serif;color:#1d2733;max-width:70rem}
.fx table{border-collapse:collapse;margin:.6rem 0}.fx th,.fx td{padding:.15rem .7rem .15rem
0;text-align:left;vertical-align:top} .fx td.n,.fx
th.n{text-align:right;font-variant-numeric:tabular-nums}.fx tr{border-bottom:1px solid #e3e8ee} .fx
.bar{display:inline-block;width:9rem;height:.7rem;background:#e3e8ee}.fx .bar i{display:block;height:100%}
.fx code{font-size:.92em}.fx h2{font-size:1.1rem;margin:1.4rem 0 .2rem}.fx p{margin:.3rem 0}
"""

_MOST_ROWS = 400
"""Rows of a table; repeated blocks are joined first."""


def plan_html(plan: PruningPlan) -> str:
    """What becomes of each group, as in ``plan.text()``, with bars."""
    alike: dict[Any, list[str]] = {}
    for narrowed in plan:
        alike.setdefault((starred(narrowed.group), narrowed.size, narrowed.kept), []).append(narrowed.group)
    names = list(plan.sizes)
    rows = [
        (
            _code(joined(groups)),
            size,
            kept,
            _bar(kept / size, _colour(names.index(groups[0]))),
        )
        for (_, size, kept), groups in alike.items()
    ]
    body = _table(("group", "units", "kept", ""), rows)
    return _page(repr(plan), [_costs(plan), body, _list(plan.notes)])


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
            _groups(graph, report.blocks, None),
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
    parts = [
        _text(report.capture),
        _heading("What it costs"),
        _costs(plan),
        _blocks(graph, left, plan),
        _branches(report, plan.branches),
        _heading("Groups: what goes together, and how much of it"),
        _groups(left, left.report().blocks if plan.branches else report.blocks, plan),
        _scores(left, plan),
        *_compensation(compensation),
        _heading("The network: each line is a node, coloured by the groups that it carries"),
        _svg(graph),
        _heading("What is held, and why"),
        _list(plan.notes),
        _frozen(graph),
    ]
    page = _page(f"{report.model}, pruned", parts)
    head = f'<head><meta charset="utf-8"><title>{_esc(report.model)}</title></head>'
    return f'<!DOCTYPE html><html lang="en">{head}<body>{page}</body></html>'


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


def _heading(text: str) -> str:
    return f"<h2>{_esc(text)}</h2>"


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_esc(text)}</li>" for text in texts) + "</ul>" if texts else ""


def _colour(number: int) -> str:
    return f"hsl({number * 137.508 % 360:.0f} 60% 52%)"  # the golden angle: neighbours differ


def _bar(share: float, colour: str) -> str:
    return f'<span class="bar"><i style="width:{share:.1%};background:{colour}"></i></span>'


def _page(title: str, parts: Iterable[str]) -> str:
    return f'<div class="fx"><style>{_STYLE}</style><p><b>{_esc(title)}</b></p>{"".join(parts)}</div>'


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Strings are HTML already; numbers are set to the right."""
    numeric = [bool(rows) and isinstance(value, int) for value in (rows[0] if rows else names)]

    def cell(tag: str, value: Any, number: bool) -> str:
        text = f"{value:,}" if isinstance(value, int) else value
        return f"<{tag} class=n>{text}</{tag}>" if number else f"<{tag}>{text}</{tag}>"

    lines = ["".join(cell("th", _esc(name), n) for name, n in zip(names, numeric, strict=True))]
    lines += [
        "".join(cell("td", v, n) for v, n in zip(row, numeric, strict=True)) for row in rows[:_MOST_ROWS]
    ]
    more = f"<p>and {len(rows) - _MOST_ROWS} more</p>" if len(rows) > _MOST_ROWS else ""
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + f"</table>{more}"


def _costs(plan: PruningPlan) -> str:
    names = {"params": "parameters", "macs": "multiply-accumulates"}
    rows = [
        (names.get(name, name), a, b, _bar(b / max(a, 1), "#3572b0"))
        for name, (a, b) in plan.counts().items()
    ]
    return _table(("", "before", "after", ""), rows) if rows else ""


def _shares(report: Any) -> str:
    rows = [
        (name, share.total, share.prunable, _bar(share.prunable / max(share.total, 1), "#3572b0"))
        for name, share in (("parameters", report.params), ("multiply-accumulates", report.macs))
    ]
    return _table(("", "total", "can be removed", ""), rows)


def _branches(report: Report, gone: Sequence[str]) -> str:
    """The residual branches that can go as a whole, and which do."""
    rows = [
        (_code(branch.name), branch.params, branch.macs, "goes" if branch.name in gone else "stays")
        for branch in report.branches
    ]
    return _table(("residual branch", "parameters", "multiply-accumulates", ""), rows) if rows else ""


def _compensation(done: Compensation | None) -> list[str]:
    """What each step of a compensation brought."""
    if done is None:
        return []
    rows = [
        (_code(entry.name), entry.step, f"{entry.before:.3g}", f"{entry.after:.3g}", _esc(entry.reason))
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


def _blocks(graph: CouplingGraph, left: CouplingGraph, plan: PruningPlan) -> str:
    """Parameters, MACs and bytes by block before and after; ``left`` is without the branches that go."""
    costs = [CostModel(graph)]
    costs.append(costs[0] if left is graph else CostModel(left))
    sizes = [model.sizes(model.alive(gone)) for model, gone in zip(costs, ({}, plan.removed), strict=True)]
    both = [*zip(costs, sizes, strict=True)]
    blocks: dict[str, None] = {}
    for name in graph.tensor_names():
        parts = name.split(".")[:-1]
        depth = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), min(1, len(parts)))
        blocks[".".join(parts[:depth])] = None
    rows = []
    for block in filter(None, blocks):
        before, after = (model.params(sizes, f"{block}.") for model, sizes in both)
        work = [model.macs(sizes, f"{block}.") for model, sizes in both]
        stored = [model.bytes(sizes, f"{block}.") for model, sizes in both]
        if before:
            rows.append((_code(block), before, after, _bar(after / before, "#3572b0"), *work, *stored))
    names = ("block", "parameters before", "after", "", "MACs before", "after", "bytes before", "after")
    return _table(names, rows)


def _groups(graph: CouplingGraph, entries: Sequence[GroupEntry], plan: PruningPlan | None) -> str:
    numbers = {group.name: i for i, group in enumerate(graph.groups)}
    kept: dict[str, list[tuple[str, int]]] = {}
    for group in graph.groups:
        gone = len(plan.removed.get(group.name, ())) if plan is not None else 0
        kept.setdefault(starred(group.name), []).append((group.name, group.size - gone))
    rows = []
    for entry in entries:
        own = [
            item for items in kept.values() for item in items if joined([n for n, _ in items]) == entry.name
        ]
        own = own or [item for items in kept.values() for item in items if item[0] == entry.name]
        widths = sorted({width for _, width in own}) or [entry.units]
        after = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        mean = sum(widths) / len(widths) / max(entry.units, 1)
        colour = _colour(numbers.get(own[0][0], 0) if own else 0)
        exact = "yes" if entry.exact else f"no: {_esc(entry.because)}"
        rows.append(
            (_code(entry.name), entry.units, _esc(after), _bar(mean, colour), len(entry.members), exact)
        )
    return _table(("group", "units", "left", "", "axes", "exact"), rows)


_BINS = 24


def _scores(graph: CouplingGraph, plan: PruningPlan) -> str:
    """How the scores of each group lie, and which of its units go.

    Only for criteria that read nothing but weights: the others would have to run the network again.
    """
    importance, seed = plan.settings.get("importance"), plan.settings.get("seed", 0)
    if importance not in BUILT_IN or not plan.removed:
        return ""
    try:
        scored = score(graph, str(importance), int(seed))
        scores = {group.name: scored(group) for group in graph.groups}
    except ImportanceError:  # weights without values, or a criterion that wants data
        return ""
    alike: dict[Any, list[Group]] = {}
    for group in graph.groups:
        alike.setdefault((starred(group.name), group.size), []).append(group)
    rows = []
    for groups in alike.values():
        found = np.concatenate([np.asarray(scores[group.name], dtype=np.float64) for group in groups])
        gone = np.zeros(len(found), dtype=bool)
        start = 0
        for group in groups:
            gone[start + np.array(plan.removed.get(group.name, []), dtype=np.int64)] = True
            start += group.size
        cut = f"{found[gone].max():.3g}" if gone.any() else ""
        rows.append((_code(joined([g.name for g in groups])), _histogram(found, gone), _esc(cut)))
    named = _text(f"Scores by {importance}, from the least to the largest of each group; what goes is red.")
    return named + _table(("group", "units by score", "largest score that goes"), rows)


def _histogram(scores: NDArray[np.float64], gone: NDArray[np.bool_]) -> str:
    """Bars: how many units have such a score, with those that go at the bottom."""
    bounds = float(scores.min()), float(scores.max())
    all_counts, edges = np.histogram(scores, _BINS, bounds if bounds[1] > bounds[0] else None)
    gone_counts, _ = np.histogram(scores[gone], edges)
    most, high = max(int(all_counts.max()), 1), 28
    bars = []

    def bar(i: int, top: int, tall: int, colour: str) -> None:
        if tall:
            bars.append(f'<rect x="{7 * i}" y="{top}" width="6" height="{tall}" fill="{colour}"/>')

    for i, (every, out) in enumerate(zip(all_counts.tolist(), gone_counts.tolist(), strict=True)):
        tall, low = round(high * every / most), round(high * out / most)
        bar(i, high - tall, tall - low, "#8fa1b5")
        bar(i, high - low, low, "#c0392b")
    return f'<svg width="{7 * _BINS}" height="{high}">{"".join(bars)}</svg>'


def _frozen(graph: CouplingGraph) -> str:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for entry in graph.frozen:
        key = starred(str(entry.axis)), starred(entry.reason), entry.remedy
        alike.setdefault(key, []).append(str(entry.axis))
    rows = [(_code(joined(axes)), _esc(reason), _esc(remedy)) for (_, reason, remedy), axes in alike.items()]
    return _table(("frozen axis", "why", "what would help"), rows)


def _svg(graph: CouplingGraph) -> str:
    """The captured graph from top to bottom: a line for each node, arcs where a value skips nodes."""
    nodes = [node for node in graph.captured.program.graph.nodes if node.op != "get_attr"]
    place = {node: i for i, node in enumerate(nodes)}
    carried = _carried(graph)
    high, left = 15, 190
    parts = []
    for node, row in place.items():
        y = row * high + high
        for i, number in enumerate(sorted(carried.get(node, ()))[:8]):
            parts.append(
                f'<rect x="{left + 8 * i}" y="{y - 9}" width="7" height="11" fill="{_colour(number)}"/>'
            )
        name = node.target if node.op == "call_module" else node.name
        parts.append(f'<text x="{left + 74}" y="{y}">{_esc(name)}</text>')
        for source in node.all_input_nodes:
            start = place.get(source)
            if start is not None and row - start > 1:
                y1 = start * high + high - 4
                bend = left - min(170, 12 + 3 * (row - start))
                parts.append(f'<path d="M{left - 3} {y1} C{bend} {y1} {bend} {y - 4} {left - 3} {y - 4}"/>')
    height = len(nodes) * high + 2 * high
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" '
        'style="font:11px ui-monospace,monospace">'
        "<style>path{fill:none;stroke:#8fa1b5;stroke-width:1}</style>" + "".join(parts) + "</svg>"
    )


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
