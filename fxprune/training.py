"""Training around a plan: masks, and the state of optimisers and averages.

A masked model has the shapes of the original and computes what the narrowed one computes (where no inexact
operator runs over a narrowed axis). Removed entries have no gradient and stay zero, so whatever updates the
surviving entries one by one treats both alike: training the masked model and narrowing it gives what
training the narrowed one gives.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .api import graph_for, model_of
from .coupling.graph import CouplingGraph
from .coupling.units import Label
from .errors import PlanError, TrainingError
from .passes import Narrowing
from .passes.parameters import masked, narrow, narrowed_shape
from .planning.plan import PruningPlan

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def masks(plan: PruningPlan, model: nn.Module | CouplingGraph) -> dict[str, Tensor]:
    """True where an entry of a parameter is not masked. See :meth:`PruningPlan.masks`."""
    narrowing = _narrowing(plan, model)
    found = {}
    for name, tensor in narrowing.graph.captured.program.tensors.items():
        alive = masked(tensor, narrowing)
        if alive is not None:
            found[name] = alive.to(tensor.device, copy=True)
    for name, tensor in _gone(narrowing).items():
        if isinstance(tensor, nn.Parameter):
            found[name] = torch.zeros_like(tensor, dtype=torch.bool)
    return found


def _gone(narrowing: Narrowing) -> dict[str, Tensor]:
    """The tensors of residual branches that go as a whole."""
    left = narrowing.graph.captured.program.tensors
    tensors = narrowing.graph.whole.captured.program.tensors
    return {name: tensor for name, tensor in tensors.items() if name not in left}


def mask(plan: PruningPlan, given: nn.Module | CouplingGraph) -> nn.Module:
    """A masked copy of a model. See :meth:`PruningPlan.mask`."""
    model = model_of(given)
    # What a hook computed is no leaf, which deepcopy refuses.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    twin = copy.deepcopy(model, computed)
    hold = _Hold({name: ~alive for name, alive in masks(plan, given).items()})
    twin.register_forward_pre_hook(hold)
    hold(twin)
    return twin


class _Hold:
    """A forward pre-hook that keeps entries of parameters at zero, and their gradients too.

    Copies and pickles of a model carry its hooks along, but not those of its parameters: these are
    renewed at the first forward pass. A network that is made from the model by narrowing goes without.
    """

    until_narrowed = True

    def __init__(self, dead: dict[str, Tensor]) -> None:
        self.dead = dead
        self._hooked: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hold, (dict(self.dead),)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_exporting():
            return
        for name, parameter in module.named_parameters():
            dead = self.dead.get(name)
            if dead is None:
                continue
            if dead.device != parameter.device:
                dead = self.dead[name] = dead.to(parameter.device)
            # Past autograd, as the weights may be part of a graph that has yet to run backward.
            parameter.data.masked_fill_(dead, 0)
            if parameter.requires_grad and self._hooked.get(name) is not parameter:
                parameter.register_hook(partial(_without, dead))
                self._hooked[name] = parameter


def _without(dead: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(dead.to(gradient.device), 0)


def apply_state_dict(
    plan: PruningPlan, state: Mapping[str, Any], model: nn.Module | CouplingGraph | None
) -> dict[str, Any]:
    """The state dict of the narrowed model. See :meth:`PruningPlan.apply_state_dict`."""
    given = plan.came_from() if model is None else model
    if given is None:
        raise PlanError(
            f"the analysis that this plan for {plan.model} was made from is not there: the plan was read "
            "from a file, or its model is gone. Give apply_state_dict a copy of the model, too; one on the "
            "meta device does."
        )
    narrowing = _narrowing(plan, given)
    tensors, gone = narrowing.graph.whole.captured.program.tensors, _gone(narrowing)
    narrowed: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            narrowed[name] = copy.deepcopy(value)
            continue
        if name not in tensors:
            raise PlanError(
                f"the state dict holds {name!r}, which {plan.model} does not have{_nearest(name, tensors)}. "
                f"Take the state dict of the model itself (of a wrapper, that of its .module)."
            )
        if value.shape != tensors[name].shape:
            raise PlanError(
                f"{name!r} has shape {tuple(value.shape)} in the state dict and "
                f"{tuple(tensors[name].shape)} in the architecture that the plan is for."
            )
        if name not in gone:
            narrowed[name] = narrow(value, narrowing.graph.labels(tensors[name]), narrowing).detach()
    return narrowed


def narrow_optimizer(
    plan: PruningPlan, optimizer: _Optimizer, given: nn.Module | CouplingGraph, pruned: nn.Module
) -> _Optimizer:
    """An optimiser of the narrowed parameters. See :meth:`PruningPlan.apply_to_optimizer`."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrainingError(
            f"expected a torch.optim.Optimizer first, got {type(optimizer).__name__}: "
            f"plan.apply_to_optimizer(optimizer, model, pruned)."
        )
    narrowing, model = _narrowing(plan, given), model_of(given)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    targets, gone = dict(pruned.named_parameters(remove_duplicate=False)), _gone(narrowing)
    _check_attributes(optimizer)
    state: dict[Tensor, Any] = defaultdict(dict)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        new = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        new["params"] = []
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise TrainingError(
                    f"entry {place} of the optimiser's parameter group {number}, of shape "
                    f"{tuple(parameter.shape)}, is no parameter of the model. Give the model that the "
                    f"optimiser trains (plan.apply copies: the narrowed model has parameters of its own)."
                )
            name = names[id(parameter)]
            if name in gone:
                continue
            wanted = narrowed_shape(parameter.shape, narrowing.graph.labels(parameter), narrowing)
            target = targets.get(name)
            if target is None or tuple(target.shape) != wanted:
                has = "no such parameter" if target is None else f"shape {tuple(target.shape)}"
                raise TrainingError(
                    f"the plan narrows {name!r} to shape {wanted}, but the pruned model has {has}. Give the "
                    f"model that plan.apply(model) returned."
                )
            new["params"].append(target)
            if parameter in optimizer.state:
                narrowed = partial(
                    _entry, parameter, narrowing.graph.labels(parameter), narrowing, name, type(optimizer)
                )
                state[target] = {
                    key: narrowed(key, value) for key, value in optimizer.state[parameter].items()
                }
        groups.append(new)
    # The way in which pickle makes one: the arguments of the class need not be known.
    result = type(optimizer).__new__(type(optimizer))
    result.__setstate__(
        {"defaults": copy.deepcopy(optimizer.defaults), "state": state, "param_groups": groups}
    )
    return result


