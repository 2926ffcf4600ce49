"""Sparse training: regularisers that push the units of groups towards zero before they are removed.

Each is made once, from the analysis of the model, and called between the backward pass and the step of the
optimiser; it adds to the gradients of the parameters that have one::

    reg = fxprune.regularize.GroupNorm(fxprune.analyze(model, x), model, strength=1e-4)
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        reg.step()
        optimizer.step()

With a gradient scaler, call ``scaler.unscale_(optimizer)`` before. After narrowing, make a new one.
Parameters that nothing can be removed from are left alone; what belongs to two groups (the inputs and the
outputs of a layer) gets the sum of both.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .coupling.graph import CouplingGraph
from .coupling.groups import Group, Member
from .errors import PlanError, TrainingError
from .planning.plan import PruningPlan

__all__ = ["BNScale", "GroupNorm", "GrowingReg"]


@dataclass(frozen=True, eq=False)
class _Entries:
    """A parameter, and the unit of a group that each entry goes with.

    Attributes:
        parameter: of the model that is trained.
        name: its name.
        units: positions in the group, -1 for none; broadcasts to the parameter's shape.
    """

    parameter: nn.Parameter
    name: str
    units: Tensor

    def gradient(self) -> Tensor | None:
        """The gradient, to be added to; None if there is none."""
        gradient = self.parameter.grad
        if gradient is not None and gradient.layout is not torch.strided:
            raise TrainingError(
                f"the gradient of {self.name!r} is sparse, which cannot be added to; make the layer with "
                f"sparse=False."
            )
        return gradient

    def spread(self, values: Tensor) -> Tensor:
        """Each entry's value of its unit, 0 for entries of none; ``values: (units,)``."""
        values = torch.cat([values, values.new_zeros(1)]).to(self.parameter)
        return values[self.units.to(values.device)]

    def squares(self) -> Tensor:
        """Sum of squares over the dimensions that do not tell units apart."""
        squares = self.parameter.square()
        others = [d for d, size in enumerate(self.units.shape) if size == 1]
        return squares.sum(others, keepdim=True) if others else squares


class _Regularizer(ABC):
    """The entries of each group, as parameters of the model that is trained."""

    def __init__(self, graph: Any, model: Any) -> None:
        if not isinstance(graph, CouplingGraph) or not isinstance(model, nn.Module):
            raise TrainingError(
                f"{type(self).__name__} takes what fxprune.analyze(model, x) gave and the model, got "
                f"{type(graph).__name__} and {type(model).__name__}."
            )
        self._model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._entries = {group.name: list(self._of(group)) for group in graph.groups}
        self._sizes = {group.name: group.size for group in graph.groups}

    def _of(self, group: Group) -> Iterator[_Entries]:
        for member in group.members:
            if member.trainable and self._takes(member):
                name, shape = member.axis.name, tuple(member.tensor.shape)
                parameter = self._parameters.get(name)
                if parameter is None or tuple(parameter.shape) != shape:
                    has = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
                    close = difflib.get_close_matches(name, self._parameters, n=1)
                    hint = f" (the nearest is {close[0]!r})" if parameter is None and close else ""
                    raise TrainingError(
                        f"the graph has a parameter {name!r} of shape {shape}, the model has {has}{hint}. "
                        f"Analyse the model that is trained: after narrowing, the narrowed one."
                    )
                order = [*member.over, member.axis.dim]
                units = member.units.transpose(np.argsort(order))
                sizes = [size if d in order else 1 for d, size in enumerate(shape)]
                index = torch.from_numpy(np.ascontiguousarray(units).reshape(sizes))
                yield _Entries(parameter, name, index.to(parameter.device))

    def _takes(self, member: Member) -> bool:
        return True

    @torch.no_grad()
    def step(self) -> None:
        """Add to the gradients; to be called between the backward pass and the step of the optimiser.

        Raises:
            TrainingError: if there are no gradients to add to.
        """
        reached = False
        for group, entries in self._entries.items():
            pull = self._pull(group)
            for one in entries:
                gradient = one.gradient()
                if gradient is not None:
                    gradient.add_(one.spread(pull) * self._direction(one.parameter))
                    reached = True
        if any(self._entries.values()) and not reached:
            raise TrainingError(
                f"no parameter has a gradient that {type(self).__name__} could add to. Call step() after "
                f"loss.backward() and before optimizer.step(), for the model that is trained."
            )

    @abstractmethod
    def _pull(self, group: str) -> Tensor:
        """How hard each unit is pulled towards zero, ``(units,)``."""

    def _direction(self, parameter: Tensor) -> Tensor:
        """What that is multiplied with, entry by entry."""
        return parameter

    def _norms(self, group: str) -> Tensor:
        """The L2 norm of all entries of each unit, ``(units,)``."""
        entries = self._entries[group]
        first = entries[0].parameter if entries else torch.zeros(0)
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(self._sizes[group] + 1, dtype=dtype, device=first.device)
        for one in entries:
            units = (one.units % total.numel()).to(first.device)
            total.index_add_(0, units.reshape(-1), one.squares().to(total).reshape(-1))
        return total[:-1].sqrt()

    def _weakness(self, group: str) -> Tensor:
        """``(I_max - I_k) / (I_max - I_min)`` for the norms ``I`` of the units; 0 where all are alike."""
        norms = self._norms(group)
        span = norms.max() - norms.min()
        return (norms.max() - norms) / span if span > 0 else torch.zeros_like(norms)


