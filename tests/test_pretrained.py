"""Narrowed networks in the files of their own library: what a configuration says, and what none does."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_own_class import small
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxprune
from fxprune import configurations
from fxprune.configurations import changed, shapes_of, solve_configs
from fxprune.errors import CheckpointError, OutputError
from fxprune.origins import plans_of

transformers = pytest.importorskip("transformers")


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def test_a_library_opens_what_its_configuration_says(tmp_path: Path) -> None:
    model, inputs = small("Llama")
    result: Any = fxprune.prune(model, inputs, into="module", uniform=True, where=lambda group: group.exact)
    saved = fxprune.save_pretrained(result, tmp_path / "narrow")
    assert saved.config == {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert result.config.intermediate_size == 24
    assert model.config.intermediate_size == 48, "the original is as it was"
    code = (
        "import sys, torch, transformers; assert not any(m.startswith('fxprune') for m in sys.modules); "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "ids = torch.tensor([[3, 4, 5]]); "
        "tokens = model.generate(ids, max_new_tokens=4, do_sample=False).tolist(); "
        "print(model(ids).logits.sum().item(), tokens)"
    )
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "narrow")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    ids = torch.tensor([[3, 4, 5]])
    generated = result.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    number, _, tokens = run.stdout.strip().splitlines()[-1].partition(" ")
    assert float(number) == pytest.approx(float(logits(result, {"input_ids": ids}).sum()), abs=1e-4)
    assert json.loads(tokens) == generated
    again = fxprune.from_pretrained(tmp_path / "narrow")
    torch.testing.assert_close(logits(again.eval(), inputs), logits(result, inputs))


def test_checkpoints_of_the_librarys_own_trainers_open(tmp_path: Path) -> None:
    """The class's own ``save_pretrained`` writes them, with the configuration that the model holds."""
    model, inputs = small("Llama")
    options = {"into": "module", "uniform": True, "where": lambda group: group.exact}
    plan = fxprune.PruningPlan.from_json(fxprune.plan(model, inputs, **options).to_json())
    result: Any = plan.apply(model)
    assert (result.config.intermediate_size, model.config.intermediate_size) == (24, 48)
    result.save_pretrained(tmp_path / "checkpoint")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(logits(again, inputs), logits(result, inputs))
    edited = plan.with_removed({name: [0] for name in plan.removed if ".0.mlp" in name})
    uneven: Any = edited.apply(model)
    assert uneven.config.intermediate_size == 48, "no configuration says it"
    (made,) = plans_of(uneven)
    assert made.config == {}, "nor is it tried again when the file is opened"
    (note,) = {*made.notes} - {*edited.notes}
    assert note.startswith("the plan's configuration (intermediate_size=24")
    assert not {*plans_of(result)[0].notes} - {*plan.notes}
    fxprune.verify(model, uneven, edited, inputs)


@pytest.mark.parametrize("name", ["num_hidden_layers", "pad_token_id", "intermediate_size"])
def test_a_plan_builds_nothing_that_is_larger_than_the_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file might ask for a billion layers."""
    model, inputs = small("Llama")
    plan = fxprune.plan(model, inputs, into="module", uniform=True, where=lambda group: group.exact)
    built: list[Any] = []
    shapes = configurations._Builds.shapes
    monkeypatch.setattr(
        configurations._Builds, "shapes", lambda self, values: (built.append(values), shapes(self, values))[1]
    )
    assert plan.apply(model).config.intermediate_size == 24  # type: ignore[union-attr]
    assert built
    built.clear()
    hostile = dataclasses.replace(plan, config={**plan.config, name: 1000})
    assert hostile.apply(model).config.intermediate_size == 48  # type: ignore[union-attr]
    assert not built


def test_narrowed_again_by_a_second_configuration(tmp_path: Path) -> None:
    model, inputs = small("Llama")
    options = {"into": "module", "uniform": True, "where": lambda group: group.exact}
    once: Any = fxprune.prune(model, inputs, ratio=0.25, **options)
    twice: Any = fxprune.prune(once, inputs, ratio=0.5, **options)
    widths = [m.config.intermediate_size for m in (model, once, twice)]
    assert widths == [48, 36, 18]
    assert fxprune.save_pretrained(twice, tmp_path).config["intermediate_size"] == 18  # type: ignore[index]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, inputs), logits(twice, inputs))


def test_what_no_configuration_says_is_never_written_as_if(tmp_path: Path) -> None:
    model, inputs = small("GPT2")
    result = fxprune.prune(model, inputs, into="module", where=lambda group: group.exact)
    saved = fxprune.save_pretrained(result, tmp_path)
    assert saved.config is None
    assert "c_attn.weight" in str(saved)
    assert not list(tmp_path.glob("model*.safetensors"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    again = fxprune.from_pretrained(tmp_path)
    assert type(again) is transformers.GPT2LMHeadModel
    assert torch.equal(logits(again, inputs), logits(result, inputs))
    assert again.transformer.h[0].attn.head_dim == 4  # type: ignore[union-attr,index]


def test_uniform_leaves_whole_what_no_configuration_says(tmp_path: Path) -> None:
    model, inputs = small("GPT2")
    exact = {"where": lambda group: group.exact, "into": "module", "uniform": True}
    plan = fxprune.plan(model, inputs, **exact)
    assert any("stay whole: no configuration gives" in note for note in plan.notes)
    saved = fxprune.save_pretrained(plan.apply(model), tmp_path)
    assert saved.config == {"n_inner": 64}, "which the configuration left open"


def size_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def most_memory(run: Callable[[], Any]) -> int:
    """Most bytes of tensors that were there at once while ``run`` ran, besides those that were before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    kineto: Any = seen.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("uniform", [False, True])
