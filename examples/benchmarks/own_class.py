"""Results in the model's own class, over many models: what is kept, and whether it is right.

For each model, at ratio 0.5, with randomly initialised weights:

- **graph**, **class**: the share of parameters that is kept in either form;
- **verify**: ``fxprune.verify`` of the class form: the graph against the masked original, and the class's own
  ``forward`` against both;
- **generate**: for language models, whether 20 tokens generated greedily with the cache are those of
  the masked original in float64;
- **reopened**: for these, whether what ``save_pretrained`` wrote at 0.7 of the parameters, with
  ``uniform=True``, gives the same logits and the same 20 tokens in a process that cannot import fxprune,
  opened by ``from_pretrained`` of transformers itself.

Models of transformers are narrowed in their exact groups, all else in all groups. Rows are appended to
``own_class.jsonl``; models that have a row are not run again, unless they are named. Each model has a
process of its own, which begins as a copy of this one.

    pip install -e '.[zoo]'
    python examples/benchmarks/own_class.py transformers torchvision timm
    python examples/benchmarks/own_class.py transformers --models Llama
    python examples/benchmarks/own_class.py --table examples/benchmarks/OWN_CLASS.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.errors import BudgetError

ROWS = Path(__file__).with_name("own_class.jsonl")
Make = Callable[[], tuple[nn.Module, Any]]
LARGE = 320_000_000
"""Models with more parameters are planned on the meta device, and not run."""
SINGLE = 100_000_000
"""Models with more parameters are run in float32."""


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- the models ------------------------------------------------------------------------------------


def of_transformers() -> dict[str, Make]:
    import transformers as T

    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    base = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    kv = {**base, "num_attention_heads": 8, "num_key_value_heads": 4}
    both = {"vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"input_ids": ids, "use_cache": False}
    pair = {**text, "decoder_input_ids": ids}
    sound = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    models: dict[str, tuple[str, Callable[[], Any], Any]] = {
        "Llama": ("LlamaForCausalLM", lambda: T.LlamaConfig(**kv), text),
        "Mistral": ("MistralForCausalLM", lambda: T.MistralConfig(**kv), text),
        "Qwen3": ("Qwen3ForCausalLM", lambda: T.Qwen3Config(**kv, head_dim=8), text),
        "Gemma3": ("Gemma3ForCausalLM", lambda: T.Gemma3TextConfig(**kv, head_dim=8), text),
        "Phi3": ("Phi3ForCausalLM", lambda: T.Phi3Config(**kv), text),
        "GPT2": (
            "GPT2LMHeadModel",
            lambda: T.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                                 bos_token_id=1, eos_token_id=2, pad_token_id=0),
            text,
        ),
        "GPTNeoX": ("GPTNeoXForCausalLM", lambda: T.GPTNeoXConfig(**base), text),
        "OPT": (
            "OPTForCausalLM",
            lambda: T.OPTConfig(vocab_size=99, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
                                num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64),
            text,
        ),
        "Mixtral": ("MixtralForCausalLM", lambda: T.MixtralConfig(**kv, num_local_experts=4), text),
        "Mamba": (
            "MambaForCausalLM",
            lambda: T.MambaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=8),
            text,
        ),
        "T5": (
            "T5ForConditionalGeneration",
            lambda: T.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                               decoder_start_token_id=0),
            pair,
        ),
        "BART": (
            "BartForConditionalGeneration",
            lambda: T.BartConfig(**both, max_position_embeddings=64),
            pair,
        ),
        "Whisper": (
            "WhisperForConditionalGeneration",
            lambda: T.WhisperConfig(**both, max_source_positions=32, max_target_positions=64, num_mel_bins=16,
                                    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
            {"input_features": sound, "decoder_input_ids": ids, "use_cache": False},
        ),
        "BERT": ("BertModel", lambda: T.BertConfig(**base), {"input_ids": ids}),
        "RoBERTa": ("RobertaModel", lambda: T.RobertaConfig(**base), {"input_ids": ids}),
        "ViT": ("ViTForImageClassification", lambda: T.ViTConfig(**vision), {"pixel_values": image}),
        "CLIP": (
            "CLIPModel",
            lambda: T.CLIPConfig(text_config=base, vision_config=vision, projection_dim=32),
            {"input_ids": ids, "pixel_values": image},
        ),
        "Swin": (
            "SwinModel",
            lambda: T.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
                                 window_size=4),
            {"pixel_values": image},
        ),
        "DINOv2": (
            "Dinov2Model",
            lambda: T.Dinov2Config(**{k: v for k, v in vision.items() if k != "intermediate_size"}),
            {"pixel_values": image},
        ),
    }  # fmt: skip

    def make(kind: str, config: Callable[[], Any], inputs: Any) -> Make:
        return lambda: (getattr(T, kind)(config()), inputs)

    return {name: make(*entry) for name, entry in models.items()}


def of_torchvision() -> dict[str, Make]:
    import torchvision

    def make(name: str) -> Make:
        size = 224 if name.startswith(("vit", "maxvit")) else 128 if name == "inception_v3" else 64
        extra = {"init_weights": False, "aux_logits": True} if name in ("inception_v3", "googlenet") else {}

        def build() -> tuple[nn.Module, Any]:
            model = torchvision.models.get_model(name, weights=None, **extra)
            return model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))

        return build

    names = torchvision.models.list_models(module=torchvision.models)
    return {name: make(name) for name in names}


TIMM = [
    "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "caformer_s18", "coat_tiny",
    "coatnet_0_224", "convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto",
    "crossvit_9_240", "cspresnet50", "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla34", "dpn68",
    "edgenext_small", "efficientformer_l1", "efficientnet_b0", "efficientvit_b0", "eva02_tiny_patch14_224",
    "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "ghostnet_100", "hardcorenas_a", "hgnet_tiny",
    "hiera_tiny_224", "hrnet_w18_small", "inception_next_tiny", "inception_v4", "lcnet_050", "levit_128s",
    "maxvit_tiny_tf_224", "mixer_s32_224", "mixnet_s", "mnasnet_100", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repghostnet_050",
    "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "resnet18",
    "resnetv2_50", "rexnet_100", "rdnet_tiny", "sequencer2d_s", "skresnet18", "starnet_s1",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tinynet_e", "tiny_vit_5m_224",
    "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "vgg11", "visformer_tiny",
    "vit_tiny_patch16_224", "volo_d1_224", "vovnet39a", "xception41", "xcit_nano_12_p8_224",
]  # fmt: skip


def of_timm() -> dict[str, Make]:
    import timm

    def make(name: str) -> Make:
        def build() -> tuple[nn.Module, Any]:
            model = timm.create_model(name)
            fixed = model.default_cfg.get("fixed_input_size")
            size = model.default_cfg["input_size"] if fixed else (3, 96, 96)
            return model, torch.randn(1, *size, generator=torch.Generator().manual_seed(0))

        return build

    return {name: make(name) for name in TIMM}


def of_others() -> dict[str, Make]:
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def yolo(version: str) -> Make:
        def build() -> tuple[nn.Module, Any]:
            from ultralytics import YOLO

            return YOLO(f"yolo{version}.yaml", verbose=False).model.float(), image

        return build

    def unet() -> tuple[nn.Module, Any]:
        import segmentation_models_pytorch

        return segmentation_models_pytorch.Unet("resnet18", encoder_weights=None), image

    def diffusion() -> tuple[nn.Module, Any]:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 7]),
                  "encoder_hidden_states": torch.randn(2, 5, 32)}  # fmt: skip
        return model, inputs

    def sage() -> tuple[nn.Module, Any]:
        from torch_geometric.nn.models import GraphSAGE

        return GraphSAGE(8, 32, 2, 3), {"x": torch.randn(12, 8), "edge_index": torch.randint(0, 12, (2, 30))}

    def unetr() -> tuple[nn.Module, Any]:
        from monai.networks.nets import SwinUNETR

        return SwinUNETR(in_channels=1, out_channels=2, feature_size=12), torch.rand(1, 1, 64, 64, 64)

    return {"yolov8n": yolo("v8n"), "yolo11n": yolo("11n"), "smp Unet": unet, "diffusers UNet": diffusion,
            "GraphSAGE": sage, "SwinUNETR": unetr}  # fmt: skip


ZOOS = {"transformers": of_transformers, "torchvision": of_torchvision, "timm": of_timm, "others": of_others}


# -- one model ---------------------------------------------------------------------------------------


def judge(zoo: str, name: str) -> dict[str, Any]:
    """The row of one model."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    make = ZOOS[zoo]()[name]
    model = None
    if zoo != "transformers":
        try:
            with torch.device("meta"):
                model = make()[0].eval()
        except (NotImplementedError, RuntimeError):  # some compute their widths with tensors
            model = make()[0].eval().to("meta")
    large = model is not None and parameters(model) > LARGE
    built, inputs = make() if not large else (model, torch.empty(1, 3, 224, 224, device="meta"))
    assert built is not None
    model = built.eval()
    options: dict[str, Any] = {"ratio": 0.5, "importance": "random"}
    if zoo == "transformers":
        options["where"] = lambda group: group.exact
    row: dict[str, Any] = {"zoo": zoo, "model": name, "params": parameters(model)}
    row["graph"] = round(parameters(fxprune.prune(model, inputs, **options)) / parameters(model), 4)
    started = time.process_time()
    plan = fxprune.plan(model, inputs, **options, into="module")
    result = plan.apply(model)
    row["seconds"] = round(time.process_time() - started, 1)
    row["class"] = round(parameters(result) / parameters(model), 4)
    row["same class"] = type(result) is type(model)
    row["held"] = [note for note in plan.notes if 'into="graph"' in note or "held node" in note]
    if large:
        return {**row, "verify": "planned on meta"}
    try:
        # grouped matrix products of experts run in float32 only
        dtype = torch.float32 if name == "Mixtral" or parameters(model) > SINGLE else torch.float64
        row["verify"] = str(fxprune.verify(model, result, plan, inputs, dtype=dtype))
    except fxprune.VerificationError as error:
        row["verify"] = f"FAILS: {error}"
    if hasattr(model, "generate") and zoo == "transformers" and model.can_generate():
        dtype = torch.float32 if name == "Mixtral" else torch.float64
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()
                 if k in ("input_ids", "input_features")}  # fmt: skip
        pair = [m.to(dtype).eval().generate(**given, max_new_tokens=20, do_sample=False)
                for m in (plan.mask(model), result)]  # fmt: skip
        row["generate"] = "equal" if torch.equal(*pair) else "DIFFERS"
        row["reopened"] = reopened(make()[0].eval(), inputs)
    return row


