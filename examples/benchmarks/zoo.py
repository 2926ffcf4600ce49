"""The coverage table: run whole model zoos through fxprune, one process a model, and note what came out.

Nothing is told about any model but how it is built and what its inputs look like. For each of them:

- **ran**: ``fxprune.prune(model, inputs, ratio=0.5)`` gives a network that runs, with outputs of
  the same form (the number of boxes that a detector finds is its own).
- **exact**: judged in float64 by the tests' own oracle (``tests/oracle.py``). Where every narrowed group is
  exact, the outputs equal those of the original class with the removed entries set to zero. Else the same is
  asked of a second plan that narrows only the exact groups, and ``fxprune.verify`` compares the first node by
  node, in both modes and at a second size. "unseen" says that masking moved no output, so that there was
  nothing to judge by; "none" that no group is exact.
- **modes**: "both" where the result follows ``train()`` and ``eval()`` as the original does; else what stays.
- **sizes**: which sizes of the inputs are free (``graph.sizes``).
- **batch**: whether the result also takes a batch of twice the size, where the original does.
- **kept**: the share of parameters and of multiply-accumulates that is left at ratio 0.5; in brackets that of
  parameters with ``free_outputs="auto"``, where outputs keep much of the network wide.
- **seconds**: processor time of ``fxprune.prune``.
- **peak**: resident memory above what the process held with the model built.

Rows are appended to ``rows.jsonl`` as they come; models that have a row are not run again unless asked for.

    pip install -e '.[zoo]'
    python examples/benchmarks/zoo.py torchvision timm transformers diffusers     # hours
    python examples/benchmarks/zoo.py timm --models vit_tiny_patch16_224
    python examples/benchmarks/zoo.py --table COVERAGE    # into COVERAGE.md and COVERAGE.csv; other rows stay
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.sizes import BATCH, FAR, InputSizes, resized

sys.path.insert(0, str(Path(__file__).resolve().parent))
from more_zoos import MORE

RATIO = 0.5
SIZES = (64, 96, 128, 160, 192, 224, 256)
LARGE = 60_000_000
"""More parameters than this are judged in float32."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative. Some models compute their norms in float32 whatever the type of their weights."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Row:
    """One model's line of the table; an empty field was not reached."""

    zoo: str
    model: str
    input: str = ""
    params: int = 0
    rung: str = ""
    ran: bool = False
    exact: str = ""
    batch: str = ""
    kept_params: float | None = None
    kept_freed: float | None = None
    kept_macs: float | None = None
    kept_exact: float | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    reason: str = ""
    versions: str = ""
    date: str = ""
    modes: str = ""
    sizes: str = ""


# -- the zoos ---------------------------------------------------------------------------------------

Made = tuple[nn.Module, Any]
"""A model in evaluation mode, and inputs as fxprune takes them."""


def torchvision_names(folder: Path) -> list[str]:
    from torchvision import models

    return [name for name in models.list_models() if not name.startswith("quantized_")]


def torchvision_make(name: str) -> Made:
    """Classification, segmentation, detection, video and optical flow, each with inputs of its kind.

    Detectors take images as they are, rather than enlarged to 800 pixels, and give boxes of any score:
    random weights are sure of none.
    """
    from torchvision import models

    module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    kind = module.partition(".")[0]
    options = {"weights_backbone": None} if kind in ("detection", "segmentation") else {}
    model = models.get_model(name, weights=None, **options).eval()
    if kind == "optical_flow":
        return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    if kind == "video":
        frames, size = (16, 224) if module in ("video.mvit", "video.s3d") else (8, 64)
        return model, torch.rand(1, 3, frames, size, size)
    if kind == "detection":
        model.transform.min_size, model.transform.max_size = (128,), 160
        for part in model.modules():
            if hasattr(part, "score_thresh"):
                part.score_thresh = 0.0
        return model, ([torch.rand(3, 128, 160)],)
    if kind == "segmentation":
        return model, torch.rand(1, 3, 64, 64)
    return model, smallest_image(model)


