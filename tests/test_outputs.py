"""Outputs that may become narrower, and those that hold zeros: ``free_outputs``, ``fill_outputs``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from oracle import check, same_structure
from torch import Tensor, nn

import fxprune
from fxprune.cli import main
from fxprune.errors import RewriteError, SelectionError
from fxprune.nn import Fill
from fxprune.trees import flatten


@dataclass
class Outputs:
    """What transformers return: the first field is the result."""

    logits: Tensor
    hidden: Tensor


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


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
        if self.form == "class":
            return Outputs(logits, hidden)
        if self.form == "named tuple":
            return Named(logits, hidden)
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


WHOLE = ["stem.weight", "mix.weight", "head.weight"]


def removed_columns(pruned: nn.Module) -> list[int]:
    (units,) = pruned.meta["fxprune"].removed.values()
    return list(units)


@pytest.mark.parametrize(
    ("form", "fill"),
    [
        ("class", "auto"),
        ("named tuple", "auto"),
        ("dict", "hidden"),
        ("tuple", "1"),
        ("tree", "encoder"),
        ("tree", ("encoder.states.*", "encoder.hid*")),
    ],
)
def test_a_filled_output_holds_zeros_where_channels_went(form: str, fill: Any) -> None:
    """As that of the masked original, which the oracle compares it with."""
    model, x = encoder(form)
    check(model, x, frozen={"stem.weight[0]": "output of the model"}, shrinks=False, fill_outputs=())
    plan, pruned = check(model, x, narrows=WHOLE, exact=True, fill_outputs=fill)
    assert plan.fill_outputs
    assert len(plan.notes) == 1
    assert f"hold zeros in place of what is removed: {', '.join(plan.fill_outputs)};" in plan.notes[0]
    gone = removed_columns(pruned)
    assert len(gone) == 8
    for before, after in zip(flatten(model(x))[0], flatten(pruned(x))[0], strict=True):
        assert before.shape == after.shape
        if after.shape[1] == 16:
            assert not after[:, gone].any()
            assert after.any(dim=0).sum() == 8
        else:
            assert after.all()


@pytest.mark.parametrize("form", ["dict", "tuple", "tree"])
def test_nobody_guesses_which_of_a_dict_or_tuple_is_the_result(form: str) -> None:
    model, x = encoder(form)
    assert fxprune.plan(model, x).fill_outputs == ()


class Towers(nn.Module):
    """Two stacks of layers, of which one may be read by the other; the first output is the result."""

    def __init__(self, returns: Callable[[Tensor, Tensor], Any], reads: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))
        self.b = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))
        self.c, self.d, self.e = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.returns, self.reads = returns, reads

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        a, b = a + self.c(a), b + self.d(b)
        return self.returns(a + self.e(b) if self.reads else a, nn.functional.dropout(b, 0.1, False))


@pytest.mark.parametrize(
    ("returns", "reads", "filled"),
    [
        (Outputs, True, ("hidden",)),
        (Outputs, False, ()),  # the end of the second tower is a result, too
        (lambda a, b: Outputs(b, a), True, ()),
        (lambda a, b: Outputs(b.mean(), b), True, ()),  # the first is a loss
        (lambda a, b: Outputs(a.mean(), Named(a, b)), True, ()),
        (lambda a, b: Outputs(a, Named(b, b.shape[0])), True, ("hidden.logits",)),
    ],
)
def test_what_the_network_goes_on_with_is_filled_beside_the_result(
    returns: Callable[[Tensor, Tensor], Any], reads: bool, filled: tuple[str, ...]
) -> None:
    model, x = Towers(returns, reads).eval(), torch.rand(3, 6)
    narrows = ["a.0.weight", "b.0.weight", *(["b.2.weight", "d.weight", "e.weight"] if filled else [])]
    plan, _ = check(model, x, narrows=narrows)
    assert plan.fill_outputs == filled


def test_outputs_that_would_not_be_zero_are_not_filled() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 16)
            self.c = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Outputs:
            gate = self.b(self.a(x)).sigmoid()
            return Outputs(self.c(gate), gate)

    frozen = {"b.weight[0]": "output of the model whose removed entries would not be zero"}
    check(Gate(), torch.rand(3, 6), narrows=["a.weight"], frozen=frozen, fill_outputs="hidden")


class Maps(nn.Module):
    """Feature maps, behind control flow that only torch.export follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Outputs:
        if not issubclass(x.__class__, Tensor):
            raise TypeError("not a tensor")
        maps = self.a(x)
        maps = maps + self.b(maps.relu())
        maps = maps + self.c(maps.relu())
        return Outputs(self.d(maps.mean((2, 3))), maps)


