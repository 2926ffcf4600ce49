"""Depth: residual branches that go as a whole, where that costs the outputs less than narrower layers.

The branches go one after the other, next the one whose loss costs the outputs least for what it saves. Every
number of them leaves another part of the budget to the widths: numbers from 0 on are tried, each with the
choice of widths for what is left and with compensation, on a part of the calibration data, and that counts
whose outputs come nearest to the original's on other calibration data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..coupling.branches import Branch
from ..errors import BudgetError
from ..importance.calibration import progress
from ..planning.budget import Budget
from ..planning.cost_model import CostModel
from ..planning.latency import Meter
from .judge import Judge

_SAME = 1e-9
"""Losses of outputs that differ by no more are the same."""

_WORSE = 2
"""After so many numbers of branches, each twice the last, that bring nothing, no more are tried."""

_T = TypeVar("_T")


@dataclass
class Order:
    """Branches in the order in which they go: next the one that costs the outputs least for what it saves.

    The loss of a branch that has been measured while others were still there is measured again only when it
    would be the next one (a lazy greedy search: Minoux, 1978).

    Args:
        judge: measures what is lost.
        branches: those that may go, by name.
        fixed: those that are gone from the beginning.
        saved: for a branch the share of what has to go that goes with it, by metric.
    """

    judge: Judge
    branches: Mapping[str, Branch]
    fixed: Sequence[Branch]
    saved: Callable[[Branch], Mapping[str, float]]
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next = self._search()

    def first(self, count: int) -> list[str]:
        """The first ``count`` names, or all that there are: fewer, where fewer leave nothing else to go."""
        self.names += itertools.islice(self._next, max(count - len(self.names), 0))
        return self.names[:count]

    def _search(self) -> Iterator[str]:
        gone = list(self.fixed)
        total: dict[str, float] = {}
        left = dict(self.branches)
        before = self.judge.without(gone) if gone else 0.0

        def price(branch: Branch) -> float:
            added = max(self.judge.without([*gone, branch]) - before, _SAME)
            return added / max(sum(self.saved(branch).values()), 1e-12)

        prices = {name: price(branch) for name, branch in progress([*left.items()], "residual branches")}
        while left and not (total and all(share >= 1 for share in total.values())):
            nothing_went = len(gone) == len(self.fixed)
            fresh = set(left) if nothing_went else set()  # whose prices are those without what went
            while (name := min(left, key=prices.__getitem__)) not in fresh:
                prices[name] = price(left[name])
                fresh.add(name)
            chosen = left.pop(name)
            gone.append(chosen)
            before = self.judge.without(gone)
            for metric, share in self.saved(chosen).items():
                total[metric] = total.get(metric, 0.0) + share
            left = {name: branch for name, branch in left.items() if branch.addition not in chosen.nodes}
            yield name


def saved(costs: CostModel, budget: Budget, meter: Meter | None) -> Callable[[Branch], dict[str, float]]:
    """A function from a branch to the share of what has to go for a budget that goes with it, by metric."""
    shares = budget.shares(costs)
    latency = meter.estimate(costs) if meter is not None else None
    if meter is not None:
        shares["latency"] = meter.aim
    now = costs({})

    def of(branch: Branch) -> dict[str, float]:
        count = costs.branch(branch)
        found = {}
        for name, share in shares.items():
            if latency is not None and name == "latency":
                part = latency.branch(branch)
            elif name == "size_mb":
                part = count.bytes / max(now.bytes, 1)
            else:
                part = getattr(count, name) / max(getattr(now, name), 1)
            if share < 1:
                found[name] = part / (1 - share)
        return found

    return of


@dataclass
class Depth(Generic[_T]):
    """The search for the number of branches.

    Attributes:
        order: the branches in their order.
        most: no more of them go.
        decide: what to remove when these branches are gone.
        judge: what of the outputs is lost then.
        tried: by number of branches what was lost; infinite where the budget cannot be met.
        count: the best number, after :meth:`run`.
    """

    order: Order
    most: int
    decide: Callable[[list[str]], _T]
    judge: Callable[[_T], float]
    tried: dict[int, float] = field(default_factory=dict, init=False)
    count: int = field(default=0, init=False)
    _best: _T | None = field(default=None, init=False)
    _least: float = field(default=math.inf, init=False)
    _error: BudgetError | None = field(default=None, init=False)

    def run(self) -> _T:
        """The best decision.

        Raises:
            BudgetError: if the budget can be met with no number of branches.
        """
        count, worse = 0, 0
        while worse < _WORSE:
            better = self._try(count)
            worse = 0 if better or self._best is None else worse + 1
            following = len(self.order.first(min(max(2 * count, 1), self.most)))
            if following == count:
                break
            count = following
        counts = sorted(self.tried)
        at = counts.index(self.count)
        for low, high in itertools.pairwise(counts[max(at - 1, 0) : at + 2]):
            if high - low > 1:
                self._try((low + high) // 2)
        if self._best is None:
            assert self._error is not None
            raise self._error
        return self._best

    @property
    def note(self) -> str:
        """What was tried, for people."""
        losses = ", ".join(
            f"{loss:.3g} with {count}" if math.isfinite(loss) else f"the budget is not met with {count}"
            for count, loss in sorted(self.tried.items())
        )
        return (
            f"{self.count} of {len(self.order.branches)} residual branches go, by what the outputs lose on "
            f"{self.order.judge.where}: {losses}"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The same as plain data; None where the budget is not met."""
        losses = {str(n): x if math.isfinite(x) else None for n, x in sorted(self.tried.items())}
        return {"branches_tried": losses}

    def _try(self, count: int) -> bool:
        """Whether this many branches are better than all numbers before."""
        try:
            found = self.decide(self.order.first(count))
        except BudgetError as error:
            self._error, self.tried[count] = error, math.inf
            return False
        loss = self.tried[count] = self.judge(found)
        alike = abs(loss - self._least) <= _SAME
        if self._best is not None and not (count > self.count if alike else loss < self._least):
            return False
        self._best, self._least, self.count = found, loss, count
        return True


__all__ = ["Depth", "Order", "saved"]