class GroupNorm(_Regularizer):
    """The group sparsity of DepGraph: weak units shrink faster.

    Its penalty is ``strength / 2 * sum over k of gamma_k ||w_k||^2`` for each group, with ``w_k`` all entries
    of all members that go with unit ``k``, and ``gamma_k = 2^(alpha (I_max - I_k) / (I_max - I_min))`` for
    the norms ``I_k = ||w_k||``, held constant; so ``strength * gamma_k * w`` is added to the gradient
    (Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900).

    Args:
        graph: the analysis of the model, or of any copy of the architecture.
        model: the model that is trained.
        strength: factor of the penalty.
        alpha: the weakest unit of a group is pushed ``2^alpha`` times as hard as the strongest.
    """

    def __init__(
        self, graph: CouplingGraph, model: nn.Module, strength: float = 1e-4, alpha: float = 4.0
    ) -> None:
        super().__init__(graph, model)
        self.strength = _not_negative("strength", strength)
        self.alpha = alpha

    def _pull(self, group: str) -> Tensor:
        return self.strength * 2 ** (self.alpha * self._weakness(group))


class BNScale(_Regularizer):
    """Network Slimming: an L1 penalty on the scales of batch norms, as far as their channels can go.

    Its penalty is ``strength * sum |gamma|``, so ``strength * sign(gamma)`` is added to the gradient
    (Liu et al., ICCV 2017, https://arxiv.org/abs/1708.06519).

    Args:
        graph: the analysis of the model, or of any copy of the architecture.
        model: the model that is trained.
        strength: factor of the penalty.

    Raises:
        TrainingError: if no group has a batch norm.
    """

    def __init__(self, graph: CouplingGraph, model: nn.Module, strength: float = 1e-4) -> None:
        super().__init__(graph, model)
        self.strength = _not_negative("strength", strength)
        if not any(self._entries.values()):
            raise TrainingError(
                "no channel that can be removed goes through a batch norm with a scale, so there is nothing "
                "to regularise; use GroupNorm."
            )

    def _takes(self, member: Member) -> bool:
        owner, _, attribute = member.axis.name.rpartition(".")
        modules = dict(self._model.named_modules())
        return attribute == "weight" and isinstance(modules.get(owner), _BatchNorm)

    def _pull(self, group: str) -> Tensor:
        return torch.full((self._sizes[group],), self.strength, dtype=torch.float64)

    def _direction(self, parameter: Tensor) -> Tensor:
        return parameter.sign()


class GrowingReg(_Regularizer):
    """Growing regularisation: an L2 penalty that rises slowly, so that the network can adapt.

    Its penalty is ``sum over k of lambda_k / 2 ||w_k||^2``, so ``lambda_k * w`` is added to the gradient.
    Every ``every`` steps, from the first on, ``lambda_k`` grows by ``delta * u_k`` up to ``ceiling``:

    - with a plan, ``u_k`` is 1 for the units that it removes and 0 for the others: GReg-1 of Wang et al.
      (ICLR 2021, https://arxiv.org/abs/2012.09243), which drives to zero what is to go;
    - without, ``u_k = (I_max - I_k) / (I_max - I_min)`` for the norms ``I_k`` of all entries of unit
      ``k`` at that moment: the weaker a unit, the faster its penalty grows, and nothing is decided before.

    Args:
        graph: the analysis of the model, or of any copy of the architecture.
        model: the model that is trained.
        plan: what is to go, for the same architecture; or None.
        delta: growth of the penalty.
        every: number of steps between two growths.
        ceiling: largest penalty.

    Attributes:
        penalty: ``lambda`` of the units of each group, by its name; ``(units,)``.

    Raises:
        PlanError: if the plan has other groups than the graph.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        model: nn.Module,
        plan: PruningPlan | None = None,
        delta: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
    ) -> None:
        super().__init__(graph, model)
        self.delta, self.every, self.ceiling = _not_negative("delta", delta), every, ceiling
        self.penalty = {name: torch.zeros(size, dtype=torch.float64) for name, size in self._sizes.items()}
        self._count = 0
        self._targets: dict[str, Tensor] | None = None
        if plan is not None:
            self._targets = {name: torch.zeros_like(penalty) for name, penalty in self.penalty.items()}
            for name, gone in plan.removed.items():
                if plan.sizes.get(name) != self._sizes.get(name):
                    raise PlanError(
                        f"the plan has {plan.sizes.get(name)} units in the group {name!r}, the graph has "
                        f"{self._sizes.get(name, 'no such group')}. Plan again for this model."
                    )
                self._targets[name][list(gone)] = 1

    def step(self) -> None:
        """Add to the gradients; let the penalty grow if it is time."""
        super().step()
        self._count += 1

    def _pull(self, group: str) -> Tensor:
        penalty = self.penalty[group]
        if self._count % self.every == 0:
            target = self._targets[group] if self._targets is not None else self._weakness(group)
            penalty.add_(self.delta * target.to(penalty)).clamp_(max=self.ceiling)
        return penalty


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise TrainingError(f"{name} is a number from 0 on, larger for a stronger pull; got {value!r}.")
    return value
