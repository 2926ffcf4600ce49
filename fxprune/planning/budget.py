"""Budgets: how much of a network may be left, and the search for a selection that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ..coupling.units import Ids
from ..errors import BudgetError
from .cost_model import CostModel, Mask
from .latency import ADVICE, Meter

METRICS = ("params", "macs", "activations", "size_mb", "latency")

_NEAR = 0.99
"""A budget is used up if what is left costs at least this share of it, where one step allows it."""


@dataclass(frozen=True)
class Budget:
    """What may be left of a network. All that is given must hold.

    A number up to 1 is the share to keep of what the model has now, a larger one an amount. All but the
    latency is met exactly, and within 1 % where single units are that small. A latency is first met by an
    estimate, from a table of the network's ATen calls that is measured on the device of the model; then the
    narrowed network itself is timed in turns with the original, and the estimate corrected, until
    the two agree to 5 % (six times at most). Plans for a latency are as repeatable as the device's clock.

    Attributes:
        params: parameters; ``0.5`` or ``5_000_000``.
        macs: multiply-accumulates of one forward pass over the example inputs; ``0.5`` or ``2e9``.
        activations: entries that convolutions, matrix products and attention put out, likewise.
        size_mb: size of the state dict in units of 10^6 bytes, always an amount.
        latency: time of one forward pass over the example inputs, in evaluation mode: ``0.6``, or ``25`` for
            25 milliseconds.
        compiled: time the networks under ``torch.compile``.
        table: JSON file for the table of calls; by default one for the device and the version of torch in
            the folder ``$FXPRUNE_CACHE``, or ``~/.cache/fxprune``.

    Raises:
        BudgetError: if nothing is given, or something that is no positive number.
    """

    params: float | None = None
    macs: float | None = None
    activations: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    compiled: bool = False
    table: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = self.settings()
        if not given:
            names = ", ".join(METRICS)
            raise BudgetError(f"a budget needs at least one of {names}, such as Budget(macs=0.5).")
        for name, value in given.items():
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                what = "an amount" if name == "size_mb" else "a share up to 1, or an amount"
                raise BudgetError(f"{name} is {what} to keep, larger than 0; got {value!r}.")

    def shares(self, costs: CostModel) -> dict[str, float]:
        """What is given as shares of what the network has now; of the latency only where it is one."""
        full = costs.full
        found = {}
        for name, value in self.settings().items():
            if name == "latency":
                found[name] = min(value, 1.0)
            else:
                share = value <= 1 and name != "size_mb"
                found[name] = value if share else value / max(_measured(costs, name)(full), 1e-9)
        return found

    def settings(self) -> dict[str, Any]:
        """What is given, by name."""
        given = {name: value for name in METRICS if (value := getattr(self, name)) is not None}
        return {n: v.item() if isinstance(v, np.generic) else v for n, v in given.items()}


@dataclass(frozen=True)
class _Limit:
    """A metric and the largest value that it may have."""

    name: str
    cost: Callable[[Ids], float]
    most: float
    now: float


def _measured(costs: CostModel, metric: str) -> Callable[[Ids], float]:
    """What a network costs, by the sizes that are left."""
    if metric == "size_mb":
        return lambda sizes: costs.bytes(sizes) / 1e6
    found: Callable[[Ids], float] = getattr(costs, metric)
    return found


class Search:
    """Finds how many steps to take, of a given order of steps, so that a budget is met.

    Costs fall with every step. The search takes the shortest run of steps from the front of the order
    that meets the budget. Where its last step undershoots by more than 1 %, it takes smaller steps back,
    the last ones first, as long as the budget allows.

    Args:
        costs: the cost model.
        owner: ``(steps,)`` number of the set that loses the step; the steps of a set are in their order.
        step: ``(units,)`` the step that takes each class of units; ``steps`` for those that always stay,
            -1 for those that are gone already.
        sets: number of sets.
        meter: estimates latency, for a budget that has one.
        together: numbers of the sets that lose equally many steps.
    """

    def __init__(
        self,
        costs: CostModel,
        owner: Ids,
        step: Ids,
        sets: int,
        meter: Meter | None,
        together: Sequence[list[int]] = (),
    ) -> None:
        self.notes: tuple[str, ...] = ()
        self.costs = costs
        self.owner = owner
        self.sets = sets
        self.meter = meter
        self.together = together
        self._nth = np.zeros(owner.size, dtype=np.int64)  # of its set
        for number in range(sets):
            own = owner == number
            self._nth[own] = np.arange(own.sum())
        self._step = step
        self._taken = np.zeros(owner.size + 2, dtype=bool)
        self._taken[-1] = True  # where -1 points to

    def run(self, budget: Budget) -> tuple[Ids, Mapping[str, float]]:
        """Number of steps that each set loses, ``(sets,)``, and what is left by metric.

        Raises:
            BudgetError: if the budget cannot be met; says what the least is that can be reached.
        """
        limits = self._limits(budget)
        count = self.owner.size
        self.notes = tuple(
            f"the budget {limit.name} = {limit.most:,.10g} is met without removing anything: "
            f"it is {limit.now:,.10g} now"
            for limit in limits
            if limit.name != "latency" and limit.now <= limit.most
        )
        if self._use(self._first(count), limits) > 1:
            raise self._unreachable(limits)
        low, high = -1, count  # the first `high` steps are enough, the first `low` are not
        while high - low > 1:
            middle = (low + high) // 2
            if self._use(self._first(middle), limits) <= 1:
                high = middle
            else:
                low = middle
        taken = self._first(high)
        self._give_back(taken, limits)
        sizes = self._sizes(taken)
        return self._chosen(taken), {limit.name: limit.cost(sizes) for limit in limits}

    def _limits(self, budget: Budget) -> list[_Limit]:
        whole = self.costs.whole
        full = whole.sizes(np.ones(whole.prunable.size, dtype=bool))
        limits = []
        cost: Callable[[Ids], float]
        for name, value in budget.settings().items():
            if name == "latency":
                assert self.meter is not None
                cost = self.meter.estimate(self.costs)
                # An estimate does not say that a latency is out of reach: that is left to the clock.
                self.meter.least = cost(self._sizes(self._first(self.owner.size)))
                limits.append(_Limit(name, cost, max(self.meter.aim, self.meter.least), 1.0))
                continue
            cost, now = _measured(self.costs, name), _measured(whole, name)(full)
            most = value * now if value <= 1 and name != "size_mb" else value
            limits.append(_Limit(name, cost, most, now))
        return limits

    def _first(self, count: int) -> Mask:
        taken = self._taken.copy()
        taken[:count] = True
        return taken

    def _chosen(self, taken: Mask) -> Ids:
        """Number of steps that each set loses, ``(sets,)``."""
        steps: Ids = np.bincount(self.owner[taken[: self.owner.size]], minlength=self.sets)
        return equal_steps(self.together, steps)

    def _sizes(self, taken: Mask) -> Ids:
        if self.together:
            lost = self._nth < self._chosen(taken)[self.owner]
            taken = np.concatenate([lost, taken[self.owner.size :]])
        return self.costs.sizes(~taken[self._step])

    def _use(self, taken: Mask, limits: list[_Limit]) -> float:
        """The largest share of a limit that is used."""
        sizes = self._sizes(taken)
        return max(limit.cost(sizes) / limit.most for limit in limits)

    def _give_back(self, taken: Mask, limits: list[_Limit]) -> None:
        """Restore steps, each the last of its set, as long as all limits hold and are not used up."""
        if self._use(taken, limits) >= _NEAR:
            return
        ended = np.zeros(self.sets, dtype=bool)
        for place in np.flatnonzero(taken[: self.owner.size])[::-1].tolist():
            if ended[self.owner[place]]:
                continue
            taken[place] = False
            use = self._use(taken, limits)
            if use > 1:
                taken[place] = True
                ended[self.owner[place]] = True  # its earlier steps come after this one
            elif use >= _NEAR:
                return

    def _unreachable(self, limits: list[_Limit]) -> BudgetError:
        sizes = self._sizes(self._first(self.owner.size))
        lines = []
        for limit in limits:
            least = limit.cost(sizes)
            if least > limit.most:
                lines.append(
                    f"{limit.name} = {limit.most:,.10g} ({limit.most / limit.now:.3g} of the original) "
                    f"cannot be met: the least that can be reached is {least:,.10g} "
                    f"({least / limit.now:.3g})."
                )
        large = ", ".join(f"{name} ({entries:,})" for name, entries in self.costs.largest(sizes))
        return BudgetError(
            f"{' '.join(lines)} With everything removed that may be, the largest parameters are {large}. "
            f"{ADVICE}"
        )


def equal_steps(together: Iterable[list[int]], steps: Ids) -> Ids:
    """As many steps, ``(sets,)``, for all sets that go together as the most that one of them loses."""
    even = steps.copy()
    for numbers in together:
        even[numbers] = even[numbers].max()
    return even


__all__ = ["Budget", "Search", "equal_steps"]
