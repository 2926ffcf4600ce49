"""Latency of a network from a table of its ATen calls, measured on the device that it runs on.

Each call is timed alone, at a few widths, and interpolated between them over its work: multiply-accumulates
where torch counts them, else the entries that are read and written. The sum over all calls is an estimate;
what the whole takes over that (dispatch, caches, fusion) is corrected by measuring the network itself, see
:func:`fxprune.plan`.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..convolution import with_fitting_groups
from ..coupling.branches import Branch
from ..coupling.units import Ids
from ..errors import BudgetError
from ..measure import flop_counter, measure_latency
from .cost_model import Call, CostModel

VERSION = 1
WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.125)
"""Shares of the original widths at which a call is timed."""

_SECONDS = 0.02
_TIMED, _PRECISION = 3.0, 0.02
_AGREED, _ROUNDS = 0.05, 6
ADVICE = "Ask for more, or let more go (keep, where, max_ratio, round_to and frozen axes limit what goes)."
aten = torch.ops.aten


class LatencyTable:
    """Seconds of ATen calls on one device; measured where asked for, kept in a JSON file.

    The file names the device, the number of threads and the version of torch, and is only used where they
    are the same; else it is begun anew. It is written under a temporary name and moved.

    Args:
        device: where the calls run.
        path: the file; by default one for the device and version in ``$FXPRUNE_CACHE``, or in
            ``~/.cache/fxprune``.
    """

    def __init__(self, device: torch.device, path: str | os.PathLike[str] | None = None) -> None:
        self.device = device
        self.about = {
            "fxprune_latency": VERSION,
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "torch": torch.__version__,
        }
        self.path = Path(path) if path is not None else self._default()
        self._points: dict[str, list[tuple[float, float]]] = self._read()
        self._changed = False

    def _default(self) -> Path:
        folder = os.environ.get("FXPRUNE_CACHE") or Path.home() / ".cache" / "fxprune"
        text = "-".join(str(value) for value in self.about.values())
        return Path(folder) / f"latency-{''.join(c if c.isalnum() or c in '.-' else '_' for c in text)}.json"

    def _read(self) -> dict[str, list[tuple[float, float]]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if any(data[name] != value for name, value in self.about.items()):
                return {}
            return {
                key: [(float(work), float(seconds)) for work, seconds in points]
                for key, points in data["calls"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # none yet, or no such file: it is measured again

    def save(self) -> None:
        """Write what was measured since the last time. A folder that cannot be written to is no error."""
        if not self._changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**self.about, "calls": self._points}, file, indent=0)
            os.replace(name, self.path)
        except OSError:
            return
        self._changed = False

    def points(self, call: Call, costs: CostModel) -> list[tuple[float, float]]:
        """``(work, seconds)`` of one call at several widths; empty for one that cannot be timed alone."""
        key = self._key(call, costs)
        if key not in self._points:
            self._points[key] = self._measure(call, costs)
            self._changed = True
        return self._points[key]

    def _key(self, call: Call, costs: CostModel) -> str:
        """The operator, its dtypes, shapes and numbers, and which dimensions narrow."""
        full = costs.full

        def text(leaf: Any) -> str:
            if hasattr(leaf, "dims"):
                shape = "x".join(f"{full[d]}{'*' if costs.narrows(d) else ''}" for d in leaf.dims)
                return f"{str(leaf.dtype).removeprefix('torch.')}[{shape}]"
            return str(leaf)

        leaves = pytree.tree_leaves((call.args, call.kwargs))
        return f"{call.operator}({', '.join(map(text, leaves))})"

    def _measure(self, call: Call, costs: CostModel) -> list[tuple[float, float]]:
        from torch.utils.benchmark import Timer  # slow to import

        found: dict[float, float] = {}
        for share in WIDTHS if any(map(costs.narrows, call.dims.tolist())) else WIDTHS[:1]:
            sizes = costs.scaled(share)
            args, kwargs, _ = call.given(sizes, self._tensor)
            try:
                args, kwargs = _fitted(call, args), {**kwargs, **self._on_device(call)}
                timer = Timer(
                    "call(*args, **kwargs)",
                    globals={"call": call.operator, "args": args, "kwargs": kwargs},
                    num_threads=torch.get_num_threads(),
                )
                with torch.no_grad(), torch.inference_mode(False):
                    call.operator(*args, **kwargs)
                    found[work(call, costs, sizes)] = timer.blocked_autorange(min_run_time=_SECONDS).median
            except Exception:  # noqa: BLE001  (whatever an operator raises on made-up values)
                continue
        return sorted(found.items())

    def _tensor(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            # Ones stay what they are through repeated in-place operators, and never become denormal.
            return torch.ones(shape, dtype=dtype, device=self.device)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _on_device(self, call: Call) -> dict[str, Any]:
        return {"device": self.device} if "device" in call.kwargs else {}


class Latency:
    """Estimates for any sizes which share of the original's latency is left.

    Args:
        costs: the cost model of the network.
        table: where the times of its calls come from; it is measured and saved.
        compiled: leave out all but convolutions, matrix products and attention: what is pointwise is fused
            with them.
    """

    def __init__(self, costs: CostModel, table: LatencyTable, compiled: bool = False) -> None:
        self.costs = costs
        self._curves = []
        counted = flop_counter().flop_registry
        for call in costs.calls:
            if call.operator.overloadpacket not in counted and (compiled or _is_view(call.operator)):
                continue
            points = table.points(call, costs)
            if points:
                works, seconds = (np.array(column) for column in zip(*points, strict=True))
                self._curves.append((call, works, np.maximum.accumulate(seconds)))
        table.save()
        before = self if costs.whole is costs else Latency(costs.whole, table, compiled)
        self._full = before.seconds(before.costs.full)

    def __call__(self, sizes: Ids) -> float:
        """Share of the latency that is left."""
        return self.seconds(sizes) / self._full if self._full else 1.0

    def seconds(self, sizes: Ids, nodes: Collection[str] | None = None) -> float:
        """Sum over all calls, or over those that these nodes make."""
        total = 0.0
        for call, works, seconds in self._curves:
            if nodes is None or call.node in nodes:
                total += float(np.interp(work(call, self.costs, sizes), works, seconds))
        return total

    def branch(self, branch: Branch) -> float:
        """Share of the latency that goes with a residual branch, at its full widths."""
        return self.seconds(self.costs.full, set(branch.nodes)) / self._full if self._full else 0.0


class Meter:
    """Holds a latency against the clock, and corrects what is asked of the estimate.

    Args:
        model: the original; it is run (a copy of it in evaluation mode, should it be training).
        args: its positional inputs.
        kwargs: its keyword inputs.
        target: share of the original's latency up to 1, or milliseconds.
        compiled: time under ``torch.compile``.
        table: file of the table, or None for the default.

    Attributes:
        aim: share of the estimated latency to keep, so that the measured one comes out as wanted.
        least: the smallest estimate that can be reached; the search sets it.
        note: what was measured last, for people; empty before.
        measured: the same as data: ``latency`` (share of the original's), ``milliseconds`` before and after,
            ``tries``; empty before.

    Raises:
        BudgetError: if the model has no weights, or is not on one device.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: float,
        compiled: bool = False,
        table: str | os.PathLike[str] | None = None,
    ) -> None:
        devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]} or {
            torch.device("cpu")
        }
        if len(devices) > 1 or next(iter(devices)).type == "meta":
            names = ", ".join(sorted(map(str, devices)))
            raise BudgetError(f"a latency is measured on one device that computes; the model is on {names}.")
        self.args, self.kwargs, self.target, self.compiled = args, kwargs, target, compiled
        self.table = LatencyTable(next(iter(devices)), table)
        self.original = self._ready(model)
        self.aim = min(target, 1.0) if target <= 1 else 1.0
        self.least = 0.0
        self.note = ""
        self.measured: dict[str, Any] = {}
        self._seen: list[_Try] = []
        self._settled = False
        if target > 1:  # milliseconds
            now = measure_latency({"original": self.original}, args, kwargs, _TIMED)["original"]
            self.aim = min(target / 1e3 / now, 1.0)

    def _ready(self, model: nn.Module) -> Any:
        """The model as it is timed; what runs once runs before."""
        if any(module.training for module in model.modules()):
            model = copy.deepcopy(model).eval()
        ready: Any = torch.compile(model, dynamic=False) if self.compiled else model
        with torch.no_grad():
            ready(*self.args, **self.kwargs)
        return ready

    def estimate(self, costs: CostModel) -> Latency:
        """The estimate of a network's latency."""
        return Latency(costs, self.table, self.compiled)

    def accepts(self, estimated: float, narrowed: nn.Module) -> bool:
        """Time ``narrowed``, whose estimate is the share ``estimated`` of the original's.

        False where the latency is not yet as wanted; ``aim`` is another one then. After :data:`_ROUNDS`
        tries, or when the same network comes again, the nearest so far is aimed at once more and accepted.

        Raises:
            BudgetError: if it is too slow, and nothing more can go.
        """
        if self._settled:
            return True
        if any(seen.estimated == estimated for seen in self._seen):
            return self._settle(estimated)
        pair = {"original": self.original, "narrowed": self._ready(narrowed)}
        seconds = measure_latency(pair, self.args, self.kwargs, _TIMED, _PRECISION)
        before, after = seconds["original"], seconds["narrowed"]
        wanted = self.target if self.target <= 1 else self.target / 1e3 / before
        self._seen.append(_Try(self.aim, estimated, after / before, wanted, before, after))
        self._report(self._seen[-1])
        slack = estimated < 0.95 * self.aim or estimated >= 1  # other limits bind, or nothing has to go
        off = self._seen[-1].off
        if abs(off) <= _AGREED or (off <= 0 and slack):
            return True
        if off > 0 and estimated <= self.least:
            raise BudgetError(
                f"latency = {self.target:g} ({wanted:.3g} of the original) cannot be met: the least that can "
                f"be reached is {after / before:.3g} of the original, {after * 1e3:.3g} of "
                f"{before * 1e3:.3g} ms, measured with everything removed that may be. {ADVICE}"
            )
        if len(self._seen) == _ROUNDS:
            return self._settle(estimated)
        self.aim = self._corrected()
        return False

    def _settle(self, estimated: float) -> bool:
        """Whether the network at hand is the nearest of all that were seen; else that one is aimed at."""
        nearest = min(self._seen, key=lambda seen: abs(seen.off))
        self._settled, self.aim = True, nearest.aim
        self._report(nearest)
        return nearest.estimated == estimated

    def _report(self, seen: _Try) -> None:
        mode = "compiled" if self.compiled else "eager"
        self.measured = {
            "latency": seen.measured,
            "milliseconds": [seen.before * 1e3, seen.after * 1e3],
            "tries": len(self._seen),
        }
        self.note = (
            f"latency: {seen.measured:.2f} of the original, {seen.wanted:.2f} was wanted; "
            f"{seen.before * 1e3:.3g} -> {seen.after * 1e3:.3g} ms, medians, {mode}, "
            f"{self.table.about['device']}; the table's estimate was {seen.estimated:.2f}"
        )

    def _corrected(self) -> float:
        """The estimate at which the measured latency should be as wanted.

        By a straight line between the nearest tries on both sides, the original (1 at 1) being one of them;
        on from the original through the fastest try where none was fast enough.
        """
        last = self._seen[-1]
        tries = [(1.0, 1.0), *((seen.estimated, seen.measured) for seen in self._seen)]
        slow = [point for point in tries if point[1] > last.wanted]
        fast = [point for point in tries if point[1] <= last.wanted]
        (above, high), (below, low) = (min(slow), max(fast)) if fast else (tries[0], min(slow))
        if above <= below or high <= low:  # the clock says that a narrower network is slower
            return min(last.estimated * last.wanted / last.measured, 1.0)
        return min(below + (above - below) * (last.wanted - low) / (high - low), 1.0)


