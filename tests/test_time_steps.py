"""Recurrent layers: a few time steps tell what all of them do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import check
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import fxprune
from fxprune import known_shapes, time_steps
from fxprune.coupling import interpreter
from fxprune.planning.cost_model import CostModel

LONG, CHANNELS, HIDDEN = 9, 4, 6
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"kind": nn.LSTM},
    "gru": {"kind": nn.GRU, "batch_first": True},
    "rnn": {"kind": nn.RNN, "nonlinearity": "relu"},
    "both directions": {"kind": nn.LSTM, "bidirectional": True, "num_layers": 2, "batch_first": True},
    "projection": {"kind": nn.LSTM, "proj_size": 3, "num_layers": 2},
    "dropout": {"kind": nn.GRU, "num_layers": 2, "dropout": 0.5},
}


class Sequence(nn.Module):
    """Layers around a recurrent one, and places of its time steps; a given state comes from a layer, too."""

    def __init__(self, kind: type[nn.RNNBase], state: bool = False, packed: bool = False, **how: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, CHANNELS)
        self.inner = kind(CHANNELS, HIDDEN, **how)
        width = self.inner.proj_size or HIDDEN
        self.start = nn.Linear(3, width) if state else None
        self.last = nn.Linear(width * (2 if self.inner.bidirectional else 1), 2)
        self.after = nn.Linear(width, 2)
        steps = (1, 5) if self.inner.batch_first else (LONG, 1)
        self.places = nn.Parameter(torch.randn(*steps, self.last.in_features))
        self.packed = packed

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y: Any = self.first(x)
        given = () if self.start is None else (torch.tanh(self.start(x[0])).unsqueeze(0),)
        if self.packed:
            y = pack_padded_sequence(y, lengths, batch_first=self.inner.batch_first, enforce_sorted=False)
        y, state = self.inner(y, *given)
        if self.packed:
            y, _ = pad_packed_sequence(y, batch_first=self.inner.batch_first)
        else:
            y = y + self.places
        state = state[0] if isinstance(state, tuple) else state
        return self.last(y), self.after(state[-1])


def analysis(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Everything that is found out, as text."""
    graph = fxprune.analyze(model, inputs)
    members = [f"{g.name} {m.axis} {m.units} {sorted(map(str, m.uses))}" for g in graph for m in g.members]
    exact = [f"{group.name} {group.exact} {group.inexact_because}" for group in graph]
    return sorted(members) + exact + sorted(map(str, graph.frozen)) + [str(graph.sizes)]


def forget() -> None:
    known_shapes._found.clear()


@pytest.mark.parametrize("name", [*KINDS, "state", "packed"])
def test_the_same_is_found_as_by_all_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = KINDS.get(name) or {"kind": nn.GRU, name: True}
    model = Sequence(**how).eval()
    inputs = (torch.randn(LONG, 5, 3), *([torch.tensor([9, 7, 7, 4, 2])] if name == "packed" else []))
    if name == "packed":
        inputs = (inputs[0].transpose(0, 1), inputs[1])
        model.inner.batch_first = True
    few = analysis(model, *inputs)
    monkeypatch.setattr(time_steps, "STEPS", LONG + 1)
    forget()
    every = analysis(model, *inputs)
    assert few == every
    assert any("inner.weight_hh" in line for line in few)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_and_strides_are_those_of_all_steps(name: str) -> None:
    how = dict(KINDS[name])
    layer = how.pop("kind")(CHANNELS, HIDDEN, **how).to("meta").eval()
    x = torch.empty(LONG, LONG, CHANNELS, device="meta")
    forget()
    with torch.no_grad(), known_shapes.Remembered(), time_steps.as_called(layer):
        few = layer(x)
    with torch.no_grad():
        every = layer(x)
    pairs = list(zip(pytree.tree_leaves(few), pytree.tree_leaves(every), strict=True))
    assert [(a.shape, a.stride()) for a, _ in pairs] == [(b.shape, b.stride()) for _, b in pairs]


class Channels(nn.Module):
    """The channels of an image are its time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.inner = nn.GRU(16, HIDDEN, batch_first=True)
        self.last = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(torch.relu(self.conv(x)).flatten(2))[0]
        return self.last(y)


def test_what_may_go_of_the_steps_is_seen_at_each_of_them() -> None:
    check(Channels().eval(), torch.randn(2, 3, 4, 4), frozen={"conv.weight[0]": ""}, narrows=["last.weight"])


def test_a_longer_sequence_takes_no_more_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    apply = interpreter._Interpreter._aten
    monkeypatch.setattr(
        interpreter._Interpreter, "_aten", lambda *given: calls.append(given[1]) or apply(*given)
    )
    counts = []
    for steps in (5, 50):
        calls.clear()
        model = Sequence(nn.LSTM).eval()
        model.places = nn.Parameter(torch.randn(1, 1, HIDDEN))
        fxprune.analyze(model, torch.randn(steps, 2, 3))
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_the_work_of_all_steps_is_counted() -> None:
    model, x = Sequence(nn.LSTM).eval(), torch.randn(LONG, 2, 3)
    assert CostModel(fxprune.analyze(model, x))({}) == fxprune.count(model, x)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_the_same_cell_at_another_step_is_not_run_again(
    kind: type[nn.RNNCellBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = known_shapes._call
    monkeypatch.setattr(known_shapes, "_call", lambda *given: calls.append(given[0]) or run(*given))
    cell = kind(CHANNELS, HIDDEN).to("meta")
    x = torch.empty(LONG, 2, CHANNELS, device="meta")
    forget()
    with torch.no_grad(), known_shapes.Remembered(), time_steps.as_called(cell):
        state = cell(x[0])
        state = cell(x[1], state)
        before = [call for call in calls if "cell" in str(call)]
        cell(x[2], state)
    assert before
    assert [call for call in calls if "cell" in str(call)] == before