def _check_attributes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that keeps parameters or state in places of its own."""
    for name, value in vars(optimizer).items():
        if name in ("defaults", "state", "param_groups"):
            continue
        if any(isinstance(leaf, Tensor) and leaf.dim() for leaf in pytree.tree_leaves(value)):
            raise TrainingError(
                f"{type(optimizer).__name__} keeps tensors in its attribute {name!r}, of which only the "
                f"class knows how they belong to parameters. Make a new one for the pruned parameters."
            )


def _entry(
    parameter: Tensor,
    labels: list[Label | None],
    narrowing: Narrowing,
    name: str,
    kind: type,
    key: str,
    value: Any,
) -> Any:
    """One entry of the state of one parameter, narrowed with it."""
    if not isinstance(value, Tensor):
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise TrainingError(
                f"the state {key!r} that {kind.__name__} keeps for {name!r} is a {type(value).__name__} of "
                f"tensors, of which only the class knows what they mean. Make a new optimiser for the pruned "
                f"parameters."
            )
        return copy.deepcopy(value)
    if value.shape == parameter.shape:
        return narrow(value, labels, narrowing)
    if value.dim() == 0 or tuple(value.shape) == (1,):
        return value.detach().clone()
    if not any(narrowing.narrows(label) for label in labels):
        return value.detach().clone()
    raise TrainingError(
        f"the state {key!r} that {kind.__name__} keeps for {name!r} has shape {tuple(value.shape)}, which is "
        f"neither that of the parameter, {tuple(parameter.shape)}, nor a single number: it cannot be "
        f"narrowed. Make a new optimiser for the pruned parameters."
    )


def _narrowing(plan: PruningPlan, model: nn.Module | CouplingGraph) -> Narrowing:
    """What the plan does to ``model``."""
    return Narrowing(graph_for(plan, model), plan.removed)


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3)
    return f"; the nearest names are {', '.join(close)}" if close else ""
