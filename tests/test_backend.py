"""``torch.compile(model, backend="fxprune")``: the results, compiling again, and graph breaks."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dynamo import Attention, Residual
from torch import Tensor, nn

import fxprune
from fxprune.backend import backend, parameters, state_dict

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend=backend, dynamic=dynamic, options={"inner": "eager", **options})


@pytest.mark.parametrize(("make", "x"), [(Residual, IMAGE), (Attention, WORDS)])
def test_equal_to_the_pruned_module(make: type[nn.Module], x: Tensor) -> None:
    model = make().eval()
    with torch.no_grad():
        got, wanted = compiled(model, ratio=0.5)(x), fxprune.prune(model, x, 0.5)(x)
    torch.testing.assert_close(got, wanted)


def test_the_state_dict_has_all_names() -> None:
    model = Residual().eval()
    fast = compiled(model, ratio=0.5, importance="l1")
    fast(IMAGE)
    narrow, wanted = state_dict(fast), fxprune.prune(model, IMAGE, 0.5, "l1").state_dict()
    assert list(narrow) == list(model.state_dict())
    assert {name: t.shape for name, t in narrow.items()} == {name: t.shape for name, t in wanted.items()}
    assert all(torch.equal(narrow[name], wanted[name]) for name in wanted)


def test_another_batch_size_removes_the_same_channels() -> None:
    """The second graph is another one: with sizes that are free, and random scores that would differ."""
    model = Residual().eval()
    fast = compiled(model, ratio=0.5, importance="random", seed=3)
    first = fast(IMAGE)["logits"]
    narrow = list(parameters(fast))
    other = fast(torch.cat([IMAGE, IMAGE, IMAGE]))["logits"]
    torch.testing.assert_close(other, torch.cat([first, first, first]))
    assert all(a is b for a, b in zip(narrow, parameters(fast), strict=True))


def test_other_lengths_share_a_compilation() -> None:
    """Heads that keep other columns each pick them from tables of positions."""
    from test_rotary import Net as Rotary

    model = Rotary().eval()
    lengths = (8, 12, 16, 20)
    given = [torch.randn(1, length, 6) for length in lengths]
    pruned = fxprune.prune(model, given[0], 0.5)
    assert [*pruned.graph.find_nodes(op="call_function", target=torch.take_along_dim)]
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    fast = compiled(model, ratio=0.5, inner="aot_eager")
    with torch.no_grad():
        for x in given:
            torch.testing.assert_close(fast(x), pruned(x))
    assert graphs["unique_graphs"] == 2  # one for the first length, one for all others


class Picks(nn.Module):
    """Entries of a layer's output, by keyword and of all dimensions at once."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.out(self.into(x).relu())
        first = torch.take_along_dim(out, indices=out.argsort(1), dim=1)
        return first + torch.take_along_dim(out, out.flatten().argsort())[:4]


def test_entries_are_picked_however_it_is_written() -> None:
    model, x = Picks().eval(), torch.randn(5, 6)
    with torch.no_grad():
        got = compiled(model, ratio=0.5)(x)
    torch.testing.assert_close(got, fxprune.prune(model, x, 0.5)(x))


