"""What users do with a result in their own class, and with what they prune: hooks, wrappers, other heads."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_own_class import X, pruned, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune.errors import OutputError, VerificationError


class Classifier(nn.Module):
    """Makes its head anew, as timm's classes do, from numbers that ``forward`` does not read."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.image = 32 // factor, 32 // factor
        self.stem, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 5)
        self.factor = float(factor)

    def reset_head(self, classes: int) -> None:
        self.head = nn.Linear(self.width * 2 if self.factor == 2 else self.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).relu())


def test_hooks_of_layers_go_on() -> None:
    model = Classifier()
    kept: list[int] = []
    model.handle = model.head.register_forward_hook(lambda module, args, out: out * 2)  # type: ignore[assignment]
    model.stem.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.body.register_forward_hook(lambda module, args, out: kept.append(out.shape[-1]))
    _, result = pruned(model, ratio=0.5)
    kept.clear()
    result(X)
    assert kept == [result.body.out_features]  # type: ignore[union-attr]
    hooks: Any = copy.deepcopy(result).head
    assert len(hooks._forward_hooks) == 1
    result.handle.remove()  # type: ignore[operator,union-attr]
    assert not result.head._forward_hooks
    assert model.head._forward_hooks, "the handle of the copy is the copy's"


def test_a_wrapped_model_stays_wrapped() -> None:
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        model: Any = wrap(Classifier().eval())
        plan = fxprune.plan(model, X, ratio=0.5, into="module")
        result = plan.apply(model)
        assert type(result) is type(model)
        assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(result(X), plan.mask(model)(X))


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_that_is_made_anew_fits(factor: int) -> None:
    plan, result = pruned(Classifier(factor), ratio=0.5)
    result.reset_head(3)  # type: ignore[operator]
    assert result(X).shape == (2, 6, 3)
    assert result.image == 32 // factor, "which nothing says is a width"
    assert any(note.startswith(f"width becomes {16 // factor}: no call has read it") for note in plan.notes)


def test_what_no_call_has_shown_is_said() -> None:
    """Layers that the example did not run, and numbers that nothing reads, keep their widths."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
            self.body = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.head(self.body[which](self.stem(x).relu()).relu())

    def said(plan: fxprune.PruningPlan) -> list[str]:
        return [note for note in plan.notes if "did not run" in note]

    plan = fxprune.plan(Chosen(), (X, 1), ratio=0.5, into="module")
    (note,) = said(plan)
    assert note.startswith("the example did not run body.0, body.2: they stay as wide as they are")
    assert not said(fxprune.plan(Chosen(), (X, 1), ratio=0.5)), "a graph refuses other numbers itself"
    model = Chosen()
    calls = fxprune.Calls(model, [(X, which) for which in range(3)])
    assert not said(fxprune.plan(model, calls, ratio=0.5, into="module"))
    assert not said(fxprune.plan(Chosen(), (X, 1), ratio=0.0, into="module")), "nothing is narrower"
    plan, _ = pruned(Classifier(), ratio=0.5)
    assert "width becomes 16; still 32: image, which no call has read" in plan.notes


def test_copies_files_and_dtypes() -> None:
    _, result = pruned(Classifier().eval(), ratio=0.5)
    wanted = result(X)
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    again = [
        copy.deepcopy(result),
        pickle.loads(pickle.dumps(result)),
        torch.load(buffer, weights_only=False),
    ]
    for one in again:
        assert torch.equal(one(X), wanted)
    again[0].load_state_dict(result.state_dict())
    assert again[0].bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert result(X).dtype == torch.bfloat16
    again[1].train()
    checkpoint(again[1], X.requires_grad_(False), use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in again[1].parameters())
    torch.testing.assert_close(torch.compile(result, backend="eager")(X), wanted)


@dataclass
class State:
    keys: Tensor


class Step:
    def __init__(self, logits: Tensor, state: State) -> None:
        self.logits, self.state = logits, state


class Generating(nn.Module):
    """Asks for the values of its tokens in the decode step, and says there how wide its state is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.out = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 20)

    def generate(self) -> None:
        """As classes of transformers have it."""

    def forward(self, input_ids: Tensor, use_cache: bool = False, state: State | None = None) -> Any:
        keys = self.key(self.embed(input_ids).relu())
        if state is not None and bool((input_ids >= 0).all()):
            keys = torch.cat([state.keys.reshape(len(keys), -1, 16), keys], 1)
        logits = self.out(keys.cumsum(1)[:, -input_ids.shape[1] :])
        return Step(logits, State(keys)) if use_cache else logits


def test_a_decode_step_that_asks_for_values_is_run_on_them() -> None:
    model, ids = Generating().eval(), torch.randint(0, 20, (2, 5))
    plan = fxprune.plan(model, {"input_ids": ids}, 0.5, into="module")
    assert any("the decode step of generate() fails without them" in note for note in plan.notes)
    narrow: Any = plan.apply(model)
    assert (narrow.embed.weight.shape[1], narrow.key.out_features) == (6, 16)
    masked = plan.mask(model)
    with torch.no_grad():
        steps = [m(ids[:, -1:], True, m(ids, True).state).logits for m in (narrow, masked)]
    torch.testing.assert_close(*steps)


def test_a_result_is_pruned_again() -> None:
    _, once = pruned(Classifier(), ratio=0.5)
    _, twice = pruned(once, ratio=0.5)
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())


def test_what_was_changed_since_is_named(tmp_path: Path) -> None:
    model = Classifier()
    plan, result = pruned(model, ratio=0.5)
    with torch.no_grad():
        result.stem.weight.mul_(2)  # type: ignore[operator,union-attr]
    with pytest.raises(VerificationError, match="trained or edited since it was pruned"):
        fxprune.verify(model, result, plan, X)
    result.reset_head(3)  # type: ignore[operator]
    with pytest.raises(
        OutputError, match=r"head\.weight \(3, 16\) \(was \(5, 16\)\).*replace a layer before pruning"
    ):
        fxprune.save(result, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_ready_for_training_is_pruned() -> None:
    pytest.importorskip("transformers")
    model, inputs = small("Llama")
    trains: Any = model
    trains.gradient_checkpointing_enable()
    trains.train()
    plan = fxprune.plan(model, inputs, into="module", where=lambda group: group.exact)
    result: Any = plan.apply(model)
    assert result.is_gradient_checkpointing
    result(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in result.parameters())
    masked: Any = plan.mask(model)
    torch.testing.assert_close(result(**inputs).logits, masked(**inputs).logits)
