"""Criteria that ask how the loss changes when weights are removed: derivatives of first and second order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..capture.patches import switched
from ..coupling.graph import CouplingGraph
from ..coupling.groups import Member
from ..errors import ImportanceError
from .base import Entries, Measure, MemberCriterion, PerUnit, gathered
from .calibration import Loss, Sums, add, as_data, as_loss, collect, derivatives, parameter_names, trainable


@dataclass(frozen=True, eq=False)
class LossCriterion(MemberCriterion):
    """A criterion that needs a loss over data.

    The model runs in evaluation mode, under the seed of the plan, and is left as it was found. Frozen
    parameters (``requires_grad=False``) are measured like others. Where ``torch.distributed`` is initialised,
    each rank gives its own part of the data, and all ranks get the same scores.

    Attributes:
        loss: ``loss(model, batch)`` returns a tensor of one number. Also a loss module
            (``nn.CrossEntropyLoss()``) or a function of ``torch.nn.functional``; then batches are pairs
            ``(inputs, target)``.
        data: batches in a list, a data loader or any other iterable; gone through once for each plan.
    """

    loss: Any = None
    data: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        as_data(self.data, owner)
        as_loss(self.loss, owner)

    def summed(self, model: nn.Module, seed: int, step: Any) -> tuple[Sums, int]:
        """What ``step(value of the loss, parameters, sums)`` adds up, and the number of batches."""
        owner = type(self).__name__
        loss: Loss = as_loss(self.loss, owner)
        parameters = trainable(model)

        def batch_step(batch: Any, sums: Sums) -> None:
            step(loss(model, batch), parameters, sums)

        return collect(owner, model, as_data(self.data, owner), batch_step, seed)

    def mean_gradients(
        self, model: nn.Module, seed: int, of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
    ) -> dict[str, torch.Tensor]:
        """Mean over batches of the gradients, or of a function of them; by the parameter's first name."""
        owner = type(self).__name__

        def step(value: torch.Tensor, parameters: dict[str, torch.Tensor], sums: Sums) -> None:
            for name, gradient in derivatives(owner, value, parameters).items():
                add(sums, (name,), of(_precise(gradient)))

        sums, count = self.summed(model, seed, step)
        return {name: value / count for (name,), value in sums.items()}


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """Single precision or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def times_weight(
    model: nn.Module, factors: dict[str, torch.Tensor], power: int, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """``scale * |w|^power * factor`` for every entry of every parameter; zero where the loss knows none."""
    return {
        name: scale * parameter.detach().to(factors[name].dtype).abs() ** power * factors[name]
        if name in factors
        else torch.zeros((), device=parameter.device).expand(parameter.shape)
        for name, parameter in trainable(model).items()
    }


def by_name(model: nn.Module, entries: dict[str, torch.Tensor]) -> Entries:
    """The measure that reads the entries of a parameter by its name."""
    name = parameter_names(model)
    return Entries(lambda member: entries.get(name(member) or ""))


@dataclass(frozen=True, eq=False)
class Taylor(LossCriterion):
    """The change of the loss to first order, averaged over batches.

    ``s_m(u) = mean over batches of sum over entries w of m at u of |w * g|``, ``g = dloss/dw`` of the batch;
    with ``joint`` ``mean over batches of sum over indices of u on m of |sum over entries there of w * g|``.
    Molchanov et al., ICLR 2017 (https://arxiv.org/abs/1611.06440) and CVPR 2019
    (https://arxiv.org/abs/1906.10771). Sizes are averaged, not signed values, which cancel each other in a
    trained network; on a single batch the two are the same. The squares of the latter paper (``mean of
    (w * g)^2``) are twice the scores of :class:`Fisher`.

    Attributes:
        joint: let the entries at an index cancel each other, as they do if all of them go.
    """

    _: KW_ONLY
    joint: bool = False

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """One gradient for each batch."""
        if not self.joint:
            return by_name(model, times_weight(model, self.mean_gradients(model, seed, torch.abs), 1))
        first = parameter_names(model)
        kept = {
            (first(m), m.over, m.axis.dim) for group in graph.groups for m in group.members if m.trainable
        }

        def step(value: torch.Tensor, parameters: dict[str, torch.Tensor], sums: Sums) -> None:
            gradients = derivatives("Taylor", value, parameters)
            for name, over, dim in kept:
                if name in parameters:
                    weight = _precise(parameters[name])
                    gradient = _precise(gradients[name]) if name in gradients else torch.zeros_like(weight)
                    gone = [d for d in range(weight.dim()) if d not in (*over, dim)]
                    sizes = (weight * gradient).sum(gone) if gone else weight * gradient
                    add(sums, (name, over, dim), sizes.abs())

        sums, count = self.summed(model, seed, step)

        def of_member(member: Member, size: int) -> PerUnit | None:
            found = sums.get((first(member), member.over, member.axis.dim))
            if found is None:
                return None
            order = sorted((*member.over, member.axis.dim))
            found = found.permute([order.index(d) for d in (*member.over, member.axis.dim)]) / count
            return gathered(found.to("cpu").to(torch.float64).numpy(), member, size)

        return of_member


@dataclass(frozen=True, eq=False)
class Fisher(LossCriterion):
    """Optimal Brain Damage with the diagonal of the empirical Fisher matrix in place of the Hessian's.

    ``s_m(u) = sum over entries w of m at u of w^2 / 2 * F``, ``F = mean over batches of (dloss/dw)^2``. With
    batches of one sample and a negative log-likelihood as loss, ``F`` is the diagonal of the empirical Fisher
    matrix; with larger batches it is that of the batches' mean gradients, which is smaller and noisier. LeCun
    et al., NIPS 1989 (https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html);
    Theis et al., 2018 (https://arxiv.org/abs/1801.05787). Never negative.
    """

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """One squared gradient for each batch."""
        return by_name(model, times_weight(model, self.mean_gradients(model, seed, torch.square), 2, 0.5))


@dataclass(frozen=True, eq=False)
class Hessian(LossCriterion):
    """Optimal Brain Damage: the change of the loss to second order, by the diagonal of the Hessian.

    ``s_m(u) = sum over entries w of m at u of w^2 / 2 * h``, where ``h`` estimates the diagonal of the
    Hessian of the mean loss over batches: ``h = mean over samples of v * (H v)`` with entries of ``v`` drawn
    from ``{-1, 1}`` (Hutchinson), which is unbiased, and exact where ``H`` is diagonal. All batches see the
    same ``v``, which depend on the seed alone. Scores may be negative where the loss curves downwards. LeCun
    et al., NIPS 1989 (https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html);
    the estimate as in Yao et al., AAAI 2021 (https://arxiv.org/abs/2006.00719).

    Attributes:
        samples: how many ``v``; each costs a second backward pass for each batch.
    """

    _: KW_ONLY
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.samples) is not int or self.samples < 1:
            raise ImportanceError(f"samples={self.samples!r} must be a whole number of vectors, 1 or more.")

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """``samples`` products of the Hessian with a vector for each batch."""

        def step(value: torch.Tensor, parameters: dict[str, torch.Tensor], sums: Sums) -> None:
            gradients = derivatives("Hessian", value, parameters, again=True)
            curved = {name: g for name, g in gradients.items() if g.requires_grad}
            for name, gradient in gradients.items():
                add(sums, (name,), torch.zeros_like(gradient))
            generator = torch.Generator().manual_seed(seed)
            for _ in range(self.samples if curved else 0):
                signs = {name: _signs(parameter, generator) for name, parameter in parameters.items()}
                try:
                    products = torch.autograd.grad(
                        list(curved.values()),
                        list(parameters.values()),
                        [signs[name] for name in curved],
                        retain_graph=True,
                        allow_unused=True,
                    )
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # what else a second backward pass fails with
                    raise ImportanceError(
                        f"Hessian needs second derivatives, which an operator of the model does not have: "
                        f"{error}. Use Fisher, which needs first ones only."
                    ) from error
                for (name, sign), product in zip(signs.items(), products, strict=True):
                    if product is not None:
                        add(sums, (name,), sign * product)

        cudnn = torch.backends.cudnn.flags(enabled=not _recurrent(model))
        with switched(sdpa_kernel(SDPBackend.MATH), cudnn):
            sums, count = self.summed(model, seed, step)
        factors = {name: value / (count * self.samples) for (name,), value in sums.items()}
        return by_name(model, times_weight(model, factors, 2, 0.5))


def _signs(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random signs, the same on every device."""
    signs = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(parameter.device, parameter.dtype)


def _recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())