def test_bert() -> None:
    """Inputs by name, outputs in a class of the library; another batch has the same channels."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7)}
    inputs["attention_mask"][1, 5:] = 0
    pruned = fxprune.prune(model, inputs, 0.5)
    assert sum(p.numel() for p in pruned.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    fast = compiled(model, ratio=0.5)
    with torch.no_grad():
        for given in (inputs, {name: torch.cat([t, t]) for name, t in inputs.items()}):
            got, wanted = fast(**given), pruned(**given)
            torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.pooler_output, wanted.pooler_output, rtol=1e-4, atol=1e-4)
    narrow, wanted = state_dict(fast), pruned.state_dict()
    assert {name: t.shape for name, t in narrow.items()} == {
        name: wanted.get(name, t).shape for name, t in model.state_dict().items()
    }


def test_training_and_evaluation_share_the_narrow_parameters() -> None:
    model = Residual().train()
    fast = compiled(model, ratio=0.5)
    fast(IMAGE)
    optimizer = torch.optim.SGD(parameters(fast), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        fast(IMAGE)["logits"].square().sum().backward()
        optimizer.step()
    trained = [p.detach().clone() for p in parameters(fast)]
    model.eval()
    with torch.no_grad():
        got = fast(IMAGE)["logits"]
    assert all(torch.equal(a, b) for a, b in zip(trained, parameters(fast), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    reference = fxprune.prune(model, IMAGE, 0.5).eval()
    reference.load_state_dict(state_dict(fast))
    with torch.no_grad():
        torch.testing.assert_close(got, reference(IMAGE)["logits"])


@pytest.mark.parametrize("kind", ["object", "file"])
@pytest.mark.parametrize(("make", "x"), [(Residual, IMAGE), (Attention, WORDS)])
def test_plans_of_the_model(make: type[nn.Module], x: Tensor, kind: str, tmp_path: Path) -> None:
    """A group may begin at another tensor in Dynamo's graph than in the state dict."""
    model = make().eval()
    plan: Any = fxprune.plan(model, x, 0.5, "random", seed=5)
    wanted = plan.apply(model)
    if kind == "file":
        plan.save(tmp_path / "plan.json")
        plan = str(tmp_path / "plan.json")
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, plan=plan)(x), wanted(x))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(6, 8)
        self.c = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.c(self.b(x).relu())


def test_graph_breaks_keep_their_boundary_and_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Broken().eval(), torch.randn(2, 4)
    fast = compiled(model, ratio=0.5)
    with caplog.at_level(logging.WARNING, "fxprune"):
        fast(x)
    assert [p.shape for p in parameters(fast)] == [(4, 4), (4,), (6, 4), (6,), (4, 6), (4,), (2, 4), (2,)]
    assert "graph 1 ends at a graph break" in caplog.text
    assert "graph 2" not in caplog.text


def test_parts_that_share_a_tensor_narrow_it_alike_or_not_at_all() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(self.up(x).relu())
            torch._dynamo.graph_break()
            return self.down(self.up(x).relu())

    model, x = Shared().eval(), torch.randn(2, 4)
    fast = compiled(model, ratio=0.5)
    with torch.no_grad():
        got = fast(x)
        once = fxprune.prune(nn.Sequential(model.up, nn.ReLU(), model.down), x, 0.5)
        torch.testing.assert_close(got, once(once(x)))


class Dead(nn.Module):
    """Half of the channels are made by zeros alone; some of them carry a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.a.weight[::2] = 0
            self.norm.bias.copy_(torch.tensor([1.0, -1.0]).repeat_interleave(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def test_lossless_removes_what_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = Dead().eval()
    fast = compiled(model, mode="lossless")
    with torch.no_grad():
        for x in (IMAGE, torch.cat([IMAGE, 4 * IMAGE]), torch.randn(5, 3, 9, 8)):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert {name: t.shape[0] for name, t in state_dict(fast).items() if name.startswith("a.")} == {
        "a.weight": 4,
        "a.bias": 4,
    }
    assert not torch.equal(state_dict(fast)["b.bias"], model.b.bias)  # it took something up
    with caplog.at_level(logging.WARNING, "fxprune"):
        torch.testing.assert_close(compiled(model.train(), mode="lossless")(IMAGE), model(IMAGE))
    assert "training mode" in caplog.text


def test_lossless_does_not_mix_up_graphs_that_share_layers() -> None:
    """What the first part puts into the bias of a shared layer is not there for the second."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.other, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            with torch.no_grad():
                self.up.weight[:4] = 0
                self.up.bias[:4] = 1

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(self.up(x).relu())
            torch._dynamo.graph_break()
            return self.down(self.other(x).relu())

    model, x = Shared().eval(), torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, mode="lossless")(x), model(x), rtol=1e-5, atol=1e-5)