def timm_names(folder: Path) -> list[str]:
    """The model with the fewest parameters of every family module; remembered, since it takes minutes."""
    import timm

    memo = folder / f"timm-{timm.__version__}.json"
    if memo.exists():
        return list(json.loads(memo.read_text()).values())
    least = {}
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            with suppress(Exception), torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        if sizes:
            least[family] = min(sizes, key=lambda name: (sizes[name], name))
    memo.write_text(json.dumps(least, indent=1))
    return list(least.values())


def timm_make(name: str) -> Made:
    import timm

    model = timm.create_model(name).eval()
    channels, height, width = model.default_cfg["input_size"]
    if height != width or model.default_cfg.get("fixed_input_size"):
        return model, torch.rand(1, channels, height, width)
    return model, smallest_image(model, channels, height)


def smallest_image(model: nn.Module, channels: int = 3, default: int = 224) -> Tensor:
    """An image of the smallest usual size that the model takes."""
    for size in (*SIZES, default):
        with suppress(Exception), torch.no_grad():
            image = torch.rand(1, channels, size, size)
            if all(bool(t.isfinite().all()) for t in pytree.tree_leaves(model(image))):
                return image
    raise RuntimeError("takes no square image")


def tokens(*names: str, length: int = 12) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randint(3, 90, (2, length)) for name in names or ("input_ids",)}


def image(size: int, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


VOCAB: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS: dict[str, Any] = {**LAYERS, "hidden_size": 64, "intermediate_size": 128}
TEXT: dict[str, Any] = {**WIDTHS, **VOCAB, "max_position_embeddings": 32}
GQA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
VISION: dict[str, Any] = {**WIDTHS, "image_size": 32, "patch_size": 8, "num_labels": 10}
PYRAMID: dict[str, Any] = {"image_size": 64, "num_labels": 10, "depths": [1, 1, 2, 1]}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "albert": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 32}, tokens()),
    "bart": (
        "BartForConditionalGeneration",
        {**VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
         "max_position_embeddings": 32, "use_cache": False, "decoder_start_token_id": 2},
        tokens("input_ids", "decoder_input_ids"),
    ),
    "bert": ("BertForSequenceClassification", TEXT, tokens("input_ids", "attention_mask")),
    "clip": (
        "CLIPModel",
        {"projection_dim": 32, "text_config": {**TEXT, "projection_dim": 32},
         "vision_config": {**WIDTHS, "image_size": 32, "patch_size": 8, "projection_dim": 32}},
        lambda: {**tokens()(), **image(32)()},
    ),
    "convnextv2": ("ConvNextV2ForImageClassification", {**PYRAMID, "hidden_sizes": [16, 32, 48, 64]},
                   image(64)),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
         "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        tokens(),
    ),
    "deit": ("DeiTForImageClassification", VISION, image(32)),
    "detr": (
        "DetrForObjectDetection",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 10,
         "num_labels": 7, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64],
                             "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"]}},
        image(64),
    ),
    "dinov2": ("Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}, image(32)),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {**VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
        tokens(),
    ),
    "electra": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 32}, tokens()),
    "gemma": ("GemmaForCausalLM", {**GQA, "head_dim": 16}, tokens()),
    "gpt2": (
        "GPT2LMHeadModel",
        {**VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
        tokens(),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**TEXT, "use_cache": False}, tokens()),
    "llama": ("LlamaForCausalLM", GQA, tokens("input_ids", "attention_mask")),
    "mamba": (
        "MambaForCausalLM",
        {**VOCAB, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "use_cache": False},
        tokens(),
    ),
    "mistral": ("MistralForCausalLM", {**GQA, "sliding_window": 8}, tokens()),
    "mixtral": (
        "MixtralForCausalLM",
        {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        tokens(),
    ),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        {**TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        tokens(),
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
        tokens("input_ids", "attention_mask"),
    ),
    "opt": (
        "OPTForCausalLM",
        {**LAYERS, **VOCAB, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64,
         "max_position_embeddings": 32, "use_cache": False},
        tokens(),
    ),
    "phi3": ("Phi3ForCausalLM", GQA, tokens()),
    "qwen2": ("Qwen2ForCausalLM", GQA, tokens()),
    "qwen3": ("Qwen3ForCausalLM", {**GQA, "head_dim": 16}, tokens()),
    "roberta": ("RobertaForSequenceClassification", TEXT, tokens()),
    "sam_image_encoder": (
        "SamVisionModel",
        {**LAYERS, "hidden_size": 64, "mlp_dim": 128, "image_size": 64, "patch_size": 8,
         "output_channels": 32, "window_size": 4, "global_attn_indexes": [1],
         "initializer_range": 0.02},  # by default 1e-10
        image(64),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"num_labels": 10, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
         "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 32},
        image(64),
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4, "num_labels": 10},
        image(32),
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4, "num_labels": 10},
        image(32),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "d_model": 64,
         "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "use_cache": False},
        tokens("input_ids", "decoder_input_ids"),
    ),
    "vit": ("ViTForImageClassification", VISION, image(32)),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {**WIDTHS, "vocab_size": 30, "conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2],
         "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4,
         "apply_spec_augment": False},
        lambda: {"input_values": torch.randn(2, 800)},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
         "max_source_positions": 20, "max_target_positions": 20, "use_cache": False,
         "decoder_start_token_id": 1},
        lambda: {"input_features": torch.randn(2, 16, 40), **tokens("decoder_input_ids")()},
    ),
}  # fmt: skip
"""Class with a head of a usual task, a small configuration, inputs; the rest is as the class has it."""