@dataclass(frozen=True)
class _Try:
    """A network that was timed.

    Attributes:
        aim: the estimate that was asked for.
        estimated: share of the original's latency, by the table.
        measured: the same, by the clock.
        wanted: what it was to be.
        before: seconds of the original.
        after: seconds of the narrowed network.
    """

    aim: float
    estimated: float
    measured: float
    wanted: float
    before: float
    after: float

    @property
    def off(self) -> float:
        """How far it is from what was wanted, as a share of that; above 0 if it is too slow."""
        return self.measured / self.wanted - 1


def work(call: Call, costs: CostModel, sizes: Ids) -> float:
    """What the time of a call grows with: FLOPs, or entries of its operands."""
    if call.operator.overloadpacket in flop_counter().flop_registry:
        return float(costs.flops(call, sizes))
    return float(sum(sizes[list(operand.dims)].prod() for operand in call.operands))


@cache
def _is_view(operator: Any) -> bool:
    """Whether an operator only looks at its input in another way."""
    returned = [value.alias_info for value in operator._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _fitted(call: Call, args: Any) -> Any:
    """Arguments in which numbers that speak of widths fit the tensors."""
    packet, args = call.operator.overloadpacket, list(args)
    if packet is aten.convolution:
        args = with_fitting_groups(args)
    elif packet is aten.native_layer_norm:
        args[1] = list(args[0].shape[-len(args[1]) :])
    elif packet is aten.native_group_norm:
        args[4] = args[0].shape[1]
    return args


@cache
def device_name(device: torch.device) -> str:
    """The name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{device.type}: {line.partition(':')[2].strip()}"
    except OSError:
        pass
    return f"{device.type}: {platform.processor() or platform.machine()}"


__all__ = ["Latency", "LatencyTable", "Meter", "device_name", "work"]
