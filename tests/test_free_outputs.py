"""Outputs that may become narrower: ``free_outputs``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import check
from torch import Tensor, nn

import fxprune
from fxprune.cli import main
from fxprune.errors import SelectionError


class Encoder(nn.Module):
    """A hidden state that goes on to a head and is an output itself."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem, self.mix, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        first = self.stem(x)
        hidden = first + self.mix(first.relu())
        logits = self.head(hidden.relu())
        if self.form == "tuple":
            return logits, hidden
        if self.form == "tree":
            return {"logits": logits, "encoder": {"hidden": hidden, "states": [first, hidden]}}
        return {"logits": logits, "hidden": hidden}


def encoder(form: str = "dict") -> tuple[nn.Module, Tensor]:
    return Encoder(form), torch.rand(3, 6)


@pytest.mark.parametrize(
    ("form", "free"),
    [
        ("dict", "hidden"),
        ("dict", "hid*"),
        ("tuple", "1"),
        ("tree", "encoder"),
        ("tree", ("encoder.hidden", "encoder.states.*")),
    ],
)
def test_a_named_output_becomes_narrower(form: str, free: Any) -> None:
    model, x = encoder(form)
    kept_wide = {"stem.weight[0]": 'output of the model.*free_outputs="(encoder.)?(hidden|1)'}
    check(model, x, frozen=kept_wide, shrinks=False)
    _, pruned = check(model, x, narrows=["stem.weight", "mix.weight", "head.weight"], free_outputs=free)
    sizes = sorted(t.shape[1] for t in torch.utils._pytree.tree_leaves(pruned(x)))
    assert sizes == [5, *[8] * (len(sizes) - 1)], "the others keep their widths"


def test_a_lone_output_is_called_output() -> None:
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12)), torch.rand(3, 6)
    _, pruned = check(model, x, free_outputs="output")
    assert pruned(x).shape == (3, 6)


def test_one_of_two_outputs_that_hold_the_same_is_not_enough() -> None:
    model, x = encoder("tree")
    check(model, x, frozen={"mix.weight[0]": "encoder.states"}, shrinks=False, free_outputs="encoder.hidden")


@pytest.mark.parametrize(("form", "named"), [("dict", '"hidden"'), ("tuple", '"1"'), ("tree", '"encoder"')])
def test_plan_and_report_name_outputs_that_hold_much(form: str, named: str) -> None:
    """Not the logits, in front of which there is one layer; and nothing once the outputs are freed."""
    model, x = encoder(form)
    graph = fxprune.analyze(model, x)
    assert graph.advice.startswith("99% of the parameters are in layers that stay as wide as what the model")
    assert f"free_outputs={named} (--free-output, or auto)" in graph.advice
    assert graph.report().advice == graph.advice
    assert graph.advice in " ".join(str(graph.report()).split())
    assert fxprune.plan(model, x).notes == (graph.advice,)
    plan = fxprune.plan(model, x, free_outputs=named.strip('"'))
    assert plan.removed
    assert plan.notes == ()


@pytest.mark.parametrize("form", ["dict", "tuple", "tree"])
def test_auto_frees_what_keeps_several_layers_wide(form: str) -> None:
    model, x = encoder(form)
    _, pruned = check(model, x, narrows=["stem.weight", "mix.weight", "head.weight"], free_outputs="auto")
    sizes = sorted(t.shape[1] for t in torch.utils._pytree.tree_leaves(pruned(x)))
    assert sizes == [5, *[8] * (len(sizes) - 1)], "the logits keep their width"
    assert not pruned.meta["fxprune"].notes
    wide = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12))
    assert fxprune.prune(wide, x, free_outputs=["auto"])(x).shape == (3, 12)


def test_no_advice_where_outputs_hold_one_layer_or_little() -> None:
    model, x = encoder("dict")
    model.large = nn.Linear(6, 2000)
    assert fxprune.analyze(model, x).advice == ""
    heads = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12))
    assert fxprune.analyze(heads, x).advice == ""