def transformers_names(folder: Path) -> list[str]:
    importlib.import_module("transformers")
    return list(TRANSFORMERS)


def transformers_make(name: str) -> Made:
    import transformers

    class_name, options, inputs = TRANSFORMERS[name]
    model_class = getattr(transformers, class_name)
    given = inputs()
    for key in given:
        if key == "attention_mask":
            given[key] = torch.ones_like(given[key])
            given[key][1, -3:] = 0
    return model_class(model_class.config_class(**copy.deepcopy(options))).eval(), given


DIFFUSERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "unet2d_condition": (
        "UNet2DConditionModel",
        {"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64),
         "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
                 "encoder_hidden_states": torch.randn(1, 6, 32)},
    ),
    "dit": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
         "num_layers": 2, "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
                 "class_labels": torch.tensor([2])},
    ),
}  # fmt: skip


def diffusers_names(folder: Path) -> list[str]:
    importlib.import_module("diffusers")
    return list(DIFFUSERS)


def diffusers_make(name: str) -> Made:
    import diffusers

    class_name, options, inputs = DIFFUSERS[name]
    return getattr(diffusers, class_name)(**copy.deepcopy(options)).eval(), inputs()


def ultralytics_names(folder: Path) -> list[str]:
    importlib.import_module("ultralytics")
    return ["yolov8n", "yolo11n"]


def ultralytics_make(name: str) -> Made:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False).eval(), torch.rand(1, 3, 64, 64)


ZOOS: dict[str, tuple[Callable[[Path], list[str]], Callable[[str], Made]]] = {
    "torchvision": (torchvision_names, torchvision_make),
    "timm": (timm_names, timm_make),
    "transformers": (transformers_names, transformers_make),
    "diffusers": (diffusers_names, diffusers_make),
    "ultralytics": (ultralytics_names, ultralytics_make),
    **{zoo: ((lambda folder, names=names: list(names)), make) for zoo, (names, make) in MORE.items()},
}


# -- the worker: one model, in a process of its own -------------------------------------------------


