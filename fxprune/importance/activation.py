"""Criteria that look at what flows through the network: activations, and their derivatives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group, Member
from .base import Entries, Measure, MemberCriterion, PerUnit, Scores, gathered, one_of
from .calibration import (
    Sums,
    as_data,
    as_loss,
    collect,
    derivatives,
    parameter_names,
    run,
    trainable,
)
from .gradient import LossCriterion
from .products import Products, Site


@dataclass(frozen=True, eq=False)
class DataCriterion(MemberCriterion):
    """A criterion that needs inputs, but no loss.

    The model runs in evaluation mode without gradients, under the seed of the plan, and is left as it was
    found. Where ``torch.distributed`` is initialised, each rank gives its own part of the data, and all
    ranks get the same scores.

    Attributes:
        data: batches in a list, a data loader or any other iterable; gone through once for each plan. A
            batch is a tensor, a tuple (or list) of positional inputs, or a dict of keyword inputs.
        forward: ``forward(model, batch)`` runs the model on a batch of another kind,
            ``lambda model, batch: model(batch[0])`` where it holds targets, too.
    """

    data: Iterable[Any] | None = None
    forward: Callable[[nn.Module, Any], Any] = run

    def __post_init__(self) -> None:
        super().__post_init__()
        as_data(self.data, type(self).__name__)

    def summed(self, model: nn.Module, seed: int) -> tuple[Sums, int]:
        """What :meth:`see` adds up over all sites of all batches, and the number of batches."""
        owner = type(self).__name__

        def step(batch: Any, sums: Sums) -> None:
            def see(site: Site, x: torch.Tensor, y: torch.Tensor, bias: Any) -> None:
                self.see(sums, site, x, y)

            with Products(model, see):
                self.forward(model, batch)

        return collect(owner, model, as_data(self.data, owner), step, seed, gradients=False)

    @abstractmethod
    def see(self, sums: Sums, site: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add what is needed of input and output of a product."""