class State:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Packed(nn.Module):
    """Control flow that only torch.export follows, heads, and an output with an object in it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 16), nn.Linear(8, 16)
        self.o, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        if not issubclass(type(x), Tensor):
            raise TypeError("not a tensor")
        q, k = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k))
        mixed = ((q @ k.mT).sigmoid() @ k).transpose(1, 2).flatten(2)
        return {"logits": self.head(self.o(mixed)), "state": State(k)}


class Stateful(Packed):
    """The same, with the object as an input, too: it is state, which need not be named."""

    def forward(self, x: Tensor, state: State | None = None) -> dict[str, Any]:
        return super().forward(x)


@pytest.mark.parametrize(("kind", "free"), [(Packed, "state.hidden"), (Stateful, ())])
def test_outputs_inside_of_objects_and_over_heads(kind: type[Packed], free: Any) -> None:
    """Each head keeps its own columns: the check of the rewritten graph must leave them so."""
    torch.manual_seed(0)
    model, x = kind(), torch.rand(2, 5, 8)
    frozen = next((str(f) for f in fxprune.analyze(model, x).frozen if f.axis.name == "k.weight"), "")
    assert ('free_outputs="state.hidden"' in frozen) == bool(free)
    plan = fxprune.plan(model, x, free_outputs=free)
    pruned = plan.apply(model)
    out = pruned(x)
    assert out["state"].hidden.shape == (2, 4, 5, 2)
    assert out["logits"].shape == (2, 5, 3)
    assert not plan.notes
    assert fxprune.verify(model, pruned, plan, x).exact
    changed = plan.apply(model)
    with torch.no_grad():
        changed.k.bias[0] += 0.1
    with pytest.raises(fxprune.VerificationError):
        fxprune.verify(model, changed, plan, x)


def test_a_result_inside_of_another_model() -> None:
    """What a captured output holds goes on through the graph around it."""
    model, x = Packed(), torch.rand(2, 5, 8)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fxprune.prune(model, x, ratio=0.0)
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x)["logits"])

    check(Around(), x, narrows=["inner.q.weight", "inner.k.weight", "inner.head.weight", "last.weight"])


def test_a_plan_remembers_its_free_outputs() -> None:
    model, x = encoder()
    plan = fxprune.plan(model, x, 0.25, free_outputs=["hidden"])
    assert plan.free_outputs == ("hidden",)
    assert fxprune.PruningPlan.from_json(plan.to_json()) == plan
    pruned = plan.apply(model)
    assert pruned(x)["hidden"].shape == (3, 12)
    second = fxprune.plan(pruned, x, 0.5, free_outputs="hidden")
    both = plan.then(second, model)
    assert torch.equal(both.apply(model)(x)["hidden"], second.apply(pruned)(x)["hidden"])
    *_, last = fxprune.schedule(model, x, 0.5, steps=2, free_outputs="hidden")
    assert last.model(x)["hidden"].shape == (3, 8)
    assert last.total.apply(model)(x)["hidden"].shape == (3, 8)


def test_plans_without_the_field_are_read() -> None:
    model, x = encoder()
    text = fxprune.plan(model, x).to_json().replace('"free_outputs": []', '"unused": 0')
    assert '"free_outputs"' not in text
    assert fxprune.PruningPlan.from_json(text.replace(',\n "unused": 0', "")).free_outputs == ()


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ("hiden", "free_outputs names 'hiden', and there is no such output; the nearest are 'hidden'"),
        ("output", "no such output"),
        (3, "takes names of outputs.*got 3"),
        ([nn.Linear], "takes names of outputs"),
    ],
)
def test_bad_names(free: Any, message: str) -> None:
    model, x = encoder()
    with pytest.raises(SelectionError, match=message):
        fxprune.analyze(model, x, free_outputs=free)


def test_a_model_captured_in_parts_has_no_free_outputs() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y * 2 if float(y.sum()) > 0 else y

    with pytest.raises(SelectionError, match="captured in parts only"):
        fxprune.plan(Branching(), torch.rand(2, 4), free_outputs="output")


def test_the_command_line_takes_free_outputs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made.py").write_text(
        "import torch\ndef net():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Linear(16, 12))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["made:net", "--input-shape", "2,6", "--free-output", "output"]
    assert main(["prune", *arguments, "--no-latency"]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["inspect", *arguments]) == 0
    assert "output of the model" not in capsys.readouterr().out