def worker(zoo: str, name: str) -> None:
    """Build, prune and judge one model; print its row after every stage, so that the last one counts."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    row = Row(zoo, name)
    try:
        model, inputs = ZOOS[zoo][1](name)
        row.params = sum(p.numel() for p in model.parameters())
        row.input = describe(inputs)
        settle(model, inputs)
        for _ in stages(row, model, inputs):
            print(json.dumps(asdict(row)), flush=True)
        model, inputs = ZOOS[zoo][1](name)
        fxprune.analyze(model, inputs)  # the first call of a model may change it; this one must not
        settle(model, inputs)
    except Exception as error:
        row.reason = one_line(error)
        row.exact = row.exact and "no"
    print(json.dumps(asdict(row)), flush=True)


def stages(row: Row, model: nn.Module, inputs: Any) -> Iterator[None]:
    """Fill in ``row``, pausing after each thing found."""
    oracle = the_oracle()
    fxprune.prune(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.rand(1, 2))  # imports and caches
    base, start = reset_peak(), time.process_time()
    pruned = fxprune.prune(model, inputs, ratio=RATIO)
    row.seconds = round(time.process_time() - start, 2)
    peak = peak_memory()
    row.peak_mb = round((peak - base) / 1e6) if base is not None and peak is not None else None
    plan = pruned.meta["fxprune"]
    row.kept_params = round(sum(p.numel() for p in pruned.parameters()) / max(row.params, 1), 3)
    graph = fxprune.analyze(model, inputs)
    row.rung = graph.captured.rung
    row.sizes = free_sizes(graph.sizes)
    yield
    with torch.no_grad():
        wanted = oracle.call(model, inputs)
        got = oracle.call(pruned, inputs)
    row.ran = oracle.same_structure(form(wanted, row.rung), form(got, row.rung))
    if not row.ran:
        row.reason = f"outputs {oracle.describe(got)} in place of {oracle.describe(wanted)}"[:200]
        return
    row.reason = shortfall(graph, plan, row.kept_params)
    yield
    with suppress(fxprune.FxpruneError):
        row.kept_macs = round(
            fxprune.count(pruned, inputs).macs / max(fxprune.count(model, inputs).macs, 1), 3
        )
    row.batch = takes_batches(oracle, model, pruned, inputs)
    row.modes = follows_modes(oracle, model, pruned, inputs)
    yield
    del pruned, wanted, got, graph, plan  # room for the copies that follow
    row.exact = judge(oracle, row, model, inputs)


def free_sizes(sizes: InputSizes) -> str:
    """The column "sizes", without the reasons."""
    return plain(str(InputSizes(tuple(replace(axis, because="") for axis in sizes.axes), sizes.note)))


def form(outputs: Any, rung: str) -> Any:
    """``outputs`` on meta; in those of code that follows values (the region rung) every size is free."""
    return pytree.tree_map_only(
        Tensor,
        lambda t: torch.empty([1] * t.dim() if rung == "regions" else t.shape, dtype=t.dtype, device="meta"),
        outputs,
    )


def judge(oracle: Any, row: Row, model: nn.Module, inputs: Any) -> str:
    """The column "exact"; where the answer is no, the reason is written down."""
    wide = row.params <= LARGE and runs_in_double(oracle, model, inputs)
    dtype = torch.float64 if wide else torch.float32
    # Narrowed in the type that it is judged in: an exported graph holds the types that the forward asked for.
    model = copy.deepcopy(model).to(dtype) if wide else model
    inputs = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    graph = fxprune.analyze(model, inputs)
    plan = fxprune.plan(graph, ratio=RATIO)
    pruned = plan.apply(graph)
    narrowed = [g for g in fxprune.api.graph_for(plan, graph).groups if plan.removed.get(g.name)]
    try:
        if graph.advice:
            freed = fxprune.prune(model, inputs, ratio=RATIO, free_outputs="auto")
            row.kept_freed = round(sum(p.numel() for p in freed.parameters()) / max(row.params, 1), 3)
            fxprune.verify(model, freed, freed.meta["fxprune"], inputs, dtype=dtype)
        if not all(group.exact for group in narrowed):
            fxprune.verify(graph, pruned, plan, inputs, dtype=dtype)
            plan = fxprune.plan(graph, ratio=RATIO, where=lambda group: group.exact)
            pruned = plan.apply(graph)
        row.kept_exact = round(sum(p.numel() for p in pruned.parameters()) / max(row.params, 1), 3)
        if not any(plan.removed.values()):
            why = f"no exact group: {narrowed[0].inexact_because}, and the like" if narrowed else "no group"
            reasons = [why, row.reason]
            row.reason = plain("; ".join(filter(None, reasons)))
            return "none"
    except fxprune.FxpruneError as error:
        row.reason = one_line(error)
        return "no"
    with torch.no_grad():
        wanted = oracle.call(oracle.masked(model, fxprune.api.graph_for(plan, graph), plan).eval(), inputs)
        got = oracle.call(pruned, inputs)
        untouched = oracle.call(model, inputs)
    if not oracle.same_structure(got, wanted):
        row.reason = f"outputs {oracle.describe(got)} in place of the masked original's"[:200]
        return "no"
    error = oracle.difference(got, wanted)
    if not error <= TOLERANCE[dtype]:
        row.reason = f"differs from the masked original by {error:.1e}"
        return "no"
    moved = not oracle.same_structure(untouched, wanted) or oracle.difference(untouched, wanted) > 1e-6
    return "yes" if moved else "unseen"


def runs_in_double(oracle: Any, model: nn.Module, inputs: Any) -> bool:
    """Whether all operators of the original have kernels for float64."""
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        with torch.no_grad():
            oracle.call(copy.deepcopy(model).double(), wide)
    except RuntimeError:
        return False
    return True


def takes_batches(oracle: Any, model: nn.Module, pruned: nn.Module, inputs: Any) -> str:
    """The column "batch": any, fixed, or empty where the original does not take twice the batch.

    Of inputs that belong to a graph, only those of its nodes are taken twice.
    """
    with torch.no_grad():
        for larger in (oracle.enlarged(inputs, 0), resized(inputs, {BATCH: FAR})):
            try:
                wanted = oracle.call(model, larger)
            except Exception:
                continue
            try:
                return "any" if oracle.same_structure(wanted, oracle.call(pruned, larger)) else "fixed"
            except Exception:
                return "fixed"
    return ""


def follows_modes(oracle: Any, model: nn.Module, pruned: nn.Module, inputs: Any) -> str:
    """The column "modes"; empty where the original does not run in training mode.

    Batch norm of one value per channel refuses to train: then at twice the batch.
    """
    same = None
    with torch.no_grad():
        for given in (inputs, oracle.enlarged(inputs, 0)):
            try:
                wanted = oracle.call(copy.deepcopy(model).train(), given)
            except Exception:
                continue
            try:
                same = oracle.same_structure(wanted, oracle.call(copy.deepcopy(pruned).train(), given))
            except fxprune.FxpruneError as error:
                return f"one: {one_line(error)}"[:80]
            except Exception:
                same = False
            break
    if same is None:
        return ""
    kept = [note for note in pruned.meta["fxprune"].notes if "stays in" in note and "mode" in note]
    return "dropout and batch norm" if kept else "both" if same else "one"


def shortfall(graph: Any, plan: Any, kept: float) -> str:
    """What kept most parameters from becoming narrower, for a model of which more than half is left."""
    notes = [str(note) for note in plan.notes if not str(note).startswith("sizes of the inputs")]
    if kept > 0.5:
        shares: dict[str, int] = {}
        for entry in graph.frozen:
            if entry.axis.dim > 1:
                continue  # a kernel's extent, not a width
            size = graph.captured.program.tensors[entry.axis.name].numel()  # no node may use it
            reason = f"frozen: {entry.reason}"
            shares[reason] = shares.get(reason, 0) + size
        idle = {id(t): t.numel() for t in graph.captured.program.tensors.values()}
        for state in graph.states.values():
            idle.pop(id(state.tensor), None)
        shares["unused by the forward, or by what was captured of it"] = sum(idle.values())
        notes.append(max(shares, key=lambda reason: shares[reason]))
    return plain("; ".join(notes))


def settle(model: nn.Module, inputs: Any) -> None:
    """Weights without regularities, and batch-norm statistics with which signals neither die nor explode."""
    oracle = the_oracle()
    oracle.stir(model)
    hooks = []

    def measure(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        dims = [d for d in range(x.dim()) if d != 1]
        norm.running_mean.copy_(x.mean(dims))
        norm.running_var.copy_(x.var(dims, unbiased=False) + 0.1)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(measure))
    with torch.no_grad():
        oracle.call(model, inputs)
    for hook in hooks:
        hook.remove()


def the_oracle() -> Any:
    """The module ``tests/oracle.py``."""
    if "oracle" not in sys.modules:
        spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "oracle.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["oracle"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["oracle"])
    return sys.modules["oracle"]


def reset_peak() -> int | None:
    """Start the record of resident memory anew; bytes held now, None where there is no such record."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_memory()


