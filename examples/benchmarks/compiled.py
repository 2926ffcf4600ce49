"""Prune with ``torch.compile(model, backend="fxprune")``, without an import of fxprune, and time the result.

    python examples/benchmarks/compiled.py          # all; writes COMPILED.md
    python examples/benchmarks/compiled.py BERT     # some, without a file

Each network runs in a process of its own, in which nothing imports fxprune before torch does: the entry point
must be enough. Reported are the difference from the eager network that :func:`fxprune.prune` gives, whether a
second batch size lost the same channels, and the time of a forward pass as a share of that of the unpruned
network under the same inner compiler (in turns, the median of 21 ratios).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

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
def share(run, other):
    run(x); other(x)
    ratios = []
    for _ in range(21):
        times = []
        for each in (run, other):
            start = time.perf_counter(); each(x); times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return sorted(ratios)[10]
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
        "time": share(fast, plain), "params": sum(p.numel() for p in eager.parameters())
        / sum(p.numel() for p in model.parameters()),
    }}))
"""


HEADING = """\
# `torch.compile(model, backend="fxprune", options={{"ratio": 0.5}})`

Written by `compiled.py`, {date}; Python {python}, torch {torch}, torchvision {torchvision}, transformers \
{transformers}, {machine}; inner backend {inner}, random weights, images of 64 x 64 or 16 tokens; \
average load {load:.1f} on {cores} cores.

`difference`: the largest one from the eager network that `fxprune.prune` gives, as a share of its largest
output; `second batch`: the same between two batch sizes; then what is left of parameters, and of the time
that `torch.compile(model, backend="{inner}")` takes.

| network | difference | second batch | parameters left | time left |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all of them by default")
    parser.add_argument("--inner", default="inductor", help="the backend that compiles what is left")
    options = parser.parse_args()
    lines = []
    for name in options.models or MODELS:
        code = SCRIPT.format(model=MODELS[name], inner=options.inner)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            lines.append(f"| {name} | {done.stderr.strip().splitlines()[-1]} | | | |")
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                f"| {name} | {found['difference']:.0e} | {found['second']:.0e} | {found['params']:.3f} "
                f"| {found['time']:.2f} |"
            )
        print(lines[-1], flush=True)
    if not options.models:
        heading = HEADING.format(
            inner=options.inner, date=datetime.date.today(), python=platform.python_version(),
            machine=platform.machine(), load=os.getloadavg()[2], cores=os.cpu_count(),
            **{name: metadata.version(name) for name in ("torch", "torchvision", "transformers")},
        )  # fmt: skip
        Path(__file__).with_name("COMPILED.md").write_text(heading + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
