"""Prune with ``torch.compile(model, backend="fxprune")``, without an import of fxprune, and time the result.

    python examples/benchmarks/compiled.py --inner inductor

Each network runs in a process of its own, in which nothing imports fxprune before torch does: the entry point
must be enough. Reported are the difference from the eager network that :func:`fxprune.prune` gives, whether a
second batch size lost the same channels, and the time of a forward pass against the unpruned network under
the same inner compiler.
"""

import argparse
import json
import subprocess
import sys

MODELS = {
    "ResNet-18": "torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)",
    "MobileNetV2": "torchvision.models.mobilenet_v2(num_classes=10), torch.randn(2, 3, 64, 64)",
    "ViT-B/16": "torchvision.models.vit_b_16(image_size=64), torch.randn(2, 3, 64, 64)",
    "BERT": "transformers.BertModel(transformers.BertConfig(num_hidden_layers=4)), "
    "torch.randint(0, 100, (2, 16))",
}
SCRIPT = """
import copy, json, sys, time, torch, torchvision
if "transformers" in {model!r}: import transformers
torch.manual_seed(0)
model, x = {model}
model.eval()
for p in model.parameters():  # a head of zeros says nothing
    if not p.any(): torch.nn.init.normal_(p, std=0.1)
def first(y): return y if isinstance(y, torch.Tensor) else y[0]
def seconds(run):
    run(x)
    times = []
    for _ in range(10):
        start = time.perf_counter(); run(x); times.append(time.perf_counter() - start)
    return sorted(times)[5]
with torch.no_grad():
    assert "fxprune" not in sys.modules
    fast = torch.compile(model, backend="fxprune", options={{"ratio": 0.5, "inner": {inner!r}}})
    got, second = first(fast(x)), first(fast(x.repeat(2, *[1] * (x.dim() - 1))))
    import fxprune
    eager = fxprune.prune(model, x, ratio=0.5)
    wanted = first(eager(x))
    scale = wanted.abs().max()
    plain = torch.compile(copy.deepcopy(model), backend={inner!r})
    print(json.dumps({{
        "difference": float((got - wanted).abs().max() / scale),
        "second": float((second[: len(x)] - got).abs().max() / scale),
        "pruned": seconds(fast), "plain": seconds(plain),
    }}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all of them by default")
    parser.add_argument("--inner", default="inductor", help="the backend that compiles what is left")
    options = parser.parse_args()
    print("| network | difference | second batch | plain | pruned |\n|---|---|---|---|---|")
    for name in options.models or MODELS:
        code = SCRIPT.format(model=MODELS[name], inner=options.inner)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {name} | {found['difference']:.0e} | {found['second']:.0e} | {1000 * found['plain']:.1f} ms "
            f"| {1000 * found['pruned']:.1f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