def test_lossless_folds_nothing_where_sizes_are_dynamic() -> None:
    class Summed(Dead):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)).relu().sum((2, 3), keepdim=True).expand(-1, -1, 3, 3))

    model = Summed().eval()
    fast = compiled(model, True, mode="lossless")
    with torch.no_grad():
        for size in (8, 9, 12):
            x = torch.randn(2, 3, size, size)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_lossless_leaves_alone_what_is_dead_in_one_graph_and_alive_in_another() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            with torch.no_grad():
                self.up.weight[:4] = 0
                self.up.bias[:4] = -1

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(self.up(x).relu())
            torch._dynamo.graph_break()
            return self.down(self.up(x).sigmoid())

    model, x = Twice().eval(), torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, mode="lossless")(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_calibration_data_choose_and_compensate(dynamic: bool | None) -> None:
    generator = torch.Generator().manual_seed(2)
    model = Residual().eval()
    data = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(6)]
    wanted = fxprune.prune(model, IMAGE, 0.5, calibrate=data)
    fast = compiled(model, dynamic, ratio=0.5, calibrate=data)
    with torch.no_grad():
        torch.testing.assert_close(fast(IMAGE)["logits"], wanted(IMAGE)["logits"], rtol=1e-4, atol=1e-5)
        both = torch.cat([IMAGE, IMAGE])
        torch.testing.assert_close(fast(both)["logits"], wanted(both)["logits"], rtol=1e-4, atol=1e-5)


def test_calibration_data_of_several_inputs_are_given_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            second = self.b(y)
            return self.c((second + self.a(x)).relu())

    model, inputs = Two().eval(), (torch.randn(3, 4), torch.randn(3, 5))
    data = [{"x": torch.randn(6, 4), "y": torch.randn(6, 5)} for _ in range(6)]
    wanted = fxprune.prune(model, inputs, 0.5, calibrate=data)
    with torch.no_grad():
        got = compiled(model, ratio=0.5, calibrate=data)(*inputs)
        torch.testing.assert_close(got, wanted(*inputs), rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="takes y, x"):
            compiled(model, ratio=0.5, calibrate=[(d["x"], d["y"]) for d in data])(*inputs)


def _without_a_branch(model: nn.Module) -> fxprune.PruningPlan:
    graph = fxprune.analyze(model, IMAGE)
    return fxprune.plan(graph, ratio=0.0, branches=[next(iter(graph.branches))])


def test_wrong_options() -> None:
    model = Residual().eval()
    for options, words in (
        ({"ratoi": 0.5}, "no option 'ratoi'.*'ratio'"),
        ({"ratio": 2.0}, "ratio"),
        ({"mode": "max-autotune"}, "'mode' is 'lossless'"),
        ({"mode": "lossless", "ratio": 0.5}, "leave out 'ratio'"),
        ({"plan": 3}, "'plan' takes a plan"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
        ({"budget": fxprune.Budget(macs=0.5), "depth": 2}, "no residual branches .'depth'."),
        ({"plan": _without_a_branch(model)}, "the plan removes residual branches"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            compiled(model, **options)(IMAGE)


def test_the_entry_point_leads_here() -> None:
    from test_packaging import SETTINGS

    (name, value), *rest = SETTINGS["project"]["entry-points"]["torch_dynamo_backends"].items()
    assert (name, rest) == ("fxprune", [])
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is backend


def test_by_name_and_without_an_import(tmp_path: Path) -> None:
    """As after ``pip install``: torch finds the backend by the package's metadata; inductor compiles."""
    info = tmp_path / "fxprune_entry-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxprune-entry\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\nfxprune = fxprune.backend:backend\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from torch import nn
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
        fast = torch.compile(model, backend="fxprune", options={{"ratio": 0.5}})
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            got = fast(x)
            import fxprune
            torch.testing.assert_close(got, fxprune.prune(model, x, 0.5)(x), rtol=1e-4, atol=1e-4)
        print("equal")
    """
    lines = [line[8:] for line in code.strip("\n").splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=280
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
