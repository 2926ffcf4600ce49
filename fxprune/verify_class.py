"""Verify for results in the model's own class: its own forward, in both modes, against the masked original.

Two steps. The graph that the plan describes, with the weights of the result, is compared with the masked
original (:mod:`.verify`); then the class's own ``forward`` is: with the masked original's where the plan is
exact, else with that graph's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from .api import graph_for
from .calls import as_one, generation
from .errors import VerificationError
from .files import told
from .inputs import normalize
from .passes import rewrite
from .passes.parameters import NarrowParameters
from .planning.plan import PruningPlan
from .program import named_tensors
from .random_numbers import drawn
from .trees import flatten

_OWN_PRECISION = 1e-6
"""What a class may differ by that computes parts in float32, whatever the dtype of its weights."""


def as_graph(model: nn.Module, pruned: nn.Module, plan: PruningPlan) -> nn.Module:
    """What the plan makes of ``model`` in the form of a graph, with the weights of ``pruned``.

    Raises:
        VerificationError: if ``pruned`` is not what the plan gives.
        PlanError: if the plan does not belong to the model.
    """
    graph = graph_for(plan, model)
    rewritten = rewrite(graph, plan.removed)
    if rewritten.violations:
        first = rewritten.violations[0]
        raise VerificationError(f"the plan cannot be carried out: node {first.node}: {first.reason}")
    own = dict(named_tensors(pruned))
    for name, tensor in rewritten.program.tensors.items():
        shape = tuple(own[name].shape) if name in own else None
        if shape != tuple(tensor.shape):
            has = "no such tensor" if shape is None else f"shape {shape}"
            raise VerificationError(
                f"{name} has shape {tuple(tensor.shape)} by the plan, {type(pruned).__name__} has {has}. "
                f"Give verify the module that plan.apply(model) returned."
            )
    program, narrowing = rewritten.program, rewritten.narrowing
    extras = NarrowParameters()(replace(graph.captured.program, tensors={}), narrowing).extras
    tensors = {name: own[name] for name in program.tensors}
    return replace(program, tensors=tensors, extras={**program.extras, **extras}).result(plan.model)


def compare_classes(
    model: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    graph: nn.Module,
    exact: bool,
    example_inputs: Any,
    convert: Callable[[nn.Module], nn.Module],
    cast: Callable[[Any], Any],
    limit: float,
) -> float:
    """The largest relative difference between what the result's own forward gives and what it should.

    Args:
        model: the original.
        pruned: the result.
        plan: the plan.
        graph: what :func:`as_graph` gave.
        exact: whether the result equals the masked original.
        example_inputs: real inputs.
        convert: brings a copy of a module into the precision of the comparison.
        cast: brings inputs there.
        limit: largest error allowed.

    Raises:
        VerificationError: where the outputs differ, or the class fails.
    """
    limit = max(limit, _OWN_PRECISION)
    reference = _without_dropout(convert(plan.mask(model) if exact else graph))
    candidate = _without_dropout(convert(pruned))
    given, worst = normalize(example_inputs, several=True), 0.0
    for training in (False, True) if exact else (False,):
        try:
            wanted = _outputs(reference.train(training), cast(given), 0)
        except VerificationError:
            if training:
                continue  # neither does the original run, on a batch of one say
            raise
        draws = training and _difference(wanted, _outputs(reference, cast(given), 1)) > limit
        got = _outputs(candidate.train(training), cast(given), 0)
        error = _difference(wanted, got)
        if exact and not error <= limit:  # which rounding may make; the graph was compared node by node
            narrow = _without_dropout(convert(graph)).train(training)
            error = _difference(_outputs(narrow, cast(given), 0), got)
        if draws and not error <= limit:
            continue  # what is drawn at random may depend on widths
        worst = max(worst, error)
        if not error <= limit:
            mode = "training" if training else "evaluation"
            raise VerificationError(
                f"in {mode} mode, {type(pruned).__name__}.forward differs by {error:.1e} (relative) from the "
                f"{'masked original' if exact else 'graph that the plan describes'}: was it changed since it "
                f"was pruned? Give verify what plan.apply(model) returned."
            )
    calls = generation(model, *given) if exact else None
    if calls is not None:  # with a cache, and the decode step that follows
        reference.eval()
        try:
            wanted = _outputs(reference, cast(calls), 0, cache=not plan.branches)
        except VerificationError:
            return worst  # the original has no such step
        got = _outputs(candidate.eval(), cast(calls), 0, cache=not plan.branches)
        error = _difference(wanted, got)
        worst = max(worst, error)
        if not error <= limit:
            raise VerificationError(
                f"in the decode step of generate(), {type(pruned).__name__}.forward differs by {error:.1e} "
                f"(relative) from the masked original. Give verify what plan.apply(model) returned."
            )
    return worst


def _without_dropout(module: nn.Module) -> nn.Module:
    for inner in module.modules():
        if isinstance(inner, _DropoutNd):
            inner.p = 0.0
    return module


def _outputs(module: nn.Module, inputs: Any, seed: int, cache: bool = True) -> list[Any]:
    """The tensors that a module returns; without ``cache`` not those inside of objects.

    Layers that are gone put nothing into a cache.
    """
    args, kwargs = copy.deepcopy(inputs)
    module = as_one(module, kwargs)
    with torch.no_grad(), drawn(seed):
        try:
            outputs = module(*args, **kwargs)
        except Exception as error:
            raise VerificationError(f"{type(module).__name__} fails: {told(error)}") from error
    tensors, structure = flatten(outputs)
    kept = zip(tensors, structure.leaves, strict=True)
    return [
        t.detach().clone() for t, leaf in kept if isinstance(t, torch.Tensor) and (cache or not leaf.inside)
    ]


def _difference(wanted: list[Any], got: list[Any]) -> float:
    """Largest relative difference; of outputs that may be narrower, only that they are as many."""
    if len(wanted) != len(got):
        return float("inf")
    worst = 0.0
    for one, other in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(got), strict=True):
        if one.shape != other.shape:
            continue
        if not one.is_floating_point():
            worst = max(worst, float(not torch.equal(one, other)))
            continue
        size = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
        apart = (one - other).abs()[one.isfinite() | other.isfinite()]
        error = float(apart.max()) / (size or 1.0) if apart.numel() else 0.0
        worst = max(worst, float("inf") if math.isnan(error) else error)
    return worst


__all__ = ["as_graph", "compare_classes"]