def peak_memory() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def describe(inputs: Any) -> str:
    leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    return ", ".join("x".join(map(str, t.shape)) for t in leaves)


def one_line(error: BaseException) -> str:
    return plain(f"{type(error).__name__}: {error}")


def plain(text: str) -> str:
    """One line without the paths of this machine."""
    text = re.sub(r"\s+", " ", text).replace(str(ROOT), ".")
    return re.sub(r"/\S*/site-packages/", "", text)[:300]


# -- the parent: starts workers, watches their limits, keeps the rows ------------------------------


def measure(zoo: str, name: str, limit: float, memory: float) -> Row:
    """The row of one model; where its process broke a limit or died, what it had found by then."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FRESH.Process(target=apart, args=(zoo, name, out, err))
        process.start()
        breach = watch(process, limit, memory)
        lines = out.read_text().splitlines(keepends=True) if out.exists() else []
        found = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
        complaints = err.read_text().strip().splitlines() if err.exists() else []
    row = Row(**json.loads(found[-1])) if found else Row(zoo, name)
    if process.exitcode:
        row.reason = breach or (complaints[-1][:200] if complaints else f"exit code {process.exitcode}")
    row.versions = versions(zoo)
    row.date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    return row


FRESH = multiprocessing.get_context("forkserver")
"""Makes processes out of one that has imported much and run nothing."""


def apart(zoo: str, name: str, out: Path, err: Path) -> None:
    """:func:`worker` in a process of its own; its output goes into files."""
    for number, path in ((1, out), (2, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    worker(zoo, name)


def watch(process: BaseProcess, limit: float, memory: float) -> str | None:
    """Wait for a process; end it when it breaks a limit, and say which."""
    import psutil

    start, watched = time.monotonic(), psutil.Process(process.pid)
    try:
        while process.is_alive():
            process.join(0.1)
            with suppress(psutil.NoSuchProcess):
                if watched.memory_info().rss > memory * 1e9:
                    return f"over {memory:g} GB"
            if time.monotonic() - start > limit:
                return f"over {limit:g} s"
        return None
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def versions(zoo: str) -> str:
    """Versions of everything that a row depends on, our own by its commit."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    library = {"time series": "transformers"}.get(zoo, zoo.partition(",")[0])
    found = metadata.packages_distributions().get(library, [])[:1]
    packages = ["torch", *found]
    ours = f"fxprune {fxprune.__version__}" + (f" ({commit})" if commit else "")
    return ", ".join([ours, *(f"{package} {metadata.version(package)}" for package in packages)])


