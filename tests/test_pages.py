"""Reports and drawings: well formed, in one piece, with the plan's figures, and small for large networks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from test_files import Net
from torchvision.models import resnet18

import fxprune
from fxprune.cli import main
from fxprune.compensation.report import Compensation, LayerEntry
from fxprune.errors import OutputError
from fxprune.importance import score
from fxprune.pages import report_html

X = torch.zeros(2, 3, 8, 8)


class Checked(HTMLParser):
    """Every tag is closed in order; the texts are collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of SVG."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


Tables = list[list[list[str]]]
"""The texts of a page's tables, by row and cell."""


class Cells(Checked):
    """Collects tables, too."""

    def __init__(self, text: str) -> None:
        self.tables: Tables = []
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def made() -> tuple[fxprune.CouplingGraph, fxprune.PruningPlan]:
    torch.manual_seed(0)
    graph = fxprune.analyze(Net(), X)
    return graph, fxprune.plan(graph, 0.5)


def test_a_report_says_what_the_plan_does(
    made: tuple[fxprune.CouplingGraph, fxprune.PruningPlan],
) -> None:
    graph, plan = made
    text = report_html(graph, plan)
    texts = Checked(text).texts
    for before, after in plan.counts().values():
        at = texts.index(f"{before:,}")
        assert texts[at + 1] == f"{after:,}"
    at = texts.index("blocks.*.0.weight[0] (x3)")
    assert texts[at + 1 : at + 3] == ["12", "6"]
    at = texts.index("blocks.* (x3)")
    assert texts[at + 1] == ", each"
    at += 1
    assert texts[at + 1] == f"{12 * 6 + 12 + 6 * 12 + 6:,}"
    narrow = plan.apply(Net())
    work = [
        sum(2 * 64 * p.numel() for name, p in m.named_parameters() if re.search(r"blocks\.1\..*weight", name))
        for m in (Net(), narrow)
    ]
    assert texts[at + 3 : at + 5] == [f"{macs:,}" for macs in work]
    assert texts[at + 5] == f"{4 * (12 * 6 + 12 + 6 * 12 + 6):,}"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "<script" not in text


def test_all_figures_are_those_of_the_plan() -> None:
    """Those of blocks add up to the whole, and each group is in a line of its own width."""
    residual = fxprune.analyze(resnet18(num_classes=10).eval(), torch.zeros(1, 3, 32, 32))
    attention = fxprune.analyze(vit(), torch.zeros(1, 3, 16, 16))
    for graph in (residual, attention):
        plan = fxprune.plan(graph, budget=fxprune.Budget(macs=0.6), importance="l1", round_to=4)
        check_figures(Cells(report_html(graph, plan)).tables, plan)


def test_what_functions_multiply_belongs_to_the_block_that_calls_them() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return x + (y @ y.transpose(1, 2)).softmax(-1) @ y

    model = torch.nn.Sequential(torch.nn.Linear(3, 8), Block(), Block(), torch.nn.Linear(8, 2))
    graph = fxprune.analyze(model, torch.zeros(1, 5, 3))
    tables = Cells(report_html(graph, fxprune.plan(graph, 0.5))).tables
    (blocks,) = [table for table in tables if table[0][0] == "block"]
    assert [row[0] for row in blocks[1:]] == ["0", "* (x2), each", "3"]
    assert blocks[2][4] == str(5 * 8 * 8 + 2 * 5 * 5 * 8)


def check_figures(tables: Tables, plan: fxprune.PruningPlan) -> None:
    """The tables of a report have the plan's figures."""

    def number(text: str) -> int:
        return int(text.replace(",", ""))

    def of(first: str) -> Tables:
        return [table for table in tables if table[0][0] == first]

    (costs,) = of("")
    assert [[number(cell) for cell in row[1:3]] for row in costs[1:]] == [*plan.counts().values()]
    (blocks,) = of("block")
    sums = [0] * 6
    for row in blocks[1:]:
        times = re.search(r"\(x(\d+)\), each", row[0])
        cells = [number(cell) for cell in (*row[1:3], *row[4:])]
        sums = [a + b * int(times[1] if times else 1) for a, b in zip(sums, cells, strict=True)]
    assert [sums[:2], sums[2:4]] == [*plan.counts().values()]
    (groups,) = of("group")
    shown: dict[str, set[tuple[int, int]]] = {}
    for row in groups[1:]:
        shown.setdefault(re.sub(r" \(x\d+\)", "", row[0]), set()).add((number(row[2]), number(row[3])))
    for narrowed in plan:
        alike = {
            size
            for name, sizes in shown.items()
            if re.fullmatch(re.escape(name).replace(r"\*", r"\d+"), narrowed.group)
            for size in sizes
        }
        assert (narrowed.size, narrowed.kept) in alike, narrowed


