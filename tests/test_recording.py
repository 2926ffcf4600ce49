"""A second run of a model is held against the first trace: the same calls, or else a trace of its own."""

import pytest
import torch
from torch import nn

import fxprune
from fxprune.capture import shape_tracer, symbolic
from fxprune.errors import PinnedError

X = (torch.randn(2, 5, 8),)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(1, 5, 16))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if x.shape[-1] != 8:  # control flow on a shape: the second rung
            raise ValueError("of another width")
        return self.second(self.middle(self.first(x)))


class SameInBoth(Base):
    def middle(self, x):
        number = 2.0
        if self.training:
            number = 2.0
        return nn.functional.relu(x * number)


class OtherNumber(Base):
    def middle(self, x):
        return nn.functional.dropout(x, 0.5 if self.training else 0.0)


class Longer(Base):
    def middle(self, x):
        return x if x.shape[1] < 6 else x.relu()


class NumberOfSize(Base):
    def middle(self, x):
        return x * list(range(20))[x.shape[1]]


class ConstantOfSize(Base):
    def middle(self, x):
        length = 5 if x.shape[1] < 6 else 6
        return x + torch.tensor([float(length)])


class InPlaceIfLonger(Base):
    def middle(self, x):
        y = x
        if x.shape[1] > 5:
            y += 1
        else:
            y = y + 1
        return x + y


class OnlyShorter(Base):
    def middle(self, x):
        return x + self.table


class AsksIfLonger(Base):
    def middle(self, x):
        if x.shape[1] > 5 and self.training:
            return x.relu()
        return x


class Counts(Base):
    def middle(self, x):
        x = x + self.calls
        self.calls = self.calls + 1
        return x


@pytest.mark.parametrize(
    ("kind", "traces", "again"),
    [
        (SameInBoth, 1, True),
        (OtherNumber, 2, True),
        (Longer, 1, False),
        (NumberOfSize, 1, False),
        (InPlaceIfLonger, 1, False),
        (OnlyShorter, 1, False),
        (AsksIfLonger, 1, False),
    ],
)
def test_a_second_run_makes_no_second_graph_where_it_makes_the_same_calls(kind, traces, again, monkeypatch):
    made = []
    traced = symbolic.Tracer._traced
    monkeypatch.setattr(symbolic.Tracer, "_traced", lambda self: made.append(self) or traced(self))
    program = shape_tracer.trace_with_shapes(kind().eval(), X, {})
    assert len(made) == traces
    code, metas = str(program.graph), [dict(node.meta) for node in program.graph.nodes]
    assert program.again((torch.randn(3, 9, 8),), {}) is again
    assert program.again(X, {})
    assert len(made) == traces
    assert str(program.graph) == code
    assert [dict(node.meta) for node in program.graph.nodes] == metas


def test_what_a_model_keeps_is_traced_anew():
    program = shape_tracer.trace_with_shapes(Counts().eval(), X, {})
    assert not program.again(X, {})  # reads of the buffer became copies


def test_what_differs_at_another_size_is_pinned_all_the_same():
    assert "length: any" in str(fxprune.analyze(SameInBoth().eval(), X).sizes)
    for kind in (Longer, ConstantOfSize, AsksIfLonger, NumberOfSize, OnlyShorter):
        model = kind().eval()
        graph = fxprune.analyze(model, X)
        shorter = kind in (Longer, ConstantOfSize, AsksIfLonger)  # there it is all the same
        assert f"length: {'up to' if shorter else 'pinned at'} 5" in str(graph.sizes), kind.__name__
        result = fxprune.prune(graph, ratio=0.0)
        if shorter:
            torch.testing.assert_close(result(X[0][:, :3]), model(X[0][:, :3]))
        with pytest.raises(PinnedError):
            result(torch.randn(2, 6, 8))


def test_the_graph_of_both_modes_is_that_of_the_mode_where_they_are_alike():
    for model in (SameInBoth().eval(), SameInBoth().train()):
        pruned = fxprune.prune(model, X, 0.5)
        for mode in (False, True):
            assert pruned.train(mode)(*X).shape == (2, 5, 3)