REOPEN = """
import sys
sys.modules["fxprune"] = None
import torch, transformers
inputs, logits, tokens, kind = torch.load(sys.argv[2], weights_only=False)
model = getattr(transformers, kind).from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    apart = (model(**inputs).logits - logits).abs().max() / logits.abs().max()
    given = {k: v for k, v in inputs.items() if k in ("input_ids", "input_features")}
    same = torch.equal(model.generate(**given, max_new_tokens=20, do_sample=False), tokens)
print(f"{float(apart):.0e}, tokens", "equal" if same else "DIFFER")
"""


def reopened(model: Any, inputs: dict[str, Any]) -> str:
    """How far the logits are from those of the network that was saved, in a process without fxprune."""
    options: dict[str, Any] = {"budget": fxprune.Budget(params=0.7), "importance": "random", "uniform": True}
    try:
        result: Any = fxprune.prune(model, inputs, into="module", **options)
    except BudgetError as error:
        return f"no: {error}".splitlines()[0][:200]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        saved = fxprune.save_pretrained(result, folder)
        if saved.config is None:
            return f"no: {saved.reason}"[:200]
        given = {k: v for k, v in inputs.items() if k in ("input_ids", "input_features")}
        tokens = result.generate(**given, max_new_tokens=20, do_sample=False)
        expected = Path(folder) / "expected.pt"
        torch.save((inputs, result(**inputs).logits, tokens, type(result).__name__), expected)
        run = subprocess.run(
            [sys.executable, "-c", REOPEN, folder, str(expected)], capture_output=True, text=True,
            check=False, cwd=folder, env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        return (run.stdout.strip() or f"FAILS: {run.stderr.strip()}").splitlines()[-1][:200]


def _send(to: Connection, zoo: str, name: str) -> None:
    try:
        to.send(judge(zoo, name))
    except Exception as error:  # whatever a model's own code raises is its row
        to.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


def run(zoo: str, names: list[str], limit: float) -> None:
    """Run each model in a process of its own, and note its row."""
    done = {(row["zoo"], row["model"]) for row in rows()}
    commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    said = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
    }
    for name in names or list(ZOOS[zoo]()):
        if (zoo, name) in done and not names:
            continue
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_send, args=(theirs, zoo, name))
        process.start()
        theirs.close()
        try:
            row = ours.recv() if ours.poll(limit) else {"error": f"more than {limit:g} s"}
        except EOFError:
            row = {"error": "the process was killed"}
        process.kill()
        process.join()
        row = {"zoo": zoo, "model": name, **row, **said}
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({k: v for k, v in row.items() if k not in ("held", "date", "commit")}, flush=True)


