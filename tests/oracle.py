"""The oracle of the tests: prune a network, and judge the result by means of its own.

``check`` never trusts :func:`fxprune.verify` alone. It masks the original by hand, from the members of the
groups, and compares whole networks in float64.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.api import graph_for

TOLERANCE = 1e-8
"""Largest relative error allowed in float64."""


def check(
    model: nn.Module,
    inputs: Any,
    ratio: float = 0.5,
    where: Callable[[fxprune.Group], bool] | None = None,
    narrows: Iterable[str] = (),
    kept_at_most: float | None = None,
    *,
    frozen: Mapping[str, str] | None = None,
    exact: bool | None = None,
    shrinks: bool = True,
    batch_dim: int | None = 0,
    heads: float = 0.0,
    free_outputs: str | tuple[str, ...] = (),
    fill_outputs: str | tuple[str, ...] = "auto",
) -> tuple[fxprune.PruningPlan, fx.GraphModule]:
    """Prune ``model``, judge the result, and return it with its plan.

    Args:
        model: the network; degenerate parameters are re-initialised in place before anything else.
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        ratio: as for :func:`fxprune.plan`.
        where: as for :func:`fxprune.plan`.
        narrows: names of parameters that must have become smaller.
        kept_at_most: largest share of the parameters that may be left.
        frozen: parameter axes (``"conv.weight[0]"``) that must be frozen, and a pattern for the reason.
        exact: whether all narrowed groups must be exact (True), some must be inexact (False), or either.
        shrinks: whether at least one parameter must have become smaller.
        batch_dim: dimension along which the inputs may grow; None where the network has a literal batch.
        heads: as for :func:`fxprune.plan`.
        free_outputs: as for :func:`fxprune.plan`; where exact, these must be slices of the original's.
        fill_outputs: as for :func:`fxprune.plan`.
    """
    torch.manual_seed(0)
    stir(model)
    before = snapshot(model)
    options: dict[str, Any] = {"heads": heads, "free_outputs": free_outputs, "fill_outputs": fill_outputs}
    plan = fxprune.plan(model, inputs, ratio=ratio, where=where, **options)
    pruned = plan.apply(model)
    assert snapshot(model) == before, "the original was changed"
    _same_interface(model, pruned)

    old, new = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, pruned))
    graph = graph_for(plan, model)
    for name in narrows:
        assert new[name].numel() < old[name].numel(), (
            f"{name} was not narrowed; {why_kept(graph, name)}; {plan!r}"
        )
    if shrinks:
        assert any(new[name].numel() < old[name].numel() for name in old), f"nothing was narrowed: {plan!r}"
    if kept_at_most is not None:
        share = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
        assert share <= kept_at_most, (
            f"{share:.3f} of the parameters are left, at most {kept_at_most} were wanted"
        )
    found = {str(entry.axis): entry for entry in graph.frozen}
    for axis, reason in (frozen or {}).items():
        assert axis in found, f"{axis} should be frozen; frozen are {[str(f) for f in found.values()]}"
        assert re.search(reason, str(found[axis])), str(found[axis])

    narrowed = [group for group in graph.groups if plan.removed.get(group.name)]
    if exact is not None:
        assert all(group.exact for group in narrowed) is exact, [
            group for group in narrowed if not group.exact
        ]
    verdict = fxprune.verify(model, pruned, plan, inputs)
    assert verdict.error < TOLERANCE
    columns = all(group.exact for group in narrowed)
    assert verdict.exact == columns or (heads and verdict.exact)  # whole rows go from inexact groups, too
    if verdict.exact:
        compare(model, graph, plan, pruned, inputs, batch_dim, bool(free_outputs))
    else:  # what is exact among it must be so as a whole
        part = fxprune.plan(
            model,
            inputs,
            ratio,
            where=lambda g: g.exact and (where is None or where(g)),
            **options,
        )
        narrowed_part = part.apply(model)
        compare(model, graph_for(part, model), part, narrowed_part, inputs, batch_dim, bool(free_outputs))
    _same_gradients(model, pruned, inputs)
    assert snapshot(model) == before, "the original was changed"
    return plan, pruned


def compare(
    model: nn.Module,
    graph: fxprune.CouplingGraph,
    plan: fxprune.PruningPlan,
    pruned: nn.Module,
    inputs: Any,
    batch_dim: int | None = 0,
    slices: bool = False,
) -> None:
    """Assert that ``pruned`` computes what the masked original computes, also on a larger batch.

    With ``slices``, outputs may be what is left of the original's along one dimension, in its order.
    """
    original = masked(model, graph, plan).double().eval()
    candidate = copy.deepcopy(pruned).double().eval()
    given = [inputs] if batch_dim is None else [inputs, enlarged(inputs, batch_dim)]
    for example in given:
        example = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)
        with torch.no_grad():
            wanted, got = call(original, example), call(candidate, example)
        if slices:
            leaves, spec = pytree.tree_flatten(wanted)
            found = [left_of(*pair) for pair in zip(leaves, pytree.tree_leaves(got), strict=True)]
            wanted = pytree.tree_unflatten(found, spec)
        assert same_structure(wanted, got), f"outputs {describe(got)} in place of {describe(wanted)}"
        error = difference(got, wanted)
        assert error < TOLERANCE, f"relative error {error:.1e} against the masked original"


def left_of(wanted: Any, got: Any) -> Any:
    """The slices of ``wanted`` that ``got`` consists of, if they differ in size along one dimension."""
    if not isinstance(wanted, Tensor) or wanted.dim() != got.dim():
        return wanted
    differing = [d for d in range(got.dim()) if got.shape[d] < wanted.shape[d]]
    if len(differing) != 1:
        return wanted
    (dim,), place, index = differing, 0, []
    for column in got.unbind(dim):
        while place < wanted.shape[dim] and difference(column, wanted.select(dim, place)) > TOLERANCE:
            place += 1
        index.append(place)
        place += 1
    assert place <= wanted.shape[dim], "an output holds what the original's does not, or in disorder"
    return wanted.index_select(dim, torch.tensor(index))


def masked(model: nn.Module, graph: fxprune.CouplingGraph, plan: fxprune.PruningPlan) -> nn.Module:
    """A copy of ``model`` whose removed parameter entries are zero."""
    twin = copied(model)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    gone_from = {group.name: set(plan.removed.get(group.name, ())) for group in graph.groups}
    dying = [(member, list(gone_from[group.name])) for group in graph.groups for member in group.members]
    for rows in graph.rows:  # what is indexed by head goes with the head
        gone_rows = [
            number
            for number, row in enumerate(rows.rows)
            if all(gone_from[name].issuperset(units.tolist()) for name, units in row.items())
        ]
        dying += [(member, gone_rows) for member in rows.members]
    zero: dict[str, Tensor] = {}
    spared: dict[str, Tensor] = {}  # directions of a weight norm whose size goes
    for member, gone in dying:
        if gone and member.trainable:
            name = member.axis.name
            order = [*member.over, member.axis.dim]
            dead = torch.from_numpy(np.isin(member.units, list(gone)))
            shape = [size if d in order else 1 for d, size in enumerate(parameters[name].shape)]
            dead = dead.permute([order.index(d) for d in sorted(order)]).reshape(shape)
            masks = zero if member.masked else spared
            masks[name] = masks[name] | dead if name in masks else dead
    for name, dead in zero.items():
        with torch.no_grad():
            parameters[name].masked_fill_(dead & ~spared[name] if name in spared else dead, 0)
    return twin


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; what a hook computed is no leaf, which deepcopy refuses."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)


def stir(model: nn.Module) -> nn.Module:
    """Give constant parameters (ones, zeros, layer scales) and batch-norm statistics random values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def snapshot(model: nn.Module) -> Any:
    """Everything about a model that pruning must leave alone, as something that compares with ``==``."""
    tensors = {}
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            tensors[name] = (
                kind,
                id(tensor),
                tensor.dtype,
                tuple(tensor.shape),
                tensor.stride(),
                data,
                tensor.requires_grad,
                tensor.grad is None,
            )
    modules = {
        path: (type(module), module.training, list(module.__dict__), list(module._modules))
        for path, module in model.named_modules(remove_duplicate=False)
    }
    return tensors, modules, repr(model)


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on inputs as fxprune takes them; the inputs are not written to."""
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    torch.manual_seed(0)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def enlarged(inputs: Any, dim: int) -> Any:
    """The same inputs with a batch of twice the size."""
    return pytree.tree_map_only(
        Tensor, lambda t: torch.cat([t, t.flip(dim)], dim) if t.dim() > dim else t, inputs
    )


def same_structure(a: Any, b: Any) -> bool:
    """Whether two outputs are trees of the same form with tensors of the same shape and dtype."""
    (x, spec), (y, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return (
        spec == other
        and type(a) is type(b)
        and [describe(leaf) for leaf in x] == [describe(leaf) for leaf in y]
    )


def describe(tree: Any) -> str:
    """Shapes and dtypes of a tree of tensors, as text."""
    return str(pytree.tree_map_only(Tensor, lambda t: f"{t.dtype}{list(t.shape)}", tree))


def difference(got: Any, wanted: Any) -> float:
    """Largest difference relative to the largest magnitude, over all tensors."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True):
        if isinstance(b, Tensor) and b.numel():
            wide = torch.complex128 if b.is_complex() else torch.float64
            a, b = (torch.nan_to_num(t.to(wide), nan=12345.0) for t in (a, b))
            scale = float(b.abs().max())
            worst = max(worst, float((a - b).abs().max()) / (scale or 1.0))
    return worst