def read_rows(folder: Path) -> dict[tuple[str, str], Row]:
    """The newest row of each model."""
    rows = {}
    path = folder / "rows.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row = Row(**json.loads(line))
        rows[row.zoo, row.model] = row
    return rows


# -- the table --------------------------------------------------------------------------------------

HEADER = ("model", "input", "rung", "ran", "exact", "modes", "sizes", "batch", "kept params", "kept MACs",
          "seconds", "peak MB", "reason")  # fmt: skip


def written_rows(stem: Path) -> dict[tuple[str, str], Row]:
    """The rows of a table that was written before; columns that it did not have yet are empty."""
    path = stem.with_suffix(".csv")
    if not path.exists():
        return {}
    rows = {}
    with path.open(newline="") as file:
        for found in csv.DictReader(file):
            given: dict[str, Any] = {name: found.get(name) or "" for name in (f.name for f in fields(Row))}
            given["ran"] = given["ran"] == "True"
            given["params"] = int(given["params"] or 0)
            for name in NUMBERS:
                given[name] = float(given[name]) if given[name] else None
            rows[given["zoo"], given["model"]] = Row(**given)
    return rows


NUMBERS = ("kept_params", "kept_freed", "kept_macs", "kept_exact", "seconds", "peak_mb")


def cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    freed = f" ({row.kept_freed:.2f})" if row.kept_freed is not None else ""
    return [row.model, row.input, row.rung, "yes" if row.ran else "no", row.exact, row.modes,
            row.sizes, row.batch,
            number(row.kept_params, ".2f") + freed,
            number(row.kept_macs, ".2f"), number(row.seconds, ".1f"), number(row.peak_mb, ".0f"),
            row.reason.replace("|", "/")]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    ran, exact = sum(row.ran for row in rows), sum(row.exact in ("yes", "unseen") for row in rows)
    without = sum(row.exact == "none" for row in rows)
    slowest = max((row.seconds or 0 for row in rows), default=0)
    largest = max((row.peak_mb or 0 for row in rows), default=0)
    most = f"at most {slowest:.0f} s and {largest:.0f} MB a model"
    inexact = f", {without} have no exact group" if without else ""
    return f"{len(rows)} models, {ran} run, {exact} are exact{inexact}; {most}."