def rows() -> list[dict[str, Any]]:
    """The last row of each model."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in ROWS.read_text().splitlines() if ROWS.exists() else []:
        row = json.loads(line)
        found[row["zoo"], row["model"]] = row
    return list(found.values())


def table(path: Path) -> None:
    """Write the table."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "timm", "transformers")
    )
    lines = [
        "# Results in the model's own class",
        "",
        f"Written by `own_class.py`; Python {platform.python_version()}, {versions}.",
        'Random weights, ratio 0.5, `importance="random"`; transformers: exact groups only. Shares are of',
        f"parameters. Rows with `planned on meta` were not run (today those of more than {LARGE // 10**6} M",
        f"parameters); models of more than {SINGLE // 10**6} M are run in float32, all others in float64",
        "(at f62d4fb and before: float32 beyond 10 M; the rows that fail there were not run in float64).",
        "Commits that are not on main were those of a branch, before it was put on top of others.",
    ]
    for zoo in ZOOS:
        own = [row for row in rows() if row["zoo"] == zoo]
        if not own:
            continue
        own.sort(key=lambda row: row["model"].lower())
        good = [row for row in own if row.get("same class") and not str(row["verify"]).startswith("FAILS")]
        exact = [row for row in good if str(row["verify"]).startswith("exact")]
        bound = 0.10 if zoo == "transformers" else 0.05
        near, sure = ([r for r in some if r["class"] - r["graph"] <= bound] for some in (good, exact))
        every = len(ZOOS[zoo]())
        lines += [
            "", f"## {zoo}", "",
            f"Of {every} models {len(own)} have a row: {len(exact)} are verified in their own class "
            f"({len(good) - len(exact)} more were planned on meta). {len(near)} are within {bound} of the "
            f"graph form and not found wrong ({len(near) / every:.0%} of all), {len(sure)} of them verified "
            f"({len(sure) / every:.0%}).", "",
            "| model | graph | class | verify | generate | reopened | seconds | date | commit |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in own:
            verdict = str(row.get("verify", row.get("error", ""))).split(" (")[0].split(":")[0]
            own_cells = [row.get(name, "") for name in ("generate", "reopened", "seconds", "date", "commit")]
            cells = [row["model"], row.get("graph", ""), row.get("class", ""), verdict, *own_cells]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        missed = [row for row in good if row not in near and row.get("held")]
        if missed:
            lines += ["", "What keeps the models beyond that bound wider:", ""]
        for row in missed:
            kept = [note for note in row["held"] if " keeps " in note]
            reasons = dict.fromkeys(n.partition(" as wide as it is: ")[2].partition(";")[0] for n in kept)
            lines.append(f"- {row['model']}: {'; '.join(reasons)}.")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoos", nargs="*", help=", ".join(ZOOS))
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    for zoo in options.zoos:
        run(zoo, options.models, options.limit)
    if options.table:
        table(options.table)


if __name__ == "__main__":
    main()