def why_kept(graph: fxprune.CouplingGraph, name: str) -> str:
    """What the analysis says about the frozen axes of a parameter, for a failing assertion."""
    frozen = [str(entry) for entry in graph.frozen if entry.axis.name == name]
    return f"held {graph.held}, frozen {frozen}"


def _same_interface(model: nn.Module, pruned: nn.Module) -> None:
    """Names, order, dtypes and flags of the result are those of the original."""
    assert isinstance(pruned, fx.GraphModule)
    assert list(pruned.state_dict()) == list(model.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        old, new = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, pruned))
        assert old.keys() <= new.keys()
        for name, tensor in old.items():
            assert type(new[name]) is type(tensor), name
            assert (new[name].dtype, new[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
            assert new[name].data_ptr() != tensor.data_ptr() or not tensor.numel(), f"{name} shares memory"
    flags = {path: module.training for path, module in pruned.named_modules(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in flags:
            assert flags[path] == module.training, f"training flag of {path!r}"


def _same_gradients(model: nn.Module, pruned: nn.Module, inputs: Any) -> None:
    """In training mode, the parameters that receive a gradient are the same ones."""
    reached = []
    for module in (model, pruned):
        module = copied(module).double().train()
        example = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        outputs = [
            t for t in pytree.tree_leaves(call(module, example)) if isinstance(t, Tensor) and t.requires_grad
        ]
        if not outputs:
            return
        torch.stack([t.abs().sum() for t in outputs]).sum().backward()
        reached.append({name for name, p in module.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1]