def write_table(rows: Sequence[Row], stem: Path) -> None:
    """``stem.md`` for people, ``stem.csv`` with all fields."""
    script = Path(__file__).resolve().relative_to(ROOT)
    lines = ["# Coverage", "", f"By `{script}`, ratio {RATIO}; the head of that file says what the columns",
             "mean. The other file has the date and the versions of each row. Commits that are not on main",
             "were those of a branch, before it was put on top of others.", "",
             f"Last written: {setting()}", ""]  # fmt: skip
    for zoo in ZOOS:
        own = sorted((row for row in rows if row.zoo == zoo), key=lambda row: row.model)
        if own:
            lines += [f"## {zoo}", "", summary(own), ""]
            parts = {part for row in own for part in row.versions.split(", ")}
            lines += [f"Versions, row by row in the other file: {', '.join(sorted(parts))}.", ""]
            lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
            lines += [f"| {' | '.join(cells(row))} |" for row in own]
            lines.append("")
    stem.with_suffix(".md").write_text("\n".join(lines))
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(asdict(row).values() for row in sorted(rows, key=lambda row: (row.zoo, row.model)))


def setting() -> str:
    """Date and machine."""
    import psutil

    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}; Python {platform.python_version()}; "
        f"{cpu_model()}, {psutil.cpu_count()} CPUs ({torch.get_num_threads()} threads), "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, {platform.system()}."
    )


def cpu_model() -> str:
    """The processor's name, from where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoos", nargs="*", choices=[*ZOOS, []], metavar="ZOO", help=", ".join(ZOOS))
    parser.add_argument("--models", nargs="+", help="only these models of the zoo, again if they have a row")
    parser.add_argument(
        "--failed", action="store_true", help="run those again that did not run or are not exact"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("coverage"), help="of rows.jsonl (default: coverage)"
    )
    parser.add_argument("--seconds", type=float, default=600, help="limit for each process (default: 600)")
    parser.add_argument("--memory", type=float, default=15, help="gigabytes for each process (default: 15)")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="STEM",
        help="put the rows into STEM.md and STEM.csv, whose other rows stay",
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    FRESH.set_forkserver_preload(
        ["fxprune.api", "torch.export", *{zoo.partition(",")[0] for zoo in options.zoos}]
    )
    for zoo in options.zoos:
        try:
            names = options.models or ZOOS[zoo][0](options.folder)
        except ImportError as error:
            print(f"{zoo} is not installed: {error}")
            continue
        done = read_rows(options.folder)
        for name in names:
            row = done.get((zoo, name))
            again = options.models or (
                options.failed and row is not None and row.exact not in ("yes", "unseen")
            )
            if row is not None and not again:
                continue
            row = measure(zoo, name, options.seconds, options.memory)
            with (options.folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(f"{zoo}: {' | '.join(cells(row))}", flush=True)
    rows = read_rows(options.folder)
    if options.table is not None:
        rows = {**written_rows(options.table), **rows}
        write_table(list(rows.values()), options.table)
    print(summary(list(rows.values())))


if __name__ == "__main__":
    main()
