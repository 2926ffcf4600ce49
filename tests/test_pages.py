"""Reports and drawings: well formed, in one piece, with the plan's figures, and small for large networks."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_files import Net

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
    at = texts.index("blocks.1")
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
    with pytest.raises(OutputError, match=r"a drawing is a \.svg file"):
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