def vit() -> torch.nn.Module:
    """Blocks whose names end in numbers, a parameter of the network's own."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 3, 4, 16, 32, num_classes=5).eval()


def test_in_a_browser(tmp_path: Path) -> None:
    """No word on the console, nothing loaded, no wider than the window, and the figures of the plan."""
    graph = fxprune.analyze(vit(), torch.zeros(1, 3, 16, 16))
    plan = fxprune.plan(graph, 0.5, "l1")
    for width in (1400, 500):
        seen, console = in_browser(report_html(graph, plan), tmp_path / "report.html", width)
        assert console == []
        assert seen["loaded"] == []
        assert seen["width"] <= width
        assert seen["title"] == "VisionTransformer, pruned"
        check_figures(seen["tables"], plan)


_LOOK = """
addEventListener("load", () => {
  const tables = [...document.querySelectorAll("table")].map(
    table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText)));
  const seen = {
    tables, title: document.title, width: document.documentElement.scrollWidth,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name)};
  document.body.innerHTML = "";
  document.body.append("SEEN" + btoa(encodeURIComponent(JSON.stringify(seen))) + "SEEN");
});
"""


def in_browser(page: str, path: Path, width: int) -> tuple[dict[str, Any], list[str]]:
    """What a browser without a network makes of a page, and what it says on its console."""
    from base64 import b64decode
    from urllib.parse import unquote

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the path (apt-get install chromium)")
    path.write_text(page.replace("</body>", f"<script>{_LOOK}</script></body>"), encoding="utf-8")
    switches = [
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "proxy-server=127.0.0.1:9",
        f"user-data-dir={path.parent / f'profile{width}'}", f"window-size={width},900",
        "enable-logging=stderr", "dump-dom",
    ]  # fmt: skip
    command = [browser, *(f"--{switch}" for switch in switches), path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert "SEEN" in done.stdout, said
    return json.loads(unquote(b64decode(done.stdout.split("SEEN")[1]).decode())), said


def test_a_report_shows_the_scores_with_the_cut() -> None:
    """The bars stand for all units of a group; the red ones for those that go."""
    graph = fxprune.analyze(Net(blocks=1), X)
    plan = fxprune.plan(graph, 0.5, "l1")
    text = report_html(graph, plan)
    (group,) = [group for group in graph.groups if group.name == "blocks.0.0.weight[0]"]
    scores = score(graph, "l1")(group)
    assert f"{scores[plan.removed[group.name]].max():.3g}" in Checked(text).texts
    histogram = text[text.index("Scores by l1") :].partition("</table>")[0]
    assert histogram.count("#c0392b") >= len(plan.removed)
    assert "Scores by" not in report_html(
        graph, fxprune.plan(graph, 0.5, lambda group: torch.rand(group.size))
    )


def test_names_are_escaped() -> None:
    class Odd(Net):
        pass

    Odd.__name__ = "<b>Odd&"
    graph = fxprune.analyze(Odd(), X)
    text = report_html(graph, fxprune.plan(graph, 0.5))
    assert "<b>Odd&" not in text
    assert "&lt;b&gt;Odd&amp;" in text
    Checked(text)


def test_notebooks(made: tuple[fxprune.CouplingGraph, fxprune.PruningPlan]) -> None:
    graph, plan = made
    for shown in (graph, plan, graph.groups[0]):
        assert Checked(shown._repr_html_()).texts


def test_drawings(made: tuple[fxprune.CouplingGraph, fxprune.PruningPlan], tmp_path: Path) -> None:
    graph, _ = made
    graph.draw(tmp_path / "groups.svg")
    root = ElementTree.parse(tmp_path / "groups.svg").getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "blocks.2.0" in texts
    colours = {element.get("fill") for element in root.iter() if element.tag.endswith("rect")}
    assert len(colours) == len(graph.groups)
    with pytest.raises(OutputError, match=r"end in \.svg \(a drawing\)"):
        graph.draw(tmp_path / "groups.png")


def test_a_deep_network_has_a_small_report(tmp_path: Path) -> None:
    graph = fxprune.analyze(Net(blocks=150), X)
    text = report_html(graph, fxprune.plan(graph, 0.5))
    assert len(text) < 400_000
    assert "blocks.*.0.weight[0] (x150)" in text


def test_a_report_says_what_compensation_brought() -> None:
    done = Compensation(
        0.5, 0.25, (LayerEntry("a.weight", "least squares", 0.4, 0.1), LayerEntry("b", "", reason="<few>")), 3
    )
    graph = fxprune.analyze(Net(), X)
    texts = Checked(report_html(graph, fxprune.plan(graph, 0.5), done)).texts
    at = texts.index("a.weight", texts.index("What compensation brought"))
    assert texts[at + 1 : at + 4] == ["least squares", "0.4", "0.1"]
    assert "<few>" in texts
    assert any("by 0.5 of their variance as narrowed, by 0.25 afterwards" in text for text in texts)


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    argv = ["prune", "torchvision:mnasnet0_5", "--dry-run", "--quiet", "--report", str(path)]
    assert main(argv) == 0
    Checked(path.read_text())