def test_memory_is_what_is_kept_once(uniform: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    plans: list[fxprune.PruningPlan] = []

    def plan() -> None:
        plans.append(fxprune.plan(model, ids, importance="random", into="module", uniform=uniform))

    assert most_memory(plan) < size_of(model), "no copy stays until the end"
    kept = size_of(plans[0].apply(model))
    assert most_memory(lambda: plans[0].apply(model)) < 1.5 * kept


def test_shapes_that_mean_another_network_are_told_from_it() -> None:
    model, _ = small("Llama")
    target = shapes_of(model)
    found, reason = solve_configs(model, target)
    assert (next(found), reason()) == ({}, "")
    found, reason = solve_configs(model, {**target, "model.layers.0.mlp.up_proj.weight": (40, 32)})
    assert next(found, None) is None
    assert "layers.0.mlp.up_proj.weight (40, 32) (the nearest configuration gives (48, 32))" in reason()
    config = changed(model.config, {("hidden_size",): 16})
    assert (config.hidden_size, model.config.hidden_size) == (16, 32)  # type: ignore[union-attr]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Linear has no config.*fxprune\.save"):
        fxprune.save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    model, _ = small("Llama")
    with pytest.raises(OutputError, match="nobody knows which plan"):
        fxprune.save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"no directory .*nothing"):
        fxprune.from_pretrained(tmp_path / "nothing")
    (tmp_path / "fxprune.json").write_text(json.dumps({"class": "os.system"}))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        fxprune.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"os\.system is no class of networks"):
        fxprune.from_pretrained(tmp_path)
    with pytest.raises(OutputError, match=r"config\.json is no directory"):
        fxprune.save_pretrained(narrowed(), tmp_path / "config.json")


class Other(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """Takes more than a configuration."""

    def __init__(self, config: Any, bias: float) -> None:
        super().__init__(config)


@functools.cache
def _narrowed(kind: Any) -> Any:
    model, inputs = small("GPT2")
    if kind is not None:
        model = kind(model.config, 1.0).eval()
    return fxprune.prune(model, inputs, into="module", where=lambda group: group.exact)


def narrowed(kind: Any = None) -> Any:
    return copy.deepcopy(_narrowed(kind))


def test_what_nothing_could_open_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Other cannot be built from its configuration alone.*'bias'"):
        fxprune.save_pretrained(narrowed(Other), tmp_path)
    adapted = narrowed()
    layer = adapted.transformer.h[0].mlp
    layer.c_fc, layer.extra = torch.nn.Sequential(layer.c_fc), torch.nn.Linear(2, 2)
    with pytest.raises(OutputError, match=r"c_fc\.0\.weight.* have no place.*c_fc\.weight.* are gone.*merge"):
        fxprune.save_pretrained(adapted, tmp_path)
    wrapped = torch.nn.DataParallel(narrowed())
    with pytest.raises(OutputError, match="DataParallel wraps the narrowed GPT2LMHeadModel at module"):
        fxprune.save_pretrained(wrapped, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    narrowed().save_pretrained(tmp_path)  # which writes the original's configuration
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel\.from_pretrained.*uniform=True"):
        fxprune.from_pretrained(tmp_path)
    fxprune.save_pretrained(narrowed(), tmp_path / "whole")
    (tmp_path / "whole" / "fxprune.json").unlink()
    with pytest.raises(CheckpointError, match=r"fxprune\.json cannot be read"):
        fxprune.from_pretrained(tmp_path / "whole")