def test_filled_outputs_of_a_network_captured_by_export() -> None:
    model, x = Maps(), torch.rand(2, 3, 6, 6)
    assert fxprune.analyze(model, x).captured.rung == "torch.export"
    _, pruned = check(model, x, narrows=["a.weight", "c.weight", "d.weight"])
    assert pruned(x).hidden.shape == (2, 8, 6, 6)


def test_a_network_with_filled_outputs_is_like_any_other() -> None:
    model, x = encoder("named tuple")
    pruned = fxprune.prune(model, x)
    wanted = pruned(x)
    for twin in (pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned)):
        torch.testing.assert_close(tuple(twin(x)), tuple(wanted))
    torch.testing.assert_close(tuple(torch.export.export(pruned, (x,)).module()(x)), tuple(wanted))
    torch.testing.assert_close(tuple(torch.compile(pruned, backend="aot_eager")(x)), tuple(wanted))
    assert pruned.to(torch.bfloat16)(x.bfloat16()).hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["class", "named tuple"])
def test_networks_with_filled_outputs_are_pruned_again(form: str) -> None:
    model, x = encoder(form)
    first = fxprune.plan(model, x, 0.25)
    pruned = first.apply(model)
    assert fxprune.PruningPlan.from_json(first.to_json()) == first
    second = fxprune.plan(pruned, x, 0.5)
    again = second.apply(pruned)
    assert again.get_parameter("mix.weight").shape == (6, 6)
    assert sum(isinstance(module, Fill) for module in again.modules()) == 1
    assert fxprune.verify(pruned, again, second, x).exact
    both = first.then(second, model).apply(model)
    assert same_structure(both(x), again(x))
    torch.testing.assert_close(both(x).hidden, again(x).hidden)
    assert both(x).hidden.any(dim=0).sum() == 6
    *_, last = fxprune.schedule(model, x, 0.5, steps=2)
    torch.testing.assert_close(last.model(x).hidden, last.total.apply(model)(x).hidden)
    assert last.model(x).hidden.any(dim=0).sum() == 8


def test_places_that_are_not_known_are_not_guessed() -> None:
    """On the meta device their numbers are gone, and any others would have the same shape."""
    model, x = encoder("class")
    pruned = fxprune.prune(model, x, 0.25).to("meta")
    with pytest.raises(RewriteError, match="_fill_hidden fills an output by numbers that went"):
        fxprune.prune(pruned, x.to("meta"), importance="random")
    assert not fxprune.plan(pruned, x.to("meta"), ratio=0.0, importance="random").removed


def test_zeros_in_several_dimensions() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.columns = nn.Linear(6, 8), nn.Linear(6, 12)
            self.a, self.b = nn.Linear(8, 3), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Any:
            table = self.rows(x)[:, :, None] * self.columns(x)[:, None, :]
            return self.a(table.mean(2)), self.b(table.mean(1)), table

    narrows, x = ["rows.weight", "columns.weight"], torch.rand(2, 6)
    plan, pruned = check(Table(), x, narrows=narrows, fill_outputs="2")
    assert plan.fill_outputs == ("2",)
    assert pruned(x)[2].shape == (2, 8, 12)


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
        if not issubclass(x.__class__, Tensor):
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
    assert not plan.held
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
        ("hiden", "names 'hiden', and there is no such output; the nearest are 'hidden'"),
        ("output", "no such output"),
        (3, "takes names of outputs.*got 3"),
        ([nn.Linear], "takes names of outputs"),
    ],
)
@pytest.mark.parametrize("option", ["free_outputs", "fill_outputs"])
def test_bad_names(option: str, free: Any, message: str) -> None:
    model, x = encoder()
    with pytest.raises(SelectionError, match=rf"(?s)(?=.*{option}).*{message}"):
        fxprune.analyze(model, x, **{option: free})


def test_a_model_captured_in_parts_has_no_outputs_to_name() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y * 2 if float(y.sum()) > 0 else y

    model, x = Branching(), torch.rand(2, 4)
    for option in ("free_outputs", "fill_outputs"):
        with pytest.raises(SelectionError, match=f"{option}.*captured in parts only"):
            fxprune.plan(model, x, **{option: "output"})
    assert fxprune.plan(model, x).removed


def test_the_command_line_takes_names_of_outputs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made.py").write_text(
        "import torch\ndef net():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Linear(16, 12))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for option in ("--free-output", "--fill-output"):
        arguments = ["made:net", "--input-shape", "2,6", option, "output"]
        assert main(["prune", *arguments, "--no-latency"]) == 0
        assert "exact" in capsys.readouterr().out
        assert main(["inspect", *arguments]) == 0
        said = capsys.readouterr().out
        assert "output of the model" not in said
        assert ("hold zeros" in said) == (option == "--fill-output")
    assert main(["inspect", "made:net", "--input-shape", "2,6", "--fill-output", "none"]) == 0
    assert "output of the model" in capsys.readouterr().out
