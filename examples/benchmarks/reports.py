"""How large the HTML reports of large networks are, and how fast a browser opens them.

    python examples/benchmarks/reports.py    # needs Chromium; writes REPORTS.md

Each report is opened three times in a headless Chromium without a network and with an empty profile. The time
is that from when the browser begins to read the file until all of it is read and laid out; the slowest of the
three is written down.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxprune
from fxprune.pages import write_report

_LOOK = """<script>addEventListener("load", () => {
  const height = document.body.getBoundingClientRect().height;  // so that it is laid out
  document.title = height > 0 ? "SEEN" + performance.now() + "SEEN" : "";
});</script></body>"""


def vit() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import vit_l_16

    return vit_l_16(), torch.zeros(1, 3, 224, 224)


def llama() -> tuple[nn.Module, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.zeros(1, 16, dtype=torch.int64)


def densenet() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import densenet201

    return densenet201(), torch.zeros(1, 3, 224, 224)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "ViT-L/16": vit,
    "Llama, 24 layers (GQA)": llama,
    "DenseNet-201": densenet,
}


def opened(browser: str, page: Path) -> float:
    """Milliseconds until a page is read and laid out."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "report.html"
        copy.write_text(page.read_text().replace("</body>", _LOOK))
        switches = [
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
            "disable-background-networking", "disable-component-update", "proxy-server=127.0.0.1:9",
            f"user-data-dir={folder}/profile", "window-size=1400,900", "dump-dom",
        ]  # fmt: skip
        command = [browser, *(f"--{switch}" for switch in switches), copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout.split("<title>SEEN")[1].split("SEEN")[0])


def line(name: str, browser: str) -> str:
    """The row of a network."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    graph = fxprune.analyze(model.eval(), x)
    plan = fxprune.plan(graph, 0.5, "l2")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        start = time.perf_counter()
        size = write_report(graph, plan, page)
        made = time.perf_counter() - start
        slowest = max(opened(browser, page) for _ in range(3))
    groups = len(graph.groups)
    return f"| {name} | {groups} | {made:.1f} s | {size / 1e6:.2f} MB | {slowest:.0f} ms |\n"


def main() -> None:
    """Write the table."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium on the path (apt-get install chromium)")
    version = subprocess.run(
        [browser, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    text = (
        "# HTML reports\n\n"
        f"Written by `reports.py`, {datetime.date.today()}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, {version}; average load "
        f"{os.getloadavg()[2]:.1f} on {os.cpu_count()} cores.\n\n"
        "| network | groups | time to write | size | opened in |\n|---|---|---|---|---|\n"
    )
    for name in NETWORKS:
        text += (row := line(name, browser))
        print(row.strip(), flush=True)
    Path(__file__).with_name("REPORTS.md").write_text(text)


if __name__ == "__main__":
    main()
