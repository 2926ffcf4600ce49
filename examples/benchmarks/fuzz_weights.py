"""Damage files that ``fxprune.save`` wrote, load them, and see that nothing but a clear error comes of it.

    python examples/benchmarks/fuzz_weights.py --cases 10000

Listed cases (cut at several places, absurd lengths of the header, names with path parts, other types, shapes
and offsets, metadata of other kinds, deeply nested ones, without any), then random ones: bytes of the header
or of the weights replaced, or the text of the metadata. Loading must give a network or an error of fxprune's.
Reports the slowest case, and how much memory the process took more than before.
"""

import argparse
import collections
import datetime
import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fuzz_plans import Net

import fxprune
from fxprune.errors import FxpruneError

NAMES = ("../../etc/x", "/etc/x", "a/../b", "\x00", "a" * 10**6, "__class__", "stem.weight.__init__")
FIELDS: dict[str, tuple[Any, ...]] = {
    "dtype": ("F64", "I8", "BOOL", "BF16", "F99", None, 3),
    "shape": ([-1], [10**12], [0], [2**63], [1] * 10000, "a", None, [1.5]),
    "data_offsets": ([0, 10**12], [-4, 4], [8, 0], [0], None, [0, 0]),
}
METADATA = ("", "{}", "[]", "null", "{" * 5000, "[" * 10**5, "1e999", '{"a": 1}', "\x00")
LENGTHS = (0, 1, 2**63 - 1, 2**64 - 1, 2**40)


class File:
    """The parts of a file: header (JSON), and what lies behind."""

    def __init__(self, raw: bytes) -> None:
        (self.length,) = struct.unpack("<Q", raw[:8])
        self.raw, self.header = raw, json.loads(raw[8 : 8 + self.length])
        self.names = [name for name in self.header if name != "__metadata__"]

    def packed(self, header: Any, length: int | None = None) -> bytes:
        text = json.dumps(header).encode()
        written = len(text) if length is None else length
        return struct.pack("<Q", written) + text + self.raw[8 + self.length :]

    def edited(self, edit: Callable[[Any], Any]) -> bytes:
        header = json.loads(json.dumps(self.header))
        edit(header)
        return self.packed(header)


def listed(file: File) -> Iterator[tuple[str, bytes]]:
    """The cases that are always tried, each with its kind."""
    first, metadata = file.names[0], file.header["__metadata__"]
    for end in (0, 4, 8, 9, 20, file.length // 2, file.length + 8, len(file.raw) - 1):
        yield "cut", file.raw[:end]
    for length in (*LENGTHS, len(file.raw)):
        yield "length", file.packed(file.header, length)
    for name in NAMES:
        yield "name", file.edited(lambda header, name=name: header.update({name: header.pop(first)}))
    for field, values in FIELDS.items():
        for value in values:
            yield field, file.edited(lambda header, f=field, v=value: header[first].update({f: v}))
    for key, text in metadata.items():
        for value in (*METADATA, text[: len(text) // 2], text.replace("1", "999999999999")):
            yield (
                "metadata",
                file.edited(lambda header, k=key, v=value: header["__metadata__"].update({k: v})),
            )
        yield "metadata", file.edited(lambda header, key=key: header["__metadata__"].pop(key))
    yield "metadata", file.edited(lambda header: header.pop("__metadata__"))


def drawn(file: File, draw: random.Random) -> tuple[str, bytes]:
    """A random case."""
    if draw.random() < 0.5:
        found = bytearray(file.raw)
        for _ in range(draw.randint(1, 6)):
            end = 8 + file.length if draw.random() < 0.9 else len(found)
            found[draw.randrange(end)] = draw.randrange(256)
        return "bytes", bytes(found)
    key, text = draw.choice([*file.header["__metadata__"].items()])
    at = draw.randrange(len(text) + 1)
    inserted = draw.choice(["", "9" * 30, "../", "[", "}", '"', ",", "null", "-"])
    text = text[:at] + inserted + text[at + draw.randint(0, 4) :]
    return "text", file.edited(lambda header: header["__metadata__"].update({key: text}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000, help="random ones, beside those that are listed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--module", action="store_true", help="of a network of its own class, with a configuration"
    )
    options = parser.parse_args()
    draw, outcomes, slowest = random.Random(options.seed), collections.Counter[tuple[str, str]](), 0.0
    with TemporaryDirectory() as folder:
        path, damaged = Path(folder) / "whole.safetensors", Path(folder) / "damaged.safetensors"
        form: Any = {"into": "module", "uniform": True} if options.module else {}
        fxprune.save(fxprune.prune(Net(), torch.randn(1, 3, 8, 8), 0.5, **form), path)
        file = File(path.read_bytes())
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        cases = [*listed(file)]
        for number in range(len(cases) + options.cases):
            kind, content = cases[number] if number < len(cases) else drawn(file, draw)
            damaged.write_bytes(content)
            start = time.perf_counter()
            try:
                fxprune.load(Net, damaged)
                outcome = "read"
            except FxpruneError:
                outcome = "refused"
            except Exception as error:
                outcome = f"FAILED with {type(error).__name__}: {error}"
            outcomes[kind, outcome] += 1
            slowest = max(slowest, time.perf_counter() - start)
        assert {entry.name for entry in Path(folder).iterdir()} == {path.name, damaged.name}
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{datetime.date.today()}, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s")
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind}: {count} {outcome}")
    print(f"slowest {slowest:.2f} s, {more:.0f} MB more than before")


if __name__ == "__main__":
    main()
