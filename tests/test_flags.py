"""Code that asks whether it is compiled, exported or traced is captured as it runs without."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.external_utils import is_compiling as is_compiling_for_dynamo
from torch.compiler import is_compiling, is_exporting
from torch.fx._symbolic_trace import is_fx_symbolic_tracing, is_fx_tracing

import fxprune
from fxprune.capture import patches

ASK: dict[str, Callable[[], bool]] = {
    "torch.compiler.is_compiling": lambda: torch.compiler.is_compiling(),
    "torch.compiler.is_exporting": lambda: torch.compiler.is_exporting(),
    "torch.compiler.is_dynamo_compiling": lambda: torch.compiler.is_dynamo_compiling(),
    "torch._dynamo.is_compiling": lambda: torch._dynamo.is_compiling(),
    "torch.jit.is_tracing": lambda: torch.jit.is_tracing(),
    "is_compiling, imported before": is_compiling,
    "is_exporting, imported before": is_exporting,
    "Dynamo's is_compiling, imported before": is_compiling_for_dynamo,
    "is_fx_tracing": is_fx_tracing,
    "is_fx_symbolic_tracing": is_fx_symbolic_tracing,
    "one of the user's own": lambda: bool(torch.compiler.is_compiling() or torch.jit.is_tracing()),
}


class Net(nn.Module):
    def __init__(self, ask: Callable[[], bool], exported: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.ask, self.exported = ask, exported

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and not issubclass(x.__class__, Tensor):
            raise TypeError("no tensor")
        h = self.a(x)
        if not self.ask():
            h = h.relu()
        return self.b(h)


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("ask", ASK)
def test_the_graph_is_what_the_model_does(ask: str, exported: bool) -> None:
    model, x = Net(ASK[ask], exported).eval(), torch.randn(4, 8)
    graph = fxprune.analyze(model, x)
    assert graph.captured.rung == ("torch.export" if exported else "symbolic tracing")
    pruned = fxprune.prune(model, x, ratio=0.0)
    torch.testing.assert_close(pruned(x), model(x))
    assert not ASK[ask]()


def test_torch_itself_reads_the_truth() -> None:
    told = SimpleNamespace(user=set(), torch=set())  # as an object, which is not copied with the model
    code = "import torch\ntold.torch.add((torch.compiler.is_compiling(), torch.compiler.is_exporting()))"

    def look() -> None:
        told.user.add(is_compiling())
        exec(code, {"__name__": "torch.nn.functional", "told": told})

    def ask() -> bool:
        look()
        return True

    fxprune.analyze(Net(ask, exported=True).eval(), torch.randn(4, 8))
    assert told.user == {False}
    assert (True, True) in told.torch


def test_a_branch_that_only_exporting_avoids_is_noted() -> None:
    """What depends on values otherwise is captured as it is exported, and the report says so."""

    class Checked(Net):
        def forward(self, x: Tensor) -> Any:
            if not is_compiling() and bool((x.sum() > 1e6).item()):
                raise ValueError("too large")
            return super().forward(x)

    model, x = Checked(lambda: True, exported=True).eval(), torch.randn(4, 8)
    graph = fxprune.analyze(model, x)
    assert graph.captured.rung == "torch.export"
    assert any("is_compiling" in note for note in graph.captured.program.notes)
    torch.testing.assert_close(fxprune.prune(model, x, ratio=0.0)(x), model(x))


def test_flags_of_a_thread_that_compiles_itself_stay() -> None:
    """What held before the capture goes on holding: fxprune may be called while torch.compile runs."""
    answers: list[Any] = []

    def call() -> None:
        answers.append((is_compiling(), torch.compiler.is_exporting()))

    patches.within([patches.flags(False, set())], call)
    with torch._export.utils._compiling_state_context():
        patches.within([patches.flags(False, set())], call)
    assert answers == [(False, False), (True, True)]


def test_what_is_said_to_dynamo_of_tensors_hinders_no_tracing() -> None:
    class Marked(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 100:
                raise ValueError("too long")
            h = self.a(x)
            torch._dynamo.mark_static_address(h)
            torch._dynamo.mark_dynamic(h, 0)
            return self.b(h)

    model, x = Marked(lambda: False).eval(), torch.randn(4, 8)
    before = torch._dynamo.mark_static_address.__code__
    graph = fxprune.analyze(model, x)
    assert graph.captured.rung == "symbolic tracing with known shapes"
    assert torch._dynamo.mark_static_address.__code__ is before
    torch.testing.assert_close(fxprune.prune(graph, ratio=0.0)(x), model(x))
