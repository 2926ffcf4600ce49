"""What a network costs: parameters, multiply-accumulates, activations, bytes, and measured latency.

All but latency are counted on the meta device: no weight is copied and no activation is computed, so
counting a network costs its graph, whatever its size. Latency is measured on the real network, because
nothing else tells it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .capture.dynamo import named_inputs
from .capture.patches import PlainAttention
from .errors import ExampleInputsError
from .files import told
from .inputs import normalize, to_meta
from .random_numbers import drawn

__all__ = ["Count", "count", "flop_counter", "latency_ratio", "measure_latency"]


_TURN, _TURNS, _PATIENCE = 1e-3, 5, 5


@dataclass(frozen=True)
class Count:
    """What one forward pass over given inputs costs.

    Attributes:
        params: number of parameter entries; a tied parameter counts once.
        macs: multiply-accumulates of one forward pass over the whole batch, in convolutions, matrix
            products and attention (pointwise work is not counted).
        activations: number of entries of what these operators put out, over the whole batch: what a forward
            pass writes, and a better guide to its time than MACs on many devices (Radosavovic et al., CVPR
            2020, https://arxiv.org/abs/2003.13678; there for convolutions only).
        bytes: size of all parameters and of the buffers that a ``state_dict`` holds, as stored on disk.
    """

    params: int
    macs: int
    activations: int
    bytes: int


def count(model: nn.Module, example_inputs: Any) -> Count:
    """Count parameters, MACs, activations and bytes of ``model``; it is not touched.

    It is not run, either, unless its control flow depends on values: then a copy of it is, once.

    Args:
        model: any module; it may live on the meta device. It is counted as in eval mode.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Their shapes
            matter, and their values where control flow depends on them: MACs are those of the whole batch.

    Raises:
        ExampleInputsError: the model does not run on inputs of these shapes, or has lazy parameters whose
            shapes are not known yet.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise ExampleInputsError(
                f"the shape of {name!r} is not known yet (a lazy module); "
                "run the model once on real inputs, then count it"
            )
    # keep_vars: the tensors themselves, so that a tied one is recognised.
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    args, kwargs = normalize(example_inputs)
    macs, activations = _work(model, args, kwargs)
    inputs = named_inputs(model, args).values()
    saved |= {id(t): t for t in inputs}
    parameters = {id(p): p for p in [*model.parameters(), *inputs] if isinstance(p, nn.Parameter)}
    return Count(
        params=sum(p.numel() for p in parameters.values()),
        macs=macs,
        activations=activations,
        bytes=sum(t.numel() * t.element_size() for t in saved.values()),
    )


def measure_latency(
    models: Mapping[str, nn.Module],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    min_run_time: float = 1.0,
    precision: float | None = None,
) -> dict[str, float]:
    """Median seconds of one forward pass of each model, without gradients.

    The models take turns after every pass (or as many as fill a millisecond), so that a machine that slows
    down or speeds up does so for all of them. Train and eval modes are used as they are found.

    Args:
        models: what to measure, by name.
        args: positional inputs of every model.
        kwargs: keyword inputs of every model.
        min_run_time: seconds to spend on each model, all turns together; each has five at least.
        precision: go on, for five times as long at most, until each model's share of the first one's time
            is known that well: ``0.02`` is to 2 %, with 95 % confidence.
    """
    from torch.utils.benchmark import Timer  # slow to import, and it warns where CUDA is half installed

    times: dict[str, list[float]] = {name: [] for name in models}
    timers = {
        name: Timer(
            "model(*args, **kwargs)",
            globals={"model": model, "args": args, "kwargs": dict(kwargs or {})},
            num_threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }
    with torch.no_grad():
        passes = {name: max(1, int(_TURN / timer.timeit(1).mean)) for name, timer in timers.items()}
        start, enough = time.perf_counter(), len(times) * min_run_time
        for turn in itertools.count():
            took = time.perf_counter() - start
            if (
                turn >= _TURNS
                and took >= enough
                and (precision is None or took >= _PATIENCE * enough or _spread(times) <= precision)
            ):
                break
            for name in [*timers][:: -1 if turn % 2 else 1]:
                times[name].append(timers[name].timeit(passes[name]).mean)
    return {name: median(seconds) for name, seconds in times.items()}


def _spread(times: Mapping[str, list[float]]) -> float:
    """Half the width of the 95 % confidence interval of the median share of the first one's time.

    Of shares turn by turn; the interval lies between two of them, by the binomial distribution of ranks.
    """
    first, *others = times.values()
    spread = 0.0
    for seconds in others:
        shares = sorted(b / a for a, b in zip(first, seconds, strict=True))
        count = len(shares)
        low = int((count - 1.96 * count**0.5) / 2) - 1
        if low < 0:
            return float("inf")
        spread = max(spread, (shares[-1 - low] - shares[low]) / 2 / median(shares))
    return spread


def latency_ratio(a: nn.Module, b: nn.Module, example_inputs: Any = (), min_run_time: float = 1.0) -> float:
    """Latency of ``b`` as a share of the latency of ``a``: 0.5 says that ``b`` takes half the time.

    Args:
        a: a network.
        b: another one for the same inputs.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        min_run_time: as for :func:`measure_latency`.

    Raises:
        ExampleInputsError: for inputs of any other kind.
    """
    args, kwargs = normalize(example_inputs)
    seconds = measure_latency({"a": a, "b": b}, args, kwargs, min_run_time)
    return seconds["b"] / seconds["a"]


@cache
def flop_counter() -> ModuleType:
    """``torch.utils.flop_counter``, imported when something is counted: it imports all of triton.

    Where there is no triton it warns of that, though nothing here has kernels of triton's: that is silenced.
    """
    warns = logging.getLogger("torch.utils.flop_counter")
    level = warns.level
    warns.setLevel(logging.ERROR)
    try:
        return import_module("torch.utils.flop_counter")
    finally:
        warns.setLevel(level)


class _Activations(TorchDispatchMode):
    """Counts the entries of what the operators give that ``FlopCounterMode`` counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_counter().flop_registry:
            first = out if isinstance(out, Tensor) else out[0]  # attention also gives what backward needs
            self.count += first.numel()
        return out


def _work(model: nn.Module, args: Any, kwargs: Any) -> tuple[int, int]:
    """Multiply-accumulates and activations of one forward pass, over meta inputs if that can be."""
    # The default device catches tensors that the forward makes itself, such as a mask.
    try:
        with torch.device("meta"):
            return _counted(_meta_copy(model), to_meta(args), to_meta(kwargs))
    except Exception as error:
        tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
        if not any(isinstance(t, Tensor) and t.is_meta for t in tensors):
            # Control flow may depend on values: run a copy that shares nothing but the parameters.
            with contextlib.suppress(Exception), drawn():
                memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
                twin = copy.deepcopy(model, memo)
                return _counted(twin, *pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))
        raise ExampleInputsError(
            f"{type(model).__name__} does not run on the example inputs with shapes only (meta tensors), "
            f"which counting its MACs needs: {told(error)}"
        ) from error


def _counted(twin: nn.Module, args: Any, kwargs: Any) -> tuple[int, int]:
    counter, activations = flop_counter().FlopCounterMode(display=False), _Activations()
    with PlainAttention(), torch.no_grad(), activations, counter:
        twin.eval()(*args, **kwargs)
    # FlopCounterMode counts a multiplication and an addition as two.
    return int(counter.get_total_flops()) // 2, activations.count


def _meta_copy(model: nn.Module) -> nn.Module:
    """Deep-copy ``model`` with every tensor that it holds replaced by a meta tensor; ties are kept."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors(vars(module).values(), set()):
            memo.setdefault(id(tensor), _meta_twin(tensor))
    return copy.deepcopy(model, memo)


def _meta_twin(tensor: Tensor) -> Tensor:
    # No gradient: FlopCounterMode stumbles over a parameter that is an input of a module.
    twin = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


def _tensors(values: Iterable[Any], seen: set[int]) -> Iterator[Tensor]:
    """Tensors among ``values``, also inside nested dicts, lists, tuples and sets, but not inside modules."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))  # containers may hold themselves
            yield from _tensors(value.values() if isinstance(value, Mapping) else value, seen)