@dataclass(frozen=True, eq=False)
class Activation(DataCriterion):
    """What a unit carries: the size or the variance of its activations.

    ``s_m(u)`` is taken over samples and positions of the activations ``x`` that belong to ``u`` where the
    weight ``m`` consumes them, as inputs of linear layers, convolutions and matrix products: ``mean of |x|``
    (``"magnitude"``; Molchanov et al., ICLR 2017, https://arxiv.org/abs/1611.06440, section 2.2), or
    ``mean of x^2 - (mean of x)^2`` (``"variance"``; the fluctuation of An et al., AAAI 2024,
    https://arxiv.org/abs/2312.11983, without its weights). Several indices of a unit on a member are
    averaged. Units that no weight consumes (those of queries and keys) are measured where weights produce
    them.

    Attributes:
        statistic: ``"magnitude"`` or ``"variance"``.
    """

    _: KW_ONLY
    reduce: str = "mean"
    statistic: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("statistic", self.statistic, ("magnitude", "variance"))

    def see(self, sums: Sums, site: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        """Sums over positions of both sides of a product."""
        for side, folded in (("in", site.folded(x)), ("out", site.folded(y))):
            _count(sums, site, side, folded)
            if self.statistic == "magnitude":
                _add(sums, site, side, "sum", folded.abs().sum(2))
            else:
                _add(sums, site, side, "sum", folded.sum(2, dtype=_exact(folded)))
                _add(sums, site, side, "squares", folded.square().sum(2, dtype=_exact(folded)))

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """What weights consume."""
        return self.sides(model, seed)[0]

    def sides(self, model: nn.Module, seed: int) -> tuple[Measure, Measure]:
        """What weights consume, and what they produce."""
        places, name = _by_place(self.summed(model, seed)[0]), parameter_names(model)

        def measure(side: str) -> Measure:
            def of_member(member: Member, size: int) -> PerUnit | None:
                found = places.get((name(member), member.axis.dim, side))
                if found is None:
                    return None
                seen = {what: at_indices(value, member) for what, value in found.items()}
                number = np.maximum(seen["count"], 1)
                values = seen["sum"] / number
                if self.statistic == "variance":
                    squares = seen["squares"] / number
                    values = np.maximum(squares - values**2, 0)
                total, held = gathered(values, member, size)
                indices, _ = gathered(np.ones(member.units.shape), member, size)
                return total / np.maximum(indices, 1), held

            return of_member

        return measure("in"), measure("out")

    def prepare(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Callable[[Group], Scores]:
        """See :meth:`Criterion.prepare`."""
        consumed, produced = self.sides(model, seed)

        def scores(group: Group) -> Scores:
            values, held = self.joined(group, consumed)
            if not held.all():
                others, also = self.joined(group, produced)
                values, held = np.where(held, values, others), held | also
            return self.scored(group, (values, held))

        return scores


@dataclass(frozen=True, eq=False)
class Wanda(DataCriterion):
    """Weights times the activations that they meet.

    ``s_m(u) = sum over entries w of m at u of |w| * ||x||``, where ``||x||`` is the root mean square, over
    samples and positions, of the input that ``w`` is multiplied with. Sun et al., ICLR 2024,
    https://arxiv.org/abs/2306.11695, with the norm divided by the root of the number of positions, so that
    neither the amount of data nor the size of images matters. Weights of linear layers, convolutions and
    matrix products count; biases and scales do not.
    """

    def see(self, sums: Sums, site: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        """Sums of squares of the input."""
        folded = site.folded(x)
        _count(sums, site, "in", folded)
        _add(sums, site, "in", "squares", folded.square().sum(2))

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """One run for each batch."""
        places, name = _by_place(self.summed(model, seed)[0]), parameter_names(model)
        norms: dict[str, torch.Tensor] = {}
        for (parameter, *_), seen in places.items():
            norm = (seen["squares"] / seen["count"].clamp(min=1)).sqrt()
            # Weights that are used both ways, as by an autoencoder with tied ones, meet two inputs.
            norms[parameter] = norms[parameter] + norm if parameter in norms else norm

        def entries(member: Member) -> torch.Tensor | None:
            norm = norms.get(name(member) or "")
            return None if norm is None else (member.tensor.detach().abs() * norm)

        return Entries(entries)


@dataclass(frozen=True, eq=False)
class KFAC(LossCriterion):
    """Optimal Brain Damage on channels, with a Kronecker-factored Fisher matrix.

    For the channels ``y`` that a weight produces, without its bias, and their derivatives ``g = dloss/dy``:
    ``s_m(u) = 1/2 * (mean of y_u^2) * G_u``. For the channels ``x`` that it consumes, with the part
    ``d`` of ``dloss/dx`` that comes through this weight: ``s_m(u) = 1/2 * (mean of x_u^2) * D_u``. The means
    run over samples and positions; ``G`` and ``D`` are sums of squares over samples and positions, averaged
    over batches. Both are the second-order change of the loss if the channel goes, under K-FAC's assumption
    that activations and derivatives are independent: with its factors ``A = mean of x x^T`` and ``S = mean of
    g g^T`` (Martens and Grosse, ICML 2015, https://arxiv.org/abs/1503.05671; Grosse and Martens, ICML 2016,
    https://arxiv.org/abs/1602.01407), ``mean of y_u^2`` is ``w_u^T A w_u``, so that the first is the
    quadratic form of ``A (x) S`` with the weights of the channel, up to the number of samples and positions.
    That is OBD on channels as in EigenDamage (Wang et al., ICML 2019, http://proceedings.mlr.press/v97/wang19g.html).
    Neither factor is ever formed. Weights of linear layers, convolutions and matrix products count.
    Torch-Pruning's OBD-C is :class:`Fisher` over batches of one sample, on the producing weights.
    """

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """One backward pass for each batch."""
        owner = type(self).__name__
        loss, parameters = as_loss(self.loss, owner), trainable(model)

        def step(batch: Any, sums: Sums) -> None:
            def see(site: Site, x: torch.Tensor, y: torch.Tensor, bias: Any) -> Callable[[Any, Any], None]:
                plain = y if bias is None else y - bias
                for side, folded in (("in", site.folded(x)), ("out", site.folded(plain))):
                    _count(sums, site, side, folded)
                    _add(sums, site, side, "squares", folded.square().sum(2))

                def come_back(by_output: Any, by_input: Any) -> None:
                    for side, value in (("in", by_input), ("out", by_output)):
                        if value is not None:
                            squares = site.folded(value).square().sum(2)
                            _add(sums, site, side, "derivatives", squares, once=True)

                return come_back

            with Products(model, see):
                value = loss(model, batch)
            derivatives(owner, value, parameters)

        sums, batches = collect(owner, model, as_data(self.data, owner), step, seed)
        places, name = _by_place(sums), parameter_names(model)

        def of_member(member: Member, size: int) -> PerUnit | None:
            found: PerUnit | None = None
            for side in ("in", "out"):
                seen = places.get((name(member), member.axis.dim, side))
                if seen is not None:
                    mean = seen["squares"] / seen["count"].clamp(min=1)
                    changes = seen.get("derivatives", torch.zeros_like(mean))
                    product = 0.5 * mean * changes / batches
                    total, held = gathered(at_indices(product, member), member, size)
                    found = (total, held) if found is None else (found[0] + total, held)
            return found

        return of_member


def _add(sums: Sums, site: Site, side: str, what: str, statistic: torch.Tensor, once: bool = False) -> None:
    """Add a statistic of the channels that a weight consumes (``"in"``) or produces (``"out"``)."""
    dim = site.inner if side == "in" else site.outer
    laid = site.spread(statistic, dim, once)
    site.add(sums, (site.name, dim, side, what), laid)
    if side == "out" and site.rows is not None:  # what a whole matrix of a batch produces
        site.add(sums, (site.name, site.rows, side, what), laid)


def _count(sums: Sums, site: Site, side: str, folded: torch.Tensor) -> None:
    """Add the number of positions of each channel."""
    _add(sums, site, side, "count", folded.new_full(folded.shape[:2], float(folded.shape[2])))


def _by_place(sums: Sums) -> dict[tuple[Any, ...], Sums]:
    """Sums by parameter, dimension and side; then by what they are of."""
    places: dict[tuple[Any, ...], Sums] = {}
    for key, value in sums.items():
        places.setdefault(key[:-1], {})[key[-1]] = value
    return places


def _exact(value: torch.Tensor) -> torch.dtype:
    """Double precision, where a device has it."""
    return value.dtype if value.device.type == "mps" else torch.float64


def at_indices(statistic: torch.Tensor, member: Member) -> Scores:
    """A tensor of the parameter's dimensions (size 1 where all are alike), summed to the shape of units."""
    kept = (*member.over, member.axis.dim)
    gone = [d for d in range(statistic.dim()) if d not in kept]
    values = statistic.sum(gone) if gone else statistic
    order = sorted(kept)
    values = values.permute([order.index(d) for d in kept])
    return np.broadcast_to(values.to("cpu").to(torch.float64).numpy(), member.units.shape)
