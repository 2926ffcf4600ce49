"""The report: figures that add up, reasons that can be acted on, and brevity."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fxprune
from fxprune.cli import main


class Blocks(nn.Module):
    """Repeated blocks, and one operator that nobody knows."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(count)
        )
        self.odd = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.renorm(self.odd(x), 2, 0, 1.0))


@pytest.fixture(scope="module")
def graph() -> fxprune.CouplingGraph:
    return fxprune.analyze(Blocks(), torch.randn(2, 4))


def test_figures_add_up(graph: fxprune.CouplingGraph) -> None:
    """Totals are those of ``count``; what can be removed is what no frozen entry needs."""
    report = graph.report()
    cost = fxprune.count(Blocks(), torch.randn(2, 4))
    assert (report.params.total, report.macs.total) == (cost.params, cost.macs)
    # By hand: everything but the bias of `odd`, and all of `head`.
    assert report.params.frozen == 8 + 8 * 3 + 3
    assert report.params.prunable + report.params.frozen == cost.params
    assert report.macs.frozen == 2 * 8 * 3
    names = {group.name: group for group in report.groups}
    assert names.keys() == {group.name for group in graph.groups}
    hidden = names["blocks.0.0.weight[0]"]
    assert (hidden.units, hidden.params, hidden.macs) == (32, 32 * 16 + 32 + 16 * 32, 2 * 2 * 32 * 16)
    assert hidden.members == ("blocks.0.0.weight[0]", "blocks.0.0.bias[0]", "blocks.0.2.weight[1]")
    assert [g.params for g in report.groups] == sorted((g.params for g in report.groups), reverse=True)


def test_repeated_blocks_are_joined(graph: fxprune.CouplingGraph) -> None:
    """Five blocks make one line; its costs are those of all five going together."""
    report = graph.report()
    joined = {block.name: block for block in report.blocks}
    assert joined.keys() == {"blocks.*.0.weight[0] (x5)", "embed.weight[0]"}
    assert joined["blocks.*.0.weight[0] (x5)"].params == 5 * (32 * 16 + 32 + 16 * 32)


def test_frozen_axes_say_what_to_do(graph: fxprune.CouplingGraph) -> None:
    """Node, source line, reason and remedy of an axis at an unknown operator."""
    entry = next(f for f in graph.report().frozen if f.axis == "odd.weight[0]")
    assert (entry.size, entry.node) == (8, "renorm")
    assert "aten.renorm.default, an operator without a rule" in entry.reason
    assert "test_report.py" in entry.source
    assert entry.source.endswith("in forward")
    assert "fxprune.register_rule(aten.renorm.default" in entry.remedy


def test_text_is_short_unless_asked(graph: fxprune.CouplingGraph) -> None:
    """The short form has a line for the groups of the five blocks and one for their branches, the long one
    five each; rich prints the short one.
    """
    report = graph.report()
    short, long = str(report), report.text(all=True)
    assert short.count("blocks.") == 2
    assert long.count("blocks.") == 10
    assert short.startswith("captured Blocks by symbolic tracing")
    assert "what to do: fxprune.register_rule" in " ".join(short.split())
    console = Console(width=110, highlight=False)
    with console.capture() as capture:
        console.print(report)
    assert capture.get().rstrip() == short


def test_long_lists_are_cut() -> None:
    """What is alike in nothing fills a dozen lines, and the rest is counted."""
    sizes = range(20, 40)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    text = str(fxprune.analyze(model, torch.randn(1, 20)).report())
    assert "... and 6 more groups" in text


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """``fxprune inspect`` prints the text, or all of the data as JSON."""
    assert main(["inspect", "torchvision:squeezenet1_1", "--input-shape", "1,3,64,64"]) == 0
    assert "frozen axes" in capsys.readouterr().out
    assert main(["inspect", "torchvision:squeezenet1_1", "--input-shape", "1,3,64,64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["rung"] == "symbolic tracing"
    assert {entry["axis"] for entry in data["frozen"]} >= {"classifier.1.weight[0]"}
    assert data["params"]["prunable"] < data["params"]["total"]
    assert main(["inspect", "torchvision:squeezenet9"]) == 2
    assert "did you mean" in capsys.readouterr().err
