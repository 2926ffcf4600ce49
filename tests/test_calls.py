"""Several calls of one model are looked at together: what is removed fits all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import stir
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import ExampleInputsError, SelectionError, VerificationError

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))


class Towers(nn.Module):
    """Two towers that meet in a layer; ``forward`` runs one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.image = nn.Conv2d(3, 16, 3), nn.Linear(16, 32)
        self.embedding, self.text = nn.Embedding(50, 24), nn.Linear(24, 32)
        self.shared, self.drop, self.out = nn.Linear(32, 40), nn.Dropout(0.5), nn.Linear(40, 8)
        stir(self)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.both(self.image(F.relu(self.conv(x)).mean((2, 3))))

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.both(self.text(self.embedding(ids).mean(1)))

    def both(self, x: Tensor) -> Tensor:
        return self.out(self.drop(F.relu(self.shared(x))))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.encode_image(x)
        return out if labels is None else (F.cross_entropy(out, labels), out)


class Louder(Towers):
    """Its text is another."""

    def encode_text(self, ids: Tensor) -> Tensor:
        return super().encode_text(ids) * 1.01


class State:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Decoder(nn.Module):
    """Reads what it has read before out of a state; the code that does says how wide that is."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.key, self.out = nn.Linear(6, 12), nn.Linear(12, width), nn.Linear(width, 4)
        self.width = width
        stir(self)

    def forward(self, x: Tensor, state: State | None = None) -> dict[str, Any]:
        keys = self.key(F.relu(self.inp(x)))
        if state is not None:
            keys = torch.cat([state.keys.reshape(-1, 3, 16), keys], 1)
        return {"y": self.out(keys.mean(1)), "state": State(keys)}


def several() -> tuple[Towers, fxprune.Calls]:
    model = Towers().eval()
    labels = torch.tensor([1, 2])
    return model, fxprune.Calls(
        model, [("encode_image", IMAGE), ("encode_text", (TEXT,)), {"x": IMAGE, "labels": labels}]
    )


def test_couplings_are_those_of_all_calls() -> None:
    model, calls = several()
    plan = fxprune.plan(model, calls, 0.5, into="module")
    narrow: Any = plan.apply(model)
    assert type(narrow) is Towers
    assert narrow.text.weight.shape == (16, 12)
    assert fxprune.verify(model, narrow, plan, calls).exact
    masked = plan.mask(model)
    with torch.no_grad():
        for method, given in (("encode_image", IMAGE), ("encode_text", TEXT)):
            torch.testing.assert_close(getattr(narrow, method)(given), getattr(masked, method)(given))
    narrow.train()(IMAGE, torch.tensor([1, 2]))[0].backward()


def test_one_call_alone_would_break_the_other() -> None:
    model, _ = several()
    narrow: Any = fxprune.prune(model, IMAGE, 0.5, into="module")
    with pytest.raises(RuntimeError, match="shapes"):
        narrow.encode_text(TEXT)


def test_a_plan_of_several_calls_goes_through_a_file() -> None:
    model, calls = several()
    plan = fxprune.plan(model, calls, 0.5, into="module")
    again = fxprune.PruningPlan.from_json(plan.to_json())
    narrow = again.apply(model)
    assert fxprune.verify(model, narrow, again, calls).exact
    other: Any = fxprune.prune(fxprune.analyze(model, calls), 0.5, into="module")
    assert other.out.weight.shape == (8, 20)


def test_verify_sees_each_call() -> None:
    model, calls = several()
    plan = fxprune.plan(model, calls, 0.5, into="module")
    narrow: Any = plan.apply(model)
    narrow.__class__ = Louder
    with pytest.raises(VerificationError, match="differs"):
        fxprune.verify(model, narrow, plan, calls)


def test_what_a_call_returns_is_handed_on() -> None:
    """The line that reads the state says 16, so that the keys stay as wide as they are."""
    model, x = Decoder().eval(), torch.randn(2, 3, 6)
    calls = fxprune.Calls(model, [x, {"x": x, "state": fxprune.Returned("state")}])
    plan = fxprune.plan(model, calls, 0.5, into="module")
    narrow: Any = plan.apply(model)
    assert narrow.key.weight.shape == (16, 6)
    assert "self.width" in str(plan.notes) or "16" in str(plan.notes)
    assert fxprune.verify(model, narrow, plan, calls).exact
    alone: Any = fxprune.prune(model, x, 0.5, into="module")
    assert alone.key.weight.shape == (8, 6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: fxprune.Calls(model, []), "a list of calls"),
        (
            lambda model: fxprune.Calls(model, IMAGE),  # type: ignore[arg-type]
            "a list of calls",
        ),
        (lambda model: fxprune.Calls(model, [("encode_imag", IMAGE)]), "call 0: Towers has no method"),
        (lambda model: fxprune.Calls(model, [IMAGE, (IMAGE, 1, 2)]), "call 1, of Towers.forward"),
        (lambda model: fxprune.Calls(model, [fxprune.Returned(call=0)]), "not an earlier one"),
        (lambda model: fxprune.count(model, fxprune.Calls(model, [IMAGE])), "one call is needed"),
    ],
)
def test_what_is_no_call_is_named(make: Callable[[nn.Module], Any], says: str) -> None:
    with pytest.raises(ExampleInputsError, match=says):
        make(Towers())


def test_several_calls_need_the_own_class() -> None:
    model, calls = several()
    with pytest.raises(SelectionError, match='into="module"'):
        fxprune.plan(model, calls, 0.5)


def test_calibration_data_are_several_calls_too() -> None:
    """Units are chosen by them; a layer that several calls use keeps its weights, and the report says so."""
    model = Towers().eval()
    calls = fxprune.Calls(model, [("encode_image", IMAGE), ("encode_text", TEXT)])
    small: Any = fxprune.prune(model, calls, 0.5, into="module", calibrate=[calls, calls])
    assert small.shared.weight.shape[0] < 40
    assert "used at several places" in str(small.meta["compensation"])
    with pytest.raises(fxprune.errors.CalibrationError, match=r"each batch is one, too"):
        fxprune.prune(model, calls, 0.5, into="module", calibrate=[IMAGE, IMAGE])
